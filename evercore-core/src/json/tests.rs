use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Json, NOT_AN_EVENT, join};
use crate::aggregate::{EventCodec, StateCodec};
use crate::limits;

fn parts<E: Serialize + DeserializeOwned>(event: &E) -> (String, String) {
    let encoded = Json::encode(event).unwrap();
    (encoded.event_type.into_owned(), String::from_utf8(encoded.payload).unwrap())
}

fn decode<E: Serialize + DeserializeOwned>(name: &str, payload: &str) -> Result<E, String> {
    Json::decode(name, payload.as_bytes()).map_err(|error| error.to_string())
}

#[track_caller]
fn round_trip<E: Serialize + DeserializeOwned + PartialEq + Debug>(event: &E, name: &str, payload: &str) {
    assert_eq!(parts(event), (name.to_owned(), payload.to_owned()));
    assert_eq!(decode::<E>(name, payload).as_ref(), Ok(event));
}

/// Refused when written and when read, with the same error.
#[track_caller]
fn refused<E: Serialize + DeserializeOwned + Debug>(event: &E) {
    let written = Json::encode(event).err().expect("must not be written");
    assert_eq!(written.to_string(), NOT_AN_EVENT);
    for payload in ["null", "{}", r#"{"a":1}"#, r#"{"kind":"A","a":1}"#, "1", "\"A\"", "{\"A\":null}"] {
        for name in ["A", "B", "a", "kind", ""] {
            assert_eq!(decode::<E>(name, payload).unwrap_err(), NOT_AN_EVENT);
        }
    }
    assert!(<Json as EventCodec<E>>::event_types().is_empty());
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Shapes {
    Unit,
    Newtype(u64),
    NewtypeOption(Option<u64>),
    NewtypeEnum(Inner),
    Boxed(Box<Inner>),
    Tuple(u8, String),
    EmptyTuple(),
    Struct { x: i32, text: Option<String> },
    EmptyStruct {},
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Inner {
    A,
    B { b: u8 },
}

#[test]
fn every_shape_of_variant_comes_back() {
    round_trip(&Shapes::Unit, "Unit", "null");
    round_trip(&Shapes::Newtype(u64::MAX), "Newtype", "18446744073709551615");
    round_trip(&Shapes::NewtypeOption(None), "NewtypeOption", "null");
    round_trip(&Shapes::NewtypeOption(Some(3)), "NewtypeOption", "3");
    round_trip(&Shapes::NewtypeEnum(Inner::A), "NewtypeEnum", r#""A""#);
    round_trip(&Shapes::Boxed(Box::new(Inner::B { b: 1 })), "Boxed", r#"{"B":{"b":1}}"#);
    round_trip(&Shapes::Tuple(1, "two".into()), "Tuple", r#"[1,"two"]"#);
    round_trip(&Shapes::EmptyTuple(), "EmptyTuple", "[]");
    round_trip(&Shapes::Struct { x: -1, text: None }, "Struct", r#"{"x":-1,"text":null}"#);
    round_trip(&Shapes::EmptyStruct {}, "EmptyStruct", "{}");
}

#[test]
fn the_event_types_are_the_variants() {
    let known = <Json as EventCodec<Shapes>>::event_types();
    assert_eq!(known.first(), Some(&"Unit"));
    assert_eq!(known.len(), 9);
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Renamed {
    EmailChanged {
        #[serde(rename = "e-mail", alias = "mail")]
        email: String,
    },
    #[serde(rename = "gone!", alias = "Deleted", alias = "Removed")]
    Gone,
    #[serde(rename_all = "camelCase")]
    Moved {
        new_place: u8,
        #[serde(default, skip_serializing_if = "is_zero")]
        old_place: u8,
        note: Option<String>,
    },
}

fn is_zero(number: &u8) -> bool {
    *number == 0
}

#[test]
fn renamed_variants_and_fields_are_stored_under_their_new_names() {
    round_trip(&Renamed::EmailChanged { email: "a".into() }, "email_changed", r#"{"e-mail":"a"}"#);
    round_trip(&Renamed::Gone, "gone!", "null");
    let moved = Renamed::Moved { new_place: 1, old_place: 0, note: None };
    round_trip(&moved, "moved", r#"{"newPlace":1,"note":null}"#);
}

#[test]
fn old_names_and_shapes_are_still_read() {
    assert_eq!(decode("Deleted", "null"), Ok(Renamed::Gone));
    assert_eq!(decode("Removed", "null"), Ok(Renamed::Gone));
    assert_eq!(decode("email_changed", r#"{"mail":"a"}"#), Ok(Renamed::EmailChanged { email: "a".into() }));
    let moved = Renamed::Moved { new_place: 1, old_place: 0, note: None };
    assert_eq!(decode("moved", r#"{"newPlace":1}"#), Ok(moved));
}

#[test]
fn a_name_that_is_perhaps_only_read_is_not_announced() {
    assert_eq!(<Json as EventCodec<Renamed>>::event_types(), ["email_changed", "moved"]);

    #[derive(Debug, Serialize, Deserialize)]
    enum Reader {
        Known(u8),
        #[serde(other)]
        Other,
    }
    assert_eq!(<Json as EventCodec<Reader>>::event_types(), ["Known"]);
    assert_eq!(<Json as EventCodec<Box<Reader>>>::event_types(), ["Known"]);
}

#[test]
fn a_variant_without_content_may_grow_fields() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Grown {
        Deactivated { reason: Option<String> },
        Strict { reason: String },
    }
    assert_eq!(decode("Deactivated", "null"), Ok(Grown::Deactivated { reason: None }));
    assert!(decode::<Grown>("Strict", "null").unwrap_err().contains("missing field `reason`"));
}

#[test]
fn content_that_a_variant_does_not_have_is_an_error() {
    assert!(decode::<Shapes>("Unit", "{}").is_err());
    assert!(decode::<Shapes>("Unit", "1").is_err());
    assert!(decode::<Shapes>("Tuple", "[1]").is_err());
    assert!(decode::<Shapes>("Tuple", r#"[1,"two",3]"#).is_err());
    assert!(decode::<Shapes>("Newtype", "-1").is_err());
    assert!(decode::<Shapes>("Struct", "[]").is_err());
}

#[test]
fn an_unknown_name_is_serdes_own_error() {
    let message = decode::<Inner>("gone", "null").unwrap_err();
    assert!(message.starts_with("unknown variant `gone`, expected `A` or `B`"), "{message}");
    // Names are compared exactly: no trimming, no case folding, no index.
    for name in ["a", "A ", "0", "", "\"A\""] {
        assert!(decode::<Inner>(name, "null").is_err(), "{name:?}");
    }
}

#[test]
fn other_takes_every_unknown_event_with_any_content() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Some {
        Known(u8),
        #[serde(other)]
        Other,
    }
    assert_eq!(decode("Known", "1"), Ok(Some::Known(1)));
    for payload in ["null", r#"{"a":[1]}"#, "[1,2]", "not JSON at all", ""] {
        assert_eq!(decode("Whatever", payload), Ok(Some::Other));
    }
    assert!(decode::<Some>("Known", "null").is_err());
}

#[test]
fn other_also_takes_an_event_of_its_own_name() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Some {
        Plain,
        #[serde(other)]
        Other,
    }
    for payload in ["null", r#"{"a":[1]}"#, "[1,2]", "not JSON at all", ""] {
        assert_eq!(decode("Other", payload), Ok(Some::Other), "{payload}");
    }
    assert!(decode::<Some>("Plain", "{}").is_err());
}

#[test]
fn texts_are_borrowed_from_the_payload() {
    #[derive(Debug, PartialEq, Deserialize)]
    enum Borrowed<'a> {
        Named {
            name: &'a str,
        },
        #[serde(borrow)]
        Perhaps(Cow<'a, str>),
    }
    let payload = br#"{"name":"Zo\u00eb"}"#;
    assert!(join::join::<Borrowed<'_>>("Named", payload).is_err(), "an escape cannot be borrowed");
    let payload = r#"{"name":"Zoë"}"#.as_bytes();
    assert_eq!(join::join::<Borrowed<'_>>("Named", payload).unwrap(), Borrowed::Named { name: "Zoë" });
    let Borrowed::Perhaps(text) = join::join("Perhaps", br#""plain""#).unwrap() else {
        panic!("another variant")
    };
    assert!(matches!(text, Cow::Borrowed("plain") | Cow::Owned(_)));
}

#[test]
fn fields_may_be_flattened() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Common {
        by: String,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Flat {
        Done {
            id: u64,
            #[serde(flatten)]
            common: Common,
            #[serde(flatten)]
            rest: BTreeMap<String, u8>,
        },
    }
    let event =
        Flat::Done { id: 1, common: Common { by: "me".into() }, rest: BTreeMap::from([("x".into(), 2)]) };
    round_trip(&event, "Done", r#"{"id":1,"by":"me","x":2}"#);
}

#[test]
fn a_converted_enum_is_what_it_is_converted_to() {
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(from = "Inner", into = "Inner")]
    struct Wrapped(Inner);
    impl From<Inner> for Wrapped {
        fn from(inner: Inner) -> Self {
            Self(inner)
        }
    }
    impl From<Wrapped> for Inner {
        fn from(wrapped: Wrapped) -> Self {
            wrapped.0
        }
    }
    round_trip(&Wrapped(Inner::B { b: 2 }), "B", r#"{"b":2}"#);
    round_trip(&Box::new(Inner::A), "A", "null");
}

#[test]
fn tagged_enums_are_refused() {
    #[derive(Debug, Serialize, Deserialize)]
    #[serde(tag = "kind")]
    enum Internal {
        A { a: u8 },
        B,
    }
    #[derive(Debug, Serialize, Deserialize)]
    #[serde(tag = "kind", content = "content")]
    enum Adjacent {
        A { a: u8 },
        B,
    }
    refused(&Internal::A { a: 1 });
    refused(&Internal::B);
    refused(&Adjacent::A { a: 1 });
    refused(&Adjacent::B);
}

#[test]
fn untagged_enums_are_refused() {
    #[derive(Debug, Serialize, Deserialize)]
    #[serde(untagged)]
    enum Untagged {
        A { a: u8 },
        B,
        Hidden(Inner),
    }
    refused(&Untagged::A { a: 1 });
    refused(&Untagged::B);
    refused(&Untagged::Hidden(Inner::A));

    #[derive(Debug, Serialize, Deserialize)]
    enum Partly {
        A {
            a: u8,
        },
        #[serde(untagged)]
        B(u8),
    }
    refused(&Partly::A { a: 1 });
    refused(&Partly::B(1));
}

#[test]
fn what_is_no_enum_is_refused() {
    #[derive(Debug, Serialize, Deserialize)]
    struct Struct {
        a: u8,
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct Newtype(Inner);
    #[derive(Debug, Serialize, Deserialize)]
    struct Unit;
    refused(&Struct { a: 1 });
    refused(&Newtype(Inner::A));
    refused(&Unit);
    refused(&Some(Inner::A));
    refused(&"A".to_owned());
    refused(&1_u8);
    refused(&());
    refused(&vec![Inner::A]);
    refused(&HashMap::from([("A".to_owned(), 1_u8)]));
    refused(&serde_json::json!({ "A": null }));
}

#[test]
fn what_could_not_be_read_again_is_not_written() {
    #[derive(Debug, Serialize, Deserialize)]
    enum OneWay {
        #[serde(rename(serialize = "new", deserialize = "old"))]
        Renamed,
        #[serde(skip_deserializing)]
        Skipped,
    }
    for event in [OneWay::Renamed, OneWay::Skipped] {
        let error = Json::encode(&event).err().unwrap().to_string();
        assert!(error.contains("could not be read again"), "{error}");
    }
}

#[test]
fn every_text_comes_back() {
    for text in ["", "Grüße, 世界 👩‍👩‍👧", "\u{0}\u{1}\n\r\t\"\\/", "\u{2028}\u{feff}\u{10ffff}"]
    {
        let event = Shapes::Struct { x: 0, text: Some(text.into()) };
        let (name, payload) = parts(&event);
        assert_eq!(decode(&name, &payload), Ok(event));
    }
    assert!(<Json as EventCodec<Shapes>>::decode("Tuple", b"[1,\"\xff\"]").is_err(), "not UTF-8");
    assert!(decode::<Shapes>("Tuple", r#"[1,"\ud800"]"#).is_err(), "half a surrogate pair");

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Ereignis {
        Größe(u8),
        #[serde(rename = "a\"b\\c 世")]
        Odd,
    }
    round_trip(&Ereignis::Größe(1), "Größe", "1");
    round_trip(&Ereignis::Odd, "a\"b\\c 世", "null");
}

#[test]
fn every_number_comes_back() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Number {
        U(u64),
        I(i64),
        Wide(i128),
        F(f64),
        Single(f32),
    }
    let numbers = [
        Number::U(u64::MAX),
        Number::I(i64::MIN),
        Number::Wide(i128::MIN),
        Number::Wide(i128::MAX),
        Number::F(f64::MIN_POSITIVE),
        Number::F(-0.1),
        Number::F(1e300),
        Number::Single(0.1),
    ];
    for number in numbers {
        let (name, payload) = parts(&number);
        assert_eq!(decode(&name, &payload), Ok(number));
    }
}

#[test]
fn every_float_comes_back_to_the_last_bit() {
    let mut bits = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..10_000 {
        bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let number = f64::from_bits(bits);
        if number.is_finite() {
            let read: f64 = Json::decode_state(&Json::encode_state(&number).unwrap()).unwrap();
            assert_eq!(read.to_bits(), number.to_bits(), "{number:e}: is serde_json's `float_roundtrip` on?");
        }
    }
}

#[test]
fn what_follows_the_content_is_an_error() {
    assert!(decode::<Shapes>("Unit", "null null").is_err());
    assert!(decode::<Shapes>("Newtype", "1 2").is_err());
    assert!(decode::<Shapes>("Newtype", "1,").is_err());
    assert!(decode::<Shapes>("Tuple", r#"[1,"two"]]"#).is_err());
    assert!(decode::<Shapes>("Struct", r#"{"x":1}x"#).is_err());
    assert!(<Json as StateCodec<u8>>::decode_state(b"1 2").is_err());
    assert_eq!(decode::<Shapes>("Newtype", " 1 \n"), Ok(Shapes::Newtype(1)));
}

#[test]
fn a_truncated_payload_is_an_error() {
    let payload = r#"{"x":-1,"text":"ü"}"#.as_bytes();
    for end in 0..payload.len() {
        assert!(<Json as EventCodec<Shapes>>::decode("Struct", &payload[..end]).is_err(), "{end}");
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Deep {
    Nested(serde_json::Value),
    Bytes(String),
    List(Vec<u8>),
}

fn nested(levels: usize) -> serde_json::Value {
    (0..levels).fold(serde_json::Value::Null, |inner, _| serde_json::Value::Array(vec![inner]))
}

#[test]
fn deep_json_is_refused_both_ways() {
    let (name, payload) = parts(&Deep::Nested(nested(127)));
    assert_eq!(decode(&name, &payload), Ok(Deep::Nested(nested(127))));

    let error = Json::encode(&Deep::Nested(nested(128))).err().unwrap().to_string();
    assert!(error.contains("nested deeper than 127 levels"), "{error}");

    let hostile = "[".repeat(1_000_000);
    assert!(decode::<Deep>("Nested", &hostile).unwrap_err().contains("recursion limit"));
}

#[test]
fn a_payload_may_be_as_long_as_the_limit_and_no_longer() {
    let quotes = 2;
    let longest = Deep::Bytes("x".repeat(limits::PAYLOAD_BYTES - quotes));
    assert_eq!(Json::encode(&longest).unwrap().payload.len(), limits::PAYLOAD_BYTES);

    let too_long = Deep::Bytes("x".repeat(limits::PAYLOAD_BYTES - quotes + 1));
    let error = Json::encode(&too_long).err().unwrap().to_string();
    assert_eq!(error, "the content has more than the allowed 16777216 bytes");
    assert!(Json::encode(&Deep::List(vec![0; limits::PAYLOAD_BYTES / 2 + 1])).is_err());
    assert!(Json::encode_state(&"x".repeat(limits::PAYLOAD_BYTES)).is_err());
}

#[test]
fn a_state_is_written_as_it_is() {
    let bytes = Json::encode_state(&Inner::B { b: 1 }).unwrap();
    assert_eq!(bytes, br#"{"B":{"b":1}}"#);
    assert_eq!(<Json as StateCodec<Inner>>::decode_state(&bytes).unwrap(), Inner::B { b: 1 });
    assert!(<Json as StateCodec<Inner>>::decode_state(b"").is_err());
}

#[test]
fn texts_say_the_same_in_any_order_and_to_the_last_digit() {
    let same = |one: &str, other: &str| super::same::same(one.as_bytes(), other.as_bytes());
    assert!(same(r#"{"a":1,"b":[1,2]}"#, r#"{"b":[2,1],"a":1}"#));
    assert!(same(r#"[{"a":1,"b":2},[]]"#, r#"[[],{"b":2,"a":1}]"#));
    assert!(!same(r#"{"a":1,"b":2}"#, r#"{"a":2,"b":1}"#));
    assert!(!same(r#"{"a":1,"a":2}"#, r#"{"a":1,"a":3}"#));
    assert!(!same("[1,2]", "[1,3]"));
    assert!(!same("[1,2]", r#"["1",2]"#));
    assert!(!same(r#"[{"a":1},2]"#, r#"[{"a":2},1]"#));
    assert!(!same("340282366920938463463374607431768211455", "340282366920938463463374607431768211454"));
    assert!(!same("0.0", "null"));
}

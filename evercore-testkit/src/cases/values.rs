//! Values: every payload, time and text comes back unchanged, or is refused when it is made.

use std::time::{Duration, UNIX_EPOCH};

use evercore_core::engine::Payload;
use evercore_core::{AggregateId, ErrorKind, Metadata, Position, Sequence, Timestamp, limits};

use crate::fixture::Fixture;
use crate::tools::*;

pub(crate) async fn any_payload_comes_back(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let every_byte: Vec<u8> = (0..=255).collect();
    let payloads: [&[u8]; 7] = [
        b"",
        b"\0",
        b"a\0b",
        b"\xff\xfe\xc3",
        &every_byte,
        b"{\"a\": 1,  \"a\":1.10}",
        "\u{feff}é😀".as_bytes(),
    ];
    let id = new_id(&engine).await;
    let events = payloads.iter().map(|payload| event("Happened", payload)).collect();
    unit().create(id, "user").events(id, "user", 0, events).commit(&engine).await.unwrap();
    let found: Vec<Vec<u8>> = log(&engine).await.iter().map(|event| event.payload().to_vec()).collect();
    assert_eq!(found, payloads);
}

pub(crate) async fn the_largest_payload_comes_back(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let largest: Vec<u8> = (0..limits::PAYLOAD_BYTES).map(|index| (index % 251) as u8).collect();
    let id = new_id(&engine).await;
    let events = vec![event("Large", &largest), event("Small", b"1")];
    unit().create(id, "user").events(id, "user", 0, events).commit(&engine).await.unwrap();
    let found = history(&engine, id).await;
    assert!(found.events.first().unwrap().payload() == largest);
    assert_eq!(log(&engine).await.len(), 2, "it is over the page's default, and read all the same");
}

pub(crate) async fn a_payload_over_the_limit_is_refused_before_it_is_copied(_: &mut Fixture) {
    assert!(Payload::new(vec![0; limits::PAYLOAD_BYTES]).is_ok());
    assert_kind!(Payload::new(vec![0; limits::PAYLOAD_BYTES + 1]), ErrorKind::Invalid);
    // Zeroed pages that are not touched cost nothing; a copy of them would.
    let gigabyte = vec![0; 1 << 30];
    assert_kind!(Payload::new(&gigabyte[..]), ErrorKind::Invalid);
}

pub(crate) async fn any_time_from_year_1_to_9999_comes_back(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let year_1969 = Timestamp::from_micros(-1).unwrap();
    let times = [
        Timestamp::MIN,
        Timestamp::from_micros(Timestamp::MIN.as_micros() + 1).unwrap(),
        year_1969,
        Timestamp::from_micros(0).unwrap(),
        Timestamp::from_micros(1_317_422_324_546_789).unwrap(),
        Timestamp::MAX,
    ];
    let id = new_id(&engine).await;
    let events = times.iter().map(|time| event_with("Happened", b"", *time, Metadata::new())).collect();
    unit().create(id, "user").events(id, "user", 0, events).commit(&engine).await.unwrap();
    assert_eq!(log(&engine).await.iter().map(|event| event.time()).collect::<Vec<_>>(), times);
}

pub(crate) async fn a_time_out_of_range_is_refused_where_it_is_born(_: &mut Fixture) {
    for micros in [Timestamp::MIN.as_micros() - 1, Timestamp::MAX.as_micros() + 1, i64::MIN, i64::MAX] {
        assert_kind!(Timestamp::from_micros(micros), ErrorKind::Invalid);
    }
    let far = UNIX_EPOCH + Duration::from_secs(300_000_000_000);
    assert_kind!(Timestamp::try_from(far), ErrorKind::Invalid);
}

pub(crate) async fn nanoseconds_are_cut_the_same_everywhere(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    let (after, before) = (UNIX_EPOCH + Duration::from_nanos(1_999), UNIX_EPOCH - Duration::from_nanos(1));
    let events = [after, before]
        .map(|time| event_with("Happened", b"", Timestamp::try_from(time).unwrap(), Metadata::new()));
    unit().create(id, "user").events(id, "user", 0, events.to_vec()).commit(&engine).await.unwrap();
    let times: Vec<_> = log(&engine).await.iter().map(|event| event.time().as_micros()).collect();
    assert_eq!(times, [1, -1]);
}

pub(crate) async fn negative_and_zero_numbers_are_refused_where_they_are_born(_: &mut Fixture) {
    for bad in [0, -1, i64::MIN] {
        assert_kind!(AggregateId::new(bad), ErrorKind::Invalid);
    }
    for bad in [-1, i64::MIN] {
        assert_kind!(Sequence::new(bad), ErrorKind::Invalid);
        assert_kind!(Position::new(bad), ErrorKind::Invalid);
    }
    assert_eq!(Sequence::MAX.next(), Sequence::MAX);
    assert_eq!(Position::MAX.plus(7), Position::MAX);
}

/// Texts that break careless code: direction, control and zero-width characters, SQL, templates, paths, JSON.
const HARD_TEXTS: &[&str] = &[
    "\u{202e}gnirts",
    "\u{200b}",
    "a\u{200d}b",
    "\u{1}\u{7f}\u{9b}",
    "\r\n\t",
    "שלום",
    "मनीष منش",
    "e\u{301}\u{feff}",
    "😀👩\u{200d}👩",
    "'; DROP TABLE events; --",
    "\" OR 1=1 --",
    "\\",
    "\\u0000",
    "$1",
    "?1",
    ":name",
    "%s%n",
    "{{7*7}}",
    "${jndi:ldap://x}",
    "../../etc/passwd",
    "<script>",
    "\"}{\"",
    "null",
    "NULL",
    "0x00",
    "\u{ffff}",
    "\u{10ffff}",
    " leading and trailing ",
];

pub(crate) async fn hard_texts_come_back_in_every_field(fixture: &mut Fixture) {
    let engine = fixture.engine();
    for text in HARD_TEXTS {
        let id = new_id(&engine).await;
        let metadata = Metadata::new().with_reference(text).unwrap().with_correlation_id(text).unwrap();
        let metadata = metadata.with_causation_id(text).unwrap().with_header(*text, *text).unwrap();
        let event = event_with(text, text.as_bytes(), Timestamp::now(), metadata);
        let batch = unit().create_keyed(id, text, text).events(id, text, 0, vec![event]).command(text);
        batch.commit(&engine).await.unwrap();
        assert_eq!(holder(&engine, text, text).await, Some(id), "{text:?}");
        assert!(receipt_of(&engine, &command(text)).await.is_some(), "{text:?}");
    }
    for (event, text) in log(&engine).await.iter().zip(HARD_TEXTS) {
        assert_eq!((event.aggregate_type().as_str(), event.event_type().as_str()), (*text, *text));
        assert_eq!((event.reference(), event.correlation_id()), (Some(*text), Some(*text)));
        assert_eq!((event.causation_id(), event.headers()[*text].as_str()), (Some(*text), *text));
        assert_eq!(event.payload(), text.as_bytes());
    }
    assert_eq!(log(&engine).await.len(), HARD_TEXTS.len());
}

pub(crate) async fn the_largest_metadata_comes_back(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let long = "r".repeat(limits::REFERENCE_BYTES);
    let mut metadata = Metadata::new().with_reference(&long).unwrap().with_correlation_id(&long).unwrap();
    metadata = metadata.with_causation_id(&long).unwrap();
    for number in 0..1_000 {
        metadata = metadata.with_header(format!("{number:04}"), "v".repeat(61)).unwrap();
    }
    let id = new_id(&engine).await;
    let batch = unit().create(id, "user").events(
        id,
        "user",
        0,
        vec![event_with("Happened", b"", Timestamp::now(), metadata.clone())],
    );
    batch.commit(&engine).await.unwrap();
    let event = events_of(&engine, id).await.first().unwrap();
    assert_eq!((event.reference(), event.correlation_id()), (Some(long.as_str()), Some(long.as_str())));
    assert_eq!(event.causation_id(), Some(long.as_str()));
    assert_eq!(event.headers(), metadata.headers());
}

pub(crate) async fn bad_metadata_is_refused_where_it_is_born(_: &mut Fixture) {
    for bad in ["\0", &"r".repeat(limits::REFERENCE_BYTES + 1)] {
        assert_kind!(Metadata::new().with_reference(bad), ErrorKind::Invalid);
        assert_kind!(Metadata::new().with_correlation_id(bad), ErrorKind::Invalid);
        assert_kind!(Metadata::new().with_causation_id(bad), ErrorKind::Invalid);
    }
    assert_kind!(Metadata::new().with_header("", "value"), ErrorKind::Invalid);
    assert_kind!(Metadata::new().with_header("name", "\0"), ErrorKind::Invalid);
    assert_kind!(Metadata::new().with_header("name", "v".repeat(limits::HEADERS_BYTES)), ErrorKind::Invalid);
}

pub(crate) async fn deep_json_comes_back(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let deep = format!("{}{}", "[".repeat(50_000), "]".repeat(50_000));
    let id = new_id(&engine).await;
    let events = vec![event("Deep", deep.as_bytes()), event("Deposited", deep.as_bytes())];
    unit().create(id, "account").events(id, "account", 0, events).commit(&engine).await.unwrap();
    assert_eq!(events_of(&engine, id).await.first().unwrap().payload(), deep.as_bytes());
    assert_kind!(fixture.store().load::<Account>(id).await, ErrorKind::Codec { .. });
}

pub(crate) async fn nothing_shows_a_key_or_a_payload(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    let metadata = Metadata::new().with_reference("sesame").unwrap().with_header("sesame", "sesame").unwrap();
    let secret = event_with("Happened", b"sesame", Timestamp::now(), metadata);
    let batch = unit().create_keyed(id, "user", "sesame").events(id, "user", 0, vec![secret]);
    let batch = batch.snapshot(id, 1, 1, b"sesame");
    let mut shown = format!("{:?}", batch.0);
    let receipt = batch.commit(&engine).await.unwrap();
    let second = new_id(&engine).await;
    let taken = unit().create_keyed(second, "user", "sesame").commit(&engine).await.unwrap_err();
    let stale =
        unit().append(id, "user", 7, 1).key(id, "user", "sesame 2").commit(&engine).await.unwrap_err();
    let missing = fixture.store().load::<Account>("sesame").await.unwrap_err();
    for error in [taken, stale, missing] {
        shown += &format!("{error} {error:?}");
    }
    let found = load(&engine, evercore_core::engine::Target::Id(id), Some(1), Sequence::MAX).await.unwrap();
    shown += &format!("{engine:?} {receipt:?} {found:?} {:?}", log(&engine).await);
    shown += &format!("{:?}", fixture.store());
    assert!(!shown.contains("sesame"), "{shown}");
    assert!(!shown.contains("115, 101, 115"), "{shown}");
}

pub(crate) async fn empty_texts_are_not_none(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = keyed(&engine, "user", "ann").await;
    // Each of three texts is missing, empty or set, with or without an empty header.
    let told = |digit: usize| [None, Some(""), Some("text")][digit % 3];
    let mut written = Vec::new();
    for number in 0..54 {
        let mut metadata = Metadata::new();
        if let Some(text) = told(number) {
            metadata = metadata.with_reference(text).unwrap();
        }
        if let Some(text) = told(number / 3) {
            metadata = metadata.with_correlation_id(text).unwrap();
        }
        if let Some(text) = told(number / 9) {
            metadata = metadata.with_causation_id(text).unwrap();
        }
        if number >= 27 {
            metadata = metadata.with_header("empty", "").unwrap();
        }
        written.push(event_with("Happened", b"", Timestamp::now(), metadata));
    }
    unit().events(id, "user", 0, written.clone()).commit(&engine).await.unwrap();
    let by_key = evercore_core::engine::Target::Key(type_named("user"), key("ann"));
    let by_key = load(&engine, by_key, None, Sequence::MAX).await.unwrap().events;
    let paths = [
        log(&engine).await,
        events_of(&engine, id).await.iter().collect(),
        history(&engine, id).await.events.iter().collect(),
        by_key.iter().collect(),
    ];
    for found in paths {
        assert_eq!(found.len(), written.len());
        for (number, (event, new)) in found.iter().zip(&written).enumerate() {
            assert_eq!(event.reference(), new.metadata.reference(), "reference of {number}");
            assert_eq!(event.correlation_id(), new.metadata.correlation_id(), "correlation id of {number}");
            assert_eq!(event.causation_id(), new.metadata.causation_id(), "causation id of {number}");
            assert_eq!(event.headers(), new.metadata.headers(), "headers of {number}");
        }
    }
}

pub(crate) async fn each_event_of_a_unit_keeps_its_own_metadata(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = new_ids(&engine, 3).await;
    let mut batch = ids.iter().fold(unit(), |batch, id| batch.create(*id, "user"));
    // Each append has two events, with a header of the same name.
    let text = |nth: i64| format!("{nth} of {}", ids[nth as usize / 2 % 3]);
    let told = |nth: i64| {
        let metadata = Metadata::new().with_reference(text(nth)).unwrap();
        let metadata = metadata.with_header(format!("header {}", nth / 2 % 4), text(nth)).unwrap();
        event_with("Happened", text(nth).as_bytes(), Timestamp::from_micros(nth * 1_001).unwrap(), metadata)
    };
    for (nth, id) in (0..).step_by(2).zip(ids.iter().cycle().take(15)) {
        batch = batch.events(*id, "user", nth / 6 * 2, vec![told(nth), told(nth + 1)]);
    }
    batch.commit(&engine).await.unwrap();
    let found = log(&engine).await;
    assert_eq!(found.len(), 30);
    for (nth, event) in (0..).zip(&found) {
        let text = text(nth);
        assert_eq!((event.aggregate(), event.payload()), (ids[nth as usize / 2 % 3], text.as_bytes()));
        assert_eq!(event.reference(), Some(text.as_str()));
        assert_eq!(event.headers()[&format!("header {}", nth / 2 % 4)], text);
        assert_eq!((event.headers().len(), event.time().as_micros()), (1, nth * 1_001));
    }
}

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;

use serde::{Deserialize, Serialize};

use super::{Patch, StateAggregate};
use crate::aggregate::{Aggregate, EventCodec};
use crate::context::EventContext;
use crate::error::BoxError;
use crate::ids::Sequence;
use crate::json::Json;
use crate::metadata::Metadata;
use crate::time::Timestamp;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Place {
    street: String,
    number: Option<u8>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
enum Status {
    #[default]
    New,
    Active {
        since: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Thing {
    name: String,
    nickname: Option<String>,
    place: Option<Place>,
    status: Status,
    tags: Vec<String>,
    stock: HashMap<u32, i64>,
    unsigned: u64,
    signed: i64,
    wide: i128,
    float: f64,
    #[serde(rename = "größe \"1\"")]
    size: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hidden: Option<u8>,
    level: u8,
}

impl Default for Thing {
    fn default() -> Self {
        Self {
            name: "unnamed".into(),
            nickname: None,
            place: None,
            status: Status::New,
            tags: vec!["fresh".into()],
            stock: HashMap::new(),
            unsigned: 0,
            signed: 0,
            wide: 0,
            float: 0.0,
            size: 0,
            hidden: None,
            level: 7,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Details {
    name: String,
    level: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum ThingEvent {
    Named {
        name: String,
    },
    Changed {
        name: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nickname: Option<String>,
        level: Option<u8>,
    },
    Patched {
        name: Patch<String>,
        nickname: Patch<String>,
        tags: Patch<Vec<String>>,
        hidden: Patch<u8>,
        level: Patch<u8>,
    },
    Moved {
        place: Place,
        status: Status,
        stock: BTreeMap<u32, i64>,
    },
    Counted {
        unsigned: u64,
        signed: i64,
        wide: i128,
        float: f64,
    },
    Sized {
        #[serde(rename = "größe \"1\"")]
        size: u8,
    },
    Hidden {
        hidden: u8,
    },
    Described(Details),
    Touched,
    Empty {},
    Nulled {
        nickname: Patch<Option<String>>,
    },
    // Events that do not fit.
    Strange {
        unknown: Option<u8>,
    },
    Skipped {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unknown: Option<u8>,
    },
    PatchedStrange {
        unknown: Patch<u8>,
    },
    Misfit {
        name: String,
        level: i32,
    },
    Fraction {
        level: f64,
    },
    Tuple(u8, u8),
    Number(u8),
    Inner(Status),
    Map(BTreeMap<String, u8>),
}

impl StateAggregate for Thing {
    const TYPE: &'static str = "thing";
    const SNAPSHOT_EVERY: u32 = 10;
    const SNAPSHOT_VERSION: u32 = 3;
    type Event = ThingEvent;

    fn validate(&self) -> Result<(), crate::BoxError> {
        if self.name.is_empty() { Err("a thing has a name".into()) } else { Ok(()) }
    }
}

/// A thing with something in every field.
fn full() -> Thing {
    Thing {
        name: "lamp".into(),
        nickname: Some("lux".into()),
        place: Some(Place { street: "Elm".into(), number: Some(1) }),
        status: Status::Active { since: 9 },
        tags: vec!["a".into(), "b\"\\".into()],
        stock: HashMap::from([(1, -1), (2, i64::MAX)]),
        unsigned: u64::MAX,
        signed: i64::MIN,
        wide: i128::MIN,
        float: 0.5,
        size: 3,
        hidden: Some(4),
        level: 5,
    }
}

/// Applies an event as a store does.
fn applied<S: StateAggregate>(state: &mut S, event: S::Event) -> Result<(), BoxError> {
    let metadata = Metadata::new();
    let context = EventContext::new(Sequence::ZERO.next(), Timestamp::MIN, &metadata);
    state.apply_with(event, &context)
}

#[track_caller]
fn after(mut state: Thing, event: ThingEvent) -> Thing {
    // The event is the same before and after the codec.
    let encoded = Json::encode(&event).unwrap();
    let decoded: ThingEvent = Json::decode(&encoded.event_type, &encoded.payload).unwrap();
    assert_eq!(decoded, event);
    applied(&mut state, event).unwrap();
    state
}

#[track_caller]
fn misfit(event: &ThingEvent) -> String {
    let mut state = full();
    let error = applied(&mut state, event.clone()).unwrap_err();
    assert_eq!(state, full(), "an event that does not fit changes nothing");
    state.apply(event.clone());
    assert_eq!(state, full(), "nor does it through `apply`");
    error.to_string()
}

#[test]
fn fields_are_copied_to_the_fields_of_the_same_name() {
    assert_eq!(after(full(), ThingEvent::Named { name: "Λ".into() }), Thing { name: "Λ".into(), ..full() });
    let place = Place { street: "Oak".into(), number: None };
    let event =
        ThingEvent::Moved { place: place.clone(), status: Status::New, stock: BTreeMap::from([(7, 8)]) };
    let moved = Thing { place: Some(place), status: Status::New, stock: HashMap::from([(7, 8)]), ..full() };
    assert_eq!(after(full(), event.clone()), moved);
    let moved_first =
        Thing { place: moved.place, status: Status::New, stock: moved.stock, ..Thing::default() };
    assert_eq!(after(Thing::default(), event), moved_first);
}

#[test]
fn apply_does_what_a_store_does() {
    let mut state = full();
    state.apply(ThingEvent::Named { name: "x".into() });
    assert_eq!(state, Thing { name: "x".into(), ..full() });
}

#[test]
fn a_missing_field_and_none_leave_the_state_alone() {
    assert_eq!(after(full(), ThingEvent::Changed { name: None, nickname: None, level: None }), full());
    let event = ThingEvent::Changed { name: None, nickname: Some("n".into()), level: Some(0) };
    assert_eq!(after(full(), event), Thing { nickname: Some("n".into()), level: 0, ..full() });
    assert_eq!(after(full(), ThingEvent::Touched), full());
    assert_eq!(after(full(), ThingEvent::Empty {}), full());
    let short = Json::decode("Patched", b"{}").unwrap();
    assert_eq!(after(full(), short), full());
}

#[test]
fn a_struct_in_a_variant_gives_its_fields() {
    let event = ThingEvent::Described(Details { name: "d".into(), level: None });
    assert_eq!(after(full(), event), Thing { name: "d".into(), ..full() });
}

#[test]
fn a_patch_keeps_sets_and_clears() {
    let clear = ThingEvent::Patched {
        name: Patch::Clear,
        nickname: Patch::Clear,
        tags: Patch::Clear,
        hidden: Patch::Clear,
        level: Patch::Keep,
    };
    let cleared =
        Thing { name: "unnamed".into(), nickname: None, tags: vec!["fresh".into()], hidden: None, ..full() };
    assert_eq!(after(full(), clear), cleared);

    let set = ThingEvent::Patched {
        name: Patch::Set("set".into()),
        nickname: Patch::Keep,
        tags: Patch::Set(Vec::new()),
        hidden: Patch::Set(1),
        level: Patch::Clear,
    };
    let expected = Thing { name: "set".into(), tags: Vec::new(), hidden: Some(1), level: 7, ..full() };
    assert_eq!(after(full(), set.clone()), expected);
    let payload = String::from_utf8(Json::encode(&set).unwrap().payload).unwrap();
    assert_eq!(
        payload,
        r#"{"name":{"set":"set"},"nickname":null,"tags":{"set":[]},"hidden":{"set":1},"level":"clear"}"#
    );

    assert_eq!(
        after(full(), ThingEvent::Nulled { nickname: Patch::Set(None) }),
        Thing { nickname: None, ..full() }
    );
}

#[test]
fn a_field_that_serde_skips_is_known_all_the_same() {
    assert_eq!(
        after(Thing::default(), ThingEvent::Hidden { hidden: 9 }),
        Thing { hidden: Some(9), ..Thing::default() }
    );
    assert_eq!(after(full(), ThingEvent::Hidden { hidden: 9 }), Thing { hidden: Some(9), ..full() });
}

#[test]
fn renamed_fields_go_by_their_new_name() {
    assert_eq!(after(full(), ThingEvent::Sized { size: 200 }), Thing { size: 200, ..full() });
}

#[test]
fn numbers_are_exact() {
    let event = ThingEvent::Counted { unsigned: u64::MAX, signed: i64::MIN, wide: i128::MAX, float: -5e-324 };
    let counted =
        Thing { unsigned: u64::MAX, signed: i64::MIN, wide: i128::MAX, float: -5e-324, ..Thing::default() };
    assert_eq!(after(Thing::default(), event), counted);
}

#[test]
fn fields_of_which_no_event_speaks_do_not_drift() {
    let start = Thing { float: 31.245_270_191_439_438, ..full() };
    let touched =
        (0..100).fold(start.clone(), |state, _| after(state, ThingEvent::Named { name: "lamp".into() }));
    assert_eq!(touched.float.to_bits(), start.float.to_bits());
}

#[test]
fn a_field_that_the_state_does_not_have_is_an_error() {
    let message = "the state has no field \"unknown\"";
    assert_eq!(misfit(&ThingEvent::Strange { unknown: Some(1) }), message);
    assert_eq!(misfit(&ThingEvent::Strange { unknown: None }), message);
    assert_eq!(misfit(&ThingEvent::Skipped { unknown: None }), message);
    assert_eq!(misfit(&ThingEvent::PatchedStrange { unknown: Patch::Keep }), message);
    assert_eq!(misfit(&ThingEvent::PatchedStrange { unknown: Patch::Clear }), message);
}

#[test]
fn a_value_that_does_not_fit_is_an_error() {
    assert!(misfit(&ThingEvent::Misfit { name: "x".into(), level: -1 }).contains("expected u8"));
    assert!(misfit(&ThingEvent::Misfit { name: "x".into(), level: 256 }).contains("expected u8"));
    assert!(misfit(&ThingEvent::Fraction { level: 1.0 }).contains("expected u8"));
}

#[test]
fn content_without_named_fields_is_an_error() {
    for event in [
        ThingEvent::Tuple(1, 2),
        ThingEvent::Number(1),
        ThingEvent::Inner(Status::New),
        ThingEvent::Inner(Status::Active { since: 1 }),
        ThingEvent::Map(BTreeMap::from([("level".into(), 1)])),
    ] {
        assert!(misfit(&event).contains("named fields"));
    }
}

#[test]
fn the_aggregate_is_what_the_state_says() {
    assert_eq!(<Thing as Aggregate>::TYPE, "thing");
    assert_eq!(<Thing as Aggregate>::SNAPSHOT_EVERY, 10);
    assert_eq!(<Thing as Aggregate>::SNAPSHOT_VERSION, 3);
    let nameless = Thing { name: String::new(), ..full() };
    assert!(Aggregate::validate(&nameless).is_err());
    assert!(Aggregate::validate(&full()).is_ok());
}

#[derive(Debug, Serialize, Deserialize)]
enum Level {
    Raised { level: u8 },
}

fn refused<S: StateAggregate<Event = Level> + Debug>() -> String {
    applied(&mut S::default(), Level::Raised { level: 1 }).unwrap_err().to_string()
}

#[test]
fn a_state_that_is_no_struct_with_named_fields_is_refused() {
    #[derive(Clone, Debug, Default, Serialize, Deserialize)]
    struct Tuple(u8);
    #[derive(Clone, Debug, Default, Serialize, Deserialize)]
    struct Flat {
        #[serde(flatten)]
        rest: BTreeMap<String, u8>,
    }
    #[derive(Clone, Debug, Default, Serialize, Deserialize)]
    enum Enum {
        #[default]
        A,
    }
    macro_rules! states { ($($state:ident)*) => { $(
        impl StateAggregate for $state { const TYPE: &'static str = "odd"; type Event = Level; }
        assert_eq!(refused::<$state>(), "the state must be a struct with named fields, without `flatten`");
    )* } }
    states!(Tuple Flat Enum);
}

#[test]
fn an_alias_is_no_name_of_a_field() {
    #[derive(Clone, Debug, Default, Serialize, Deserialize)]
    struct Aliased {
        #[serde(alias = "level")]
        height: u8,
    }
    impl StateAggregate for Aliased {
        const TYPE: &'static str = "aliased";
        type Event = Level;
    }
    assert!(refused::<Aliased>().contains("duplicate field"));
}

#[test]
fn an_enum_that_looks_like_a_patch_is_none() {
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Change {
        Set(u8),
        Clear,
    }
    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Lamp {
        change: Option<Change>,
    }
    #[derive(Debug, Serialize, Deserialize)]
    enum LampEvent {
        Changed { change: Option<Change> },
    }
    impl StateAggregate for Lamp {
        const TYPE: &'static str = "lamp";
        type Event = LampEvent;
    }
    for change in [Change::Set(1), Change::Clear] {
        let mut lamp = Lamp::default();
        applied(&mut lamp, LampEvent::Changed { change: Some(change.clone()) }).unwrap();
        assert_eq!(lamp.change, Some(change));
    }
}

//! Recording: the state after `record` equals the state of a later load.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Debug;
use std::marker::PhantomData;

use evercore_memory::{
    Aggregate, BoxError, ErrorKind, EventContext, EventStore, EventsOnly, Json, Loaded, LogQuery,
    MemoryEngine, Metadata, Position, Result, Timestamp, UnitOfWork, limits,
};
use evercore_testkit::{Given, block_on};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Any event with `Debug`.
trait Any: Serialize + DeserializeOwned + Debug + Send + Sync + 'static {}
impl<E: Serialize + DeserializeOwned + Debug + Send + Sync + 'static> Any for E {}

/// All events in the form in which they were applied.
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
struct Seen<E> {
    events: Vec<String>,
    of: PhantomData<E>,
}

impl<E> Default for Seen<E> {
    fn default() -> Self {
        Self { events: Vec::new(), of: PhantomData }
    }
}

impl<E> Clone for Seen<E> {
    fn clone(&self) -> Self {
        Self { events: self.events.clone(), of: PhantomData }
    }
}

impl<E: Any> Aggregate for Seen<E> {
    const TYPE: &'static str = "seen";
    type Event = E;
    type Codec = Json;

    fn apply(&mut self, event: E) {
        self.events.push(format!("{event:?}"));
    }
}

async fn begun<T: Aggregate>() -> (EventStore, UnitOfWork, Loaded<T>) {
    let store = EventStore::new(MemoryEngine::new());
    let mut work = store.begin();
    let aggregate = work.create::<T>().await.unwrap();
    (store, work, aggregate)
}

/// The events that were applied while recording; a load must find the same.
#[track_caller]
fn recorded<E: Any>(event: E) -> Result<String> {
    block_on(async {
        let (store, mut work, mut seen) = begun::<Seen<E>>().await;
        let outcome = work.record(&mut seen, event);
        if outcome.is_err() {
            assert!(seen.events.is_empty(), "the aggregate is as before");
        }
        work.commit().await.unwrap();
        let loaded = store.load::<Seen<E>>(seen.id()).await.unwrap();
        assert_eq!(loaded.events, seen.events, "the load finds what was applied");
        outcome.map(|()| seen.events[0].clone())
    })
}

#[track_caller]
fn comes_back<E: Any>(event: E) {
    let shown = format!("{event:?}");
    assert_eq!(recorded(event).unwrap(), shown);
}

#[track_caller]
fn comes_back_as<E: Any>(event: E, expected: &str) {
    assert_eq!(recorded(event).unwrap(), expected);
}

#[track_caller]
fn refused<E: Any>(event: E) {
    let shown = format!("{event:?}");
    let error = recorded(event).expect_err(&shown);
    assert!(matches!(error.kind(), ErrorKind::Codec { event_type: Some(_), .. }), "{error}");
    assert!(error.to_string().contains("was not recorded"), "{error}");
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Measured {
    Float(f64),
    Single { value: f32 },
    Map(BTreeMap<String, f64>),
    Perhaps(Option<f64>),
}

#[test]
fn floats_that_json_has_no_word_for_are_refused() {
    comes_back(Measured::Float(-0.0));
    comes_back(Measured::Single { value: 0.1 });
    comes_back(Measured::Map(BTreeMap::from([("a".into(), 1e300)])));
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        refused(Measured::Float(value));
        refused(Measured::Single { value: value as f32 });
        refused(Measured::Map(BTreeMap::from([("a".into(), 1.0), ("b".into(), value)])));
        comes_back_as(Measured::Perhaps(Some(value)), "Perhaps(None)");
    }
}

#[derive(Debug, Serialize, Deserialize)]
enum Wide {
    Plain(u128),
    Flat {
        #[serde(flatten)]
        inner: Inner,
    },
    Keys {
        #[serde(flatten)]
        counts: HashMap<u32, u8>,
    },
    Tagged(Tagged),
    Untagged(Untagged),
    Clash {
        id: u8,
        #[serde(flatten)]
        rest: BTreeMap<String, u8>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Inner {
    wide: u128,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Tagged {
    Wide { wide: u128 },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged {
    Wide(u128),
}

#[test]
fn what_serde_buffers_and_cannot_give_back_is_refused() {
    comes_back(Wide::Plain(u128::MAX));
    refused(Wide::Flat { inner: Inner { wide: u128::MAX } });
    refused(Wide::Keys { counts: HashMap::from([(1, 1)]) });
    refused(Wide::Tagged(Tagged::Wide { wide: u128::MAX }));
    refused(Wide::Untagged(Untagged::Wide(u128::MAX)));
    comes_back(Wide::Clash { id: 1, rest: BTreeMap::from([("x".into(), 2)]) });
    refused(Wide::Clash { id: 1, rest: BTreeMap::from([("id".into(), 2)]) });
}

#[derive(Debug, Serialize, Deserialize)]
enum Lossy {
    Hidden {
        #[serde(skip_serializing_if = "String::is_empty")]
        text: String,
    },
    Skipped {
        #[serde(skip_serializing)]
        text: String,
    },
    OneWay {
        #[serde(rename(serialize = "new"))]
        old: u8,
    },
    OneWayOption {
        #[serde(rename(serialize = "new"))]
        old: Option<u8>,
    },
    OtherDefault {
        #[serde(default = "seven", skip_serializing_if = "is_zero")]
        level: u8,
    },
    Nested(Option<Option<u8>>),
    Unit(Option<()>),
    Private {
        #[serde(skip)]
        cache: u8,
    },
}

fn seven() -> u8 {
    7
}

fn is_zero(number: &u8) -> bool {
    *number == 0
}

#[test]
fn what_is_written_and_not_found_again_is_refused() {
    comes_back(Lossy::Hidden { text: "a".into() });
    refused(Lossy::Hidden { text: String::new() });
    refused(Lossy::Skipped { text: "a".into() });
    refused(Lossy::OneWay { old: 1 });
    refused(Lossy::OneWayOption { old: Some(1) });
    comes_back(Lossy::OtherDefault { level: 1 });
    refused(Lossy::OtherDefault { level: 0 });
}

#[test]
fn what_comes_back_changed_is_applied_as_it_comes_back() {
    comes_back(Lossy::Nested(Some(Some(1))));
    comes_back_as(Lossy::Nested(Some(None)), "Nested(None)");
    comes_back_as(Lossy::Unit(Some(())), "Unit(None)");
    comes_back_as(Lossy::Private { cache: 9 }, "Private { cache: 0 }");
}

#[derive(Debug, Serialize, Deserialize)]
enum Unordered {
    Map(HashMap<String, u8>),
    Set(HashSet<u16>),
    Deep(Vec<HashMap<u8, HashSet<String>>>),
}

#[test]
fn maps_and_sets_need_no_order() {
    block_on(async {
        let (_, mut work, mut seen) = begun::<Seen<Unordered>>().await;
        for many in 0..40 {
            let text = |number: u8| format!("\"{number}\\ ü");
            let map = (0..many).map(|number| (text(number), number)).collect();
            let set = (0..u16::from(many)).collect();
            let inner: HashSet<_> = (0..many).map(text).collect();
            let deep = vec![(0..many).map(|number| (number, inner.clone())).collect(); 2];
            work.record(&mut seen, Unordered::Map(map)).unwrap();
            work.record(&mut seen, Unordered::Set(set)).unwrap();
            work.record(&mut seen, Unordered::Deep(deep)).unwrap();
        }
    });
}

/// A state that JSON cannot encode if it has a pair, and cannot decode if its number is not finite. It is over the
/// limit if it is told to be large.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Awkward {
    pairs: HashMap<(u8, u8), u8>,
    number: f64,
    text: String,
    events: u32,
}

#[derive(Debug, Serialize, Deserialize)]
enum AwkwardEvent {
    Paired,
    Divided,
    Grown,
    Counted,
}

impl Aggregate for Awkward {
    const TYPE: &'static str = "awkward";
    const SNAPSHOT_EVERY: u32 = 2;
    type Event = AwkwardEvent;
    type Codec = Json;

    fn apply(&mut self, event: AwkwardEvent) {
        self.events += 1;
        match event {
            AwkwardEvent::Paired => _ = self.pairs.insert((1, 2), 3),
            AwkwardEvent::Divided => self.number = f64::INFINITY,
            AwkwardEvent::Grown => self.text = "x".repeat(limits::PAYLOAD_BYTES),
            AwkwardEvent::Counted => {}
        }
    }
}

#[test]
fn a_snapshot_that_cannot_be_kept_is_skipped_and_counted() {
    for odd in [AwkwardEvent::Paired, AwkwardEvent::Divided, AwkwardEvent::Grown] {
        block_on(async {
            let shown = format!("{odd:?}");
            let (store, mut work, mut state) = begun::<Awkward>().await;
            work.record_all(&mut state, [AwkwardEvent::Counted, AwkwardEvent::Counted]).unwrap();
            assert_eq!(store.snapshots_skipped(), 0);
            work.record_all(&mut state, [AwkwardEvent::Counted, odd]).expect(&shown);
            work.commit().await.unwrap();
            assert_eq!((store.snapshots_skipped(), store.snapshots_ignored()), (1, 0), "{shown}");

            let mut work = store.begin();
            let mut state = work.load::<Awkward>(state.id()).await.unwrap();
            work.record_all(&mut state, [AwkwardEvent::Counted, AwkwardEvent::Counted]).expect(&shown);
            work.commit().await.unwrap();
            assert_eq!((store.snapshots_skipped(), store.snapshots_ignored()), (2, 0), "{shown}");
            let loaded = store.load::<Awkward>(state.id()).await.unwrap();
            assert!((loaded.events, loaded.state()) == (6, state.state()), "{shown}");
        });
    }
}

#[derive(Debug, Serialize, Deserialize)]
enum Keyed {
    Pairs(HashMap<(u8, u8), u8>),
    #[serde(alias = "Old")]
    New(u8),
}

#[test]
fn an_event_that_cannot_be_written_is_told_as_such() {
    let error = recorded(Keyed::Pairs(HashMap::from([((1, 2), 3)]))).unwrap_err();
    assert_eq!(error.to_string(), "an event of \"seen\" was not recorded: its codec cannot write it");
}

#[test]
fn a_name_that_is_only_read_is_not_registered() {
    block_on(async {
        let (store, mut work, mut seen) = begun::<Seen<Keyed>>().await;
        let names = async || {
            let known = store.types().await.unwrap();
            known.iter().flat_map(|known| &known.event_types).map(ToString::to_string).collect::<Vec<_>>()
        };
        store.warmup::<Seen<Keyed>>().await.unwrap();
        assert_eq!(names().await, ["Pairs"]);
        work.record(&mut seen, Keyed::New(1)).unwrap();
        work.commit().await.unwrap();
        assert_eq!(names().await, ["New", "Pairs"]);
    });
}

/// Applies the events that it gets, without a check by the codec.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Trusting(Vec<String>);

impl Aggregate for Trusting {
    const TYPE: &'static str = "trusting";
    const TRUSTS_CODEC: bool = true;
    type Event = Measured;
    type Codec = Json;

    fn apply(&mut self, event: Measured) {
        self.0.push(format!("{event:?}"));
    }
}

#[test]
fn a_codec_that_is_trusted_is_not_asked_again() {
    block_on(async {
        let (_, mut work, mut trusting) = begun::<Trusting>().await;
        work.record(&mut trusting, Measured::Float(f64::NAN)).unwrap();
        assert_eq!(trusting.0, ["Float(NaN)"]);
    });
}

/// Stores all parts of an event's context.
#[derive(Clone, Debug, Default, PartialEq)]
struct Witness(Vec<String>);

#[derive(Serialize, Deserialize)]
enum WitnessEvent {
    Seen,
}

impl Aggregate for Witness {
    const TYPE: &'static str = "witness";
    type Event = WitnessEvent;
    type Codec = EventsOnly<Json>;

    fn apply(&mut self, WitnessEvent::Seen: WitnessEvent) {
        self.0.push("without a context".into());
    }

    fn apply_with(&mut self, _: WitnessEvent, context: &EventContext<'_>) -> Result<(), BoxError> {
        self.0.push(format!(
            "{} {} {:?} {:?} {:?} {:?}",
            context.sequence(),
            context.time().as_micros(),
            context.reference(),
            context.correlation_id(),
            context.causation_id(),
            context.headers(),
        ));
        Ok(())
    }
}

#[test]
fn an_event_has_the_same_context_whenever_it_is_applied() {
    block_on(async {
        let (store, mut work, mut witness) = begun::<Witness>().await;
        work.record(&mut witness, WitnessEvent::Seen).unwrap();
        work.commit().await.unwrap();

        let mut work = store.begin();
        let of_unit = Metadata::new().with_reference("unit").unwrap().with_header("a", "unit").unwrap();
        work.set_metadata(of_unit.with_correlation_id("talk").unwrap().with_causation_id("ask").unwrap())
            .unwrap();
        let mut witness = work.load::<Witness>(witness.id()).await.unwrap();
        work.record(&mut witness, WitnessEvent::Seen).unwrap();
        let own = Metadata::new().with_reference("own").unwrap().with_header("b", "own").unwrap();
        let own = own.with_time(Timestamp::from_micros(7).unwrap());
        work.record_with(&mut witness, WitnessEvent::Seen, &own).unwrap();
        let staged = work.load::<Witness>(witness.id()).await.unwrap();
        assert_eq!(staged.state(), witness.state(), "loaded with what is staged");
        work.commit().await.unwrap();

        let loaded = store.load::<Witness>(witness.id()).await.unwrap();
        assert_eq!(loaded.state(), witness.state());
        assert_eq!(loaded.0[2], r#"3 7 Some("own") Some("talk") Some("ask") {"a": "unit", "b": "own"}"#);
        assert!(loaded.0[0].ends_with("None None None {}"), "{}", loaded.0[0]);
    });
}

#[test]
fn metadata_that_comes_after_the_events_is_refused() {
    block_on(async {
        let (store, mut work, mut witness) = begun::<Witness>().await;
        work.set_metadata(Metadata::new().with_reference("first").unwrap()).unwrap();
        work.set_metadata(Metadata::new().with_reference("second").unwrap()).unwrap();
        work.record(&mut witness, WitnessEvent::Seen).unwrap();
        work.set_metadata(Metadata::new().with_reference("second").unwrap()).unwrap();
        let error = work.set_metadata(Metadata::new().with_reference("third").unwrap()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Invalid), "{error}");
        work.commit().await.unwrap();
        let loaded = store.load::<Witness>(witness.id()).await.unwrap();
        assert!(loaded.0[0].contains(r#"Some("second")"#), "{}", loaded.0[0]);
    });
}

/// A state with a part that is not encoded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Forgetful {
    events: u32,
    #[serde(skip)]
    cache: u32,
}

impl Aggregate for Forgetful {
    const TYPE: &'static str = "forgetful";
    type Event = WitnessEvent;
    type Codec = Json;

    fn apply(&mut self, WitnessEvent::Seen: WitnessEvent) {
        self.events += 1;
        self.cache = self.events / 2;
    }
}

#[test]
#[should_panic(expected = "a snapshot after event 2 gives another state after event 2")]
fn a_part_of_a_state_that_is_not_written_is_seen_by_the_testkit() {
    let events = [WitnessEvent::Seen, WitnessEvent::Seen, WitnessEvent::Seen];
    Given::<Forgetful>::events(events).then_snapshots_agree();
}

#[test]
fn a_story_carries_metadata() {
    let at = |micros| Metadata::new().with_time(Timestamp::from_micros(micros).unwrap());
    Given::<Witness>::events([WitnessEvent::Seen])
        .carrying(at(5))
        .and([WitnessEvent::Seen])
        .carrying(at(6).with_reference("clerk").unwrap())
        .when(|_| [WitnessEvent::Seen])
        .then_state(|witness| {
            assert_eq!(
                witness.0,
                ["1 0 None None None {}", "2 5 None None None {}", r#"3 6 Some("clerk") None None {}"#]
            );
        });
}

#[test]
fn a_text_with_an_escape_in_it_is_read_where_it_cannot_be_borrowed() {
    #[derive(Debug, Serialize, Deserialize)]
    enum Note {
        Written { text: String },
    }
    #[derive(Deserialize)]
    enum Reader<'a> {
        Written {
            #[serde(borrow)]
            text: Cow<'a, str>,
        },
    }
    block_on(async {
        let (store, mut work, mut seen) = begun::<Seen<Note>>().await;
        for text in ["plain", "a \"quote\"\nand a line"] {
            work.record(&mut seen, Note::Written { text: text.into() }).unwrap();
        }
        work.commit().await.unwrap();
        let page = store.read_log(&LogQuery::after(Position::ZERO)).await.unwrap();
        let events: Vec<_> = page.events.iter().collect();
        let texts: Vec<_> = events
            .iter()
            .map(|event| {
                let Reader::Written { text } = event.json().unwrap();
                text
            })
            .collect();
        assert!(matches!(texts[0], Cow::Borrowed("plain")));
        assert_eq!(texts[1], "a \"quote\"\nand a line");
    });
}

#[test]
fn a_handle_tells_whether_its_aggregate_was_made_or_found() {
    #[derive(Debug, Serialize, Deserialize)]
    enum Opened {
        Now,
    }
    block_on(async {
        let (store, mut work, created) = begun::<Seen<Opened>>().await;
        assert!(created.is_new());
        let mut made = work.load_or_create::<Seen<Opened>>("a").await.unwrap();
        work.record(&mut made, Opened::Now).unwrap();
        assert!(made.is_new() && made.clone().is_new());
        assert!(!work.load_or_create::<Seen<Opened>>("a").await.unwrap().is_new(), "found in the unit");
        work.commit().await.unwrap();
        assert!(made.is_new());
        assert!(!store.load::<Seen<Opened>>("a").await.unwrap().is_new());
        assert!(!store.load_or_create::<Seen<Opened>>("a").await.unwrap().is_new());
        assert!(store.load_or_create::<Seen<Opened>>("b").await.unwrap().is_new());
        assert!(!store.begin().load_or_create::<Seen<Opened>>("b").await.unwrap().is_new());
    });
}

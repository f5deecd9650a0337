//! Shared by the cases: a small executor, short ways to write and read, and two aggregates.

#![allow(clippy::unwrap_used, reason = "a case fails by a panic")]

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use evercore_core::engine::{
    Append, Batch, Guard, History, KeyChange, KnownCommand, LoadRequest, Mark, NewAggregate, NewEvent,
    Payload, Snapshot, Target,
};
use evercore_core::{
    Aggregate, AggregateId, AggregateQuery, AggregateType, BoxError, CommandId, Direction, Event, EventType,
    Events, Json, Key, KnownType, LogQuery, Metadata, PageLimit, Position, Receipt, Result, Sequence,
    StorageEngine, Timestamp,
};
use serde::{Deserialize, Serialize};

pub(crate) type Engine = Arc<dyn StorageEngine>;

/// Asserts that a result is an error of this kind.
macro_rules! assert_kind {
    ($result:expr, $kind:pat) => {
        match $result {
            Err(error) => {
                assert!(matches!(error.kind(), $kind), "expected {}, was {error:?}", stringify!($kind))
            }
            Ok(_) => panic!("expected {}, but the call succeeded", stringify!($kind)),
        }
    };
}
pub(crate) use assert_kind;

struct Unpark {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Runs a future to its end on this thread. The thread sleeps while there is nothing to do.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let unpark = Arc::new(Unpark { thread: thread::current(), woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&unpark));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return result;
        }
        // A separate flag, because the future may park the thread and take its token.
        while !unpark.woken.swap(false, Ordering::Acquire) {
            thread::park();
        }
    }
}

enum Joined<F: Future> {
    Running(Pin<Box<F>>),
    Done(Option<F::Output>),
}

/// Runs futures side by side in one task; they interleave at every await.
pub(crate) async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output>
where
    F::Output: Unpin,
{
    let mut all: Vec<Joined<F>> =
        futures.into_iter().map(|future| Joined::Running(Box::pin(future))).collect();
    poll_fn(move |context| {
        let mut is_done = true;
        for joined in &mut all {
            let Joined::Running(future) = joined else { continue };
            match future.as_mut().poll(context) {
                Poll::Ready(result) => *joined = Joined::Done(Some(result)),
                Poll::Pending => is_done = false,
            }
        }
        if !is_done {
            return Poll::Pending;
        }
        let results = all.iter_mut().filter_map(|joined| match joined {
            Joined::Running(_) => None,
            Joined::Done(result) => result.take(),
        });
        Poll::Ready(results.collect())
    })
    .await
}

/// Polls a future at most this often and then drops it. Gives its result if it ended before. Call it with 1, 2, 3, …
/// to drop a future at each of its awaits in turn.
pub async fn poll_at_most<F: Future>(times: usize, future: F) -> Option<F::Output> {
    let mut future = Box::pin(future);
    let mut left = times;
    poll_fn(move |context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// The SplitMix64 generator: small, and the same numbers for a seed on every machine.
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((value ^ (value >> 31)) % bound as u64) as usize
    }

    pub(crate) fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }
}

pub(crate) fn type_named(name: &str) -> AggregateType {
    AggregateType::new(name).unwrap()
}

pub(crate) fn event_named(name: &str) -> EventType {
    EventType::new(name).unwrap()
}

pub(crate) fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

pub(crate) fn command(text: &str) -> CommandId {
    CommandId::new(text).unwrap()
}

pub(crate) fn at(sequence: i64) -> Sequence {
    Sequence::new(sequence).unwrap()
}

pub(crate) fn place(position: i64) -> Position {
    Position::new(position).unwrap()
}

pub(crate) fn events_per_page(events: usize) -> PageLimit {
    PageLimit::events(events).unwrap()
}

pub(crate) fn event(name: &str, payload: &[u8]) -> NewEvent {
    NewEvent {
        event_type: event_named(name),
        payload: Payload::new(payload).unwrap(),
        time: Timestamp::now(),
        metadata: Arc::default(),
    }
}

pub(crate) fn event_with(name: &str, payload: &[u8], time: Timestamp, metadata: Metadata) -> NewEvent {
    NewEvent { time, metadata: Arc::new(metadata), ..event(name, payload) }
}

/// A batch, for writing one in a line.
pub(crate) struct Unit(pub(crate) Batch);

pub(crate) fn unit() -> Unit {
    Unit(Batch::new())
}

impl Unit {
    pub(crate) fn create(self, id: AggregateId, of_type: &str) -> Self {
        self.make(id, of_type, None)
    }

    pub(crate) fn create_keyed(self, id: AggregateId, of_type: &str, text: &str) -> Self {
        self.make(id, of_type, Some(key(text)))
    }

    fn make(mut self, id: AggregateId, of_type: &str, key: Option<Key>) -> Self {
        self.0.create(NewAggregate { id, aggregate_type: type_named(of_type), key }).unwrap();
        self
    }

    pub(crate) fn key(mut self, aggregate: AggregateId, of_type: &str, text: &str) -> Self {
        self.0
            .change_key(KeyChange { aggregate, aggregate_type: type_named(of_type), key: key(text) })
            .unwrap();
        self
    }

    /// Appends this many plain events. The payload of each is its sequence.
    pub(crate) fn append(self, id: AggregateId, of_type: &str, expected: i64, count: i64) -> Self {
        let events = (1..=count).map(|nth| event("Happened", (expected + nth).to_string().as_bytes()));
        self.events(id, of_type, expected, events.collect())
    }

    pub(crate) fn events(
        mut self,
        aggregate: AggregateId,
        of_type: &str,
        expected: i64,
        events: Vec<NewEvent>,
    ) -> Self {
        let append =
            Append { aggregate, aggregate_type: type_named(of_type), expected: at(expected), events };
        self.0.append(append).unwrap();
        self
    }

    pub(crate) fn guard(mut self, aggregate: AggregateId, expected: i64) -> Self {
        self.0.guard(Guard { aggregate, expected: at(expected) }).unwrap();
        self
    }

    pub(crate) fn read(mut self, id: AggregateId, sequence: i64, mark: Mark) -> Self {
        self.0.has_read(id, at(sequence), mark).unwrap();
        self
    }

    pub(crate) fn snapshot(mut self, id: AggregateId, sequence: i64, version: u32, state: &[u8]) -> Self {
        let state = Payload::new(state).unwrap();
        self.0.snapshot(id, Snapshot { sequence: at(sequence), version, state });
        self
    }

    /// Adds a command without a word.
    pub(crate) fn command(mut self, text: &str) -> Self {
        self.0.set_command(command(text), None);
        self
    }

    pub(crate) fn command_with(mut self, text: &str, fingerprint: i64) -> Self {
        self.0.set_command(command(text), Some(fingerprint));
        self
    }

    pub(crate) async fn commit(self, engine: &Engine) -> Result<Receipt> {
        engine.commit(self.0).await
    }
}

pub(crate) async fn receipt_of(engine: &Engine, id: &CommandId) -> Option<Receipt> {
    engine.command(id).await.unwrap().and_then(KnownCommand::into_receipt)
}

pub(crate) async fn new_id(engine: &Engine) -> AggregateId {
    engine.reserve(1).await.unwrap().next().expect("one id was reserved")
}

pub(crate) async fn new_ids(engine: &Engine, count: u32) -> Vec<AggregateId> {
    engine.reserve(count).await.unwrap().collect()
}

/// A new aggregate with this many events.
pub(crate) async fn grown(engine: &Engine, of_type: &str, events: i64) -> AggregateId {
    let id = new_id(engine).await;
    unit().create(id, of_type).append(id, of_type, 0, events).commit(engine).await.unwrap();
    id
}

/// A new aggregate with a key and without events.
pub(crate) async fn keyed(engine: &Engine, of_type: &str, text: &str) -> AggregateId {
    let id = new_id(engine).await;
    unit().create_keyed(id, of_type, text).commit(engine).await.unwrap();
    id
}

pub(crate) async fn load(
    engine: &Engine,
    target: Target,
    snapshot: Option<u32>,
    up_to: Sequence,
) -> Option<History> {
    let limit = PageLimit::events(10_000).unwrap();
    engine.load(LoadRequest { target, snapshot, up_to, limit }).await.unwrap()
}

pub(crate) async fn history(engine: &Engine, id: AggregateId) -> History {
    load(engine, Target::Id(id), None, Sequence::MAX).await.expect("the aggregate is there")
}

pub(crate) async fn exists(engine: &Engine, id: AggregateId) -> bool {
    load(engine, Target::Id(id), None, Sequence::MAX).await.is_some()
}

pub(crate) async fn sequence_of(engine: &Engine, id: AggregateId) -> i64 {
    history(engine, id).await.sequence.get()
}

pub(crate) async fn holder(engine: &Engine, of_type: &str, text: &str) -> Option<AggregateId> {
    let target = Target::Key(type_named(of_type), key(text));
    load(engine, target, None, Sequence::MAX).await.map(|history| history.id)
}

pub(crate) async fn events_of(engine: &Engine, aggregate: AggregateId) -> Events {
    let direction = Direction::Forward;
    let limit = events_per_page(10_000);
    let query = AggregateQuery { aggregate, direction, from: Sequence::ZERO, to: Sequence::MAX, limit };
    engine.read_aggregate(query).await.unwrap()
}

/// All events that a query finds, page after page.
pub(crate) async fn read_all(engine: &Engine, mut query: LogQuery) -> Vec<Event> {
    let mut found = Vec::new();
    loop {
        let page = engine.read_log(&query).await.unwrap();
        found.extend(&page.events);
        if page.scanned == query.from {
            return found;
        }
        query.from = page.scanned;
        if query.direction == Direction::Backward && query.from <= query.to {
            return found;
        }
    }
}

pub(crate) async fn log(engine: &Engine) -> Vec<Event> {
    read_all(engine, LogQuery::after(Position::ZERO)).await
}

pub(crate) fn numbers(events: &[Event]) -> Vec<i64> {
    events.iter().map(|event| event.position().get()).collect()
}

/// The log and the names, to compare the store before and after.
pub(crate) async fn everything(engine: &Engine) -> (Vec<Event>, Vec<KnownType>) {
    (log(engine).await, engine.types().await.unwrap())
}

/// Asserts that positions, and the sequences of each aggregate, are 1, 2, 3, ….
pub(crate) fn assert_no_holes(events: &[Event]) {
    let mut sequences = std::collections::HashMap::new();
    for (index, event) in events.iter().enumerate() {
        assert_eq!(event.position().get(), index as i64 + 1, "positions have no holes");
        let last = sequences.entry(event.aggregate()).or_insert(0);
        *last += 1;
        assert_eq!(event.sequence().get(), *last, "sequences have no holes and agree with the log's order");
    }
}

/// An account whose balance must not be negative.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) balance: i64,
    pub(crate) notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum AccountEvent {
    Deposited { amount: i64 },
    Withdrawn { amount: i64 },
    Noted(String),
}

pub(crate) fn deposited(amount: i64) -> AccountEvent {
    AccountEvent::Deposited { amount }
}

impl Aggregate for Account {
    const TYPE: &'static str = "account";
    type Event = AccountEvent;
    type Codec = Json;

    fn apply(&mut self, event: AccountEvent) {
        match event {
            AccountEvent::Deposited { amount } => self.balance += amount,
            AccountEvent::Withdrawn { amount } => self.balance -= amount,
            AccountEvent::Noted(note) => self.notes.push(note),
        }
    }

    fn validate(&self) -> Result<(), BoxError> {
        if self.balance < 0 { Err("an account is not overdrawn".into()) } else { Ok(()) }
    }
}

/// A sum with a snapshot after this many events, in this version.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Tally<const EVERY: u32, const VERSION: u32> {
    pub(crate) total: i64,
    pub(crate) events: i64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum TallyEvent {
    Counted(i64),
}

impl<const EVERY: u32, const VERSION: u32> Aggregate for Tally<EVERY, VERSION> {
    const TYPE: &'static str = "tally";
    const SNAPSHOT_EVERY: u32 = EVERY;
    const SNAPSHOT_VERSION: u32 = VERSION;
    type Event = TallyEvent;
    type Codec = Json;

    fn apply(&mut self, TallyEvent::Counted(number): TallyEvent) {
        self.total += number;
        self.events += 1;
    }
}

/// Runs a future for at most this long, and then drops it.
pub(crate) async fn drop_after<T>(
    engine: &Engine,
    time: Duration,
    future: impl Future<Output = T>,
) -> Option<T> {
    let (mut future, mut timer) = (Box::pin(future), engine.pause(time));
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(result) => Poll::Ready(Some(result)),
        Poll::Pending => timer.as_mut().poll(context).map(|()| None),
    })
    .await
}

/// Waits until this is true, for at most twenty seconds.
pub(crate) async fn until(engine: &Engine, mut is_so: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if is_so() {
            return;
        }
        engine.pause(Duration::from_millis(2)).await;
    }
    panic!("the condition was not true within twenty seconds");
}

/// The events that a handler got, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen(Arc<Mutex<Vec<Event>>>);

impl Seen {
    pub(crate) fn push(&self, event: &Event) {
        self.0.lock().unwrap().push(event.clone());
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    pub(crate) fn numbers(&self) -> Vec<i64> {
        numbers(&self.0.lock().unwrap())
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().clone()
    }
}

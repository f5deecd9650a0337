//! Callers that go away: every future is polled once, twice, … and dropped, until it ends.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evercore_core::engine::{Append, Batch, NewAggregate, NewEvent, Payload};
use evercore_postgres::{
    AggregateId, AggregateQuery, AggregateType, BoxFuture, Direction, EventStore, EventType, KnownType,
    LogQuery, PageLimit, Position, PostgresEngine, Receipt, Result, Sequence, StorageEngine, Timestamp,
};
use evercore_testkit::poll_at_most;
use evercore_testkit::postgres::Server;
use tokio::task::JoinSet;

use crate::book::{Book, Fate};
use crate::load::{BESIDE, beside};
use crate::log::Log;
use crate::tools::{
    Account, AccountEvent, Part, accounts, command, connect, engine, milliseconds, number, patient_not,
    sized, unit,
};

/// The number of connections of each engine.
const POOL: usize = 4;

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_goes_away_at_any_await_leaves_nothing_half_done() {
    let Some(server) = Server::builder().start_or_skip() else { return };
    server.psql("postgres", BESIDE).unwrap();
    let url = server.url();
    let kept = PostgresEngine::builder().pool_size(POOL).connect(&url).await.unwrap();
    let pooler = PostgresEngine::builder().pool_size(POOL).pooler(true).connect(&url).await.unwrap();
    let (store, tally) = (EventStore::new(kept.clone()), Arc::new(Tally::default()));
    let (mut callers, mut all_ids) = (JoinSet::new(), Vec::new());
    for (writer, engine) in [&kept, &kept, &kept, &pooler, &pooler].into_iter().enumerate() {
        let ids = accounts(&store, 3, number(writer, 0)).await;
        all_ids.extend(ids.clone());
        let caller = Caller {
            engine: engine.clone(),
            store: patient_not(engine),
            ids,
            writer,
            tally: Arc::clone(&tally),
        };
        callers.spawn(caller.run(sized(200, 2_000) / 5));
    }
    callers.join_all().await;
    assert_nobody_idles_in_a_transaction(&server).await;
    for engine in [&kept, &pooler] {
        assert_whole(engine, &all_ids).await;
    }
    let log = Log::read(&store).await;
    let faults = tally.book.against(&log);
    println!("callers who went away: {tally:?}, {} events in the log, {faults}", log.events());
    faults.assert_none();
    let rows: usize =
        server.psql("postgres", "SELECT count(DISTINCT unit) FROM beside").unwrap().parse().unwrap();
    let with_rows = tally.beside_in(&log);
    assert_eq!(rows, with_rows, "rows without their events, or events without their row");
}

/// Futures that were begun and are not polled, as by a `select!` that is busy.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_stops_polling_holds_up_nobody() {
    let Some(server) = Server::builder().start_or_skip() else { return };
    server.psql("postgres", BESIDE).unwrap();
    let (engine, other) = (engine(&server.url()).await, engine(&server.url()).await);
    let (store, elsewhere) = (patient_not(&engine), patient_not(&other));
    let (mine, theirs) = (accounts(&store, 3, number(0, 0)).await, accounts(&store, 2, number(0, 1)).await);
    let (mut nth, mut longest) = (1, Duration::ZERO);
    for call in [Call::Commit, Call::Guarded, Call::Beside] {
        for polls in 1.. {
            let mut work = unit(&store, &mine[..2], number(0, nth + 1), 4).await.unwrap();
            if call == Call::Guarded {
                let read = work.load::<Account>(mine[2]).await.unwrap();
                work.guard(&read).unwrap();
            }
            let commit: BoxFuture<'_, Result<Receipt>> = match call {
                Call::Beside => Box::pin(beside(&engine, work, number(0, nth + 1), 1, false)),
                _ => Box::pin(work.commit()),
            };
            let mut held = commit;
            let outcome = poll_at_most(polls, &mut held).await;
            // Running statements on the server end.
            tokio::time::sleep(milliseconds(20)).await;
            for (place, store) in [("the same engine", &store), ("another engine", &elsewhere)] {
                let begun = Instant::now();
                nth += 2;
                let work = unit(store, &theirs, number(0, nth), 2).await.unwrap();
                let commit = tokio::time::timeout(Duration::from_secs(3), work.commit()).await;
                let commit =
                    commit.unwrap_or_else(|_| panic!("{call:?}, held after {polls} polls, holds up {place}"));
                commit.unwrap();
                longest = longest.max(begun.elapsed());
            }
            if let Some(receipt) = outcome {
                receipt.unwrap();
                break;
            }
            held.await.unwrap();
        }
    }
    println!("futures left alone: {} commits, nobody held up for longer than {longest:?}", nth / 2);
}

/// A call that is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Commit,
    /// With a guard, which is read under the lock.
    Guarded,
    /// With new names.
    NewNames,
    /// With SQL of the user.
    Beside,
    /// Several calls of the engine in a row.
    Update,
    LoadOrCreate,
    Load,
    ReadAggregate,
    ReadLog,
    Head,
    PositionAt,
    Wait,
    Reserve,
    Warmup,
    Types,
    Receipt,
    Settle,
}

const UNITS: [Call; 5] = [Call::Commit, Call::Guarded, Call::NewNames, Call::Beside, Call::Update];

const OTHERS: [Call; 12] = [
    Call::LoadOrCreate,
    Call::Load,
    Call::ReadAggregate,
    Call::ReadLog,
    Call::Head,
    Call::PositionAt,
    Call::Wait,
    Call::Reserve,
    Call::Warmup,
    Call::Types,
    Call::Receipt,
    Call::Settle,
];

struct Caller {
    engine: PostgresEngine,
    store: EventStore,
    ids: Vec<AggregateId>,
    writer: usize,
    tally: Arc<Tally>,
}

impl Caller {
    async fn run(self, units: usize) {
        let (mut nth, mut written) = (0, 0);
        let mut polls = [0; UNITS.len() + OTHERS.len()];
        while written < units {
            for (call, polls) in UNITS.iter().chain(&OTHERS).zip(&mut polls) {
                nth += 1;
                let has_ended = match UNITS.contains(call) {
                    true => self.write(*call, number(self.writer, nth), *polls).await,
                    false => self.call(*call, number(self.writer, nth), *polls).await,
                };
                written += usize::from(UNITS.contains(call));
                *polls = if has_ended { 0 } else { *polls + 1 };
            }
        }
    }

    /// Whether the unit ended.
    async fn write(&self, call: Call, unit: i64, polls: usize) -> bool {
        let outcome = self.commit(call, unit, polls).await;
        let fate = match &outcome {
            Some(receipt) => Fate::from(receipt),
            // Nothing was begun.
            None if polls == 0 => Fate::Never,
            None => Fate::from(self.store.settle(&command(unit)).await.unwrap()),
        };
        self.tally.units(call, unit, polls, outcome.is_some());
        self.tally.book.note(unit, fate);
        outcome.is_some()
    }

    async fn commit(&self, call: Call, number: i64, polls: usize) -> Option<Receipt> {
        let outcome = match call {
            Call::NewNames => {
                let batch = self.with_new_names(number).await;
                poll_at_most(polls, self.engine.commit(batch)).await
            }
            Call::Update => {
                let decide = |_: &Account| [AccountEvent::Credited(Part { unit: number, nth: 0, of: 1 })];
                poll_at_most(polls, self.store.update_once(command(number), self.ids[0], decide)).await
            }
            _ => {
                let mut work = unit(&self.store, &self.ids[..2], number, 4).await.unwrap();
                if call == Call::Guarded {
                    let read = work.load::<Account>(self.ids[2]).await.unwrap();
                    work.guard(&read).unwrap();
                }
                match call {
                    Call::Beside => poll_at_most(polls, beside(&self.engine, work, number, 1, false)).await,
                    _ => poll_at_most(polls, work.commit()).await,
                }
            }
        };
        outcome.map(|outcome| outcome.unwrap_or_else(|error| panic!("{call:?} met {error:?}")))
    }

    async fn with_new_names(&self, unit: i64) -> Batch {
        let id = self.engine.reserve(1).await.unwrap().next().unwrap();
        let (aggregate_type, mut batch) = (AggregateType::new(format!("new {unit}")).unwrap(), Batch::new());
        let event = |nth| NewEvent {
            event_type: EventType::new(format!("new {nth}")).unwrap(),
            payload: Payload::new(serde_json::to_vec(&Part { unit, nth, of: 2 }).unwrap()).unwrap(),
            time: Timestamp::now(),
            metadata: Arc::default(),
        };
        batch.create(NewAggregate { id, aggregate_type: aggregate_type.clone(), key: None }).unwrap();
        let events = vec![event(0), event(1)];
        batch.append(Append { aggregate: id, aggregate_type, expected: Sequence::ZERO, events }).unwrap();
        batch.set_command(command(unit), None);
        batch
    }

    /// Whether the call ended; if it did, it succeeded.
    async fn call(&self, call: Call, number: i64, polls: usize) -> bool {
        let (engine, store, id) = (&self.engine, &self.store, self.ids[0]);
        let outcome: Option<Result<()>> = match call {
            Call::LoadOrCreate => {
                let key = format!("key {number}");
                polled(polls, store.load_or_create::<Account>(&key), |made| assert_eq!(made.events, 0)).await
            }
            Call::Load => {
                let is_whole = |found: evercore_postgres::Loaded<Account>| {
                    assert_eq!(found.events, found.sequence().get());
                };
                polled(polls, store.load::<Account>(id), is_whole).await
            }
            Call::ReadAggregate => {
                let (direction, limit) = (Direction::Backward, PageLimit::default());
                let (from, to) = (Sequence::MAX, Sequence::ZERO);
                let query = AggregateQuery { aggregate: id, direction, from, to, limit };
                polled(polls, engine.read_aggregate(query), |events| assert!(!events.is_empty())).await
            }
            Call::ReadLog => {
                let query = LogQuery::after(Position::ZERO).with_limit(PageLimit::events(300).unwrap());
                polled(polls, engine.read_log(&query), |page| assert!(!page.events.is_empty())).await
            }
            Call::Head => polled(polls, engine.head(), |head| assert!(head > Position::ZERO)).await,
            Call::PositionAt => {
                polled(polls, engine.position_at(Timestamp::MAX), |head| assert!(head > Position::ZERO)).await
            }
            Call::Wait => {
                let head = engine.head().await.unwrap();
                polled(polls, engine.wait(head, milliseconds(3)), |seen| assert!(seen >= head)).await
            }
            Call::Reserve => polled(polls, engine.reserve(7), |block| assert_eq!(block.count(), 7)).await,
            Call::Warmup => {
                let event_types = vec![EventType::new("warm").unwrap()];
                let aggregate_type = AggregateType::new(format!("warm {number}")).unwrap();
                polled(polls, engine.warmup(&[KnownType { aggregate_type, event_types }]), |()| ()).await
            }
            Call::Types => polled(polls, engine.types(), |types| assert!(!types.is_empty())).await,
            Call::Receipt => {
                let first = command(self::number(self.writer, 0));
                polled(polls, engine.command(&first), |known| assert!(known.is_some())).await
            }
            Call::Settle => {
                polled(polls, engine.settle(&command(number)), |settled| assert_eq!(settled, None)).await
            }
            _ => unreachable!("{call:?} is a unit"),
        };
        if let Some(Err(error)) = &outcome {
            panic!("{call:?} met {error:?}");
        }
        self.tally.other(polls, outcome.is_some());
        outcome.is_some()
    }
}

async fn polled<T>(
    polls: usize,
    call: impl Future<Output = Result<T>>,
    check: impl FnOnce(T),
) -> Option<Result<()>> {
    poll_at_most(polls, call).await.map(|outcome| outcome.map(check))
}

#[derive(Default)]
struct Tally {
    book: Book,
    calls: AtomicUsize,
    dropped: AtomicUsize,
    units: AtomicUsize,
    most_polls: AtomicUsize,
    beside: std::sync::Mutex<Vec<i64>>,
}

impl Tally {
    fn units(&self, call: Call, unit: i64, polls: usize, has_ended: bool) {
        self.units.fetch_add(1, Ordering::Relaxed);
        if call == Call::Beside {
            self.beside.lock().unwrap().push(unit);
        }
        self.other(polls, has_ended);
    }

    fn other(&self, polls: usize, has_ended: bool) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.dropped.fetch_add(usize::from(!has_ended), Ordering::Relaxed);
        self.most_polls.fetch_max(polls, Ordering::Relaxed);
    }

    /// The number of units in the log with a row of the user.
    fn beside_in(&self, log: &Log) -> usize {
        let units = log.units();
        self.beside.lock().unwrap().iter().filter(|unit| units.contains(unit)).count()
    }
}

impl std::fmt::Debug for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        let (calls, dropped, units) = (count(&self.calls), count(&self.dropped), count(&self.units));
        let most = count(&self.most_polls);
        write!(f, "{calls} calls, {units} of them units; {dropped} dropped, after 0 to {most} polls")
    }
}

/// The server would end such a transaction after five seconds.
async fn assert_nobody_idles_in_a_transaction(server: &Server) {
    const IDLE: &str = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
    let (client, until) = (connect(&server.url()).await, Instant::now() + Duration::from_secs(2));
    while client.query_one(IDLE, &[]).await.unwrap().get::<_, i64>(0) > 0 {
        assert!(Instant::now() < until, "a connection was left idle in a transaction");
        tokio::time::sleep(milliseconds(10)).await;
    }
    assert!(!server.log().contains("idle-in-transaction"), "the server had to end a transaction");
}

/// All connections are back in the pool and work.
async fn assert_whole(engine: &PostgresEngine, ids: &[AggregateId]) {
    let until = Instant::now() + Duration::from_secs(5);
    let is_whole = || {
        let status = engine.pool().status();
        status.max_size == POOL && status.available == status.size && status.waiting == 0
    };
    while !is_whole() {
        assert!(Instant::now() < until, "not all connections came back: {:?}", engine.pool().status());
        tokio::time::sleep(milliseconds(5)).await;
    }
    // All at the same time.
    let mut taken = Vec::new();
    for _ in 0..POOL {
        taken.push(engine.pool().get().await.unwrap());
    }
    drop(taken);
    let mut loads = JoinSet::new();
    for id in ids.iter().copied().take(POOL) {
        let store = EventStore::new(engine.clone());
        loads.spawn(async move { store.load::<Account>(id).await.unwrap().sequence() });
    }
    assert_eq!(loads.join_all().await.len(), POOL);
}

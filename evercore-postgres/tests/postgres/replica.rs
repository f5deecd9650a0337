//! Standbys: reading and following them while the primary is written to, and the effects of its loss.

use std::time::{Duration, Instant};

use evercore_postgres::tokio_postgres::{self, NoTls};
use evercore_postgres::{
    CommandId, Error, ErrorKind, EventStore, EventType, Filter, Loaded, LogQuery, PageLimit, Position,
    PostgresEngine, Receipt, Result, StorageEngine,
};
use evercore_testkit::postgres::Server;

use crate::common::{Place, block_on};
use crate::orders::{Order, OrderEvent, all_of, kind, noted, place, positions, skipped, soon, up_to};

/// A primary and a standby that follows it.
struct Pair {
    primary: Server,
    standby: Server,
    /// The store, at the primary's URL.
    at: Place,
}

impl Pair {
    fn start() -> Option<Self> {
        let primary = Server::builder().start_or_skip()?;
        let at = Place::on(primary.url());
        match primary.standby() {
            // `pg_basebackup` is missing, or older than the server.
            Err(error)
                if error.contains("could not be run") || error.contains("incompatible server version") =>
            {
                skipped(&format!("standby: {error}"));
                None
            }
            standby => Some(Self { primary, standby: standby.unwrap(), at }),
        }
    }

    /// The URL with both, the read-only one first.
    fn both(&self) -> String {
        format!(
            "postgres://evercore@127.0.0.1:{},127.0.0.1:{}/postgres",
            self.standby.port(),
            self.primary.port()
        )
    }

    async fn read_standby(&self) -> PostgresEngine {
        let schema =
            format!("SELECT count(*) FROM pg_class WHERE oid = to_regclass('{}.event_log')", self.at.schema);
        soon("the standby has the store", async || self.standby.psql("postgres", &schema).unwrap() == "1")
            .await;
        self.at.builder().read_from(&self.standby.url()).await.unwrap()
    }

    async fn standby_has(&self, head: i64) {
        let sql = format!("SELECT position FROM {}.log_end", self.at.schema);
        // At first there is not even the table.
        soon("the standby has it all", async || self.standby.psql("postgres", &sql) == Ok(head.to_string()))
            .await;
    }

    /// Cuts the standby off from the primary.
    async fn cut(&self) {
        self.standby
            .psql("postgres", "ALTER SYSTEM SET primary_conninfo = ''; SELECT pg_reload_conf()")
            .unwrap();
        let following = "SELECT count(*) FROM pg_stat_replication";
        soon("the standby is cut off", async || self.primary.psql("postgres", following).unwrap() == "0")
            .await;
    }

    fn fail_over(&self) {
        self.primary.kill();
        self.standby.promote().unwrap();
    }
}

/// Follows the log until this many events have come. Gives their positions.
async fn tail(engine: PostgresEngine, filter: Filter, until: Position) -> Vec<i64> {
    let limit = PageLimit::events(17).unwrap();
    let mut query = LogQuery::after(Position::ZERO).with_filter(filter).with_limit(limit);
    let mut seen = Vec::new();
    while query.from < until {
        let page = engine.read_log(&query).await.unwrap();
        seen.extend(page.events.iter().map(|event| event.position().get()));
        if page.scanned == query.from {
            engine.wait(query.from, Duration::from_secs(10)).await.unwrap();
        }
        query.from = page.scanned;
    }
    seen
}

const WRITERS: i64 = 8;
const ROUNDS: i64 = 25;

#[test]
fn a_standby_is_tailed_without_a_gap_while_eight_writers_write() {
    block_on(async {
        let Some(pair) = Pair::start() else { return };
        let engines = [pair.at.engine().await, pair.at.engine().await];
        let reader = pair.read_standby().await;
        let until = Position::new(WRITERS * ROUNDS * 2).unwrap();
        let notes = Filter::all().with_event_type(EventType::new("Noted").unwrap());
        let all = tokio::spawn(tail(reader.clone(), Filter::all(), until));
        let some = tokio::spawn(tail(reader.clone(), notes.clone(), until));
        let writers = (0..WRITERS).map(|writer| {
            let store = EventStore::new(engines[usize::try_from(writer % 2).unwrap()].clone());
            tokio::spawn(async move {
                for round in 0..ROUNDS {
                    place(&store, &format!("own {writer}")).await.unwrap();
                    let note = |_: &Order| [noted("x")];
                    store
                        .update_or_create::<Order, _, _>(format!("shared {}", round % 3), note)
                        .await
                        .unwrap();
                }
            })
        });
        for writer in writers.collect::<Vec<_>>() {
            writer.await.unwrap();
        }
        assert_eq!(all.await.unwrap(), up_to(until.get()), "none skipped, none twice");
        let expected = tail(engines[0].clone(), notes, until).await;
        assert_eq!(expected.len(), usize::try_from(WRITERS * ROUNDS).unwrap());
        assert_eq!(some.await.unwrap(), expected);
        let (here, there) = (EventStore::new(engines[0].clone()), EventStore::new(reader.clone()));
        let (written, read) =
            (here.load::<Order>("own 3").await.unwrap(), there.load::<Order>("own 3").await.unwrap());
        assert_eq!((read.id(), read.sequence(), read.events), (written.id(), written.sequence(), ROUNDS));
        assert_eq!(here.types().await.unwrap(), there.types().await.unwrap());
        assert_eq!(engines[0].store_id(), reader.store_id());
        let any = pair.at.builder().read_from(&pair.both()).await.unwrap();
        pair.standby.kill();
        soon("another host is read from", async || any.head().await.is_ok_and(|head| head == until)).await;
        what_writes_is_refused(&there, &reader).await;
    });
}

/// The server is gone, so nothing can have been sent.
async fn what_writes_is_refused(store: &EventStore, engine: &PostgresEngine) {
    let mut batch = evercore_core::engine::Batch::new();
    batch.set_command(CommandId::new("x").unwrap(), None);
    for refused in [
        kind(engine.commit(batch).await),
        kind(engine.reserve(1).await),
        kind(store.warmup::<Order>().await),
        kind(store.settle(&CommandId::new("x").unwrap()).await),
        kind(engine.commit_with(store.begin(), crate::orders::own("SELECT 1")).await),
    ] {
        assert_eq!(refused, ErrorKind::ReadOnly);
    }
}

#[test]
fn who_connects_to_a_standby_to_write_is_told_so() {
    block_on(async {
        let Some(pair) = Pair::start() else { return };
        let nothing_there = pair.at.builder().connect(&pair.standby.url()).await;
        assert_eq!(kind(nothing_there), ErrorKind::ReadOnly);
        place(&EventStore::new(pair.at.engine().await), "first").await.unwrap();
        pair.standby_has(1).await;
        let engine = pair.at.builder().connect(&pair.standby.url()).await.unwrap();
        let store = EventStore::new(engine.clone());
        assert_eq!(store.load::<Order>("first").await.unwrap().events, 1);
        let error = place(&store, "first").await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::ReadOnly, "{}", all_of(&error));
        assert!(error.to_string().contains("25006"), "{error}");
        let beside = crate::orders::place_with(&engine, "first", crate::orders::own("SELECT 1")).await;
        assert_eq!(kind(beside), ErrorKind::ReadOnly);
        // If the URL names several hosts, the engine looks for one that accepts writes.
        let only_standbys = format!("{}?target_session_attrs=read-write", pair.standby.url());
        assert_eq!(kind(pair.at.builder().connect(&only_standbys).await), ErrorKind::Unavailable);
        let found = pair.at.builder().connect(&pair.both()).await.unwrap();
        place(&EventStore::new(found), "first").await.unwrap();
    });
}

/// A session keeps the role that its server had when it began: that of a former primary, or of a standby before its
/// promotion.
#[test]
fn sessions_that_take_no_writes_are_given_up() {
    block_on(async {
        let Some(server) = Server::builder().start_or_skip() else { return };
        let at = Place::on(server.url());
        place(&EventStore::new(at.engine().await), "first").await.unwrap();
        let set = |to| format!("ALTER DATABASE postgres SET default_transaction_read_only = {to}");
        server.psql("template1", &set("on")).unwrap();
        let engine = at.builder().pool_size(2).connect(&at.url).await.unwrap();
        let store = EventStore::new(engine.clone());
        for _ in 0..3 {
            assert_eq!(kind(place(&store, "first").await), ErrorKind::ReadOnly);
            let settled = engine.settle(&CommandId::new("never").unwrap()).await;
            assert_eq!(kind(settled), ErrorKind::ReadOnly);
        }
        server.psql("template1", &set("off")).unwrap();
        soon("it takes writes again", async || place(&store, "first").await.is_ok()).await;
        assert_eq!(positions(&engine).await, [1, 2]);
    });
}

/// Tries until it succeeds. The errors on the way must allow a retry.
async fn place_at_last(store: &EventStore, key: &str) {
    soon("commits go through again", async || match place(store, key).await {
        Ok(_) => true,
        Err(error) => {
            assert!(may_pass(&error), "{}", all_of(&error));
            false
        }
    })
    .await;
}

fn may_pass(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::OutcomeUnknown)
}

#[test]
fn an_engine_finds_the_new_primary_by_itself() {
    block_on(async {
        let Some(pair) = Pair::start() else { return };
        let engine = pair.at.builder().connect(&pair.both()).await.unwrap();
        let store = EventStore::new(engine.clone());
        for _ in 0..20 {
            place(&store, "first").await.unwrap();
        }
        pair.standby_has(20).await;
        let waiting = {
            let engine = engine.clone();
            let after = Position::new(20).unwrap();
            tokio::spawn(async move { engine.wait(after, Duration::from_secs(60)).await })
        };
        tokio::time::sleep(Duration::from_millis(100)).await;
        pair.fail_over();
        let began = Instant::now();
        place_at_last(&store, "first").await;
        println!("commits went through {:?} after the promotion", began.elapsed());
        assert_eq!(waiting.await.unwrap().unwrap().get(), 21);
        assert_eq!(positions(&engine).await, up_to(21));
        assert_eq!(store.load::<Order>("first").await.unwrap().events, 21);
        // Ids that the old server reserved are not reserved again on the new one.
        let made = store.load_or_create::<Order>("second").await.unwrap();
        let elsewhere = EventStore::new(pair.at.builder().connect(&pair.both()).await.unwrap());
        assert_ne!(elsewhere.load_or_create::<Order>("third").await.unwrap().id(), made.id());
    });
}

#[test]
fn a_reader_ahead_of_a_log_that_lost_its_tail_is_told_and_others_go_on() {
    block_on(async {
        let Some(pair) = Pair::start() else { return };
        let engine = pair.at.builder().connect(&pair.both()).await.unwrap();
        let store = EventStore::new(engine.clone());
        for _ in 0..10 {
            place(&store, "first").await.unwrap();
        }
        pair.standby_has(10).await;
        pair.cut().await;
        for _ in 0..5 {
            place(&store, "first").await.unwrap();
        }
        assert_eq!(store.head().await.unwrap().get(), 15);
        pair.fail_over();
        soon("there is a server again", async || store.head().await.is_ok()).await;
        let (ahead, at_the_end) = (Position::new(13).unwrap(), Position::new(10).unwrap());
        let error = store.read_log(&LogQuery::after(ahead)).await.unwrap_err();
        let told = matches!(error.kind(), ErrorKind::CursorAhead { cursor, head, .. } if *cursor == ahead && *head == at_the_end);
        assert!(told, "{error:?}");
        // A reader that is not ahead waits, and the next commit wakes it.
        let began = Instant::now();
        assert_eq!(store.wait(at_the_end, Duration::from_millis(200)).await.unwrap(), at_the_end);
        assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
        let waiting = {
            let store = store.clone();
            tokio::spawn(async move { store.wait(at_the_end, Duration::from_secs(30)).await.unwrap() })
        };
        tokio::time::sleep(Duration::from_millis(50)).await;
        let began = Instant::now();
        place(&store, "first").await.unwrap();
        assert_eq!(waiting.await.unwrap().get(), 11);
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
        assert_eq!(positions(&engine).await, up_to(11));
        assert_eq!(store.load::<Order>("first").await.unwrap().events, 11);
    });
}

/// Several commits form a flight, so that the engine does not look up its own events.
#[test]
fn who_has_written_what_a_failover_lost_is_in_conflict_and_leaves_no_hole() {
    block_on(async {
        let Some(pair) = Pair::start() else { return };
        let engine = pair.at.builder().connect(&pair.both()).await.unwrap();
        let store = EventStore::new(engine.clone());
        let mut orders = Vec::new();
        for key in ["a", "b", "c", "d"] {
            place(&store, key).await.unwrap();
            orders.push(store.load::<Order>(key).await.unwrap());
        }
        let primary = pair.primary.url();
        for _ in 0..3 {
            all_at_once(&pair.at, &primary, &store, &mut orders).await;
        }
        pair.standby_has(16).await;
        pair.cut().await;
        for _ in 0..2 {
            all_at_once(&pair.at, &primary, &store, &mut orders).await;
        }
        pair.fail_over();
        soon("there is a server again", async || store.head().await.is_ok()).await;
        assert_eq!(store.head().await.unwrap().get(), 16);
        for outcome in together(&pair.at, &pair.standby.url(), &store, &mut orders).await {
            let error = outcome.unwrap_err();
            assert!(error.is_conflict(), "{}", all_of(&error));
        }
        assert_eq!(positions(&engine).await, up_to(16));
        for order in &mut orders {
            *order = store.load::<Order>(order.id()).await.unwrap();
            assert_eq!(order.events, 4);
        }
        all_at_once(&pair.at, &pair.standby.url(), &store, &mut orders).await;
        assert_eq!(positions(&engine).await, up_to(20));
    });
}

async fn all_at_once(at: &Place, url: &str, store: &EventStore, orders: &mut [Loaded<Order>]) {
    for outcome in together(at, url, store, orders).await {
        outcome.unwrap();
    }
}

/// Writes one more event of each. The first commit is held up until the others queue after it, so they are one
/// flight.
async fn together(
    at: &Place,
    url: &str,
    store: &EventStore,
    orders: &mut [Loaded<Order>],
) -> Vec<Result<Receipt>> {
    let (mut side, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    let lock = side.transaction().await.unwrap();
    let log_end = format!("SELECT position FROM {}.log_end FOR UPDATE", at.schema);
    lock.batch_execute(&log_end).await.unwrap();
    let mut commits = Vec::new();
    for order in orders {
        let mut work = store.begin();
        work.record(order, OrderEvent::Placed).unwrap();
        commits.push(tokio::spawn(work.commit()));
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    lock.rollback().await.unwrap();
    let mut outcomes = Vec::new();
    for commit in commits {
        outcomes.push(commit.await.unwrap());
    }
    outcomes
}

/// The old primary keeps running, is first in the URL and accepts writes, because it was not told.
#[test]
fn a_primary_that_was_replaced_and_lives_on_is_not_taken() {
    block_on(async {
        let Some(pair) = Pair::start() else { return };
        let url = format!(
            "postgres://evercore@127.0.0.1:{},127.0.0.1:{}/postgres",
            pair.primary.port(),
            pair.standby.port()
        );
        let engine = pair.at.builder().pool_size(2).connect(&url).await.unwrap();
        let store = EventStore::new(engine.clone());
        for _ in 0..5 {
            place(&store, "first").await.unwrap();
        }
        pair.standby_has(5).await;
        pair.cut().await;
        pair.primary.stop().unwrap();
        pair.standby.promote().unwrap();
        place_at_last(&store, "first").await;
        pair.primary.start_again().unwrap();
        // All connections are made again, while both servers accept writes.
        let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'evercore'";
        pair.standby.psql("postgres", end).unwrap();
        for _ in 0..4 {
            place_at_last(&store, "first").await;
        }
        // A process that knows neither asks both.
        let other = pair.at.builder().connect(&url).await.unwrap();
        place(&EventStore::new(other), "first").await.unwrap();
        let position = format!("SELECT position FROM {}.log_end", pair.at.schema);
        let of = |server: &Server| server.psql("postgres", &position).unwrap();
        assert_eq!((of(&pair.primary), of(&pair.standby)), ("5".to_owned(), "11".to_owned()));
        // Asked alone, the old primary still works.
        pair.standby.kill();
        soon("the standby is gone", async || store.head().await.is_err()).await;
        let error = place(&store, "first").await.unwrap_err();
        assert!(may_pass(&error), "{}", all_of(&error));
        assert_eq!(of(&pair.primary), "5");
    });
}

/// The primary is gone, and the standby has less of the log. That passes by itself.
#[test]
fn a_reader_waits_for_a_standby_that_lags() {
    block_on(async {
        let Some(pair) = Pair::start() else { return };
        let store = EventStore::new(pair.at.engine().await);
        place(&store, "first").await.unwrap();
        pair.standby_has(1).await;
        pair.standby.psql("postgres", "SELECT pg_wal_replay_pause()").unwrap();
        for _ in 0..4 {
            place(&store, "first").await.unwrap();
        }
        let url = format!(
            "postgres://evercore@127.0.0.1:{},127.0.0.1:{}/postgres",
            pair.primary.port(),
            pair.standby.port()
        );
        let reader = pair.at.builder().read_from(&url).await.unwrap();
        let end = Position::new(5).unwrap();
        assert_eq!(reader.head().await.unwrap(), end);
        pair.primary.stop().unwrap();
        soon("the other host is read from", async || reader.head().await.is_ok()).await;
        let error = reader.read_log(&LogQuery::after(end)).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Unavailable, "{}", all_of(&error));
        assert!(error.is_retryable() && error.to_string().contains("standby"), "{error}");
        pair.standby.psql("postgres", "SELECT pg_wal_replay_resume()").unwrap();
        soon("it has caught up", async || reader.read_log(&LogQuery::after(end)).await.is_ok()).await;
    });
}

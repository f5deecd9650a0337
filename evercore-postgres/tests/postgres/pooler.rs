//! Through PgBouncer in transaction mode: each transaction gets any free connection of the server.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use evercore_postgres::{
    CommandId, ErrorKind, EventStore, Filter, LogQuery, PageLimit, Position, PostgresEngine, StorageEngine,
};
use evercore_testkit::postgres::{PgBouncer, Server};

use crate::common::{Place, block_on};
use crate::orders::{
    Order, OrderEvent, all_of, closure, noted, own, place, place_with, positions, skipped, soon, up_to,
};

/// A server, and a pooler with so few connections that clients share them.
struct Pooled {
    server: Server,
    pooler: PgBouncer,
}

fn start(settings: &[(&str, &str)]) -> Option<Pooled> {
    let server = Server::builder().start_or_skip()?;
    match PgBouncer::start_with(&server, "transaction", settings).unwrap() {
        Some(pooler) => Some(Pooled { server, pooler }),
        None => {
            skipped("PgBouncer is not there");
            None
        }
    }
}

fn pooled() -> Option<&'static Pooled> {
    static POOLED: OnceLock<Option<Pooled>> = OnceLock::new();
    POOLED.get_or_init(|| start(&[("default_pool_size", "3")])).as_ref()
}

/// One of several engines, as of several processes. The store is migrated through the pooler too.
async fn engine(place: &Place) -> PostgresEngine {
    place.builder().pooler(true).connect(&place.url).await.unwrap()
}

#[test]
fn everything_works_through_a_pooler_in_transaction_mode() {
    block_on(async {
        let Some(pooled) = pooled() else { return };
        let at = Place::on(pooled.pooler.url());
        let engine = engine(&at).await;
        let store = EventStore::new(engine.clone());
        place(&store, "first").await.unwrap();
        let many = |_: &Order| (0..250).map(|n| noted(format!("{n}"))).collect::<Vec<_>>();
        store.update::<Order, _, _>("first", many).await.unwrap();
        assert_eq!(store.load::<Order>("first").await.unwrap().events, 251);
        let small = PageLimit::events(7).unwrap();
        let placed = evercore_postgres::EventType::new("Placed").unwrap();
        let mut log = store.log_reader(LogQuery::after(Position::ZERO).with_limit(small));
        let mut seen = Vec::new();
        while let Some(page) = log.next().await.unwrap() {
            seen.extend(page.events.iter().map(|event| event.position().get()));
        }
        assert_eq!(seen, up_to(251));
        let filter = Filter::all().with_event_type(placed);
        let page = store.read_log(&LogQuery::before(Position::MAX).with_filter(filter)).await.unwrap();
        assert_eq!(page.events.len(), 1);
        let command = CommandId::new("once").unwrap();
        let placed = |_: &Order| [OrderEvent::Placed];
        let once = store.update_once::<Order, _, _>(command.clone(), "first", placed).await.unwrap();
        let again = store.update_once::<Order, _, _>(command.clone(), "first", placed).await.unwrap();
        assert_eq!((once, store.settle(&command).await.unwrap()), (again.clone(), Some(again)));
        let mut work = store.begin();
        let mut order = work.load::<Order>("first").await.unwrap();
        work.change_key(&mut order, "renamed").unwrap();
        work.commit().await.unwrap();
        at.psql("CREATE TABLE @outbox (message text)");
        let insert = |at: &Place| own(format!("INSERT INTO {}.outbox VALUES ('x')", at.schema));
        place_with(&engine, "renamed", insert(&at)).await.unwrap();
        let refused = closure(|_| Box::pin(async { Err("no".into()) }));
        place_with(&engine, "renamed", refused).await.unwrap_err();
        assert_eq!(at.psql("SELECT count(*) FROM @outbox"), "1");
        assert_eq!(store.load::<Order>("renamed").await.unwrap().sequence().get(), 253);
    });
}

#[test]
fn sixteen_writers_through_a_pooler_leave_no_hole_and_nothing_open() {
    block_on(async {
        let Some(pooled) = pooled() else { return };
        let at = Place::on(pooled.pooler.url());
        let engines = [engine(&at).await, engine(&at).await, engine(&at).await, engine(&at).await];
        let writers = (0..16).map(|writer: usize| {
            let engine = engines[writer % 4].clone();
            tokio::spawn(async move {
                let store = EventStore::new(engine.clone());
                for round in 0..12 {
                    place(&store, &format!("own {writer}")).await.unwrap();
                    place(&store, &format!("shared {}", (writer + round) % 5)).await.unwrap();
                    let beside = own("SELECT 1");
                    let outcome = place_with(&engine, &format!("own {writer}"), beside).await;
                    outcome.unwrap_or_else(|error| panic!("{}", all_of(&error)));
                }
            })
        });
        for writer in writers.collect::<Vec<_>>() {
            writer.await.unwrap();
        }
        assert_eq!(positions(&engines[0]).await, up_to(16 * 12 * 3));
        let store = EventStore::new(engines[1].clone());
        let mut shared = 0;
        for n in 0..5 {
            shared += store.load::<Order>(format!("shared {n}")).await.unwrap().events;
        }
        assert_eq!(shared, 16 * 12);
        let open = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
        assert_eq!(pooled.server.psql("postgres", open).unwrap(), "0");
        let connections = "SELECT count(*) <= 3 FROM pg_stat_activity WHERE application_name = 'evercore'";
        assert_eq!(pooled.server.psql("postgres", connections).unwrap(), "t");
    });
}

#[test]
fn the_commits_of_others_are_polled_for_through_a_pooler() {
    block_on(async {
        let Some(pooled) = pooled() else { return };
        let at = Place::on(pooled.pooler.url());
        let (reads, writes) = (engine(&at).await, EventStore::new(engine(&at).await));
        for round in 0..3 {
            let engine = reads.clone();
            let after = Position::new(round).unwrap();
            let waiting = tokio::spawn(async move { engine.wait(after, Duration::from_secs(30)).await });
            tokio::time::sleep(Duration::from_millis(100)).await;
            let began = Instant::now();
            place(&writes, "first").await.unwrap();
            assert_eq!(waiting.await.unwrap().unwrap().get(), round + 1);
            assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
        }
    });
}

/// A commit sets what it needs in its own transaction, whatever other clients set on the connection.
#[test]
fn what_is_promised_holds_on_the_connections_of_others() {
    block_on(async {
        let Some(pooled) = pooled() else { return };
        let at = Place::on(pooled.pooler.url());
        let engine = engine(&at).await;
        let spoil = "SET synchronous_commit = off; SET default_transaction_isolation = 'serializable'";
        for _ in 0..6 {
            evercore_testkit::postgres::psql(&at.url, spoil).unwrap();
        }
        at.psql("CREATE TABLE @seen (setting text)");
        let look = "INSERT INTO @seen SELECT current_setting('synchronous_commit') || ' ' || current_setting('transaction_isolation')";
        for _ in 0..6 {
            place_with(&engine, "first", own(look.replace('@', &format!("{}.", at.schema)))).await.unwrap();
        }
        assert_eq!(at.psql("SELECT DISTINCT setting FROM @seen"), "on read committed");
    });
}

#[test]
fn a_pooler_that_nobody_told_of_is_found_out_at_connect() {
    block_on(async {
        // The first refuses settings of a session, the other one ignores them.
        let Some(pooled) = pooled() else { return };
        let tolerant = [("ignore_startup_parameters", "options"), ("default_pool_size", "3")];
        let tolerant = PgBouncer::start_with(&pooled.server, "transaction", &tolerant).unwrap().unwrap();
        for url in [pooled.pooler.url(), tolerant.url()] {
            let at = Place::on(url);
            engine(&at).await;
            for error in [
                at.builder().connect(&at.url).await.unwrap_err(),
                at.builder().read_from(&at.url).await.unwrap_err(),
            ] {
                assert_eq!(error.kind(), &ErrorKind::Backend, "{}", all_of(&error));
                assert!(error.to_string().contains("Builder::pooler"), "{error}");
            }
        }
    });
}

/// PgBouncer uses the same code for all its messages, also when it refuses settings of a session.
#[test]
fn a_server_that_restarts_behind_a_pooler_is_waited_for() {
    block_on(async {
        let settings = [("default_pool_size", "3"), ("server_login_retry", "1"), ("query_wait_timeout", "2")];
        let Some(pooled) = start(&settings) else { return };
        let at = Place::on(pooled.pooler.url());
        let engine = engine(&at).await;
        let store = EventStore::new(engine.clone());
        place(&store, "first").await.unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn({
            let (seen, subscription) = (
                Arc::clone(&seen),
                store.subscription("news").unwrap().with_lease(Duration::from_millis(600)),
            );
            async move {
                let shutdown = async { drop(stopped.await) };
                subscription
                    .run(shutdown, move |event| {
                        seen.lock().unwrap().push(event.position().get());
                        async { Ok(()) }
                    })
                    .await
            }
        });
        let saw = |count: i64| {
            let seen = Arc::clone(&seen);
            async move { seen.lock().unwrap().contains(&count) }
        };
        soon("the first comes", || saw(1)).await;
        pooled.server.stop().unwrap();
        let end = Instant::now() + Duration::from_secs(4);
        while Instant::now() < end {
            let error = engine.head().await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Unavailable, "{}", all_of(&error));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        pooled.server.start_again().unwrap();
        soon("it answers again", async || place(&store, "first").await.is_ok()).await;
        assert!(!running.is_finished(), "{:?}", running.await);
        soon("the next comes", || saw(2)).await;
        stop.send(()).unwrap();
        running.await.unwrap().unwrap();
    });
}

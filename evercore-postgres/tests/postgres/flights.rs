//! Connections, flights and their queue under faults: dropped reads, sessions without their prepared statements,
//! runtimes that end, standbys that do not answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evercore_core::engine::{Append, Batch, NewAggregate, NewEvent, Payload, Snapshot};
use evercore_postgres::deadpool_postgres::{Manager, Pool};
use evercore_postgres::tokio_postgres::{self, Client, IsolationLevel, NoTls};
use evercore_postgres::{
    AggregateType, CommandId, ErrorKind, EventStore, EventType, Metadata, Position, PostgresEngine, Receipt,
    Result, Sequence, StorageEngine, Timestamp,
};
use evercore_testkit::postgres::{Proxy, Server};
use tokio::runtime::Runtime;

use crate::common::{Place, block_on};
use crate::orders::{Order, OrderEvent, all_of, kind, named, own, place, place_with, soon};

async fn side(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// A store with an order and its snapshot.
async fn two_connections(at: &Place, name: &str) -> (PostgresEngine, EventStore) {
    let engine = at.builder().pool_size(2).connect(&named(&at.url, name)).await.unwrap();
    let store = EventStore::new(engine.clone());
    place(&store, "first").await.unwrap();
    (engine, store)
}

/// The number of running statements with this name.
fn at_work(at: &Place, name: &str) -> String {
    at.psql(&format!(
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND application_name = '{name}'"
    ))
}

#[test]
fn reads_that_their_callers_give_up_are_cancelled() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let (engine, store) = two_connections(&at, "given_up").await;
        let mut side = side(&at.url).await;
        let lock = side.transaction().await.unwrap();
        let table = format!("LOCK TABLE {}.snapshots IN ACCESS EXCLUSIVE MODE", at.schema);
        lock.batch_execute(&table).await.unwrap();
        for _ in 0..2 {
            let load = store.load::<Order>("first");
            tokio::time::timeout(Duration::from_millis(100), load).await.unwrap_err();
        }
        let began = Instant::now();
        assert_eq!(engine.head().await.unwrap().get(), 1);
        soon("nothing is at work", async || at_work(&at, "given_up") == "0").await;
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        lock.rollback().await.unwrap();
        assert_eq!(store.load::<Order>("first").await.unwrap().events, 1);
    });
}

#[test]
fn a_commit_needs_no_connection_of_those_who_read() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let (engine, store) = two_connections(&at, "reads").await;
        let mut first = store.load::<Order>("first").await.unwrap();
        let mut side = side(&at.url).await;
        let lock = side.transaction().await.unwrap();
        let table = format!("LOCK TABLE {}.snapshots IN ACCESS EXCLUSIVE MODE", at.schema);
        lock.batch_execute(&table).await.unwrap();
        let reads = [store.clone(), store.clone()]
            .map(|store| tokio::spawn(async move { store.load::<Order>("first").await }));
        soon("both read", async || at_work(&at, "reads") == "2").await;
        let began = Instant::now();
        let mut work = store.begin();
        work.record(&mut first, OrderEvent::Placed).unwrap();
        work.commit().await.unwrap();
        engine.reserve(1).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        lock.rollback().await.unwrap();
        for read in reads {
            read.await.unwrap().unwrap();
        }
    });
}

/// The server reports success with a warning: the commit exists, and a failover may lose it.
#[test]
fn a_commit_whose_wait_for_a_standby_was_cancelled_is_not_acknowledged() {
    block_on(async {
        let Some(server) = Server::builder().start_or_skip() else { return };
        let at = Place::on(server.url());
        // The warning is read, whatever the URL sets.
        let url = format!("{}&options=-c%20client_min_messages%3Derror", named(&at.url, "waits"));
        let engine = at.builder().connect(&url).await.unwrap();
        let store = EventStore::new(engine.clone());
        place(&store, "first").await.unwrap();
        let set = "ALTER SYSTEM SET synchronous_standby_names = 'nobody'; SELECT pg_reload_conf()";
        server.psql("postgres", set).unwrap();
        soon("a standby is asked for", async || at.psql("SHOW synchronous_standby_names") == "nobody").await;
        let commit = |way: usize| {
            let (store, engine) = (store.clone(), engine.clone());
            async move {
                match way {
                    0 => place(&store, "first").await,
                    // A new name is written under the lock.
                    1 => {
                        store
                            .update::<Order, _, _>("first", |_| [crate::orders::noted("under the lock")])
                            .await
                    }
                    _ => place_with(&engine, "first", own("SELECT 1")).await,
                }
            }
        };
        let waits = "FROM pg_stat_activity WHERE application_name = 'waits' AND wait_event = 'SyncRep'";
        for way in 0..3 {
            let commit = tokio::spawn(commit(way));
            soon("it waits", async || at.psql(&format!("SELECT count(*) {waits}")) == "1").await;
            at.psql(&format!("SELECT pg_cancel_backend(pid) {waits}"));
            let outcome: Result<Receipt> = commit.await.unwrap();
            assert_eq!(kind(outcome), ErrorKind::OutcomeUnknown, "{way}");
            assert_eq!(engine.head().await.unwrap().get(), 2 + i64::try_from(way).unwrap());
        }
        // Reads at the same time are certain.
        let commit = tokio::spawn(commit(2));
        soon("it waits", async || at.psql(&format!("SELECT count(*) {waits}")) == "1").await;
        let queued = "SELECT count(*) FROM pg_locks WHERE NOT granted";
        let mut side = side(&at.url).await;
        let table = format!("LOCK TABLE {}.aggregates IN ACCESS EXCLUSIVE MODE", at.schema);
        let lock = tokio::spawn(async move {
            let lock = side.transaction().await.unwrap();
            lock.batch_execute(&table).await.unwrap();
            lock.rollback().await.unwrap();
        });
        soon("it queues", async || at.psql(queued) == "1").await;
        let reserved = tokio::spawn(async move { engine.reserve(1).await });
        soon("it queues", async || at.psql(queued) == "2").await;
        at.psql(&format!("SELECT pg_cancel_backend(pid) {waits}"));
        assert_eq!(kind(commit.await.unwrap()), ErrorKind::OutcomeUnknown);
        lock.await.unwrap();
        reserved.await.unwrap().unwrap_or_else(|error| panic!("{}", all_of(&error)));
    });
}

/// A server that does not answer any more has not got the COMMIT, so nothing was written.
#[test]
fn a_server_that_is_silent_before_the_commit_has_written_nothing() {
    block_on(async {
        let Some(server) = Server::builder().start_or_skip() else { return };
        let proxy = Proxy::start(server.port()).unwrap();
        let at = Place::on(proxy.url(&server.url()));
        let (statement, connect) = (Duration::from_secs(2), Duration::from_millis(500));
        let builder = at.builder().statement_timeout(statement).connect_timeout(connect);
        let engine = builder.connect(&at.url).await.unwrap();
        place(&EventStore::new(engine.clone()), "first").await.unwrap();
        let mut side = side(&server.url()).await;
        let lock = side.transaction().await.unwrap();
        lock.batch_execute(&format!("SELECT FROM {}.log_end FOR UPDATE", at.schema)).await.unwrap();
        let commit = tokio::spawn(async move { place_with(&engine, "first", own("SELECT 1")).await });
        let queued = "SELECT count(*) FROM pg_locks WHERE NOT granted";
        soon("it queues", async || server.psql("postgres", queued).unwrap() == "1").await;
        proxy.set_delay(Duration::from_secs(3_600));
        assert_eq!(kind(commit.await.unwrap()), ErrorKind::Unavailable);
    });
}

#[test]
fn a_session_that_lost_what_was_prepared_in_it_is_given_up() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let pool = Pool::builder(Manager::new(at.url.parse().unwrap(), NoTls)).max_size(3).build().unwrap();
        let engine = at.builder().with_pool(pool.clone()).await.unwrap();
        let store = EventStore::new(engine.clone());
        // As a pooler does, on every connection, after each has prepared its statements.
        let lose = async |text: &str| {
            for _ in 0..2 {
                place(&store, "first").await.unwrap();
                let all = [pool.get().await.unwrap(), pool.get().await.unwrap(), pool.get().await.unwrap()];
                for client in &all {
                    client.batch_execute(text).await.unwrap();
                }
            }
        };
        for text in ["DEALLOCATE ALL", "DISCARD ALL"] {
            lose(text).await;
            place(&store, "first").await.unwrap_or_else(|error| panic!("{}", all_of(&error)));
            lose(text).await;
            store.load::<Order>("first").await.unwrap_or_else(|error| panic!("{}", all_of(&error)));
            lose(text).await;
            engine.reserve(1).await.unwrap_or_else(|error| panic!("{}", all_of(&error)));
        }
        let own = place_with(&engine, "first", own("DEALLOCATE ALL")).await;
        assert_eq!(
            own.map_or_else(|error| error.kind().clone(), |_| ErrorKind::Unavailable),
            ErrorKind::Unavailable
        );
        place(&store, "first").await.unwrap();
    });
}

/// The error "cached plan must not change result type".
#[test]
fn a_session_from_before_a_table_was_changed_is_given_up() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let (engine, store) = two_connections(&at, "changed").await;
        for _ in 0..4 {
            store.load::<Order>("first").await.unwrap();
        }
        at.psql("DROP VIEW @event_log; ALTER TABLE @events ALTER COLUMN reference TYPE varchar");
        let order = store.load::<Order>("first").await;
        assert_eq!(order.unwrap_or_else(|error| panic!("{}", all_of(&error))).events, 1);
        // SQL of the user runs once, so the user must repeat it.
        // One connection is held, so that all calls share the other one.
        let _held = engine.pool().get().await.unwrap();
        for _ in 0..4 {
            place_with(&engine, "first", own("SELECT 1")).await.unwrap();
        }
        at.psql("ALTER TABLE @commands ALTER COLUMN receipt TYPE varchar");
        assert_eq!(kind(place_with(&engine, "first", own("SELECT 1")).await), ErrorKind::Unavailable);
        place_with(&engine, "first", own("SELECT 1")).await.unwrap();
    });
}

/// The error is not "concurrent commits kept conflicting with this one".
#[test]
fn a_key_of_a_type_that_another_process_registered_is_taken() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engines = [at.engine().await, at.engine().await];
        place(&EventStore::new(at.engine().await), "first").await.unwrap();
        for (way, engine) in engines.into_iter().enumerate() {
            let mut work = EventStore::new(engine.clone()).begin();
            let mut order = work.create_with_key::<Order>("first").await.unwrap();
            work.record(&mut order, OrderEvent::Placed).unwrap();
            let outcome = match way {
                0 => work.commit().await,
                _ => engine.commit_with(work, own("SELECT 1")).await,
            };
            let kind = kind(outcome);
            assert!(matches!(kind, ErrorKind::KeyTaken { .. }), "{kind:?}");
        }
    });
}

#[test]
fn nobody_waits_for_the_flights_of_many_others() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let settings = at.builder().statement_timeout(Duration::from_millis(500));
        let store = EventStore::new(settings.connect(&at.url).await.unwrap());
        let mut orders = Vec::new();
        for key in 0..6 {
            place(&store, &key.to_string()).await.unwrap();
            orders.push(store.load::<Order>(key.to_string()).await.unwrap());
        }
        let mut side = side(&at.url).await;
        let lock = side.transaction().await.unwrap();
        lock.batch_execute(&format!("SELECT FROM {}.log_end FOR UPDATE", at.schema)).await.unwrap();
        // Two of them are too large for one flight.
        let commits = orders.into_iter().map(|mut order| {
            let mut work = store.begin();
            work.record_all(&mut order, (0..6_000).map(|_| OrderEvent::Placed)).unwrap();
            tokio::spawn(async move {
                let began = Instant::now();
                (work.commit().await, began.elapsed())
            })
        });
        for commit in commits.collect::<Vec<_>>() {
            let (outcome, took) = commit.await.unwrap();
            assert_eq!(kind(outcome), ErrorKind::Unavailable);
            assert!(took < Duration::from_millis(1_800), "{took:?}");
        }
        lock.rollback().await.unwrap();
        assert_eq!(store.head().await.unwrap().get(), 6);
        place(&store, "0").await.unwrap();
    });
}

/// If a commit updated the row of `log_end` and left its position, each reader of its index would have to pass the
/// old version as long as an older snapshot exists.
#[test]
fn a_commit_without_events_does_not_write_log_end() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let store = EventStore::new(at.engine().await);
        place(&store, "a").await.unwrap();
        let version = || at.psql("SELECT ctid, position, recorded_at, names FROM @log_end");
        let before = version();
        let mut order = store.load::<Order>("a").await.unwrap();
        for (nth, key) in ["b", "c"].into_iter().enumerate() {
            let mut work = store.begin();
            work.change_key(&mut order, key).unwrap();
            work.set_command(CommandId::new(format!("rename {nth}")).unwrap());
            assert_eq!(work.commit().await.unwrap().first, Position::ZERO);
        }
        let mut work = store.begin();
        work.create_with_key::<Order>("empty").await.unwrap();
        work.commit().await.unwrap();
        assert_eq!(version(), before);
        place(&store, "c").await.unwrap();
        assert_ne!(version(), before);
        assert_eq!(store.load::<Order>("c").await.unwrap().events, 2);
    });
}

/// A commit looks for the end of the log after the last one that its engine has seen. Loads count too: otherwise the
/// first commit after a quiet time would pass all versions that an old snapshot keeps.
#[test]
fn a_commit_after_a_load_passes_no_old_versions_of_log_end() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let (quiet, busy) = (at.engine().await, EventStore::new(at.engine().await));
        let quiet_store = EventStore::new(quiet.clone());
        place(&busy, "first").await.unwrap();
        let mut side = side(&at.url).await;
        let repeatable = side.build_transaction().isolation_level(IsolationLevel::RepeatableRead);
        let old = repeatable.start().await.unwrap();
        old.query("SELECT count(*) FROM pg_class", &[]).await.unwrap();
        for number in 0..500 {
            place(&busy, &number.to_string()).await.unwrap();
        }
        busy.close().await.unwrap();
        drop(busy);
        let passed = || {
            let sql = "SELECT sum(idx_tup_read) FROM pg_stat_all_indexes WHERE relid = '@log_end'::regclass";
            at.psql(sql).parse::<u64>().unwrap()
        };
        // A session reports what it has read when it ends.
        let settled = async || {
            let mut seen = passed();
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_millis(200)).await;
                let now = passed();
                if std::mem::replace(&mut seen, now) == now {
                    break;
                }
            }
            seen
        };
        let before = settled().await;
        let mut order = quiet_store.load::<Order>("0").await.unwrap();
        let mut work = quiet_store.begin();
        work.record(&mut order, OrderEvent::Placed).unwrap();
        work.commit().await.unwrap();
        quiet.close().await.unwrap();
        soon("the sessions have ended", async || passed() > before).await;
        let passed = settled().await - before;
        old.rollback().await.unwrap();
        assert!(passed < 250, "{passed} versions were read");
    });
}

#[test]
fn type_names_that_are_registered_already_need_no_lock() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let settings = at.builder().statement_timeout(Duration::from_millis(500));
        let engine = settings.connect(&at.url).await.unwrap();
        place(&EventStore::new(engine.clone()), "a").await.unwrap();
        let known = engine.types().await.unwrap();
        let mut side = side(&at.url).await;
        let lock = side.transaction().await.unwrap();
        lock.batch_execute(&format!("SELECT FROM {}.log_end FOR UPDATE", at.schema)).await.unwrap();
        engine.warmup(&known).await.unwrap();
        let mut more = known.clone();
        more[0].event_types.push(EventType::new("Unheard").unwrap());
        assert_eq!(kind(engine.warmup(&more).await), ErrorKind::Unavailable);
        lock.rollback().await.unwrap();
        engine.warmup(&more).await.unwrap();
        assert!(engine.types().await.unwrap()[0].event_types.len() > known[0].event_types.len());
    });
}

/// As in tests that share an engine and have a runtime each.
#[test]
fn a_commit_that_waits_while_the_runtime_of_its_leader_ends_is_carried_out() {
    let Some(at) = Place::fresh() else { return };
    let (store, mut orders) = block_on(async {
        let store = EventStore::new(at.engine().await);
        let mut orders = Vec::new();
        for key in ["first", "second"] {
            place(&store, key).await.unwrap();
            orders.push(store.load::<Order>(key).await.unwrap());
        }
        (store, orders)
    });
    let commit = |mut order| {
        let mut work = store.begin();
        work.record(&mut order, OrderEvent::Placed).unwrap();
        work.commit()
    };
    let other = Runtime::new().unwrap();
    block_on(async {
        let mut side = side(&at.url).await;
        let lock = side.transaction().await.unwrap();
        lock.batch_execute(&format!("SELECT FROM {}.log_end FOR UPDATE", at.schema)).await.unwrap();
        other.spawn(commit(orders.remove(0)));
        let waits =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%@%'";
        let waits = waits.replace('@', &format!("\"{}\".log_end", at.schema));
        soon("the first flies", async || at.psql(&waits) == "1").await;
        let second = tokio::spawn(commit(orders.remove(0)));
        tokio::time::sleep(Duration::from_millis(100)).await;
        other.shutdown_background();
        tokio::time::sleep(Duration::from_millis(100)).await;
        lock.rollback().await.unwrap();
        let receipt = second.await.unwrap();
        assert!(receipt.unwrap_or_else(|error| panic!("{}", all_of(&error))).last.get() >= 3);
    });
}

fn event(metadata: &Arc<Metadata>) -> NewEvent {
    NewEvent {
        event_type: EventType::new("Noted").unwrap(),
        payload: Payload::new(b"1".to_vec()).unwrap(),
        time: Timestamp::now(),
        metadata: Arc::clone(metadata),
    }
}

async fn batch(engine: &PostgresEngine, events: Vec<NewEvent>, snapshot: usize) -> Batch {
    let (mut batch, aggregate_type) = (Batch::new(), AggregateType::new("big").unwrap());
    let id = engine.reserve(1).await.unwrap().next().unwrap();
    batch.create(NewAggregate { id, aggregate_type: aggregate_type.clone(), key: None }).unwrap();
    batch.append(Append { aggregate: id, aggregate_type, expected: Sequence::ZERO, events }).unwrap();
    if snapshot > 0 {
        let state = Payload::new(vec![b'x'; snapshot]).unwrap();
        batch.snapshot(id, Snapshot { sequence: Sequence::new(1).unwrap(), version: 1, state });
    }
    batch
}

/// More than the protocol takes at once. Prints the results.
#[test]
#[ignore = "takes more than a gibibyte of memory"]
fn many_big_snapshots_at_once_are_kept() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let (engine, plain) = (at.engine().await, Arc::new(Metadata::new()));
        engine.commit(batch(&engine, vec![event(&plain)], 0).await).await.unwrap();
        let mut side = side(&at.url).await;
        let lock = side.transaction().await.unwrap();
        lock.batch_execute(&format!("SELECT FROM {}.log_end FOR UPDATE", at.schema)).await.unwrap();
        let mut commits = Vec::new();
        for _ in 0..71 {
            let batch = batch(&engine, vec![event(&plain)], 16 * 1024 * 1024).await;
            let engine = engine.clone();
            commits.push(tokio::spawn(async move {
                let began = Instant::now();
                (engine.commit(batch).await, began.elapsed())
            }));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        lock.rollback().await.unwrap();
        let began = Instant::now();
        let (mut written, mut slowest) = (0, Duration::ZERO);
        for commit in commits {
            let (outcome, took) = commit.await.unwrap();
            outcome.unwrap_or_else(|error| panic!("{}", all_of(&error)));
            (written, slowest) = (written + 1, slowest.max(took));
        }
        println!(
            "{written} commits with a snapshot of 16 MiB: {:?}, the slowest {slowest:?}",
            began.elapsed()
        );
        assert_eq!(at.psql("SELECT count(*) FROM @snapshots"), "71");
    });
}

/// The headers have 1.3 GB as JSON.
#[test]
#[ignore = "writes more than a gigabyte"]
fn ten_thousand_events_may_share_the_largest_header() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engine = at.engine().await;
        let metadata = Arc::new(Metadata::new().with_header("h", "\"".repeat(65_000)).unwrap());
        let batch = batch(&engine, (0..10_000).map(|_| event(&metadata)).collect(), 0).await;
        let began = Instant::now();
        let receipt = engine.commit(batch).await.unwrap_or_else(|error| panic!("{}", all_of(&error)));
        println!("10,000 events that share a header of 65,000 bytes: {:?}", began.elapsed());
        assert_eq!(receipt.last, Position::new(10_000).unwrap());
        let lengths = at.psql("SELECT min(length(headers)), max(length(headers)) FROM @events");
        assert_eq!(lengths, "130008|130008");
    });
}

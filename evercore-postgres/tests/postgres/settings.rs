//! Settings and limits: durability, time-outs, wake-ups, closing, and the connections left on the server.

use std::future::Future;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use evercore_core::engine::{Append, Batch, NewAggregate, NewEvent, Payload};
use evercore_postgres::deadpool_postgres::{Manager, Pool};
use evercore_postgres::tokio_postgres::{self, Client, NoTls};
use evercore_postgres::{
    AggregateType, ErrorKind, EventStore, EventType, LogQuery, Metadata, PageLimit, Position, PostgresEngine,
    Sequence, StorageEngine, SynchronousCommit, Timestamp,
};
use evercore_testkit::postgres::Server;

use crate::common::{Place, block_on};
use crate::orders::{
    Order, OrderEvent, all_of, kind, own, place, place_with, positions, soon, up_to, with_database,
};

/// A connection outside of the engine.
async fn side(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The URL with an application name, by which the server lists the connections of one engine.
fn named(at: &Place, name: &str) -> String {
    crate::orders::named(&at.url, &format!("{}_{name}", at.schema))
}

fn connections(at: &Place, name: &str) -> i64 {
    let sql =
        format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{}_{name}'", at.schema);
    at.psql(&sql).parse().unwrap()
}

/// One engine for each kind of connection.
async fn all_ways(
    at: &Place,
    url: &str,
    set: impl Fn(evercore_postgres::Builder) -> evercore_postgres::Builder,
) -> [PostgresEngine; 3] {
    let pool = Pool::builder(Manager::new(url.parse().unwrap(), NoTls)).max_size(4).build().unwrap();
    [
        set(at.builder()).connect(url).await.unwrap(),
        set(at.builder()).pooler(true).connect(url).await.unwrap(),
        set(at.builder()).with_pool(pool).await.unwrap(),
    ]
}

#[test]
fn every_commit_is_as_durable_as_was_asked_for_whatever_the_server_does_by_default() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        drop(at.engine().await);
        at.psql(
            "CREATE TABLE @seen (setting text);
             CREATE FUNCTION @see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 INSERT INTO @seen VALUES (current_setting('synchronous_commit') || ' ' || current_setting('transaction_isolation'));
                 RETURN NULL; END $$;
             CREATE TRIGGER see AFTER INSERT ON @events FOR EACH ROW EXECUTE FUNCTION @see()",
        );
        // The settings that the URL asks for.
        let worse =
            "options=-c%20synchronous_commit%3Doff%20-c%20default_transaction_isolation%3Dserializable";
        let url = format!("{}&{worse}", named(&at, "durable"));
        for (level, name) in [
            (SynchronousCommit::On, "on"),
            (SynchronousCommit::Local, "local"),
            (SynchronousCommit::RemoteWrite, "remote_write"),
            (SynchronousCommit::RemoteApply, "remote_apply"),
            (SynchronousCommit::Off, "off"),
        ] {
            for engine in all_ways(&at, &url, |builder| builder.synchronous_commit(level)).await {
                let store = EventStore::new(engine.clone());
                place(&store, "plain").await.unwrap();
                place_with(&engine, "beside", own("SELECT 1")).await.unwrap();
                place_with(&engine, "beside", own("SET LOCAL synchronous_commit = off")).await.unwrap();
                let mut keyed = store.begin();
                let mut order = keyed.load::<Order>("plain").await.unwrap();
                keyed.record(&mut order, crate::orders::noted("under the lock")).unwrap();
                keyed.guard(&store.load::<Order>("beside").await.unwrap()).unwrap();
                keyed.commit().await.unwrap();
            }
            let seen = at.psql("SELECT setting, count(*) FROM @seen GROUP BY 1; TRUNCATE @seen");
            assert_eq!(seen, format!("{name} read committed|12"));
        }
    });
}

#[test]
fn a_commit_that_others_hold_up_ends_in_time_and_works_afterwards() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engines =
            all_ways(&at, &at.url, |builder| builder.statement_timeout(Duration::from_millis(400))).await;
        let mut side = side(&at.url).await;
        for engine in &engines {
            let store = EventStore::new(engine.clone());
            let before = place(&store, "first").await.unwrap().last;
            let lock = side.transaction().await.unwrap();
            let log_end = format!("SELECT position FROM {}.log_end FOR UPDATE", at.schema);
            lock.batch_execute(&log_end).await.unwrap();
            let began = Instant::now();
            let mut outcomes = Vec::new();
            let commits = ["first", "second", "third"].map(|key| {
                let mut work = store.begin();
                tokio::spawn(async move {
                    let mut order = work.load_or_create::<Order>(key).await?;
                    work.record(&mut order, OrderEvent::Placed)?;
                    work.commit().await
                })
            });
            let beside = tokio::spawn({
                let engine = engine.clone();
                async move { place_with(&engine, "fourth", own("SELECT 1")).await }
            });
            for commit in commits.into_iter().chain([beside]) {
                outcomes.push(commit.await.unwrap());
            }
            let took = began.elapsed();
            for outcome in outcomes {
                let error = outcome.unwrap_err();
                assert_eq!(error.kind(), &ErrorKind::Unavailable, "{}", all_of(&error));
            }
            assert!((Duration::from_millis(400)..Duration::from_secs(3)).contains(&took), "{took:?}");
            // Reads are not held up.
            assert_eq!(
                store.load::<Order>("first").await.unwrap().sequence(),
                Sequence::new(before.get()).unwrap()
            );
            assert_eq!(store.head().await.unwrap(), before);
            lock.rollback().await.unwrap();
            assert_eq!(place(&store, "first").await.unwrap().last, before.plus(1));
            at.psql("DELETE FROM @events; DELETE FROM @aggregates; UPDATE @log_end SET position = 0");
        }
    });
}

#[test]
fn the_commits_of_another_engine_are_heard_of_at_once() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let took = heard_after(&at.engine().await, &at.engine().await).await;
        assert!(took[20] < Duration::from_millis(200), "{:?}", took[20]);
    });
}

/// A reader may see a commit before the committing engine has announced it.
#[test]
fn a_commit_is_told_of_though_somebody_has_seen_it_already() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let writes = at.engine().await;
        let look = |engine: PostgresEngine| async move { while engine.head().await.is_ok() {} };
        let looks = [0, 1].map(|_| tokio::spawn(look(writes.clone())));
        let took = heard_after(&at.engine().await, &writes).await;
        looks.iter().for_each(|look| look.abort());
        assert!(took[36] < Duration::from_millis(500), "{took:?}");
    });
}

/// The times until one engine noticed each of forty commits of another, the shortest first.
async fn heard_after(reads: &PostgresEngine, writes: &PostgresEngine) -> Vec<Duration> {
    let (writes, mut took) = (EventStore::new(writes.clone()), Vec::new());
    for round in 0..40 {
        let engine = reads.clone();
        let after = Position::new(round).unwrap();
        let waiting = tokio::spawn(async move {
            let head = engine.wait(after, Duration::from_secs(30)).await.unwrap();
            (head, Instant::now())
        });
        let pause = if round == 0 { 300 } else { 15 };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        place(&writes, "first").await.unwrap();
        let committed = Instant::now();
        let (head, woken) = waiting.await.unwrap();
        assert_eq!(head.get(), round + 1);
        took.push(woken.saturating_duration_since(committed));
    }
    took.sort();
    println!("woken after {:?} (p50), {:?} (p90), {:?} at most", took[20], took[36], took[39]);
    took
}

#[test]
fn nothing_is_missed_when_the_connection_that_listens_is_lost_again_and_again() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let reads = at.builder().connect(&named(&at, "listens")).await.unwrap();
        let writes = EventStore::new(at.engine().await);
        let tail = tokio::spawn(async move {
            let (mut from, mut seen, mut slowest) = (Position::ZERO, Vec::new(), Duration::ZERO);
            while seen.len() < 60 {
                let began = Instant::now();
                reads.wait(from, Duration::from_secs(10)).await.unwrap();
                slowest = slowest.max(began.elapsed());
                let page = reads.read_log(&LogQuery::after(from)).await.unwrap();
                seen.extend(page.events.iter().map(|event| event.position().get()));
                from = page.scanned;
            }
            (seen, slowest)
        });
        let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND application_name = '#'";
        let kill = kill.replace('#', &format!("{}_listens", at.schema));
        let mut killed = 0;
        for round in 0..60 {
            place(&writes, "first").await.unwrap();
            if round % 10 == 5 {
                tokio::time::sleep(Duration::from_millis(150)).await;
                killed += at.psql(&kill).parse::<i64>().unwrap();
            }
        }
        let (seen, slowest) = tail.await.unwrap();
        println!("{killed} connections were killed, the longest wait was {slowest:?}");
        assert!(killed > 0);
        assert_eq!(seen, up_to(60));
        assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    });
}

/// The postmaster is stopped: open connections work, and new ones neither succeed nor fail.
#[test]
fn who_cannot_listen_looks() {
    block_on(async {
        let Some(server) = Server::builder().start_or_skip() else { return };
        let at = Place::on(server.url());
        let (reads, writes) = (at.engine().await, EventStore::new(at.engine().await));
        place(&writes, "first").await.unwrap();
        assert_eq!(reads.head().await.unwrap().get(), 1);
        let file =
            server.psql("postgres", "SELECT split_part(pg_read_file('postmaster.pid'), chr(10), 1)").unwrap();
        let signal =
            |name: &str| assert!(Command::new("kill").args([name, &file]).status().unwrap().success());
        signal("-STOP");
        let after = Position::new(1).unwrap();
        // All waiters share the one open connection.
        let waiting = (0..16).map(|_| {
            let reads = reads.clone();
            tokio::spawn(async move { reads.wait(after, Duration::from_secs(20)).await })
        });
        let waiting: Vec<_> = waiting.collect();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let placed = place(&writes, "first").await;
        let all = async {
            let mut woken = Vec::new();
            for one in waiting {
                woken.push(one.await.unwrap());
            }
            woken
        };
        let woken = tokio::time::timeout(Duration::from_secs(7), all).await;
        signal("-CONT");
        placed.unwrap();
        for one in woken.expect("they were not woken") {
            assert_eq!(one.unwrap().get(), 2);
        }
    });
}

/// As in many tests: one engine for all, and a runtime for each, which ends right after a commit.
#[test]
fn an_engine_outlives_the_runtime_that_it_was_made_in() {
    let Some(at) = Place::fresh() else { return };
    let writes = new_runtime(|| async { at.engine().await });
    let store = EventStore::new(writes);
    for round in 0..4 {
        new_runtime(|| async {
            let reads = at.engine().await;
            let after = reads.head().await.unwrap();
            let waiting =
                tokio::spawn(async move { reads.wait(after, Duration::from_secs(20)).await.unwrap() });
            tokio::time::sleep(Duration::from_millis(100)).await;
            let began = Instant::now();
            place(&store, "first").await.unwrap();
            assert_eq!(waiting.await.unwrap().get(), 2 * round + 1);
            assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
        });
        new_runtime(|| async {
            store.wait(store.head().await.unwrap(), Duration::from_millis(20)).await.unwrap();
            place(&store, "first").await.unwrap()
        });
    }
}

/// A runtime with one thread, which has ended when this returns.
fn new_runtime<F: Future>(work: impl FnOnce() -> F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work())
}

#[test]
fn the_longest_time_outs_are_no_time_outs() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engines = all_ways(&at, &at.url, |builder| {
            let builder = builder.statement_timeout(Duration::MAX).sql_timeout(Duration::MAX);
            builder.connect_timeout(Duration::MAX).poll_interval(Duration::MAX)
        });
        for engine in engines.await {
            let store = EventStore::new(engine.clone());
            let head = place(&store, "first").await.unwrap().last;
            assert_eq!(store.wait(Position::ZERO, Duration::MAX).await.unwrap(), head);
            place_with(&engine, "first", own("SELECT 1")).await.unwrap();
        }
    });
}

#[test]
fn a_closed_engine_says_so_and_wakes_those_who_wait() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        for engine in all_ways(&at, &at.url, |builder| builder).await {
            let store = EventStore::new(engine.clone());
            place(&store, "first").await.unwrap();
            let head = store.head().await.unwrap();
            let waiting = [engine.clone(), engine.clone()].map(|engine| {
                tokio::spawn(
                    async move { (engine.wait(head, Duration::from_secs(60)).await, Instant::now()) },
                )
            });
            tokio::time::sleep(Duration::from_millis(50)).await;
            let closed = Instant::now();
            engine.close().await.unwrap();
            for waiting in waiting {
                let (outcome, woken) = waiting.await.unwrap();
                assert_eq!(kind(outcome), ErrorKind::Closed);
                assert!(woken - closed < Duration::from_millis(500));
            }
            let mut batch = Batch::new();
            batch.set_command(evercore_postgres::CommandId::new("x").unwrap(), None);
            for kind in [
                kind(engine.head().await),
                kind(engine.commit(batch).await),
                kind(engine.reserve(1).await),
                kind(engine.wait(Position::ZERO, Duration::ZERO).await),
                kind(engine.types().await),
                kind(store.load::<Order>("first").await),
                kind(store.read_log(&LogQuery::after(Position::ZERO)).await),
                kind(store.warmup::<Order>().await),
                kind(engine.commit_with(store.begin(), own("SELECT 1")).await),
            ] {
                assert_eq!(kind, ErrorKind::Closed);
            }
            engine.close().await.unwrap();
        }
    });
}

#[test]
fn a_pool_that_was_handed_in_stays_open() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let pool = Pool::builder(Manager::new(at.url.parse().unwrap(), NoTls)).max_size(3).build().unwrap();
        let engine = at.builder().with_pool(pool.clone()).await.unwrap();
        place(&EventStore::new(engine.clone()), "first").await.unwrap();
        engine.close().await.unwrap();
        let one: i32 = pool.get().await.unwrap().query_one("SELECT 1", &[]).await.unwrap().get(0);
        assert_eq!(one, 1);
        let again = at.builder().with_pool(pool.clone()).await.unwrap();
        assert_eq!(again.head().await.unwrap().get(), 1);
    });
}

#[test]
fn an_engine_that_was_dropped_or_closed_leaves_no_connection() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        for (name, closes) in [("dropped", false), ("closed", true)] {
            let engine = at.builder().connect(&named(&at, name)).await.unwrap();
            let store = EventStore::new(engine.clone());
            let writers = (0..16).map(|n| {
                let store = store.clone();
                tokio::spawn(async move { place(&store, &format!("order {n}")).await.unwrap() })
            });
            for writer in writers.collect::<Vec<_>>() {
                writer.await.unwrap();
            }
            let head = store.head().await.unwrap();
            store.wait(head, Duration::from_millis(200)).await.unwrap();
            let open = connections(&at, name);
            assert!((2..=11).contains(&open), "{open}: some of 8, two for commits, and one that listens");
            let began = Instant::now();
            if closes {
                engine.close().await.unwrap();
            }
            drop((engine, store));
            soon("all connections are gone", async || connections(&at, name) == 0).await;
            assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        }
    });
}

#[test]
fn a_connection_that_is_old_is_replaced() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        for (age, is_kept) in [(Duration::from_secs(60), true), (Duration::ZERO, false)] {
            let engine = at.builder().connection_age(age).connect(&at.url).await.unwrap();
            let session = async || {
                let client = engine.pool().get().await.unwrap();
                client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0)
            };
            let mut sessions = Vec::new();
            for _ in 0..5 {
                sessions.push(session().await);
            }
            assert_eq!(sessions[1..].contains(&sessions[0]), is_kept, "{sessions:?}");
        }
    });
}

#[test]
fn there_are_never_more_connections_than_asked_for_and_three() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engine = at.builder().pool_size(3).connect(&named(&at, "many")).await.unwrap();
        let store = EventStore::new(engine.clone());
        let work = (0..64).map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                for round in 0..5 {
                    place(&store, &format!("order {}", (n + round) % 20)).await.unwrap();
                    store.read_log(&LogQuery::after(Position::ZERO)).await.unwrap();
                }
            })
        });
        let work: Vec<_> = work.collect();
        let waiting = tokio::spawn({
            let store = store.clone();
            async move { store.wait(Position::new(320).unwrap(), Duration::from_millis(500)).await }
        });
        let mut most = 0;
        while work.iter().any(|task| !task.is_finished()) {
            most = most.max(connections(&at, "many"));
        }
        for task in work {
            task.await.unwrap();
        }
        waiting.await.unwrap().unwrap();
        println!("{most} connections at most");
        // Two connections for commits, and one that listens.
        assert!(most <= 6, "{most}");
        assert_eq!(positions(&engine).await, up_to(64 * 5));
    });
}

fn event(event_type: &str, payload: &[u8], time: Timestamp) -> NewEvent {
    NewEvent {
        event_type: EventType::new(event_type).unwrap(),
        payload: Payload::new(payload).unwrap(),
        time,
        metadata: Arc::new(Metadata::new()),
    }
}

/// Commits these events for one new aggregate.
async fn write(engine: &PostgresEngine, events: Vec<NewEvent>) {
    let id = engine.reserve(1).await.unwrap().next().unwrap();
    let aggregate_type = AggregateType::new("document").unwrap();
    let mut batch = Batch::new();
    batch.create(NewAggregate { id, aggregate_type: aggregate_type.clone(), key: None }).unwrap();
    batch.append(Append { aggregate: id, aggregate_type, expected: Sequence::ZERO, events }).unwrap();
    engine.commit(batch).await.unwrap();
}

#[test]
fn pages_limited_in_bytes_skip_nothing_and_stay_within_the_limit() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engine = at.engine().await;
        let payload = vec![b'x'; 20_000];
        for _ in 0..6 {
            write(&engine, (0..500).map(|_| event("Grew", &payload, Timestamp::now())).collect()).await;
        }
        // A commit that is over the limit by itself, followed by small ones.
        write(&engine, vec![event("Burst", &vec![b'y'; 1_500_000], Timestamp::now())]).await;
        write(&engine, (0..200).map(|_| event("Shrank", b"{}", Timestamp::now())).collect()).await;
        let reader = at.builder().connect(&named(&at, "pages")).await.unwrap();
        let sessions = "SELECT sum(sessions) FROM pg_stat_database";
        let before: i64 = at.psql(sessions).parse().unwrap();
        let limit = PageLimit::events(10_000).unwrap().and_bytes(1024 * 1024).unwrap();
        for backward in [false, true] {
            let first =
                if backward { LogQuery::before(Position::MAX) } else { LogQuery::after(Position::ZERO) };
            let mut query = first.with_limit(limit);
            let (mut seen, mut pages) = (Vec::new(), 0);
            loop {
                let page = reader.read_log(&query).await.unwrap();
                let bytes: usize = page.events.iter().map(|event| event.payload().len()).sum();
                assert!(bytes <= 1024 * 1024 || page.events.len() == 1, "{bytes} in {}", page.events.len());
                seen.extend(page.events.iter().map(|event| event.position().get()));
                pages += 1;
                if page.events.is_empty() || page.scanned == query.from {
                    break;
                }
                query.from = page.scanned;
                if !backward && page.scanned == page.head {
                    break;
                }
            }
            if backward {
                seen.reverse();
            }
            assert_eq!(seen, up_to(3_201));
            println!("{pages} pages");
            assert!(pages < 75, "{pages}");
        }
        let open = connections(&at, "pages");
        let opened = at.psql(sessions).parse::<i64>().unwrap() - before;
        println!("{open} connections open, {opened} opened by all tests meanwhile");
        assert!(open <= 2, "{open}");
    });
}

#[test]
fn the_log_is_readable_by_people() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engine = at.engine().await;
        let store = EventStore::new(engine.clone());
        let mut work = store.begin();
        let mut order = work.create_with_key::<Order>("größe").await.unwrap();
        let metadata = Metadata::new().with_reference("by mail").unwrap().with_header("tenant", "ü").unwrap();
        let metadata = metadata.with_correlation_id("c").unwrap().with_causation_id("d").unwrap();
        work.record_with(&mut order, crate::orders::noted("schön – 🦀"), &metadata).unwrap();
        work.commit().await.unwrap();
        let times = [
            Timestamp::MIN,
            Timestamp::MAX,
            Timestamp::from_micros(0).unwrap(),
            Timestamp::from_micros(-1).unwrap(),
        ];
        let payloads: [&[u8]; 8] =
            [b"plain", b"", b"\xff\xfe", b"a\0b", b"\xc3\xa4", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"];
        let events = payloads.iter().enumerate().map(|(n, payload)| event("Kept", payload, times[n % 4]));
        write(&engine, events.collect()).await;
        let first = at.psql(
            "SELECT aggregate_type, natural_key, sequence, event_type, payload, reference, correlation_id, causation_id, headers
             FROM @event_log WHERE position = 1",
        );
        assert_eq!(first, "order|größe|1|Noted|{\"note\":\"schön – 🦀\"}|by mail|c|d|{\"tenant\":\"ü\"}");
        let rest = at.psql("SELECT payload FROM @event_log WHERE position > 1 ORDER BY position");
        assert_eq!(rest, "plain\n\n\\xfffe\n\\x610062\nä\n\\xc3\n\\xeda080\n\\xf4908080");
        let shown =
            at.psql("SELECT event_time FROM @event_log WHERE position BETWEEN 2 AND 5 ORDER BY position");
        let expected = times.map(|time| time.to_string());
        println!("{shown}");
        assert_eq!(shown.lines().collect::<Vec<_>>(), expected);
        let recent = "SELECT count(*) FROM @event_log WHERE recorded_at::timestamptz BETWEEN now() - interval '1 minute' AND now()";
        assert_eq!(at.psql(recent), "9");
    });
}

/// The times of the view are exact, and equal to SQLite's.
#[test]
fn the_view_shows_times_to_the_microsecond() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engine = at.engine().await;
        write(&engine, vec![event("Kept", b"plain", Timestamp::now())]).await;
        for (micros, text) in [
            (0i64, "1970-01-01T00:00:00.000000Z"),
            (-1, "1969-12-31T23:59:59.999999Z"),
            (1_719_999_999_999_500, "2024-07-03T09:46:39.999500Z"),
            (-62_135_596_800_000_000, "0001-01-01T00:00:00.000000Z"),
            (253_402_300_799_999_999, "9999-12-31T23:59:59.999999Z"),
        ] {
            let set = format!("UPDATE @events SET event_time = {micros}, recorded_at = {micros}");
            let shown =
                at.psql(&format!("{set}; SELECT event_time, recorded_at FROM @event_log WHERE position = 1"));
            assert_eq!(shown, format!("{text}|{text}"), "{micros}");
        }
    });
}

#[test]
fn a_server_that_is_not_there_or_says_nothing_is_unavailable_in_time() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = silent.local_addr().unwrap().port();
        let builder = at.builder().connect_timeout(Duration::from_millis(300));
        for url in [
            format!("postgres://evercore@127.0.0.1:{port}/x"),
            "postgres://evercore@127.0.0.1:1/x".to_owned(),
        ] {
            let began = Instant::now();
            let error = builder.clone().connect(&url).await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Unavailable, "{}", all_of(&error));
            assert!(error.is_retryable());
            assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        }
        let nowhere = with_database(&at.url, "no_such_database");
        let error = builder.connect(&nowhere).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().contains("3D000")),
            (&ErrorKind::Backend, true),
            "{error}"
        );
    });
}

#[test]
fn readers_that_read_ahead_and_rest_hold_no_connection() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let settings = at.builder().pool_size(2).connect_timeout(Duration::from_secs(3));
        let engine = settings.connect(&at.url).await.unwrap();
        let store = EventStore::new(engine.clone());
        for number in 0..60 {
            place(&store, &format!("order {number}")).await.unwrap();
        }
        let mut resting = Vec::new();
        for _ in 0..6 {
            let limit = PageLimit::events(10).unwrap();
            let mut reader = store.log_reader(LogQuery::after(Position::ZERO).with_limit(limit));
            assert!(reader.next().await.unwrap().is_some());
            resting.push(reader);
        }
        // Each reader has begun to read the next pages and is not polled any more.
        place(&store, "another").await.unwrap();
        for mut reader in resting {
            while reader.next().await.unwrap().is_some() {}
            assert_eq!(reader.position(), store.head().await.unwrap());
        }
    });
}

/// A server that never answers, as a machine that hangs or a stopped postmaster.
fn silent() -> (std::net::TcpListener, u16) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[test]
fn a_host_that_hangs_has_its_share_of_the_time_and_then_comes_last() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let (_silent, port) = silent();
        let (before, rest) = at.url.split_once('@').unwrap();
        let url = format!("{before}@127.0.0.1:{port},{rest}");
        let began = Instant::now();
        let timeout = Duration::from_millis(1_000);
        let engine = at.builder().pool_size(4).connect_timeout(timeout).connect(&url).await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(1_500), "{:?}", began.elapsed());
        // Each of these may need its own connection.
        let began = Instant::now();
        let store = EventStore::new(engine.clone());
        let all = (0..4).map(|n| {
            let store = store.clone();
            tokio::spawn(async move { place(&store, &format!("order {n}")).await.unwrap() })
        });
        for one in all.collect::<Vec<_>>() {
            one.await.unwrap();
        }
        assert!(began.elapsed() < Duration::from_millis(450), "{:?}", began.elapsed());
        // As for psql, the URL gives the time-out of each host.
        let joint = if url.contains('?') { '&' } else { '?' };
        let began = Instant::now();
        at.builder().connect(&format!("{url}{joint}connect_timeout=1")).await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(1_700), "{:?}", began.elapsed());
        let error = at
            .builder()
            .connect_timeout(Duration::from_millis(200))
            .connect(&format!("postgres://evercore@127.0.0.1:{port}/x"))
            .await
            .unwrap_err();
        assert!(all_of(&error).contains(&format!("127.0.0.1:{port}")), "{}", all_of(&error));
    });
}

/// Waiters must not log in again and again at a server that refuses the login.
#[test]
fn a_refused_login_is_not_tried_again_by_everybody_who_waits() {
    block_on(async {
        let Some(server) = Server::builder().start_or_skip() else { return };
        server.psql("postgres", "CREATE ROLE app LOGIN SUPERUSER PASSWORD 'old'").unwrap();
        let file = server.psql("postgres", "SHOW hba_file").unwrap();
        let rest = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, "host all app all scram-sha-256\n".to_owned() + &rest).unwrap();
        server.psql("postgres", "SELECT pg_reload_conf()").unwrap();
        let url = server.url().replace("//evercore@", "//app:old@");
        let missing = server.url().replace("//evercore@", "//app@");
        soon("the file was read again", async || PostgresEngine::connect(&missing).await.is_err()).await;
        let error = PostgresEngine::connect(&missing).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Invalid, "{}", all_of(&error));
        assert!(error.to_string().contains("password"), "{error}");

        let engine = PostgresEngine::connect(&url).await.unwrap();
        server.psql("postgres", "ALTER ROLE app PASSWORD 'new'").unwrap();
        let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'app'";
        server.psql("postgres", end).unwrap();
        let store = EventStore::new(engine);
        let refusals = || server.log().matches("password authentication failed").count();
        let before = refusals();
        let all = (0..30).map(|n| {
            let store = store.clone();
            tokio::spawn(async move { place(&store, &format!("order {n}")).await.unwrap_err() })
        });
        for one in all.collect::<Vec<_>>() {
            let error = one.await.unwrap();
            assert!(error.to_string().contains("28P01") || may_pass(&error), "{}", all_of(&error));
        }
        for n in 0..10 {
            assert!(place(&store, &format!("order {n}")).await.is_err());
        }
        let tried = refusals() - before;
        println!("{tried} logins");
        assert!((1..=9).contains(&tried), "{tried} logins");
        server.psql("postgres", "ALTER ROLE app PASSWORD 'old'").unwrap();
        soon("it is let in again", async || place(&store, "at last").await.is_ok()).await;
    });
}

/// The number of sessions that have ended.
fn may_pass(error: &evercore_postgres::Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::OutcomeUnknown)
}

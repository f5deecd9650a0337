//! Projections under faults: connections end, transactions deadlock, callers go away. And through a pooler.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use evercore_core::engine::{Advance, Outcome, ParkedChange, Sink, Step, SubscriptionStorage};
use evercore_postgres::{Cursor, ErrorKind, EventStore, StorageEngine};
use evercore_testkit::poll_at_most;
use evercore_testkit::postgres::{Cut, PgBouncer, Proxy, Server, Trigger};

use crate::common::{Place, block_on};
use crate::fixture::*;
use crate::orders::{all_of, kind, named, own, place, place_with, positions, skipped, soon, up_to};

/// Each holds a row that the other one needs.
#[test]
fn a_deadlock_of_two_projections_is_no_failure_of_a_handler() {
    block_on(async {
        for (place, engine) in all(|builder| builder).await {
            let table = table(&place);
            place.psql(
                "CREATE TABLE @rows (id INT PRIMARY KEY, n INT); INSERT INTO @rows VALUES (1, 0), (2, 0)",
            );
            fill(&engine, 3).await;
            let mut delivering = Vec::new();
            for (name, first) in [("one", 1), ("two", 2)] {
                let (_, cursor) = begin(&engine, name).await;
                let step = next(&engine, &cursor, 9).await.unwrap();
                let (table, rows) = (table.clone(), format!("{}.rows", place.schema));
                let sink = engine.projection(move |sql, delivery| {
                    let (table, rows) = (table.clone(), rows.clone());
                    Box::pin(async move {
                        note(sql, &table, delivery.events()).await?;
                        for id in [first, 3 - first] {
                            let add =
                                format!("UPDATE {rows} SET n = n + 1 WHERE id = {id}; SELECT pg_sleep(0.2)");
                            sql.batch_execute(&add).await?;
                        }
                        Ok(())
                    })
                });
                delivering.push(tokio::spawn(async move { sink.deliver(&step.0, &step.1).await }));
            }
            for delivering in delivering {
                let outcome = delivering.await.unwrap();
                assert!(matches!(outcome, Outcome::Advanced(_)), "{outcome:?}");
            }
            assert_eq!(seen(&place), [1, 1, 2, 2, 3, 3]);
            assert_eq!(place.psql("SELECT sum(n) FROM @rows"), "4");
        }
    });
}

/// The server notices it while the handler runs or at the COMMIT. The handler returns the error as it is, or inside
/// its own error.
#[test]
fn what_the_server_undoes_is_no_failure_of_a_handler() {
    block_on(async {
        for (place, engine) in all(|builder| builder).await {
            let table = table(&place);
            fill(&engine, 3).await;
            let (id, cursor) = begin(&engine, "undone").await;
            let step = next(&engine, &cursor, 9).await.unwrap();
            let sink = engine.projection(move |sql, delivery| {
                let table = table.clone();
                Box::pin(async move {
                    let noted = note(sql, &table, delivery.events()).await;
                    noted.map_err(|source| std::io::Error::other(source).into())
                })
            });
            let undo = |code: &str, when: &str, times: i32| {
                place.psql(&format!(
                    "DROP TRIGGER IF EXISTS undo ON @seen; DROP SEQUENCE IF EXISTS @tries; CREATE SEQUENCE @tries;
                     CREATE OR REPLACE FUNCTION @undo() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                         IF nextval('@tries') <= {times} THEN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END IF;
                         RETURN NULL;
                     END $$;
                     CREATE CONSTRAINT TRIGGER undo AFTER INSERT ON @seen DEFERRABLE INITIALLY {when}
                         FOR EACH ROW EXECUTE FUNCTION @undo()"
                ))
            };
            for (code, when) in [("40001", "DEFERRED"), ("40P01", "DEFERRED"), ("40001", "IMMEDIATE")] {
                undo(code, when, 99);
                let hindered = deliver(&sink, &step).await;
                assert!(
                    matches!(hindered, Outcome::Hindered { is_too_slow: false, .. }),
                    "{code} {when}: {hindered:?}"
                );
                assert_eq!((find(&engine, &id).await, seen(&place)), (cursor.clone(), vec![]));
            }
            // The delivery is repeated.
            undo("40001", "DEFERRED", 2);
            let outcome = deliver(&sink, &step).await;
            assert!(matches!(outcome, Outcome::Advanced(_)), "{outcome:?}");
            assert_eq!(seen(&place), up_to(3));
        }
    });
}

#[test]
fn a_delivery_that_is_dropped_is_carried_through_whole_or_not_at_all() {
    block_on(async {
        for (place, engine) in all(|builder| builder).await {
            let table = table(&place);
            fill(&engine, 60).await;
            let (id, mut cursor) = begin(&engine, "dropped").await;
            let sink = projection(&engine, &table, "SELECT 1");
            let mut dropped = 0;
            for round in 0.. {
                let Some((delivery, advance)) = next(&engine, &cursor, 2).await else { break };
                let ended = match round % 3 {
                    0 => poll_at_most(round / 3 % 3, sink.deliver(&delivery, &advance)).await,
                    1 => {
                        let time = Duration::from_micros(fastrand::u64(0..6_000));
                        tokio::time::timeout(time, sink.deliver(&delivery, &advance)).await.ok()
                    }
                    _ => Some(sink.deliver(&delivery, &advance).await),
                };
                dropped += usize::from(ended.is_none());
                // A step of the cursor may be dropped, too.
                drop(poll_at_most(1, engine.step(&id, &Step::renew(lease_of(&cursor), TIME))).await);
                cursor.position = find(&engine, &id).await.position;
            }
            assert!(dropped > 5, "{dropped}");
            let done = async || find(&engine, &id).await.position == at(60) && seen(&place) == up_to(60);
            soon("all that was begun has ended", done).await;
            let open = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'
                        AND query LIKE '%#%'";
            let open = open.replace('#', &place.schema);
            soon("nothing is left open", async || place.psql(&open) == "0").await;
        }
    });
}

/// Ends the connections of this name at random moments.
struct Killer {
    is_done: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<usize>,
}

impl Killer {
    async fn start(place: &Place, name: &str, pause: u64) -> Self {
        let is_done = Arc::new(AtomicBool::new(false));
        let (done, side) = (Arc::clone(&is_done), client(&place.url).await);
        let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '#'";
        let kill = kill.replace('#', name);
        let task = tokio::spawn(async move {
            let mut killed = 0;
            while !done.load(Ordering::Acquire) {
                tokio::time::sleep(Duration::from_millis(fastrand::u64(0..pause))).await;
                killed += side.query(&kill, &[]).await.unwrap().len();
            }
            killed
        });
        Self { is_done, task }
    }

    /// How many connections it has ended.
    async fn stop(self) -> usize {
        self.is_done.store(true, Ordering::Release);
        self.task.await.unwrap()
    }
}

#[test]
fn a_projection_whose_connections_are_killed_at_random_equals_the_log() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let writing = place.engine().await;
        let table = table(&place);
        fill(&writing, 600).await;
        let url = named(&place.url, "victim");
        let engine = place.builder().connect(&url).await.unwrap();
        let (id, mut cursor) = begin(&engine, "killed").await;
        let sink = projection(&engine, &table, "SELECT 1");
        let killer = Killer::start(&place, "victim", 30).await;
        let (mut deliveries, mut moved, mut refused) = (0, 0, 0);
        // Reads use other connections, which are not killed.
        while let Some((delivery, advance)) = next(&writing, &cursor, 3).await {
            deliveries += 1;
            match sink.deliver(&delivery, &advance).await {
                Outcome::Advanced(_) => moved += 1,
                Outcome::Refused(error) => {
                    let known = [ErrorKind::Unavailable, ErrorKind::OutcomeUnknown, ErrorKind::LeaseLost];
                    assert!(known.contains(error.kind()), "{}", all_of(&error));
                    refused += 1;
                }
                other => panic!("{other:?}"),
            }
            cursor.position = find(&writing, &id).await.position;
        }
        let killed = killer.stop().await;
        println!("{deliveries} deliveries, {moved} moved, {refused} refused, {killed} connections killed");
        assert!(refused > 5 && killed > 20, "{refused} {killed}");
        assert_eq!((find(&writing, &id).await.position, seen(&place)), (at(600), up_to(600)));
    });
}

/// Before the COMMIT the error says that nothing was written. At the COMMIT it says that the outcome is not known.
#[test]
fn a_cut_connection_says_what_is_known() {
    block_on(async {
        let Some(server) = Server::builder().start_or_skip() else { return };
        let proxy = Proxy::start(server.port()).unwrap();
        let (place, mut direct) = (Place::on(proxy.url(&server.url())), Place::on(server.url()));
        direct.schema = place.schema.clone();
        let (engine, reading) = (place.engine().await, direct.engine().await);
        let table = table(&direct);
        fill(&reading, 20).await;
        let (id, mut cursor) = begin(&engine, "cut").await;
        let sink = projection(&engine, &table, "SELECT 1");
        for (cut, message) in [
            (Cut::Before, "ISOLATION LEVEL"),
            (Cut::AfterReply, "ISOLATION LEVEL"),
            (Cut::Before, "COMMIT\0"),
            (Cut::AfterReply, "COMMIT\0"),
        ] {
            let is_late = message == "COMMIT\0";
            let is_written = is_late && cut == Cut::AfterReply;
            let expected = if is_late { ErrorKind::OutcomeUnknown } else { ErrorKind::Unavailable };
            let moved = async |from: &Cursor, events: usize| {
                let to = if is_written { from.position.plus(events) } else { from.position };
                soon("the server has ended it", async || find(&reading, &id).await.position == to).await;
                find(&reading, &id).await
            };
            proxy.cut_next(cut, Trigger::request_with(message));
            let to = cursor.position.plus(1);
            // With parked events, so it is not the move in one statement.
            let advance = Advance::new(lease_of(&cursor), cursor.position, to, TIME);
            let step = Step::Advance(advance.with_parked(vec![ParkedChange::RemoveAll]));
            assert_eq!(kind(engine.step(&id, &step).await), expected, "{cut:?} {message}");
            cursor = moved(&cursor, 1).await;
            proxy.cut_next(cut, Trigger::request_with(message));
            let next = next(&reading, &cursor, 2).await.unwrap();
            assert_eq!(refused(deliver(&sink, &next).await), expected, "{cut:?} {message}");
            cursor = moved(&cursor, 2).await;
        }
        assert_eq!(seen(&direct), [2, 3]);
        // The move in one statement: if it is cut off, the outcome is not known.
        for cut in [Cut::Before, Cut::AfterReply] {
            let before = find(&reading, &id).await;
            let to = before.position.plus(1);
            let step = Step::Advance(Advance::new(lease_of(&before), before.position, to, TIME));
            proxy.cut_next(cut, Trigger::request_with("cut"));
            assert_eq!(kind(engine.step(&id, &step).await), ErrorKind::OutcomeUnknown, "{cut:?}");
            let expected = if cut == Cut::AfterReply { to } else { before.position };
            soon("the server has ended it", async || find(&reading, &id).await.position == expected).await;
        }
    });
}

#[test]
fn everything_works_through_a_pooler() {
    block_on(async {
        let Some(server) = Server::builder().start_or_skip() else { return };
        let Some(pooler) =
            PgBouncer::start_with(&server, "transaction", &[("default_pool_size", "3")]).unwrap()
        else {
            return skipped("PgBouncer is not there");
        };
        let place = Place::on(pooler.url());
        let plain = place.builder().pooler(true).connect(&place.url).await.unwrap();
        let table = table(&place);
        place.psql("CREATE TABLE @inline (position BIGINT NOT NULL)");
        let with = place.builder().pooler(true);
        let with =
            with.inline_projection("inline", 1, noting(&format!("{}.inline", place.schema), Duration::ZERO));
        let engine = with.connect(&place.url).await.unwrap();
        let mut projecting = Vec::new();
        for name in ["one", "two"] {
            let (id, mut cursor) = begin(&plain, name).await;
            let (engine, sink) = (plain.clone(), projection(&plain, &table, "SELECT 1"));
            projecting.push(tokio::spawn(async move {
                while cursor.position < at(120) {
                    if let Some((delivery, advance)) = next(&engine, &cursor, 7).await {
                        let Outcome::Advanced(moved) = sink.deliver(&delivery, &advance).await else {
                            panic!("not moved")
                        };
                        cursor = moved;
                    }
                    let step = Step::renew(lease_of(&cursor), TIME);
                    cursor = engine.step(&id, &step).await.unwrap().unwrap();
                }
            }));
        }
        let writers = (0..4).map(|writer| {
            let store = EventStore::new(if writer % 2 == 0 { engine.clone() } else { plain.clone() });
            tokio::spawn(async move {
                for _ in 0..30 {
                    self::place(&store, &format!("order {writer}")).await.unwrap();
                }
            })
        });
        for task in writers.collect::<Vec<_>>().into_iter().chain(projecting) {
            task.await.unwrap();
        }
        let twice: Vec<i64> = up_to(120).into_iter().flat_map(|position| [position, position]).collect();
        assert_eq!(seen(&place), twice);
        self::place(&EventStore::new(engine), "last").await.unwrap();
        let inline = place.psql("SELECT count(*) || ' ' || count(DISTINCT position) FROM @inline");
        assert_eq!(inline, "121 121");
        let open = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
        assert_eq!(server.psql("postgres", open).unwrap(), "0");
    });
}

#[test]
fn an_inline_projection_whose_connections_are_killed_at_random_equals_the_log() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let reading = place.engine().await;
        let table = table(&place);
        let with = place.builder().inline_projection("inline", 1, noting(&table, Duration::ZERO));
        let engine = with.connect(&named(&place.url, "inline%20victim")).await.unwrap();
        let killer = Killer::start(&place, "inline victim", 150).await;
        let writers = (0..3).map(|writer| {
            let store = EventStore::new(engine.clone());
            tokio::spawn(async move {
                let mut acknowledged = 0;
                while acknowledged < 60 {
                    match self::place(&store, &format!("order {writer}")).await {
                        Ok(_) => acknowledged += 1,
                        Err(error) => {
                            let known = [ErrorKind::Unavailable, ErrorKind::OutcomeUnknown];
                            assert!(known.contains(error.kind()), "{}", all_of(&error));
                        }
                    }
                }
            })
        });
        for writer in writers.collect::<Vec<_>>() {
            writer.await.unwrap();
        }
        let killed = killer.stop().await;
        let done = async || seen(&place).len() == positions(&reading).await.len();
        soon("what was begun has ended", done).await;
        let head = reading.head().await.unwrap().get();
        println!("{head} events, {killed} connections killed");
        assert!(head >= 180 && killed > 5, "{head} {killed}");
        assert_eq!((positions(&reading).await, seen(&place)), (up_to(head), up_to(head)));
    });
}

/// The SQL of a commit holds the row and needs the log. The inline projection holds the log and needs the row.
#[test]
fn a_deadlock_with_sql_beside_a_commit_passes() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        drop(place.engine().await);
        place.psql("CREATE TABLE @total (events BIGINT NOT NULL); INSERT INTO @total VALUES (0)");
        let add = format!("UPDATE {}.total SET events = events + $1", place.schema);
        let adding = handler(move |sql, events| {
            let add = add.clone();
            Box::pin(async move {
                sql.execute(&add, &[&i64::try_from(events.len())?]).await?;
                Ok(())
            })
        });
        let engine = place.builder().inline_projection("total", 1, adding).connect(&place.url).await.unwrap();
        let beside =
            own(format!("UPDATE {}.total SET events = events + 1000; SELECT pg_sleep(0.5)", place.schema));
        let slow = tokio::spawn({
            let engine = engine.clone();
            async move { place_with(&engine, "beside", beside).await }
        });
        tokio::time::sleep(Duration::from_millis(150)).await;
        let plain = self::place(&EventStore::new(engine.clone()), "plain").await;
        let mut total = 0;
        for (outcome, adds) in [(slow.await.unwrap(), 1001), (plain, 1)] {
            match outcome {
                Ok(_) => total += adds,
                Err(error) => assert_eq!(error.kind(), &ErrorKind::Unavailable, "{}", all_of(&error)),
            }
        }
        assert!(total > 0);
        assert_eq!(place.psql("SELECT events FROM @total"), total.to_string());
    });
}

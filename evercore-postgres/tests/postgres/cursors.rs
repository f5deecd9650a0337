//! Cursors are claimed, moved and parked, by the clock of the server.

use std::time::{Duration, Instant};

use evercore_core::engine::{Advance, Mark, Outcome, ParkedChange, Sink, Step, SubscriptionStorage};
use evercore_postgres::deadpool_postgres::{Manager, Pool};
use evercore_postgres::tokio_postgres::NoTls;
use evercore_postgres::{
    CursorStatus, ErrorKind, EventStore, Lease, Position, PostgresEngine, StorageEngine, Timestamp,
};
use evercore_testkit::poll_at_most;
use evercore_testkit::postgres::Server;

use crate::common::{Place, block_on};
use crate::fixture::*;
use crate::orders::{all_of, kind, up_to};

#[test]
fn a_cursor_is_made_claimed_moved_and_let_go() {
    block_on(async {
        for (place, engine) in all(|builder| builder).await {
            let id = id("walk");
            assert_eq!(kind(engine.step(&id, &Step::claim(owner("me"), TIME)).await), ErrorKind::NotFound);
            fill(&engine, 5).await;
            let made = declare(&engine, &id).await;
            assert_eq!((made.epoch, made.owner.clone(), made.live_from), (0, None, Some(Position::ZERO)));
            let again = engine.step(&id, &Step::declare(1, at(9), None)).await.unwrap();
            assert_eq!(again.as_ref(), Some(&made), "one that is there stays as it is");
            assert_eq!(kind(engine.step(&id, &Step::declare(2, at(9), None)).await), ErrorKind::Invalid);
            let mine = claim(&engine, &id, "me").await;
            assert_eq!(mine.epoch, 1);
            assert_eq!(
                kind(engine.step(&id, &Step::claim(owner("you"), TIME)).await),
                ErrorKind::AlreadyOwned
            );
            let mut advance = Advance::new(lease_of(&mine), Position::ZERO, at(5), TIME);
            advance.parked = [2, 3, 4].map(|position| ParkedChange::Keep(parked(position, 1))).to_vec();
            advance.parked.extend([
                ParkedChange::Keep(parked(3, 2)),
                ParkedChange::Remove(at(4)),
                ParkedChange::Due(Some(at(2))),
            ]);
            let moved = engine.step(&id, &Step::Advance(advance)).await.unwrap().unwrap();
            assert_eq!(moved.position, at(5));
            let mut due = parked(2, 1);
            due.is_due = true;
            assert_eq!(engine.parked(&id, Position::ZERO, 9).await.unwrap(), [due, parked(3, 2)]);
            assert_eq!(engine.parked(&id, at(2), 9).await.unwrap(), [parked(3, 2)]);
            assert_eq!(engine.parked(&id, Position::ZERO, 1).await.unwrap().len(), 1);
            assert_eq!(find(&engine, &id).await, moved);
            let released = engine.step(&id, &Step::release(lease_of(&moved))).await.unwrap().unwrap();
            assert_eq!((released.owner.clone(), released.epoch), (None, 1));
            engine.step(&id, &Step::release(lease_of(&moved))).await.unwrap();
            engine.step(&id, &Step::Pause).await.unwrap();
            assert_eq!(kind(engine.step(&id, &Step::claim(owner("me"), TIME)).await), ErrorKind::Paused);
            engine.step(&id, &Step::Resume).await.unwrap();
            assert_eq!(claim(&engine, &id, "you").await.epoch, 2);
            engine.step(&id, &Step::Retire).await.unwrap();
            assert_eq!(find(&engine, &id).await.status, CursorStatus::Retired);
            assert_eq!(kind(engine.step(&id, &Step::claim(owner("me"), TIME)).await), ErrorKind::Superseded);
            for name in ["b", "é", "a", "walk 2"] {
                declare(&engine, &self::id(name)).await;
            }
            let all = engine.cursors(None).await.unwrap();
            let names: Vec<_> = all.cursors.iter().map(|cursor| cursor.id.subscription.as_str()).collect();
            assert_eq!(names, ["a", "b", "walk", "walk 2", "é"]);
            assert_eq!(engine.step(&id, &Step::Remove).await.unwrap(), None);
            assert_eq!(place.psql("SELECT count(*) FROM @parked_events"), "0");
            let closed = engine.clone();
            engine.close().await.unwrap();
            assert_eq!(kind(closed.step(&id, &Step::Pause).await), ErrorKind::Closed);
            let reading = place.builder().read_from(&place.url).await.unwrap();
            assert_eq!(kind(reading.step(&self::id("a"), &Step::Pause).await), ErrorKind::ReadOnly);
            assert_eq!(reading.cursors(None).await.unwrap().cursors.len(), 4);
        }
    });
}

#[test]
fn an_old_lease_cannot_move_the_cursor() {
    block_on(async {
        for (_, engine) in all(|builder| builder).await {
            fill(&engine, 3).await;
            let (id, old) = begin(&engine, "fenced").await;
            // A second claim of the same owner is another lease.
            let new = claim(&engine, &id, "me").await;
            let park = |lease, from, to| {
                let mut advance = Advance::new(lease, from, to, TIME);
                advance.parked = vec![ParkedChange::Keep(parked(1, 1))];
                Step::Advance(advance)
            };
            for refused in [
                park(lease_of(&old), Position::ZERO, at(3)),
                park(Lease { owner: owner("you"), epoch: new.epoch }, Position::ZERO, at(3)),
                park(lease_of(&new), at(1), at(3)),
                Step::renew(lease_of(&old), TIME),
            ] {
                assert_eq!(kind(engine.step(&id, &refused).await), ErrorKind::LeaseLost);
                assert_eq!((find(&engine, &id).await, parked_of(&engine, &id).await), (new.clone(), vec![]));
            }
            engine.step(&id, &park(lease_of(&new), Position::ZERO, at(3))).await.unwrap();
            assert_eq!((find(&engine, &id).await.position, parked_of(&engine, &id).await), (at(3), vec![1]));
        }
    });
}

/// As after a failover to a standby with less of the log: events that were handled and are gone must not be
/// acknowledged, or their successors would be skipped.
#[test]
fn what_a_lost_tail_had_delivered_is_not_acknowledged() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let engine = place.engine().await;
        fill(&engine, 8).await;
        let mut owned = EventStore::new(engine.clone()).subscription("ahead").unwrap().claim().await.unwrap();
        let delivery = owned.next().await.unwrap();
        assert_eq!(delivery.end(), at(8));
        place.psql("DELETE FROM @events WHERE position > 5; UPDATE @log_end SET position = 5");
        let refused = owned.ack(&delivery).await.unwrap_err().kind().clone();
        assert!(matches!(refused, ErrorKind::TailLost { .. }), "{refused:?}");
        assert_eq!(find(&engine, &id("ahead")).await.position, Position::ZERO);
    });
}

/// The plain move is one statement. It must leave the cursor as the general step of core does.
#[test]
fn a_move_in_one_statement_is_the_step_of_all_engines() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let engine = place.engine().await;
        let id = id("moved");
        fill(&engine, 5).await;
        declare(&engine, &id).await;
        let mut random = fastrand::Rng::with_seed(1);
        let (mut moved, mut refused) = (0, 0);
        for round in 0..1_000 {
            let of = |random: &mut fastrand::Rng, from: &[&str]| from[random.usize(0..from.len())].to_owned();
            let mut set = vec![
                format!("position = {}, epoch = {}", random.i64(2..4), random.i64(1..3)),
                format!("owner = {}", of(&mut random, &["'me'", "'me'", "'you'", "NULL"])),
                format!(
                    "expires_at = {}",
                    of(&mut random, &["0", "-62135596800000000", "253402300799999999"])
                ),
                format!("wanted_by = {}", of(&mut random, &["'you'", "NULL"])),
                format!("wanted_until = {}", of(&mut random, &["0", "253402300799999999"])),
                format!("live_from = {}", of(&mut random, &["0", "3", "NULL"])),
                format!("status = {}", of(&mut random, &["0", "0", "1", "2"])),
                format!("parked_changes = {}", of(&mut random, &["0", "7"])),
                format!("lost_leases = {}", of(&mut random, &["0", "2"])),
            ];
            set.push(match of(&mut random, &["", "2", "3", "4", "5", "6"]).as_str() {
                "" => "failed_position = NULL, failed_attempts = NULL, failed_error = NULL".to_owned(),
                at => format!("failed_position = {at}, failed_attempts = 5, failed_error = 'no'"),
            });
            let client = engine.pool().get().await.unwrap();
            let sql = format!("UPDATE {}.cursors SET {}", place.schema, set.join(", "));
            client.batch_execute(&sql).await.unwrap();
            drop(client);
            let before = engine.cursors(None).await.unwrap();
            let lease = Lease { owner: owner("me"), epoch: random.i64(1..3) };
            let (from, to) = (at(random.i64(2..4)), at(random.i64(2..7)));
            let time = [TIME, Duration::ZERO, Duration::from_micros(u64::MAX / 4), Duration::MAX];
            let time = time[random.usize(0..4)];
            let step = Step::Advance(Advance::new(lease, from, to, time));
            let found = (step.looks_at() <= at(5)).then_some(Mark::ALWAYS);
            let expected = step.take(&id, Some(before.cursors[0].clone()), before.now, found);
            let stepped = engine.step(&id, &step).await;
            let now = engine.cursors(None).await.unwrap();
            match (expected, stepped) {
                (Ok(taken), Ok(cursor)) => {
                    let (mut expected, cursor) = (taken.cursor.unwrap(), cursor.unwrap());
                    assert!(expected.expires_at <= cursor.expires_at, "round {round}");
                    assert!(cursor.expires_at <= now.now.plus(time), "round {round}");
                    expected.expires_at = cursor.expires_at;
                    assert_eq!((&expected, &now.cursors[0]), (&cursor, &cursor), "round {round}");
                    moved += 1;
                }
                (Err(expected), Err(error)) => {
                    assert_eq!(expected.kind(), error.kind(), "round {round}");
                    assert_eq!(now.cursors, before.cursors, "round {round}");
                    refused += 1;
                }
                (expected, stepped) => panic!("round {round}: {expected:?}, {stepped:?}"),
            }
        }
        println!("{moved} moved, {refused} refused");
        assert!(moved > 50 && refused > 50, "{moved} {refused}");
    });
}

#[test]
fn the_cursor_and_its_parked_events_are_written_together_or_not_at_all() {
    block_on(async {
        for (place, engine) in all(|builder| builder).await {
            fill(&engine, 2).await;
            let (id, cursor) = begin(&engine, "together").await;
            place.psql("ALTER TABLE @parked_events ADD CONSTRAINT theirs CHECK (attempts < 100)");
            for attempts in [[100, 1], [1, 100]] {
                let mut advance = Advance::new(lease_of(&cursor), Position::ZERO, at(2), TIME);
                advance.parked = vec![
                    ParkedChange::Keep(parked(1, attempts[0])),
                    ParkedChange::Keep(parked(2, attempts[1])),
                ];
                let error = engine.step(&id, &Step::Advance(advance)).await.unwrap_err();
                assert_eq!(error.kind(), &ErrorKind::Backend, "{}", all_of(&error));
                assert_eq!(
                    (find(&engine, &id).await, parked_of(&engine, &id).await),
                    (cursor.clone(), vec![])
                );
            }
        }
    });
}

#[test]
fn of_two_who_claim_at_once_one_has_it() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let engines = [place.engine().await, place.builder().pooler(true).connect(&place.url).await.unwrap()];
        for round in 0..200 {
            let id = id(&format!("race {}", round % 7));
            let racers = [0, 1].map(|racer| {
                let (engine, id) = (engines[racer].clone(), id.clone());
                tokio::spawn(async move {
                    declare(&engine, &id).await;
                    engine.step(&id, &Step::claim(owner(["me", "you"][racer]), TIME)).await
                })
            });
            let mut winners = Vec::new();
            for racer in racers {
                match racer.await.unwrap() {
                    Ok(cursor) => winners.push(cursor.unwrap()),
                    Err(error) => assert_eq!(error.kind(), &ErrorKind::AlreadyOwned, "{}", all_of(&error)),
                }
            }
            assert_eq!(winners.len(), 1, "round {round}");
            assert_eq!(winners[0].epoch, round / 7 + 1);
            engines[0].step(&id, &Step::release(lease_of(&winners[0]))).await.unwrap();
        }
        let cursors = engines[0].cursors(None).await.unwrap().cursors;
        assert_eq!(cursors.iter().map(|cursor| cursor.epoch).sum::<i64>(), 200);
    });
}

/// The functions of the server report a clock that is a day ahead.
#[test]
fn the_clock_is_the_servers() {
    block_on(async {
        let Some(server) = Server::builder().start_or_skip() else { return };
        let ahead = "ALTER FUNCTION pg_catalog.clock_timestamp() RENAME TO true_clock;
                     CREATE FUNCTION pg_catalog.clock_timestamp() RETURNS timestamptz LANGUAGE sql
                     VOLATILE AS 'SELECT pg_catalog.true_clock() + interval ''1 day'''";
        server.psql("postgres", ahead).unwrap();
        let engine = PostgresEngine::connect(&server.url()).await.unwrap();
        let (_, cursor) = begin(&engine, "clock").await;
        let day = Duration::from_secs(86_400);
        let is_tomorrow = |time: Timestamp| {
            let ahead = time.since(Timestamp::now());
            assert!(
                ahead > day - Duration::from_secs(60) && ahead < day + Duration::from_secs(60),
                "{ahead:?}"
            );
        };
        is_tomorrow(cursor.expires_at);
        is_tomorrow(engine.cursors(None).await.unwrap().now);
    });
}

/// A renewal that waited for the row counts from the moment when it got the row.
#[test]
fn the_clock_is_read_after_the_wait() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let engine = place.engine().await;
        let (id, cursor) = begin(&engine, "wait").await;
        let mut side = client(&place.url).await;
        let held = side.transaction().await.unwrap();
        held.batch_execute(&format!("SELECT * FROM {}.cursors FOR UPDATE", place.schema)).await.unwrap();
        let renewing = tokio::spawn({
            let (engine, id) = (engine.clone(), id.clone());
            async move { engine.step(&id, &Step::renew(lease_of(&cursor), TIME)).await }
        });
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert!(!renewing.is_finished());
        let let_go = engine.cursors(None).await.unwrap().now;
        held.rollback().await.unwrap();
        let renewed = renewing.await.unwrap().unwrap().unwrap();
        assert!(renewed.expires_at >= let_go.plus(TIME), "{} {let_go}", renewed.expires_at);
    });
}

#[test]
fn a_claim_does_not_wait_for_a_handler_at_work() {
    block_on(async {
        for (place, engine) in all(|builder| builder).await {
            let table = table(&place);
            fill(&engine, 3).await;
            let id = id("busy");
            declare(&engine, &id).await;
            let short = Step::claim(owner("me"), Duration::from_millis(1));
            let mine = engine.step(&id, &short).await.unwrap().unwrap();
            let (delivery, advance) = next(&engine, &mine, 9).await.unwrap();
            let sink = projection(&engine, &table, "SELECT pg_sleep(1)");
            let working = tokio::spawn(async move { sink.deliver(&delivery, &advance).await });
            tokio::time::sleep(Duration::from_millis(300)).await;
            let began = Instant::now();
            // The lease has expired, and still no other owner gets it.
            let error = engine.step(&id, &Step::claim(owner("you"), TIME)).await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::AlreadyOwned);
            assert!(began.elapsed() < Duration::from_millis(400), "{:?}", began.elapsed());
            assert!(matches!(working.await.unwrap(), Outcome::Advanced(cursor) if cursor.position == at(3)));
            assert_eq!(seen(&place), up_to(3));
        }
    });
}

#[test]
fn a_step_whose_session_is_stale_is_taken_in_a_new_one() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let manager = Manager::new(place.url.parse().unwrap(), NoTls);
        let pool = Pool::builder(manager).max_size(2).build().unwrap();
        let engine = place.builder().with_pool(pool.clone()).await.unwrap();
        let table = table(&place);
        fill(&engine, 20).await;
        let (id, mut cursor) = begin(&engine, "stale").await;
        let sink = projection(&engine, &table, "SELECT 1");
        for way in 0..3 {
            // The error is "cached plan must not change result type".
            let other = if way == 1 { "text" } else { "varchar" };
            let alter =
                format!("ALTER TABLE {}.cursors ALTER COLUMN failed_error TYPE {other}", place.schema);
            for lose in ["SELECT 1", "SELECT 1", "DEALLOCATE ALL", "SELECT 1", "SELECT 1", &alter] {
                let step = next(&engine, &cursor, 1).await.unwrap();
                for client in [pool.get().await.unwrap(), pool.get().await.unwrap()] {
                    client.batch_execute(lose).await.unwrap();
                }
                let outcome = match way {
                    0 => engine.step(&id, &Step::claim(owner("me"), TIME)).await.map(Option::unwrap),
                    1 => engine.step(&id, &Step::Advance(step.1)).await.map(Option::unwrap),
                    _ => match deliver(&sink, &step).await {
                        Outcome::Advanced(cursor) => Ok(cursor),
                        Outcome::Refused(error) => Err(error),
                        other => panic!("{other:?}"),
                    },
                };
                cursor = outcome.unwrap_or_else(|error| panic!("{way} {lose}: {}", all_of(&error)));
            }
        }
        assert_eq!(seen(&place), [7, 8, 9, 10, 11, 12]);
    });
}

/// A future that was begun and is not polled must not hold a connection that others need.
#[test]
fn whoever_waits_for_events_and_is_not_polled_holds_up_nobody() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let engine = place.builder().pool_size(2).connect(&place.url).await.unwrap();
        let store = EventStore::new(engine.clone());
        for polls in 1..12 {
            let mut owned = Vec::new();
            for name in ["one", "two"] {
                owned.push(store.subscription(format!("{name} {polls}")).unwrap().claim().await.unwrap());
            }
            let mut resting: Vec<_> = owned.iter_mut().map(|owned| Box::pin(owned.next())).collect();
            for _ in 0..polls {
                for next in &mut resting {
                    assert!(poll_at_most(1, next).await.is_none());
                }
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
            for next in &mut resting {
                assert!(poll_at_most(1, next).await.is_none());
            }
            let began = Instant::now();
            engine.head().await.unwrap_or_else(|error| panic!("{polls} polls: {}", all_of(&error)));
            assert!(began.elapsed() < Duration::from_secs(1), "{polls} polls");
        }
    });
}

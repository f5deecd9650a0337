//! Cursors, exactly-once projections and inline projections: together or not at all, whatever goes wrong.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

mod common;
mod orders;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Place, block_on};
use evercore_postgres::deadpool_postgres::{Manager, Pool};
use evercore_postgres::tokio_postgres::{self, Client, NoTls, Transaction};
use evercore_postgres::{
    Advance, AggregateId, BoxError, BoxFuture, Builder, Cursor, CursorId, CursorStatus, Delivery, ErrorKind,
    Event, EventStore, FailurePolicy, Lease, LogQuery, Mark, Outcome, OwnerId, PageLimit, Parked,
    ParkedChange, Position, PostgresEngine, Projection, Result, Sink, Step, StorageEngine, SubscriptionName,
    SubscriptionStorage, Then, Timestamp,
};
use evercore_testkit::poll_at_most;
use evercore_testkit::postgres::{Cut, PgBouncer, Proxy, Server, Trigger};
use futures_lite::FutureExt;
use orders::{
    NotToday, Order, all_of, kind, named, noted, own, place, place_with, positions, skipped, soon, up_to,
};

const TIME: Duration = Duration::from_secs(30);

fn id(name: &str) -> CursorId {
    CursorId { subscription: SubscriptionName::new(name).unwrap(), version: 1, partition: 0 }
}

fn owner(name: &str) -> OwnerId {
    OwnerId::new(name).unwrap()
}

fn at(position: i64) -> Position {
    Position::new(position).unwrap()
}

fn lease_of(cursor: &Cursor) -> Lease {
    Lease { owner: cursor.owner.clone().unwrap(), epoch: cursor.epoch }
}

fn parked(position: i64, attempts: u32) -> Parked {
    Parked {
        position: at(position),
        aggregate: AggregateId::new(7).unwrap(),
        holds_back: true,
        attempts,
        error: "no\u{fffd}, \"never\"".to_owned(),
        parked_at: Timestamp::from_micros(5).unwrap(),
        is_due: false,
    }
}

async fn declare(engine: &PostgresEngine, id: &CursorId) -> Cursor {
    engine.step(id, &Step::declare(1, Position::ZERO, Some(Position::ZERO))).await.unwrap().unwrap()
}

async fn claim(engine: &PostgresEngine, id: &CursorId, name: &str) -> Cursor {
    engine.step(id, &Step::claim(owner(name), TIME)).await.unwrap().unwrap()
}

/// A cursor of this name, made and claimed.
async fn begin(engine: &PostgresEngine, name: &str) -> (CursorId, Cursor) {
    let id = id(name);
    declare(engine, &id).await;
    let cursor = claim(engine, &id, "me").await;
    (id, cursor)
}

async fn find(engine: &PostgresEngine, id: &CursorId) -> Cursor {
    let cursors = engine.cursors(Some(&id.subscription)).await.unwrap().cursors;
    cursors.into_iter().find(|cursor| cursor.id == *id).unwrap()
}

async fn parked_of(engine: &PostgresEngine, id: &CursorId) -> Vec<i64> {
    let parked = engine.parked(id, Position::ZERO, 99).await.unwrap();
    parked.iter().map(|event| event.position.get()).collect()
}

/// However an engine can be connected.
async fn all(set: impl Fn(Builder) -> Builder) -> Vec<(Place, PostgresEngine)> {
    let mut engines = Vec::new();
    for way in 0..3 {
        let Some(place) = Place::fresh() else { return Vec::new() };
        let builder = set(place.builder());
        let engine = match way {
            0 => builder.connect(&place.url).await,
            1 => builder.pooler(true).connect(&place.url).await,
            _ => {
                let manager = Manager::new(place.url.parse().unwrap(), NoTls);
                builder.with_pool(Pool::builder(manager).max_size(4).build().unwrap()).await
            }
        };
        engines.push((place, engine.unwrap()));
    }
    engines
}

async fn client(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// So many events.
async fn fill(engine: &PostgresEngine, events: usize) {
    let store = EventStore::new(engine.clone());
    for start in (0..events).step_by(500) {
        let count = 500.min(events - start);
        let many = move |_: &Order| (0..count).map(|n| noted(format!("{n}"))).collect::<Vec<_>>();
        store.update_or_create::<Order, _, _>("filled", many).await.unwrap();
    }
}

/// The table in which the projections of these tests write down which events they have seen.
fn table(place: &Place) -> String {
    place.psql("CREATE TABLE @seen (position BIGINT NOT NULL)");
    format!("{}.seen", place.schema)
}

fn seen(place: &Place) -> Vec<i64> {
    let text =
        place.psql("SELECT coalesce(string_agg(position::text, ' ' ORDER BY position), '') FROM @seen");
    text.split_whitespace().map(|position| position.parse().unwrap()).collect()
}

async fn note(sql: &Transaction<'_>, table: &str, events: &[Event]) -> Result<(), BoxError> {
    let positions: Vec<i64> = events.iter().map(|event| event.position().get()).collect();
    sql.execute(&format!("INSERT INTO {table} SELECT unnest($1::bigint[])"), &[&positions]).await?;
    Ok(())
}

/// Tells the compiler for how long its argument lives.
fn handler<F>(handle: F) -> F
where
    F: for<'t> Fn(&'t Transaction<'t>, &'t [Event]) -> BoxFuture<'t, Result<(), BoxError>>
        + Send
        + Sync
        + 'static,
{
    handle
}

fn noting(
    table: &str,
) -> impl for<'t> Fn(&'t Transaction<'t>, &'t [Event]) -> BoxFuture<'t, Result<(), BoxError>>
+ Clone
+ Send
+ Sync
+ 'static {
    let table = table.to_owned();
    handler(move |sql, events| {
        let table = table.clone();
        Box::pin(async move { note(sql, &table, events).await })
    })
}

/// Writes the events down and then does this SQL; where it is "fail" or "panic", that.
fn projection(engine: &PostgresEngine, table: &str, then: &'static str) -> Projection {
    let table = table.to_owned();
    engine.projection(move |sql, delivery| {
        let table = table.clone();
        Box::pin(async move {
            note(sql, &table, delivery.events()).await?;
            match then {
                "fail" => return Err(NotToday.into()),
                "panic" => panic!("as asked"),
                "keeps an error" => drop(sql.batch_execute("SELECT 1 / 0").await),
                then => sql.batch_execute(then).await?,
            }
            Ok(())
        })
    })
}

/// What comes behind the cursor, and the move past it.
async fn next(engine: &PostgresEngine, cursor: &Cursor, events: usize) -> Option<(Delivery, Advance)> {
    let query = LogQuery::after(cursor.position).with_limit(PageLimit::events(events).unwrap());
    let page = engine.read_log(&query).await.unwrap();
    let delivery = Delivery::new(cursor.id.clone(), lease_of(cursor), page.events.iter().collect());
    let advance = Advance::new(lease_of(cursor), cursor.position, page.scanned, TIME);
    (!page.events.is_empty()).then_some((delivery, advance))
}

fn failed(outcome: Outcome) -> BoxError {
    match outcome {
        Outcome::Failed { handled: 0, error } => error,
        other => panic!("{other:?}"),
    }
}

fn refused(outcome: Outcome) -> ErrorKind {
    match outcome {
        Outcome::Refused(error) => error.kind().clone(),
        other => panic!("{other:?}"),
    }
}

async fn deliver(sink: &Projection, next: &(Delivery, Advance)) -> Outcome {
    sink.deliver(&next.0, &next.1).await
}

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
            // The same owner's second claim is another lease.
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

/// As after a failover to a standby that had less of the log: what was handled and is gone is not acknowledged, or what
/// is written in its place would be passed over.
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

/// The plain move is one statement; it leaves the cursor as the long way would, which is the rule of all engines.
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

/// The server's clock goes a day ahead, as far as its own functions tell.
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

/// A renewal that waited for the row counts from when it got it.
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
            // The lease has run out, and yet nobody else gets it.
            let error = engine.step(&id, &Step::claim(owner("you"), TIME)).await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::AlreadyOwned);
            assert!(began.elapsed() < Duration::from_millis(400), "{:?}", began.elapsed());
            assert!(matches!(working.await.unwrap(), Outcome::Advanced(cursor) if cursor.position == at(3)));
            assert_eq!(seen(&place), up_to(3));
        }
    });
}

#[test]
fn a_projection_that_panics_at_one_event_goes_on_with_the_others() {
    block_on(async {
        for (place, engine) in all(|builder| builder).await {
            let table = table(&place);
            fill(&engine, 6).await;
            let panics = engine.projection(move |sql, delivery| {
                let table = table.clone();
                Box::pin(async move {
                    note(sql, &table, delivery.events()).await?;
                    assert!(delivery.events().iter().all(|event| event.position() != at(3)), "no third");
                    Ok(())
                })
            });
            let store = EventStore::new(engine.clone());
            let policy = FailurePolicy::then(Then::ParkAlone).with_pauses(Duration::ZERO, Duration::ZERO);
            let of = store.subscription("seen").unwrap().on_failure(policy.with_attempts(2));
            of.declare().await.unwrap();
            let done = async { store.wait_for_position(at(6), "seen", TIME).await.unwrap() };
            of.run_sink(done, panics).await.unwrap();
            let parked = store.parked("seen").await.unwrap();
            assert_eq!((parked.len(), parked[0].1.position), (1, at(3)));
            assert_eq!(parked[0].1.error, "the handler panicked: no third");
            assert_eq!(seen(&place), [1, 2, 4, 5, 6]);
        }
    });
}

#[test]
fn a_projection_writes_with_the_cursor_or_not_at_all() {
    block_on(async {
        for (place, engine) in all(|builder| builder.sql_timeout(Duration::from_millis(600))).await {
            let table = table(&place);
            fill(&engine, 12).await;
            let (id, cursor) = begin(&engine, "exactly once").await;
            let step = next(&engine, &cursor, 5).await.unwrap();
            let unmoved = async |what: &str| {
                assert_eq!((find(&engine, &id).await, seen(&place)), (cursor.clone(), vec![]), "{what}");
            };
            let error = failed(deliver(&projection(&engine, &table, "fail"), &step).await);
            assert_eq!(error.downcast_ref::<NotToday>(), Some(&NotToday));
            unmoved("an error").await;
            let sink = projection(&engine, &table, "panic");
            let panic = AssertUnwindSafe(deliver(&sink, &step)).catch_unwind().await.unwrap_err();
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"as asked"));
            soon("the row is free", async || {
                engine
                    .step(&id, &Step::claim(owner("you"), TIME))
                    .await
                    .is_err_and(|error| *error.kind() == ErrorKind::AlreadyOwned)
                    && find(&engine, &id).await == cursor
            })
            .await;
            unmoved("a panic").await;
            for bad in ["keeps an error", "SELECT pg_sleep(2)", "ROLLBACK", "ROLLBACK; BEGIN"] {
                failed(deliver(&projection(&engine, &table, bad), &step).await);
                unmoved(bad).await;
            }
            let bad = "ALTER TABLE # ADD COLUMN one INT DEFAULT 1, ADD CONSTRAINT late UNIQUE (one) DEFERRABLE INITIALLY DEFERRED";
            place.psql(&bad.replace('#', "@seen"));
            failed(deliver(&projection(&engine, &table, "SELECT 1"), &step).await);
            unmoved("a constraint that is looked at in the end").await;
            place.psql("ALTER TABLE @seen DROP COLUMN one");
            let Outcome::Advanced(moved) = deliver(&projection(&engine, &table, "SELECT 1"), &step).await
            else {
                panic!("not moved")
            };
            assert_eq!((moved.position, moved.epoch, seen(&place)), (at(5), 1, up_to(5)));
            assert_eq!(find(&engine, &id).await, moved);
            // Again, and with a lease that is lost.
            assert_eq!(
                refused(deliver(&projection(&engine, &table, "SELECT 1"), &step).await),
                ErrorKind::LeaseLost
            );
            let behind = next(&engine, &moved, 5).await.unwrap();
            claim(&engine, &id, "me").await;
            let sink = projection(&engine, &table, "SELECT 1");
            assert_eq!(refused(deliver(&sink, &behind).await), ErrorKind::LeaseLost);
            assert_eq!(seen(&place), up_to(5));
        }
    });
}

/// The server would take it for a client that has gone; a handler that blocks its thread stops our own clock too.
#[test]
fn a_handler_that_waits_for_something_else_for_too_long_has_failed() {
    block_on(async {
        for (place, engine) in all(|builder| builder.sql_timeout(Duration::from_millis(300))).await {
            let table = table(&place);
            fill(&engine, 3).await;
            let (id, cursor) = begin(&engine, "idle").await;
            let step = next(&engine, &cursor, 9).await.unwrap();
            let sink = engine.projection(move |sql, delivery| {
                let table = table.clone();
                Box::pin(async move {
                    note(sql, &table, delivery.events()).await?;
                    tokio::task::block_in_place(|| std::thread::sleep(Duration::from_millis(900)));
                    Ok(())
                })
            });
            let error = failed(deliver(&sink, &step).await);
            assert!(error.to_string().contains("took longer"), "{error}");
            assert_eq!((find(&engine, &id).await, seen(&place)), (cursor, vec![]));
        }
    });
}

/// Each has a row that the other wants.
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

/// Found while the handler runs or at the COMMIT, and told as it is or within an error of the handler's own.
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
                assert_eq!(refused(deliver(&sink, &step).await), ErrorKind::Unavailable, "{code} {when}");
                assert_eq!((find(&engine, &id).await, seen(&place)), (cursor.clone(), vec![]));
            }
            // It runs again by itself.
            undo("40001", "DEFERRED", 2);
            let outcome = deliver(&sink, &step).await;
            assert!(matches!(outcome, Outcome::Advanced(_)), "{outcome:?}");
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
            // Then "cached plan must not change result type".
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

/// A future that was begun and is not polled must not keep a connection from others.
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

#[test]
fn what_a_handler_sets_does_not_reach_others() {
    block_on(async {
        for (place, engine) in all(|builder| builder.pool_size(2)).await.into_iter().take(1) {
            let table = table(&place);
            fill(&engine, 3).await;
            let (_, cursor) = begin(&engine, "settings").await;
            let set = "SET work_mem = '77kB'; SET synchronous_commit = off";
            let step = next(&engine, &cursor, 9).await.unwrap();
            assert!(matches!(deliver(&projection(&engine, &table, set), &step).await, Outcome::Advanced(_)));
            for _ in 0..4 {
                let client = engine.pool().get().await.unwrap();
                let show = "SELECT current_setting('work_mem') || current_setting('synchronous_commit')";
                let shown: String = client.query_one(show, &[]).await.unwrap().get(0);
                assert!(!shown.contains("77kB") && !shown.contains("off"), "{shown}");
            }
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
                // Also a step on the cursor may be left alone.
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

    /// How many it has ended.
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
        // What is read is read on connections that nobody kills.
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

/// Before the COMMIT an error says that nothing was written, and then that nobody knows.
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
            // With parked events, so that it is no move in one statement.
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
        // A move in one statement: cut off, nobody knows.
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
        let with = with.inline_projection("inline", 1, noting(&format!("{}.inline", place.schema)));
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
fn an_inline_projection_equals_the_log_at_every_moment() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        drop(place.engine().await);
        let table = table(&place);
        let engine = async || {
            let with = place.builder().inline_projection("inline", 1, noting(&table));
            with.connect(&place.url).await.unwrap()
        };
        let engines = [engine().await, engine().await];
        let is_done = Arc::new(AtomicBool::new(false));
        let watcher = tokio::spawn({
            let (is_done, side) = (Arc::clone(&is_done), client(&place.url).await);
            let sql = "SELECT (SELECT position FROM @log_end) = (SELECT count(*) FROM @seen),
                       (SELECT position FROM @log_end) = (SELECT position FROM @cursors)";
            let sql = sql.replace('@', &format!("{}.", place.schema));
            async move {
                let mut looks = 0;
                while !is_done.load(Ordering::Acquire) {
                    let row = side.query_one(&sql, &[]).await.unwrap();
                    assert_eq!((row.get(0), row.get(1)), (true, true));
                    looks += 1;
                }
                looks
            }
        });
        let writers = (0..8).map(|writer: usize| {
            let engine = engines[writer % 2].clone();
            tokio::spawn(async move {
                let store = EventStore::new(engine.clone());
                for round in 0..25 {
                    self::place(&store, &format!("own {writer}")).await.unwrap();
                    self::place(&store, &format!("shared {}", round % 3)).await.unwrap();
                    if round % 5 == 0 {
                        place_with(&engine, &format!("own {writer}"), own("SELECT 1")).await.unwrap();
                    }
                }
            })
        });
        for writer in writers.collect::<Vec<_>>() {
            writer.await.unwrap();
        }
        is_done.store(true, Ordering::Release);
        assert!(watcher.await.unwrap() > 10);
        let head = 8 * (25 * 2 + 5);
        assert_eq!((positions(&engines[0]).await, seen(&place)), (up_to(head), up_to(head)));
        let cursor = find(&engines[0], &id("inline")).await;
        assert_eq!((cursor.position, cursor.owner, cursor.epoch, cursor.partitions), (at(head), None, 0, 1));
    });
}

#[test]
fn an_inline_projection_whose_connections_are_killed_at_random_equals_the_log() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let reading = place.engine().await;
        let table = table(&place);
        let with = place.builder().inline_projection("inline", 1, noting(&table));
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

/// The SQL beside a commit has the row and wants the log, the inline projection has the log and wants the row.
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

#[test]
fn the_unit_that_an_inline_projection_refuses_fails_alone() {
    block_on(async {
        for (place, engine) in all(|builder| builder).await {
            drop(engine);
            let table = table(&place);
            let calls = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&calls);
            let picky = handler(move |sql, events| {
                let table = table.clone();
                counted.fetch_add(1, Ordering::Relaxed);
                Box::pin(async move {
                    note(sql, &table, events).await?;
                    let has = |text: &[u8]| {
                        events
                            .iter()
                            .any(|event| event.payload().windows(text.len()).any(|part| part == text))
                    };
                    assert!(!has(b"panic"), "as asked");
                    if has(b"guilty") { Err(NotToday.into()) } else { Ok(()) }
                })
            });
            let with = place.builder().inline_projection("picky", 1, picky);
            let engine = with.connect(&place.url).await.unwrap();
            let store = EventStore::new(engine.clone());
            let writers = (0..24).map(|writer: i64| {
                let store = store.clone();
                let note =
                    ["fine", "guilty", "fine", "fine", "panic", "fine"][usize::try_from(writer).unwrap() % 6];
                let work = async move {
                    store.update_or_create::<Order, _, _>(format!("{writer}"), move |_| [noted(note)]).await
                };
                (note, tokio::spawn(work))
            });
            for (note, writer) in writers.collect::<Vec<_>>() {
                match (note, writer.await) {
                    ("fine", Ok(outcome)) => drop(outcome.unwrap()),
                    ("guilty", Ok(Err(error))) => {
                        assert_eq!(error.kind(), &ErrorKind::Rejected);
                        assert_eq!(error.cause::<NotToday>(), Some(&NotToday), "{}", all_of(&error));
                    }
                    ("panic", Err(panic)) => assert!(panic.is_panic()),
                    (note, other) => panic!("{note}: {other:?}"),
                }
            }
            assert_eq!((positions(&engine).await, seen(&place)), (up_to(16), up_to(16)));
            assert!(calls.load(Ordering::Relaxed) >= 24 - 8);
            let missing = kind(store.load::<Order>("1").await);
            assert!(matches!(missing, ErrorKind::NotFound), "{missing:?}");
            // With SQL of one's own beside it.
            let mut work = store.begin();
            let mut order = work.load::<Order>("0").await.unwrap();
            work.record(&mut order, noted("guilty")).unwrap();
            let beside = own(format!("INSERT INTO {}.seen VALUES (4711)", place.schema));
            let error = engine.commit_with(work, beside).await.unwrap_err();
            assert_eq!(error.cause::<NotToday>(), Some(&NotToday), "{}", all_of(&error));
            assert_eq!(seen(&place), up_to(16));
            self::place(&store, "after").await.unwrap();
            assert_eq!(seen(&place), up_to(17));
        }
    });
}

#[test]
fn an_inline_projection_misses_nothing() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let plain = place.engine().await;
        let table = table(&place);
        fill(&plain, 2_300).await;
        let sizes = Arc::new(std::sync::Mutex::new(Vec::new()));
        let (kept, inner) = (Arc::clone(&sizes), noting(&table));
        let measured = handler(move |sql, events| {
            kept.lock().unwrap().push(events.len());
            inner(sql, events)
        });
        let with = place.builder().inline_projection("late", 3, measured);
        let engine = with.connect(&place.url).await.unwrap();
        assert_eq!(seen(&place), up_to(2_300));
        assert_eq!(sizes.lock().unwrap().split_off(0), [1_000, 1_000, 300]);
        let id = CursorId { version: 3, ..id("late") };
        assert_eq!(find(&engine, &id).await.live_from, Some(Position::ZERO));
        // Another process commits without it, with a name that this one has not seen, and more than a page holds.
        fill(&plain, 1_200).await;
        place_with(&plain, "other", own("SELECT 1")).await.unwrap();
        assert_eq!(seen(&place), up_to(2_300));
        self::place(&EventStore::new(engine.clone()), "first").await.unwrap();
        assert_eq!(seen(&place), up_to(3_502));
        assert_eq!(sizes.lock().unwrap().split_off(0), [1_000, 202]);
        // Paused it is passed over, and then catches up.
        engine.step(&id, &Step::Pause).await.unwrap();
        self::place(&EventStore::new(engine.clone()), "first").await.unwrap();
        engine.step(&id, &Step::Resume).await.unwrap();
        assert_eq!(seen(&place), up_to(3_502));
        place_with(&engine, "first", own("SELECT 1")).await.unwrap();
        assert_eq!(seen(&place), up_to(3_504));
    });
}

#[test]
fn inline_projections_are_checked_when_connecting() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        drop(place.engine().await);
        let idle = || handler(|_, _| Box::pin(async { Ok(()) }));
        let with = |name: &str, version| place.builder().inline_projection(name, version, idle());
        assert_eq!(kind(with("", 1).connect(&place.url).await), ErrorKind::InvalidName);
        assert_eq!(kind(with("a", 0).connect(&place.url).await), ErrorKind::Invalid);
        let twice = with("a", 1).inline_projection("a", 1, idle());
        assert_eq!(kind(twice.connect(&place.url).await), ErrorKind::Invalid);
        assert_eq!(kind(with("a", 1).read_from(&place.url).await), ErrorKind::Invalid);
        fill(&place.engine().await, 2).await;
        let failing = place.builder().inline_projection(
            "b",
            1,
            handler(|_, _| Box::pin(async { Err(NotToday.into()) })),
        );
        let error = failing.connect(&place.url).await.unwrap_err();
        assert_eq!((error.kind(), error.cause::<NotToday>()), (&ErrorKind::Rejected, Some(&NotToday)));
        with("a", 1).inline_projection("a", 2, idle()).connect(&place.url).await.unwrap();
    });
}

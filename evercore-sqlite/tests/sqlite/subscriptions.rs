//! Cursors and the tables that change with them: all or nothing, also after crashes, races and delays.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use evercore_core::engine::{Advance, Batch, Outcome, ParkedChange, Sink, Step, SubscriptionStorage};
use evercore_memory::MemoryEngine;
use evercore_sqlite::rusqlite::Connection;
use evercore_sqlite::{
    AggregateId, BoxError, Cursor, CursorId, CursorStatus, Delivery, ErrorKind, Event, EventStore, Failure,
    FailureAction, FailurePolicy, Lease, LogQuery, OwnerId, PageLimit, Parked, Position, Projection, Result,
    SqliteEngine, StorageEngine, SubscriptionName, Timestamp,
};

use crate::common::{Folder, append, as_child, block_on, child, create, event, kind};

const HOUR: Duration = Duration::from_secs(3_600);

fn id() -> CursorId {
    of("totals", 1, 0)
}

fn of(name: &str, version: u32, partition: u32) -> CursorId {
    CursorId { subscription: SubscriptionName::new(name).unwrap(), version, partition }
}

fn owner(name: &str) -> OwnerId {
    OwnerId::new(name).unwrap()
}

fn at(position: i64) -> Position {
    Position::new(position).unwrap()
}

fn declare() -> Step {
    Step::declare(1, Position::ZERO, Some(Position::ZERO))
}

fn advance(lease: &Lease, from: i64, to: i64) -> Step {
    Step::Advance(Advance::new(lease.clone(), at(from), at(to), HOUR))
}

fn park(position: i64) -> Parked {
    Parked {
        position: at(position),
        aggregate: AggregateId::new(7).unwrap(),
        holds_back: true,
        attempts: 3,
        error: "it is broken: really".to_owned(),
        parked_at: Timestamp::now(),
        is_due: false,
    }
}

async fn step(engine: &SqliteEngine, step: &Step) -> Result<Cursor> {
    Ok(engine.step(&id(), step).await?.unwrap())
}

async fn claim(engine: &SqliteEngine, name: &str, time: Duration) -> Result<Lease> {
    let cursor = step(engine, &Step::claim(owner(name), time)).await?;
    Ok(Lease { owner: owner(name), epoch: cursor.epoch })
}

/// The only cursor.
async fn cursor(engine: &SqliteEngine) -> Cursor {
    let mut cursors = engine.cursors(None).await.unwrap().cursors;
    assert_eq!(cursors.len(), 1);
    cursors.remove(0)
}

/// Opens the engine in each mode.
async fn all(folder: &Folder) -> [SqliteEngine; 3] {
    let on_caller = SqliteEngine::builder().commit_on_caller_thread(true);
    [
        SqliteEngine::open(folder.store()).await.unwrap(),
        on_caller.open(folder.file("caller.db")).await.unwrap(),
        SqliteEngine::open_in_memory().await.unwrap(),
    ]
}

async fn commit_events(engine: &dyn StorageEngine, count: i64) {
    let (id, _) = create(engine, None).await.unwrap();
    let mut batch = Batch::new();
    batch.append(append(id, 1, (1..count).map(|_| event("Paid", b"{}")).collect())).unwrap();
    engine.commit(batch).await.unwrap();
}

async fn events_after(engine: &SqliteEngine, position: Position, limit: usize) -> Vec<Event> {
    let mut query = LogQuery::after(position);
    query.limit = PageLimit::events(limit).unwrap();
    engine.read_log(&query).await.unwrap().events.iter().collect()
}

#[test]
fn everything_that_a_step_leaves_is_there_after_the_store_was_opened_again() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        commit_events(&engine, 40).await;
        step(&engine, &declare()).await.unwrap();
        let lease = claim(&engine, "a", HOUR).await.unwrap();
        let mut far = Advance::new(lease.clone(), at(0), at(40), HOUR);
        far.parked = [3, 5, 8].map(|position| ParkedChange::Keep(park(position))).to_vec();
        step(&engine, &Step::Advance(far)).await.unwrap();
        step(&engine, &Step::resume_parked(Some(at(5)))).await.unwrap();
        step(&engine, &Step::go_live(lease.clone(), at(9))).await.unwrap();
        step(&engine, &Step::want(owner("b"), HOUR)).await.unwrap();
        let failure = Failure { position: at(41), attempts: 2, error: "no\u{e9}".to_owned() };
        step(&engine, &Step::fail(lease, failure, HOUR)).await.unwrap();
        let paused = step(&engine, &Step::Pause).await.unwrap();
        engine.step(&of("other", 2, 0), &Step::declare(2, at(4), None)).await.unwrap();
        engine.step(&of("other", 1, 1), &Step::declare(2, at(4), None)).await.unwrap();
        drop(engine);

        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let all = engine.cursors(None).await.unwrap();
        assert!(all.now <= Timestamp::now() && paused.expires_at > all.now);
        let ids: Vec<_> = all.cursors.iter().map(|cursor| cursor.id.clone()).collect();
        assert_eq!(ids, [of("other", 1, 1), of("other", 2, 0), id()]);
        assert_eq!((all.cursors[0].live_from, all.cursors[0].position), (None, at(4)));
        let name = SubscriptionName::new("totals").unwrap();
        let ours = engine.cursors(Some(&name)).await.unwrap().cursors;
        assert_eq!(ours, std::slice::from_ref(&paused));
        assert_eq!((paused.status, paused.position, paused.epoch), (CursorStatus::Paused, at(40), 1));
        assert_eq!((paused.live_from, paused.wanted_by.as_ref()), (Some(at(9)), Some(&owner("b"))));

        let parked = engine.parked(&id(), at(3), 10).await.unwrap();
        let found: Vec<_> = parked.iter().map(|event| (event.position.get(), event.is_due)).collect();
        assert_eq!(found, [(5, true), (8, false)]);
        assert_eq!(Parked { parked_at: parked[1].parked_at, ..park(8) }, parked[1]);
        assert_eq!(engine.parked(&id(), Position::ZERO, 1).await.unwrap().len(), 1);
        step(&engine, &Step::drop_parked(Some(at(5)))).await.unwrap();
        assert_eq!(engine.parked(&id(), Position::ZERO, 10).await.unwrap().len(), 2);
        assert_eq!(engine.step(&id(), &Step::Remove).await.unwrap(), None);
        assert!(engine.parked(&id(), Position::ZERO, 10).await.unwrap().is_empty());
        assert_eq!(kind(step(&engine, &Step::Pause).await), ErrorKind::NotFound);
        assert_eq!(engine.cursors(None).await.unwrap().cursors.len(), 2);
    });
}

/// A cursor without its times, which differ between two clocks.
fn shape(cursor: Option<Cursor>) -> Option<(Cursor, bool)> {
    let cursor = cursor?;
    let (now, none) = (Timestamp::now(), Timestamp::MIN);
    let is_held = cursor.expires_at > now;
    Some((Cursor { expires_at: none, wanted_until: none, ..cursor }, is_held))
}

fn random_step(random: &mut fastrand::Rng, known: Option<&Cursor>) -> Step {
    let name = owner(random.choice(["a", "b"]).unwrap());
    let epoch = known.map_or(1, |cursor| cursor.epoch) - i64::from(random.u8(0..8) == 0);
    let lease = Lease { owner: known.and_then(|cursor| cursor.owner.clone()).unwrap_or(name.clone()), epoch };
    let time = if random.bool() { HOUR } else { Duration::ZERO };
    let from = known.map_or(0, |cursor| cursor.position.get()) + i64::from(random.u8(0..8) == 0);
    let near = random.bool().then(|| at(from + random.i64(0..3)));
    match random.u8(0..24) {
        0..=1 => Step::declare(1, at(random.i64(0..3)), near),
        2..=6 => Step::claim(name, time),
        7 => Step::renew(lease, time),
        8..=13 => {
            let mut advance = Advance::new(lease, at(from), at(from + random.i64(0..3)), time);
            for _ in 0..random.u8(0..3) {
                let position = from + random.i64(0..5);
                advance.parked.push(match random.u8(0..4) {
                    0 => ParkedChange::Remove(at(position)),
                    1 => ParkedChange::Due(Some(at(position))),
                    _ => ParkedChange::Keep(park(position)),
                });
            }
            Step::Advance(advance)
        }
        14 => {
            let failure = Failure { position: at(from + 1), attempts: 1, error: "no".to_owned() };
            Step::fail(lease, failure, time)
        }
        15 => Step::release(lease),
        16 => Step::want(name, time),
        17 => Step::go_live(lease, at(from)),
        18 => Step::Pause,
        19 => Step::Resume,
        20 => Step::reset(at(random.i64(0..5))),
        21 => Step::resume_parked(near),
        22 => Step::drop_parked(near),
        _ if random.u8(0..4) == 0 => Step::Retire,
        _ => Step::Remove,
    }
}

#[test]
fn every_step_leaves_what_it_leaves_in_memory() {
    let folder = Folder::new();
    for engine in block_on(all(&folder)) {
        let memory = MemoryEngine::new();
        // Some moves go past the end.
        block_on(async {
            commit_events(&memory, 8).await;
            commit_events(&engine, 8).await;
        });
        let mut random = fastrand::Rng::with_seed(4_711);
        let mut known = None;
        block_on(async {
            for _ in 0..1_500 {
                let step = random_step(&mut random, known.as_ref());
                let expected = memory.step(&id(), &step).await;
                let found = engine.step(&id(), &step).await;
                match (expected, found) {
                    (Ok(expected), Ok(found)) => {
                        known = found.clone();
                        assert_eq!(shape(expected), shape(found), "{step:?}");
                    }
                    (expected, found) => assert_eq!(kind(expected), kind(found), "{step:?}"),
                }
                let stored = engine.cursors(None).await.unwrap().cursors.pop();
                assert_eq!(stored, known, "{step:?}");
                let parked = memory.parked(&id(), Position::ZERO, 100).await.unwrap();
                assert_eq!(engine.parked(&id(), Position::ZERO, 100).await.unwrap(), parked, "{step:?}");
            }
        });
    }
}

#[test]
fn a_step_that_changes_nothing_writes_nothing() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let first = step(&engine, &declare()).await.unwrap();
        let lost = claim(&engine, "a", Duration::ZERO).await.unwrap();
        claim(&engine, "b", HOUR).await.unwrap();
        let before = engine.wal_bytes();
        assert_eq!(step(&engine, &declare()).await.unwrap().position, first.position);
        step(&engine, &Step::release(lost)).await.unwrap();
        assert_eq!(kind(claim(&engine, "a", HOUR).await), ErrorKind::AlreadyOwned);
        let other = Step::declare(2, Position::ZERO, None);
        assert_eq!(kind(step(&engine, &other).await), ErrorKind::Invalid);
        assert_eq!(engine.wal_bytes(), before);
    });
}

#[test]
fn an_old_lease_moves_nothing() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            commit_events(&engine, 9).await;
            step(&engine, &declare()).await.unwrap();
            let old = claim(&engine, "a", Duration::ZERO).await.unwrap();
            let new = claim(&engine, "b", HOUR).await.unwrap();
            assert_eq!(new.epoch, old.epoch + 1);
            let mut far = Advance::new(old.clone(), at(0), at(9), HOUR);
            far.parked.push(ParkedChange::Keep(park(3)));
            assert_eq!(kind(step(&engine, &Step::Advance(far)).await), ErrorKind::LeaseLost);
            assert_eq!(kind(step(&engine, &Step::renew(old.clone(), HOUR)).await), ErrorKind::LeaseLost);
            step(&engine, &Step::release(old)).await.unwrap();
            assert!(engine.parked(&id(), Position::ZERO, 10).await.unwrap().is_empty());
            let held = cursor(&engine).await;
            assert_eq!((held.position, held.owner), (at(0), Some(owner("b"))));
            assert_eq!(step(&engine, &advance(&new, 0, 4)).await.unwrap().position, at(4));
            assert_eq!(kind(step(&engine, &advance(&new, 0, 9)).await), ErrorKind::LeaseLost);
        }
    });
}

#[test]
fn the_cursor_does_not_move_without_its_parked_events() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        commit_events(&engine, 9).await;
        step(&engine, &declare()).await.unwrap();
        let lease = claim(&engine, "a", HOUR).await.unwrap();
        let file = Connection::open(folder.store()).unwrap();
        let refuse = "CREATE TRIGGER no BEFORE INSERT ON parked_events WHEN new.position = 2
                      BEGIN SELECT raise(ABORT, 'no'); END";
        file.execute_batch(refuse).unwrap();
        let mut far = Advance::new(lease, at(0), at(9), HOUR);
        far.parked = vec![ParkedChange::Keep(park(1)), ParkedChange::Keep(park(2))];
        let before = cursor(&engine).await;
        assert_eq!(kind(step(&engine, &Step::Advance(far.clone())).await), ErrorKind::Backend);
        assert_eq!(cursor(&engine).await, before);
        assert!(engine.parked(&id(), Position::ZERO, 10).await.unwrap().is_empty());
        file.execute_batch("DROP TRIGGER no").unwrap();
        step(&engine, &Step::Advance(far)).await.unwrap();
        assert_eq!(cursor(&engine).await.position, at(9));
        assert_eq!(engine.parked(&id(), Position::ZERO, 10).await.unwrap().len(), 2);
    });
}

#[test]
fn of_two_engines_that_claim_at_once_one_wins() {
    const ROUNDS: usize = 200;
    let folder = Folder::new();
    let open = || block_on(SqliteEngine::open(folder.store())).unwrap();
    let engines = [("a", open()), ("b", open())];
    block_on(step(&engines[0].1, &declare())).unwrap();
    let start = Barrier::new(2);
    let claims = |(name, engine): &(&str, SqliteEngine)| {
        let claim = |_| {
            start.wait();
            let won = block_on(claim(engine, name, HOUR));
            start.wait();
            let released = won.and_then(|lease| block_on(step(engine, &Step::release(lease))));
            released.map(drop).map_err(|error| error.kind().clone())
        };
        (0..ROUNDS).map(claim).collect::<Vec<_>>()
    };
    let [a, b] = thread::scope(|scope| {
        let racing = engines.each_ref().map(|engine| scope.spawn(|| claims(engine)));
        racing.map(|racing| racing.join().unwrap())
    });
    for round in a.into_iter().zip(b) {
        let in_vain = Err(ErrorKind::AlreadyOwned);
        assert!(matches!(&round, (Ok(()), lost) | (lost, Ok(())) if *lost == in_vain), "{round:?}");
    }
    assert_eq!(block_on(cursor(&engines[0].1)).epoch, i64::try_from(ROUNDS).unwrap());
}

#[test]
fn no_move_of_eight_threads_is_lost() {
    const MOVES: i64 = 25;
    let folder = Folder::new();
    let open = || block_on(SqliteEngine::open(folder.store())).unwrap();
    let engines = [open(), open()];
    block_on(commit_events(&engines[0], 8 * MOVES));
    block_on(step(&engines[0], &declare())).unwrap();
    let lease = block_on(claim(&engines[0], "a", HOUR)).unwrap();
    thread::scope(|scope| {
        for engine in engines.iter().cycle().take(8) {
            let lease = lease.clone();
            scope.spawn(move || {
                for _ in 0..MOVES {
                    loop {
                        let from = block_on(cursor(engine)).position.get();
                        match block_on(step(engine, &advance(&lease, from, from + 1))) {
                            Ok(_) => break,
                            Err(error) => assert_eq!(error.kind(), &ErrorKind::LeaseLost, "{error}"),
                        }
                    }
                }
            });
        }
    });
    assert_eq!(block_on(cursor(&engines[0])).position, at(8 * MOVES));
}

#[test]
fn a_claim_in_vain_waits_for_nobody() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        step(&engine, &declare()).await.unwrap();
        claim(&engine, "a", HOUR).await.unwrap();
        let neighbour = Connection::open(folder.store()).unwrap();
        neighbour.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert_eq!(kind(claim(&engine, "b", HOUR).await), ErrorKind::AlreadyOwned);
    });
}

const TABLE: &str = "CREATE TABLE IF NOT EXISTS shop_seen (position INTEGER NOT NULL) STRICT";

async fn make_table(engine: &SqliteEngine) {
    let store = evercore_sqlite::EventStore::new(engine.clone());
    engine.commit_with(store.begin(), |sql| Ok(sql.execute_batch(TABLE)?)).await.unwrap();
}

fn note(sql: &Connection, events: &[Event]) -> Result<(), BoxError> {
    let mut insert = sql.prepare_cached("INSERT INTO shop_seen VALUES (?1)")?;
    for event in events {
        insert.execute([event.position().get()])?;
    }
    Ok(())
}

/// The content of the table, read on the engine's own connection.
async fn seen(engine: &SqliteEngine) -> Vec<i64> {
    let (send, receive) = std::sync::mpsc::channel();
    let store = evercore_sqlite::EventStore::new(engine.clone());
    let ask = move |sql: &Connection| {
        let mut ask = sql.prepare_cached("SELECT position FROM shop_seen ORDER BY position")?;
        let rows = ask.query_map([], |row| row.get(0))?;
        send.send(rows.collect::<Result<Vec<i64>, _>>()?)?;
        Ok(())
    };
    engine.commit_with(store.begin(), ask).await.unwrap();
    receive.recv().unwrap()
}

/// A store with six events, a table and a claimed cursor.
async fn shop(engine: &SqliteEngine) -> Lease {
    make_table(engine).await;
    commit_events(engine, 6).await;
    step(engine, &declare()).await.unwrap();
    claim(engine, "a", HOUR).await.unwrap()
}

/// Delivers the next events, up to three.
async fn deliver(engine: &SqliteEngine, projection: &Projection, lease: &Lease) -> Outcome {
    let from = cursor(engine).await.position;
    let events = events_after(engine, from, 3).await;
    let to = events.last().unwrap().position();
    let delivery = Delivery::new(id(), lease.clone(), events);
    projection.deliver(&delivery, &Advance::new(lease.clone(), from, to, HOUR)).await
}

/// Asserts that the table and the cursor are at this position, and that delivery goes on from there.
async fn is_at(engine: &SqliteEngine, position: i64) {
    assert_eq!(cursor(engine).await.position, at(position));
    assert_eq!(seen(engine).await, (1..=position).collect::<Vec<_>>());
}

fn failed(outcome: Outcome) -> BoxError {
    match outcome {
        Outcome::Failed { handled: 0, error } | Outcome::Hindered { error, .. } => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_projection_moves_with_its_cursor() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            let lease = shop(&engine).await;
            let projection = engine.projection(|sql, delivery| note(sql, delivery.events()));
            for end in [3, 6] {
                let outcome = deliver(&engine, &projection, &lease).await;
                let Outcome::Advanced(moved) = outcome else { panic!("{outcome:?}") };
                assert_eq!(moved, cursor(&engine).await);
                is_at(&engine, end).await;
            }
        }
    });
}

#[test]
fn a_projection_that_fails_leaves_everything_as_it_was() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            let lease = shop(&engine).await;
            let good = engine.projection(|sql, delivery| note(sql, delivery.events()));
            deliver(&engine, &good, &lease).await;
            let says_no = engine.projection(|sql, delivery| {
                note(sql, delivery.events())?;
                Err(std::fmt::Error.into())
            });
            let error = failed(deliver(&engine, &says_no, &lease).await);
            assert!(error.is::<std::fmt::Error>(), "{error:?}");
            for ends in ["COMMIT", "ROLLBACK", "ROLLBACK; BEGIN IMMEDIATE"] {
                let ends = engine.projection(move |sql, delivery| {
                    note(sql, delivery.events())?;
                    let _ = sql.execute_batch(ends);
                    Ok(())
                });
                let error = failed(deliver(&engine, &ends, &lease).await);
                assert_eq!(
                    error.to_string(),
                    "the projection ended the transaction, which only the engine may end"
                );
            }
            let orphan = engine.projection(|sql, delivery| {
                note(sql, delivery.events())?;
                Ok(sql.execute_batch(
                    "CREATE TABLE shop_lines (of INTEGER REFERENCES aggregates DEFERRABLE INITIALLY DEFERRED);
                     INSERT INTO shop_lines VALUES (4711)",
                )?)
            });
            failed(deliver(&engine, &orphan, &lease).await);
            is_at(&engine, 3).await;
            deliver(&engine, &good, &lease).await;
            is_at(&engine, 6).await;
        }
    });
}

#[test]
fn a_projection_that_takes_too_long_has_failed() {
    block_on(async {
        let builder = SqliteEngine::builder().sql_timeout(Duration::from_millis(100));
        let engine = builder.open_in_memory().await.unwrap();
        let lease = shop(&engine).await;
        let endless = engine.projection(|sql, delivery| {
            note(sql, delivery.events())?;
            let count =
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";
            sql.query_row(count, [], |_| Ok(()))?;
            Ok(())
        });
        let error = failed(deliver(&engine, &endless, &lease).await);
        assert_eq!(error.to_string(), "the projection took longer than 100ms");
        is_at(&engine, 0).await;
    });
}

#[test]
fn a_panic_of_a_projection_writes_nothing_and_goes_on_in_who_delivers() {
    let folder = Folder::new();
    for engine in block_on(all(&folder)) {
        let lease = block_on(shop(&engine));
        let panics = engine.projection(|sql, delivery| {
            note(sql, delivery.events())?;
            panic!("on purpose")
        });
        let deliver_it = || block_on(deliver(&engine, &panics, &lease));
        let panic = catch_unwind(AssertUnwindSafe(deliver_it)).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
        let good = engine.projection(|sql, delivery| note(sql, delivery.events()));
        block_on(async {
            is_at(&engine, 0).await;
            deliver(&engine, &good, &lease).await;
            is_at(&engine, 3).await;
        });
    }
}

#[test]
fn a_projection_that_panics_at_one_event_goes_on_with_the_others() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            make_table(&engine).await;
            commit_events(&engine, 6).await;
            let panics = engine.projection(|sql, delivery| {
                note(sql, delivery.events())?;
                assert!(delivery.events().iter().all(|event| event.position().get() != 3), "no third");
                Ok(())
            });
            let store = EventStore::new(engine.clone());
            let policy =
                FailurePolicy::new(FailureAction::ParkAlone).with_pauses(Duration::ZERO, Duration::ZERO);
            let of = store.subscription("seen").unwrap().on_failure(policy.with_attempts(2));
            let done = async { store.wait_for_position(at(6), "seen", HOUR).await.unwrap() };
            of.declare().await.unwrap();
            of.run_sink(done, panics).await.unwrap();
            let parked = store.parked("seen").await.unwrap();
            assert_eq!((parked.len(), parked[0].1.position), (1, at(3)));
            assert_eq!(parked[0].1.error, "the handler panicked: no third");
            assert_eq!(seen(&engine).await, [1, 2, 4, 5, 6]);
        }
    });
}

#[test]
fn a_projection_whose_lease_is_lost_is_not_run() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            let lost = shop(&engine).await;
            let ran = Arc::new(AtomicUsize::new(0));
            let runs = Arc::clone(&ran);
            let projection = engine.projection(move |sql, delivery| {
                runs.fetch_add(1, Ordering::SeqCst);
                note(sql, delivery.events())
            });
            step(&engine, &Step::release(lost.clone())).await.unwrap();
            let lease = claim(&engine, "b", HOUR).await.unwrap();
            let outcome = deliver(&engine, &projection, &lost).await;
            assert!(matches!(&outcome, Outcome::Refused(error) if *error.kind() == ErrorKind::LeaseLost));
            deliver(&engine, &projection, &lease).await;
            let again = Delivery::new(id(), lease.clone(), events_after(&engine, at(0), 3).await);
            let outcome = projection.deliver(&again, &Advance::new(lease, at(0), at(3), HOUR)).await;
            assert!(matches!(&outcome, Outcome::Refused(error) if *error.kind() == ErrorKind::LeaseLost));
            is_at(&engine, 3).await;
            assert_eq!(ran.load(Ordering::SeqCst), 1);
            engine.close().await.unwrap();
            let on = Advance::new(again.lease().clone(), at(3), at(6), HOUR);
            let outcome = projection.deliver(&again, &on).await;
            assert!(matches!(&outcome, Outcome::Refused(error) if *error.kind() == ErrorKind::Closed));
        }
    });
}

#[test]
fn a_delivery_that_is_given_up_is_done_or_is_not() {
    let folder = Folder::new();
    let engine = block_on(SqliteEngine::open(folder.store())).unwrap();
    block_on(async {
        let lease = shop(&engine).await;
        let slow = engine.projection(|sql, delivery| {
            note(sql, delivery.events())?;
            thread::sleep(Duration::from_millis(100));
            Ok(())
        });
        let delivering = deliver(&engine, &slow, &lease);
        let giving_up = async {
            engine.pause(Duration::from_millis(50)).await;
            None
        };
        futures_lite::future::or(async { Some(delivering.await) }, giving_up).await;
    });
    // The next writer waits for it if it has begun.
    block_on(async {
        let table = seen(&engine).await;
        is_at(&engine, i64::try_from(table.len()).unwrap()).await;
    });
}

/// The work of the next test's child, until it is killed: a runner, written by hand.
async fn project_for_ever(path: &Path) {
    let engine = SqliteEngine::open(path).await.unwrap();
    let projection = engine.projection(|sql, delivery| note(sql, delivery.events()));
    let lease = claim(&engine, "a", HOUR).await.unwrap();
    loop {
        if cursor(&engine).await.position == engine.head().await.unwrap() {
            engine.pause(HOUR).await;
        }
        let outcome = deliver(&engine, &projection, &lease).await;
        assert!(matches!(outcome, Outcome::Advanced(_)), "{outcome:?}");
    }
}

#[test]
fn a_projection_that_is_killed_again_and_again_has_every_event_once() {
    if let Some(path) = as_child() {
        return block_on(project_for_ever(&path));
    }
    const KILLS: i64 = 8;
    const EVENTS: i64 = 2_000;
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        make_table(&engine).await;
        step(&engine, &declare()).await.unwrap();
        let mut stopped_at = BTreeSet::new();
        for _ in 0..KILLS {
            commit_events(&engine, EVENTS).await;
            let test = "subscriptions::a_projection_that_is_killed_again_and_again_has_every_event_once";
            let mut runner = child(test, &folder.store()).spawn().unwrap();
            let before = cursor(&engine).await.position;
            while cursor(&engine).await.position == before {
                assert_eq!(runner.try_wait().unwrap(), None, "it ended by itself");
                thread::sleep(Duration::from_millis(1));
            }
            thread::sleep(Duration::from_millis(fastrand::u64(1..40)));
            runner.kill().unwrap();
            runner.wait().unwrap();
            let position = cursor(&engine).await.position.get();
            is_at(&engine, position).await;
            stopped_at.insert(position);
        }
        println!("killed at {stopped_at:?}");
        assert!(
            stopped_at.iter().any(|position| position % EVENTS != 0),
            "it was never in the midst of things"
        );
        let lease = claim(&engine, "a", HOUR).await.unwrap();
        let projection = engine.projection(|sql, delivery| note(sql, delivery.events()));
        while cursor(&engine).await.position < engine.head().await.unwrap() {
            deliver(&engine, &projection, &lease).await;
        }
        is_at(&engine, KILLS * EVENTS).await;
    });
}

/// A limit on the size of files makes the write inside a commit fail with another error than "disk full".
#[cfg(unix)]
#[test]
fn a_failed_flush_of_a_projection_is_told_as_not_known_and_leaves_both_or_neither() {
    if let Some(path) = as_child() {
        return block_on(async {
            let engine = SqliteEngine::open(path).await.unwrap();
            let lease = claim(&engine, "a", HOUR).await.unwrap();
            let projection = engine.projection(|sql, delivery| note(sql, delivery.events()));
            let error = loop {
                match deliver(&engine, &projection, &lease).await {
                    Outcome::Advanced(moved) => println!("\nat {}", moved.position),
                    Outcome::Refused(error) => break error,
                    other => panic!("{other:?}"),
                }
            };
            assert_eq!(error.kind(), &ErrorKind::OutcomeUnknown);
            assert_eq!(kind(step(&engine, &Step::release(lease)).await), ErrorKind::Closed);
        });
    }
    let folder = Folder::new();
    let engine = block_on(SqliteEngine::open(folder.store())).unwrap();
    block_on(async {
        make_table(&engine).await;
        step(&engine, &declare()).await.unwrap();
        commit_events(&engine, 3_000).await;
        engine.close().await.unwrap();
    });
    let test =
        "subscriptions::a_failed_flush_of_a_projection_is_told_as_not_known_and_leaves_both_or_neither";
    let test = child(test, &folder.store());
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", "ulimit -f 1000; trap '' XFSZ; exec \"$0\" \"$@\""]).arg(test.get_program());
    let output = limited.args(test.get_args()).env("CHILD", folder.store()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let acknowledged =
        said.lines().filter_map(|line| line.strip_prefix("at ")?.parse::<i64>().ok()).max().unwrap();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let position = cursor(&engine).await.position.get();
        assert!((acknowledged..=acknowledged + 3).contains(&position), "{acknowledged}, {position}");
        is_at(&engine, position).await;
    });
}

#[test]
fn who_waits_for_a_declared_subscription_does_not_come_too_early() {
    block_on(async {
        let engine = SqliteEngine::open_in_memory().await.unwrap();
        let store = EventStore::new(engine.clone());
        let wait = |position| store.wait_for_position(at(position), "totals", Duration::from_millis(1));
        assert!(matches!(wait(0).await.map_err(|error| error.kind().clone()), Err(ErrorKind::NotFound)));
        for _ in 0..2 {
            store.subscription("totals").unwrap().declare().await.unwrap();
            wait(0).await.unwrap();
        }
        commit_events(&engine, 3).await;
        assert!(matches!(wait(1).await.map_err(|error| error.kind().clone()), Err(ErrorKind::Unavailable)));
        assert_eq!(cursor(&engine).await.epoch, 0); // not claimed yet
    });
}

/// Every failure that counts loses an event.
fn skipping() -> FailurePolicy {
    let short = Duration::from_millis(5);
    FailurePolicy::new(FailureAction::Skip).with_attempts(1).with_pauses(short, short)
}

#[test]
fn a_projection_that_is_too_slow_gets_fewer_events_and_loses_none() {
    block_on(async {
        let builder = SqliteEngine::builder().sql_timeout(Duration::from_millis(200));
        let engine = builder.open_in_memory().await.unwrap();
        make_table(&engine).await;
        commit_events(&engine, 100).await;
        let sizes = Arc::new(std::sync::Mutex::new(Vec::new()));
        let told = Arc::clone(&sizes);
        let slow = engine.projection(move |sql, delivery| {
            told.lock().unwrap().push(delivery.events().len());
            // 500 ms for all of them.
            thread::sleep(Duration::from_millis(5) * delivery.events().len() as u32);
            note(sql, delivery.events())
        });
        let store = EventStore::new(engine.clone());
        let of = store.subscription("seen").unwrap().on_failure(skipping());
        of.declare().await.unwrap();
        let done = async { store.wait_for_position(at(100), "seen", HOUR).await.unwrap() };
        of.run_sink(done, slow).await.unwrap();
        assert_eq!(seen(&engine).await, (1..=100).collect::<Vec<_>>());
        let sizes = sizes.lock().unwrap();
        assert!(sizes[0] == 100 && sizes[1] == 50, "{sizes:?}");
        assert!(sizes.len() < 20, "not one by one: {sizes:?}");
    });
}

#[test]
fn a_lock_on_the_read_model_never_counts_against_an_event() {
    block_on(async {
        let engine = SqliteEngine::open_in_memory().await.unwrap();
        make_table(&engine).await;
        commit_events(&engine, 5).await;
        let tries = AtomicUsize::new(0);
        let locked = engine.projection(move |sql, delivery| {
            note(sql, delivery.events())?;
            if tries.fetch_add(1, Ordering::SeqCst) < 4 {
                let busy = evercore_sqlite::rusqlite::ffi::Error::new(5);
                return Err(evercore_sqlite::rusqlite::Error::SqliteFailure(busy, None).into());
            }
            Ok(())
        });
        let store = EventStore::new(engine.clone());
        let of = store.subscription("seen").unwrap().on_failure(skipping());
        of.declare().await.unwrap();
        let done = async { store.wait_for_position(at(5), "seen", HOUR).await.unwrap() };
        of.run_sink(done, locked).await.unwrap();
        assert_eq!(seen(&engine).await, [1, 2, 3, 4, 5]);
    });
}

//! Inline projections: their tables equal the log, at every moment, in every process.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use evercore_core::engine::{Batch, Step, SubscriptionStorage};
use evercore_sqlite::rusqlite::Connection;
use evercore_sqlite::{
    Aggregate, AggregateId, BoxError, Builder, CursorId, CursorStatus, ErrorKind, Event, EventStore, Json,
    Position, Result, SqliteEngine, Start, StorageEngine, SubscriptionName,
};

const TABLE: &str = "CREATE TABLE IF NOT EXISTS shop_log (position INTEGER, event TEXT, payload BLOB) STRICT";

#[derive(Debug, PartialEq)]
struct Poisoned(Position);

impl std::fmt::Display for Poisoned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "event {} is poison", self.0)
    }
}

impl std::error::Error for Poisoned {}

/// Copies the log. Fails at an event "Poison", panics at an event "Panic".
fn copy(sql: &Connection, events: &[Event]) -> Result<(), BoxError> {
    sql.execute_batch(TABLE)?;
    let mut insert = sql.prepare_cached("INSERT INTO shop_log VALUES (?1, ?2, ?3)")?;
    for event in events {
        match event.event_type().as_str() {
            "Poison" => return Err(Poisoned(event.position()).into()),
            "Panic" => panic!("on purpose"),
            name => insert.execute((event.position().get(), name, event.payload()))?,
        };
    }
    Ok(())
}

fn with_copy() -> Builder {
    SqliteEngine::builder().inline_projection("copy", 1, copy)
}

fn id() -> CursorId {
    CursorId { subscription: SubscriptionName::new("copy").unwrap(), version: 1, partition: 0 }
}

/// Opens the engine in each mode.
async fn all(folder: &Folder) -> [SqliteEngine; 3] {
    [
        with_copy().open(folder.store()).await.unwrap(),
        with_copy().commit_on_caller_thread(true).open(folder.file("caller.db")).await.unwrap(),
        with_copy().open_in_memory().await.unwrap(),
    ]
}

/// The number of events, and the number of events that the table lacks, has wrongly or has too often.
fn difference(sql: &Connection) -> Result<(i64, i64), BoxError> {
    let compare = "
        SELECT (SELECT count(*) FROM events),
               abs((SELECT count(*) FROM events) - (SELECT count(*) FROM shop_log))
             + (SELECT count(*) FROM (SELECT e.position, t.name, e.payload
                                      FROM events e JOIN event_types t ON t.id = e.event_type_id
                                      EXCEPT SELECT * FROM shop_log))";
    Ok(sql.query_row(compare, [], |row| Ok((row.get(0)?, row.get(1)?)))?)
}

/// Asserts that the table equals the log, with this many events, and the cursor agrees.
async fn is_complete(engine: &SqliteEngine, events: i64) {
    let found = Arc::new(Mutex::new((0, 0)));
    let (store, answer) = (EventStore::new(engine.clone()), Arc::clone(&found));
    let ask = move |sql: &Connection| {
        *answer.lock().unwrap() = difference(sql)?;
        Ok(())
    };
    engine.commit_with(store.begin(), ask).await.unwrap();
    assert_eq!(*found.lock().unwrap(), (events, 0));
    let cursor = engine.cursors(None).await.unwrap().cursors.remove(0);
    assert_eq!((cursor.id, cursor.position.get()), (id(), events));
}

async fn one(engine: &SqliteEngine, aggregate: AggregateId, sequence: i64, name: &str) -> Result<()> {
    let mut batch = Batch::new();
    batch.append(append(aggregate, sequence, vec![event(name, name.as_bytes())]))?;
    engine.commit(batch).await.map(drop)
}

/// Creates an aggregate with this many events, in one commit.
async fn many(engine: &SqliteEngine, count: i64) -> AggregateId {
    let (id, _) = create(engine, None).await.unwrap();
    let mut batch = Batch::new();
    batch.append(append(id, 1, (1..count).map(|_| event("Paid", b"{}")).collect())).unwrap();
    engine.commit(batch).await.unwrap();
    id
}

#[test]
fn the_table_has_what_the_log_has_after_each_commit() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            let (aggregate, _) = create(&engine, None).await.unwrap();
            is_complete(&engine, 1).await;
            one(&engine, aggregate, 1, "NewName").await.unwrap();
            assert!(one(&engine, aggregate, 1, "Stale").await.unwrap_err().is_conflict());
            is_complete(&engine, 2).await;
            many(&engine, 2_500).await;
            is_complete(&engine, 2_502).await;
            let cursor = engine.cursors(None).await.unwrap().cursors.remove(0);
            assert_eq!((cursor.partitions, cursor.owner, cursor.status), (1, None, CursorStatus::Active));
            assert_eq!((cursor.live_from, cursor.epoch), (Some(Position::ZERO), 0));
        }
    });
}

#[test]
fn eight_writers_never_leave_it_behind() {
    const COMMITS: i64 = 40;
    let folder = Folder::new();
    let engine = block_on(with_copy().open(folder.store())).unwrap();
    block_on(create(&engine, None)).unwrap();
    let done = AtomicBool::new(false);
    let looks = thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let file = Connection::open(folder.store()).unwrap();
            let mut looks = 0;
            while !done.load(Ordering::SeqCst) {
                assert_eq!(difference(&file).unwrap().1, 0);
                looks += 1;
            }
            looks
        });
        let write = || {
            let (id, _) = block_on(create(&engine, None)).unwrap();
            (1..COMMITS).for_each(|at| drop(block_on(engine.commit(one_event(id, at))).unwrap()));
        };
        let writers: Vec<_> = (0..8).map(|_| scope.spawn(write)).collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        done.store(true, Ordering::SeqCst);
        looking.join().unwrap()
    });
    println!("{looks} looks");
    assert!(looks > 0);
    block_on(is_complete(&engine, 8 * COMMITS + 1));
}

/// Commits an event of each name, in one flight.
fn together(engine: &SqliteEngine, names: &[&str]) -> Vec<thread::Result<Result<()>>> {
    let ids: Vec<_> = names.iter().map(|_| block_on(create(engine, None)).unwrap().0).collect();
    thread::scope(|scope| {
        let busy = EventStore::new(engine.clone());
        let sleep = |_: &Connection| {
            thread::sleep(Duration::from_millis(200));
            Ok(())
        };
        scope.spawn(move || block_on(engine.commit_with(busy.begin(), sleep)).unwrap());
        thread::sleep(Duration::from_millis(50));
        let commits: Vec<_> = names
            .iter()
            .zip(ids)
            .map(|(name, id)| {
                let commit = move || block_on(one(engine, id, 1, name));
                scope.spawn(move || catch_unwind(AssertUnwindSafe(commit)))
            })
            .collect();
        commits.into_iter().map(|commit| commit.join().unwrap()).collect()
    })
}

#[test]
fn in_a_flight_only_the_unit_at_which_it_fails_is_refused() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            let names = ["Paid", "Poison", "Sent", "Panic", "Paid", "Poison"];
            let outcomes = together(&engine, &names);
            for (name, outcome) in names.iter().zip(outcomes) {
                match (*name, outcome) {
                    ("Poison", Ok(Err(error))) => {
                        assert_eq!(error.kind(), &ErrorKind::Rejected);
                        assert_eq!(error.to_string(), "the inline projection \"copy\" failed");
                        assert!(error.cause::<Poisoned>().is_some());
                    }
                    ("Panic", Err(panic)) => {
                        assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
                    }
                    ("Paid" | "Sent", Ok(Ok(()))) => {}
                    (name, outcome) => panic!("{name}: {outcome:?}"),
                }
            }
            is_complete(&engine, 6 + 3).await;
        }
    });
}

/// The work of the next test's child, until it is killed.
fn commit_for_ever(path: &Path) {
    let engine = block_on(with_copy().open(path)).unwrap();
    let write = || {
        let (id, _) = block_on(create(&engine, None)).unwrap();
        (1..i64::MAX).for_each(|at| drop(block_on(engine.commit(one_event(id, at))).unwrap()));
    };
    thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(write))));
}

#[test]
fn writers_that_are_killed_leave_table_and_log_alike() {
    if let Some(path) = as_child() {
        return commit_for_ever(&path);
    }
    let folder = Folder::new();
    let engine = block_on(with_copy().open(folder.store())).unwrap();
    block_on(create(&engine, None)).unwrap();
    let file = Connection::open(folder.store()).unwrap();
    for _ in 0..5 {
        let (before, _) = difference(&file).unwrap();
        let mut writers = child("inline::writers_that_are_killed_leave_table_and_log_alike", &folder.store())
            .spawn()
            .unwrap();
        while difference(&file).unwrap().0 < before + 20 {
            assert_eq!(writers.try_wait().unwrap(), None, "they ended by themselves");
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(fastrand::u64(1..30)));
        writers.kill().unwrap();
        writers.wait().unwrap();
        let (events, differing) = difference(&file).unwrap();
        assert_eq!(differing, 0);
        block_on(is_complete(&engine, events));
    }
}

#[derive(Clone, Default, serde::Serialize, serde::Deserialize)]
struct Account;

#[derive(serde::Serialize, serde::Deserialize)]
enum AccountEvent {
    Paid,
    Poison,
}
use AccountEvent::{Paid, Poison};

use crate::common::{Folder, append, as_child, block_on, child, create, event, kind, one_event};

impl Aggregate for Account {
    const TYPE: &'static str = "account";
    type Event = AccountEvent;
    type Codec = Json;

    fn apply(&mut self, _: AccountEvent) {}
}

#[test]
fn sql_beside_a_commit_and_the_projection_are_one() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            let store = EventStore::new(engine.clone());
            let table = "CREATE TABLE shop_outbox (message TEXT)";
            engine.commit_with(store.begin(), move |sql| Ok(sql.execute_batch(table)?)).await.unwrap();
            let sends = |sql: &Connection| Ok(sql.execute_batch("INSERT INTO shop_outbox VALUES ('x')")?);
            for (event, is_fine) in [(Paid, true), (Poison, false), (Paid, true)] {
                let mut work = store.begin();
                let mut account = work.create::<Account>().await.unwrap();
                work.record(&mut account, event).unwrap();
                let outcome = engine.commit_with(work, sends).await;
                assert_eq!(outcome.is_ok(), is_fine, "{outcome:?}");
            }
            let count = |sql: &Connection| {
                let count: i64 = sql.query_row("SELECT count(*) FROM shop_outbox", [], |row| row.get(0))?;
                assert_eq!(count, 2);
                Ok(())
            };
            engine.commit_with(store.begin(), count).await.unwrap();
            is_complete(&engine, 2).await;
        }
    });
}

#[test]
fn an_old_store_is_caught_up_when_it_is_opened() {
    let folder = Folder::new();
    block_on(async {
        let plain = SqliteEngine::open(folder.store()).await.unwrap();
        many(&plain, 2_500).await;
        let pages = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&pages);
        let builder = SqliteEngine::builder().inline_projection("copy", 1, move |sql, events| {
            noted.lock().unwrap().push(events.len());
            copy(sql, events)
        });
        let engine = builder.clone().open(folder.store()).await.unwrap();
        assert_eq!(*pages.lock().unwrap(), [1_000, 1_000, 500]);
        is_complete(&engine, 2_500).await;
        drop(engine);
        drop(builder.open(folder.store()).await.unwrap());
        assert_eq!(pages.lock().unwrap().len(), 3, "there was nothing to do");
    });
}

#[test]
fn what_others_commit_without_it_is_caught_up_by_the_next_commit() {
    let folder = Folder::new();
    block_on(async {
        let engine = with_copy().open(folder.store()).await.unwrap();
        let plain = SqliteEngine::open(folder.store()).await.unwrap();
        let id = many(&plain, 1_500).await;
        one(&plain, id, 1_500, "OfAnother").await.unwrap();
        one(&engine, id, 1_501, "Mine").await.unwrap();
        is_complete(&engine, 1_502).await;
        let also = with_copy().open(folder.store()).await.unwrap();
        for sequence in 1_502..1_520 {
            let engine = if sequence % 2 == 0 { &also } else { &engine };
            one(engine, id, sequence, "InTurn").await.unwrap();
        }
        is_complete(&engine, 1_520).await;
    });
}

/// It misses neither the commits of an engine without it, nor other writes of this engine.
#[test]
fn one_that_is_far_behind_does_not_hold_up_what_others_write() {
    const PAGES: i64 = 10;
    let folder = Folder::new();
    for on_caller in [false, true] {
        let path = folder.file(&format!("{on_caller}.db"));
        let slow = SqliteEngine::builder().inline_projection("copy", 1, |sql, events| {
            thread::sleep(Duration::from_micros(100) * u32::try_from(events.len()).unwrap());
            copy(sql, events)
        });
        let engine = block_on(slow.commit_on_caller_thread(on_caller).open(&path)).unwrap();
        let plain = block_on(SqliteEngine::open(&path)).unwrap();
        let id = block_on(many(&plain, PAGES * 1_000));
        thread::scope(|scope| {
            let behind = scope.spawn(|| block_on(one(&engine, id, PAGES * 1_000, "Behind")));
            thread::sleep(Duration::from_millis(150));
            let (began, reserving) = (Instant::now(), &engine);
            let same = scope.spawn(move || {
                block_on(reserving.reserve(1)).unwrap();
                began.elapsed()
            });
            block_on(create(&plain, None)).unwrap();
            let took = [began.elapsed(), same.join().unwrap()];
            assert!(took.iter().all(|took| *took < Duration::from_millis(700)), "{took:?}");
            assert!(!behind.is_finished());
            behind.join().unwrap().unwrap();
        });
        block_on(is_complete(&engine, PAGES * 1_000 + 2));
    }
}

#[test]
fn a_failure_while_opening_is_told_and_what_was_done_is_kept() {
    let folder = Folder::new();
    block_on(async {
        let plain = SqliteEngine::open(folder.store()).await.unwrap();
        let id = many(&plain, 1_200).await;
        one(&plain, id, 1_200, "Poison").await.unwrap();
        for _ in 0..2 {
            let error = with_copy().open(folder.store()).await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Rejected);
            assert_eq!(error.cause(), Some(&Poisoned(Position::new(1_201).unwrap())));
        }
        let cursor = plain.cursors(None).await.unwrap().cursors.remove(0);
        assert_eq!(cursor.position.get(), 1_000);
        let lenient =
            SqliteEngine::builder().inline_projection("copy", 1, |sql, events| match copy(sql, events) {
                Err(error) if error.is::<Poisoned>() => Ok(()),
                other => other,
            });
        lenient.open(folder.store()).await.unwrap();
        let cursor = plain.cursors(None).await.unwrap().cursors.remove(0);
        assert_eq!(cursor.position.get(), 1_201);
    });
    let folder = Folder::new();
    let plain = block_on(SqliteEngine::open(folder.store())).unwrap();
    let (id, _) = block_on(create(&plain, None)).unwrap();
    block_on(one(&plain, id, 1, "Panic")).unwrap();
    for builder in [with_copy(), with_copy().commit_on_caller_thread(true)] {
        let open = || block_on(builder.open(folder.store()));
        let panic = catch_unwind(AssertUnwindSafe(open)).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
    }
}

#[test]
fn several_projections_and_versions_go_their_own_way() {
    let folder = Folder::new();
    block_on(async {
        let engine = with_copy().open(folder.store()).await.unwrap();
        many(&engine, 10).await;
        let counted = [Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0))];
        let mut builder = with_copy();
        for (version, counted) in (1..).zip(&counted) {
            let counted = Arc::clone(counted);
            builder = builder.inline_projection("count", version, move |_, events| {
                counted.fetch_add(events.len(), Ordering::SeqCst);
                Ok(())
            });
        }
        let both = builder.open(folder.store()).await.unwrap();
        create(&both, None).await.unwrap();
        assert!(counted.iter().all(|counted| counted.load(Ordering::SeqCst) == 11));
        let cursors = both.cursors(None).await.unwrap().cursors;
        let found: Vec<_> = cursors.iter().map(|it| (it.id.version, it.position.get())).collect();
        assert_eq!(found, [(1, 11), (1, 11), (2, 11)]);
    });
}

#[test]
fn while_its_cursor_is_paused_it_waits() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            let (aggregate, _) = create(&engine, None).await.unwrap();
            engine.step(&id(), &Step::Pause).await.unwrap();
            one(&engine, aggregate, 1, "Paid").await.unwrap();
            assert_eq!(engine.cursors(None).await.unwrap().cursors[0].position.get(), 1);
            engine.step(&id(), &Step::Resume).await.unwrap();
            one(&engine, aggregate, 2, "Paid").await.unwrap();
            is_complete(&engine, 3).await;
        }
    });
}

#[test]
fn after_a_reset_the_next_commit_fills_the_table_anew() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            let aggregate = many(&engine, 1_500).await;
            let store = EventStore::new(engine.clone());
            let empty = |sql: &Connection| Ok(sql.execute_batch("DELETE FROM shop_log")?);
            engine.commit_with(store.begin(), empty).await.unwrap();
            engine.step(&id(), &Step::reset(Position::ZERO)).await.unwrap();
            one(&engine, aggregate, 1_500, "Paid").await.unwrap();
            is_complete(&engine, 1_501).await;
        }
    });
}

#[test]
fn a_table_is_filled_anew_by_pause_reset_empty_resume_while_others_commit() {
    let folder = Folder::new();
    block_on(async {
        for engine in all(&folder).await {
            let aggregate = many(&engine, 20).await;
            let store = EventStore::new(engine.clone());
            store.pause_subscription("copy").await.unwrap();
            one(&engine, aggregate, 20, "Paid").await.unwrap();
            store.reset_subscription("copy", Start::Beginning).await.unwrap();
            one(&engine, aggregate, 21, "Paid").await.unwrap();
            let empty = |sql: &Connection| Ok(sql.execute_batch("DELETE FROM shop_log")?);
            engine.commit_with(store.begin(), empty).await.unwrap();
            one(&engine, aggregate, 22, "Paid").await.unwrap();
            store.resume_subscription("copy").await.unwrap();
            one(&engine, aggregate, 23, "Paid").await.unwrap();
            is_complete(&engine, 24).await;
        }
    });
}

#[test]
fn a_projection_that_takes_too_long_or_ends_the_transaction_refuses_the_commit() {
    block_on(async {
        let builder = with_copy().sql_timeout(Duration::from_millis(100));
        let builder = builder.inline_projection("bad", 1, |sql, events| {
            for event in events {
                match event.event_type().as_str() {
                    "Slow" => thread::sleep(Duration::from_millis(150)),
                    "Ends" => drop(sql.execute_batch("COMMIT")),
                    _ => {}
                }
            }
            Ok(())
        });
        let engine = builder.open_in_memory().await.unwrap();
        let (aggregate, _) = create(&engine, None).await.unwrap();
        assert_eq!(kind(one(&engine, aggregate, 1, "Slow").await), ErrorKind::Rejected);
        assert_eq!(kind(one(&engine, aggregate, 1, "Ends").await), ErrorKind::Invalid);
        one(&engine, aggregate, 1, "Paid").await.unwrap();
        let cursors = engine.cursors(None).await.unwrap().cursors;
        assert!(cursors.iter().all(|cursor| cursor.position.get() == 2));
    });
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_made() {
    let folder = Folder::new();
    let open = |path: &Path, builder: Builder| kind(block_on(builder.open(path)));
    let make = |name: &str, version| SqliteEngine::builder().inline_projection(name, version, copy);
    assert_eq!(open(&folder.store(), make("", 1)), ErrorKind::InvalidName);
    assert_eq!(open(&folder.store(), make("copy", 0)), ErrorKind::Invalid);
    assert_eq!(open(&folder.store(), with_copy().inline_projection("copy", 1, copy)), ErrorKind::Invalid);
    assert_eq!(kind(block_on(make("copy", 0).open_in_memory())), ErrorKind::Invalid);
    assert!(!folder.store().exists());
    drop(block_on(SqliteEngine::open(folder.store())).unwrap());
    assert_eq!(open(&folder.store(), with_copy().read_only(true)), ErrorKind::Invalid);
}

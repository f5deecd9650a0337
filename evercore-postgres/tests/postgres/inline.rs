//! Inline projections: they equal the log at every moment, beside operators, other processes and slow handlers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evercore_core::engine::{Step, SubscriptionStorage};
use evercore_postgres::{CursorId, ErrorKind, EventStore, Position, StorageEngine};

use crate::common::{Place, block_on};
use crate::fixture::*;
use crate::orders::{
    NotToday, Order, OrderEvent, all_of, kind, noted, own, place, place_with, positions, up_to,
};

#[test]
fn one_that_was_removed_while_the_engine_runs_is_left_alone() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        drop(place.engine().await);
        let table = table(&place);
        let with = || place.builder().inline_projection("inline", 1, noting(&table, Duration::ZERO));
        let engine = with().connect(&place.url).await.unwrap();
        let store = EventStore::new(engine.clone());
        self::place(&store, "first").await.unwrap();
        place_with(&engine, "first", own("SELECT 1")).await.unwrap();
        store.remove_subscription("inline").await.unwrap();
        self::place(&store, "first").await.unwrap();
        place_with(&engine, "first", own("SELECT 1")).await.unwrap();
        assert_eq!((positions(&engine).await, seen(&place)), (up_to(4), up_to(2)));
        assert!(engine.cursors(None).await.unwrap().cursors.is_empty());
        // A new connection begins again.
        place.psql("TRUNCATE @seen");
        let again = with().connect(&place.url).await.unwrap();
        assert_eq!(seen(&place), up_to(4));
        // And the running engine goes on with it.
        self::place(&store, "first").await.unwrap();
        self::place(&EventStore::new(again), "first").await.unwrap();
        assert_eq!(seen(&place), up_to(6));
    });
}

/// With SQL of the user as in a plain commit: the server does not close the connection as idle.
#[test]
fn one_that_waits_for_something_else_for_too_long_is_rejected() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        drop(place.engine().await);
        let blocking = handler(|_, _| {
            Box::pin(async {
                tokio::task::block_in_place(|| std::thread::sleep(Duration::from_millis(900)));
                Ok(())
            })
        });
        let with = place.builder().sql_timeout(Duration::from_millis(300));
        let engine = with.inline_projection("idle", 1, blocking).connect(&place.url).await.unwrap();
        let store = EventStore::new(engine.clone());
        for outcome in [self::place(&store, "a").await, place_with(&engine, "b", own("SELECT 1")).await] {
            let error = outcome.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Rejected, "{}", all_of(&error));
            assert!(error.to_string().contains("took longer"), "{error}");
        }
        assert_eq!(engine.head().await.unwrap(), Position::ZERO);
    });
}

/// The handler holds the log: a process that hangs there must not stop others for longer than their time-out.
#[test]
fn one_that_stands_still_does_not_stop_the_commits_of_others() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let with = || {
            let with = place.builder().sql_timeout(Duration::from_millis(500));
            with.statement_timeout(Duration::from_secs(2))
        };
        let plain = with().connect(&place.url).await.unwrap();
        let is_first = AtomicBool::new(true);
        let standing = handler(move |_, _| {
            let is_first = is_first.swap(false, Ordering::AcqRel);
            Box::pin(async move {
                if is_first {
                    tokio::task::block_in_place(|| std::thread::sleep(Duration::from_secs(4)));
                }
                Ok(())
            })
        });
        let engine = with().inline_projection("still", 1, standing).connect(&place.url).await.unwrap();
        let still = tokio::spawn(async move { self::place(&EventStore::new(engine), "still").await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        let began = Instant::now();
        let outcome = self::place(&EventStore::new(plain.clone()), "plain").await;
        outcome.unwrap_or_else(|error| panic!("{}", all_of(&error)));
        assert!(began.elapsed() < Duration::from_millis(1_900), "{:?}", began.elapsed());
        let error = still.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Rejected, "{}", all_of(&error));
        assert_eq!(positions(&plain).await, [1]);
    });
}

#[test]
fn one_may_connect_while_others_commit() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        drop(place.engine().await);
        let table = table(&place);
        let with = || {
            let noting = noting(&table, Duration::from_millis(10));
            place.builder().inline_projection("inline", 1, noting)
        };
        let engine = with().connect(&place.url).await.unwrap();
        let is_done = Arc::new(AtomicBool::new(false));
        let writers = (0..3).map(|writer| {
            let (store, is_done) = (EventStore::new(engine.clone()), Arc::clone(&is_done));
            tokio::spawn(async move {
                while !is_done.load(Ordering::Acquire) {
                    self::place(&store, &format!("order {writer}")).await.unwrap();
                }
            })
        });
        let writers: Vec<_> = writers.collect();
        for _ in 0..20 {
            let other = with().connect(&place.url).await.unwrap_or_else(|error| panic!("{}", all_of(&error)));
            self::place(&EventStore::new(other), "other").await.unwrap();
        }
        is_done.store(true, Ordering::Release);
        for writer in writers {
            writer.await.unwrap();
        }
        let log = positions(&engine).await;
        assert_eq!(seen(&place), log);
    });
}

/// Commits of engines without the projection are caught up with before the log is locked.
#[test]
fn one_that_is_far_behind_does_not_hold_up_the_commits_of_others() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let plain = EventStore::new(place.engine().await);
        let table = table(&place);
        let noting = noting(&table, Duration::from_millis(200));
        let engine = place.builder().inline_projection("slow", 1, noting).connect(&place.url).await.unwrap();
        self::place(&plain, "beside").await.unwrap();
        for way in 0..2 {
            let mut work = plain.begin();
            let mut order = work.create_with_key::<Order>(format!("many {way}")).await.unwrap();
            work.record_all(&mut order, (0..10_000).map(|_| OrderEvent::Placed)).unwrap();
            work.commit().await.unwrap();
            let behind = engine.clone();
            let behind = tokio::spawn(async move {
                match way {
                    0 => self::place(&EventStore::new(behind), "behind").await,
                    _ => place_with(&behind, "behind", own("SELECT 1")).await,
                }
            });
            tokio::time::sleep(Duration::from_millis(300)).await;
            let began = Instant::now();
            self::place(&plain, "beside").await.unwrap();
            let took = began.elapsed();
            assert!(took < Duration::from_millis(900), "{took:?}");
            behind.await.unwrap().unwrap_or_else(|error| panic!("{}", all_of(&error)));
        }
        assert_eq!(seen(&place).len(), positions(&engine).await.len());
    });
}

#[test]
fn an_inline_projection_equals_the_log_at_every_moment() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        drop(place.engine().await);
        let table = table(&place);
        let engine = async || {
            let with = place.builder().inline_projection("inline", 1, noting(&table, Duration::ZERO));
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
            // With SQL of the user in the commit.
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
        let (kept, inner) = (Arc::clone(&sizes), noting(&table, Duration::ZERO));
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
        // Another process commits without the projection, with a name that is new here, and with more events than a
        // page holds.
        fill(&plain, 1_200).await;
        place_with(&plain, "other", own("SELECT 1")).await.unwrap();
        assert_eq!(seen(&place), up_to(2_300));
        self::place(&EventStore::new(engine.clone()), "first").await.unwrap();
        assert_eq!(seen(&place), up_to(3_502));
        assert_eq!(sizes.lock().unwrap().split_off(0), [1_000, 202]);
        // It is left out while it is paused, and then catches up.
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

//! Inline projections beside operators, other processes and slow handlers.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

mod common;
mod orders;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Place, block_on};
use evercore_postgres::tokio_postgres::Transaction;
use evercore_postgres::{
    BoxError, BoxFuture, ErrorKind, Event, EventStore, Position, Result, StorageEngine, SubscriptionStorage,
};
use orders::{Order, OrderEvent, all_of, own, place, place_with, positions, up_to};

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

/// Writes down which events come, and takes its time.
fn noting(
    table: &str,
    pause: Duration,
) -> impl for<'t> Fn(&'t Transaction<'t>, &'t [Event]) -> BoxFuture<'t, Result<(), BoxError>>
+ Clone
+ Send
+ Sync
+ 'static {
    let note = format!("INSERT INTO {table} SELECT unnest($1::bigint[])");
    handler(move |sql, events| {
        let note = note.clone();
        Box::pin(async move {
            let positions: Vec<i64> = events.iter().map(|event| event.position().get()).collect();
            sql.execute(&note, &[&positions]).await?;
            tokio::time::sleep(pause).await;
            Ok(())
        })
    })
}

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
        store.remove_subscription("inline", 1).await.unwrap();
        self::place(&store, "first").await.unwrap();
        place_with(&engine, "first", own("SELECT 1")).await.unwrap();
        assert_eq!((positions(&engine).await, seen(&place)), (up_to(4), up_to(2)));
        assert!(engine.cursors(None).await.unwrap().cursors.is_empty());
        // Who connects again begins again.
        place.psql("TRUNCATE @seen");
        let again = with().connect(&place.url).await.unwrap();
        assert_eq!(seen(&place), up_to(4));
        // And the one that runs goes on with it.
        self::place(&store, "first").await.unwrap();
        self::place(&EventStore::new(again), "first").await.unwrap();
        assert_eq!(seen(&place), up_to(6));
    });
}

/// As in a commit alone, so beside SQL of one's own: the server does not take the client for gone.
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

/// It holds the log: a process that stands still there must not stop all others for longer than they wait.
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

/// What others have committed without it is caught up with before the log is locked.
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

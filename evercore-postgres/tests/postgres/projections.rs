//! Projections that a subscription fills: their rows are written with the cursor or not at all.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use evercore_core::engine::{Outcome, Step, SubscriptionStorage};
use evercore_postgres::{ErrorKind, EventStore, FailureAction, FailurePolicy};
use futures_lite::FutureExt;

use crate::common::block_on;
use crate::fixture::*;
use crate::orders::{NotToday, soon, up_to};

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
            let policy =
                FailurePolicy::new(FailureAction::ParkAlone).with_pauses(Duration::ZERO, Duration::ZERO);
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
            // Again, with a lost lease.
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

/// The server would close the connection as idle. A handler that blocks its thread also stops the timer of the
/// engine.
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

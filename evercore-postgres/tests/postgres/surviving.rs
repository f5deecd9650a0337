//! Runs that go on while the server takes no writes, and while the tables of a projection are slow or locked.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use evercore_postgres::{EventStore, FailureAction, FailurePolicy, RunEnd, Subscription};
use evercore_testkit::postgres::Server;
use tokio::sync::watch;

use crate::common::{Place, block_on};
use crate::fixture::*;
use crate::orders::{soon, up_to};

const SHORT: Duration = Duration::from_millis(20);

/// Every failure that counts loses an event.
fn skipping(store: &EventStore) -> Subscription {
    let policy = FailurePolicy::new(FailureAction::Skip).with_attempts(1).with_pauses(SHORT, SHORT);
    store.subscription("seen").unwrap().on_failure(policy)
}

#[test]
fn five_runners_outlast_a_server_that_takes_no_writes_for_a_while() {
    block_on(async {
        let Some(server) = Server::builder().start_or_skip() else { return };
        let at_server = Place::on(server.url());
        let engine = at_server.engine().await;
        fill(&engine, 5).await;
        let (stop, stopped) = watch::channel(false);
        let handled: Vec<_> = (0..5).map(|_| Arc::new(AtomicUsize::new(0))).collect();
        let mut runs = Vec::new();
        for (nth, handled) in handled.iter().enumerate() {
            let store = EventStore::new(at_server.engine().await);
            let (mut stopped, handled) = (stopped.clone(), Arc::clone(handled));
            runs.push(tokio::spawn(async move {
                let of = store.subscription(format!("runner {nth}"))?.with_lease(Duration::from_millis(900));
                let shutdown = async move { drop(stopped.wait_for(|stop| *stop).await) };
                of.run(shutdown, move |event| {
                    handled.fetch_max(event.position().get() as usize, Ordering::SeqCst);
                    async { Ok(()) }
                })
                .await
            }));
        }
        let all_at = |position| handled.iter().all(|handled| handled.load(Ordering::SeqCst) == position);
        soon("all have handled the first events", async || all_at(5)).await;
        let end_sessions = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                            WHERE datname = 'postgres' AND pid <> pg_backend_pid()";
        let set = |to: &str| {
            server
                .psql(
                    "template1",
                    &format!("ALTER DATABASE postgres SET default_transaction_read_only = {to}"),
                )
                .unwrap();
            server.psql("template1", end_sessions).unwrap();
        };
        set("on");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(runs.iter().all(|run| !run.is_finished()), "a runner has ended");
        set("off");
        soon("writes go through again", async || {
            let store = EventStore::new(engine.clone());
            let one = |_: &crate::orders::Order| vec![crate::orders::noted("after".to_owned())];
            store.update_or_create::<crate::orders::Order, _, _>("filled", one).await.is_ok()
        })
        .await;
        soon("all go on", async || all_at(6)).await;
        stop.send_replace(true);
        for run in runs {
            assert_eq!(run.await.unwrap().unwrap(), RunEnd::ShutDown);
        }
    });
}

#[test]
fn a_projection_that_is_too_slow_gets_fewer_events_and_loses_none() {
    block_on(async {
        for (place, engine) in all(|builder| builder.sql_timeout(Duration::from_millis(400))).await {
            let table = table(&place);
            fill(&engine, 100).await;
            let slow = engine.projection(move |sql, delivery| {
                let table = table.clone();
                Box::pin(async move {
                    note(sql, &table, delivery.events()).await?;
                    // 1.5 s for all of them.
                    tokio::time::sleep(Duration::from_millis(15) * delivery.events().len() as u32).await;
                    Ok(())
                })
            });
            let store = EventStore::new(engine.clone());
            let of = skipping(&store);
            of.declare().await.unwrap();
            let done = async { store.wait_for_position(at(100), "seen", TIME).await.unwrap() };
            of.run_sink(done, slow).await.unwrap();
            assert_eq!(seen(&place), up_to(100));
        }
    });
}

#[test]
fn a_lock_on_the_read_model_never_counts_against_an_event() {
    block_on(async {
        for (place, engine) in all(|builder| builder).await {
            let table = table(&place);
            fill(&engine, 5).await;
            let mut other = engine.pool().get().await.unwrap();
            // As CREATE INDEX does.
            let lock = other.transaction().await.unwrap();
            lock.batch_execute(&format!("LOCK TABLE {table} IN SHARE MODE")).await.unwrap();
            let tries = Arc::new(AtomicUsize::new(0));
            let tried = Arc::clone(&tries);
            let impatient = engine.projection(move |sql, delivery| {
                let (table, tries) = (table.clone(), Arc::clone(&tried));
                Box::pin(async move {
                    tries.fetch_add(1, Ordering::SeqCst);
                    sql.batch_execute("SET LOCAL lock_timeout = '20ms'").await?;
                    note(sql, &table, delivery.events()).await
                })
            });
            let store = EventStore::new(engine.clone());
            let of = skipping(&store);
            of.declare().await.unwrap();
            let done = async {
                soon("it has failed some times", async || tries.load(Ordering::SeqCst) >= 4).await;
                lock.rollback().await.unwrap();
                store.wait_for_position(at(5), "seen", TIME).await.unwrap();
            };
            of.run_sink(done, impatient).await.unwrap();
            assert_eq!(seen(&place), up_to(5));
        }
    });
}

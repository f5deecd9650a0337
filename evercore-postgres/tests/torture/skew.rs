//! Write skew: two units that each read what the other one writes.

use std::sync::Arc;

use evercore_postgres::{AggregateId, EventStore, PostgresEngine, Receipt, Result, UnitOfWork};
use evercore_testkit::postgres::Server;
use tokio::sync::Barrier;

use crate::load::{BESIDE, beside};
use crate::tools::{Account, accounts, number, patient_not, record};

const ROUNDS: i64 = 100;

/// At most one of the two accounts may get a second event.
#[tokio::test(flavor = "multi_thread")]
async fn guards_prevent_write_skew() {
    let Some(server) = Server::builder().start_or_skip() else { return };
    server.psql("postgres", BESIDE).unwrap();
    let one = PostgresEngine::connect(&server.url()).await.unwrap();
    let other = PostgresEngine::connect(&server.url()).await.unwrap();
    for guards in [true, false] {
        let (mut violations, mut progress) = (0_i64, 0_i64);
        for round in 0..ROUNDS {
            let number = number(usize::from(guards), round * 4);
            let ids = accounts(&EventStore::new(one.clone()), 2, number).await;
            // Of one engine, whose commits share flights, and of two engines.
            let second = if round % 2 == 0 { &one } else { &other };
            let barrier = Arc::new(Barrier::new(2));
            let first =
                tokio::spawn(take(one.clone(), [ids[0], ids[1]], number + 1, guards, Arc::clone(&barrier)));
            let second = tokio::spawn(take(second.clone(), [ids[1], ids[0]], number + 2, guards, barrier));
            let outcomes = [first.await.unwrap(), second.await.unwrap()];
            let done = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
            violations += i64::from(done == 2);
            progress += i64::from(done > 0);
            for error in outcomes.into_iter().filter_map(Result::err) {
                assert!(error.is_conflict(), "{error:?}");
            }
        }
        println!(
            "write skew, guards {guards}: {violations} violations in {ROUNDS} rounds, progress in {progress}"
        );
        assert_eq!(progress, ROUNDS, "both were refused");
        if guards {
            assert_eq!(violations, 0);
        } else {
            assert!(violations > 0, "blind: not even without guards was there a violation");
        }
    }
}

/// Reads both and waits until the other unit has read both. Then it writes to the first account if neither has a
/// second event.
async fn take(
    engine: PostgresEngine,
    ids: [AggregateId; 2],
    number: i64,
    guards: bool,
    barrier: Arc<Barrier>,
) -> Result<Receipt> {
    let mut work = patient_not(&engine).begin();
    let (mine, others) = (work.load::<Account>(ids[0]).await?, work.load::<Account>(ids[1]).await?);
    assert_eq!((mine.events, others.events), (1, 1));
    if guards {
        work.guard(&others).unwrap();
    }
    record(&mut work, &mut [mine], number, 1);
    barrier.wait().await;
    commit(&engine, work, number).await
}

async fn commit(engine: &PostgresEngine, work: UnitOfWork, number: i64) -> Result<Receipt> {
    if number % 3 == 0 { beside(engine, work, number, 0, false).await } else { work.commit().await }
}

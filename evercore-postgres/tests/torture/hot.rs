//! Writers that all need the same few aggregates, or the same one.

use std::sync::Arc;
use std::time::Instant;

use evercore_postgres::{
    AggregateId, AggregateType, EventStore, EventType, KnownType, PostgresEngine, Result, RetryPolicy,
    StorageEngine,
};
use evercore_testkit::postgres::Server;
use tokio::task::JoinSet;

use crate::book::{Book, Fate};
use crate::load::{BESIDE, beside};
use crate::log::Log;
use crate::tools::{Account, AccountEvent, Part, accounts, number, sized, unit};

/// The default policy without a last attempt, because the number of conflicts depends on the machine.
const UNTIL_IT_LANDS: RetryPolicy = RetryPolicy::new().with_attempts(1_000);

const WRITERS: usize = 12;
const AGGREGATES: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn units_over_three_of_eight_aggregates_all_land_and_none_deadlocks() {
    three_of_eight(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn units_over_three_of_eight_aggregates_from_three_engines_all_land_and_none_deadlocks() {
    three_of_eight(3).await;
}

async fn three_of_eight(engines: usize) {
    let Some(server) = Server::builder().start_or_skip() else { return };
    server.psql("postgres", BESIDE).unwrap();
    let mut all = Vec::new();
    for _ in 0..engines {
        all.push(PostgresEngine::connect(&server.url()).await.unwrap());
    }
    let store = EventStore::new(all[0].clone());
    let ids = accounts(&store, AGGREGATES, number(0, 0)).await;
    let (book, begun, mut writers) = (Arc::new(Book::default()), Instant::now(), JoinSet::new());
    let units = sized(240, 720);
    for writer in 0..WRITERS {
        let engine = all[writer % engines].clone();
        writers.spawn(deal(engine, writer, units / WRITERS, ids.clone(), Arc::clone(&book)));
    }
    writers.join_all().await;
    let took = begun.elapsed();
    let log = Log::read(&store).await;
    let faults = book.against(&log);
    let deadlocks = server.log().matches("deadlock detected").count();
    println!(
        "three of eight, {engines} engines: {} of {units} units landed in {took:.1?} ({}), {deadlocks} deadlocks, {faults}",
        log.units().len() - 1,
        book.counts()
    );
    assert_eq!((book.acknowledged(), log.units().len()), (units, units + 1));
    assert_eq!(deadlocks, 0);
    faults.assert_none();
}

/// Writes this writer's share of the units, and repeats each until it commits.
async fn deal(
    engine: PostgresEngine,
    writer: usize,
    units: usize,
    mut ids: Vec<AggregateId>,
    book: Arc<Book>,
) {
    let store = EventStore::new(engine.clone()).with_retry(UNTIL_IT_LANDS);
    for nth in 0..i64::try_from(units).unwrap() {
        let (number, mut attempts) = (number(writer + 1, nth), 0);
        let landed = store.retry(|| {
            attempts += 1;
            fastrand::shuffle(&mut ids);
            let three = [ids[0], ids[1], ids[2]];
            one(&engine, &store, three, number)
        });
        book.note(number, landed.await.unwrap());
        (1..attempts).for_each(|_| book.count("conflicts"));
    }
}

/// Sometimes with a row of the user, or while another session holds a lock.
async fn one(
    engine: &PostgresEngine,
    store: &EventStore,
    ids: [AggregateId; 3],
    number: i64,
) -> Result<Fate> {
    let work = unit(store, &ids, number, 6).await?;
    let receipt = match number % 12 {
        0 => beside(engine, work, number, 0, false).await?,
        1 => {
            let event_types = vec![EventType::new("new")?];
            let new = KnownType { aggregate_type: AggregateType::new(format!("new {number}"))?, event_types };
            engine.warmup(&[new]).await?;
            work.commit().await?
        }
        2 => {
            engine.reserve(1).await?;
            work.commit().await?
        }
        _ => work.commit().await?,
    };
    Ok(Fate::from(&receipt))
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_writers_on_one_aggregate_lose_no_update() {
    const WRITERS: usize = 16;
    let Some(server) = Server::builder().durable(true).start_or_skip() else { return };
    let store =
        EventStore::new(PostgresEngine::connect(&server.url()).await.unwrap()).with_retry(UNTIL_IT_LANDS);
    let id = accounts(&store, 1, number(0, 0)).await[0];
    let (each, begun, mut writers) = (sized(20, 250), Instant::now(), JoinSet::new());
    for writer in 1..=WRITERS {
        let store = store.clone();
        writers.spawn(async move {
            let mut attempts = Vec::new();
            for nth in 0..each {
                let mut decisions = 0;
                let decide = |account: &Account| {
                    decisions += 1;
                    assert!(account.events > 0);
                    [AccountEvent::Credited(Part { unit: number(writer, nth), nth: 0, of: 1 })]
                };
                store.update(id, decide).await.unwrap();
                attempts.push(decisions);
            }
            attempts
        });
    }
    let attempts: Vec<usize> = writers.join_all().await.into_iter().flatten().collect();
    let (took, commits) = (begun.elapsed(), WRITERS * usize::try_from(each).unwrap());
    let sequence = store.load::<Account>(id).await.unwrap().sequence().get();
    println!(
        "one hot aggregate, {WRITERS} writers: {commits} commits, {:.0}/s, {:.1} attempts for each, at most {}, {} over 20",
        commits as f64 / took.as_secs_f64(),
        attempts.iter().sum::<usize>() as f64 / commits as f64,
        attempts.iter().max().unwrap(),
        attempts.iter().filter(|attempts| **attempts > RetryPolicy::default().attempts as usize).count()
    );
    assert_eq!(usize::try_from(sequence).unwrap(), commits + 1);
    assert_eq!(Log::read(&store).await.units().len(), commits + 1);
}

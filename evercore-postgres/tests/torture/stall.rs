//! Other sessions hold locks that a commit needs, for longer than its time-out.

use std::time::{Duration, Instant};

use evercore_postgres::{
    AggregateId, AggregateType, Error, ErrorKind, EventStore, EventType, KnownType, LogQuery, Position,
    PostgresEngine, Result, StorageEngine, UnitOfWork,
};
use evercore_testkit::postgres::{Proxy, Server};

use crate::book::{Book, Fate};
use crate::load::{BESIDE, beside};
use crate::log::Log;
use crate::tools::{
    Account, accounts, command, connect, is_trouble, milliseconds, number, patient_not, sized, unit, word,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_held_for_too_long_is_unavailable_and_leaves_the_connections_whole() {
    let Some(server) = Server::builder().start_or_skip() else { return };
    server.psql("postgres", BESIDE).unwrap();
    let builder = PostgresEngine::builder().pool_size(3).statement_timeout(milliseconds(300));
    let engine = builder.connect(&server.url()).await.unwrap();
    let (store, mut rival, book) = (patient_not(&engine), connect(&server.url()).await, Book::default());
    let ids = accounts(&store, 3, number(0, 0)).await;
    let mut refused = 0;
    let rounds = sized(3, 30);
    for round in 0..rounds {
        for what in ["commits", "names"] {
            let lock = rival.transaction().await.unwrap();
            lock.execute("SELECT one FROM evercore.log_end FOR UPDATE", &[]).await.unwrap();
            let name = AggregateType::new(format!("new {round}")).unwrap();
            let event_types = vec![EventType::new("new").unwrap()];
            if what == "names" {
                let new = KnownType { aggregate_type: name, event_types };
                refused += assert_unavailable(&engine.warmup(&[new]).await.unwrap_err());
            } else {
                for nth in 0..3 {
                    let number = number(1, round * 10 + nth);
                    let mut work = unit(&store, &ids[..2], number, 4).await.unwrap();
                    if nth == 1 {
                        work.guard(&store.load::<Account>(ids[2]).await.unwrap()).unwrap();
                    }
                    let outcome = match nth {
                        2 => beside(&engine, work, number, 0, false).await,
                        _ => work.commit().await,
                    };
                    refused += assert_unavailable(&outcome.unwrap_err());
                    book.note(number, Fate::Never);
                }
            }
            lock.rollback().await.unwrap();
            // The connection that it gets works, whichever it is.
            for nth in 3..7 {
                let number = number(1, round * 10 + nth + if what == "names" { 1_000_000 } else { 0 });
                let receipt = unit(&store, &ids, number, 3).await.unwrap().commit().await.unwrap();
                book.note(number, Fate::from(&receipt));
            }
        }
    }
    let log = Log::read(&EventStore::new(engine)).await;
    let faults = book.against(&log);
    println!(
        "locks held too long: {rounds} rounds, {refused} refused, {} went well after, {faults}",
        book.acknowledged()
    );
    faults.assert_none();
}

fn assert_unavailable(error: &Error) -> usize {
    assert_eq!(*error.kind(), ErrorKind::Unavailable, "{error:?}");
    1
}

/// The time-out for a server that accepts connections and does not answer.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_falls_silent_holds_nobody_for_ever() {
    let Some(server) = Server::builder().start_or_skip() else { return };
    server.psql("postgres", BESIDE).unwrap();
    let (proxy, book) = (Proxy::start(server.port()).unwrap(), Book::default());
    let short = milliseconds(300);
    let builder =
        PostgresEngine::builder().statement_timeout(short).sql_timeout(short).connect_timeout(short);
    let url = proxy.url(&server.url());
    let engine = until_reached(async || builder.clone().connect(&url).await).await;
    let (store, around) =
        (patient_not(&engine), EventStore::new(PostgresEngine::connect(&server.url()).await.unwrap()));
    let ids = accounts(&around, 3, number(0, 0)).await;
    let mut longest = Duration::ZERO;
    for nth in 0..sized(12, 60) {
        proxy.cut_all();
        proxy.set_delay(milliseconds(0));
        let number = number(1, nth);
        let work = until_reached(async || {
            let mut work = unit(&store, &ids[..2], number, 3).await?;
            if nth % 2 == 0 {
                work.guard(&store.load::<Account>(ids[2]).await?).unwrap();
            }
            Ok(work)
        });
        let work = work.await;
        proxy.set_delay(Duration::from_secs(3_600));
        let begun = Instant::now();
        let outcome = tokio::time::timeout(PATIENCE, call(&engine, &store, work, &ids, number));
        let error = outcome.await.unwrap_or_else(|_| panic!("call {nth} waits for ever")).unwrap_err();
        longest = longest.max(begun.elapsed());
        book.count(word(&error));
        assert!(is_trouble(&error), "{error:?}");
        book.note(number, Fate::from(around.settle(&command(number)).await.unwrap()));
    }
    let faults = book.against(&Log::read(&around).await);
    println!("a silent server: nobody waited longer than {longest:?} ({}), {faults}", book.counts());
    faults.assert_none();
}

async fn until_reached<T>(mut ask: impl AsyncFnMut() -> Result<T>) -> T {
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) => assert!(is_trouble(&error), "{error:?}"),
        }
    }
}

/// Each kind of call, in turn.
async fn call(
    engine: &PostgresEngine,
    store: &EventStore,
    work: UnitOfWork,
    ids: &[AggregateId],
    number: i64,
) -> Result<()> {
    match number % 12 {
        0 => beside(engine, work, number, 0, false).await.map(drop),
        // One commit with a guard, one without.
        1 | 2 => work.commit().await.map(drop),
        3 => store.load::<Account>(ids[0]).await.map(drop),
        4 => store.read_log(&LogQuery::after(Position::ZERO)).await.map(drop),
        5 => store.head().await.map(drop),
        6 => store.wait(Position::MAX, PATIENCE * 4).await.map(drop),
        7 => engine.reserve(1).await.map(drop),
        8 => store.settle(&command(number)).await.map(drop),
        9 => store.receipt(&command(number)).await.map(drop),
        10 => store.warmup::<Account>().await,
        _ => store.types().await.map(drop),
    }
}

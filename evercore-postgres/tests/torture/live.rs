//! A live subscription while 64 writers commit: quick ones, slow ones, and some with long transactions.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evercore_postgres::{Delivery, EventStore, PostgresEngine, Timestamp};
use evercore_testkit::postgres::Server;
use hdrhistogram::Histogram;
use tokio::sync::oneshot;

use crate::book::Book;
use crate::load::{self, BESIDE};
use crate::log::Log;
use crate::tools::{engine, sized};
use crate::writers::Naive;

const NAME: &str = "live";

/// The positions that the handler got, in order, and how long after the recording.
#[derive(Default)]
struct Seen {
    positions: Vec<i64>,
    delays: Vec<Duration>,
    deliveries: usize,
}

/// Each event once and in order while the lease is held. A reader by early ids shows how many events a naive reader
/// would miss.
#[tokio::test(flavor = "multi_thread")]
async fn a_live_subscription_misses_nothing_among_64_writers() {
    let Some(server) = Server::builder().durable(true).start_or_skip() else { return };
    server.psql("postgres", BESIDE).unwrap();
    let url = server.url();
    let mut engines = Vec::new();
    for _ in 0..4 {
        engines.push(engine(&url).await);
    }
    let store = EventStore::new(PostgresEngine::connect(&url).await.unwrap());
    let (naive, seen) = (Naive::start(&url).await, Arc::new(Mutex::new(Seen::default())));
    let (stop, stopped) = oneshot::channel::<()>();
    let runner = tokio::spawn(run(store.clone(), Arc::clone(&seen), stopped));

    let (began, time) = (Instant::now(), Duration::from_secs(sized(3, 60)));
    load::run(&engines, 0..64, began + time, &Arc::new(Book::default())).await;
    let took = began.elapsed();
    let lag = store.subscription_states(NAME).await.unwrap()[0].lag_events;
    // Units without an answer may still be running.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let head = store.head().await.unwrap();
    store.wait_for_position(head, NAME, Duration::from_secs(30)).await.unwrap();
    let claims = store.subscription_states(NAME).await.unwrap()[0].cursor.epoch;
    stop.send(()).unwrap();
    runner.await.unwrap();

    let log = Log::read(&store).await;
    let (rows, unseen) = naive.finish(&url, &log).await;
    let Seen { positions, delays, deliveries } = &*seen.lock().unwrap();
    let disorder = positions.windows(2).filter(|pair| pair[1] <= pair[0]).count();
    let mut known = positions.clone();
    known.sort_unstable();
    known.dedup();
    let (missed, doubled) = (log.events() - known.len(), positions.len() - known.len());
    let (commits, [p50, p99, max]) = (log.units().len(), quantiles(delays));
    println!(
        "64 writers and a live subscription: {commits} commits in {took:.1?}, {:.0} commits/s; {} events in {deliveries} \
         deliveries, {missed} missed, {doubled} doubled, {disorder} out of order; {claims} claim; {lag} events behind \
         when the writers ended; recorded to handled p50 {p50} ms, p99 {p99} ms, most {max} ms; a reader of early ids \
         lost {unseen} of {rows}",
        commits as f64 / took.as_secs_f64(),
        positions.len()
    );
    assert_eq!((missed, doubled, disorder, claims), (0, 0, 0, 1));
    assert_eq!(known.last(), Some(&head.get()));
    assert!(unseen > 0, "blind: not even a reader of early ids has lost an event");
}

async fn run(store: EventStore, seen: Arc<Mutex<Seen>>, stopped: oneshot::Receiver<()>) {
    let handler = move |delivery: Delivery| {
        let now = Timestamp::now();
        let mut seen = seen.lock().unwrap();
        seen.deliveries += 1;
        for event in delivery.events() {
            seen.positions.push(event.position().get());
            seen.delays.push(now.since(event.recorded_at()));
        }
        async { Ok(()) }
    };
    let shutdown = async {
        let _ = stopped.await;
    };
    store.subscription(NAME).unwrap().run_batches(shutdown, handler).await.unwrap();
}

/// In milliseconds. `recorded_at` is before the commit is durable, so the time includes that.
fn quantiles(delays: &[Duration]) -> [f64; 3] {
    let mut histogram = Histogram::<u64>::new(3).unwrap();
    for delay in delays {
        histogram.record(u64::try_from(delay.as_micros()).unwrap()).unwrap();
    }
    [0.5, 0.99, 1.0].map(|quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0)
}

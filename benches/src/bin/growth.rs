//! The disk use of a store: `cargo run --release -p benches --bin growth -- 1000000 1000`.
//!
//! Starts a PostgreSQL server in a temporary folder and writes this many events with 200 bytes of JSON each. The
//! second argument is the number of events in one commit; each commit creates an aggregate for them. Prints the size
//! of every table and index, per event, and the size of the write-ahead log.

use std::time::Instant;

use evercore_postgres::engine::{Append, Batch, NewAggregate, NewEvent, Payload};
use evercore_postgres::{
    Aggregate, AggregateType, EventStore, EventType, Json, Metadata, PostgresEngine, Sequence, StorageEngine,
    Timestamp,
};
use evercore_testkit::postgres::Server;
use serde::{Deserialize, Serialize};

/// 200 bytes of JSON.
fn payload(number: usize) -> Vec<u8> {
    let mut text = format!("{{\"order\":{number},\"note\":\"");
    while text.len() < 198 {
        let letter = b'a' + u8::try_from((number * 31 + text.len() * 17) % 26).unwrap_or(0);
        text.push(char::from(letter));
    }
    text.push_str("\"}");
    text.into_bytes()
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Order {
    count: u64,
}

#[derive(Serialize, Deserialize)]
enum OrderEvent {
    Noted { order: u64, note: String },
}

impl Aggregate for Order {
    const TYPE: &'static str = "order";
    type Event = OrderEvent;
    type Codec = Json;

    fn apply(&mut self, _: OrderEvent) {
        self.count += 1;
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let events: usize = std::env::args().nth(1).map_or(Ok(100_000), |count| count.parse())?;
    let in_one: usize = std::env::args().nth(2).map_or(Ok(1_000), |count| count.parse())?;
    // As on a server in production: with `full_page_writes`, which increase the write-ahead log.
    let server = Server::builder().durable(true).start()?;
    let engine = PostgresEngine::connect(&server.url()).await?;
    let store = EventStore::new(engine.clone());
    store.warmup::<Order>().await?;
    let wal_before = server.psql("postgres", "SELECT pg_current_wal_lsn()")?;
    let (began, mut written) = (Instant::now(), 0);
    while written < events {
        let count = in_one.max(1).min(events - written);
        write(&engine, written, count).await?;
        written += count;
    }
    let took = began.elapsed();
    server.psql("postgres", "VACUUM ANALYZE")?;
    let wal = server.psql("postgres", &format!("SELECT pg_current_wal_lsn() - '{wal_before}'::pg_lsn"))?;
    let per_event = |bytes: f64| bytes / events as f64;
    println!("{events} events of 200 bytes in commits of {in_one}, {:.1} s", took.as_secs_f64());
    println!("{:<32} {:>12} {:>10}", "relation", "MB", "bytes/event");
    let sizes = "SELECT c.relname, pg_relation_size(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'evercore' AND c.relkind IN ('r', 'i') AND pg_relation_size(c.oid) >= 65536 ORDER BY 2 DESC";
    let mut total = 0.0;
    for line in server.psql("postgres", sizes)?.lines() {
        let Some((name, bytes)) = line.split_once('|') else { continue };
        let bytes: f64 = bytes.parse()?;
        total += bytes;
        println!("{name:<32} {:>12.1} {:>10.1}", bytes / 1e6, per_event(bytes));
    }
    println!("{:<32} {:>12.1} {:>10.1}", "all of it", total / 1e6, per_event(total));
    let wal: f64 = wal.trim().parse()?;
    println!("{:<32} {:>12.1} {:>10.1}", "write-ahead log", wal / 1e6, per_event(wal));
    Ok(())
}

/// One commit of `count` events for a new aggregate.
async fn write(engine: &PostgresEngine, first: usize, count: usize) -> evercore_postgres::Result<()> {
    let Some(id) = engine.reserve(1).await?.next() else { return Ok(()) };
    let (aggregate_type, metadata) = (AggregateType::new(Order::TYPE)?, std::sync::Arc::new(Metadata::new()));
    let mut batch = Batch::new();
    batch.create(NewAggregate { id, aggregate_type: aggregate_type.clone(), key: None })?;
    let event = |number| {
        Ok(NewEvent {
            event_type: EventType::new("Noted")?,
            payload: Payload::new(payload(number))?,
            time: Timestamp::now(),
            metadata: std::sync::Arc::clone(&metadata),
        })
    };
    let events = (first..first + count).map(event).collect::<evercore_postgres::Result<_>>()?;
    batch.append(Append { aggregate: id, aggregate_type, expected: Sequence::ZERO, events })?;
    engine.commit(batch).await.map(drop)
}

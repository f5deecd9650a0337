//! The cost of a snapshot that is held for long: `cargo run --release -p benches --bin long_snapshot`.
//!
//! A dump, a report or a standby with feedback keeps the server from removing dead row versions. Every commit leaves
//! one of the row of `log_end`, and every move of a cursor one of its row. This program starts a server, holds a
//! snapshot and makes dead versions, as many as the argument says (1,000,000 by default). It prints the median times
//! of a commit, a read of the head, a move of a cursor and a page of the log, and the sizes of both tables with their
//! indexes.

use std::time::{Duration, Instant};

use evercore_postgres::engine::{Advance, Step, SubscriptionStorage};
use evercore_postgres::{
    Aggregate, CursorId, EventStore, Json, Lease, LogQuery, OwnerId, Position, PostgresEngine, Result,
    SubscriptionName, tokio_postgres,
};
use evercore_testkit::postgres::Server;
use serde::{Deserialize, Serialize};
use tokio_postgres::{IsolationLevel, NoTls};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Order {
    count: u64,
}

#[derive(Serialize, Deserialize)]
enum OrderEvent {
    Noted,
}

impl Aggregate for Order {
    const TYPE: &'static str = "order";
    type Event = OrderEvent;
    type Codec = Json;

    fn apply(&mut self, OrderEvent::Noted: OrderEvent) {
        self.count += 1;
    }
}

/// How often each call is timed.
const TIMES: usize = 101;

struct Bench {
    engine: PostgresEngine,
    store: EventStore,
    cursor: CursorId,
    lease: Lease,
    /// The first event.
    page: LogQuery,
}

impl Bench {
    async fn new(engine: PostgresEngine) -> Result<Self> {
        let store = EventStore::new(engine.clone());
        let owner = OwnerId::new("bench")?;
        let cursor = CursorId { subscription: SubscriptionName::new("bench")?, version: 1, partition: 0 };
        engine.step(&cursor, &Step::declare(1, Position::ZERO, None)).await?;
        let claimed = engine.step(&cursor, &Step::claim(owner.clone(), Duration::from_secs(3_600))).await?;
        let lease = Lease { owner, epoch: claimed.map_or(0, |cursor| cursor.epoch) };
        let page = LogQuery::after(Position::ZERO).up_to(Position::new(1)?);
        Ok(Self { engine, store, cursor, lease, page })
    }

    async fn print(
        &self,
        when: &str,
        server: &Server,
    ) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let mut times = [const { Vec::new() }; 4];
        for _ in 0..TIMES {
            let mut work = self.store.begin();
            let mut order = work.load_or_create::<Order>("one").await?;
            work.record(&mut order, OrderEvent::Noted)?;
            let began = Instant::now();
            work.commit().await?;
            times[0].push(began.elapsed());
            let began = Instant::now();
            self.store.head().await?;
            times[1].push(began.elapsed());
            let (zero, hour) = (Position::ZERO, Duration::from_secs(3_600));
            let advance = Advance::new(self.lease.clone(), zero, zero, hour);
            let began = Instant::now();
            self.engine.step(&self.cursor, &Step::Advance(advance)).await?;
            times[2].push(began.elapsed());
            let began = Instant::now();
            self.store.read_log(&self.page).await?;
            times[3].push(began.elapsed());
        }
        let median = |mut times: Vec<Duration>| {
            times.sort_unstable();
            times[times.len() / 2].as_secs_f64() * 1e3
        };
        let [commit, head, cursor, page] = times.map(median);
        let size = |table: &str| -> std::result::Result<f64, Box<dyn std::error::Error>> {
            let sql = format!("SELECT pg_total_relation_size('evercore.{table}')");
            Ok(server.psql("postgres", &sql)?.parse::<f64>()? / 1e6)
        };
        let (log_end, cursors) = (size("log_end")?, size("cursors")?);
        println!(
            "{when:<58} {commit:>8.2} {head:>8.2} {cursor:>8.2} {page:>8.2} {log_end:>10.1} {cursors:>10.1}"
        );
        Ok(())
    }
}

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let versions: usize = std::env::args().nth(1).map_or(Ok(1_000_000), |count| count.parse())?;
    let server = Server::start()?;
    let bench = Bench::new(PostgresEngine::connect(&server.url()).await?).await?;
    println!(
        "{:<58} {:>8} {:>8} {:>8} {:>8} {:>10} {:>10}",
        "medians in milliseconds, sizes in MB", "commit", "head", "cursor", "page", "log_end", "cursors"
    );
    bench.print("at first", &server).await?;
    let (mut reader, connection) = tokio_postgres::connect(&server.url(), NoTls).await?;
    tokio::spawn(connection);
    let snapshot = reader.build_transaction().isolation_level(IsolationLevel::RepeatableRead).start().await?;
    snapshot.query("SELECT count(*) FROM evercore.events", &[]).await?;
    let mut made = 0;
    for count in [versions / 10, versions - versions / 10] {
        server.psql("postgres", &dead_versions(count))?;
        made += count;
        bench.print(&format!("a snapshot is open, {made} dead versions of each row"), &server).await?;
    }
    snapshot.rollback().await?;
    bench.print("the snapshot is closed", &server).await?;
    server.psql("postgres", "VACUUM evercore.log_end; VACUUM evercore.cursors")?;
    bench.print("after a vacuum", &server).await?;
    Ok(())
}

/// Leaves the dead versions of this many commits and moves of a cursor, without the events. The log then has a gap,
/// which no reader here notices.
fn dead_versions(count: usize) -> String {
    format!(
        "SET synchronous_commit = off; SET enable_seqscan = off; DO $$ BEGIN FOR i IN 1..{count} LOOP
            UPDATE evercore.log_end SET position = position + 1
                WHERE position >= (SELECT max(position) FROM evercore.log_end WHERE position >= 0);
            COMMIT; END LOOP; END $$;
         DO $$ DECLARE at tid; BEGIN SELECT ctid INTO at FROM evercore.cursors; FOR i IN 1..{count} LOOP
            UPDATE evercore.cursors SET expires_at = expires_at + 1 WHERE ctid = at RETURNING ctid INTO at;
            COMMIT; END LOOP; END $$"
    )
}

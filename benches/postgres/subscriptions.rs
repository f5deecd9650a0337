//! W7: from the commit to the handler, in the same process and in another. And a projection of the loan log from a cold
//! start, exactly once.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use evercore_postgres::engine::{Step, SubscriptionStorage};
use evercore_postgres::{
    CursorId, EventCodec, EventStore, Json, PageLimit, Position, PostgresEngine, Start, SubscriptionName,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::application::{Application, ApplicationEvent};
use crate::floor::{Floor, client};
use crate::processes::Follower;
use crate::{Bench, import};
use benches::{ROUNDS, append, compare, median};

/// Commits per round, and the pause between two: a live subscription with little to do.
const COMMITS: usize = 200;
const PAUSE: Duration = Duration::from_millis(2);

const MAKE: &str =
    "CREATE TABLE floor.ours (day BIGINT, kind TEXT, events BIGINT NOT NULL, PRIMARY KEY (day, kind));
    CREATE TABLE floor.theirs (day BIGINT, kind TEXT, events BIGINT NOT NULL, PRIMARY KEY (day, kind));
    CREATE TABLE floor.cursor (position BIGINT NOT NULL);
    INSERT INTO floor.cursor VALUES (0)";

/// A whole batch at once: the days and kinds that it counts, each once.
const COUNT: &str = "INSERT INTO floor.ours AS k SELECT * FROM unnest($1::bigint[], $2::text[], $3::bigint[])
    ON CONFLICT (day, kind) DO UPDATE SET events = k.events + excluded.events";

const READ: &str = "SELECT e.position, e.event_time, t.name, e.payload FROM evercore.events e
    JOIN evercore.event_types t ON t.id = e.event_type_id WHERE e.position > $1 ORDER BY e.position LIMIT 1000";

const DAY: i64 = 86_400_000_000;

impl Bench {
    pub(crate) fn w7(&self) {
        if !self.wants("W7") {
            return;
        }
        let (mut ours, mut floors, mut ratios, mut others) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let floor = self.run(self.floor_delay());
            let our = self.run(self.our_delay());
            others.push(self.other_delay());
            floors.push(floor);
            ours.push(our);
            ratios.push(our / floor);
        }
        let [ours, floor, ratio, other] = [ours, floors, ratios, others].map(median);
        println!(
            "{:42} {ours:>12.0} {floor:>12.0} {ratio:>7.2}  <= 2",
            "W7 PostgreSQL, µs to the handler, p50"
        );
        println!(
            "{:42} {other:>12.2} {:>12} {:>7}  <= 5 ms",
            "W7 PostgreSQL, another process, ms, p50", "", ""
        );
        self.heard_under_load();
    }

    /// Microseconds from the beginning of a commit to its handler in the same process.
    async fn our_delay(&self) -> f64 {
        let store = EventStore::new(PostgresEngine::connect(&self.database()).await.unwrap());
        let mut counter = crate::counters(&store, 1).await.remove(0);
        let (runner, stop, mut handled) = follow(&store);
        let mut delays = Vec::new();
        for _ in 0..COMMITS {
            tokio::time::sleep(PAUSE).await;
            let began = Instant::now();
            append(&store, &mut counter, 1).await;
            delays.push(handled.recv().await.unwrap().duration_since(began).as_secs_f64() * 1e6);
        }
        stop.send(()).unwrap();
        runner.await.unwrap();
        median(delays)
    }

    /// Milliseconds from the beginning of a commit to its handler in another process.
    fn other_delay(&self) -> f64 {
        let url = self.database();
        let store = self.open(&url);
        let mut counter = self.counters(&store, 1).remove(0);
        let follower = Follower::start(&url);
        self.run(async {
            for _ in 0..COMMITS {
                tokio::time::sleep(PAUSE).await;
                append(&store, &mut counter, 1).await;
            }
        });
        let [events, p50, _] = follower.stop(self.run(store.head()).unwrap());
        assert_eq!(events, COMMITS as u64);
        p50 as f64 / 1e3
    }

    /// The floor: a watch channel and a prepared statement.
    async fn floor_delay(&self) -> f64 {
        let url = self.database();
        // The tables of the store exist after it was opened.
        PostgresEngine::connect(&url).await.unwrap().close().await.unwrap();
        let (writer, reader) = (Floor::connect(&url).await, client(&url).await);
        let read =
            "SELECT position, event_type_id, payload FROM floor.events WHERE position > $1 ORDER BY position";
        let read = reader.prepare(read).await.unwrap();
        let (head, mut heard) = watch::channel(0_i64);
        let (seen, mut handled) = mpsc::unbounded_channel();
        let follower = tokio::spawn(async move {
            let mut position = 0_i64;
            while position < COMMITS as i64 {
                heard.wait_for(|head| *head > position).await.unwrap();
                let rows = reader.query(&read, &[&position]).await.unwrap();
                if let Some(last) = rows.last() {
                    position = last.get(0);
                }
                seen.send(Instant::now()).unwrap();
            }
        });
        let mut delays = Vec::new();
        for expected in 0..COMMITS as i64 {
            tokio::time::sleep(PAUSE).await;
            let began = Instant::now();
            writer.append(1, expected, 1).await;
            head.send(expected + 1).unwrap();
            delays.push(handled.recv().await.unwrap().duration_since(began).as_secs_f64() * 1e6);
        }
        follower.await.unwrap();
        median(delays)
    }

    /// How much slower W3 is while another process follows it and must keep up.
    fn heard_under_load(&self) {
        const WRITERS: usize = 64;
        const EACH: usize = 400;
        let url = self.database();
        let store = self.open(&url);
        let mut counters = self.counters(&store, WRITERS);
        let mut rate = || {
            let began = Instant::now();
            (counters, _) = self.concurrently(std::mem::take(&mut counters), |mut counter| {
                let store = store.clone();
                async move {
                    for _ in 0..EACH {
                        append(&store, &mut counter, 1).await;
                    }
                    (counter, Vec::new())
                }
            });
            (WRITERS * EACH) as f64 / began.elapsed().as_secs_f64()
        };
        let (mut followed, mut alone, mut ratios, mut delays) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let without = rate();
            let follower = Follower::start(&url);
            let with = rate();
            let [events, p50, p99] = follower.stop(self.run(store.head()).unwrap());
            assert_eq!(events, (WRITERS * EACH) as u64);
            followed.push(with);
            alone.push(without);
            ratios.push(with / without);
            delays.push([p50, p99].map(|delay| delay as f64 / 1e3));
        }
        let [with, without, ratio] = [followed, alone, ratios].map(median);
        println!(
            "{:42} {with:>12.0} {without:>12.0} {ratio:>7.2}  >= 0.95",
            "W3, 64 writers: followed ÷ alone"
        );
        let [p50, p99] = [0, 1].map(|at| median(delays.iter().map(|delay| delay[at]).collect()));
        println!("   to the handler of the other process meanwhile, p50 {p50:.1} ms, p99 {p99:.1} ms");
    }

    pub(crate) fn projection(&self) {
        if !self.wants("projection") {
            return;
        }
        let Some(log) = loan_log() else {
            println!("SKIPPED: projection needs the loan log; EVERCORE_LOAN_LOG says where it is");
            return;
        };
        let url = self.database();
        let engine = self.run(PostgresEngine::connect(&url)).unwrap();
        let store = EventStore::new(engine.clone());
        self.run(import::import(store.clone(), Some(&log))).unwrap();
        let (events, floor) = (self.run(store.head()).unwrap(), self.run(client(&url)));
        self.run(floor.batch_execute(MAKE)).unwrap();
        let check = |table: &str| {
            self.run(async {
                let sum = format!("SELECT sum(events)::bigint FROM floor.{table}");
                let sum: i64 = floor.query_one(&sum, &[]).await.unwrap().get(0);
                assert_eq!(sum, events.get());
                floor.batch_execute(&format!("TRUNCATE floor.{table}")).await.unwrap();
            });
        };
        compare(
            "projection PostgreSQL, the loan log",
            "0.70",
            events.get(),
            |_| {
                self.run(project(&engine, &store, events));
                check("ours");
            },
            |_| {
                self.run(async { project_by_hand(&mut client(&url).await, events.get()).await });
                check("theirs");
            },
        );
    }
}

/// Runs a subscription that reports each call.
fn follow(store: &EventStore) -> (JoinHandle<()>, oneshot::Sender<()>, mpsc::UnboundedReceiver<Instant>) {
    let (seen, handled) = mpsc::unbounded_channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let subscription = store.subscription("delay").unwrap().starting(Start::End);
    let runner = tokio::spawn(async move {
        let shutdown = async move {
            let _ = stopped.await;
        };
        let run = subscription.run(shutdown, move |_| {
            seen.send(Instant::now()).unwrap();
            async { Ok(()) }
        });
        run.await.unwrap();
    });
    (runner, stop, handled)
}

/// The days and kinds of a batch, counted.
#[derive(Default)]
struct Counts(std::collections::BTreeMap<(i64, String), i64>);

impl Counts {
    fn add(&mut self, time: i64, kind: &str) {
        *self.0.entry((time.div_euclid(DAY), kind.to_owned())).or_default() += 1;
    }

    fn columns(&self) -> (Vec<i64>, Vec<&str>, Vec<i64>) {
        let days = self.0.keys().map(|(day, _)| *day).collect();
        let kinds = self.0.keys().map(|(_, kind)| kind.as_str()).collect();
        (days, kinds, self.0.values().copied().collect())
    }
}

async fn project(engine: &PostgresEngine, store: &EventStore, head: Position) {
    let projection = engine.projection(|sql, delivery| {
        Box::pin(async move {
            let mut counts = Counts::default();
            for event in delivery.events() {
                event.decode::<Application>()?;
                counts.add(event.time().as_micros(), event.event_type().as_str());
            }
            let (days, kinds, events) = counts.columns();
            let count = sql.prepare(COUNT).await?;
            sql.execute(&count, &[&days, &kinds, &events]).await?;
            Ok(())
        })
    });
    let subscription = store.subscription("kinds").unwrap().with_batch(PageLimit::events(1_000).unwrap());
    let done = async {
        while store.wait_for_position(head, "kinds", Duration::from_secs(60)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    subscription.run_sink(done, projection).await.unwrap();
    let id = CursorId { subscription: SubscriptionName::new("kinds").unwrap(), version: 1, partition: 0 };
    engine.step(&id, &Step::Remove).await.unwrap();
}

/// One transaction for each 1,000 events: read, decode, count, store the position.
async fn project_by_hand(sql: &mut evercore_postgres::tokio_postgres::Client, head: i64) {
    let read = sql.prepare(READ).await.unwrap();
    let count = sql.prepare(&COUNT.replace("floor.ours", "floor.theirs")).await.unwrap();
    let mark = sql.prepare("UPDATE floor.cursor SET position = $1").await.unwrap();
    let mut position = 0_i64;
    while position < head {
        let transaction = sql.transaction().await.unwrap();
        let mut counts = Counts::default();
        for row in transaction.query(&read, &[&position]).await.unwrap() {
            position = row.get(0);
            let (name, payload): (&str, &[u8]) = (row.get(2), row.get(3));
            let _: ApplicationEvent = Json::decode(name, payload).unwrap();
            counts.add(row.get(1), name);
        }
        let (days, kinds, events) = counts.columns();
        transaction.execute(&count, &[&days, &kinds, &events]).await.unwrap();
        transaction.execute(&mark, &[&position]).await.unwrap();
        transaction.commit().await.unwrap();
    }
}

/// The path of the loan log, if it exists.
fn loan_log() -> Option<PathBuf> {
    let told = std::env::var_os("EVERCORE_LOAN_LOG").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/loan_applications.csv");
    told.or(Some(beside)).filter(|path| path.is_file())
}

//! The workloads W1 … W8, W3p, a projection, growth and latency: our engine and a floor in the same run, in turn.
//!
//! ```text
//! cargo bench -p benches --bench postgres              all, at sizes that take some minutes
//! cargo bench -p benches --bench postgres -- W1 W4        some
//! cargo bench -p benches --bench postgres -- --full       with logs of 1,000,000 events
//! ```
//!
//! A line gives the medians of five rounds and the median of the rounds' ratios. Absolute figures vary by a third
//! from minute to minute on shared machines; compare the ratios. The server is started on the same machine, with
//! PostgreSQL's default settings.

#![allow(clippy::unwrap_used)] // a benchmark that meets an error stops there

#[allow(dead_code)]
#[path = "../../examples/loan_applications/src/application.rs"]
mod application;
mod floor;
#[allow(dead_code)]
#[path = "../../examples/loan_applications/src/import.rs"]
mod import;
mod processes;
#[path = "../../examples/loan_applications/src/source.rs"]
mod source;
mod subscriptions;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use benches::{Counter, append, compare, counted, median, rate, read_all};
/// For the files of the example.
use evercore_postgres as evercore;
use evercore_postgres::{
    AggregateId, AsOf, EventStore, Loaded, LogQuery, Position, PostgresEngine, Sequence,
};
use evercore_testkit::postgres::{Proxy, Server};
use floor::{Combined, Floor, TABLES};
use tokio::runtime::Runtime;

/// The number of events that our engine reads at once. The floor reads 1,000 at a time and is no faster with more.
const PAGE: usize = 4_000;

struct Bench {
    server: Server,
    runtime: Runtime,
    wanted: Vec<String>,
    full: bool,
    databases: std::cell::Cell<usize>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    if processes::is_child() {
        return processes::child();
    }
    let Some(server) = Server::builder().durable(true).start_or_skip() else { return };
    let bench = Bench {
        runtime: runtime(),
        full: arguments.iter().any(|it| it == "--full"),
        wanted: arguments.into_iter().filter(|it| it != "--full").collect(),
        databases: std::cell::Cell::new(0),
        server,
    };
    println!("PostgreSQL {}", bench.server.version());
    println!("{:42} {:>12} {:>12} {:>7}  target", "work", "ours", "floor", "ratio");
    bench.lone_writers();
    bench.w3();
    bench.w3p();
    bench.w4();
    bench.w5();
    bench.w6();
    bench.w7();
    bench.projection();
    bench.w8();
    bench.growth();
    bench.latency();
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        self.wanted.is_empty() || self.wanted.iter().any(|it| it == name)
    }

    /// A separate database, with an empty store and the tables of the floor.
    fn database(&self) -> String {
        self.databases.set(self.databases.get() + 1);
        let name = format!("bench_{}", self.databases.get());
        self.server.create_database(&name, "").unwrap();
        self.server.psql(&name, TABLES).unwrap();
        self.server.url_of(&name)
    }

    fn open(&self, url: &str) -> EventStore {
        EventStore::new(self.runtime.block_on(PostgresEngine::connect(url)).unwrap())
    }

    fn floor(&self, url: &str) -> Floor {
        self.runtime.block_on(Floor::connect(url))
    }

    fn run<F: Future>(&self, work: F) -> F::Output {
        self.runtime.block_on(work)
    }

    fn lone_writers(&self) {
        for (name, events) in [("W1", 1), ("W2", 10)] {
            if self.wants(name) {
                let url = self.database();
                self.lone_writer(&format!("{name} PostgreSQL"), "0.90", (&url, &url), (500, events));
            }
        }
    }

    fn lone_writer(&self, name: &str, target: &str, urls: (&str, &str), (units, events): (i64, i64)) {
        let store = self.open(urls.0);
        let mut counters = self.counters(&store, 100);
        let floor = self.floor(urls.1);
        let mut sequences = [0; 101];
        compare(
            name,
            target,
            units * events,
            |_| {
                self.run(async {
                    for unit in 0..units {
                        append(&store, &mut counters[unit as usize % 100], events).await;
                    }
                });
            },
            |_| {
                self.run(async {
                    for unit in 0..units {
                        let id = unit as usize % 100 + 1;
                        floor.append(id as i64, sequences[id], events).await;
                        sequences[id] += events;
                    }
                });
            },
        );
    }

    fn w3(&self) {
        if !self.wants("W3") {
            return;
        }
        for writers in [16, 64, 256] {
            let url = self.database();
            let store = self.open(&url);
            let counters = std::cell::RefCell::new(self.counters(&store, writers));
            let combined = self.run(Combined::connect(&url));
            let each = 20_000 / writers as i64;
            let mut latencies = hdrhistogram::Histogram::<u64>::new(3).unwrap();
            let mut rounds = 0;
            compare(
                &format!("W3 PostgreSQL, {writers} writers"),
                "0.85",
                each * writers as i64,
                |_| {
                    let (all, times) = self.concurrently(counters.take(), |mut counter| {
                        let store = store.clone();
                        async move {
                            let mut times = Vec::new();
                            for _ in 0..each {
                                let began = Instant::now();
                                append(&store, &mut counter, 1).await;
                                times.push(began.elapsed().as_micros() as u64);
                            }
                            (counter, times)
                        }
                    });
                    times.into_iter().for_each(|time| latencies.record(time).unwrap());
                    counters.replace(all);
                },
                |_| {
                    let first = rounds * each;
                    rounds += 1;
                    self.concurrently((1..=writers as i64).collect(), |id| {
                        let combined = combined.clone();
                        async move {
                            for n in first..first + each {
                                combined.append(id, n).await;
                            }
                            (id, Vec::new())
                        }
                    });
                },
            );
            let (p50, p99) = (latencies.value_at_quantile(0.5), latencies.value_at_quantile(0.99));
            println!("   latency p50 {:.1} ms, p99 {:.1} ms", p50 as f64 / 1e3, p99 as f64 / 1e3);
            if writers == 64 {
                self.pool_of_sixteen();
            }
        }
    }

    /// Another comparison for W3 at 64 writers: 16 connections with a plain insert each.
    fn pool_of_sixteen(&self) {
        let url = self.database();
        self.open(&url); // creates the tables that a floor's other statements read
        let pool: Vec<_> = self.run(async {
            let mut pool = Vec::new();
            for _ in 0..16 {
                pool.push(Arc::new(tokio::sync::Mutex::new(Floor::connect(&url).await)));
            }
            pool
        });
        let began = Instant::now();
        self.concurrently((1..=64_i64).collect(), |id| {
            let connection = Arc::clone(&pool[id as usize % 16]);
            async move {
                for n in 0..200 {
                    connection.lock().await.append(id, n, 1).await;
                }
                (id, Vec::new())
            }
        });
        let rate = 64.0 * 200.0 / began.elapsed().as_secs_f64();
        println!("   64 writers on a pool of 16, one plain insert each: {rate:.0} events/s");
    }

    fn w3p(&self) {
        if !self.wants("W3p") {
            return;
        }
        for (writers, target) in [(8, "1.00"), (1, "report")] {
            let url = self.database();
            self.open(&url);
            processes::compare(&url, 8, writers, target);
        }
    }

    fn w4(&self) {
        if !self.wants("W4") {
            return;
        }
        for length in [100, 10_000] {
            let url = self.database();
            let store = self.open(&url);
            let ids = self.fill(&store, if length == 100 { 50 } else { 3 }, length);
            self.analyze(&url);
            let floor = self.floor(&url);
            let loads = 200_000 / length;
            for by in ["id", "key"] {
                compare(
                    &format!("W4 PostgreSQL, {length} events by {by}"),
                    "0.85",
                    loads * length,
                    |_| {
                        self.run(async {
                            for n in 0..loads {
                                let at = n as usize % ids.len();
                                let counter = match by {
                                    "id" => store.load::<Counter>(ids[at]).await,
                                    _ => store.load::<Counter>(format!("counter {at}")).await,
                                };
                                assert_eq!(counter.unwrap().events, length);
                            }
                        });
                    },
                    |_| {
                        self.run(async {
                            for n in 0..loads {
                                let at = n as usize % ids.len();
                                let counter = match by {
                                    "id" => floor.load(ids[at].get()).await,
                                    _ => floor.load_by_key(&format!("counter {at}")).await,
                                };
                                assert_eq!(counter.events, length);
                            }
                        });
                    },
                );
            }
        }
    }

    fn analyze(&self, url: &str) {
        let database = url.rsplit('/').next().unwrap();
        self.server.psql(database, "VACUUM ANALYZE").unwrap();
    }

    /// Aggregates with keys, their events interleaved in the log.
    fn fill(&self, store: &EventStore, count: usize, length: i64) -> Vec<AggregateId> {
        self.run(async {
            let mut work = store.begin();
            let mut all = Vec::new();
            for n in 0..count {
                all.push(work.create_with_key::<Counter>(format!("counter {n}")).await.unwrap());
            }
            work.commit().await.unwrap();
            let mut left = length;
            while left > 0 {
                let step = left.min(1_000 / count as i64).max(1);
                let mut work = store.begin();
                for _ in 0..step {
                    for counter in &mut all {
                        let next = counter.sequence().get() + 1;
                        work.record(counter, counted(next)).unwrap();
                    }
                }
                work.commit().await.unwrap();
                left -= step;
            }
            all.iter().map(Loaded::id).collect()
        })
    }

    fn w5(&self) {
        if !self.wants("W5") {
            return;
        }
        let url = self.database();
        let (store, floor) = (self.open(&url), self.floor(&url));
        let (units, mut ours, mut theirs) = (500, 0, 0);
        compare(
            "W5 PostgreSQL",
            "0.90",
            units,
            |_| {
                self.run(async {
                    for _ in 0..units {
                        ours += 1;
                        let mut work = store.begin();
                        let mut counter =
                            work.create_with_key::<Counter>(format!("key {ours}")).await.unwrap();
                        work.record(&mut counter, counted(1)).unwrap();
                        work.commit().await.unwrap();
                    }
                });
            },
            |_| {
                self.run(async {
                    for _ in 0..units {
                        theirs += 1;
                        floor.create(theirs, &format!("key {theirs}")).await;
                    }
                });
            },
        );
    }

    fn w6(&self) {
        if !self.wants("W6") {
            return;
        }
        let sizes: &[i64] = if self.full { &[200_000, 1_000_000] } else { &[200_000] };
        for events in sizes {
            let url = self.database();
            let store = self.open(&url);
            self.fill(&store, 100, events / 100);
            self.analyze(&url);
            let floor = self.floor(&url);
            compare(
                &format!("W6 PostgreSQL, {events} events"),
                "1.00",
                *events,
                |_| assert_eq!(self.run(read_all(&store, PAGE)), *events),
                |_| {
                    self.run(async {
                        let mut read = 0;
                        while read < *events {
                            read += floor.read(read, 1_000).await.events;
                        }
                    });
                },
            );
        }
    }

    fn w8(&self) {
        if !self.wants("W8") {
            return;
        }
        let units = if self.full { 1_000 } else { 100 };
        for (order, spread) in [("stream order", 1), ("interleaved", 100)] {
            let url = self.database();
            let (store, floor) = (self.open(&url), self.floor(&url));
            let mut made = 0;
            compare(
                &format!("W8 PostgreSQL, {units},000 events, {order}"),
                "0.80",
                units * 1_000,
                |_| {
                    let mut counters = self.counters(&store, 1_000);
                    self.run(async {
                        for unit in 0..units as usize {
                            let mut work = store.begin();
                            for n in 0..1_000 {
                                let at = (unit * spread + n % spread) % 1_000;
                                let next = counters[at].sequence().get() + 1;
                                work.record(&mut counters[at], counted(next)).unwrap();
                            }
                            work.commit().await.unwrap();
                        }
                    });
                },
                |_| {
                    let mut sequences = vec![0; 1_000];
                    made += 1_000;
                    self.run(async {
                        for unit in 0..units as usize {
                            let rows = (0..1_000).map(|n| {
                                let at = (unit * spread + n % spread) % 1_000;
                                sequences[at] += 1;
                                (made + at as i64, sequences[at])
                            });
                            floor.copy(rows.collect::<Vec<_>>().into_iter()).await;
                        }
                    });
                },
            );
        }
    }

    /// Our rate on a large store compared with our rate on a small one.
    fn growth(&self) {
        if !self.wants("growth") {
            return;
        }
        let large = if self.full { 1_000_000 } else { 200_000 };
        let [small, large_store] = [10_000, large].map(|events| {
            let url = self.database();
            let store = self.open(&url);
            let ids = self.fill(&store, 100, events / 100);
            self.analyze(&url);
            (store, ids)
        });
        let writes = |(store, _): &(EventStore, Vec<AggregateId>)| {
            let mut counters = self.counters(store, 100);
            self.run(async {
                for unit in 0..500 {
                    append(store, &mut counters[unit % 100], 1).await;
                }
            });
        };
        let name = |work| format!("growth {work}, {large} ÷ 10000 events");
        compare(&name("W1"), "0.85", 500, |_| writes(&large_store), |_| writes(&small));
        let loads = |(store, ids): &(EventStore, Vec<AggregateId>)| {
            self.run(async {
                for n in 0..500 {
                    let as_of = AsOf::Sequence(Sequence::ZERO.plus(100));
                    store.load_as_of::<Counter>(ids[n % 100], as_of).await.unwrap();
                }
            });
        };
        compare(&name("W4"), "0.85", 50_000, |_| loads(&large_store), |_| loads(&small));
        let reads = |(store, _): &(EventStore, Vec<AggregateId>)| {
            self.run(async {
                for n in 0..50 {
                    let query = LogQuery::after(Position::new(n * 173).unwrap());
                    assert_eq!(store.read_log(&query).await.unwrap().events.len(), 1_000);
                }
            });
        };
        compare(&name("W6"), "0.75", 50_000, |_| reads(&large_store), |_| reads(&small));
    }

    /// W1 with a network in between: half a millisecond each way.
    fn latency(&self) {
        if !self.wants("latency") {
            return;
        }
        let url = self.database();
        let proxy = Proxy::start(self.server.port()).unwrap();
        proxy.set_delay(Duration::from_micros(500));
        let far = proxy.url(&url);
        self.lone_writer("W1 with 1 ms of network, ours ÷ floor", "report", (&far, &far), (200, 1));
    }

    fn counters(&self, store: &EventStore, count: usize) -> Vec<Loaded<Counter>> {
        self.run(counters(store, count))
    }

    /// Runs one task for each input, and returns the results.
    fn concurrently<I: Send + 'static, F>(&self, inputs: Vec<I>, task: impl Fn(I) -> F) -> (Vec<I>, Vec<u64>)
    where
        F: Future<Output = (I, Vec<u64>)> + Send + 'static,
    {
        let tasks: Vec<_> = inputs.into_iter().map(|input| self.runtime.spawn(task(input))).collect();
        let results = tasks.into_iter().map(|task| self.runtime.block_on(task).unwrap());
        let (inputs, times): (Vec<_>, Vec<_>) = results.unzip();
        (inputs, times.concat())
    }
}

async fn counters(store: &EventStore, count: usize) -> Vec<Loaded<Counter>> {
    store.warmup::<Counter>().await.unwrap();
    let mut work = store.begin();
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(work.create::<Counter>().await.unwrap());
    }
    work.commit().await.unwrap();
    all
}

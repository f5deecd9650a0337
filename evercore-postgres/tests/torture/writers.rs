//! 64 writers and readers that follow the log, in one process and in four.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evercore_postgres::{EventStore, PostgresEngine};
use evercore_testkit::postgres::Server;
use tokio::task::JoinHandle;

use crate::book::{Book, Fate};
use crate::load::{self, BESIDE, Witness};
use crate::log::{Log, Readers};
use crate::tools::{connect, engine, milliseconds, sized};

impl Witness for Book {
    fn note(&self, unit: i64, fate: Fate) {
        Self::note(self, unit, fate);
    }

    fn count(&self, what: &str) {
        Self::count(self, what);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_skipped_doubled_or_lost_among_64_writers() {
    let Some(trial) = Trial::begin().await else { return };
    let mut engines = Vec::new();
    for _ in 0..4 {
        engines.push(engine(&trial.url).await);
    }
    let until = Instant::now() + Duration::from_secs(sized(3, 60));
    load::run(&engines, 0..64, until, &trial.book).await;
    trial.end("64 writers").await;
}

/// A server, the disturbers, the readers, and the book with the outcomes of the writers.
pub(crate) struct Trial {
    // Kept until the end.
    _server: Server,
    pub(crate) url: String,
    pub(crate) book: Arc<Book>,
    store: EventStore,
    readers: Readers,
    naive: Naive,
    killer: Killer,
}

impl Trial {
    /// Prints a message and gives `None` if there is no server.
    pub(crate) async fn begin() -> Option<Self> {
        let server = Server::builder().durable(true).start_or_skip()?;
        server.psql("postgres", BESIDE).unwrap();
        let url = server.url();
        let mut readers = Readers::new();
        let store = EventStore::new(PostgresEngine::connect(&url).await.unwrap());
        let other = EventStore::new(PostgresEngine::connect(&url).await.unwrap());
        readers.add(&store, false);
        readers.add(&store, true);
        readers.add(&other, false);
        readers.add(&other, false);
        let (naive, killer) = (Naive::start(&url).await, Killer::start(&url).await);
        Some(Self { _server: server, url, book: Arc::default(), store, readers, naive, killer })
    }

    /// Compares everything with the log and prints the counts.
    pub(crate) async fn end(self, who: &str) {
        let killed = self.killer.finish().await;
        // Units without an answer may still be running.
        tokio::time::sleep(milliseconds(300)).await;
        let log = Log::read(&self.store).await;
        let faults = self.book.against(&log);
        let (rows, unseen) = self.naive.finish(&self.url, &log).await;
        let read = self.readers.finish(&log).await;
        let (events, units) = (log.events(), log.units().len());
        println!(
            "{who}: {events} events in {units} units, {} acknowledged, {faults}; {killed} backends killed ({}); {read}; \
             a reader of early ids lost {unseen} of {rows}",
            self.book.acknowledged(),
            self.book.counts()
        );
        faults.assert_none();
        assert!(killed > 0, "nobody was disturbed");
        assert!(unseen > 0, "blind: not even a reader of early ids has lost an event");
        assert_eq!(self.store.head().await.unwrap().get(), events as i64, "something landed after all");
    }
}

/// The naive reader: it continues after the largest id that it has seen.
pub(crate) struct Naive {
    is_over: Arc<AtomicBool>,
    reader: JoinHandle<HashSet<i64>>,
}

impl Naive {
    pub(crate) async fn start(url: &str) -> Self {
        let (client, is_over) = (connect(url).await, Arc::new(AtomicBool::new(false)));
        let ends = Arc::clone(&is_over);
        let reader = tokio::spawn(async move {
            let (mut last, mut seen, mut is_last) = (0_i64, HashSet::new(), false);
            while !is_last {
                is_last = ends.load(Ordering::Acquire);
                let rows =
                    client.query("SELECT id, unit FROM beside WHERE id > $1 ORDER BY id", &[&last]).await;
                for row in rows.unwrap() {
                    last = row.get(0);
                    seen.insert(row.get(1));
                }
                tokio::time::sleep(milliseconds(2)).await;
            }
            seen
        });
        Self { is_over, reader }
    }

    /// The number of rows, and how many of them it has not seen. The rows of all committed units are there, too.
    pub(crate) async fn finish(self, url: &str, log: &Log) -> (usize, usize) {
        self.is_over.store(true, Ordering::Release);
        let seen = self.reader.await.unwrap();
        let rows = connect(url).await.query("SELECT unit FROM beside", &[]).await.unwrap();
        let units: HashSet<i64> = rows.iter().map(|row| row.get(0)).collect();
        let with_rows: HashSet<i64> = log.units().into_iter().filter(|unit| unit % 2 == 1).collect();
        assert_eq!(rows.len(), units.len(), "a row was written twice");
        assert_eq!(units, with_rows, "rows without their events, or events without their row");
        (rows.len(), units.difference(&seen).count())
    }
}

/// Ends connections of the engines at random, most often one that is writing.
struct Killer {
    is_over: Arc<AtomicBool>,
    killed: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

const KILL: &str = "
    SELECT count(pg_terminate_backend(pid)) FROM (
        SELECT pid FROM pg_stat_activity WHERE application_name = 'evercore'
        ORDER BY ($1 AND state = 'active' AND query LIKE '%log_end%') DESC, random() LIMIT 1
    ) AS one";

impl Killer {
    async fn start(url: &str) -> Self {
        let (client, is_over) = (connect(url).await, Arc::new(AtomicBool::new(false)));
        let killed = Arc::new(AtomicUsize::new(0));
        let (ends, count) = (Arc::clone(&is_over), Arc::clone(&killed));
        let task = tokio::spawn(async move {
            while !ends.load(Ordering::Acquire) {
                tokio::time::sleep(milliseconds(fastrand::u64(20..150))).await;
                let row = client.query_one(KILL, &[&(fastrand::u32(0..3) > 0)]).await.unwrap();
                count.fetch_add(usize::try_from(row.get::<_, i64>(0)).unwrap(), Ordering::Relaxed);
            }
        });
        Self { is_over, killed, task }
    }

    async fn finish(self) -> usize {
        self.is_over.store(true, Ordering::Release);
        self.task.await.unwrap();
        self.killed.load(Ordering::Relaxed)
    }
}

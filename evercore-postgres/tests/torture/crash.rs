//! A server that is killed with -9 under load, and started again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use evercore_postgres::{AggregateId, Error, ErrorKind, EventStore, PostgresEngine, Receipt, Result};
use evercore_testkit::postgres::Server;

use crate::book::{Book, Fate};
use crate::load::{BESIDE, beside};
use crate::log::{Log, Readers};
use crate::tools::{
    Patience, accounts, command, connect, is_trouble, is_unknown, milliseconds, number, patient_not, sized,
    unit, word,
};

const WRITERS: usize = 12;

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_under_load_loses_nothing_it_has_acknowledged() {
    let Some(server) = Server::builder().durable(true).start_or_skip() else { return };
    server.psql("postgres", BESIDE).unwrap();
    let engine = PostgresEngine::connect(&server.url()).await.unwrap();
    let store = EventStore::new(engine.clone());
    let (book, stop) = (Arc::new(Book::default()), Arc::new(AtomicBool::new(false)));
    let mut readers = Readers::new();
    readers.add(&store, false);
    readers.add(&EventStore::new(PostgresEngine::connect(&server.url()).await.unwrap()), true);
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        // Nothing else writes to them, so a conflict here is a conflict with itself.
        let ids = accounts(&store, 3, number(writer, 0)).await;
        let writer = Writer::new(&engine, writer, ids, &book);
        writers.push(tokio::spawn(writer.run(Arc::clone(&stop))));
    }
    let rounds = sized(2, 10);
    for _ in 0..rounds {
        tokio::time::sleep(milliseconds(fastrand::u64(300..1_000))).await;
        server.kill();
        tokio::time::sleep(milliseconds(fastrand::u64(0..300))).await;
        server.start_again().unwrap();
        goes_on(&book).await;
    }
    stop.store(true, Ordering::Release);
    for writer in writers {
        writer.await.unwrap();
    }
    let log = Log::read(&store).await;
    let (faults, read) = (book.against(&log), readers.finish(&log).await);
    let (events, units) = (log.events(), log.units().len());
    println!(
        "{rounds} times killed -9: {events} events in {units} units, {} acknowledged, {faults} ({}); {read}",
        book.acknowledged(),
        book.counts()
    );
    faults.assert_none();
    let rows =
        connect(&server.url()).await.query("SELECT unit FROM beside ORDER BY unit", &[]).await.unwrap();
    let mut with_rows: Vec<i64> = log.units().into_iter().filter(|unit| has_row(*unit)).collect();
    with_rows.sort_unstable();
    assert_eq!(rows.iter().map(|row| row.get::<_, i64>(0)).collect::<Vec<_>>(), with_rows);
}

/// The engine finds its server again without help.
async fn goes_on(book: &Book) {
    let (before, until) = (book.acknowledged(), Instant::now() + Duration::from_secs(20));
    while book.acknowledged() == before {
        assert!(Instant::now() < until, "the server is back, and nobody writes: {}", book.counts());
        tokio::time::sleep(milliseconds(5)).await;
    }
}

/// Every fourth unit also writes a row, except the units that create the accounts.
fn has_row(unit: i64) -> bool {
    let nth = unit & 0xffff_ffff;
    nth > 0 && nth % 4 == 0
}

struct Writer {
    engine: PostgresEngine,
    store: EventStore,
    writer: usize,
    ids: Vec<AggregateId>,
    book: Arc<Book>,
}

impl Writer {
    fn new(engine: &PostgresEngine, writer: usize, ids: Vec<AggregateId>, book: &Arc<Book>) -> Self {
        Self { engine: engine.clone(), store: patient_not(engine), writer, ids, book: Arc::clone(book) }
    }

    async fn run(self, stop: Arc<AtomicBool>) {
        for nth in 1.. {
            if stop.load(Ordering::Acquire) {
                return;
            }
            let unit = number(self.writer, nth);
            let fate = self.write(unit, nth).await;
            self.book.note(unit, fate);
        }
    }

    async fn write(&self, unit: i64, nth: i64) -> Fate {
        match self.commit(unit).await {
            Ok(receipt) => Fate::from(&receipt),
            Err(error) => {
                self.count(&Patience::new(), &error, unit).await;
                match (is_unknown(&error), nth % 3) {
                    // The next unit uses the same sequence. If this one had been written after all, there would be a
                    // conflict.
                    (false, _) => Fate::Never,
                    (true, 0) => self.settle(unit).await,
                    (true, 1) => self.look(unit).await,
                    (true, _) => self.commit_again(unit).await,
                }
            }
        }
    }

    async fn commit(&self, number: i64) -> Result<Receipt> {
        let work = unit(&self.store, &self.ids, number, 6).await?;
        if has_row(number) { beside(&self.engine, work, number, 0, false).await } else { work.commit().await }
    }

    async fn settle(&self, unit: i64) -> Fate {
        let patience = Patience::new();
        loop {
            match self.store.settle(&command(unit)).await {
                Ok(settled) => {
                    self.book.count(if settled.is_some() {
                        "settled as committed"
                    } else {
                        "settled as never"
                    });
                    return Fate::from(settled);
                }
                Err(error) => self.count(&patience, &error, unit).await,
            }
        }
    }

    /// If there is a receipt, it must be complete. Without one, nothing is known.
    async fn look(&self, unit: i64) -> Fate {
        let patience = Patience::new();
        loop {
            match self.store.receipt(&command(unit)).await {
                Ok(Some(receipt)) => {
                    self.book.count("receipts found");
                    return Fate::from(&receipt);
                }
                Ok(None) => return self.settle(unit).await,
                Err(error) => self.count(&patience, &error, unit).await,
            }
        }
    }

    async fn commit_again(&self, unit: i64) -> Fate {
        let patience = Patience::new();
        loop {
            match self.commit(unit).await {
                Ok(receipt) => {
                    self.book.count("committed again");
                    return Fate::from(&receipt);
                }
                Err(error) => self.count(&patience, &error, unit).await,
            }
        }
    }

    /// Only errors with advice for the caller; then a short wait.
    async fn count(&self, patience: &Patience, error: &Error, unit: i64) {
        // The user's SQL got the error of the broken connection.
        let is_rejected = *error.kind() == ErrorKind::Rejected && has_row(unit);
        assert!(is_trouble(error) || is_rejected, "{error:?}");
        self.book.count(word(error));
        patience.pause(error).await;
    }
}

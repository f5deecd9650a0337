//! Connections that are cut before, during or after a commit, and answers that come too late.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use evercore_postgres::{
    AggregateId, Error, ErrorKind, EventStore, PostgresEngine, Receipt, Result, UnitOfWork,
};
use evercore_testkit::postgres::{Cut, Proxy, Server, Trigger};
use tokio::task::JoinHandle;

use crate::book::{Book, Fate};
use crate::load::{BESIDE, beside};
use crate::log::Log;
use crate::tools::{
    Account, Patience, accounts, command, is_trouble, is_unknown, milliseconds, number, patient_not, sized,
    unit, word,
};

/// The fault of a unit's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Cut(Cut),
    /// The delay is longer than the time-out of the answer.
    Late,
}

const WAYS: [Way; 4] = [Way::Cut(Cut::Before), Way::Cut(Cut::During), Way::Cut(Cut::AfterReply), Way::Late];

#[tokio::test(flavor = "multi_thread")]
async fn a_command_takes_effect_once_however_its_connection_is_cut() {
    let Some(server) = Server::builder().start_or_skip() else { return };
    server.psql("postgres", BESIDE).unwrap();
    let store = EventStore::new(PostgresEngine::connect(&server.url()).await.unwrap());
    let book = Arc::new(Book::default());
    for (nth, way) in WAYS.into_iter().enumerate() {
        Trial::begin(&server, &store, nth, way, &book).await.run().await;
    }
    // A commit that was cut off may still be running.
    tokio::time::sleep(milliseconds(500)).await;
    let log = Log::read(&store).await;
    let faults = book.against(&log);
    let (events, units) = (log.events(), log.units().len());
    println!(
        "all ways of cutting: {events} events in {units} units, {} acknowledged, {faults}",
        book.acknowledged()
    );
    faults.assert_none();
    let beside = server.psql("postgres", "SELECT count(*), count(DISTINCT unit) FROM beside").unwrap();
    let with_rows = log.units().into_iter().filter(|unit| path_of(*unit) == Path::Beside).count();
    assert_eq!(
        beside,
        format!("{with_rows}|{with_rows}"),
        "rows without their events, or events without their row"
    );
}

/// The kind of commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    /// In one statement.
    Quick,
    /// With a read under the lock, because of a guard.
    Careful,
    /// With SQL of the user.
    Beside,
}

/// Each kind has this many writers. The connections of the first one are cut; commits of the others share flights
/// with it.
const WRITERS: usize = 4;

fn path_of(unit: i64) -> Path {
    let (writer, nth) = (usize::try_from(unit >> 32).unwrap() - 1, unit & 0xffff_ffff);
    match nth % 3 {
        1 if writer % WRITERS == 0 => Path::Careful,
        2 if writer % WRITERS == 0 => Path::Beside,
        _ => Path::Quick,
    }
}

struct Trial {
    way: Way,
    first_writer: usize,
    proxy: Proxy,
    engine: PostgresEngine,
    store: EventStore,
    ids: Vec<Vec<AggregateId>>,
    book: Arc<Book>,
    tally: Book,
}

impl Trial {
    /// `around` connects to the server without the proxy.
    async fn begin(server: &Server, around: &EventStore, nth: usize, way: Way, book: &Arc<Book>) -> Self {
        let (proxy, first_writer) = (Proxy::start(server.port()).unwrap(), nth * WRITERS);
        let mut ids = Vec::new();
        for writer in first_writer..first_writer + WRITERS {
            ids.push(accounts(around, 3, number(writer, 0)).await);
        }
        let mut builder = PostgresEngine::builder();
        if way == Way::Late {
            // So that a late answer is noticed soon.
            let soon = milliseconds(150);
            builder = builder.statement_timeout(soon).sql_timeout(soon).connect_timeout(soon);
        }
        let engine = builder.connect(&proxy.url(&server.url())).await.unwrap();
        let (store, book) = (patient_not(&engine), Arc::clone(book));
        Self { way, first_writer, proxy, engine, store, ids, book, tally: Book::default() }
    }

    /// Sends units of this kind, and counts the outcomes.
    async fn run(self) {
        let units: i64 = if self.way == Way::Late { sized(3, 45) } else { sized(25, 300) };
        let stop = Arc::new(AtomicBool::new(false));
        let neighbours: Vec<_> = (1..WRITERS).map(|nth| self.neighbour(nth, &stop)).collect();
        for nth in 1..=units {
            let unit = number(self.first_writer, nth);
            let fate = self.write(unit).await;
            self.book.note(unit, fate);
        }
        stop.store(true, Ordering::Release);
        let mut others = 0;
        for neighbour in neighbours {
            others += neighbour.await.unwrap();
        }
        let (way, cuts) = (self.way, self.proxy.cuts());
        println!("{way:?}: {units} units, {cuts} cuts, {others} units beside ({})", self.tally.counts());
        assert!(way == Way::Late || i64::try_from(cuts).unwrap() == units, "not every cut has happened");
    }

    async fn write(&self, unit: i64) -> Fate {
        let work = self.until_heard(async || self.prepare(unit).await).await;
        self.arm(unit);
        let first = self.commit(work, unit).await;
        self.proxy.set_delay(milliseconds(0));
        match first {
            // The cut hit another connection.
            Ok(receipt) => {
                self.tally.count("acknowledged at once");
                Fate::from(&receipt)
            }
            Err(error) => {
                assert!(is_foreseen(&error, unit), "{:?} {:?} {error:?}", self.way, path_of(unit));
                self.tally.count(word(&error));
                match (is_unknown(&error), unit % 2) {
                    // The error says that nothing was written, which must be true.
                    (false, _) => Fate::Never,
                    (true, 0) => self.try_again(unit).await,
                    (true, _) => self.settle(unit).await,
                }
            }
        }
    }

    fn arm(&self, unit: i64) {
        let trigger = match path_of(unit) {
            Path::Quick => Trigger::request_with(command(unit).as_str()),
            // With the end of the text, because a BEGIN may contain COMMITTED.
            Path::Careful | Path::Beside => Trigger::request_with("COMMIT\0"),
        };
        match self.way {
            Way::Cut(cut) => self.proxy.cut_next(cut, trigger),
            Way::Late => self.proxy.set_delay(milliseconds(250)),
        }
    }

    async fn prepare(&self, number: i64) -> Result<UnitOfWork> {
        let [guarded, written @ ..] = &self.ids[0][..] else { unreachable!() };
        let mut work = unit(&self.store, written, number, 4).await?;
        if path_of(number) == Path::Careful {
            let guarded = work.load::<Account>(*guarded).await?;
            work.guard(&guarded).unwrap();
        }
        Ok(work)
    }

    async fn commit(&self, work: UnitOfWork, unit: i64) -> Result<Receipt> {
        match path_of(unit) {
            Path::Quick | Path::Careful => work.commit().await,
            Path::Beside => beside(&self.engine, work, unit, 0, false).await,
        }
    }

    async fn commit_again(&self, unit: i64) -> Result<Receipt> {
        self.commit(self.prepare(unit).await?, unit).await
    }

    /// Repeats the command until it is acknowledged, and then once more, which must give the same receipt.
    async fn try_again(&self, unit: i64) -> Fate {
        let receipt = self.until_heard(async || self.commit_again(unit).await).await;
        assert_eq!(self.until_heard(async || self.commit_again(unit).await).await, receipt);
        Fate::from(&receipt)
    }

    /// After settling, a committed command gives its receipt again, and another one cannot commit any more.
    async fn settle(&self, unit: i64) -> Fate {
        let settled = self.until_heard(async || self.store.settle(&command(unit)).await).await;
        self.tally.count(if settled.is_some() { "settled as committed" } else { "settled as never" });
        let again = self.until_heard(async || match self.commit_again(unit).await {
            Ok(receipt) => Ok(Some(receipt)),
            Err(error) if *error.kind() == ErrorKind::CommandAbandoned => Ok(None),
            Err(error) => Err(error),
        });
        assert_eq!(again.await, settled, "settled, and then another outcome");
        Fate::from(settled)
    }

    /// Asks until an answer comes.
    async fn until_heard<T>(&self, mut ask: impl AsyncFnMut() -> Result<T>) -> T {
        let patience = Patience::new();
        loop {
            match ask().await {
                Ok(answer) => return answer,
                Err(error) if is_trouble(&error) => {
                    self.tally.count(format!("{} again", word(&error)));
                    patience.pause(&error).await;
                }
                Err(error) => panic!("{:?}, again: {error:?}", self.way),
            }
        }
    }

    /// Writes until the end, and repeats each unit until it is acknowledged. Gives the number of units.
    fn neighbour(&self, nth: usize, stop: &Arc<AtomicBool>) -> JoinHandle<usize> {
        let (store, book, stop) = (self.store.clone(), Arc::clone(&self.book), Arc::clone(stop));
        let (writer, ids) = (self.first_writer + nth, self.ids[nth].clone());
        tokio::spawn(async move {
            let mut units = 0;
            while !stop.load(Ordering::Acquire) {
                units += 1;
                let number = number(writer, i64::try_from(units).unwrap());
                book.note(number, Fate::from(&until_acknowledged(&store, &ids, number).await));
                tokio::time::sleep(milliseconds(1)).await;
            }
            units
        })
    }
}

async fn until_acknowledged(store: &EventStore, ids: &[AggregateId], number: i64) -> Receipt {
    let patience = Patience::new();
    loop {
        let outcome = match unit(store, ids, number, 2).await {
            Ok(work) => work.commit().await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(receipt) => return receipt,
            Err(error) => {
                assert!(is_trouble(&error), "a neighbour met {error:?}");
                patience.pause(&error).await;
            }
        }
    }
}

/// SQL of the user gets the error of the broken connection itself.
fn is_foreseen(error: &Error, unit: i64) -> bool {
    is_trouble(error) || (*error.kind() == ErrorKind::Rejected && path_of(unit) == Path::Beside)
}

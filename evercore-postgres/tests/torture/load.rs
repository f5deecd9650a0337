//! Writers on the same 400 accounts: quick, slow, stale, with SQL, refused, gone.

use std::sync::Arc;
use std::time::Instant;

use evercore_postgres::{Error, ErrorKind, EventStore, PostgresEngine, Receipt, Result, UnitOfWork};
use fastrand::Rng;

use crate::book::Fate;
use crate::tools::{Account, Patience, command, is_unknown, milliseconds, number, patient_not, record, word};

/// The number of accounts. The first writer that needs one creates it.
const ACCOUNTS: usize = 400;

/// One row for each unit with an odd number, with an id that is drawn early. A reader in the order of these ids is
/// the naive reader.
pub(crate) const BESIDE: &str = "CREATE TABLE beside (id BIGSERIAL PRIMARY KEY, unit BIGINT NOT NULL)";

/// Collects units and errors.
pub(crate) trait Witness: Send + Sync + 'static {
    fn note(&self, unit: i64, fate: Fate);
    fn count(&self, what: &str);
}

/// Runs all these writers until this time, an equal share on each engine.
pub(crate) async fn run<W: Witness>(
    engines: &[PostgresEngine],
    writers: std::ops::Range<usize>,
    until: Instant,
    witness: &Arc<W>,
) {
    let mut tasks = Vec::new();
    for writer in writers {
        let engine = engines[writer % engines.len()].clone();
        tasks.push(tokio::spawn(write(engine, writer, until, Arc::clone(witness))));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

async fn write<W: Witness>(engine: PostgresEngine, writer: usize, until: Instant, witness: Arc<W>) {
    let writer = Writer { store: patient_not(&engine), engine, writer, witness };
    let mut rng = Rng::new();
    for nth in 1.. {
        if Instant::now() >= until {
            return;
        }
        let way = Way::any(&mut rng);
        let unit = number(writer.writer, nth * 2 + i64::from(way.has_row()));
        let fate = writer.write(unit, way, &mut rng).await;
        writer.witness.note(unit, fate);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Quick,
    /// Waits this many milliseconds between reading and writing.
    Slow(u64),
    /// Also writes a row, and keeps its transaction open for this long.
    Beside(u64),
    /// The same, and then the SQL fails.
    Refused,
    /// Is dropped before the commit.
    Dropped,
    /// Is dropped during the commit.
    Gone,
}

impl Way {
    fn any(rng: &mut Rng) -> Self {
        match rng.u32(0..16) {
            0..=1 => Self::Slow(rng.u64(1..40)),
            2 => Self::Beside(rng.u64(20..150)),
            3..=4 => Self::Beside(0),
            5 => Self::Refused,
            6 => Self::Dropped,
            7 => Self::Gone,
            _ => Self::Quick,
        }
    }

    fn has_row(self) -> bool {
        matches!(self, Self::Beside(_) | Self::Refused)
    }
}

struct Writer<W> {
    engine: PostgresEngine,
    store: EventStore,
    writer: usize,
    witness: Arc<W>,
}

impl<W: Witness> Writer<W> {
    async fn write(&self, unit: i64, way: Way, rng: &mut Rng) -> Fate {
        // A writer that goes away needs a command id, to ask later.
        let has_command = way == Way::Gone || rng.u32(0..4) > 0;
        let outcome = match self.prepare(unit, has_command, rng).await {
            Ok(work) => self.commit(work, unit, way, rng).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(Some(receipt)) => Fate::from(&receipt),
            Ok(None) => Fate::Never,
            Err(error) => {
                assert!(is_foreseen(&error, way), "{way:?} met {error:?}");
                self.witness.count(&word(&error));
                match (is_unknown(&error), has_command) {
                    (true, true) => self.settle(unit).await,
                    (true, false) => Fate::Either,
                    (false, _) => Fate::Never,
                }
            }
        }
    }

    async fn prepare(&self, unit: i64, has_command: bool, rng: &mut Rng) -> Result<UnitOfWork> {
        let mut work = self.store.begin();
        let mut accounts = Vec::new();
        for account in rng.choose_multiple(0..ACCOUNTS, rng.clone().usize(1..=3)) {
            let account = work.load_or_create::<Account>(format!("account {account}")).await?;
            assert_eq!(
                account.events,
                account.sequence().get(),
                "a state that has missed some of its events"
            );
            accounts.push(account);
        }
        record(&mut work, &mut accounts, unit, rng.usize(1..=6));
        if has_command {
            work.set_command(command(unit));
        }
        Ok(work)
    }

    /// `None` if it was never sent.
    async fn commit(&self, work: UnitOfWork, unit: i64, way: Way, rng: &mut Rng) -> Result<Option<Receipt>> {
        match way {
            Way::Quick => work.commit().await.map(Some),
            Way::Slow(pause) => {
                tokio::time::sleep(milliseconds(pause)).await;
                work.commit().await.map(Some)
            }
            Way::Beside(pause) => beside(&self.engine, work, unit, pause, false).await.map(Some),
            Way::Refused => beside(&self.engine, work, unit, 0, true).await.map(Some),
            Way::Dropped => Ok(None),
            Way::Gone => {
                let patience = milliseconds(rng.u64(0..8));
                let gone = |_| Err(Error::new(ErrorKind::OutcomeUnknown, "went away"));
                tokio::time::timeout(patience, work.commit()).await.unwrap_or_else(gone).map(Some)
            }
        }
    }

    async fn settle(&self, unit: i64) -> Fate {
        let patience = Patience::new();
        loop {
            match self.store.settle(&command(unit)).await {
                Ok(settled) => {
                    self.witness.count(if settled.is_some() {
                        "settled as committed"
                    } else {
                        "settled as never"
                    });
                    return Fate::from(settled);
                }
                Err(error) => {
                    assert_eq!(*error.kind(), ErrorKind::Unavailable, "{error:?}");
                    patience.pause(&error).await;
                }
            }
        }
    }
}

fn is_foreseen(error: &Error, way: Way) -> bool {
    match error.kind() {
        ErrorKind::Conflict { .. } | ErrorKind::Unavailable | ErrorKind::OutcomeUnknown => true,
        // Also if the connection broke while the SQL ran.
        ErrorKind::Rejected => way.has_row(),
        _ => false,
    }
}

/// Commits together with a row.
pub(crate) async fn beside(
    engine: &PostgresEngine,
    work: UnitOfWork,
    unit: i64,
    pause: u64,
    says_no: bool,
) -> Result<Receipt> {
    let run = engine.commit_with(work, move |sql| {
        Box::pin(async move {
            sql.execute("INSERT INTO public.beside (unit) VALUES ($1)", &[&unit]).await?;
            if pause > 0 {
                sql.execute("SELECT pg_sleep($1)", &[&(pause as f64 / 1000.0)]).await?;
            }
            if says_no { Err("no".into()) } else { Ok(()) }
        })
    });
    run.await
}

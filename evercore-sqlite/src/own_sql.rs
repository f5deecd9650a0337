//! The user's own SQL in the transaction of a commit: held to a time-out, and kept from ending the transaction.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use evercore_core::{BoxError, Error, ErrorKind, Receipt, UnitOfWork};
use rusqlite::Connection;

use crate::engine::SqliteEngine;

/// How many steps of SQLite's machine lie between two looks at the clock: some microseconds.
const STEPS_PER_LOOK: i32 = 1_000;

impl SqliteEngine {
    /// Commits a unit of work together with SQL of your own, in one transaction: a row of a read model, a message in
    /// an outbox. All of it is written, or nothing of it.
    ///
    /// The SQL runs first, then the unit's checks and writes. It queues for the one writer as every commit does, on a
    /// thread that may block, and has a transaction and a flush of its own. With a
    /// [command id](UnitOfWork::set_command_id) it takes effect once: for a command that took effect before, it is
    /// not run. A unit that holds nothing is fine; that is how a table is made.
    ///
    /// ```
    /// # use evercore_sqlite::{Aggregate, EventStore, Json, Result, SqliteEngine};
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Clone, Default, Serialize, Deserialize)] struct Order { placed: bool }
    /// # #[derive(Serialize, Deserialize)] enum OrderEvent { Placed }
    /// # impl Aggregate for Order {
    /// #     const TYPE: &'static str = "order"; type Event = OrderEvent; type Codec = Json;
    /// #     fn apply(&mut self, _: OrderEvent) { self.placed = true }
    /// # }
    /// # fn main() -> Result<()> { futures_lite::future::block_on(async {
    /// let engine = SqliteEngine::open_in_memory().await?;
    /// let store = EventStore::new(engine.clone());
    /// let table = "CREATE TABLE IF NOT EXISTS shop_outbox (id INTEGER PRIMARY KEY, message TEXT NOT NULL) STRICT";
    /// engine.commit_with(store.begin(), move |sql| Ok(sql.execute_batch(table)?)).await?;
    ///
    /// let mut work = store.begin();
    /// let mut order = work.create_with_key::<Order>("order 7").await?;
    /// work.record(&mut order, OrderEvent::Placed)?;
    /// let message = format!("confirm order {}", order.id());
    /// engine
    ///     .commit_with(work, move |sql| {
    ///         sql.prepare_cached("INSERT INTO shop_outbox (message) VALUES (?1)")?.execute([message])?;
    ///         Ok(())
    ///     })
    ///     .await?;
    /// # Ok(()) }) }
    /// ```
    ///
    /// While it runs, nobody else writes. A statement that runs past [`sql_timeout`](crate::Builder::sql_timeout) is
    /// interrupted. Code that blocks or computes between two statements cannot be: the clock is looked at again when
    /// it returns, and then nothing is written. So it should do nothing but SQL, and must not wait for this store,
    /// which waits for it.
    ///
    /// The connection is the engine's: leave its settings and hooks as they are. It enforces foreign keys. The tables
    /// of evercore may be read, never written; give yours names of their own, with a prefix. COMMIT and ROLLBACK are
    /// refused, savepoints are fine. A panic writes nothing and goes on in the caller.
    ///
    /// # Errors
    /// [`Rejected`](ErrorKind::Rejected) with the SQL's own error as its source, or if it took too long;
    /// [`Invalid`](ErrorKind::Invalid) if the unit belongs to another engine, or if the SQL ended the transaction;
    /// otherwise as [`UnitOfWork::commit`].
    pub async fn commit_with<F>(&self, work: UnitOfWork, sql: F) -> Result<Receipt, Error>
    where
        F: FnOnce(&Connection) -> Result<(), BoxError> + Send + 'static,
    {
        if !self.is_engine_of(&work) {
            return Err(Error::invalid("the unit of work belongs to another engine"));
        }
        let sql = OwnSql(Box::new(sql));
        let outcome = work.commit_by(|batch| self.commit_batch(batch, Some(sql))).await;
        if let Err(error) = &outcome
            && let Some(panic) = error.cause::<Panic>().and_then(Panic::take)
        {
            resume_unwind(panic);
        }
        outcome
    }

    fn is_engine_of(&self, work: &UnitOfWork) -> bool {
        let engine: &dyn Any = work.engine();
        engine.downcast_ref::<Self>().is_some_and(|other| std::ptr::eq(self.store(), other.store()))
    }
}

type Run = Box<dyn FnOnce(&Connection) -> Result<(), BoxError> + Send>;

/// What the user wants to run in the transaction of a commit.
pub(crate) struct OwnSql(Run);

impl OwnSql {
    /// Runs it in the open transaction, which is to be rolled back after an error.
    pub(crate) fn run(self, connection: &Connection, timeout: Duration) -> crate::error::Result<()> {
        let watch = Watch::begin(connection, timeout)?;
        // What the panic may have left half done is in the transaction, which does not survive it.
        let run = catch_unwind(AssertUnwindSafe(|| (self.0)(connection)));
        watch.verdict(run.unwrap_or_else(|payload| Err(Panic::new(payload).into())))?;
        Ok(())
    }
}

impl fmt::Debug for OwnSql {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnSql").finish_non_exhaustive()
    }
}

/// Watches over a connection while it runs the user's SQL, and takes its hooks off again.
struct Watch<'a> {
    connection: &'a Connection,
    timeout: Duration,
    until: Option<Instant>,
    saw: Arc<Saw>,
}

/// What the SQL did to the transaction that is not its own.
#[derive(Default)]
struct Saw {
    commit: AtomicBool,
    rollback: AtomicBool,
}

impl<'a> Watch<'a> {
    fn begin(connection: &'a Connection, timeout: Duration) -> rusqlite::Result<Self> {
        let (until, saw) = (Instant::now().checked_add(timeout), Arc::<Saw>::default());
        let (committing, rolled_back) = (Arc::clone(&saw), Arc::clone(&saw));
        let watch = Self { connection, timeout, until, saw };
        connection.progress_handler(STEPS_PER_LOOK, Some(move || is_past(until)))?;
        connection.commit_hook(Some(move || {
            committing.commit.store(true, Ordering::Relaxed);
            true // makes a rollback of it: nothing of the SQL lasts without the batch
        }))?;
        connection.rollback_hook(Some(move || rolled_back.rollback.store(true, Ordering::Relaxed)))?;
        Ok(watch)
    }

    /// Whether the transaction may go on.
    fn verdict(self, outcome: Result<(), BoxError>) -> Result<(), Error> {
        let Some(refusal) = self.refusal(outcome.as_ref().err()) else { return Ok(()) };
        Err(match outcome {
            Ok(()) => refusal,
            Err(source) => refusal.with_source(source),
        })
    }

    /// An interrupted statement rolls back by itself, and so do some errors: what caused it goes first.
    fn refusal(&self, error: Option<&BoxError>) -> Option<Error> {
        let rejected = |message: String| Some(Error::new(ErrorKind::Rejected, message));
        if error.is_some_and(|error| error.is::<Panic>()) {
            return rejected("the SQL beside the commit panicked".to_owned());
        }
        if is_past(self.until) {
            return rejected(format!("the SQL beside the commit took longer than {:?}", self.timeout));
        }
        if self.saw.commit.load(Ordering::Relaxed) || (error.is_none() && self.has_ended()) {
            return Some(Error::invalid(
                "the SQL beside the commit ended the transaction, which is not its own",
            ));
        }
        error.and_then(|_| rejected("the SQL beside the commit said no".to_owned()))
    }

    fn has_ended(&self) -> bool {
        self.saw.rollback.load(Ordering::Relaxed) || self.connection.is_autocommit()
    }
}

/// The hooks must be gone before the engine's own COMMIT.
impl Drop for Watch<'_> {
    fn drop(&mut self) {
        // They fail only on a connection that somebody else has opened.
        let _ = self.connection.progress_handler(0, None::<fn() -> bool>);
        let _ = self.connection.commit_hook(None::<fn() -> bool>);
        let _ = self.connection.rollback_hook(None::<fn()>);
    }
}

fn is_past(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() >= until)
}

/// A panic of the user's SQL, on its way back to the user.
struct Panic(Mutex<Option<Box<dyn Any + Send>>>);

impl Panic {
    fn new(payload: Box<dyn Any + Send>) -> Self {
        Self(Mutex::new(Some(payload)))
    }

    fn take(&self) -> Option<Box<dyn Any + Send>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl fmt::Debug for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Panic")
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a panic")
    }
}

impl std::error::Error for Panic {}

//! Runs the user's SQL in one of our transactions, under a time-out. It cannot end the transaction.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use evercore_core::engine::CaughtPanic;
use evercore_core::{BoxError, Error, ErrorKind};
use rusqlite::Connection;

use crate::error::{Fault, Result};

/// How many steps of SQLite's virtual machine run between two checks of the time: some microseconds.
const STEPS_PER_CHECK: i32 = 1_000;

/// Runs it in the open transaction, which must be rolled back after an error. `what` names the SQL in errors.
pub(crate) fn run(
    connection: &Connection,
    timeout: Duration,
    what: &str,
    sql: impl FnOnce(&Connection) -> Result<(), BoxError>,
) -> Result<()> {
    let limits = Limits::set(connection, timeout)?;
    // A panic may leave the transaction half done, but the transaction is then rolled back.
    let outcome = catch_unwind(AssertUnwindSafe(|| sql(connection)));
    limits.check(what, outcome.unwrap_or_else(|payload| Err(CaughtPanic::new(payload).into())))?;
    Ok(())
}

/// Limits what a connection can do while the user's SQL runs. Dropping it removes the hooks.
struct Limits<'a> {
    connection: &'a Connection,
    timeout: Duration,
    until: Option<Instant>,
    ended: Arc<Ended>,
}

/// How the SQL tried to end the transaction.
#[derive(Default)]
struct Ended {
    by_commit: AtomicBool,
    by_rollback: AtomicBool,
}

impl<'a> Limits<'a> {
    fn set(connection: &'a Connection, timeout: Duration) -> rusqlite::Result<Self> {
        let (until, ended) = (Instant::now().checked_add(timeout), Arc::<Ended>::default());
        let (committed, rolled_back) = (Arc::clone(&ended), Arc::clone(&ended));
        let limits = Self { connection, timeout, until, ended };
        connection.progress_handler(STEPS_PER_CHECK, Some(move || is_past(until)))?;
        connection.commit_hook(Some(move || {
            committed.by_commit.store(true, Ordering::Relaxed);
            true // turns the commit into a rollback, so that no SQL is kept without the batch
        }))?;
        connection.rollback_hook(Some(move || rolled_back.by_rollback.store(true, Ordering::Relaxed)))?;
        Ok(limits)
    }

    /// Whether the transaction may continue.
    fn check(self, what: &str, outcome: Result<(), BoxError>) -> Result<(), Fault> {
        let broken = self.broken_rule(what, outcome.as_ref().err());
        match (broken, outcome) {
            (None, Ok(())) => Ok(()),
            (Some(fault), Ok(())) => Err(fault),
            (Some(fault), Err(source)) => Err(fault.because(source)),
            (None, Err(source)) => {
                let did = if source.is::<CaughtPanic>() { "panicked" } else { "failed" };
                Err(Fault::Failed { message: format!("{what} {did}"), source })
            }
        }
    }

    /// The time-out comes first: an interrupted statement rolls back by itself, as some errors do.
    fn broken_rule(&self, what: &str, error: Option<&BoxError>) -> Option<Fault> {
        if error.is_some_and(|error| error.is::<CaughtPanic>()) {
            return None;
        }
        if is_past(self.until) {
            let message = format!("{what} took longer than {:?}", self.timeout);
            return Some(Fault::TookTooLong(Error::new(ErrorKind::Rejected, message)));
        }
        if self.ended.by_commit.load(Ordering::Relaxed) || (error.is_none() && self.is_rolled_back()) {
            let message = format!("{what} ended the transaction, which only the engine may end");
            return Some(Fault::BrokeRules(Error::invalid(message)));
        }
        None
    }

    fn is_rolled_back(&self) -> bool {
        self.ended.by_rollback.load(Ordering::Relaxed) || self.connection.is_autocommit()
    }
}

/// The hooks must be gone before the engine's own COMMIT.
impl Drop for Limits<'_> {
    fn drop(&mut self) {
        // This fails only on a connection that rusqlite did not open.
        let _ = self.connection.progress_handler(0, None::<fn() -> bool>);
        let _ = self.connection.commit_hook(None::<fn() -> bool>);
        let _ = self.connection.rollback_hook(None::<fn()>);
    }
}

fn is_past(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() >= until)
}

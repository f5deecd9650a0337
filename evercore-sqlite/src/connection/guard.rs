//! The user's SQL in a transaction of ours: held to a time-out, and kept from ending the transaction.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use evercore_core::{BoxError, Error, ErrorKind};
use rusqlite::Connection;

use crate::error::{Because, Fault, Panicked};

/// How many steps of SQLite's machine lie between two looks at the clock: some microseconds.
const STEPS_PER_LOOK: i32 = 1_000;

/// Runs it in the open transaction, which is to be rolled back after an error. `what` it is, the error says.
pub(crate) fn run(
    connection: &Connection,
    timeout: Duration,
    what: &str,
    sql: impl FnOnce(&Connection) -> Result<(), BoxError>,
) -> crate::error::Result<()> {
    let watch = Watch::begin(connection, timeout)?;
    // What the panic may have left half done is in the transaction, which does not survive it.
    let outcome = catch_unwind(AssertUnwindSafe(|| sql(connection)));
    watch.verdict(what, outcome.unwrap_or_else(|payload| Err(Panicked::new(payload).into())))?;
    Ok(())
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
    fn verdict(self, what: &str, outcome: Result<(), BoxError>) -> Result<(), Fault> {
        let overstepped = self.overstepped(what, outcome.as_ref().err());
        match (overstepped, outcome) {
            (None, Ok(())) => Ok(()),
            (Some(refusal), Ok(())) => Err(Fault::Overstepped(refusal)),
            (Some(refusal), Err(source)) => Err(Fault::Overstepped(refusal.because(source))),
            (None, Err(source)) => {
                let did = if source.is::<Panicked>() { "panicked" } else { "said no" };
                Err(Fault::Said { message: format!("{what} {did}"), source })
            }
        }
    }

    /// An interrupted statement rolls back by itself, and so do some errors: what caused it goes first.
    fn overstepped(&self, what: &str, error: Option<&BoxError>) -> Option<Error> {
        if error.is_some_and(|error| error.is::<Panicked>()) {
            return None;
        }
        if is_past(self.until) {
            let message = format!("{what} took longer than {:?}", self.timeout);
            return Some(Error::new(ErrorKind::Rejected, message));
        }
        if self.saw.commit.load(Ordering::Relaxed) || (error.is_none() && self.has_ended()) {
            return Some(Error::invalid(format!("{what} ended the transaction, which is not its own")));
        }
        None
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

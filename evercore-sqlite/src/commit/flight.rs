//! A flight: commits that arrive while another one runs are written together, in one transaction.
//!
//! The flush is the expensive part. So everything that is queued when a flight begins goes with it, and each batch gets
//! its own result. The flight is led by the engine's own thread, or by the caller with `commit_on_caller_thread`.

use evercore_core::engine::Batch;
use evercore_core::{BoxError, Error, ErrorKind, Receipt, Result};
use futures_channel::oneshot;
use rusqlite::Connection;

use crate::commit::batch::BatchWriter;
use crate::connection::transaction::{self, Failure};
use crate::connection::user_sql;
use crate::error::{self, SqliteError};
use crate::store::{LockedWriter, Store};
use crate::subscription::inline::{self, InlineProjection};

/// The user's own SQL in the transaction of a commit.
pub(crate) type OwnSql = Box<dyn FnOnce(&Connection) -> Result<(), BoxError> + Send>;

/// A batch that waits to be committed, with the user's own SQL if there is some.
pub(crate) struct Job {
    batch: Batch,
    sql: Option<OwnSql>,
    reply: oneshot::Sender<Result<Receipt>>,
}

/// Gives the caller its result.
pub(crate) type Answer = oneshot::Receiver<Result<Receipt>>;

impl Job {
    pub(crate) fn new(batch: Batch, sql: Option<OwnSql>) -> (Self, Answer) {
        let (reply, answer) = oneshot::channel();
        (Self { batch, sql, reply }, answer)
    }

    /// The caller may have gone: then nobody needs the answer.
    fn answer(self, outcome: Result<Receipt>) {
        let _ = self.reply.send(outcome);
    }
}

/// Answers all jobs with one error.
pub(crate) fn refuse(jobs: Vec<Job>, error: &Error) {
    jobs.into_iter().for_each(|job| job.answer(Err(error.again())));
}

/// The flights of one store, with the inline projections that they fill.
#[derive(Clone, Copy)]
pub(crate) struct Flights<'a> {
    pub(crate) store: &'a Store,
    pub(crate) inline: &'a [InlineProjection],
}

impl Flights<'_> {
    /// Commits all jobs. `between` runs between two pages that inline projections have to catch up with.
    pub(crate) fn lead(self, jobs: Vec<Job>, between: impl Fn()) {
        if jobs.iter().any(|job| job.batch.events() > 0)
            && let Err(error) = self.catch_up(between)
        {
            return refuse(jobs, &error);
        }
        match self.store.lock() {
            Ok(mut writer) => self.fly(&mut writer, jobs),
            Err(error) => refuse(jobs, &error),
        }
    }

    /// Lets inline projections catch up. Only a locked store stops the flight here: any other failure happens again in
    /// the flight, and only to the batches that it concerns.
    pub(crate) fn catch_up(self, between: impl Fn()) -> Result<()> {
        match inline::catch_up_before_commit(self.store, self.inline, between) {
            Err(error) if *error.kind() == ErrorKind::Unavailable => Err(error),
            _ => Ok(()),
        }
    }

    /// Writes all jobs, answers them, and then tidies up.
    pub(crate) fn fly(self, writer: &mut LockedWriter<'_>, jobs: Vec<Job>) {
        let events = jobs.iter().map(|job| job.batch.events()).sum();
        let (alone, together): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|job| job.sql.is_some());
        let batches: Vec<&Batch> = together.iter().map(|job| &job.batch).collect();
        let outcomes = self.outcomes(writer, &batches);
        together.into_iter().zip(outcomes).for_each(|(job, outcome)| job.answer(outcome));
        for mut job in alone {
            let Some(sql) = job.sql.take() else { continue };
            let outcome = self.with_sql(writer, &job.batch, sql);
            job.answer(outcome);
        }
        // A failure here happens again in a later call, which reports it.
        let _ = self.store.tidy(writer, events);
    }

    /// A batch with SQL has its own transaction, so that no other batch is rolled back with it.
    fn with_sql(self, writer: &mut LockedWriter<'_>, batch: &Batch, sql: OwnSql) -> Result<Receipt> {
        let connection = &writer.get()?.connection;
        let timeout = self.store.settings.sql_timeout;
        let run =
            |connection: &Connection| user_sql::run(connection, timeout, "the SQL of `commit_with`", sql);
        let outcome = self.transact(connection, |writer| writer.batch_after(run, batch));
        outcome.map_err(|failure| self.store.to_error(writer, failure))
    }

    fn outcomes(self, writer: &mut LockedWriter<'_>, batches: &[&Batch]) -> Vec<Result<Receipt>> {
        if batches.is_empty() {
            return Vec::new();
        }
        let Ok(open) = writer.get() else { return for_all(batches, &Error::closed()) };
        let written = self
            .transact(&open.connection, |writer| batches.iter().map(|batch| writer.batch(batch)).collect());
        match written {
            Ok(outcomes) => outcomes,
            Err(Failure::Unknown) => {
                self.store.fail(writer);
                for_all(batches, &Error::outcome_unknown("the commit"))
            }
            // A lock of another process is not the fault of one batch.
            Err(Failure::RolledBack(SqliteError::Sqlite(busy))) if error::is_busy(&busy) => {
                for_all(batches, &SqliteError::from(busy).into())
            }
            Err(Failure::RolledBack(error)) if batches.len() == 1 => vec![Err(error.into())],
            // The checks did not foresee the failure of one batch. Each is written alone, so that only that one fails.
            Err(Failure::RolledBack(_)) => {
                batches.iter().flat_map(|batch| self.outcomes(writer, std::slice::from_ref(batch))).collect()
            }
        }
    }

    /// Runs one transaction of the log. Its names and its end become known only after it has committed.
    fn transact<T>(
        self,
        connection: &Connection,
        work: impl FnOnce(&mut BatchWriter<'_>) -> error::Result<T>,
    ) -> Result<T, Failure> {
        let store = self.store;
        let (outcome, written) = transaction::write(connection, |connection| {
            let mut writer = BatchWriter::new(connection, &store.names)?;
            let outcome = work(&mut writer)?;
            let written = writer.finish();
            if written.has_events {
                inline::handle_new_events(connection, store, self.inline, written.head)?;
            }
            Ok((outcome, written))
        })?;
        store.names.learn(written.fresh_names);
        // Wakes waiters in any case: a reader may have noted the new head before, and waiters may still sleep.
        if written.has_events {
            store.note_head(written.head);
            store.committed.notify(usize::MAX);
        }
        Ok(outcome)
    }
}

fn for_all(batches: &[&Batch], error: &Error) -> Vec<Result<Receipt>> {
    batches.iter().map(|_| Err(error.again())).collect()
}

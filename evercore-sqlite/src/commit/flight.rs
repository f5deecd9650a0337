//! Combining: commits that arrive while one is under way are written together, in one transaction.
//!
//! The flush is what costs, so everything that is queued when a flight begins goes with it, each batch with its own
//! outcome. The engine's own thread leads, or the caller itself if the user said so.

use evercore_core::{Batch, Error, ErrorKind, Receipt, Result};
use rusqlite::Connection;

use crate::commit::batch::Writer;
use crate::commit::own_sql::OwnSql;
use crate::commit::queue::Job;
use crate::connection::transaction::{self, Failure};
use crate::error::{self, SqliteError, again, closed, outcome_unknown};
use crate::names::Registrar;
use crate::store::{Locked, Store};
use crate::subscription::inline;

/// Flies with all jobs of the queue. `between` runs between two pages of what inline projections have to catch up with.
pub(crate) fn lead(store: &Store, jobs: Vec<Job>, between: impl Fn()) {
    if jobs.iter().any(|job| job.batch.events() > 0)
        && let Err(error) = inline::draw_near(store, between)
        && *error.kind() == ErrorKind::Unavailable
    {
        return jobs.into_iter().for_each(|job| job.answer(Err(again(&error))));
    }
    // What else was in the way is so again in the flight, which tells each of them.
    match store.lock() {
        Ok(mut writer) => fly(store, &mut writer, jobs),
        Err(error) => jobs.into_iter().for_each(|job| job.answer(Err(again(&error)))),
    }
}

/// Commits on this thread. Whoever gets the writer flies everything that is queued, so the answer may be there
/// already.
pub(crate) fn commit_here(store: &Store, batch: Batch, sql: Option<OwnSql>) -> Result<Receipt> {
    if batch.events() > 0
        && let Err(error) = inline::draw_near(store, || ())
        && *error.kind() == ErrorKind::Unavailable
    {
        return Err(error);
    }
    let mut answer = store.queue.push_here(batch, sql);
    match store.lock() {
        Ok(mut writer) => {
            if let Ok(Some(outcome)) = answer.try_recv() {
                return outcome;
            }
            fly(store, &mut writer, store.queue.take());
        }
        Err(error) => store.queue.take().into_iter().for_each(|job| job.answer(Err(again(&error)))),
    }
    answer.try_recv().ok().flatten().unwrap_or_else(|| Err(outcome_unknown()))
}

/// Writes all jobs, answers them, and then does what nobody waits for.
fn fly(store: &Store, writer: &mut Locked<'_>, jobs: Vec<Job>) {
    let events = jobs.iter().map(|job| job.batch.events()).sum();
    let (alone, together): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|job| job.sql.is_some());
    let batches: Vec<&Batch> = together.iter().map(|job| &job.batch).collect();
    let outcomes = outcomes(store, writer, &batches);
    together.into_iter().zip(outcomes).for_each(|(job, outcome)| job.answer(outcome));
    for mut job in alone {
        let Some(sql) = job.sql.take() else { continue };
        let outcome = with_sql(store, writer, &job.batch, sql);
        job.answer(outcome);
    }
    // What fails here fails a later call too, and is told there.
    let _ = store.tidy(writer, events);
}

/// Whoever brings SQL has a transaction of their own: nobody else is to be rolled back with it.
fn with_sql(store: &Store, writer: &mut Locked<'_>, batch: &Batch, sql: OwnSql) -> Result<Receipt> {
    let connection = &writer.get()?.connection;
    let run = |connection: &Connection| sql.run(connection, store.settings.sql_timeout);
    let outcome = transact(store, connection, |writer| writer.batch_after(run, batch));
    outcome.map_err(|failure| store.told(writer, failure))
}

fn outcomes(store: &Store, writer: &mut Locked<'_>, batches: &[&Batch]) -> Vec<Result<Receipt>> {
    if batches.is_empty() {
        return Vec::new();
    }
    let Ok(open) = writer.get() else { return all(batches, &closed()) };
    match together(store, &open.connection, batches) {
        Ok(outcomes) => outcomes,
        Err(Failure::Unknown) => {
            store.fail(writer);
            all(batches, &outcome_unknown())
        }
        // What is in everybody's way is not the fault of one batch.
        Err(Failure::RolledBack(SqliteError::Sqlite(busy))) if error::is_busy(&busy) => {
            all(batches, &SqliteError::from(busy).into())
        }
        Err(Failure::RolledBack(error)) if batches.len() == 1 => vec![Err(error.into())],
        // One of them does what the checks did not foresee: alone, it fails alone.
        Err(Failure::RolledBack(_)) => {
            batches.iter().flat_map(|batch| outcomes(store, writer, std::slice::from_ref(batch))).collect()
        }
    }
}

fn all(batches: &[&Batch], error: &Error) -> Vec<Result<Receipt>> {
    batches.iter().map(|_| Err(again(error))).collect()
}

/// One transaction for all.
fn together(
    store: &Store,
    connection: &Connection,
    batches: &[&Batch],
) -> Result<Vec<Result<Receipt>>, Failure> {
    transact(store, connection, |writer| batches.iter().map(|batch| writer.batch(batch)).collect())
}

/// A transaction of the log; names and head are taken over only after it has committed.
fn transact<T>(
    store: &Store,
    connection: &Connection,
    work: impl FnOnce(&mut Writer<'_>) -> error::Result<T>,
) -> Result<T, Failure> {
    let (outcome, before, head, fresh) = transaction::write(connection, |connection| {
        let mut writer = Writer::new(connection, Registrar::new(connection, &store.names))?;
        let before = writer.head();
        let outcome = work(&mut writer)?;
        let (head, names) = writer.finish();
        if before.position < head.position {
            inline::follow(connection, store, head.position)?;
        }
        Ok((outcome, before, head, names.into_fresh()))
    })?;
    store.names.learn(fresh);
    // Whether somebody has looked and seen the new head meanwhile does not matter: others may still sleep.
    if before.position < head.position {
        store.saw(head.position);
        store.committed.notify(usize::MAX);
    }
    Ok(outcome)
}

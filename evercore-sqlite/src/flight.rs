//! Combining: commits that arrive while one is under way are written together, in one transaction.
//!
//! The flush is what costs, so everything that is queued when a flight begins goes with it, each batch with its own
//! outcome. The first caller in sees to it that somebody leads: a thread that may block, or itself if the user said so.

use std::sync::{Mutex, MutexGuard, PoisonError};

use evercore_core::{Batch, Error, Receipt, Result};
use futures_channel::oneshot;
use rusqlite::Connection;

use crate::commit::Writer;
use crate::error::{self, SqliteError, again, closed, outcome_unknown};
use crate::inline;
use crate::names::Registrar;
use crate::own_sql::OwnSql;
use crate::store::{Locked, Store};
use crate::transaction::{self, Failure};

/// A batch on its way, with the user's own SQL if there is some, and who waits for it.
#[derive(Debug)]
struct Job {
    batch: Batch,
    sql: Option<OwnSql>,
    reply: oneshot::Sender<Result<Receipt>>,
}

/// The commits that wait for the next flight.
#[derive(Debug, Default)]
pub(crate) struct Queue(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    jobs: Vec<Job>,
    has_leader: bool,
}

/// Where a caller finds the answer.
pub(crate) type Answer = oneshot::Receiver<Result<Receipt>>;

impl Queue {
    /// Queues a batch; `true` if the caller is to lead.
    pub(crate) fn push(&self, batch: Batch, sql: Option<OwnSql>) -> (Answer, bool) {
        let (reply, answer) = oneshot::channel();
        let mut waiting = self.lock();
        waiting.jobs.push(Job { batch, sql, reply });
        (answer, !std::mem::replace(&mut waiting.has_leader, true))
    }

    fn take(&self) -> Vec<Job> {
        std::mem::take(&mut self.lock().jobs)
    }

    /// What is queued; if that is nothing, the leader is one no more.
    fn take_or_resign(&self) -> Option<Vec<Job>> {
        let mut waiting = self.lock();
        waiting.has_leader = !waiting.jobs.is_empty();
        waiting.has_leader.then(|| std::mem::take(&mut waiting.jobs))
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Flies until nobody waits any more.
pub(crate) fn lead(store: &Store) {
    let leader = Leader(&store.queue);
    while let Some(jobs) = leader.0.take_or_resign() {
        match store.lock() {
            Ok(mut writer) => fly(store, &mut writer, jobs),
            Err(error) => jobs.into_iter().for_each(|job| job.answer(Err(again(&error)))),
        }
    }
}

/// Commits on this thread. Whoever gets the writer flies everything that is queued, so the answer may be there
/// already.
pub(crate) fn commit_here(store: &Store, batch: Batch, sql: Option<OwnSql>) -> Result<Receipt> {
    let (mut answer, _) = store.queue.push(batch, sql);
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

/// Sees to it that a panic of the leader does not leave the others waiting for ever: who drops a [`Job`] answers it.
struct Leader<'a>(&'a Queue);

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut waiting = self.0.lock();
            waiting.has_leader = false;
            waiting.jobs.clear();
        }
    }
}

impl Job {
    /// The caller may have gone; then nobody needs the answer.
    fn answer(self, outcome: Result<Receipt>) {
        let _ = self.reply.send(outcome);
    }
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

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
use crate::names::Registrar;
use crate::store::{Locked, Store};
use crate::transaction::{self, Failure};

/// A batch on its way, and who waits for it.
#[derive(Debug)]
struct Job {
    batch: Batch,
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
    pub(crate) fn push(&self, batch: Batch) -> (Answer, bool) {
        let (reply, answer) = oneshot::channel();
        let mut waiting = self.lock();
        waiting.jobs.push(Job { batch, reply });
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
pub(crate) fn commit_here(store: &Store, batch: Batch) -> Result<Receipt> {
    let (mut answer, _) = store.queue.push(batch);
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
    let batches: Vec<&Batch> = jobs.iter().map(|job| &job.batch).collect();
    let outcomes = outcomes(store, writer, &batches);
    let events = jobs.iter().map(|job| job.batch.events()).sum();
    jobs.into_iter().zip(outcomes).for_each(|(job, outcome)| job.answer(outcome));
    // What fails here fails a later call too, and is told there.
    let _ = store.tidy(writer, events);
}

fn outcomes(store: &Store, writer: &mut Locked<'_>, batches: &[&Batch]) -> Vec<Result<Receipt>> {
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

/// One transaction for all; names and head are taken over only after it has committed.
fn together(
    store: &Store,
    connection: &Connection,
    batches: &[&Batch],
) -> Result<Vec<Result<Receipt>>, Failure> {
    let (outcomes, before, head, fresh) = transaction::write(connection, |connection| {
        let mut writer = Writer::new(connection, Registrar::new(connection, &store.names))?;
        let before = writer.head();
        let outcomes = batches.iter().map(|batch| writer.batch(batch)).collect::<error::Result<Vec<_>>>()?;
        let (head, names) = writer.finish();
        Ok((outcomes, before, head, names.into_fresh()))
    })?;
    store.names.learn(fresh);
    // Whether somebody has looked and seen the new head meanwhile does not matter: others may still sleep.
    if before.position < head.position {
        store.saw(head.position);
        store.committed.notify(usize::MAX);
    }
    Ok(outcomes)
}

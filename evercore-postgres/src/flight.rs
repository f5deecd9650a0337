//! Combining: commits that arrive while one is under way are written together, in one transaction.
//!
//! The flush and the round trip are what costs, so everything that is queued when a flight begins goes with it, each
//! batch with its own outcome. A flight is owned by a task of its own: a caller who goes away loses the answer and
//! leaves the flight alone.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use evercore_core::{Batch, CommandId, Error, ErrorKind, Position, Receipt, Result};
use futures_channel::oneshot;
use futures_lite::future::yield_now;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::commit::{self, Flown};
use crate::error::{again, outcome_unknown};
use crate::inline;
use crate::store::Store;
use crate::task::no_runtime;
use crate::wait;

/// How many events one flight carries, unless a single batch has more.
const MOST_EVENTS: usize = 10_000;

/// How many payload bytes one flight carries, unless a single batch has more.
const MOST_BYTES: usize = 32 * 1024 * 1024;

/// How often at most those who were answered are given a turn before the next flight.
const ROUNDS: usize = 4;

/// How often to look again when the server undid a flight for reasons that pass, a deadlock or a race.
const ATTEMPTS: usize = 3;

/// A batch on its way, and who waits for it.
#[derive(Debug)]
struct Job {
    batch: Batch,
    reply: oneshot::Sender<Result<Receipt>>,
}

impl Job {
    /// The caller may have gone; then nobody needs the answer.
    fn answer(self, outcome: Result<Receipt>) {
        let _ = self.reply.send(outcome);
    }
}

/// The commits that wait for the next flight.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    idle: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    has_leader: bool,
    /// How many jobs flew last.
    last_flight: usize,
}

impl Queue {
    /// Queues a batch; `true` if nobody leads yet.
    fn push(&self, batch: Batch) -> (oneshot::Receiver<Result<Receipt>>, bool) {
        let (reply, answer) = oneshot::channel();
        let mut waiting = self.lock();
        waiting.jobs.push_back(Job { batch, reply });
        (answer, !std::mem::replace(&mut waiting.has_leader, true))
    }

    /// The jobs of the next flight; if there are none, the leader is one no more.
    fn take_or_resign(&self) -> Option<Vec<Job>> {
        if self.resign_if_empty() { None } else { Some(self.lock().take()) }
    }

    /// Lets those who have just got an answer run, who may have more to commit: they go along with this flight instead of
    /// the one after it. A lone writer is not waited for, and nobody for long.
    async fn gather(&self) {
        let mut queued = 0;
        for _ in 0..ROUNDS {
            {
                let waiting = self.lock();
                let is_more = waiting.jobs.len() > queued;
                if waiting.last_flight < 2 || waiting.jobs.len() >= waiting.last_flight || !is_more {
                    return;
                }
                queued = waiting.jobs.len();
            }
            yield_now().await;
        }
    }

    /// Waits until nobody leads.
    pub(crate) async fn idle(&self) {
        loop {
            let resigned = self.idle.notified();
            if !self.lock().has_leader {
                return;
            }
            resigned.await;
        }
    }

    /// Whether nobody waits, and so nobody leads any more.
    fn resign_if_empty(&self) -> bool {
        let mut waiting = self.lock();
        waiting.has_leader = !waiting.jobs.is_empty();
        if !waiting.has_leader {
            self.idle.notify_waiters();
        }
        !waiting.has_leader
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// As many as one flight carries; a command id that comes twice waits for the next, to find its receipt.
    fn take(&mut self) -> Vec<Job> {
        let (mut jobs, mut left, mut events, mut bytes) = (Vec::new(), VecDeque::new(), 0, 0);
        let mut commands: HashSet<CommandId> = HashSet::new();
        while let Some(job) = self.jobs.pop_front() {
            let is_full = events + job.batch.events() > MOST_EVENTS || bytes + job.batch.bytes() > MOST_BYTES;
            let is_repeated = job.batch.command_id().is_some_and(|id| commands.contains(id));
            if (is_full && !jobs.is_empty()) || is_repeated {
                left.push_back(job);
                if is_full {
                    break;
                }
                continue;
            }
            (events, bytes) = (events + job.batch.events(), bytes + job.batch.bytes());
            commands.extend(job.batch.command_id().cloned());
            jobs.push(job);
        }
        left.append(&mut self.jobs);
        self.jobs = left;
        self.last_flight = jobs.len();
        jobs
    }
}

/// Commits a batch with whatever else is on its way. The flight is a task's: a caller who goes away, or stays and is not
/// polled, would hold up everybody else.
pub(crate) async fn commit(store: &Arc<Store>, batch: Batch) -> Result<Receipt> {
    store.check_writable()?;
    let runtime = Handle::try_current().map_err(no_runtime)?;
    let (answer, is_leader) = store.queue.push(batch);
    if is_leader {
        runtime.spawn(lead(Leader { store: Arc::clone(store), has_resigned: false }));
    }
    answer.await.unwrap_or_else(|_| Err(outcome_unknown())).map_err(inline::go_on)
}

/// The one who flies. However it ends, the others do not wait for ever: who drops a [`Job`] answers it.
struct Leader {
    store: Arc<Store>,
    has_resigned: bool,
}

impl Drop for Leader {
    fn drop(&mut self) {
        if !self.has_resigned {
            let mut waiting = self.store.queue.lock();
            waiting.has_leader = false;
            waiting.jobs.clear();
            self.store.queue.idle.notify_waiters();
        }
    }
}

/// Flies until nobody waits any more.
async fn lead(mut leader: Leader) {
    loop {
        leader.store.queue.gather().await;
        // With nobody waiting it resigns before whoever has got an answer runs: a leader may not be polled any more.
        let Some(jobs) = leader.store.queue.take_or_resign() else { break };
        fly(&leader.store, jobs).await;
    }
    leader.has_resigned = true;
}

async fn fly(store: &Arc<Store>, jobs: Vec<Job>) {
    let batches: Vec<&Batch> = jobs.iter().map(|job| &job.batch).collect();
    let outcomes = outcomes(store, &batches).await;
    let head = outcomes.iter().flatten().map(|receipt| receipt.last).max().unwrap_or_default();
    store.watch.saw(head);
    jobs.into_iter().zip(outcomes).for_each(|(job, outcome)| job.answer(outcome));
    // Whether somebody here has looked and seen the new head meanwhile does not matter: others may still sleep.
    if head > Position::ZERO {
        wait::announce(store);
    }
}

/// Each batch with its outcome.
async fn outcomes(store: &Store, batches: &[&Batch]) -> Vec<Result<Receipt>> {
    let table = store.names.table();
    let is_plain = store.inline.is_empty();
    let mut flown = if is_plain { commit::quickly(store, batches, &table).await } else { Flown::Look };
    for _ in 0..ATTEMPTS {
        if !matches!(flown, Flown::Look) {
            break;
        }
        flown = match is_plain {
            true => commit::carefully(store, batches, &table).await,
            false => inline::fly(store, batches, &table).await,
        };
        if let Flown::RolledBack(error) = &flown
            && crate::error::passes(error)
        {
            flown = Flown::Look;
        }
    }
    match flown {
        Flown::Done(outcomes) => outcomes,
        Flown::Unknown => all(batches, &outcome_unknown()),
        Flown::Look => {
            let message = "the commit met others again and again, and nothing was written";
            all(batches, &Error::new(ErrorKind::Unavailable, message))
        }
        Flown::RolledBack(error) => apart(store, batches, error.into()).await,
    }
}

/// What is in everybody's way is the answer for all. Otherwise one of them does what the checks did not foresee: alone,
/// it fails alone.
async fn apart(store: &Store, batches: &[&Batch], error: Error) -> Vec<Result<Receipt>> {
    if batches.len() == 1 {
        return vec![Err(error)];
    }
    if !matches!(error.kind(), ErrorKind::Backend | ErrorKind::Invalid | ErrorKind::Rejected) {
        return all(batches, &error);
    }
    let mut alone = Vec::with_capacity(batches.len());
    for batch in batches {
        alone.extend(Box::pin(outcomes(store, std::slice::from_ref(batch))).await);
    }
    alone
}

fn all(batches: &[&Batch], error: &Error) -> Vec<Result<Receipt>> {
    batches.iter().map(|_| Err(again(error))).collect()
}

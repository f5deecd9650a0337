//! Combining: commits that arrive while one is under way are written together, in one transaction.
//!
//! The flush and the round trip are what costs, so everything that is queued when a flight begins goes with it, each
//! batch with its own outcome. A flight is owned by a task of its own: a caller who goes away loses the answer and
//! leaves the flight alone.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use evercore_core::{Batch, BoxFuture, CommandId, Error, ErrorKind, Position, Receipt, Result};
use futures_channel::oneshot;
use futures_lite::future::yield_now;
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::commit::batch::{self, Flown};
use crate::connection::task::no_runtime;
use crate::error::{PostgresError, again, is_stale, outcome_unknown};
use crate::read::wait;
use crate::store::Store;
use crate::subscription::inline;

/// How many events one flight carries, unless a single batch has more.
const MOST_EVENTS: usize = 10_000;

/// How many bytes one flight carries, as they are sent, unless a single batch has more.
const MOST_BYTES: usize = 32 * 1024 * 1024;

/// How many bytes a single batch may have, as they are sent. The protocol ends at 1 GiB, and the server has to hold it
/// several times.
const MOST_BYTES_OF_ONE: usize = 384 * 1024 * 1024;

/// How many bytes may wait for their flight or be in one; others wait for room. A batch counts for a kibibyte at least,
/// so this bounds how many there are, too.
const ROOM: usize = 256 * 1024 * 1024;

/// In what the room is counted.
const UNIT_OF_ROOM: usize = 1024;

/// How often at most those who were answered are given a turn before the next flight.
const ROUNDS: usize = 4;

/// How often to look again when the server undid a flight for reasons that pass, a deadlock or a race; and how often to
/// queue a batch again whose leader was lost before it flew.
const ATTEMPTS: usize = 3;

/// A batch on its way, and who waits for it.
#[derive(Debug)]
struct Job {
    /// Later jobs have larger numbers.
    number: u64,
    batch: Batch,
    bytes: usize,
    /// Where the caller runs, who is sure to be there for as long as it waits.
    runtime: Handle,
    reply: oneshot::Sender<Answer>,
    /// Others get it when the job has its answer.
    _room: OwnedSemaphorePermit,
}

/// What becomes of a job.
#[derive(Debug)]
enum Answer {
    Flown(Result<Receipt>),
    /// Whoever was to carry it out is gone, and nothing was sent.
    Back(Box<Batch>),
}

impl Job {
    /// The caller may have gone; then nobody needs the answer.
    fn answer(self, outcome: Result<Receipt>) {
        let _ = self.reply.send(Answer::Flown(outcome));
    }

    fn give_back(self) {
        let _ = self.reply.send(Answer::Back(Box::new(self.batch)));
    }
}

/// The commits that wait for the next flight.
#[derive(Debug)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    idle: Notify,
    room: Arc<Semaphore>,
    /// Whether something of the flight under way may have reached the server.
    is_sent: AtomicBool,
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    has_leader: bool,
    /// How many jobs flew last.
    last_flight: usize,
    next_number: u64,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            idle: Notify::new(),
            room: Arc::new(Semaphore::new(ROOM / UNIT_OF_ROOM)),
            is_sent: AtomicBool::new(false),
        }
    }
}

impl Queue {
    /// Room for so many bytes, in the order in which it was asked for.
    async fn room_for(&self, bytes: usize, until: Instant) -> Result<OwnedSemaphorePermit> {
        let units = (bytes / UNIT_OF_ROOM + 1).min(ROOM / UNIT_OF_ROOM);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let room = timeout_at(until, Arc::clone(&self.room).acquire_many_owned(units)).await;
        room.ok().and_then(|room| room.ok()).ok_or_else(|| {
            let message = "the queue of commits stayed full, and nothing was written: try again later";
            Error::new(ErrorKind::Unavailable, message)
        })
    }

    /// Queues a batch; its number, and whether nobody leads yet.
    fn push(
        &self,
        batch: Batch,
        bytes: usize,
        runtime: Handle,
        room: OwnedSemaphorePermit,
    ) -> (oneshot::Receiver<Answer>, u64, bool) {
        let (reply, answer) = oneshot::channel();
        let mut waiting = self.lock();
        let number = waiting.next_number;
        waiting.next_number += 1;
        waiting.jobs.push_back(Job { number, batch, bytes, runtime, reply, _room: room });
        (answer, number, !std::mem::replace(&mut waiting.has_leader, true))
    }

    /// Takes a job back that still waits; `false` if it flies, or has flown.
    fn withdraw(&self, number: u64) -> bool {
        let mut waiting = self.lock();
        let place = waiting.jobs.binary_search_by_key(&number, |job| job.number);
        place.is_ok_and(|place| waiting.jobs.remove(place).is_some())
    }

    /// The jobs of the next flight; if there are none, the leader is one no more.
    fn take_or_resign(&self) -> Option<Vec<Job>> {
        let mut waiting = self.lock();
        if self.resigned(&mut waiting) { None } else { Some(waiting.take()) }
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

    /// From now on something of the flight under way may reach the server.
    pub(crate) fn is_sent(&self) {
        self.is_sent.store(true, Ordering::Release);
    }

    /// Whether nobody waits, and so nobody leads any more.
    fn resigned(&self, waiting: &mut Waiting) -> bool {
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
            let is_full = events + job.batch.events() > MOST_EVENTS || bytes + job.bytes > MOST_BYTES;
            let is_repeated = job.batch.command_id().is_some_and(|id| commands.contains(id));
            if (is_full && !jobs.is_empty()) || is_repeated {
                left.push_back(job);
                if is_full {
                    break;
                }
                continue;
            }
            (events, bytes) = (events + job.batch.events(), bytes + job.bytes);
            commands.extend(job.batch.command_id().cloned());
            jobs.push(job);
        }
        left.append(&mut self.jobs);
        self.jobs = left;
        self.last_flight = jobs.len();
        jobs
    }
}

/// How many bytes a batch has as it is sent.
///
/// # Errors
/// [`Invalid`](ErrorKind::Invalid) if no statement can carry them.
pub(crate) fn bytes_of(batch: &Batch) -> Result<usize> {
    let bytes = batch.encoded_bytes();
    if bytes > MOST_BYTES_OF_ONE {
        let message = format!(
            "a unit of work of {bytes} bytes with its metadata and snapshots, the limit is {MOST_BYTES_OF_ONE}"
        );
        return Err(Error::invalid(message));
    }
    Ok(bytes)
}

/// Commits a batch with whatever else is on its way. The flight is a task's: a caller who goes away, or stays and is not
/// polled, would hold up everybody else.
pub(crate) async fn commit(store: &Arc<Store>, mut batch: Batch) -> Result<Receipt> {
    store.check_writable()?;
    let runtime = Handle::try_current().map_err(no_runtime)?;
    let (bytes, until) = (bytes_of(&batch)?, Instant::now() + store.settings.statement_timeout);
    for _ in 0..ATTEMPTS {
        let room = store.queue.room_for(bytes, until).await?;
        let (mut answer, number, is_leader) = store.queue.push(batch, bytes, runtime.clone(), room);
        if is_leader {
            runtime.spawn(lead(Leader::new(store)));
        }
        let answered = match timeout_at(until, &mut answer).await {
            Ok(answered) => answered,
            Err(_) if store.queue.withdraw(number) => {
                let message = "the commit waited too long for its turn, and nothing was written";
                return Err(Error::new(ErrorKind::Unavailable, message));
            }
            // What flies ends by itself, in time.
            Err(_) => answer.await,
        };
        match answered {
            Ok(Answer::Flown(outcome)) => return outcome.map_err(inline::go_on),
            Ok(Answer::Back(unsent)) => batch = *unsent,
            Err(_) => return Err(outcome_unknown()),
        }
    }
    let message = "the runtime that was to carry out the commit has ended, and nothing was written";
    Err(Error::new(ErrorKind::Unavailable, message))
}

/// The one who flies. However it ends, the others do not wait for ever: they lead themselves, unless something of theirs
/// was sent.
struct Leader {
    store: Arc<Store>,
    /// The flight that it is about to carry out.
    next: Vec<Job>,
    has_resigned: bool,
}

impl Leader {
    fn new(store: &Arc<Store>) -> Self {
        Self { store: Arc::clone(store), next: Vec::new(), has_resigned: false }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if self.has_resigned {
            return;
        }
        let left = {
            let mut waiting = self.store.queue.lock();
            waiting.has_leader = false;
            self.store.queue.idle.notify_waiters();
            std::mem::take(&mut waiting.jobs)
        };
        let unsent = std::mem::take(&mut self.next);
        unsent.into_iter().chain(left).for_each(Job::give_back);
    }
}

/// A flight under way; dropped, it answers those whose batches nobody has sent.
struct Flight<'a> {
    queue: &'a Queue,
    jobs: Vec<Job>,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if !self.queue.is_sent.load(Ordering::Acquire) {
            std::mem::take(&mut self.jobs).into_iter().for_each(Job::give_back);
        }
    }
}

/// Flies until nobody waits any more, where those are who wait: in the runtime of the first of them.
async fn lead(mut leader: Leader) {
    loop {
        let mut jobs = std::mem::take(&mut leader.next);
        if jobs.is_empty() {
            leader.store.queue.gather().await;
            // With nobody waiting it resigns before whoever has got an answer runs: a leader may not be polled any more.
            let Some(taken) = leader.store.queue.take_or_resign() else { break };
            jobs = taken;
            if let Some(runtime) = jobs.first().map(|job| job.runtime.clone())
                && runtime.id() != Handle::current().id()
            {
                leader.next = jobs;
                runtime.spawn(lead_on(leader));
                return;
            }
        }
        fly(&leader.store, jobs).await;
    }
    leader.has_resigned = true;
}

/// The same in another runtime, as a future whose type does not contain itself.
fn lead_on(leader: Leader) -> BoxFuture<'static, ()> {
    Box::pin(lead(leader))
}

async fn fly(store: &Arc<Store>, jobs: Vec<Job>) {
    store.queue.is_sent.store(false, Ordering::Release);
    let mut flight = Flight { queue: &store.queue, jobs };
    let batches: Vec<&Batch> = flight.jobs.iter().map(|job| &job.batch).collect();
    let outcomes = outcomes(store, &batches).await;
    let head = outcomes.iter().flatten().map(|receipt| receipt.last).max().unwrap_or_default();
    store.watch.saw(head);
    std::mem::take(&mut flight.jobs).into_iter().zip(outcomes).for_each(|(job, outcome)| job.answer(outcome));
    // Whether somebody here has looked and seen the new head meanwhile does not matter: others may still sleep.
    if head > Position::ZERO {
        wait::announce(store);
    }
}

/// Each batch with its outcome.
async fn outcomes(store: &Store, batches: &[&Batch]) -> Vec<Result<Receipt>> {
    let is_plain = store.inline.is_empty();
    let mut flown = match is_plain {
        true => batch::quickly(store, batches, &store.names.table()).await,
        false => Flown::Look,
    };
    for _ in 0..ATTEMPTS {
        match &flown {
            Flown::Look => {}
            Flown::RolledBack(error) if is_stale(error) => store.forget_sessions(),
            Flown::RolledBack(error) if crate::error::passes(error) => {}
            _ => break,
        }
        // The names anew: the last look may have found more.
        let table = store.names.table();
        flown = match is_plain {
            true => batch::carefully(store, batches, &table).await,
            false => inline::fly(store, batches, &table).await,
        };
    }
    match flown {
        Flown::Done(outcomes) => outcomes,
        Flown::Unknown => all(batches, &outcome_unknown()),
        Flown::Look => {
            let message = "the commit met others again and again, and nothing was written";
            all(batches, &Error::new(ErrorKind::Unavailable, message))
        }
        // Whom the server does not let in it does not let in for another batch either.
        Flown::RolledBack(error @ PostgresError::Pool(_)) => all(batches, &Error::from(error)),
        Flown::RolledBack(error) => apart(store, batches, store.if_stale(error).into()).await,
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

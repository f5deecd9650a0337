//! Combining: commits that arrive while a flight is under way are written together by the next flight, in one
//! transaction.
//!
//! The flush and the round trip cost most of a commit, so a flight takes everything that is queued when it begins. Each
//! batch gets its own outcome. A flight runs in its own task: if a caller goes away, only its answer is lost.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use evercore_core::engine::{Batch, NameTable};
use evercore_core::{BoxFuture, CommandId, Error, ErrorKind, Receipt, Result};
use futures_channel::oneshot;
use futures_lite::future::yield_now;
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::commit::batch::{Batches, FlightOutcome};
use crate::commit::with_sql::BatchesWithSql;
use crate::connection::pool::Pools;
use crate::connection::task::no_runtime;
use crate::error::{PostgresError, is_stale, passes};
use crate::names::Names;
use crate::read::wait::Watch;

/// How many events one flight carries, unless a single batch has more.
const MOST_EVENTS: usize = 10_000;

/// How many bytes one flight carries, as sent to the server, unless a single batch has more.
const MOST_BYTES: usize = 32 * 1024 * 1024;

/// How many bytes a single batch may have, as sent to the server. The protocol allows 1 GiB, and the server holds the
/// message several times.
const MOST_BYTES_OF_ONE: usize = 384 * 1024 * 1024;

/// How many bytes may be queued or in a flight. Further batches wait until there is room. A batch counts as at least a
/// kibibyte, so this also limits the number of batches.
const ROOM: usize = 256 * 1024 * 1024;

/// The unit in which the room is counted, in bytes.
const UNIT_OF_ROOM: usize = 1024;

/// How often the next flight waits for callers that just got an answer, at most.
const ROUNDS: usize = 4;

/// How often to repeat a flight that was rolled back for a temporary reason, such as a deadlock or a race; and how
/// often to queue a batch again if its leader was lost before the flight.
const ATTEMPTS: usize = 3;

/// A queued batch, and the way to answer its caller.
#[derive(Debug)]
struct Job {
    /// Later jobs have larger numbers.
    number: u64,
    batch: Batch,
    bytes: usize,
    /// The runtime of the caller, which lives at least as long as the caller waits.
    runtime: Handle,
    reply: oneshot::Sender<Answer>,
    /// Returned when the job has its answer.
    _room: OwnedSemaphorePermit,
}

/// The answer to a job.
#[derive(Debug)]
enum Answer {
    Outcome(Result<Receipt>),
    /// The leader was lost before anything was sent: the batch goes back to its caller.
    Back(Box<Batch>),
}

impl Job {
    /// If the caller has gone, nobody needs the answer.
    fn answer(self, outcome: Result<Receipt>) {
        let _ = self.reply.send(Answer::Outcome(outcome));
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
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    has_leader: bool,
    /// The number of jobs in the last flight.
    last_flight: usize,
    next_number: u64,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            idle: Notify::new(),
            room: Arc::new(Semaphore::new(ROOM / UNIT_OF_ROOM)),
        }
    }
}

impl Queue {
    /// Waits for room for this many bytes. The first caller to ask is the first to get room.
    async fn room_for(&self, bytes: usize, until: Instant) -> Result<OwnedSemaphorePermit> {
        let units = (bytes / UNIT_OF_ROOM + 1).min(ROOM / UNIT_OF_ROOM);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let room = timeout_at(until, Arc::clone(&self.room).acquire_many_owned(units)).await;
        room.ok().and_then(|room| room.ok()).ok_or_else(|| {
            let message = "the queue of commits stayed full, and nothing was written: try again later";
            Error::new(ErrorKind::Unavailable, message)
        })
    }

    /// Queues a batch. Returns its number, and whether the caller must start a leader.
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

    /// Takes back a job that is still queued; `false` if its flight has begun.
    fn withdraw(&self, number: u64) -> bool {
        let mut waiting = self.lock();
        let place = waiting.jobs.binary_search_by_key(&number, |job| job.number);
        place.is_ok_and(|place| waiting.jobs.remove(place).is_some())
    }

    /// The jobs of the next flight. If there are none, the leader resigns.
    fn take_or_resign(&self) -> Option<Vec<Job>> {
        let mut waiting = self.lock();
        waiting.has_leader = !waiting.jobs.is_empty();
        if !waiting.has_leader {
            self.idle.notify_waiters();
            return None;
        }
        Some(waiting.take())
    }

    /// Lets the callers run that just got an answer: if they commit again, they join this flight instead of the next
    /// one. Does not wait for a lone writer, and never waits long.
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

    /// Waits until there is no leader.
    pub(crate) async fn idle(&self) {
        loop {
            let resigned = self.idle.notified();
            if !self.lock().has_leader {
                return;
            }
            resigned.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// The jobs of one flight. The second job with the same command id waits for the next flight, which finds the
    /// receipt of the first.
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

/// The size of a batch as it is sent to the server.
///
/// # Errors
/// [`Invalid`](ErrorKind::Invalid) if it is too large for one statement.
pub(crate) fn encoded_bytes(batch: &Batch) -> Result<usize> {
    let bytes = batch.encoded_bytes();
    if bytes > MOST_BYTES_OF_ONE {
        let message = format!(
            "a unit of work of {bytes} bytes with its metadata and snapshots, the limit is {MOST_BYTES_OF_ONE}"
        );
        return Err(Error::invalid(message));
    }
    Ok(bytes)
}

/// Commits batches in flights.
pub(crate) struct Flights {
    pub(crate) pools: Arc<Pools>,
    pub(crate) names: Arc<Names>,
    pub(crate) batches: Arc<Batches>,
    pub(crate) with_sql: Arc<BatchesWithSql>,
    pub(crate) watch: Arc<Watch>,
    pub(crate) queue: Queue,
}

impl Flights {
    /// Commits a batch together with the batches that are queued. A flight belongs to a task: if it belonged to a
    /// caller, a caller that is dropped or not polled would hold up all others.
    pub(crate) async fn commit(self: &Arc<Self>, mut batch: Batch) -> Result<Receipt> {
        self.pools.check_writable()?;
        let runtime = Handle::try_current().map_err(no_runtime)?;
        let (bytes, until) = (encoded_bytes(&batch)?, Instant::now() + self.pools.settings.statement_timeout);
        for _ in 0..ATTEMPTS {
            let room = self.queue.room_for(bytes, until).await?;
            let (mut answer, number, must_lead) = self.queue.push(batch, bytes, runtime.clone(), room);
            if must_lead {
                runtime.spawn(lead(Leader::new(self)));
            }
            let answered = match timeout_at(until, &mut answer).await {
                Ok(answered) => answered,
                Err(_) if self.queue.withdraw(number) => {
                    let message = "the commit waited too long for its turn, and nothing was written";
                    return Err(Error::new(ErrorKind::Unavailable, message));
                }
                // Its flight has begun, and ends in time by itself.
                Err(_) => answer.await,
            };
            match answered {
                Ok(Answer::Outcome(outcome)) => return outcome.map_err(Error::resume_panic),
                Ok(Answer::Back(unsent)) => batch = *unsent,
                Err(_) => return Err(Error::outcome_unknown("the commit")),
            }
        }
        let message = "the runtime that was to carry out the commit has ended, and nothing was written";
        Err(Error::new(ErrorKind::Unavailable, message))
    }

    async fn fly(&self, jobs: Vec<Job>) {
        self.batches.is_sent.store(false, Ordering::Release);
        let mut flight = Flight { batches: &self.batches, jobs };
        let batches: Vec<&Batch> = flight.jobs.iter().map(|job| &job.batch).collect();
        let outcomes = self.outcomes(&batches).await;
        let head = outcomes.iter().flatten().map(|receipt| receipt.last).max().unwrap_or_default();
        self.watch.log.seen.raise(head);
        let jobs = std::mem::take(&mut flight.jobs).into_iter();
        jobs.zip(outcomes).for_each(|(job, outcome)| job.answer(outcome));
        self.watch.announce(head);
    }

    /// The outcome of each batch.
    async fn outcomes(&self, batches: &[&Batch]) -> Vec<Result<Receipt>> {
        let is_plain = self.with_sql.inline.is_empty();
        let mut outcome = match is_plain {
            true => self.batches.quickly(batches, &self.names.table()).await,
            false => Ok(FlightOutcome::Recheck),
        };
        for _ in 0..ATTEMPTS {
            match &outcome {
                Ok(FlightOutcome::Recheck) => {}
                Err(error) if is_stale(error) => self.pools.forget_sessions(),
                Err(error) if passes(error) => {}
                _ => break,
            }
            // Take the names anew: the last attempt may have found more.
            let table = self.names.table();
            outcome = match is_plain {
                true => self.batches.carefully(batches, &table).await,
                false => self.with_inline_projections(batches, &table).await,
            };
        }
        match outcome {
            Ok(FlightOutcome::Done(outcomes)) => outcomes,
            Ok(FlightOutcome::Unknown) => all(batches, &Error::outcome_unknown("the commit")),
            Ok(FlightOutcome::Recheck) => {
                let message =
                    "concurrent commits kept conflicting with this one, and nothing was written: try again";
                all(batches, &Error::new(ErrorKind::Unavailable, message))
            }
            // If the server refuses the connection, it refuses it for each batch.
            Err(error @ PostgresError::Pool(_)) => all(batches, &Error::from(error)),
            Err(error) => self.one_by_one(batches, self.pools.if_stale(error).into()).await,
        }
    }

    async fn with_inline_projections(
        &self,
        batches: &[&Batch],
        table: &Arc<NameTable>,
    ) -> Result<FlightOutcome, PostgresError> {
        self.with_sql.inline.draw_near().await?;
        self.with_sql.commit(self.batches.to_fly().await?, batches, table, None).await
    }

    /// An error that would hit every batch is the answer to all. Otherwise the checks did not foresee a fault of one
    /// batch, so each batch is written alone, and only that one fails.
    async fn one_by_one(&self, batches: &[&Batch], error: Error) -> Vec<Result<Receipt>> {
        if batches.len() == 1 {
            return vec![Err(error)];
        }
        if !matches!(error.kind(), ErrorKind::Backend | ErrorKind::Invalid | ErrorKind::Rejected) {
            return all(batches, &error);
        }
        let mut alone = Vec::with_capacity(batches.len());
        for batch in batches {
            alone.extend(Box::pin(self.outcomes(std::slice::from_ref(batch))).await);
        }
        alone
    }
}

fn all(batches: &[&Batch], error: &Error) -> Vec<Result<Receipt>> {
    batches.iter().map(|_| Err(error.again())).collect()
}

/// Carries out flights. If it ends early, the queued batches go back to their callers, which start another leader,
/// except for batches of which something was sent.
struct Leader {
    flights: Arc<Flights>,
    /// The flight that it is about to carry out.
    next: Vec<Job>,
    has_resigned: bool,
}

impl Leader {
    fn new(flights: &Arc<Flights>) -> Self {
        Self { flights: Arc::clone(flights), next: Vec::new(), has_resigned: false }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if self.has_resigned {
            return;
        }
        let queue = &self.flights.queue;
        let left = {
            let mut waiting = queue.lock();
            waiting.has_leader = false;
            queue.idle.notify_waiters();
            std::mem::take(&mut waiting.jobs)
        };
        let unsent = std::mem::take(&mut self.next);
        unsent.into_iter().chain(left).for_each(Job::give_back);
    }
}

/// A flight under way. If it is dropped before anything was sent, the batches go back to their callers.
struct Flight<'a> {
    batches: &'a Batches,
    jobs: Vec<Job>,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if !self.batches.is_sent.load(Ordering::Acquire) {
            std::mem::take(&mut self.jobs).into_iter().for_each(Job::give_back);
        }
    }
}

/// Carries out flights until no batch is queued, each in the runtime of its first caller.
async fn lead(mut leader: Leader) {
    loop {
        let mut jobs = std::mem::take(&mut leader.next);
        if jobs.is_empty() {
            leader.flights.queue.gather().await;
            // If nothing is queued, the leader resigns before a caller that got an answer runs: it may not be polled
            // again.
            let Some(taken) = leader.flights.queue.take_or_resign() else { break };
            jobs = taken;
            if let Some(runtime) = jobs.first().map(|job| job.runtime.clone())
                && runtime.id() != Handle::current().id()
            {
                leader.next = jobs;
                runtime.spawn(lead_on(leader));
                return;
            }
        }
        leader.flights.fly(jobs).await;
    }
    leader.has_resigned = true;
}

/// The same in another runtime, as a future whose type does not contain itself.
fn lead_on(leader: Leader) -> BoxFuture<'static, ()> {
    Box::pin(lead(leader))
}

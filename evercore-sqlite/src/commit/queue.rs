//! What waits for the one writer, and the engine's own thread that works it off.
//!
//! The thread is started when there is something to do and ends when there was nothing for a while. It holds the store
//! only while it works, so that a store that nobody has any more is closed.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use evercore_core::{Batch, Error, ErrorKind, Receipt, Result};
use futures_channel::oneshot;

use crate::commit::flight;
use crate::commit::own_sql::OwnSql;
use crate::error::outcome_unknown;
use crate::store::Store;

/// How often to look for the commits of other processes, which ring no bell here.
const LOOK: Duration = Duration::from_millis(50);

/// How long the thread stays when there is nothing to do.
const IDLE: Duration = Duration::from_secs(10);

/// A batch on its way, with the user's own SQL if there is some, and the caller's end of the answer.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) batch: Batch,
    pub(crate) sql: Option<OwnSql>,
    reply: oneshot::Sender<Result<Receipt>>,
}

impl Job {
    /// The caller may have gone; then nobody needs the answer.
    pub(crate) fn answer(self, outcome: Result<Receipt>) {
        let _ = self.reply.send(outcome);
    }
}

/// Where a caller finds the answer.
pub(crate) type Answer = oneshot::Receiver<Result<Receipt>>;

/// What writes and is no commit of a batch.
type Write = Box<dyn FnOnce(&Store) + Send>;

#[derive(Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    /// Rung when there is something to do.
    bell: Condvar,
}

#[derive(Default)]
struct Waiting {
    jobs: Vec<Job>,
    writes: VecDeque<Write>,
    /// Held while something waits, so that it is carried through when all others have let go of the store.
    store: Option<Arc<Store>>,
    /// How many wait for the commits of others, and on which store.
    watchers: usize,
    watched: Weak<Store>,
    has_thread: bool,
    has_ended: bool,
}

/// What the thread does next.
enum Next {
    Work(Arc<Store>, Vec<Job>, Option<Write>),
    Look(Weak<Store>),
    End,
}

/// Queues a batch for the next flight.
pub(crate) fn commit(store: &Arc<Store>, batch: Batch, sql: Option<OwnSql>) -> Result<Answer> {
    let (reply, answer) = oneshot::channel();
    store.queue.push(store, |waiting| waiting.jobs.push(Job { batch, sql, reply }))?;
    Ok(answer)
}

/// Runs what writes on the engine's own thread. It is not begun if the caller goes away before its turn.
pub(crate) async fn write<T: Send + 'static>(
    store: &Arc<Store>,
    work: impl FnOnce(&Store) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (reply, answer) = oneshot::channel();
    let write = Box::new(move |store: &Store| {
        if !reply.is_canceled() {
            let _ = reply.send(work(store));
        }
    });
    store.queue.push(store, |waiting| waiting.writes.push_back(write))?;
    answer.await.unwrap_or_else(|_| Err(outcome_unknown()))
}

impl Queue {
    /// Queues a batch for a caller who flies by itself.
    pub(crate) fn push_here(&self, batch: Batch, sql: Option<OwnSql>) -> Answer {
        let (reply, answer) = oneshot::channel();
        self.lock().jobs.push(Job { batch, sql, reply });
        answer
    }

    pub(crate) fn take(&self) -> Vec<Job> {
        std::mem::take(&mut self.lock().jobs)
    }

    /// Ends the thread as soon as nothing is queued.
    pub(crate) fn end(&self) {
        self.lock().has_ended = true;
        self.bell.notify_all();
    }

    fn push(self: &Arc<Self>, store: &Arc<Store>, what: impl FnOnce(&mut Waiting)) -> Result<()> {
        let mut waiting = self.lock();
        what(&mut waiting);
        if waiting.store.is_none() {
            waiting.store = Some(Arc::clone(store));
        }
        let has_thread = self.start(&mut waiting);
        // Without a thread nothing else is queued: what is there is what was just put there.
        let dropped = has_thread.is_err().then(|| waiting.clear());
        drop(waiting);
        drop(dropped);
        self.bell.notify_one();
        has_thread
    }

    /// Starts the thread if there is none.
    fn start(self: &Arc<Self>, waiting: &mut Waiting) -> Result<()> {
        if waiting.has_thread {
            return Ok(());
        }
        let queue = Arc::clone(self);
        let thread = thread::Builder::new().name("evercore-sqlite".to_owned());
        match thread.spawn(move || run(&queue)) {
            Ok(_) => {
                waiting.has_thread = true;
                Ok(())
            }
            Err(error) => {
                let message = "the system gives no thread to write with, end some or raise its limit";
                Err(Error::new(ErrorKind::Unavailable, message).with_source(error))
            }
        }
    }

    /// What to do next. `looked` is when the thread looked last, and is now if it is to look again.
    fn next(&self, looked: &mut Instant) -> Next {
        let mut waiting = self.lock();
        let idle_since = Instant::now();
        loop {
            let now = Instant::now();
            let is_watched = waiting.watchers > 0;
            // Also beside work that never ends.
            let until = if is_watched { *looked + LOOK } else { idle_since + IDLE };
            if is_watched && now >= until && !waiting.has_ended {
                *looked = now;
                return Next::Look(Weak::clone(&waiting.watched));
            }
            if let Some(work) = waiting.work() {
                return work;
            }
            if waiting.has_ended || now >= until {
                waiting.has_thread = false;
                return Next::End;
            }
            let waited = self.bell.wait_timeout(waiting, until - now);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// All batches that wait, and one of what else writes: so nobody waits for many others.
    fn work(&mut self) -> Option<Next> {
        let store = Arc::clone(self.store.as_ref()?);
        let (jobs, write) = (std::mem::take(&mut self.jobs), self.writes.pop_front());
        // The last reference of the queue's own is given up in `run`, never under the lock.
        let is_last = self.writes.is_empty();
        let store = if is_last { self.store.take().unwrap_or(store) } else { store };
        Some(Next::Work(store, jobs, write))
    }

    fn clear(&mut self) -> (Vec<Job>, VecDeque<Write>, Option<Arc<Store>>) {
        (std::mem::take(&mut self.jobs), std::mem::take(&mut self.writes), self.store.take())
    }
}

fn run(queue: &Queue) {
    let mut looked = Instant::now();
    loop {
        match queue.next(&mut looked) {
            Next::Work(store, jobs, write) => {
                // A panic closes the store if it left the writer in a transaction; who waited is told by the dropped reply.
                let _ = catch_unwind(AssertUnwindSafe(|| work(&store, jobs, write)));
            }
            Next::Look(store) => {
                let _ = catch_unwind(AssertUnwindSafe(|| store.upgrade().map(|store| store.look())));
            }
            Next::End => return,
        }
    }
}

fn work(store: &Store, jobs: Vec<Job>, write: Option<Write>) {
    if !jobs.is_empty() {
        // A flight that has to catch up first lets others write meanwhile.
        let write_one = || {
            let write = store.queue.lock().writes.pop_front();
            // Who waited for one that panics is told by the dropped reply.
            let _ = catch_unwind(AssertUnwindSafe(|| write.map(|write| write(store))));
        };
        flight::lead(store, jobs, write_one);
    }
    if let Some(write) = write {
        write(store);
    }
}

/// Has the thread look for the commits of others, for as long as this is held.
pub(crate) struct Watch<'a>(&'a Queue);

impl<'a> Watch<'a> {
    pub(crate) fn begin(store: &'a Arc<Store>) -> Result<Self> {
        let mut waiting = store.queue.lock();
        waiting.watchers += 1;
        let watch = Watch(&store.queue);
        if waiting.watchers == 1 {
            waiting.watched = Arc::downgrade(store);
            let has_thread = store.queue.start(&mut waiting);
            // Before the watch is dropped, which takes the lock.
            drop(waiting);
            has_thread?;
            store.queue.bell.notify_one();
        }
        Ok(watch)
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.0.lock().watchers -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::settings::Settings;

    /// Commits on the callers' threads wait in the same queue, and need no thread of the engine's.
    #[test]
    fn a_watch_that_gets_no_thread_leaves_the_commits_of_others_alone() {
        const CHILD: &str = "EVERCORE_CHILD_WITHOUT_THREADS";
        if std::env::var_os(CHILD).is_some() {
            let settings = Settings { commit_on_caller_thread: true, ..Settings::default() };
            let store = Arc::new(Store::open(settings, Vec::new(), None).unwrap());
            let _answer = store.queue.push_here(Batch::new(), None);
            let refused = Watch::begin(&store).map(drop).unwrap_err();
            assert_eq!(refused.kind(), &ErrorKind::Unavailable, "{refused}");
            assert_eq!(store.queue.take().len(), 1);
            assert_eq!(store.queue.lock().watchers, 0);
            println!("without threads");
            return;
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        let name = "commit::queue::tests::a_watch_that_gets_no_thread_leaves_the_commits_of_others_alone";
        child.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(CHILD, "1");
        // No thread gets a stack of this size.
        let output = child.env("RUST_MIN_STACK", (1_u64 << 50).to_string()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let is_done = output.status.success() && said.contains("without threads");
        assert!(is_done, "{said}{}", String::from_utf8_lossy(&output.stderr));
    }
}

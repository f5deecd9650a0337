//! The queue for the one writer, and the engine's own thread that works it off.
//!
//! The thread starts when there is work, and ends when there has been none for a while. It holds the store only while
//! it works, so the store is closed as soon as all engines are dropped.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use evercore_core::engine::Batch;
use evercore_core::{Error, ErrorKind, Receipt, Result};
use futures_channel::oneshot;

use crate::commit::flight::{Answer, Flights, Job, OwnSql, refuse};
use crate::store::Store;
use crate::subscription::inline::InlineProjection;

/// How often the thread looks for commits of other processes, which wake nobody here.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// How long the thread stays when there is nothing to do.
const IDLE: Duration = Duration::from_secs(10);

/// A write that is not a commit of a batch.
type Write = Box<dyn FnOnce(&Store) + Send>;

/// All writes to one store.
pub(crate) struct Queue {
    store: Arc<Store>,
    shared: Arc<Shared>,
}

/// The part that the thread shares.
struct Shared {
    inline: Vec<InlineProjection>,
    store: Weak<Store>,
    waiting: Mutex<Waiting>,
    /// Rung when there is work.
    bell: Condvar,
}

#[derive(Default)]
struct Waiting {
    jobs: Vec<Job>,
    writes: VecDeque<Write>,
    /// Held while something waits, so that it is carried out even if all engines are dropped.
    store: Option<Arc<Store>>,
    /// How many callers wait for commits of other processes.
    watchers: usize,
    has_thread: bool,
    has_ended: bool,
}

/// The next task of the thread.
enum Next {
    Work(Arc<Store>, Vec<Job>, Option<Write>),
    RefreshHead,
    End,
}

impl Queue {
    pub(crate) fn new(store: Arc<Store>, inline: Vec<InlineProjection>) -> Self {
        let (waiting, bell) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { inline, store: Arc::downgrade(&store), waiting, bell });
        Self { store, shared }
    }

    /// Queues a batch for the next flight.
    pub(crate) fn commit(&self, batch: Batch, sql: Option<OwnSql>) -> Result<Answer> {
        let (job, answer) = Job::new(batch, sql);
        self.push(|waiting| waiting.jobs.push(job))?;
        Ok(answer)
    }

    /// Commits on this thread. The caller that gets the writer commits everything that is queued, so another one may
    /// have committed this batch already.
    pub(crate) fn commit_here(&self, batch: Batch, sql: Option<OwnSql>) -> Result<Receipt> {
        let flights = self.shared.flights(&self.store);
        if batch.events() > 0 {
            flights.catch_up(|| ())?;
        }
        let (job, mut answer) = Job::new(batch, sql);
        self.shared.lock().jobs.push(job);
        match self.store.lock() {
            Ok(mut writer) => {
                if let Ok(Some(outcome)) = answer.try_recv() {
                    return outcome;
                }
                flights.fly(&mut writer, self.shared.take_jobs());
            }
            Err(error) => refuse(self.shared.take_jobs(), &error),
        }
        self.shared.end_with(&self.store);
        answer.try_recv().ok().flatten().unwrap_or_else(|| Err(Error::outcome_unknown("the commit")))
    }

    /// Runs a write on the engine's own thread. It does not begin if the caller goes away before its turn.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let write = Box::new(move |store: &Store| {
            if !reply.is_canceled() {
                let _ = reply.send(work(store));
            }
        });
        self.push(|waiting| waiting.writes.push_back(write))?;
        answer.await.unwrap_or_else(|_| Err(Error::outcome_unknown("the commit")))
    }

    /// Lets the thread look for commits of other processes while the result is held.
    pub(crate) fn watch(&self) -> Result<Watch<'_>> {
        let mut waiting = self.shared.lock();
        waiting.watchers += 1;
        let watch = Watch(&self.shared);
        if waiting.watchers == 1 {
            let has_thread = self.shared.start(&mut waiting);
            // Released before `watch` is dropped, which takes the lock.
            drop(waiting);
            has_thread?;
            self.shared.bell.notify_one();
        }
        Ok(watch)
    }

    /// Ends the thread as soon as nothing is queued.
    pub(crate) fn end(&self) {
        self.shared.end();
    }

    fn push(&self, add: impl FnOnce(&mut Waiting)) -> Result<()> {
        let mut waiting = self.shared.lock();
        add(&mut waiting);
        if waiting.store.is_none() {
            waiting.store = Some(Arc::clone(&self.store));
        }
        let has_thread = self.shared.start(&mut waiting);
        // Without a thread nothing else is queued, so this removes what was just added.
        let removed = has_thread.is_err().then(|| waiting.clear());
        drop(waiting);
        drop(removed);
        self.shared.bell.notify_one();
        has_thread
    }
}

/// The thread ends when nothing can be added any more.
impl Drop for Queue {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn flights<'a>(&'a self, store: &'a Store) -> Flights<'a> {
        Flights { store, inline: &self.inline }
    }

    fn take_jobs(&self) -> Vec<Job> {
        std::mem::take(&mut self.lock().jobs)
    }

    fn end(&self) {
        self.lock().has_ended = true;
        self.bell.notify_all();
    }

    /// Starts the thread if there is none.
    fn start(self: &Arc<Self>, waiting: &mut Waiting) -> Result<()> {
        if waiting.has_thread {
            return Ok(());
        }
        let shared = Arc::clone(self);
        let thread = thread::Builder::new().name("evercore-sqlite".to_owned());
        match thread.spawn(move || shared.run()) {
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

    fn run(&self) {
        let mut refreshed = Instant::now();
        loop {
            // After a panic the store closes itself if the writer was left in a transaction. The dropped reply tells
            // the caller.
            let _ = match self.next(&mut refreshed) {
                Next::Work(store, jobs, write) => {
                    catch_unwind(AssertUnwindSafe(|| self.work(&store, jobs, write)))
                }
                Next::RefreshHead => catch_unwind(AssertUnwindSafe(|| {
                    let Some(store) = self.store.upgrade() else { return };
                    store.refresh_head();
                    self.end_with(&store);
                })),
                Next::End => return,
            };
        }
    }

    /// Waits for the next task. `refreshed` is when the head was last read, and becomes now if it must be read
    /// again.
    fn next(&self, refreshed: &mut Instant) -> Next {
        let mut waiting = self.lock();
        let idle_since = Instant::now();
        loop {
            let now = Instant::now();
            let is_watched = waiting.watchers > 0;
            let until = if is_watched { *refreshed + WATCH_INTERVAL } else { idle_since + IDLE };
            // Comes before the work, which may never end.
            if is_watched && now >= until && !waiting.has_ended {
                *refreshed = now;
                return Next::RefreshHead;
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

    fn work(&self, store: &Store, jobs: Vec<Job>, write: Option<Write>) {
        if !jobs.is_empty() {
            // While inline projections catch up, other writes run in between.
            let write_one = || {
                let write = self.lock().writes.pop_front();
                // If it panics, the dropped reply tells its caller.
                let _ = catch_unwind(AssertUnwindSafe(|| write.map(|write| write(store))));
            };
            self.flights(store).lead(jobs, write_one);
        }
        if let Some(write) = write {
            write(store);
        }
        self.end_with(store);
    }

    /// Ends the queue if the store has closed itself after a failed flush.
    fn end_with(&self, store: &Store) {
        if store.check_open().is_err() {
            self.end();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// Takes all batches and one other write, so that neither kind waits long for the other.
    fn work(&mut self) -> Option<Next> {
        let store = Arc::clone(self.store.as_ref()?);
        let (jobs, write) = (std::mem::take(&mut self.jobs), self.writes.pop_front());
        // The queue's own reference is dropped in `run`, never under the lock.
        let is_last = self.writes.is_empty();
        let store = if is_last { self.store.take().unwrap_or(store) } else { store };
        Some(Next::Work(store, jobs, write))
    }

    fn clear(&mut self) -> (Vec<Job>, VecDeque<Write>, Option<Arc<Store>>) {
        (std::mem::take(&mut self.jobs), std::mem::take(&mut self.writes), self.store.take())
    }
}

/// While this is held, the thread looks for commits of other processes.
pub(crate) struct Watch<'a>(&'a Shared);

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

    /// Commits on the callers' threads wait in the same queue, and need no thread of the engine.
    #[test]
    fn a_watch_that_gets_no_thread_leaves_the_commits_of_others_alone() {
        const CHILD: &str = "EVERCORE_CHILD_WITHOUT_THREADS";
        if std::env::var_os(CHILD).is_some() {
            let settings = Settings { commit_on_caller_thread: true, ..Settings::default() };
            let queue = Queue::new(Arc::new(Store::open(settings, None).unwrap()), Vec::new());
            let (job, _answer) = Job::new(Batch::new(), None);
            queue.shared.lock().jobs.push(job);
            let refused = queue.watch().map(drop).unwrap_err();
            assert_eq!(refused.kind(), &ErrorKind::Unavailable, "{refused}");
            assert_eq!(queue.shared.take_jobs().len(), 1);
            assert_eq!(queue.shared.lock().watchers, 0);
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

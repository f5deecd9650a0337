//! Waiting for events, and telling other processes of them.
//!
//! A notification is only a hint: it makes the receiver query the end of the log. So a lost notification costs a
//! second, and a false one costs a query.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use evercore_core::{Position, Result as CoreResult};
use futures_lite::future::or;
use tokio::sync::{Mutex, Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_postgres::types::Type;

use crate::connection::pool::Lent;
use crate::connection::task::in_task;
use crate::error::Result;
use crate::read::log;
use crate::sql::{Schema, Sql};
use crate::store::Store;

/// How often to query although notifications arrive: one is lost if its process dies before it sends it.
const FALLBACK: Duration = Duration::from_secs(1);

/// The least time between two notifications of one process.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// How long to keep watching after the last waiter has left.
const LINGER: Duration = Duration::from_secs(10);

/// Longer than any wait.
const FOREVER: Duration = Duration::from_secs(365 * 86_400);

/// The end of the log that this engine has seen, and the waiters for more.
#[derive(Debug)]
pub(crate) struct Watch {
    seen: watch::Sender<i64>,
    channel: String,
    notify: Sql,
    waiting: AtomicUsize,
    is_watched: AtomicBool,
    is_announced: AtomicBool,
    hint: Arc<Notify>,
    /// Held while querying the log's end, so that only one query runs at a time.
    turn: Mutex<()>,
    /// How many queries have succeeded.
    looks: AtomicU64,
}

impl Watch {
    pub(crate) fn new(schema: &Schema) -> Self {
        Self {
            seen: watch::Sender::new(0),
            channel: format!("evercore.{}", schema.as_str()).chars().take(63).collect(),
            notify: Sql::new(schema, "SELECT pg_catalog.pg_notify($1, $2)", &[Type::TEXT, Type::TEXT]),
            waiting: AtomicUsize::new(0),
            is_watched: AtomicBool::new(false),
            is_announced: AtomicBool::new(false),
            hint: Arc::new(Notify::new()),
            turn: Mutex::new(()),
            looks: AtomicU64::new(0),
        }
    }

    /// Records the end of the log, and wakes the waiters.
    pub(crate) fn saw(&self, head: Position) {
        self.seen.send_if_modified(|seen| {
            let is_further = *seen < head.get();
            *seen = head.get().max(*seen);
            is_further
        });
    }

    /// Records the end that a query has found; `known` is the end that was known when the query began. If the new end
    /// is smaller, the log has lost its tail, as a failover may cause, and callers must no longer see the lost end.
    pub(crate) fn found(&self, known: Position, head: Position) {
        self.seen.send_if_modified(|seen| {
            let is_other = *seen < head.get() || (head < known && *seen == known.get());
            if is_other {
                *seen = head.get();
            }
            is_other
        });
    }

    /// A receiver for the end of the log that the engine has seen.
    pub(crate) fn subscribe(&self) -> watch::Receiver<i64> {
        self.seen.subscribe()
    }

    pub(crate) fn seen(&self) -> Position {
        Position::new(*self.seen.borrow()).unwrap_or_default()
    }

    /// Wakes all waiters, so that they see that the engine is closed.
    pub(crate) fn close(&self) {
        self.seen.send_modify(|_| {});
        self.hint.notify_waiters();
    }
}

/// Waits for the log to grow. Subscribes before it queries the log, so that no commit between the two is missed.
pub(crate) async fn wait(store: &Arc<Store>, after: Position, at_most: Duration) -> CoreResult<Position> {
    store.check_open()?;
    let mut seen = store.watch.seen.subscribe();
    if store.watch.seen() > after {
        return Ok(store.watch.seen());
    }
    let until = Instant::now() + at_most.min(FOREVER);
    let _waiting = Waiting::new(store);
    // In a task: a waiter that is not polled must not hold a connection.
    let looking = Arc::clone(store);
    let looked = async { in_task(async move { look(&looking).await }).await };
    // A commit that is reported meanwhile is enough.
    let woken = async {
        let _ = seen.clone().wait_for(|seen| *seen > after.get() || store.check_open().is_err()).await;
        Ok(Ok(()))
    };
    or(looked, woken).await??;
    loop {
        store.check_open()?;
        let head = Position::new(*seen.borrow_and_update()).unwrap_or_default();
        if head > after || timeout_at(until, seen.changed()).await.is_err() {
            return Ok(head);
        }
    }
}

/// Queries the end of the log, or uses the result of another query that began after this call. Any number of waiters
/// needs only one connection: a second might have to be opened, and would hold them up on a server that accepts no new
/// connections. A query without an answer blocks the others only briefly.
async fn look(store: &Store) -> Result<()> {
    let asked = store.watch.looks.load(Ordering::SeqCst);
    let Ok(_turn) = timeout(FALLBACK, store.watch.turn.lock()).await else {
        return log::head(store).await.map(drop);
    };
    // Queries run one at a time: the first to end after this call may have begun before it, but the second has not.
    if store.watch.looks.load(Ordering::SeqCst) < asked + 2 {
        log::head(store).await?;
        store.watch.looks.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

/// Starts the watching task if it is not running, because a caller waits.
struct Waiting<'a>(&'a Watch);

impl<'a> Waiting<'a> {
    fn new(store: &'a Arc<Store>) -> Self {
        store.watch.waiting.fetch_add(1, Ordering::SeqCst);
        if !store.watch.is_watched.swap(true, Ordering::SeqCst) {
            tokio::spawn(keep_watch(Watching(Arc::downgrade(store))));
        }
        Self(&store.watch)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The engine's only watching task. However it ends, the next waiter starts another.
struct Watching(Weak<Store>);

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(store) = self.0.upgrade() {
            store.watch.is_watched.store(false, Ordering::Release);
        }
    }
}

async fn keep_watch(mut watching: Watching) {
    let mut last_wanted = Instant::now();
    let mut listener = None;
    let mut listen_again = Instant::now();
    loop {
        let Some(store) = watching.0.upgrade() else { return };
        if store.check_open().is_err() {
            return;
        }
        let is_wanted = store.watch.waiting.load(Ordering::Acquire) > 0;
        if is_wanted {
            last_wanted = Instant::now();
        } else if last_wanted.elapsed() > LINGER {
            store.watch.is_watched.store(false, Ordering::SeqCst);
            // A waiter that came between the check and the store relies on this task.
            if store.watch.waiting.load(Ordering::SeqCst) == 0
                || store.watch.is_watched.swap(true, Ordering::SeqCst)
            {
                watching.0 = Weak::new();
                return;
            }
        }
        if listener.as_ref().is_none_or(Listener::is_over) && listen_again <= Instant::now() {
            listen_again = Instant::now() + FALLBACK;
            listener = Listener::start(&store);
        }
        // Each new waiter queries once itself. If this query fails, the next one reports it.
        if is_wanted {
            let _ = look(&store).await;
        }
        let hears = listener.as_ref().is_some_and(Listener::hears);
        let pause = if hears { FALLBACK } else { store.settings.poll_interval };
        let hint = Arc::clone(&store.watch.hint);
        drop(store);
        let _ = timeout(pause, hint.notified()).await;
    }
}

/// A dedicated connection that listens for the commits of other processes. No waiter waits for it to connect: a server
/// may leave a login unanswered.
struct Listener {
    task: JoinHandle<()>,
    hears: Arc<AtomicBool>,
}

impl Listener {
    /// `None` where there are no notifications: on a standby, through a pooler, on a pool of the application.
    fn start(store: &Store) -> Option<Self> {
        if store.settings.pooler || store.settings.read_only {
            return None;
        }
        let address = store.address.clone()?;
        let (at_most, hint) = (store.settings.connect_timeout, Arc::clone(&store.watch.hint));
        let listen = format!("LISTEN \"{}\"", store.watch.channel);
        let hears = Arc::new(AtomicBool::new(false));
        let it_hears = Arc::clone(&hears);
        let task = tokio::spawn(async move {
            let heard = Arc::clone(&hint);
            let begin = async {
                let (client, connection) = address.listen(move |_| heard.notify_one()).await?;
                client.batch_execute(&listen).await?;
                Ok::<_, tokio_postgres::Error>((client, connection))
            };
            let Ok(Ok((_client, connection))) = timeout(at_most, begin).await else { return };
            it_hears.store(true, Ordering::Release);
            // Commits before LISTEN and after the end of the connection are not reported here, so query.
            hint.notify_one();
            let _ = connection.await;
            it_hears.store(false, Ordering::Release);
            hint.notify_one();
        });
        Some(Self { task, hears })
    }

    fn hears(&self) -> bool {
        self.hears.load(Ordering::Acquire)
    }

    fn is_over(&self) -> bool {
        self.task.is_finished()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Notifies other processes that the log has grown: at once, and then at a limited rate. No caller waits for it, and it
/// is not part of a commit: with a notification in each transaction, all commits would queue for one lock of the
/// cluster.
pub(crate) fn announce(store: &Arc<Store>) {
    if !store.watch.is_announced.swap(true, Ordering::AcqRel) {
        tokio::spawn(keep_announcing(Announcing(Arc::downgrade(store))));
    }
}

/// The engine's only notifying task. If it ends with its runtime, the next commit starts another.
struct Announcing(Weak<Store>);

impl Drop for Announcing {
    fn drop(&mut self) {
        if let Some(store) = self.0.upgrade() {
            store.watch.is_announced.store(false, Ordering::Release);
        }
    }
}

async fn keep_announcing(mut announcing: Announcing) {
    loop {
        let Some(store) = announcing.0.upgrade() else { return };
        let head = store.watch.seen();
        // A process that misses the notification queries by itself within a second.
        let _ = tell(&store, head).await;
        drop(store);
        sleep(DEBOUNCE).await;
        let Some(store) = announcing.0.upgrade() else { return };
        if store.watch.seen() > head {
            continue;
        }
        store.watch.is_announced.store(false, Ordering::Release);
        // A commit between the check and the store found the flag set and started no task, so check again.
        if store.watch.seen() == head || store.watch.is_announced.swap(true, Ordering::AcqRel) {
            announcing.0 = Weak::new();
            return;
        }
    }
}

async fn tell(store: &Store, head: Position) -> Result<()> {
    store.read(|lent| async move { notify(store, &lent, head).await }).await
}

async fn notify(store: &Store, lent: &Lent, head: Position) -> Result<()> {
    let (channel, payload) = (store.watch.channel.as_str(), head.to_string());
    lent.sender()?.rows(&store.watch.notify, &[&channel, &payload]).await.map(drop)
}

//! Waiting for events, and telling other processes of them.
//!
//! A notification is only a hint: it makes the receiver query the end of the log. So a lost notification costs a
//! second, and a false one costs a query.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use evercore_core::{Position, Result as CoreResult};
use futures_lite::future::or;
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_postgres::types::Type;

use crate::connection::pool::{Checkout, Pools};
use crate::connection::task::in_task;
use crate::error::Result;
use crate::read::log::Log;
use crate::settings::Settings;
use crate::sql::{Sql, Values};

/// How often to query although notifications arrive: one is lost if its process dies before it sends it.
const FALLBACK: Duration = Duration::from_secs(1);

/// The least time between two notifications of one process.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// How long to keep watching after the last waiter has left.
const LINGER: Duration = Duration::from_secs(10);

/// Longer than any wait.
const FOREVER: Duration = Duration::from_secs(365 * 86_400);

/// Waits for the log to grow, and tells other processes that it has grown.
#[derive(Debug)]
pub(crate) struct Watch {
    pools: Arc<Pools>,
    pub(crate) log: Arc<Log>,
    channel: String,
    notify: Sql,
    waiting: AtomicUsize,
    is_watched: AtomicBool,
    is_announced: AtomicBool,
    hint: Arc<Notify>,
    /// Held while querying the log's end, so that only one query runs at a time.
    turn: Mutex<()>,
    /// How many queries have succeeded.
    queries: AtomicU64,
}

impl Watch {
    pub(crate) fn new(pools: Arc<Pools>, log: Arc<Log>) -> Self {
        let schema = &pools.settings.schema;
        Self {
            channel: format!("evercore.{}", schema.as_str()).chars().take(63).collect(),
            notify: Sql::new(schema, "SELECT pg_catalog.pg_notify($1, $2)", &[Type::TEXT, Type::TEXT]),
            pools,
            log,
            waiting: AtomicUsize::new(0),
            is_watched: AtomicBool::new(false),
            is_announced: AtomicBool::new(false),
            hint: Arc::new(Notify::new()),
            turn: Mutex::new(()),
            queries: AtomicU64::new(0),
        }
    }

    /// Wakes all waiters, so that they see that the engine is closed.
    pub(crate) fn close(&self) {
        self.log.seen.wake_all();
        self.hint.notify_waiters();
    }

    /// Waits for the log to grow. Subscribes before it queries the log, so that no commit between the two is missed.
    pub(crate) async fn wait(self: &Arc<Self>, after: Position, at_most: Duration) -> CoreResult<Position> {
        self.pools.check_open()?;
        let mut seen = self.log.seen.subscribe();
        if self.log.seen.get() > after {
            return Ok(self.log.seen.get());
        }
        let until = Instant::now() + at_most.min(FOREVER);
        let _waiting = Waiting::new(self);
        // In a task: a waiter that is not polled must not hold a connection.
        let querying = Arc::clone(self);
        let queried = async { in_task(async move { querying.query_head().await }).await };
        // A commit that is reported meanwhile is enough.
        let woken = async {
            let is_over = |seen: &i64| *seen > after.get() || self.pools.check_open().is_err();
            let _ = seen.clone().wait_for(is_over).await;
            Ok(Ok(()))
        };
        or(queried, woken).await??;
        loop {
            self.pools.check_open()?;
            let head = Position::new(*seen.borrow_and_update()).unwrap_or_default();
            if head > after || timeout_at(until, seen.changed()).await.is_err() {
                return Ok(head);
            }
        }
    }

    /// Queries the end of the log, or uses the result of another query that began after this call. Any number of
    /// waiters needs only one connection: a second might have to be opened, and would hold them up on a server that
    /// accepts no new connections. A query without an answer blocks the others only briefly.
    async fn query_head(&self) -> Result<()> {
        let asked = self.queries.load(Ordering::SeqCst);
        let Ok(_turn) = timeout(FALLBACK, self.turn.lock()).await else {
            return self.log.head().await.map(drop);
        };
        // Queries run one at a time: the first to end after this call may have begun before it, but the second has not.
        if self.queries.load(Ordering::SeqCst) < asked + 2 {
            self.log.head().await?;
            self.queries.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Records a commit of this engine, and notifies other processes: at once, and then at a limited rate. No caller
    /// waits for it, and it is not part of a commit: with a notification in each transaction, all commits would queue
    /// for one lock of the cluster.
    pub(crate) fn announce(self: &Arc<Self>, head: Position) {
        self.log.seen.raise(head);
        // A waiter here may have seen this head by itself already. Other processes may not, so notify them anyway.
        if head > Position::ZERO && !self.is_announced.swap(true, Ordering::AcqRel) {
            tokio::spawn(keep_announcing(Announcing(Arc::downgrade(self))));
        }
    }

    async fn notify(&self, head: Position) -> Result<()> {
        let payload = head.to_string();
        let values: &Values<'_> = &[&self.channel, &payload];
        let notify = |checkout: Arc<Checkout>| async move {
            checkout.sender()?.rows(&self.notify, values).await.map(drop)
        };
        self.pools.read(notify).await
    }
}

/// Starts the watching task if it is not running, because a caller waits.
struct Waiting<'a>(&'a Watch);

impl<'a> Waiting<'a> {
    fn new(watch: &'a Arc<Watch>) -> Self {
        watch.waiting.fetch_add(1, Ordering::SeqCst);
        if !watch.is_watched.swap(true, Ordering::SeqCst) {
            tokio::spawn(keep_watch(Watching(Arc::downgrade(watch))));
        }
        Self(watch)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The engine's only watching task. However it ends, the next waiter starts another.
struct Watching(Weak<Watch>);

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(watch) = self.0.upgrade() {
            watch.is_watched.store(false, Ordering::Release);
        }
    }
}

async fn keep_watch(mut watching: Watching) {
    let mut last_wanted = Instant::now();
    let mut listener = None;
    let mut listen_again = Instant::now();
    loop {
        let Some(watch) = watching.0.upgrade() else { return };
        if watch.pools.check_open().is_err() {
            return;
        }
        let is_wanted = watch.waiting.load(Ordering::Acquire) > 0;
        if is_wanted {
            last_wanted = Instant::now();
        } else if last_wanted.elapsed() > LINGER {
            watch.is_watched.store(false, Ordering::SeqCst);
            // A waiter that came between the check and the store relies on this task.
            if watch.waiting.load(Ordering::SeqCst) == 0 || watch.is_watched.swap(true, Ordering::SeqCst) {
                watching.0 = Weak::new();
                return;
            }
        }
        if listener.as_ref().is_none_or(Listener::is_over) && listen_again <= Instant::now() {
            listen_again = Instant::now() + FALLBACK;
            listener = Listener::start(&watch);
        }
        // Each new waiter queries once itself. If this query fails, the next one reports it.
        if is_wanted {
            let _ = watch.query_head().await;
        }
        let hears = listener.as_ref().is_some_and(Listener::hears);
        let pause = if hears { FALLBACK } else { watch.pools.settings.poll_interval };
        let hint = Arc::clone(&watch.hint);
        drop(watch);
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
    fn start(watch: &Watch) -> Option<Self> {
        let Settings { pooler, read_only, connect_timeout, .. } = watch.pools.settings;
        if pooler || read_only {
            return None;
        }
        let address = watch.pools.address.clone()?;
        let hint = Arc::clone(&watch.hint);
        let listen = format!("LISTEN \"{}\"", watch.channel);
        let hears = Arc::new(AtomicBool::new(false));
        let it_hears = Arc::clone(&hears);
        let task = tokio::spawn(async move {
            let heard = Arc::clone(&hint);
            let begin = async {
                let (client, connection) = address.listen(move |_| heard.notify_one()).await?;
                client.batch_execute(&listen).await?;
                Ok::<_, tokio_postgres::Error>((client, connection))
            };
            let Ok(Ok((_client, connection))) = timeout(connect_timeout, begin).await else { return };
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

/// The engine's only notifying task. If it ends with its runtime, the next commit starts another.
struct Announcing(Weak<Watch>);

impl Drop for Announcing {
    fn drop(&mut self) {
        if let Some(watch) = self.0.upgrade() {
            watch.is_announced.store(false, Ordering::Release);
        }
    }
}

async fn keep_announcing(mut announcing: Announcing) {
    loop {
        let Some(watch) = announcing.0.upgrade() else { return };
        let head = watch.log.seen.get();
        // A process that misses the notification queries by itself within a second.
        let _ = watch.notify(head).await;
        drop(watch);
        sleep(DEBOUNCE).await;
        let Some(watch) = announcing.0.upgrade() else { return };
        if watch.log.seen.get() > head {
            continue;
        }
        watch.is_announced.store(false, Ordering::Release);
        // A commit between the check and the store found the flag set and started no task, so check again.
        if watch.log.seen.get() == head || watch.is_announced.swap(true, Ordering::AcqRel) {
            announcing.0 = Weak::new();
            return;
        }
    }
}

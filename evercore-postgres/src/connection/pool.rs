//! Connections: taken from a pool, and returned only if their state is unchanged.
//!
//! There are two pools. One is for reads and for the user's SQL, which may use a connection for long. The other is
//! small and for commits, so that reads never take the connection that commits need. With a pool of the application,
//! both are that pool.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use deadpool_postgres::{ClientWrapper, Object, Pool, PoolError};
use evercore_core::{Error, ErrorKind, Result as CoreResult};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_postgres::NoTls;

use crate::connection::connect::Address;
use crate::connection::notices::Notices;
use crate::error::{Because, PostgresError, Result, is_rolled_back, is_stale, takes_no_writes};
use crate::settings::Settings;
use crate::sql::Sender;

/// The number of connections for commits: one for the flight, and one for the engine's other writes.
const FOR_COMMITS: usize = 2;

/// How long an abandoned statement may run before it is cancelled.
const GRACE: Duration = Duration::from_millis(50);

/// The maximum number of cancel requests: one for each statement that was sent, one after the other.
const CANCELS: usize = 8;

/// How often work is tried at most if sessions have lost their prepared statements.
const ATTEMPTS: usize = 3;

/// The connections of an engine, and the settings under which they are used.
#[derive(Debug)]
pub(crate) struct Pools {
    pub(crate) settings: Settings,
    /// For reads and for the user's SQL.
    pub(crate) reads: Pool,
    /// For the engine's own writes.
    commits: Pool,
    /// The server's address; `None` with a pool of the application.
    pub(crate) address: Option<Arc<Address>>,
    /// The server's notices; empty with a pool of the application.
    pub(crate) notices: Notices,
    /// One less than there are connections: the user's SQL never takes all of them.
    for_user_sql: Arc<Semaphore>,
    closed: AtomicBool,
}

impl Pools {
    pub(crate) fn new(settings: Settings, reads: Pool, address: Option<Address>) -> CoreResult<Self> {
        let commits = match &address {
            Some(address) => address.pool(FOR_COMMITS)?,
            None => reads.clone(),
        };
        let for_user_sql = reads.status().max_size.saturating_sub(1).max(1);
        Ok(Self {
            settings,
            reads,
            commits,
            notices: address.as_ref().map(|address| address.notices.clone()).unwrap_or_default(),
            address: address.map(Arc::new),
            for_user_sql: Arc::new(Semaphore::new(for_user_sql)),
            closed: AtomicBool::new(false),
        })
    }

    pub(crate) fn check_open(&self) -> CoreResult<()> {
        if self.closed.load(Ordering::Acquire) { Err(Error::closed()) } else { Ok(()) }
    }

    pub(crate) fn check_writable(&self) -> CoreResult<()> {
        self.check_open()?;
        if self.settings.read_only { Err(Error::read_only()) } else { Ok(()) }
    }

    /// From now on calls are `Closed`.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Closes the connections, except those of the application.
    pub(crate) fn close_connections(&self) {
        if self.address.is_some() {
            self.reads.close();
            self.commits.close();
        }
    }

    /// A connection for reads. If it is dropped before [`after`](Checkout::after), a running statement is cancelled.
    pub(crate) async fn to_read(&self) -> Result<Checkout> {
        self.take(&self.reads, State::Reads).await
    }

    /// A connection for steps of cursors and migrations. If it is dropped before [`put_back`](Checkout::put_back), it
    /// is closed.
    pub(crate) async fn to_write(&self) -> Result<Checkout> {
        self.take(&self.reads, State::Writes).await
    }

    /// The same for a transaction with the user's SQL. Waits while too many of them run.
    pub(crate) async fn to_run_user_sql(&self) -> Result<Checkout> {
        let permit = Arc::clone(&self.for_user_sql).acquire_owned();
        let permit = timeout(self.settings.connect_timeout, permit).await;
        let permit = permit.ok().and_then(|permit| permit.ok()).ok_or_else(|| {
            let message = "no connection became free in time: too many `commit_with` calls run at once";
            Error::new(ErrorKind::Unavailable, message)
        })?;
        let mut checkout = self.to_write().await?;
        checkout._permit = Some(permit);
        Ok(checkout)
    }

    /// The same for the engine's own writes, on a connection that reads do not use.
    pub(crate) async fn to_commit(&self) -> Result<Checkout> {
        self.take(&self.commits, State::Writes).await
    }

    async fn take(&self, pool: &Pool, state: State) -> Result<Checkout> {
        self.check_open()?;
        // Our pool has its own time-outs for waiting and for connecting. A pool of the application may have none.
        let patience = match self.address {
            Some(_) => self.settings.connect_timeout.saturating_mul(3),
            None => self.settings.connect_timeout,
        };
        let object = timeout(patience, pool.get()).await;
        let object =
            object.map_err(|_| Error::new(ErrorKind::Unavailable, "no connection became free in time"))?;
        let object = object.map_err(|error| match error {
            PoolError::Closed => Error::closed().into(),
            error => PostgresError::from(error),
        })?;
        Ok(Checkout {
            object: Some(object),
            named: !self.settings.pooler,
            state: AtomicU8::new(state as u8),
            address: self.address.clone(),
            _permit: None,
        })
    }

    /// Reads under a time-out, and returns the connection afterwards.
    pub(crate) async fn read<T, W>(&self, work: impl Fn(Arc<Checkout>) -> W) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        self.run(&self.reads, State::Reads, work).await
    }

    /// The same for reads that a commit needs, on a connection that other reads do not use. They write nothing, so
    /// their outcome is never unknown.
    pub(crate) async fn read_for_commit<T, W>(&self, work: impl Fn(Arc<Checkout>) -> W) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        self.run(&self.commits, State::Reads, work).await
    }

    /// The same for the engine's writes outside of flights, each in its own transaction.
    pub(crate) async fn write<T, W>(&self, work: impl Fn(Arc<Checkout>) -> W) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        self.run(&self.commits, State::Writes, work).await
    }

    async fn run<T, W>(&self, pool: &Pool, state: State, work: impl Fn(Arc<Checkout>) -> W) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        self.again_if_stale(|| async {
            let checkout = Arc::new(self.take(pool, state).await?);
            let outcome = self.in_time(work(Arc::clone(&checkout))).await;
            checkout.after(outcome)
        })
        .await
    }

    /// Runs work that takes a connection itself. If the session has lost its prepared statements, as after `DISCARD
    /// ALL`, this closes it and all idle connections. Nothing was executed, so the work is tried again on a new
    /// connection.
    pub(crate) async fn again_if_stale<T, W>(&self, work: impl Fn() -> W) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        for _ in 1..ATTEMPTS {
            match work().await {
                Err(error) if is_stale(&error) => self.forget_sessions(),
                outcome => return outcome,
            }
        }
        work().await.map_err(|error| self.if_stale(error))
    }

    /// The error for a stale session if the work is not tried again. The caller's next attempt gets a new session.
    pub(crate) fn if_stale(&self, error: PostgresError) -> PostgresError {
        if !is_stale(&error) {
            return error;
        }
        self.forget_sessions();
        let message = "the session lost its prepared statements and was closed, try again";
        Error::new(ErrorKind::Unavailable, message).because(error).into()
    }

    /// Closes all idle connections: what happened to one session may have happened to all.
    pub(crate) fn forget_sessions(&self) {
        for pool in [&self.reads, &self.commits] {
            drop(pool.retain(|_, _| false));
        }
    }

    /// Waits for the server slightly longer than the server's own time-out.
    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let patience = self.settings.statement_timeout.saturating_add(self.settings.connect_timeout);
        timeout(patience, work).await?
    }
}

/// The state of a connection that was taken, which decides what happens when it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum State {
    /// Unchanged: it goes back to the pool.
    Clean,
    /// A read may be running: it is cancelled.
    Reads,
    /// A transaction may be open: the connection is closed, and the server rolls it back.
    Writes,
    /// Unusable: it is closed.
    Unusable,
}

/// A connection that was taken from a pool.
#[derive(Debug)]
pub(crate) struct Checkout {
    object: Option<Object>,
    pub(crate) named: bool,
    state: AtomicU8,
    address: Option<Arc<Address>>,
    /// Returned after the connection.
    _permit: Option<OwnedSemaphorePermit>,
}

impl Checkout {
    pub(crate) fn sender(&self) -> Result<Sender<'_>> {
        let object = self.object.as_ref().ok_or_else(gone)?;
        Ok(Sender { client: object, cache: &object.statement_cache, named: self.named })
    }

    pub(crate) fn client_mut(&mut self) -> Result<&mut ClientWrapper> {
        Ok(self.object.as_mut().ok_or_else(gone)?)
    }

    /// Returns it to the pool, since every transaction has ended.
    pub(crate) fn put_back(self) {
        self.is(State::Clean);
    }

    /// Closes it instead of returning it to the pool.
    pub(crate) fn discard(&self) {
        self.is(State::Unusable);
    }

    fn is(&self, state: State) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// Marks it to be returned when dropped, unless the outcome of a statement shows that it is unusable.
    pub(crate) fn after<T>(&self, outcome: Result<T>) -> Result<T> {
        match &outcome {
            _ if self.state.load(Ordering::Relaxed) == State::Unusable as u8 => {}
            Ok(_) => self.is(State::Clean),
            Err(error) if is_stale(error) || takes_no_writes(error) => self.discard(),
            // A failure within a transaction leaves the transaction open.
            Err(_) if self.state.load(Ordering::Relaxed) == State::Writes as u8 => {}
            Err(error) if is_rolled_back(error) => self.is(State::Clean),
            Err(PostgresError::Postgres(_)) => self.discard(),
            // The error is our own, so a statement may still be running on the server.
            _ => {}
        }
        outcome
    }
}

/// Never happens: the connection exists as long as this value, but the type cannot express that.
fn gone() -> Error {
    Error::new(ErrorKind::Backend, "the connection was already returned to the pool")
}

impl Drop for Checkout {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        let state = *self.state.get_mut();
        if state == State::Clean as u8 {
            return;
        }
        match Handle::try_current() {
            Ok(runtime) if state == State::Reads as u8 => {
                runtime.spawn(come_to_rest(object, self.address.take()));
            }
            // Taken out of the pool, so dropping it closes it.
            _ => drop(Object::take(object)),
        }
    }
}

/// Cancels the abandoned statements of a connection. Until they have ended, the connection counts as taken, so that
/// the server never has more running statements than there are connections.
async fn come_to_rest(object: Object, address: Option<Arc<Address>>) {
    // Most abandoned reads end soon. The server answers an empty statement after all earlier statements.
    if is_at_rest(&object).await {
        return;
    }
    let token = object.cancel_token();
    for _ in 0..CANCELS {
        let cancelled = async {
            match &address {
                Some(address) => address.cancel(&token).await,
                None => token.cancel_query(NoTls).await,
            }
        };
        let is_cancelled = matches!(timeout(GRACE * 20, cancelled).await, Ok(Ok(())));
        if is_at_rest(&object).await || !is_cancelled {
            break;
        }
    }
    // Close it in any case: a late cancel request must not cancel the next statement.
    drop(Object::take(object));
}

async fn is_at_rest(object: &Object) -> bool {
    matches!(timeout(GRACE, object.simple_query("")).await, Ok(Ok(_)))
}

//! Connections: taken from a pool, and given back only if they are as they were.
//!
//! There are two pools. One is for reads and for the SQL of users; its connections may be at work for long. The other
//! is small and for commits, so that no read keeps a commit from its connection. On a pool that was handed in, both
//! are that pool.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use deadpool_postgres::{ClientWrapper, Object, Pool, PoolError};
use evercore_core::{Error, ErrorKind};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_postgres::NoTls;

use crate::connect::Address;
use crate::error::{Because, PostgresError, Result, closed, is_rolled_back, is_stale, takes_no_writes};
use crate::sql::Sender;
use crate::store::Store;

/// How many connections there are for commits: one for the flight, and one for what is written beside it.
pub(crate) const FOR_COMMITS: usize = 2;

/// How long a statement that nobody waits for any more may go on before it is cancelled.
const GRACE: Duration = Duration::from_millis(50);

/// How often it is cancelled at most: each statement that was sent, one after the other.
const CANCELS: usize = 8;

/// How often work is begun at most whose session had lost what was prepared in it.
const ATTEMPTS: usize = 3;

/// What is known of a connection that is lent, and so what becomes of it when it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum State {
    /// It is as it was: the next may have it.
    Clean,
    /// A statement that only reads may be at work: it is cancelled.
    Reads,
    /// A transaction may be open: the connection is closed, and the server rolls back.
    Writes,
    /// It is of no use any more: it is closed.
    Spoiled,
}

/// A connection for as long as this is held.
#[derive(Debug)]
pub(crate) struct Lent {
    object: Option<Object>,
    named: bool,
    state: AtomicU8,
    address: Option<Arc<Address>>,
}

impl Lent {
    /// For statements that only read. Dropped before [`after`](Self::after), what is still at work is cancelled.
    pub(crate) async fn to_read(store: &Store) -> Result<Self> {
        Self::take(store, &store.pool, State::Reads).await
    }

    /// The same for reads that a commit needs, whatever other reads are at work.
    pub(crate) async fn to_look(store: &Store) -> Result<Self> {
        Self::take(store, &store.commits, State::Reads).await
    }

    /// For transactions with SQL of users in them, and for steps: dropped, it is closed, unless it was
    /// [put back](Self::put_back) before.
    pub(crate) async fn to_write(store: &Store) -> Result<Self> {
        Self::take(store, &store.pool, State::Writes).await
    }

    /// The same for what the engine writes by itself, whatever reads are at work.
    pub(crate) async fn to_commit(store: &Store) -> Result<Self> {
        Self::take(store, &store.commits, State::Writes).await
    }

    /// The same for the flight under way, of which something may reach the server from here on.
    pub(crate) async fn to_fly(store: &Store) -> Result<Self> {
        let lent = Self::to_commit(store).await?;
        store.queue.is_sent();
        Ok(lent)
    }

    async fn take(store: &Store, pool: &Pool, state: State) -> Result<Self> {
        store.check_open()?;
        // Ours keeps its times itself: one for a free connection, one for making it. A pool that was handed in may have
        // none.
        let patience = match store.address {
            Some(_) => store.settings.connect_timeout.saturating_mul(3),
            None => store.settings.connect_timeout,
        };
        let object = timeout(patience, pool.get()).await;
        let object =
            object.map_err(|_| Error::new(ErrorKind::Unavailable, "no connection became free in time"))?;
        let object = object.map_err(|error| match error {
            PoolError::Closed => closed().into(),
            error => PostgresError::from(error),
        })?;
        let (named, address) = (!store.settings.pooler, store.address.clone());
        Ok(Self { object: Some(object), named, state: AtomicU8::new(state as u8), address })
    }

    pub(crate) fn sender(&self) -> Result<Sender<'_>> {
        let object = self.object.as_ref().ok_or_else(gone)?;
        Ok(Sender { client: object, cache: &object.statement_cache, named: self.named })
    }

    pub(crate) fn is_named(&self) -> bool {
        self.named
    }

    pub(crate) fn client_mut(&mut self) -> Result<&mut ClientWrapper> {
        Ok(self.object.as_mut().ok_or_else(gone)?)
    }

    /// To the pool, for the next: every transaction has been seen to end.
    pub(crate) fn put_back(self) {
        self.is(State::Clean);
    }

    /// Lets nobody have it after this.
    pub(crate) fn spoil(&self) {
        self.is(State::Spoiled);
    }

    fn is(&self, state: State) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// To be given back when it is dropped, unless the outcome of a statement tells that it is of no use any more.
    pub(crate) fn after<T>(&self, outcome: Result<T>) -> Result<T> {
        match &outcome {
            _ if self.state.load(Ordering::Relaxed) == State::Spoiled as u8 => {}
            Ok(_) => self.is(State::Clean),
            Err(error) if is_stale(error) || takes_no_writes(error) => self.spoil(),
            // What failed within a transaction has left it open.
            Err(_) if self.state.load(Ordering::Relaxed) == State::Writes as u8 => {}
            Err(error) if is_rolled_back(error) => self.is(State::Clean),
            Err(PostgresError::Postgres(_)) => self.spoil(),
            // The error is our own: of what was sent, something may still be at work.
            _ => {}
        }
        outcome
    }
}

/// It is there for as long as this is; the type cannot say so.
fn gone() -> Error {
    Error::new(ErrorKind::Backend, "the connection was given back")
}

impl Drop for Lent {
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
            // Out of the pool; dropped, it is closed.
            _ => drop(Object::take(object)),
        }
    }
}

/// Sees to it that nothing is at work any more that was sent over this connection, of which nobody awaits the answer. It
/// counts as taken until then, so that a server has no more to do than there are connections.
async fn come_to_rest(object: Object, address: Option<Arc<Address>>) {
    // Most reads that are given up are about to end: an empty statement is answered after all that was sent before.
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
    // Closed all the same: a request to cancel that comes late must not meet the next statement.
    drop(Object::take(object));
}

async fn is_at_rest(object: &Object) -> bool {
    matches!(timeout(GRACE, object.simple_query("")).await, Ok(Ok(_)))
}

impl Store {
    /// Reads in time, on a connection that is given back afterwards.
    pub(crate) async fn read<T, W>(&self, work: impl Fn(Arc<Lent>) -> W) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        self.again_if_stale(|| self.on(Lent::to_read(self), &work)).await
    }

    /// The same for what a commit needs to know. It writes nothing, so its outcome is never in doubt.
    pub(crate) async fn look<T, W>(&self, work: impl Fn(Arc<Lent>) -> W) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        self.again_if_stale(|| self.on(Lent::to_look(self), &work)).await
    }

    /// The same for what the engine writes beside its flights, each in a transaction of its own.
    pub(crate) async fn write<T, W>(&self, work: impl Fn(Arc<Lent>) -> W) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        self.again_if_stale(|| self.on(Lent::to_commit(self), &work)).await
    }

    async fn on<T, W>(
        &self,
        lent: impl Future<Output = Result<Lent>>,
        work: impl Fn(Arc<Lent>) -> W,
    ) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        let lent = Arc::new(lent.await?);
        let outcome = self.in_time(work(Arc::clone(&lent))).await;
        lent.after(outcome)
    }

    /// Does work that takes a connection by itself. A session may have lost what was prepared in it, as by `DISCARD ALL`.
    /// It is given up then, and so are the others that rest; nothing was executed, and the work is begun again on a new one.
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

    /// What work that is not begun again is told of a stale session: another time it meets a new one.
    pub(crate) fn if_stale(&self, error: PostgresError) -> PostgresError {
        if !is_stale(&error) {
            return error;
        }
        self.forget_sessions();
        let message = "the session has lost what was prepared in it, and is given up";
        Error::new(ErrorKind::Unavailable, message).because(error).into()
    }

    /// Closes the connections that nobody has at the moment: what befell one session may have befallen all.
    pub(crate) fn forget_sessions(&self) {
        for pool in [&self.pool, &self.commits] {
            drop(pool.retain(|_, _| false));
        }
    }

    /// Waits for the server no longer than a little more than the server itself would.
    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        timeout(self.patience(), work).await?
    }

    /// How long that is.
    pub(crate) fn patience(&self) -> Duration {
        self.settings.statement_timeout.saturating_add(self.settings.connect_timeout)
    }
}

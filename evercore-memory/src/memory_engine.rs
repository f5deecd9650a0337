//! The engine: implements the contract on a state under a mutex.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use event_listener::Event as Bell;
use evercore_core::engine::{
    Backlogs, Batch, Changed, Cursors, History, IdBlock, KnownCommand, LoadRequest, Step, SubscriptionChange,
    SubscriptionStorage,
};
use evercore_core::{
    AggregateQuery, BoxError, BoxFuture, CommandId, Cursor, CursorId, Error, Event, Events, KnownType,
    LogPage, LogQuery, Parked, Position, Receipt, Result, StorageEngine, StoreId, SubscriptionName,
    Timestamp,
};
use futures_lite::future::or;
use futures_timer::Delay;

use crate::state::{Clock, InlineProjection, State};

/// An engine that keeps everything in memory. Clones share one store.
#[derive(Clone, Default)]
pub struct MemoryEngine {
    shared: Arc<Shared>,
}

struct Shared {
    identity: StoreId,
    state: Mutex<State>,
    /// Rung after each commit that wrote events.
    bell: Bell,
}

impl Default for Shared {
    fn default() -> Self {
        Self { identity: StoreId::random(), state: Mutex::default(), bell: Bell::new() }
    }
}

impl MemoryEngine {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty store that reads the time from `clock`, for tests that depend on time. The clock sets `recorded_at` and
    /// decides when leases end. Waits and pauses still take real time.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicI64, Ordering};
    ///
    /// use evercore_memory::{MemoryEngine, Timestamp};
    ///
    /// let micros = Arc::new(AtomicI64::new(1_000_000));
    /// let clock = Arc::clone(&micros);
    /// let engine = MemoryEngine::with_clock(move || {
    ///     Timestamp::from_micros(clock.load(Ordering::Relaxed)).unwrap_or(Timestamp::MIN)
    /// });
    /// micros.fetch_add(3_600_000_000, Ordering::Relaxed); // an hour later
    /// # drop(engine);
    /// ```
    pub fn with_clock(clock: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        let engine = Self::new();
        engine.lock().clock = Clock(Box::new(clock));
        engine
    }

    /// Updates a value in every commit: a reader that sees the event also sees the updated value. The handler works on
    /// a copy, which replaces the value once the commit can no longer fail. If the handler fails, the commit is
    /// [`Rejected`](crate::ErrorKind::Rejected) and writes nothing. Events already in the log are handled at once.
    ///
    /// The handler runs while the store is locked, so it must not call the store. Only this projection may write the
    /// value; a write from elsewhere is lost if a commit is running. The cursor is listed among the subscriptions.
    ///
    /// After a pause or reset, the next commit with events waits until the projection has caught up. The projection
    /// gets pages of 1,000 events, and the store is unlocked between pages. The last page, of at most 1,000 events,
    /// comes together with the commit's own events.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    ///
    /// # fn main() -> evercore_memory::Result<()> {
    /// let engine = evercore_memory::MemoryEngine::new();
    /// let count = Arc::new(Mutex::new(0));
    /// engine.inline_projection("count", 1, Arc::clone(&count), |count, events| {
    ///     *count += events.len();
    ///     Ok(())
    /// })?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`InvalidName`](crate::ErrorKind::InvalidName); [`Invalid`](crate::ErrorKind::Invalid) for version 0, or if the projection
    /// already exists; [`Rejected`](crate::ErrorKind::Rejected) with the handler's error if it fails on events already in the
    /// log; [`Closed`](crate::ErrorKind::Closed).
    pub fn inline_projection<S, F>(
        &self,
        name: impl AsRef<str>,
        version: u32,
        value: Arc<Mutex<S>>,
        handle: F,
    ) -> Result<()>
    where
        S: Clone + Send + 'static,
        F: Fn(&mut S, &[Event]) -> Result<(), BoxError> + Send + Sync + 'static,
    {
        let mut state = self.state()?;
        let id = CursorId::of_inline(name, version, state.inline.iter().map(|known| &known.id))?;
        state.add_inline(InlineProjection::new(id, value, handle))
    }

    /// Closes the engine and all its clones. Later calls fail with [`Closed`](crate::ErrorKind::Closed), and the stored events
    /// are gone. Closing again is harmless.
    ///
    /// # Errors
    /// Never fails. It returns a `Result` because the other engines do.
    pub async fn close(&self) -> Result<()> {
        StorageEngine::close(self).await
    }

    /// Locks the state, unless the engine is closed. The lock is held briefly, never across an await. A panic cannot
    /// leave the state half changed, because a commit checks before it writes.
    pub(crate) fn state(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock();
        if state.is_closed {
            return Err(Error::closed());
        }
        Ok(state)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn commit_now(&self, batch: &Batch) -> Result<Receipt> {
        /// Lets other tasks lock the state in between. A mutex alone does not guarantee that.
        const PAUSE: Duration = Duration::from_millis(1);
        let writes_events = batch.events() > 0;
        while writes_events && self.state()?.catch_up_by_a_page() {
            Delay::new(PAUSE).await;
        }
        let receipt = self.state()?.commit(batch)?;
        if writes_events {
            self.shared.bell.notify(usize::MAX);
        }
        Ok(receipt)
    }

    async fn wait_past(&self, after: Position, at_most: Duration) -> Result<Position> {
        let began = Instant::now();
        loop {
            // Listen before looking, so that a commit in between is not missed.
            let rung = self.shared.bell.listen();
            let head = self.state()?.head();
            let left = at_most.saturating_sub(began.elapsed());
            if head > after || left.is_zero() {
                return Ok(head);
            }
            or(rung, Delay::new(left)).await;
        }
    }
}

impl StorageEngine for MemoryEngine {
    fn identity(&self) -> StoreId {
        self.shared.identity
    }

    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>> {
        Box::pin(async move {
            let mut state = self.state()?;
            let block = IdBlock::new(state.reserved + 1, count)?;
            state.reserved += i64::from(count);
            Ok(block)
        })
    }

    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>> {
        Box::pin(async move { self.commit_now(&batch).await })
    }

    fn command<'a>(&'a self, id: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>> {
        Box::pin(async move { Ok(self.state()?.commands.get(id).map(|known| known.what.clone())) })
    }

    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>> {
        Box::pin(async move {
            let mut state = self.state()?;
            let now = state.now();
            Ok(state.settle(command, now))
        })
    }

    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>> {
        Box::pin(async move { Ok(self.state()?.forget_commands(before)) })
    }

    fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<Option<History>>> {
        Box::pin(async move { Ok(self.state()?.load(request)) })
    }

    fn read_aggregate(&self, query: AggregateQuery) -> BoxFuture<'_, Result<Events>> {
        Box::pin(async move { Ok(self.state()?.read_aggregate(query)) })
    }

    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>> {
        Box::pin(async move { self.state()?.read_log(query) })
    }

    fn head(&self) -> BoxFuture<'_, Result<Position>> {
        Box::pin(async move { Ok(self.state()?.head()) })
    }

    fn position_at(&self, time: Timestamp) -> BoxFuture<'_, Result<Position>> {
        Box::pin(async move { Ok(self.state()?.position_at(time)) })
    }

    fn wait(&self, after: Position, at_most: Duration) -> BoxFuture<'_, Result<Position>> {
        Box::pin(self.wait_past(after, at_most))
    }

    fn pause(&self, time: Duration) -> BoxFuture<'_, ()> {
        Box::pin(Delay::new(time))
    }

    fn warmup<'a>(&'a self, types: &'a [KnownType]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let mut state = self.state()?;
            for known in types {
                let events = state.types.entry(known.aggregate_type.clone()).or_default();
                events.extend(known.event_types.iter().cloned());
            }
            Ok(())
        })
    }

    fn types(&self) -> BoxFuture<'_, Result<Vec<KnownType>>> {
        Box::pin(async move { Ok(self.state()?.known_types()) })
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let closed = State { is_closed: true, ..State::default() };
            let before = std::mem::replace(&mut *self.lock(), closed);
            self.shared.bell.notify(usize::MAX);
            drop(before);
            Ok(())
        })
    }
}

impl SubscriptionStorage for MemoryEngine {
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, Result<Option<Cursor>>> {
        Box::pin(async move { self.state()?.step(id, step) })
    }

    fn change<'a>(
        &'a self,
        name: &'a SubscriptionName,
        change: &'a SubscriptionChange,
    ) -> BoxFuture<'a, Result<Changed>> {
        Box::pin(async move { self.state()?.change(name, change) })
    }

    fn cursors<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Cursors>> {
        Box::pin(async move {
            let state = self.state()?;
            let wanted = state.cursors.values().filter(|it| of.is_none_or(|of| it.id.subscription == *of));
            Ok(Cursors { cursors: wanted.cloned().collect(), now: state.now() })
        })
    }

    fn backlogs<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Backlogs>> {
        Box::pin(async move {
            let state = self.state()?;
            let wanted = state.cursors.values().filter(|it| of.is_none_or(|of| it.id.subscription == *of));
            let backlogs = wanted.map(|cursor| state.backlog(cursor)).collect();
            Ok(Backlogs { backlogs, head: state.head(), now: state.now() })
        })
    }

    fn parked<'a>(
        &'a self,
        id: &'a CursorId,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Parked>>> {
        Box::pin(async move {
            let state = self.state()?;
            let parked = state.parked.get(id).into_iter().flat_map(|parked| parked.range(after.next()..));
            Ok(parked.take(limit).map(|(_, event)| event.clone()).collect())
        })
    }
}

impl fmt::Debug for MemoryEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryEngine").field("head", &self.lock().head()).finish_non_exhaustive()
    }
}

//! An engine that passes all calls on, and answers with an error while it is told to.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use evercore_core::engine::{
    Backlogs, Batch, Changed, Cursors, History, IdBlock, KnownCommand, LoadRequest, Step, SubscriptionChange,
    SubscriptionStorage,
};
use evercore_core::{
    AggregateQuery, BoxFuture, CommandId, Cursor, CursorId, Error, ErrorKind, Events, KnownType, LogPage,
    LogQuery, Parked, Position, Receipt, Result, StorageEngine, StoreId, SubscriptionName, Timestamp,
};

use crate::tools::Engine;

#[derive(Debug)]
pub(super) struct Unwell {
    inner: Engine,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The answer to every call for cursors and pages.
    fails_with: Option<ErrorKind>,
    /// How many moves of cursors fail from now on.
    moves_that_fail: usize,
    failed: usize,
}

impl Unwell {
    pub(super) fn new(inner: Engine) -> Self {
        Self { inner, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails with this from now on, or is well again.
    pub(super) fn fail_with(&self, kind: Option<ErrorKind>) {
        let mut state = self.state();
        (state.fails_with, state.failed) = (kind, 0);
    }

    /// Fails this many moves of cursors from now on.
    pub(super) fn fail_moves(&self, moves: usize) {
        self.state().moves_that_fail = moves;
    }

    /// How many calls have failed since the last change.
    pub(super) fn failed(&self) -> usize {
        self.state().failed
    }

    fn check(&self) -> Result<()> {
        let mut state = self.state();
        let Some(kind) = state.fails_with.clone() else { return Ok(()) };
        state.failed += 1;
        Err(Error::new(kind, "the store is unwell"))
    }

    fn check_move(&self, step: &Step) -> Result<()> {
        let mut state = self.state();
        if !matches!(step, Step::Advance(_)) || state.moves_that_fail == 0 {
            return Ok(());
        }
        state.moves_that_fail -= 1;
        Err(Error::new(ErrorKind::Unavailable, "this move failed"))
    }
}

impl SubscriptionStorage for Unwell {
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, Result<Option<Cursor>>> {
        Box::pin(async move {
            self.check()?;
            self.check_move(step)?;
            self.inner.step(id, step).await
        })
    }

    fn cursors<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Cursors>> {
        Box::pin(async move {
            self.check()?;
            self.inner.cursors(of).await
        })
    }

    fn change<'a>(
        &'a self,
        of: &'a SubscriptionName,
        change: &'a SubscriptionChange,
    ) -> BoxFuture<'a, Result<Changed>> {
        Box::pin(async move {
            self.check()?;
            self.inner.change(of, change).await
        })
    }

    fn backlogs<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Backlogs>> {
        Box::pin(async move {
            self.check()?;
            self.inner.backlogs(of).await
        })
    }

    fn parked<'a>(
        &'a self,
        id: &'a CursorId,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Parked>>> {
        Box::pin(async move {
            self.check()?;
            self.inner.parked(id, after, limit).await
        })
    }
}

impl StorageEngine for Unwell {
    fn identity(&self) -> StoreId {
        self.inner.identity()
    }

    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>> {
        self.inner.reserve(count)
    }

    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>> {
        self.inner.commit(batch)
    }

    fn command<'a>(&'a self, id: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>> {
        self.inner.command(id)
    }

    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>> {
        self.inner.settle(command)
    }

    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>> {
        self.inner.forget_commands(before)
    }

    fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<Option<History>>> {
        self.inner.load(request)
    }

    fn read_aggregate(&self, query: AggregateQuery) -> BoxFuture<'_, Result<Events>> {
        self.inner.read_aggregate(query)
    }

    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>> {
        Box::pin(async move {
            self.check()?;
            self.inner.read_log(query).await
        })
    }

    fn head(&self) -> BoxFuture<'_, Result<Position>> {
        Box::pin(async move {
            self.check()?;
            self.inner.head().await
        })
    }

    fn position_at(&self, time: Timestamp) -> BoxFuture<'_, Result<Position>> {
        self.inner.position_at(time)
    }

    fn wait(&self, after: Position, at_most: Duration) -> BoxFuture<'_, Result<Position>> {
        Box::pin(async move {
            self.check()?;
            self.inner.wait(after, at_most).await
        })
    }

    fn pause(&self, time: Duration) -> BoxFuture<'_, ()> {
        self.inner.pause(time)
    }

    fn warmup<'a>(&'a self, types: &'a [KnownType]) -> BoxFuture<'a, Result<()>> {
        self.inner.warmup(types)
    }

    fn types(&self) -> BoxFuture<'_, Result<Vec<KnownType>>> {
        self.inner.types()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        self.inner.close()
    }
}

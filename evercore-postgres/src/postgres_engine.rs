//! The engine: implements the storage traits by calling the parts of the store.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::Pool;
use evercore_core::engine::{
    Backlogs, Batch, Changed, Cursors, History, IdBlock, KnownCommand, LoadRequest, Step, SubscriptionChange,
    SubscriptionStorage,
};
use evercore_core::{
    AggregateQuery, BoxFuture, CommandId, Cursor, CursorId, Error, Events, KnownType, LogPage, LogQuery,
    Parked, Position, Receipt, Result, StorageEngine, StoreId, SubscriptionName, Timestamp,
};

use crate::connection::connect::Address;
use crate::connection::task::in_task;
use crate::settings::Settings;
use crate::store::Store;

/// A store in a schema of a PostgreSQL database. Cheap to clone; all clones share one engine.
///
/// Several engines, in several processes, may use the same store: each commit sees the one before it. Its futures need
/// a tokio runtime.
#[derive(Clone)]
pub struct PostgresEngine(Arc<Store>);

impl PostgresEngine {
    pub(crate) async fn open(settings: Settings, pool: Pool, address: Option<Address>) -> Result<Self> {
        Ok(Self(Arc::new(Store::open(settings, pool, address).await?)))
    }

    /// The id that the store got when it was created. A copy of the store has the same id.
    pub fn store_id(&self) -> &str {
        &self.0.store_id
    }

    /// The schema that holds the store.
    pub fn schema(&self) -> &str {
        self.0.pools.settings.schema.as_str()
    }

    /// The pool of the engine's connections, for your own SQL. Return a connection as you got it: without an open
    /// transaction and with its settings unchanged.
    pub fn pool(&self) -> &Pool {
        &self.0.pools.reads
    }

    /// Closes the engine, for all clones, after the running commits have ended. Later calls, and calls that still wait
    /// for their turn, fail with [`Closed`](crate::ErrorKind::Closed). A pool of the application stays open. Dropping
    /// all clones closes the engine as well.
    ///
    /// # Errors
    /// Never fails at present. It returns a `Result` because the other engines do.
    pub async fn close(&self) -> Result<()> {
        self.0.close().await;
        Ok(())
    }

    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.0
    }

    async fn commit_batch(&self, batch: Batch) -> Result<Receipt> {
        self.0.pools.check_open()?;
        if batch.is_empty() {
            return Ok(Receipt::of(&batch, Position::ZERO, Timestamp::now()));
        }
        self.0.flights.commit(batch).await
    }

    /// Runs in its own task, so that a dropped call leaves nothing half done.
    async fn register(&self, types: Vec<KnownType>) -> Result<()> {
        self.0.pools.check_writable()?;
        let store = Arc::clone(&self.0);
        let register = async move { store.names.register(&store.pools, &types).await };
        let registered = tokio::spawn(register).await;
        Ok(registered.unwrap_or_else(|_| Err(Error::outcome_unknown("the commit").into()))?)
    }

    async fn list_types(&self) -> Result<Vec<KnownType>> {
        let store = &self.0;
        let read = store.pools.read(|checkout| async move { store.names.reload(checkout.sender()?).await });
        Ok(read.await?.list())
    }
}

/// Shows the settings, but no part of the URL and no content of the store.
impl fmt::Debug for PostgresEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresEngine").field("settings", &self.0.pools.settings).finish_non_exhaustive()
    }
}

impl StorageEngine for PostgresEngine {
    fn identity(&self) -> StoreId {
        self.0.identity
    }

    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>> {
        Box::pin(async move {
            self.0.pools.check_writable()?;
            Ok(self.0.ids.reserve(count).await?)
        })
    }

    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>> {
        Box::pin(self.commit_batch(batch))
    }

    fn command<'a>(&'a self, id: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>> {
        Box::pin(async move { Ok(self.0.commands.find(id).await?) })
    }

    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>> {
        Box::pin(async move {
            self.0.pools.check_writable()?;
            Ok(self.0.commands.settle(command).await?)
        })
    }

    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>> {
        Box::pin(async move {
            self.0.pools.check_writable()?;
            Ok(self.0.commands.forget(before).await?)
        })
    }

    fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<Option<History>>> {
        Box::pin(async move { Ok(self.0.loader.load(&request).await?) })
    }

    fn read_aggregate(&self, query: AggregateQuery) -> BoxFuture<'_, Result<Events>> {
        Box::pin(async move { Ok(self.0.loader.read(&query).await?) })
    }

    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>> {
        let (store, query) = (Arc::clone(&self.0), query.clone());
        // In a task: reading a page ahead finishes and returns its connection even if the stream is not polled.
        Box::pin(async move { Ok(in_task(async move { store.log.read(&query).await }).await??) })
    }

    fn head(&self) -> BoxFuture<'_, Result<Position>> {
        Box::pin(async move { Ok(self.0.log.head().await?) })
    }

    fn position_at(&self, time: Timestamp) -> BoxFuture<'_, Result<Position>> {
        Box::pin(async move { Ok(self.0.log.position_at(time).await?) })
    }

    fn wait(&self, after: Position, at_most: Duration) -> BoxFuture<'_, Result<Position>> {
        Box::pin(self.0.watch.wait(after, at_most))
    }

    fn pause(&self, time: Duration) -> BoxFuture<'_, ()> {
        Box::pin(tokio::time::sleep(time))
    }

    fn warmup<'a>(&'a self, types: &'a [KnownType]) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.register(types.to_vec()))
    }

    fn types(&self) -> BoxFuture<'_, Result<Vec<KnownType>>> {
        Box::pin(self.list_types())
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(Self::close(self))
    }
}

/// All calls run in tasks: a caller that is not polled must not hold a connection.
impl SubscriptionStorage for PostgresEngine {
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, Result<Option<Cursor>>> {
        Box::pin(async move {
            self.0.pools.check_writable()?;
            let (store, id, step) = (Arc::clone(&self.0), id.clone(), step.clone());
            Ok(in_task(async move { store.cursors.step(&id, &step).await }).await??)
        })
    }

    fn change<'a>(
        &'a self,
        name: &'a SubscriptionName,
        change: &'a SubscriptionChange,
    ) -> BoxFuture<'a, Result<Changed>> {
        Box::pin(async move {
            self.0.pools.check_writable()?;
            let (store, name, change) = (Arc::clone(&self.0), name.clone(), change.clone());
            Ok(in_task(async move { store.cursors.change(&name, &change).await }).await??)
        })
    }

    fn cursors<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Cursors>> {
        Box::pin(async move {
            let (store, of) = (Arc::clone(&self.0), of.cloned());
            Ok(in_task(async move { store.cursors.list(of.as_ref()).await }).await??)
        })
    }

    fn backlogs<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Backlogs>> {
        Box::pin(async move {
            let (store, of) = (Arc::clone(&self.0), of.cloned());
            Ok(in_task(async move { store.cursors.backlogs(of.as_ref()).await }).await??)
        })
    }

    fn parked<'a>(
        &'a self,
        id: &'a CursorId,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Parked>>> {
        Box::pin(async move {
            let (store, id) = (Arc::clone(&self.0), id.clone());
            Ok(in_task(async move { store.cursors.parked(&id, after, limit).await }).await??)
        })
    }
}

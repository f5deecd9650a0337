//! The engine: implements the storage trait by calling the other modules.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::Pool;
use evercore_core::{
    AggregateQuery, Batch, BoxFuture, CommandId, Events, History, IdBlock, KnownCommand, KnownType,
    LoadRequest, LogPage, LogQuery, Position, Receipt, Result, StorageEngine, StoreId, Timestamp,
};

use crate::builder::{Builder, Settings};
use crate::commit::{batch, flight};
use crate::connection::connect::Address;
use crate::connection::task::in_task;
use crate::names;
use crate::read::{load, log, wait};
use crate::store::Store;

/// A store in a schema of a PostgreSQL database. Cheap to clone; all clones share one engine.
///
/// Several engines, in several processes, may use the same store: each commit sees the one before it. Its futures need
/// a tokio runtime.
#[derive(Clone)]
pub struct PostgresEngine(Arc<Store>);

impl PostgresEngine {
    /// Connects to the store at this URL, and creates it if it is missing. Uses the defaults of
    /// [`PostgresEngine::builder`].
    ///
    /// # Errors
    /// As [`Builder::connect`].
    pub async fn connect(url: &str) -> Result<Self> {
        Self::builder().connect(url).await
    }

    /// Connects for reading only, to any server that answers, a standby as well.
    ///
    /// # Errors
    /// As [`Builder::read_from`].
    pub async fn read_from(url: &str) -> Result<Self> {
        Self::builder().read_from(url).await
    }

    /// Settings for connecting to a store.
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(crate) async fn open(settings: Settings, pool: Pool, address: Option<Address>) -> Result<Self> {
        Ok(Self(Arc::new(Store::open(settings, pool, address).await?)))
    }

    /// The id that the store got when it was created. A copy of the store has the same id.
    pub fn store_id(&self) -> &str {
        self.0.store_id()
    }

    /// The schema that holds the store.
    pub fn schema(&self) -> &str {
        self.0.settings.schema.as_str()
    }

    /// The pool of the engine's connections, for your own SQL. Return a connection as you got it: without an open
    /// transaction and with its settings unchanged.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// Closes the engine, for all clones, after the running commits have ended. Later calls, and calls that still wait
    /// for their turn, fail with [`Closed`](crate::ErrorKind::Closed). A pool of the application stays open. Dropping
    /// all clones closes the engine as well.
    ///
    /// # Errors
    /// Never fails at present. It returns a `Result` because the other engines do.
    pub async fn close(&self) -> Result<()> {
        self.0.close();
        self.0.queue.idle().await;
        self.0.close_pool();
        Ok(())
    }

    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.0
    }

    async fn commit_batch(&self, batch: Batch) -> Result<Receipt> {
        self.0.check_open()?;
        if batch.is_empty() {
            return Ok(Receipt::of(&batch, Position::ZERO, Timestamp::now()));
        }
        flight::commit(&self.0, batch).await
    }

    /// Runs in its own task, so that a dropped call leaves nothing half done.
    async fn register(&self, types: Vec<KnownType>) -> Result<()> {
        self.0.check_writable()?;
        let store = Arc::clone(&self.0);
        let registered = tokio::spawn(async move { names::register(&store, &types).await.map(drop) }).await;
        Ok(registered.unwrap_or_else(|_| Err(crate::error::outcome_unknown().into()))?)
    }

    async fn list_types(&self) -> Result<Vec<KnownType>> {
        let table = self.0.read(|lent| async move { self.0.names.reload(lent.sender()?).await }).await;
        Ok(table?.list())
    }
}

/// Shows the settings, but no part of the URL and no content of the store.
impl fmt::Debug for PostgresEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresEngine").field("settings", &self.0.settings).finish_non_exhaustive()
    }
}

impl StorageEngine for PostgresEngine {
    fn identity(&self) -> StoreId {
        self.0.identity()
    }

    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>> {
        Box::pin(async move {
            self.0.check_writable()?;
            Ok(batch::reserve(&self.0, count).await?)
        })
    }

    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>> {
        Box::pin(self.commit_batch(batch))
    }

    fn command<'a>(&'a self, id: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>> {
        Box::pin(async move { Ok(batch::command(&self.0, id).await?) })
    }

    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>> {
        Box::pin(async move {
            self.0.check_writable()?;
            Ok(batch::settle(&self.0, command).await?)
        })
    }

    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>> {
        Box::pin(async move {
            self.0.check_writable()?;
            Ok(batch::forget_commands(&self.0, before).await?)
        })
    }

    fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<Option<History>>> {
        Box::pin(async move { Ok(load::load(&self.0, &request).await?) })
    }

    fn read_aggregate(&self, query: AggregateQuery) -> BoxFuture<'_, Result<Events>> {
        Box::pin(async move { Ok(load::read(&self.0, &query).await?) })
    }

    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>> {
        let (store, query) = (Arc::clone(&self.0), query.clone());
        // In a task: reading a page ahead finishes and returns its connection even if the stream is not polled.
        Box::pin(async move { Ok(in_task(async move { log::read(&store, &query).await }).await??) })
    }

    fn head(&self) -> BoxFuture<'_, Result<Position>> {
        Box::pin(async move { Ok(log::head(&self.0).await?) })
    }

    fn position_at(&self, time: Timestamp) -> BoxFuture<'_, Result<Position>> {
        Box::pin(async move { Ok(log::position_at(&self.0, time).await?) })
    }

    fn wait(&self, after: Position, at_most: Duration) -> BoxFuture<'_, Result<Position>> {
        Box::pin(wait::wait(&self.0, after, at_most))
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

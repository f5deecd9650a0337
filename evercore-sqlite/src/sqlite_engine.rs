//! The engine: its public calls, and the traits of core.

use std::any::Any;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use evercore_core::engine::{
    Backlogs, Batch, Changed, Cursors, History, IdBlock, KnownCommand, LoadRequest, Step, SubscriptionChange,
    SubscriptionStorage,
};
use evercore_core::{
    AggregateQuery, BoxError, BoxFuture, CommandId, Cursor, CursorId, Error, ErrorKind, Events, KnownType,
    LogPage, LogQuery, Parked, Position, Receipt, Result, StorageEngine, StoreId, SubscriptionName,
    Timestamp, UnitOfWork,
};
use rusqlite::Connection;

use crate::backup;
use crate::commit::commands;
use crate::commit::flight::OwnSql;
use crate::commit::queue::Queue;
use crate::connection::path;
use crate::connection::reads::Reads;
use crate::error::SqliteError;
use crate::names::Registrar;
use crate::read::{load, log, wait};
use crate::store::Store;
use crate::subscription::inline::InlineProjection;
use crate::subscription::subscriptions;

const RESERVE: &str = "
    UPDATE store SET next_aggregate_id = next_aggregate_id + ?1 RETURNING next_aggregate_id - ?1";

/// A store in a SQLite file. Cheap to clone; all clones are one engine.
///
/// Several engines, also in several processes, may have the same file open. Each commit sees the one before it.
#[derive(Clone)]
pub struct SqliteEngine {
    store: Arc<Store>,
    queue: Arc<Queue>,
    reads: Arc<Reads>,
}

impl SqliteEngine {
    pub(crate) fn new(store: Store, inline: Vec<InlineProjection>) -> Self {
        let at_once = if store.path.is_some() { store.settings.read_connections } else { 1 };
        let reads = Arc::new(Reads::new(at_once, store.settings.busy_timeout));
        let store = Arc::new(store);
        Self { queue: Arc::new(Queue::new(Arc::clone(&store), inline)), store, reads }
    }

    /// Replaces the store at `path` by a backup. If there was a store, it is kept, and its new path is returned: `path`
    /// with `.replaced-1`, and so on. Do not copy the backup by hand instead: that leaves the write-ahead log of the
    /// old store beside a file that it does not belong to.
    ///
    /// The backup is verified and copied first, and one rename puts the copy in place. The backup may be any store file
    /// that nobody writes meanwhile. No process may have the store at `path` open, because its engine would continue
    /// with its knowledge of the old store.
    ///
    /// ```
    /// # use evercore_sqlite::{Result, SqliteEngine, StorageEngine};
    /// # fn main() -> Result<()> { futures_lite::future::block_on(async {
    /// # let folder = tempfile::tempdir().map_err(|_| evercore_sqlite::Error::invalid("no folder"))?;
    /// # let (path, backup) = (folder.path().join("store.db"), folder.path().join("backup.db"));
    /// let engine = SqliteEngine::open(&path).await?;
    /// engine.backup_to(&backup).await?;
    /// engine.close().await?;
    /// let old = SqliteEngine::restore_from(&backup, &path).await?;
    /// assert!(old.is_some());
    /// SqliteEngine::open(&path).await?.head().await?;
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// [`NotAStore`](ErrorKind::NotAStore) if the backup is damaged or not a store, or if `path` is a folder;
    /// [`Unavailable`](ErrorKind::Unavailable) if another application or process uses the file at `path`, be it a store or not;
    /// [`Invalid`](ErrorKind::Invalid) if both paths lead to the same file, also through links, and for paths that
    /// [`open`](Self::open) refuses; [`Full`](ErrorKind::Full) if the disk is full; [`Backend`](ErrorKind::Backend) if
    /// the folder does not exist. After an error the old store is unchanged.
    pub async fn restore_from(backup: impl AsRef<Path>, path: impl AsRef<Path>) -> Result<Option<PathBuf>> {
        let (backup, path) = (path::checked(backup.as_ref())?, path::checked(path.as_ref())?);
        Ok(blocking::unblock(move || backup::restore(&backup, &path)).await?)
    }

    /// The absolute path of the file; `None` for a store in memory.
    pub fn path(&self) -> Option<&Path> {
        self.store.path.as_deref()
    }

    /// The id that this store got when it was created. A copy has the same id.
    pub fn store_id(&self) -> &str {
        &self.store.store_id
    }

    /// The size of the write-ahead log in bytes. It grows while a long read transaction is open.
    pub fn wal_bytes(&self) -> u64 {
        self.store.wal_bytes()
    }

    /// Writes the write-ahead log back into the file and empties it. The engine does so by itself when the log is
    /// large. Call this when you choose the moment, for example before you move the file.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if the log is still being read when the busy time-out ends.
    pub async fn checkpoint(&self) -> Result<()> {
        self.write(|store| {
            if store.truncate_wal(&mut store.lock()?)? {
                return Ok(());
            }
            Err(Error::new(ErrorKind::Unavailable, "the write-ahead log is still being read, try again"))
        })
        .await
    }

    /// Writes a consistent copy of the store while the store is in use. The copy is flushed and verified before it gets
    /// its name, and has the permissions of the store. Copying the file by hand does not give a usable backup.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if `target` already exists, and for paths that [`open`](Self::open) refuses;
    /// [`Full`](ErrorKind::Full) if the disk is full; [`Backend`](ErrorKind::Backend) if the folder does not exist.
    /// After an error nothing is left at `target`.
    pub async fn backup_to(&self, target: impl AsRef<Path>) -> Result<()> {
        let target = path::checked_new(target.as_ref())?;
        self.unblock(move |store| {
            store.read_separately(|connection| backup::back_up(connection, store.path.as_deref(), &target))
        })
        .await
    }

    /// Closes the store for all clones. New calls fail with [`Closed`](ErrorKind::Closed). Running reads, commits and
    /// backups complete, the write-ahead log is written back, and all connections are closed. Then the one file
    /// contains everything, unless another engine has it open.
    ///
    /// Dropping all clones closes the store too, but reports no error.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if another connection was using the store for the whole busy time-out:
    /// the engine is closed, but the newest commits are still in the write-ahead log beside the file, so keep both
    /// together; [`Backend`](ErrorKind::Backend) if the disk failed.
    pub async fn close(&self) -> Result<()> {
        let queue = Arc::clone(&self.queue);
        // Both or neither: a dropped future may not leave an open store with a queue that has ended.
        self.unblock(move |store| {
            queue.end();
            store.close()
        })
        .await
    }

    /// Commits a unit of work together with your own SQL in one transaction, for example a row of a read model or a
    /// message in an outbox. Either all of it is written, or nothing.
    ///
    /// The SQL runs first, and then the unit is checked and written. Like every commit it queues for the one writer,
    /// but it is not combined with others: it has its own transaction and its own flush. It runs on a thread that may
    /// block; with [`commit_on_caller_thread`](crate::Builder::commit_on_caller_thread) that is the caller's. With a
    /// [command](UnitOfWork::set_command) it takes effect once: if the command took effect before, the SQL does not
    /// run. The unit may be empty; that is how you create a table.
    ///
    /// ```
    /// # use evercore_sqlite::{Aggregate, EventStore, Json, Result, SqliteEngine};
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Clone, Default, Serialize, Deserialize)] struct Order { placed: bool }
    /// # #[derive(Serialize, Deserialize)] enum OrderEvent { Placed }
    /// # impl Aggregate for Order {
    /// #     const TYPE: &'static str = "order"; type Event = OrderEvent; type Codec = Json;
    /// #     fn apply(&mut self, _: OrderEvent) { self.placed = true }
    /// # }
    /// # fn main() -> Result<()> { futures_lite::future::block_on(async {
    /// let engine = SqliteEngine::open_in_memory().await?;
    /// let store = EventStore::new(engine.clone());
    /// let table = "CREATE TABLE IF NOT EXISTS shop_outbox (id INTEGER PRIMARY KEY, message TEXT NOT NULL) STRICT";
    /// engine.commit_with(store.begin(), move |sql| Ok(sql.execute_batch(table)?)).await?;
    ///
    /// let mut work = store.begin();
    /// let mut order = work.create_with_key::<Order>("order 7").await?;
    /// work.record(&mut order, OrderEvent::Placed)?;
    /// let message = format!("confirm order {}", order.id());
    /// engine
    ///     .commit_with(work, move |sql| {
    ///         sql.prepare_cached("INSERT INTO shop_outbox (message) VALUES (?1)")?.execute([message])?;
    ///         Ok(())
    ///     })
    ///     .await?;
    /// # Ok(()) }) }
    /// ```
    ///
    /// While it runs, nobody else can write. A statement that takes longer than
    /// [`sql_timeout`](crate::Builder::sql_timeout) is interrupted. Code between two statements cannot be interrupted:
    /// if it takes too long, nothing is written. So do nothing but SQL, and never wait for this store, which waits for
    /// the SQL.
    ///
    /// The connection belongs to the engine: do not change its settings and hooks. It enforces foreign keys. You may
    /// read evercore's tables, but must not write them. Give your own tables names with a prefix. COMMIT and ROLLBACK
    /// are refused, and savepoints are allowed. If the SQL panics, nothing is written, and the panic continues in the
    /// caller.
    ///
    /// # Errors
    /// [`Rejected`](ErrorKind::Rejected) with the SQL's own error as its source, or if it took too long;
    /// [`Invalid`](ErrorKind::Invalid) if the unit belongs to another engine, or if the SQL ended the
    /// transaction; otherwise as [`UnitOfWork::commit`].
    pub async fn commit_with<F>(&self, work: UnitOfWork, sql: F) -> Result<Receipt, Error>
    where
        F: FnOnce(&Connection) -> Result<(), BoxError> + Send + 'static,
    {
        let engine: &dyn Any = work.engine();
        if !engine.downcast_ref::<Self>().is_some_and(|other| Arc::ptr_eq(&self.store, &other.store)) {
            return Err(Error::invalid("the unit of work belongs to another engine"));
        }
        work.commit_by(|batch| self.commit_batch(batch, Some(Box::new(sql)))).await
    }

    /// The head. Reads the file only if the head that this engine knows is not past `after`.
    async fn head_past(&self, after: Position) -> Result<Position> {
        let known = self.store.known_head();
        if known > after {
            return self.store.check_open().map(|()| known);
        }
        self.read(Store::head).await
    }

    /// Reads on a thread that may block.
    fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> BoxFuture<'static, Result<T>> {
        let (store, reads) = (Arc::clone(&self.store), Arc::clone(&self.reads));
        Box::pin(async move {
            if store.settings.commit_on_caller_thread {
                return work(&store);
            }
            reads.run(move || work(&store)).await
        })
    }

    /// How long the user's SQL may take.
    pub(crate) fn sql_timeout(&self) -> Duration {
        self.store.settings.sql_timeout
    }

    /// Writes on the engine's own thread.
    pub(crate) fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> BoxFuture<'static, Result<T>> {
        let (store, queue) = (Arc::clone(&self.store), Arc::clone(&self.queue));
        Box::pin(async move {
            store.check_open()?;
            if store.settings.read_only {
                return Err(Error::read_only());
            }
            if store.settings.commit_on_caller_thread {
                return work(&store);
            }
            queue.write(work).await
        })
    }

    /// Runs rare and long work on a thread that may block.
    async fn unblock<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = Arc::clone(&self.store);
        if store.settings.commit_on_caller_thread {
            return work(&store);
        }
        blocking::unblock(move || work(&store)).await
    }

    /// Commits a batch, and with it the user's own SQL if there is some.
    async fn commit_batch(&self, batch: Batch, sql: Option<OwnSql>) -> Result<Receipt> {
        self.store.check_open()?;
        if batch.is_empty() && sql.is_none() {
            return Ok(Receipt::of(&batch, Position::ZERO, Timestamp::now()));
        }
        if self.store.settings.read_only {
            return Err(Error::read_only());
        }
        if self.store.settings.commit_on_caller_thread {
            return self.queue.commit_here(batch, sql).map_err(Error::resume_panic);
        }
        // The commit completes even if the caller goes away. Then only the answer is lost.
        let answer = self.queue.commit(batch, sql)?;
        let outcome = answer.await.unwrap_or_else(|_| Err(Error::outcome_unknown("the commit")));
        outcome.map_err(Error::resume_panic)
    }
}

/// Shows the path and the settings, and nothing of the contents.
impl fmt::Debug for SqliteEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteEngine")
            .field("path", &self.store.path)
            .field("settings", &self.store.settings)
            .finish_non_exhaustive()
    }
}

impl StorageEngine for SqliteEngine {
    fn identity(&self) -> StoreId {
        self.store.identity
    }

    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>> {
        self.write(move |store| {
            let first = store.write(|connection| {
                Ok(connection.prepare_cached(RESERVE)?.query_row([count], |row| row.get(0))?)
            })?;
            IdBlock::new(first, count)
        })
    }

    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>> {
        Box::pin(self.commit_batch(batch, None))
    }

    fn command<'a>(&'a self, id: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>> {
        let id = id.clone();
        self.read(move |store| store.read(|connection| commands::find(connection, &id)))
    }

    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>> {
        let command = command.clone();
        self.write(move |store| store.write(|connection| commands::settle(connection, &command)))
    }

    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>> {
        Box::pin(async move {
            let (mut forgotten, mut after) = (0, String::new());
            loop {
                // Each piece queues like a commit, so that commits can run in between.
                let from = std::mem::take(&mut after);
                let piece = self.write(move |store| {
                    store.write(|connection| commands::forget(connection, &from, before))
                });
                let Some(piece) = piece.await? else { return Ok(forgotten) };
                forgotten += piece.forgotten;
                after = piece.end;
            }
        })
    }

    fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<Option<History>>> {
        self.read(move |store| store.read(|connection| load::load(connection, &store.names, &request)))
    }

    fn read_aggregate(&self, query: AggregateQuery) -> BoxFuture<'_, Result<Events>> {
        self.read(move |store| store.read(|connection| load::read(connection, &store.names, &query)))
    }

    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>> {
        let query = query.clone();
        self.read(move |store| store.read(|connection| log::read(connection, &store.names, &query)))
    }

    fn head(&self) -> BoxFuture<'_, Result<Position>> {
        self.read(Store::head)
    }

    fn position_at(&self, time: Timestamp) -> BoxFuture<'_, Result<Position>> {
        self.read(move |store| store.read(|connection| log::position_at(connection, time)))
    }

    fn wait(&self, after: Position, at_most: Duration) -> BoxFuture<'_, Result<Position>> {
        Box::pin(wait::wait(
            &self.store,
            after,
            at_most,
            move || self.head_past(after),
            || self.queue.watch(),
        ))
    }

    fn pause(&self, time: Duration) -> BoxFuture<'_, ()> {
        Box::pin(futures_timer::Delay::new(time))
    }

    fn warmup<'a>(&'a self, types: &'a [KnownType]) -> BoxFuture<'a, Result<()>> {
        let types = types.to_vec();
        self.write(move |store| {
            let fresh = store.write(|connection| {
                let mut names = Registrar::new(connection, &store.names);
                names.all(&types)?;
                Ok::<_, SqliteError>(names.into_fresh())
            })?;
            store.names.learn(fresh);
            Ok(())
        })
    }

    fn types(&self) -> BoxFuture<'_, Result<Vec<KnownType>>> {
        self.read(|store| store.read(|connection| store.names.list(connection)))
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(Self::close(self))
    }
}

impl SubscriptionStorage for SqliteEngine {
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, Result<Option<Cursor>>> {
        Box::pin(async move {
            // A claim that will be refused is refused here, so that it does not occupy the writer.
            if step.is_claim() && !self.store.settings.read_only {
                let (id, step) = (id.clone(), step.clone());
                let try_step = move |connection: &Connection| {
                    subscriptions::outcome(connection, &id, &step, subscriptions::cursor(connection, &id)?)
                        .map(drop)
                };
                self.read(move |store| store.read(try_step)).await?;
            }
            let (id, step) = (id.clone(), step.clone());
            self.write(move |store| store.write(|connection| subscriptions::take(connection, &id, &step)))
                .await
        })
    }

    fn change<'a>(
        &'a self,
        name: &'a SubscriptionName,
        change: &'a SubscriptionChange,
    ) -> BoxFuture<'a, Result<Changed>> {
        let (name, change) = (name.clone(), change.clone());
        Box::pin(
            self.write(move |store| {
                store.write(|connection| subscriptions::change(connection, &name, &change))
            }),
        )
    }

    fn cursors<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Cursors>> {
        let of = of.cloned();
        self.read(move |store| {
            store.read(|connection| {
                Ok(Cursors {
                    cursors: subscriptions::cursors(connection, of.as_ref())?,
                    now: Timestamp::now(),
                })
            })
        })
    }

    fn backlogs<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Backlogs>> {
        let of = of.cloned();
        self.read(move |store| store.read(|connection| subscriptions::backlogs(connection, of.as_ref())))
    }

    fn parked<'a>(
        &'a self,
        id: &'a CursorId,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Parked>>> {
        let id = id.clone();
        self.read(move |store| store.read(|connection| subscriptions::parked(connection, &id, after, limit)))
    }
}

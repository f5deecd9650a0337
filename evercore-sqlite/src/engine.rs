//! The engine: each promise of the trait, handed to the room that keeps it.

use std::any::Any;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use evercore_core::{
    AggregateQuery, Batch, BoxError, BoxFuture, CommandId, Cursor, CursorId, Cursors, Error, ErrorKind,
    Events, History, IdBlock, KnownCommand, KnownType, LoadRequest, LogPage, LogQuery, Parked, Position,
    Receipt, Result, Step, StorageEngine, StoreId, SubscriptionName, SubscriptionStorage, Timestamp,
    UnitOfWork,
};
use rusqlite::Connection;

use crate::backup;
use crate::commit::batch;
use crate::commit::own_sql::OwnSql;
use crate::commit::queue::Queue;
use crate::connection::path;
use crate::connection::reads::Reads;
use crate::error::{self, SqliteError, outcome_unknown, read_only};
use crate::names::Registrar;
use crate::read::{load, log, wait};
use crate::store::Store;
use crate::subscription::inline::InlineProjection;
use crate::subscription::subscriptions;

const RESERVE: &str = "
    UPDATE store SET next_aggregate_id = next_aggregate_id + ?1 RETURNING next_aggregate_id - ?1";

/// A store in a SQLite file; cheap to clone, all clones are one engine.
///
/// Several engines, also in several processes, may have the same file open: each commit sees the last.
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

    /// Puts a backup in the place of the store at `path`, and gives the place where the old store is now, if there was
    /// one: `path` with `.replaced-1`, and so on. To be used instead of copying the backup by hand, which leaves the
    /// write-ahead log of the old store beside a file that it does not belong to.
    ///
    /// The backup is verified and copied first; then the copy takes the place, by one rename. It may be any file of a
    /// store that nobody writes to meanwhile. No process may have the store at `path` open: what an engine knows of the
    /// store would be of the old one.
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
    /// [`NotAStore`](ErrorKind::NotAStore) if the backup is none, or damaged, or if `path` is a folder;
    /// [`Unavailable`](ErrorKind::Unavailable) if another application or process uses the file at `path`, be it a store or
    /// not; [`Invalid`](ErrorKind::Invalid) if both are one file, also by links, and for what [`open`](Self::open) takes for
    /// no path of a file; [`Full`](ErrorKind::Full) if the disk is; [`Backend`](ErrorKind::Backend) if the folder does not
    /// exist. Then the old store is as it was.
    pub async fn restore_from(backup: impl AsRef<Path>, path: impl AsRef<Path>) -> Result<Option<PathBuf>> {
        let (backup, path) = (path::checked(backup.as_ref())?, path::checked(path.as_ref())?);
        Ok(blocking::unblock(move || backup::restore(&backup, &path)).await?)
    }

    /// The file, with its whole path; `None` for a store in memory.
    pub fn path(&self) -> Option<&Path> {
        self.store.path.as_deref()
    }

    /// The id that this store got when it was made; a copy has the same.
    pub fn store_id(&self) -> &str {
        &self.store.store_id
    }

    /// How large the write-ahead log is. It grows while somebody reads one long transaction.
    pub fn wal_bytes(&self) -> u64 {
        self.store.wal_bytes()
    }

    /// Writes the write-ahead log back into the file and cuts it to nothing. The engine does so by itself when there
    /// is much of it; this is for a moment of your choice, as before the file is moved.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if somebody still reads from it when the busy time-out ends.
    pub async fn checkpoint(&self) -> Result<()> {
        self.write(|store| {
            if store.truncate_wal(&mut store.lock()?)? {
                return Ok(());
            }
            Err(Error::new(ErrorKind::Unavailable, "somebody still reads from the write-ahead log"))
        })
        .await
    }

    /// Writes a copy of the store, as of one moment, while the store is in use. The copy is flushed and verified
    /// before it gets its name, and has the store's permissions. To copy the file by hand is no backup.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if there is something at `target` already, and for what [`open`](Self::open)
    /// takes for no path of a file; [`Full`](ErrorKind::Full) if the disk is; [`Backend`](ErrorKind::Backend) if the folder
    /// does not exist. Then nothing is left at `target`.
    pub async fn backup_to(&self, target: impl AsRef<Path>) -> Result<()> {
        let target = path::checked_new(target.as_ref())?;
        self.unblock(move |store| {
            store.read_apart(|connection| backup::back_up(connection, store.path.as_deref(), &target))
        })
        .await
    }

    /// Closes the store, for all clones: what is called from now on is [`Closed`](ErrorKind::Closed), reads, commits and
    /// backups under way come to their end, the write-ahead log is written back, and all connections are closed. Then the
    /// one file holds everything, unless others have it open.
    ///
    /// To drop all clones closes it as well, but nobody is told how that went.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if another connection was in the way for the whole busy time-out: the
    /// engine is closed, but newest commits stay in the write-ahead log beside the file, which belongs to it;
    /// [`Backend`](ErrorKind::Backend) if the disk failed.
    pub async fn close(&self) -> Result<()> {
        self.queue.end();
        self.unblock(Store::close).await
    }

    /// Commits a unit of work together with SQL of your own, in one transaction: a row of a read model, a message in
    /// an outbox. All of it is written, or nothing of it.
    ///
    /// The SQL runs first, then the unit's checks and writes. It queues for the one writer as every commit does, on a
    /// thread that may block, and has a transaction and a flush of its own. With a
    /// [command](UnitOfWork::set_command) it takes effect once: for a command that took effect before, it is
    /// not run. A unit that holds nothing is fine; that is how a table is made.
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
    /// While it runs, nobody else writes. A statement that runs past [`sql_timeout`](crate::Builder::sql_timeout) is
    /// interrupted. Code that blocks or computes between two statements cannot be: the clock is looked at again when
    /// it returns, and then nothing is written. So it should do nothing but SQL, and must not wait for this store,
    /// which waits for it.
    ///
    /// The connection is the engine's: leave its settings and hooks as they are. It enforces foreign keys. The tables
    /// of evercore may be read, never written; give yours names of their own, with a prefix. COMMIT and ROLLBACK are
    /// refused, savepoints are fine. A panic writes nothing and goes on in the caller.
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
        let sql = OwnSql::new(sql);
        work.commit_by(|batch| self.commit_batch(batch, Some(sql))).await
    }

    /// Where the log ends, if that is past `after`; the file is looked at only if nobody here knows so yet.
    async fn head_now(&self, after: Position) -> Result<Position> {
        let seen = self.store.seen();
        if seen > after {
            return self.store.check_open().map(|()| seen);
        }
        self.read(Store::head).await
    }

    /// Reads where blocking is allowed.
    pub(crate) fn read<T: Send + 'static>(
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

    /// Writes on the engine's own thread.
    pub(crate) fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> BoxFuture<'static, Result<T>> {
        let (store, queue) = (Arc::clone(&self.store), Arc::clone(&self.queue));
        Box::pin(async move {
            store.check_open()?;
            if store.settings.read_only {
                return Err(read_only());
            }
            if store.settings.commit_on_caller_thread {
                return work(&store);
            }
            queue.write(work).await
        })
    }

    /// Does what is rare and long on a thread that may block.
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
    pub(crate) async fn commit_batch(&self, batch: Batch, sql: Option<OwnSql>) -> Result<Receipt> {
        self.store.check_open()?;
        if batch.is_empty() && sql.is_none() {
            return Ok(Receipt::of(&batch, Position::ZERO, Timestamp::now()));
        }
        if self.store.settings.read_only {
            return Err(read_only());
        }
        if self.store.settings.commit_on_caller_thread {
            return error::go_on(self.queue.commit_here(batch, sql));
        }
        // Carried through also if the caller goes away: then only the answer is lost.
        let answer = self.queue.commit(batch, sql)?;
        error::go_on(answer.await.unwrap_or_else(|_| Err(outcome_unknown())))
    }
}

/// Shows where the store is and how it was opened, nothing that is in it.
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
        self.read(move |store| store.read(|connection| batch::command(connection, &id)))
    }

    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>> {
        let command = command.clone();
        self.write(move |store| store.write(|connection| batch::settle(connection, &command)))
    }

    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>> {
        Box::pin(async move {
            let (mut forgotten, mut after) = (0, String::new());
            loop {
                // Each piece takes its turn among the commits.
                let from = std::mem::take(&mut after);
                let piece = self.write(move |store| {
                    store.write(|connection| batch::forget_commands(connection, &from, before))
                });
                let (count, end) = piece.await?;
                forgotten += count;
                let Some(end) = end else { return Ok(forgotten) };
                after = end;
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
        Box::pin(wait::wait(&self.store, after, at_most, move || self.head_now(after), || self.queue.watch()))
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
            // A claim in vain shall neither wait for the writer nor keep it from others.
            if step.is_claim() && !self.store.settings.read_only {
                let (id, step) = (id.clone(), step.clone());
                let look = move |connection: &Connection| {
                    subscriptions::outcome(connection, &id, &step, subscriptions::cursor(connection, &id)?)
                        .map(drop)
                };
                self.read(move |store| store.read(look)).await?;
            }
            let (id, step) = (id.clone(), step.clone());
            self.write(move |store| store.write(|connection| subscriptions::take(connection, &id, &step)))
                .await
        })
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

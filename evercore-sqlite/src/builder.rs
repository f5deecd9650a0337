//! How a store is opened.

use std::path::{Path, PathBuf};
use std::time::Duration;

use evercore_core::{BoxError, Error, Event, Result};
use rusqlite::Connection;

use crate::connection::path;
use crate::settings::{Durability, Settings};
use crate::sqlite_engine::SqliteEngine;
use crate::store::Store;
use crate::subscription::inline::{self, InlineProjection};

/// The settings of an engine. Each has a default.
///
/// ```
/// # use evercore_sqlite::{Durability, Result, SqliteEngine, StorageEngine};
/// # fn main() -> Result<()> { futures_lite::future::block_on(async {
/// # let folder = tempfile::tempdir().map_err(|_| evercore_sqlite::Error::invalid("no folder"))?;
/// # let path = folder.path().join("store.db");
/// let engine = SqliteEngine::builder().durability(Durability::ProcessCrash).read_connections(2).open(path).await?;
/// assert_eq!(engine.head().await?.get(), 0);
/// # Ok(()) }) }
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Builder {
    settings: Settings,
    inline: Vec<InlineProjection>,
}

impl SqliteEngine {
    /// Opens the store in this file, or creates it, with default settings.
    ///
    /// # Errors
    /// As [`Builder::open`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::builder().open(path).await
    }

    /// Opens a new store in memory. It is gone when the engine is dropped.
    ///
    /// # Errors
    /// As [`Builder::open_in_memory`].
    pub async fn open_in_memory() -> Result<Self> {
        Self::builder().open_in_memory().await
    }

    /// Starts with default settings.
    pub fn builder() -> Builder {
        Builder { settings: Settings::default(), inline: Vec::new() }
    }
}

impl Builder {
    /// Which failures an acknowledged commit survives. The default is [`Durability::PowerLoss`].
    pub fn durability(mut self, durability: Durability) -> Self {
        self.settings.durability = durability;
        self
    }

    /// How many connections can read at the same time, at least 1. The default is 4. Each is opened when it is first
    /// needed, and takes two file descriptors. The store itself takes three.
    pub fn read_connections(mut self, count: u32) -> Self {
        self.settings.read_connections = count.max(1);
        self
    }

    /// How long a call waits for a lock of another process or for a free read connection, before it fails with
    /// [`Unavailable`](crate::ErrorKind::Unavailable). The default is 5 seconds, the least is 1 millisecond, and the
    /// most is 24 days, because of SQLite.
    pub fn busy_timeout(mut self, timeout: Duration) -> Self {
        self.settings.busy_timeout = countable(timeout);
        self
    }

    /// How long opening waits for a lock of another process, which may be creating the same store. The default is 10
    /// seconds, the least is 1 millisecond, and the most is 24 days. Afterwards the
    /// [`busy_timeout`](Self::busy_timeout) applies.
    pub fn open_timeout(mut self, timeout: Duration) -> Self {
        self.settings.open_timeout = countable(timeout);
        self
    }

    /// How long your own SQL may take in [`commit_with`](SqliteEngine::commit_with) and in a
    /// [projection](SqliteEngine::projection). Nobody else can write meanwhile. The default is 5 seconds, and the least
    /// is 1 millisecond.
    pub fn sql_timeout(mut self, timeout: Duration) -> Self {
        self.settings.sql_timeout = timeout.max(Duration::from_millis(1));
        self
    }

    /// Whether to create the store if there is none. The default is `true`. With `false`, a missing or empty file is
    /// [`NotAStore`](crate::ErrorKind::NotAStore).
    pub fn create(mut self, create: bool) -> Self {
        self.settings.create = create;
        self
    }

    /// Opens an existing store for reading only. Calls that write fail with [`ReadOnly`](crate::ErrorKind::ReadOnly).
    /// SQLite still needs its files `-wal` and `-shm` beside the store, or the right to create them; see
    /// [`immutable`](Self::immutable).
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.settings.read_only = read_only;
        self
    }

    /// Opens a store that nobody writes while it is open, such as an archive or a file on a read-only mount. It is
    /// [`read_only`](Self::read_only), takes no lock and needs no other file. If somebody does write to the file, reads
    /// may return wrong data.
    ///
    /// It does not see commits in a write-ahead log. If there are any, opening fails with
    /// [`NotAStore`](crate::ErrorKind::NotAStore): [close](SqliteEngine::close) the store first, or use a
    /// [backup](SqliteEngine::backup_to).
    pub fn immutable(mut self, immutable: bool) -> Self {
        self.settings.immutable = immutable;
        self.settings.read_only |= immutable;
        self
    }

    /// Runs commits and reads on the thread that polls them, and not on a thread that may block.
    ///
    /// A single writer is then nearly as fast as SQLite itself, but the executor's thread waits for the disk. That
    /// suits a command-line tool or a dedicated thread, not a server.
    pub fn commit_on_caller_thread(mut self, on_caller_thread: bool) -> Self {
        self.settings.commit_on_caller_thread = on_caller_thread;
        self
    }

    /// Updates your own tables in the transaction of each commit: the events and the rows become visible together. The
    /// handler gets the new events, in the order of the log.
    ///
    /// ```
    /// # use evercore_sqlite::{Result, SqliteEngine};
    /// # fn main() -> Result<()> { futures_lite::future::block_on(async {
    /// let table = "CREATE TABLE IF NOT EXISTS shop_totals (aggregate INTEGER PRIMARY KEY, events INTEGER NOT NULL) STRICT";
    /// let builder = SqliteEngine::builder().inline_projection("totals", 1, move |sql, events| {
    ///     sql.execute_batch(table)?;
    ///     let mut count = sql.prepare_cached(
    ///         "INSERT INTO shop_totals VALUES (?1, 1) ON CONFLICT DO UPDATE SET events = events + 1",
    ///     )?;
    ///     for event in events {
    ///         count.execute([event.aggregate().get()])?;
    ///     }
    ///     Ok(())
    /// });
    /// let engine = builder.open_in_memory().await?;
    /// # let _ = engine;
    /// # Ok(()) }) }
    /// ```
    ///
    /// A cursor in the store, under this name and version, records its progress. It is partition 0 of 1, and is listed
    /// with those of subscriptions, but must not be run as one. A new name or version starts at the first event:
    /// opening hands it all events, 1,000 per transaction. Events that other processes commit without the projection
    /// are handled by the next commit here: 1,000 per transaction, with pauses in which others can write, until at most
    /// 1,000 are left for the commit's own transaction. While the cursor is paused, retired or removed, the handler is
    /// not called.
    ///
    /// To fill the tables again: pause the cursor, reset it, empty the tables, and resume it. No event that is
    /// committed meanwhile is missed or handled twice. The next commit with events waits until the tables are filled.
    /// For a long log, use a new version with new tables instead, which opening fills. The cursor of an old version
    /// stays until you [remove](evercore_core::EventStore::remove_version) it.
    ///
    /// Every commit waits for the handler, so it must be quick. The rules for the SQL of
    /// [`commit_with`](crate::SqliteEngine::commit_with) apply to it. It may take [`sql_timeout`](Self::sql_timeout)
    /// for each 1,000 events. It may get the same events again, after all of its writes were rolled back.
    ///
    /// If it fails, nothing of the unit of work is written, and the commit is [`Rejected`](crate::ErrorKind::Rejected)
    /// with the handler's error as its source. Other units that were committed together with it are not affected. If it
    /// panics, the panic continues in the caller. If it fails while the store is opened, opening fails in the same way.
    /// If it fails on an event that another process has committed without it, every commit here fails.
    pub fn inline_projection<F>(mut self, name: impl AsRef<str>, version: u32, handle: F) -> Self
    where
        F: Fn(&Connection, &[Event]) -> Result<(), BoxError> + Send + Sync + 'static,
    {
        self.inline.push(InlineProjection::new(name.as_ref(), version, handle));
        self
    }

    /// Opens the store in this file.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) for `:memory:`, an empty path and `file:` URIs, and if an [inline
    /// projection](Self::inline_projection) is there twice, has version 0, or belongs to a read-only store;
    /// [`InvalidName`](crate::ErrorKind::InvalidName) if its name is not allowed;
    /// [`Rejected`](crate::ErrorKind::Rejected) if it fails; [`NotAStore`](crate::ErrorKind::NotAStore) if the file is
    /// damaged, cut off, or not a store of evercore, or if it is missing and must not be created;
    /// [`SchemaTooNew`](crate::ErrorKind::SchemaTooNew) if a newer library has made the store;
    /// [`ReadOnly`](crate::ErrorKind::ReadOnly) if it cannot be written; [`Unavailable`](crate::ErrorKind::Unavailable)
    /// if it stays locked, or if the process has too many files open. A file that is refused is not changed.
    pub async fn open(self, path: impl AsRef<Path>) -> Result<SqliteEngine> {
        let path = path::checked(path.as_ref())?;
        self.open_at(Some(path)).await
    }

    /// Opens a new store in memory. It is gone when the engine is dropped. It has a single connection, so you can read
    /// your own tables only in [`commit_with`](SqliteEngine::commit_with), with an empty unit of work.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) together with `read_only`, and as [`open`](Self::open) for inline
    /// projections.
    pub async fn open_in_memory(self) -> Result<SqliteEngine> {
        if self.settings.read_only {
            return Err(Error::invalid("a store in memory is new, so it cannot be read-only"));
        }
        self.open_at(None).await
    }

    async fn open_at(self, path: Option<PathBuf>) -> Result<SqliteEngine> {
        let Self { settings, inline } = self;
        let open = move || {
            InlineProjection::check(&inline)?;
            if settings.read_only && !inline.is_empty() {
                return Err(Error::invalid("an inline projection writes, so the store cannot be read-only"));
            }
            let store = Store::open(settings, path)?;
            inline::catch_up_at_open(&store, &inline)?;
            Ok(SqliteEngine::new(store, inline))
        };
        let opened = if settings.commit_on_caller_thread { open() } else { blocking::unblock(open).await };
        opened.map_err(Error::resume_panic)
    }
}

/// SQLite counts milliseconds in 32 bits.
fn countable(timeout: Duration) -> Duration {
    const DAY: Duration = Duration::from_secs(86_400);
    timeout.clamp(Duration::from_millis(1), 24 * DAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_outs_are_kept_within_what_sqlite_can_count() {
        let day = Duration::from_secs(86_400);
        let times = [Duration::ZERO, Duration::from_millis(700), 24 * day, 25 * day, Duration::MAX];
        let kept = times.map(|time| SqliteEngine::builder().busy_timeout(time).settings.busy_timeout);
        assert_eq!(
            kept,
            [Duration::from_millis(1), Duration::from_millis(700), 24 * day, 24 * day, 24 * day]
        );
        for time in times {
            let builder = SqliteEngine::builder().busy_timeout(time).sql_timeout(time);
            futures_lite::future::block_on(builder.open_in_memory()).unwrap();
            assert!(
                SqliteEngine::builder().sql_timeout(time).settings.sql_timeout >= Duration::from_millis(1)
            );
        }
    }
}

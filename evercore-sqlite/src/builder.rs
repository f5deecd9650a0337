//! How a store is opened.

use std::path::{Path, PathBuf};
use std::time::Duration;

use evercore_core::{BoxError, Error, Event, Result};
use rusqlite::Connection;

use crate::connection::path;
use crate::engine::SqliteEngine;
use crate::error;
use crate::settings::{Durability, Settings};
use crate::store::Store;
use crate::subscription::inline::{self, InlineProjection};

/// How a store is opened; everything has a default.
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
    /// Opens the store in this file, or makes it. All settings are those of [`SqliteEngine::builder`].
    ///
    /// # Errors
    /// As [`Builder::open`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::builder().open(path).await
    }

    /// Opens a new store in memory, which ends with the engine.
    ///
    /// # Errors
    /// As [`Builder::open_in_memory`].
    pub async fn open_in_memory() -> Result<Self> {
        Self::builder().open_in_memory().await
    }

    /// Says how to open a store.
    pub fn builder() -> Builder {
        Builder { settings: Settings::default(), inline: Vec::new() }
    }
}

impl Builder {
    /// What an acknowledged commit survives; [`Durability::PowerLoss`] unless set.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.settings.durability = durability;
        self
    }

    /// How many connections read at the same time, at least 1; 4 unless set. Each is opened when it is first needed and
    /// takes two file descriptors; the store itself takes three.
    pub fn read_connections(mut self, count: u32) -> Self {
        self.settings.read_connections = count.max(1);
        self
    }

    /// How long to wait for a lock that another process holds, and for a free read connection, before the call ends
    /// as [`Unavailable`](crate::ErrorKind::Unavailable); 5 seconds unless set, at least 1 millisecond, at most 24 days (what
    /// SQLite can count).
    pub fn busy_timeout(mut self, timeout: Duration) -> Self {
        self.settings.busy_timeout = countable(timeout);
        self
    }

    /// How long opening may take while another process holds a lock, as when it makes the same store; 10 seconds unless
    /// set, at least 1 millisecond, at most 24 days. The [`busy_timeout`](Self::busy_timeout) is for the time afterwards.
    pub fn open_timeout(mut self, timeout: Duration) -> Self {
        self.settings.open_timeout = countable(timeout);
        self
    }

    /// How long SQL of your own may take, be it [committed with](SqliteEngine::commit_with) a unit of work or a
    /// [projection](SqliteEngine::projection)'s, since nobody else writes meanwhile; 5 seconds unless set, at least 1 millisecond.
    pub fn sql_timeout(mut self, timeout: Duration) -> Self {
        self.settings.sql_timeout = timeout.max(Duration::from_millis(1));
        self
    }

    /// Whether a store is made where there is none, which is so unless set; otherwise a missing or empty file is
    /// [`NotAStore`](crate::ErrorKind::NotAStore).
    pub fn create(mut self, create: bool) -> Self {
        self.settings.create = create;
        self
    }

    /// Opens an existing store for reading only: what writes is [`ReadOnly`](crate::ErrorKind::ReadOnly). SQLite
    /// still needs its files `-wal` and `-shm` beside a store, or leave to make them; see [`immutable`](Self::immutable).
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.settings.read_only = read_only;
        self
    }

    /// Opens a store that nobody writes as long as it is open: an archive, a file on a read-only mount. It is
    /// [`read_only`](Self::read_only), takes no lock and needs no file beside it. If the file is written to all the same,
    /// what is read may be nonsense.
    ///
    /// Commits that lie in a write-ahead log beside the file would not be seen, so opening is
    /// [`NotAStore`](crate::ErrorKind::NotAStore) if there are any: [close](SqliteEngine::close) the store first, or use a
    /// [backup](SqliteEngine::backup_to).
    pub fn immutable(mut self, immutable: bool) -> Self {
        self.settings.immutable = immutable;
        self.settings.read_only |= immutable;
        self
    }

    /// Runs commits and reads on the thread that polls them, instead of handing them to a thread that may block.
    ///
    /// A lone writer is then nearly as fast as SQLite itself. In exchange the executor's thread waits for the disk:
    /// good for a command line tool or a thread of one's own, bad for a server.
    pub fn commit_on_caller_thread(mut self, on_caller_thread: bool) -> Self {
        self.settings.commit_on_caller_thread = on_caller_thread;
        self
    }

    /// Has tables of your own kept up to date in the transaction of each commit: who reads them finds every event that
    /// was acknowledged, and no other. The handler is given the new events, in the order of the log.
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
    /// Its place in the log is a cursor of this name and version, partition 0 of 1, which is listed with those of
    /// subscriptions and is not to be run as one. A new name or version begins at the beginning of the log: all there is
    /// is handled while the store is opened, 1,000 events to a transaction. What another process commits without the
    /// projection is handled by the next commit here: before it begins, 1,000 events to a transaction and with pauses in
    /// which others can write, until 1,000 events at most are left for its own transaction. While its cursor is paused,
    /// retired or removed, it does nothing.
    ///
    /// To fill the tables anew, pause its cursor, reset it, empty the tables and resume it: what was committed between any
    /// two of these is then neither missing nor there twice. The next commit that has events does the rest, in the same way,
    /// and waits for it; for a long log a new version with tables of its own is better, which is filled while the store is
    /// opened.
    /// The cursor of a version that no program has any more stays where it is until it is
    /// [removed](evercore_core::EventStore::remove_subscription).
    ///
    /// Every commit waits for it, so it should be quick. It is held to what SQL in
    /// [`commit_with`](crate::SqliteEngine::commit_with) is held to; the [`sql_timeout`](Self::sql_timeout) is for up to
    /// 1,000 events. It may be given the same events again, after all of its writes were rolled back.
    ///
    /// If it fails, nothing of the unit of work is written, and the commit is
    /// [`Rejected`](crate::ErrorKind::Rejected) with the handler's own error as its source; others that were
    /// committed together with it are not affected. A panic goes on in who committed. The same is true of opening. What
    /// it cannot handle of that which others committed without it stands in the way of every commit here.
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
    /// [`Invalid`](crate::ErrorKind::Invalid) for `:memory:`, an empty path and `file:` URIs, and for an
    /// [inline projection](Self::inline_projection) that is there twice, has version 0, or would have to write where
    /// nothing is written; [`InvalidName`](crate::ErrorKind::InvalidName) for one whose name cannot be;
    /// [`Rejected`](crate::ErrorKind::Rejected) if one fails;
    /// [`NotAStore`](crate::ErrorKind::NotAStore) for a file that is no store of evercore, damaged, or cut off, and for a
    /// missing one that is not to be created; [`SchemaTooNew`](crate::ErrorKind::SchemaTooNew) for a store made by a newer
    /// library; [`ReadOnly`](crate::ErrorKind::ReadOnly) if it cannot be written; [`Unavailable`](crate::ErrorKind::Unavailable) if
    /// it stays locked, or if the process has too many files open. A file that is refused was not written to.
    pub async fn open(self, path: impl AsRef<Path>) -> Result<SqliteEngine> {
        let path = path::checked(path.as_ref())?;
        self.open_at(Some(path)).await
    }

    /// Opens a new store in memory, which ends with the engine. It has one connection for all, so tables of your own are
    /// read there too: in [`commit_with`](SqliteEngine::commit_with) a unit that holds nothing.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) together with `read_only`, and as [`open`](Self::open) for inline projections.
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
        error::go_on(if settings.commit_on_caller_thread { open() } else { blocking::unblock(open).await })
    }
}

/// What SQLite can count, in milliseconds.
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

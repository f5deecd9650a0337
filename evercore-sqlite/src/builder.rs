//! How a store is opened.

use std::path::Path;
use std::time::Duration;

use evercore_core::{Error, Result};

use crate::connection::path;
use crate::engine::SqliteEngine;
use crate::settings::{Durability, Settings};
use crate::subscription::inline::InlineProjection;

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
    pub(crate) settings: Settings,
    pub(crate) inline: Vec<InlineProjection>,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self { settings: Settings::default(), inline: Vec::new() }
    }

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
        SqliteEngine::open_with(self.settings, self.inline, Some(path)).await
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
        SqliteEngine::open_with(self.settings, self.inline, None).await
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
        let kept = times.map(|time| Builder::new().busy_timeout(time).settings.busy_timeout);
        assert_eq!(
            kept,
            [Duration::from_millis(1), Duration::from_millis(700), 24 * day, 24 * day, 24 * day]
        );
        for time in times {
            let builder = Builder::new().busy_timeout(time).sql_timeout(time);
            futures_lite::future::block_on(builder.open_in_memory()).unwrap();
            assert!(Builder::new().sql_timeout(time).settings.sql_timeout >= Duration::from_millis(1));
        }
    }
}

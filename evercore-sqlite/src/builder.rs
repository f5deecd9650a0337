//! How a store is opened.

use std::path::{Path, PathBuf};
use std::time::Duration;

use evercore_core::{Error, ErrorKind, Result};

use crate::engine::SqliteEngine;
use crate::subscription::inline::InlineProjection;

/// What an acknowledged commit survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// A power cut and a crash of the operating system: each commit is flushed to the disk (`synchronous=FULL`).
    #[default]
    PowerLoss,
    /// A crash of the process only; a power cut may take the last commits, never half of one
    /// (`synchronous=NORMAL`).
    ProcessCrash,
}

impl Durability {
    /// SQLite's number for it.
    pub(crate) const fn synchronous(self) -> i64 {
        match self {
            Self::PowerLoss => 2,
            Self::ProcessCrash => 1,
        }
    }
}

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

/// The settings of an engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) durability: Durability,
    pub(crate) read_connections: u32,
    pub(crate) busy_timeout: Duration,
    pub(crate) open_timeout: Duration,
    pub(crate) sql_timeout: Duration,
    pub(crate) create: bool,
    pub(crate) read_only: bool,
    pub(crate) immutable: bool,
    pub(crate) commit_on_caller_thread: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            durability: Durability::default(),
            read_connections: 4,
            busy_timeout: Duration::from_secs(5),
            open_timeout: Duration::from_secs(10),
            sql_timeout: Duration::from_secs(5),
            create: true,
            read_only: false,
            immutable: false,
            commit_on_caller_thread: false,
        }
    }
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
    /// as [`Unavailable`](ErrorKind::Unavailable); 5 seconds unless set, at least 1 millisecond, at most 24 days (what
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
    /// [`NotAStore`](ErrorKind::NotAStore).
    pub fn create(mut self, create: bool) -> Self {
        self.settings.create = create;
        self
    }

    /// Opens an existing store for reading only: what writes is [`ReadOnly`](ErrorKind::ReadOnly). SQLite
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
    /// [`NotAStore`](ErrorKind::NotAStore) if there are any: [close](SqliteEngine::close) the store first, or use a
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
    /// [`Invalid`](ErrorKind::Invalid) for `:memory:`, an empty path and `file:` URIs, and for an
    /// [inline projection](Self::inline_projection) that is there twice, has version 0, or would have to write where
    /// nothing is written; [`InvalidName`](ErrorKind::InvalidName) for one whose name cannot be;
    /// [`Rejected`](ErrorKind::Rejected) if one fails;
    /// [`NotAStore`](ErrorKind::NotAStore) for a file that is no store of evercore, damaged, or cut off, and for a
    /// missing one that is not to be created; [`SchemaTooNew`](ErrorKind::SchemaTooNew) for a store made by a newer
    /// library; [`ReadOnly`](ErrorKind::ReadOnly) if it cannot be written; [`Unavailable`](ErrorKind::Unavailable) if
    /// it stays locked, or if the process has too many files open. A file that is refused was not written to.
    pub async fn open(self, path: impl AsRef<Path>) -> Result<SqliteEngine> {
        let path = checked(path.as_ref())?;
        SqliteEngine::open_with(self.settings, self.inline, Some(path)).await
    }

    /// Opens a new store in memory, which ends with the engine. It has one connection for all, so tables of your own are
    /// read there too: in [`commit_with`](SqliteEngine::commit_with) a unit that holds nothing.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) together with `read_only`, and as [`open`](Self::open) for inline projections.
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

/// The file that is meant: absolute, since the engine outlives a change of the working directory, and behind all links,
/// since SQLite puts its files beside that one.
pub(crate) fn checked(path: &Path) -> Result<PathBuf> {
    let text = path.as_os_str().as_encoded_bytes();
    // SQLite gives some names a meaning of their own, in which several connections would not be one store.
    if text.is_empty() || text == b":memory:" || text.starts_with(b"file:") {
        return Err(Error::invalid(format!("\"{}\" is no path of a file", path.display())));
    }
    let resolved = std::path::absolute(path).and_then(|path| resolved(path, 0));
    resolved.map_err(|error| {
        let message = format!("\"{}\" cannot be resolved", path.display());
        Error::new(ErrorKind::Backend, message).with_source(error)
    })
}

/// A file that is to be made. What is there by this name is not looked behind, so that a link is found to be there.
pub(crate) fn checked_new(path: &Path) -> Result<PathBuf> {
    checked(path)?;
    std::path::absolute(path).map_err(|error| {
        let message = format!("\"{}\" cannot be resolved", path.display());
        Error::new(ErrorKind::Backend, message).with_source(error)
    })
}

/// Also of a file that is not there yet, and of a link to one.
fn resolved(path: PathBuf, links: u32) -> std::io::Result<PathBuf> {
    const MOST_LINKS: u32 = 40;
    match std::fs::canonicalize(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        found => return found,
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    match std::fs::read_link(&path) {
        Ok(target) if links < MOST_LINKS => resolved(folder.join(target), links + 1),
        // No link: there is nothing by this name.
        _ => match (std::fs::canonicalize(folder), path.file_name()) {
            (Ok(folder), Some(name)) => Ok(folder.join(name)),
            _ => Ok(path),
        },
    }
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

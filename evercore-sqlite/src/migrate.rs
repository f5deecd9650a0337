//! Whether a file is a store of ours, and how it becomes one.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use evercore_core::{Error, ErrorKind};
use rusqlite::{Connection, TransactionBehavior};

use crate::connection::{self, Role};
use crate::error::{Result, SqliteError, is_busy, primary_code};

mod embedded {
    refinery::embed_migrations!("migrations");
}

/// 'EVCR'.
const APPLICATION_ID: i64 = 0x4556_4352;

/// The schema version that this library writes; the migrations end with it.
const SCHEMA_VERSION: u32 = 1;

const PAUSE: Duration = Duration::from_millis(5);

/// What a file is before it is opened for use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// A store, of this schema version.
    Store(u32),
    /// A database with nothing in it, or the beginnings of a store that another process is making.
    Empty,
}

/// Looks at a file without writing to it.
pub(crate) fn identify(path: &Path, busy_timeout: Duration) -> Result<Identity> {
    let look = |role| {
        let connection = connection::open(path, role, false, busy_timeout)?;
        // All looks at one moment: another process may be making the store.
        connection.execute_batch("BEGIN")?;
        identity(&connection, path)
    };
    match look(Role::Reader) {
        // Left behind by a crash, so that even reading it means mending it first.
        Err(SqliteError::Sqlite(error)) if primary_code(&error) == Some(rusqlite::ffi::SQLITE_READONLY) => {
            look(Role::Writer)
        }
        other => other,
    }
}

fn identity(connection: &Connection, path: &Path) -> Result<Identity> {
    let application_id = pragma(connection, "application_id")?;
    if application_id == APPLICATION_ID {
        check_length(connection, path)?;
        let version = u32::try_from(pragma(connection, "user_version")?).unwrap_or(u32::MAX);
        return if version > SCHEMA_VERSION {
            Err(Error::schema_too_new(version, SCHEMA_VERSION).into())
        } else {
            Ok(Identity::Store(version))
        };
    }
    let foreign = "SELECT count(*) FROM sqlite_schema WHERE tbl_name <> 'refinery_schema_history'";
    let things: i64 = connection.query_row(foreign, [], |row| row.get(0))?;
    if application_id != 0 || things != 0 {
        return Err(not_a_store("the database belongs to another application"));
    }
    Ok(Identity::Empty)
}

/// SQLite finds a file that lost whole pages, this one that lost a part of its last page. With a WAL the file may be
/// shorter than the database.
fn check_length(connection: &Connection, path: &Path) -> Result<()> {
    let has_wal = fs::metadata(wal_path(path)).is_ok_and(|wal| wal.len() > 0);
    let pages = pragma(connection, "page_count")?;
    let bytes = pages.saturating_mul(pragma(connection, "page_size")?);
    let length = fs::metadata(path)?.len();
    if !has_wal && i128::from(length) < i128::from(bytes) {
        return Err(not_a_store(format!("the file was cut off: {length} bytes of {bytes}")));
    }
    Ok(())
}

fn pragma(connection: &Connection, name: &str) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, name, |row| row.get(0))
}

pub(crate) fn not_a_store(message: impl Into<String>) -> SqliteError {
    Error::new(ErrorKind::NotAStore, message).into()
}

/// Where SQLite keeps the write-ahead log of a database.
pub(crate) fn wal_path(path: &Path) -> std::path::PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// Brings the file to WAL mode and to the newest schema, also when several processes try at once.
pub(crate) fn migrate(connection: &mut Connection, path: Option<&Path>, patience: Duration) -> Result<()> {
    let until = Instant::now() + patience;
    if is_current(connection)? {
        return switch_to_wal(connection, path, until);
    }
    // Held until the end; where the system has no such lock the repetition below does alone.
    let _folder = path.and_then(|path| lock_folder(path, until));
    switch_to_wal(connection, path, until)?;
    // refinery reads what was applied before it writes.
    connection.set_transaction_behavior(TransactionBehavior::Immediate);
    let migrated = repeat(until, || {
        if is_current(connection)? {
            return Ok(());
        }
        // Grouped: a migration and the note that it was applied are one transaction.
        embedded::migrations::runner().set_grouped(true).run(connection)?;
        Ok(())
    });
    // Another process may have been faster by a moment; what counts is what is there now.
    if is_current(connection)? { Ok(()) } else { migrated.and_then(|()| Err(not_current())) }
}

fn is_current(connection: &Connection) -> Result<bool> {
    let application_id = pragma(connection, "application_id")?;
    Ok(application_id == APPLICATION_ID && pragma(connection, "user_version")? == i64::from(SCHEMA_VERSION))
}

fn not_current() -> SqliteError {
    not_a_store("the schema did not reach its newest version")
}

fn switch_to_wal(connection: &Connection, path: Option<&Path>, until: Instant) -> Result<()> {
    let Some(_) = path else { return Ok(()) };
    repeat(until, || {
        let mode: String =
            connection.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))?;
        if mode.eq_ignore_ascii_case("wal") {
            return Ok(());
        }
        let message = format!("the file stays in journal mode \"{mode}\", a store needs \"wal\"");
        Err(Error::new(ErrorKind::Backend, message).into())
    })
}

/// SQLite does not wait by itself where waiting could be for ever, as when two connections change the journal mode.
fn repeat(until: Instant, mut work: impl FnMut() -> Result<()>) -> Result<()> {
    loop {
        match work() {
            Err(error) if is_worth_repeating(&error) && Instant::now() < until => std::thread::sleep(PAUSE),
            outcome => return outcome,
        }
    }
}

fn is_worth_repeating(error: &SqliteError) -> bool {
    match error {
        SqliteError::Sqlite(error) => is_busy(error),
        SqliteError::Migration(_) => true,
        _ => false,
    }
}

/// A lock that processes share while they make a store: on the folder, never on the file itself, since closing a
/// second handle to it would drop the locks that SQLite holds.
fn lock_folder(path: &Path, until: Instant) -> Option<File> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = File::open(folder).ok()?;
    loop {
        match folder.try_lock() {
            Ok(()) => return Some(folder),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(PAUSE),
            Err(_) => return None,
        }
    }
}

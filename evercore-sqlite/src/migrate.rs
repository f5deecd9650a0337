//! Whether a file is a store of ours, and how it becomes one.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use evercore_core::{Error, ErrorKind};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, TransactionBehavior};

use crate::connection::open::{self, Role};
use crate::connection::wal::{self, Alone};
use crate::error::{Result, SqliteError, is_busy, primary_code};
use crate::settings::Settings;

mod embedded {
    refinery::embed_migrations!("migrations");
}

/// 'EVCR'.
const APPLICATION_ID: i64 = 0x4556_4352;

/// The schema version that this library writes; the migrations end with it.
const SCHEMA_VERSION: u32 = 1;

/// What every SQLite database begins with.
pub(crate) const HEADER_BYTES: u64 = 100;

/// Where the migrations are noted that were applied.
const HISTORY: &str = "evercore_schema_history";

/// While another process writes its log back, the file alone may be of no one moment: then it is looked at again.
const LONGEST_CHECKPOINT: Duration = Duration::from_secs(1);

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
pub(crate) fn identify(path: &Path, settings: &Settings) -> Result<Identity> {
    if settings.immutable {
        if wal::bytes(path) > 0 {
            let message =
                "an immutable store has no write-ahead log, but there is one: close the store first";
            return Err(not_a_store(message));
        }
        return Ok(look(path, Role::Archive, settings, None)?.0);
    }
    let until = Instant::now() + LONGEST_CHECKPOINT.min(settings.open_timeout);
    loop {
        let alone = (wal::bytes(path) > 0).then(|| Alone::read(path));
        let looked = match look(path, Role::Reader, settings, alone.as_ref()) {
            // Left there by a crash, so that even reading it means mending it first.
            Err(SqliteError::Sqlite(error))
                if primary_code(&error) == Some(rusqlite::ffi::SQLITE_READONLY) && !settings.read_only =>
            {
                look(path, Role::Writer, settings, alone.as_ref())
            }
            looked => looked,
        };
        match looked? {
            (identity, true) => return Ok(identity),
            (_, false) if Instant::now() < until => std::thread::sleep(PAUSE),
            (_, false) => return Err(foreign_wal(path)),
        }
    }
}

pub(crate) fn foreign_wal(path: &Path) -> SqliteError {
    not_a_store(format!(
        "the write-ahead log \"{}\" belongs to another file than the one beside it: was a copy put in the place of a \
         store? put the old file back, or restore with \"SqliteEngine::restore_from\"",
        wal::path_of(path).display()
    ))
}

/// What the file is, and whether its write-ahead log is its own. All looks at one moment: another process may be making
/// the store.
fn look(path: &Path, role: Role, settings: &Settings, alone: Option<&Alone>) -> Result<(Identity, bool)> {
    let connection = open::open(path, role, false, settings.open_timeout)?;
    // Whatever is found, closing this connection leaves the write-ahead log where it is.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    let looked = (|| {
        connection.execute_batch("BEGIN")?;
        let identity = identity(&connection, path)?;
        let is_own = match (identity, alone) {
            (Identity::Store(_), Some(alone)) => alone.belongs_to(&connection)?,
            _ => true,
        };
        Ok((identity, is_own))
    })();
    looked.map_err(|error| open::explain(error, path))
}

fn identity(connection: &Connection, path: &Path) -> Result<Identity> {
    let application_id = pragma(connection, "application_id")?;
    let version = schema_version(connection)?;
    match (application_id, version) {
        (APPLICATION_ID | 0, Some(version)) => {
            check_length(connection, path)?;
            if version > SCHEMA_VERSION {
                return Err(Error::schema_too_new(version, SCHEMA_VERSION).into());
            }
            Ok(Identity::Store(version))
        }
        (APPLICATION_ID, None) => Err(not_a_store("the table \"store\" is missing")),
        (0, None) if is_unused(connection)? => Ok(Identity::Empty),
        _ => Err(not_a_store("the database belongs to another application")),
    }
}

/// The version of the schema, as it stands in the table `store`: a dump that is read in again keeps that, and loses what
/// stands in the header of the file.
fn schema_version(connection: &Connection) -> Result<Option<u32>> {
    let columns =
        "SELECT count(*) FROM pragma_table_info('store') WHERE name IN ('store_id', 'schema_version')";
    if connection.query_row(columns, [], |row| row.get::<_, i64>(0))? != 2 {
        return Ok(None);
    }
    let version: i64 = connection.query_row("SELECT schema_version FROM store", [], |row| row.get(0))?;
    Ok(Some(u32::try_from(version).unwrap_or(u32::MAX)))
}

/// Nothing is in it, or the beginnings of a store.
fn is_unused(connection: &Connection) -> Result<bool> {
    let things = "SELECT count(*) FROM sqlite_schema WHERE tbl_name <> ?1";
    Ok(connection.query_row(things, [HISTORY], |row| row.get::<_, i64>(0))? == 0)
}

/// SQLite finds a file that lost whole pages, this one that lost a part of its last page. With a WAL the file may be
/// shorter than the database.
fn check_length(connection: &Connection, path: &Path) -> Result<()> {
    let has_wal = wal::bytes(path) > 0;
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

/// Brings the file to WAL mode and to the newest schema, also when several processes try at once.
pub(crate) fn migrate(connection: &mut Connection, path: Option<&Path>, patience: Duration) -> Result<()> {
    let until = Instant::now() + patience;
    if is_current(connection)? {
        repeat(until, || begin_use(connection))?;
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
        let mut runner = embedded::migrations::runner();
        // Its own name for the table is left to the application.
        runner.set_migration_table_name(HISTORY);
        // Grouped: a migration and the note that it was applied are one transaction.
        runner.set_grouped(true).run(connection)?;
        Ok(())
    });
    // Another process may have been faster by a moment; what counts is what is there now.
    if is_current(connection)? { Ok(()) } else { migrated.and_then(|()| Err(not_current())) }
}

fn is_current(connection: &Connection) -> Result<bool> {
    Ok(schema_version(connection)? == Some(SCHEMA_VERSION))
}

/// A backup that is written to is one no more, and is told so before it gets a write-ahead log. What was read in from a
/// dump gets its mark back.
fn begin_use(connection: &Connection) -> Result<()> {
    if connection.query_row("SELECT is_backup FROM store", [], |row| row.get(0))? {
        connection.execute_batch("UPDATE store SET is_backup = 0; PRAGMA wal_checkpoint(TRUNCATE)")?;
    }
    if pragma(connection, "application_id")? != APPLICATION_ID {
        connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    }
    Ok(())
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
pub(crate) fn lock_folder(path: &Path, until: Instant) -> Option<File> {
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

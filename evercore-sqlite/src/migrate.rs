//! Checks whether a file is a store, and migrates it.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use evercore_core::{Error, ErrorKind};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, TransactionBehavior};

use crate::connection::open::{self, Role};
use crate::connection::wal::{self, WithoutWal};
use crate::error::{Result, SqliteError, is_busy, primary_code};
use crate::settings::Settings;

mod embedded {
    refinery::embed_migrations!("migrations");
}

/// 'EVCR'.
const APPLICATION_ID: i64 = 0x4556_4352;

/// The schema version after all migrations.
const SCHEMA_VERSION: u32 = 1;

/// The length of the header of a SQLite database.
pub(crate) const HEADER_BYTES: u64 = 100;

/// The table that records which migrations were applied.
const HISTORY: &str = "evercore_schema_history";

/// While another process writes its log back, the file may be inconsistent for this long. It is inspected again.
const LONGEST_CHECKPOINT: Duration = Duration::from_secs(1);

const PAUSE: Duration = Duration::from_millis(5);

/// The contents of a file, before it is opened for use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// A store with this schema version.
    Store(u32),
    /// An empty database, or a store that another process has begun to create.
    Empty,
}

/// Inspects a file without writing to it.
pub(crate) fn identify(path: &Path, settings: &Settings) -> Result<Identity> {
    if settings.immutable {
        if wal::bytes(path) > 0 {
            let message =
                "an immutable store must not have a write-ahead log, but this one has: close the store first";
            return Err(not_a_store(message));
        }
        return Ok(inspect(path, Role::Immutable, settings, None)?.identity);
    }
    let until = Instant::now() + LONGEST_CHECKPOINT.min(settings.open_timeout);
    loop {
        let without_wal = (wal::bytes(path) > 0).then(|| WithoutWal::read(path));
        let inspected = match inspect(path, Role::Reader, settings, without_wal.as_ref()) {
            // After a crash SQLite must repair the file before it can be read.
            Err(SqliteError::Sqlite(error))
                if primary_code(&error) == Some(rusqlite::ffi::SQLITE_READONLY) && !settings.read_only =>
            {
                inspect(path, Role::Writer, settings, without_wal.as_ref())
            }
            inspected => inspected,
        };
        match inspected? {
            Inspection { identity, owns_wal: true } => return Ok(identity),
            _ if Instant::now() < until => std::thread::sleep(PAUSE),
            _ => return Err(foreign_wal(path)),
        }
    }
}

pub(crate) fn foreign_wal(path: &Path) -> SqliteError {
    not_a_store(format!(
        "the write-ahead log \"{}\" belongs to another file than the one beside it: if you have replaced a store by a \
         copy, put the old file back, or restore with \"SqliteEngine::restore_from\"",
        wal::path_of(path).display()
    ))
}

struct Inspection {
    identity: Identity,
    /// Whether the write-ahead log beside the file belongs to it.
    owns_wal: bool,
}

/// Inspects a file in one transaction, because another process may be creating the store.
fn inspect(
    path: &Path,
    role: Role,
    settings: &Settings,
    without_wal: Option<&WithoutWal>,
) -> Result<Inspection> {
    let connection = open::open(path, role, false, settings.open_timeout)?;
    // Closing this connection must not change the write-ahead log.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    let inspected = (|| {
        connection.execute_batch("BEGIN")?;
        let identity = identity(&connection, path)?;
        let owns_wal = match (identity, without_wal) {
            (Identity::Store(_), Some(without_wal)) => without_wal.belongs_to(&connection)?,
            _ => true,
        };
        Ok(Inspection { identity, owns_wal })
    })();
    inspected.map_err(|error| open::explain(error, path))
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

/// The schema version in the table `store`. It is not in the header of the file, because a dump loses the header.
fn schema_version(connection: &Connection) -> Result<Option<u32>> {
    let columns =
        "SELECT count(*) FROM pragma_table_info('store') WHERE name IN ('store_id', 'schema_version')";
    if connection.query_row(columns, [], |row| row.get::<_, i64>(0))? != 2 {
        return Ok(None);
    }
    let version: i64 = connection.query_row("SELECT schema_version FROM store", [], |row| row.get(0))?;
    Ok(Some(u32::try_from(version).unwrap_or(u32::MAX)))
}

/// The database is empty, or the creation of a store has begun.
fn is_unused(connection: &Connection) -> Result<bool> {
    let things = "SELECT count(*) FROM sqlite_schema WHERE tbl_name <> ?1";
    Ok(connection.query_row(things, [HISTORY], |row| row.get::<_, i64>(0))? == 0)
}

/// Finds a file that has lost a part of its last page. SQLite itself finds a file that has lost whole pages. With a WAL
/// the file may be shorter than the database.
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

/// Switches the file to WAL mode and to the newest schema. Several processes may do this at the same time.
pub(crate) fn migrate(connection: &mut Connection, path: Option<&Path>, timeout: Duration) -> Result<()> {
    let until = Instant::now() + timeout;
    if is_current(connection)? {
        repeat(until, || begin_use(connection))?;
        return switch_to_wal(connection, path, until);
    }
    // Held until the end. If the system has no such lock, repeating is enough.
    let _folder = path.and_then(|path| lock_folder(path, until));
    switch_to_wal(connection, path, until)?;
    // refinery first reads which migrations were applied, and then writes.
    connection.set_transaction_behavior(TransactionBehavior::Immediate);
    let migrated = repeat(until, || {
        if is_current(connection)? {
            return Ok(());
        }
        let mut runner = embedded::migrations::runner();
        // The application may use refinery's default name for its own migrations.
        runner.set_migration_table_name(HISTORY);
        // Grouped: a migration and its record are one transaction.
        runner.set_grouped(true).run(connection)?;
        Ok(())
    });
    // Another process may have migrated the store meanwhile. Only the result matters.
    if is_current(connection)? {
        return Ok(());
    }
    migrated?;
    Err(not_a_store("the migrations did not bring the schema to its newest version"))
}

fn is_current(connection: &Connection) -> Result<bool> {
    Ok(schema_version(connection)? == Some(SCHEMA_VERSION))
}

/// Removes the mark of a backup before the file gets a write-ahead log: it will be written, so it is no backup any
/// more. A store that was restored from a dump gets its application id back.
fn begin_use(connection: &Connection) -> Result<()> {
    if connection.query_row("SELECT is_backup FROM store", [], |row| row.get(0))? {
        connection.execute_batch("UPDATE store SET is_backup = 0; PRAGMA wal_checkpoint(TRUNCATE)")?;
    }
    if pragma(connection, "application_id")? != APPLICATION_ID {
        connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    }
    Ok(())
}

fn switch_to_wal(connection: &Connection, path: Option<&Path>, until: Instant) -> Result<()> {
    let Some(_) = path else { return Ok(()) };
    repeat(until, || {
        let mode: String =
            connection.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))?;
        if mode.eq_ignore_ascii_case("wal") {
            return Ok(());
        }
        let message = format!("the file is in journal mode \"{mode}\", but a store needs \"wal\"");
        Err(Error::new(ErrorKind::Backend, message).into())
    })
}

/// SQLite does not wait if that could be a deadlock, for example if two connections change the journal mode.
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

/// A lock for creating a store. It is on the folder, because closing a second handle to the file would drop SQLite's
/// locks.
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

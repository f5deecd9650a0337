//! Opens connections, and makes, reads back and verifies their settings.

use std::path::Path;
use std::time::Duration;

use evercore_core::{Error, ErrorKind};
use rusqlite::{Connection, OpenFlags};

use crate::error::{self, Result, SqliteError};
use crate::settings::{Durability, Settings};

/// How many prepared statements a connection keeps: enough for all of this crate.
const STATEMENTS: usize = 128;

/// The size to which SQLite cuts the write-ahead log when it starts again at its beginning.
const JOURNAL_SIZE_LIMIT: i64 = 64 * 1024 * 1024;

/// Older releases can damage a database in WAL mode if two connections write and checkpoint at the same time.
const OLDEST_SQLITE: i32 = 3_051_003;

/// How much of the file a reader keeps in memory, in KiB: 8 MiB, four times SQLite's default.
const READER_CACHE_KIB: i64 = 8 * 1024;

/// The same for the writer: 64 MiB, used only if the file is that large. The bundled SQLite is built with
/// `SQLITE_ENABLE_MEMORY_MANAGEMENT`, so all connections of a process share the sum of their caches. If the sum is too
/// small, each commit reads its pages again: with 8 MiB, a file of 20 MB took half as many events per second.
const WRITER_CACHE_KIB: i64 = 64 * 1024;

/// The use of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Writer,
    Reader,
    /// Reads a file that nobody writes, without locks and without other files beside it.
    Immutable,
}

impl Role {
    const fn cache_kib(self) -> i64 {
        match self {
            Self::Writer => WRITER_CACHE_KIB,
            Self::Reader | Self::Immutable => READER_CACHE_KIB,
        }
    }
}

/// Refuses a SQLite library with a known corruption bug.
pub(crate) fn check_library() -> Result<()> {
    if rusqlite::version_number() < OLDEST_SQLITE {
        let message = format!("SQLite {} can damage a store, use 3.51.3 or newer", rusqlite::version());
        return Err(Error::new(ErrorKind::Backend, message).into());
    }
    Ok(())
}

fn flags(role: Role, create: bool) -> OpenFlags {
    let base = OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_EXRESCODE;
    match (role, create) {
        (Role::Reader, _) => base | OpenFlags::SQLITE_OPEN_READ_ONLY,
        (Role::Immutable, _) => base | OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI,
        (Role::Writer, false) => base | OpenFlags::SQLITE_OPEN_READ_WRITE,
        (Role::Writer, true) => base | OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE,
    }
}

/// Opens a connection without settings. `path` must be absolute: then SQLite takes it for the name of a file.
pub(crate) fn open(path: &Path, role: Role, create: bool, timeout: Duration) -> Result<Connection> {
    let flags = flags(role, create);
    let opened = match role {
        Role::Immutable => Connection::open_with_flags(immutable(path), flags),
        Role::Writer | Role::Reader => Connection::open_with_flags(path, flags),
    };
    let connection = opened.map_err(|error| explain(error.into(), path))?;
    wait_for_locks(&connection, timeout)?;
    Ok(connection)
}

/// Opens a connection with all its settings. It has read from the file, so all its files are open.
pub(crate) fn configured(path: &Path, role: Role, create: bool, settings: &Settings) -> Result<Connection> {
    let connection = open(path, role, create, settings.busy_timeout)?;
    let configured = configure(&connection, role, settings.durability);
    configured.map_err(|error| explain(error.into(), path))?;
    Ok(connection)
}

/// SQLite reports "cannot open" also if the process has too many files open. This must be called while its files are
/// still open. It tries to open the folder, because closing a second handle to the file would drop SQLite's locks.
pub(crate) fn explain(error: SqliteError, path: &Path) -> SqliteError {
    match error {
        SqliteError::Sqlite(error) if error::cannot_open(&error) && has_no_descriptor(path) => {
            SqliteError::NoDescriptor(error)
        }
        other => other,
    }
}

fn has_no_descriptor(path: &Path) -> bool {
    /// ENFILE and EMFILE, with these numbers on every Unix.
    const NONE_LEFT: [i32; 2] = [23, 24];
    /// If SQLite can open one file but not the next, it closes the first again.
    const FILES: usize = 4;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let opened: Result<Vec<_>, _> = (0..FILES).map(|_| std::fs::File::open(folder)).collect();
    cfg!(unix)
        && opened.is_err_and(|error| error.raw_os_error().is_some_and(|code| NONE_LEFT.contains(&code)))
}

/// The URI that tells SQLite that nobody changes the file.
fn immutable(path: &Path) -> String {
    use std::fmt::Write;
    let mut name = "file:".to_owned();
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'-' | b'.' | b'_' => name.push(char::from(*byte)),
            byte if byte.is_ascii_alphanumeric() => name.push(char::from(*byte)),
            // Writing to a string cannot fail.
            byte => drop(write!(name, "%{byte:02x}")),
        }
    }
    name + "?immutable=1"
}

/// Sets how long this connection waits for a lock of another connection.
pub(crate) fn wait_for_locks(connection: &Connection, busy_timeout: Duration) -> rusqlite::Result<()> {
    connection.busy_timeout(busy_timeout)?;
    let found: i64 = connection.pragma_query_value(None, "busy_timeout", |row| row.get(0))?;
    expect("busy_timeout", found, i64::try_from(busy_timeout.as_millis()).unwrap_or(i64::MAX))
}

/// Makes all settings of a connection, and checks that SQLite has taken them.
pub(crate) fn configure(connection: &Connection, role: Role, durability: Durability) -> rusqlite::Result<()> {
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    set(connection, "synchronous", durability.synchronous())?;
    set(connection, "foreign_keys", 1)?;
    set(connection, "trusted_schema", 0)?;
    set(connection, "cell_size_check", 1)?;
    set(connection, "journal_size_limit", JOURNAL_SIZE_LIMIT)?;
    set(connection, "cache_size", -role.cache_kib())?;
    set(connection, "query_only", i64::from(role != Role::Writer))?;
    // With mmap a disk error is a signal, not an error code. A build without mmap returns no row.
    match connection.pragma_update_and_check(None, "mmap_size", 0, |row| row.get(0)) {
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(()),
        found => expect("mmap_size", found?, 0),
    }
}

fn set(connection: &Connection, pragma: &str, value: i64) -> rusqlite::Result<()> {
    connection.pragma_update(None, pragma, value)?;
    expect(pragma, connection.pragma_query_value(None, pragma, |row| row.get(0))?, value)
}

fn expect(pragma: &str, found: i64, value: i64) -> rusqlite::Result<()> {
    if found != value {
        let message = format!("SQLite has {pragma} = {found} instead of {value}");
        // The one error of rusqlite that can carry any other.
        return Err(rusqlite::Error::ToSqlConversionFailure(message.into()));
    }
    Ok(())
}

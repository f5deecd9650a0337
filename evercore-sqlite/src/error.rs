//! Maps errors of SQLite, the file system and the migrations to evercore's error kinds.

use std::path::{Path, PathBuf};

use evercore_core::{BoxError, Error, ErrorKind};
use rusqlite::ffi;

/// An internal error, before it is mapped to an [`ErrorKind`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum SqliteError {
    /// An error of SQLite.
    #[error("SQLite: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// SQLite could not open a file, because the process or the system has too many files open.
    #[error("SQLite: {0}")]
    NoDescriptor(rusqlite::Error),
    /// An error that names its file.
    #[error("{0}")]
    At(PathBuf, #[source] Box<Self>),
    /// An error of the file system.
    #[error("file system: {0}")]
    Io(#[from] std::io::Error),
    /// An error of a migration.
    #[error("migration: {0}")]
    Migration(#[from] refinery::Error),
    /// A value in the file that evercore cannot have written.
    #[error("damaged: {0}")]
    Damaged(#[from] BoxError),
    /// The user's SQL failed in one of our transactions.
    #[error(transparent)]
    User(#[from] Fault),
    /// Already an error of evercore.
    #[error(transparent)]
    Core(#[from] Error),
}

const NO_VALUE: &str = "the store is damaged: a stored value is not valid";

pub(crate) type Result<T, E = SqliteError> = std::result::Result<T, E>;

impl SqliteError {
    /// Adds the file to the error.
    pub(crate) fn at(self, path: &Path) -> Self {
        match self {
            Self::At(..) => self,
            other => Self::At(path.to_owned(), Box::new(other)),
        }
    }
}

impl From<SqliteError> for Error {
    fn from(error: SqliteError) -> Self {
        let (kind, message) = match &error {
            SqliteError::Sqlite(source) => meaning(source),
            SqliteError::NoDescriptor(_) => {
                let message = "the process has too many files open, raise its limit or close other stores";
                (ErrorKind::Unavailable, message)
            }
            SqliteError::Io(source) if is_full(source) => {
                (ErrorKind::Full, "the disk is full, nothing was written")
            }
            SqliteError::Io(_) => (ErrorKind::Backend, "the file system reported an error"),
            SqliteError::Migration(source) => migration(source),
            SqliteError::Damaged(_) => (ErrorKind::NotAStore, NO_VALUE),
            SqliteError::At(..) | SqliteError::User(_) | SqliteError::Core(_) => (ErrorKind::Backend, ""),
        };
        match error {
            SqliteError::User(fault) => fault.into(),
            SqliteError::Core(error) => error,
            SqliteError::At(path, error) => at(&path, *error),
            other => Self::new(kind, message).because(other),
        }
    }
}

/// A failure of the user's SQL.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// It returned an error, or panicked.
    #[error("{message}")]
    Failed { message: String, source: BoxError },
    /// It took too long.
    #[error(transparent)]
    TookTooLong(Error),
    /// It ended the transaction.
    #[error(transparent)]
    BrokeRules(Error),
}

impl Fault {
    /// The same with the error of the user's SQL as the cause.
    pub(crate) fn because(self, source: BoxError) -> Self {
        match self {
            Self::Failed { .. } => self,
            Self::TookTooLong(error) => Self::TookTooLong(error.because(source)),
            Self::BrokeRules(error) => Self::BrokeRules(error.because(source)),
        }
    }

    /// The user's own error if there is one.
    pub(crate) fn into_source(self) -> BoxError {
        match self {
            Self::Failed { source, .. } => source,
            Self::TookTooLong(error) | Self::BrokeRules(error) => error.into(),
        }
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Failed { message, source } => Self::new(ErrorKind::Rejected, message).because(source),
            Fault::TookTooLong(error) | Fault::BrokeRules(error) => error,
        }
    }
}

/// Adds a source to an error, and the parts of the source's text that cannot contain a stored value.
pub(crate) trait Because {
    fn because(self, source: impl Into<BoxError>) -> Self;
}

impl Because for Error {
    fn because(self, source: impl Into<BoxError>) -> Self {
        self.with_cause(source, |cause| match cause.downcast_ref()? {
            rusqlite::Error::SqliteFailure(failure, message) => {
                Some(public_text(*failure, message.as_deref()))
            }
            rusqlite::Error::SqlInputError { error, msg, .. } => Some(public_text(*error, Some(msg))),
            _ => None,
        })
    }
}

/// The result code, and SQLite's message if it cannot contain a value. A message may name a constraint or a table. The
/// text of a statement and the message of a trigger are left out.
fn public_text(failure: ffi::Error, message: Option<&str>) -> String {
    const RAISED: [i32; 2] = [ffi::SQLITE_CONSTRAINT_TRIGGER, ffi::SQLITE_CONSTRAINT_FUNCTION];
    let is_constraint =
        failure.extended_code & 0xff == ffi::SQLITE_CONSTRAINT && !RAISED.contains(&failure.extended_code);
    let shows_no_value = |message: &&str| is_constraint || message.starts_with("no such table: ");
    let message = message.filter(shows_no_value).map_or_else(String::new, |text| format!(": {text}"));
    format!("SQLite result {}, {failure}{message}", failure.extended_code)
}

fn at(path: &Path, error: SqliteError) -> Error {
    let is_complete = matches!(error, SqliteError::Core(_));
    let error = Error::from(error);
    let named = Error::new(error.kind().clone(), format!("\"{}\": {error}", path.display()));
    // The text of our own error is complete. Other errors have a source with more details.
    if is_complete { named } else { named.with_source(error) }
}

/// A value in the file that evercore cannot have written.
pub(crate) fn damaged(error: impl Into<BoxError>) -> SqliteError {
    SqliteError::Damaged(error.into())
}

/// SQLite's primary result code, if the error comes from SQLite.
pub(crate) fn primary_code(error: &rusqlite::Error) -> Option<i32> {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => Some(failure.extended_code & 0xff),
        rusqlite::Error::SqlInputError { error, .. } => Some(error.extended_code & 0xff),
        _ => None,
    }
}

/// Whether another connection holds a lock.
pub(crate) fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(primary_code(error), Some(ffi::SQLITE_BUSY | ffi::SQLITE_LOCKED | ffi::SQLITE_PROTOCOL))
}

/// Whether an error of the user's SQL comes from a lock that another connection holds.
pub(crate) fn was_busy(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| cause.downcast_ref().is_some_and(is_busy))
}

/// Whether SQLite could not open a file.
pub(crate) fn cannot_open(error: &rusqlite::Error) -> bool {
    primary_code(error) == Some(ffi::SQLITE_CANTOPEN)
}

/// Whether the disk itself failed.
pub(crate) fn is_io(error: &rusqlite::Error) -> bool {
    primary_code(error) == Some(ffi::SQLITE_IOERR)
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

/// Whether a row broke a constraint.
pub(crate) fn is_constraint(error: &rusqlite::Error) -> bool {
    primary_code(error) == Some(ffi::SQLITE_CONSTRAINT)
}

/// Uses only the result code, because messages change between releases.
fn meaning(error: &rusqlite::Error) -> (ErrorKind, &'static str) {
    match primary_code(error) {
        Some(ffi::SQLITE_BUSY | ffi::SQLITE_LOCKED | ffi::SQLITE_PROTOCOL) => {
            (ErrorKind::Unavailable, "the store is locked by another connection")
        }
        Some(ffi::SQLITE_READONLY | ffi::SQLITE_CANTOPEN | ffi::SQLITE_PERM) => {
            (ErrorKind::ReadOnly, "the file or its folder cannot be opened for writing")
        }
        Some(ffi::SQLITE_FULL) => (ErrorKind::Full, "the disk is full, nothing was written"),
        Some(ffi::SQLITE_CORRUPT) => (ErrorKind::NotAStore, "the file is damaged"),
        Some(ffi::SQLITE_NOTADB) => (ErrorKind::NotAStore, "the file is not a SQLite database"),
        Some(ffi::SQLITE_IOERR) => (ErrorKind::Backend, "the disk failed"),
        Some(ffi::SQLITE_CONSTRAINT) => (ErrorKind::Backend, "a constraint of the schema was broken"),
        Some(_) => (ErrorKind::Backend, "SQLite reported an error"),
        None if is_conversion(error) => (ErrorKind::NotAStore, NO_VALUE),
        None => (ErrorKind::Backend, "SQLite gave an unexpected result"),
    }
}

fn is_conversion(error: &rusqlite::Error) -> bool {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, Utf8Error};
    matches!(
        error,
        FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) | Utf8Error(..)
    )
}

/// refinery wraps SQLite's error.
fn migration(error: &refinery::Error) -> (ErrorKind, &'static str) {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<rusqlite::Error>());
    source.map_or((ErrorKind::Backend, "the schema could not be migrated"), meaning)
}

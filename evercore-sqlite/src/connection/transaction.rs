//! A transaction that writes, and the two ways in which it can fail.

use rusqlite::Connection;

use crate::error::{Result, SqliteError, is_io};

/// Why a transaction did not commit.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Nothing was written.
    RolledBack(SqliteError),
    /// The disk failed during the commit. After a restart the transaction may be there or not.
    Unknown,
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::RolledBack(error.into())
    }
}

/// Runs `work` between BEGIN IMMEDIATE and COMMIT. After any failure the connection can be used again.
///
/// IMMEDIATE, because a transaction that reads first and writes later fails if another process writes in between.
pub(crate) fn write<T>(
    connection: &Connection,
    work: impl FnOnce(&Connection) -> Result<T>,
) -> Result<T, Failure> {
    connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
    let result = match work(connection) {
        Ok(value) => commit(connection).map(|()| value),
        Err(error) => Err(Failure::RolledBack(error)),
    };
    if result.is_err() {
        roll_back(connection);
    }
    result
}

fn commit(connection: &Connection) -> Result<(), Failure> {
    match connection.prepare_cached("COMMIT")?.execute([]) {
        Ok(_) => Ok(()),
        Err(error) if is_io(&error) => Err(Failure::Unknown),
        Err(error) => Err(error.into()),
    }
}

/// Some errors, such as a full disk, roll back by themselves. If the rollback fails, the connection cannot be used any
/// more, and the next BEGIN reports that.
pub(crate) fn roll_back(connection: &Connection) {
    if !connection.is_autocommit() {
        let _ = connection.execute_batch("ROLLBACK");
    }
}

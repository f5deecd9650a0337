//! A writing transaction, and the two ways in which it can fail.

use rusqlite::Connection;

use crate::error::{Result, is_io};

/// Why a transaction did not commit.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Nothing was written, for sure.
    RolledBack(crate::error::SqliteError),
    /// The disk failed in the midst of the commit: what was written may come to light again after a restart.
    Unknown,
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::RolledBack(error.into())
    }
}

/// Runs `work` between BEGIN IMMEDIATE and COMMIT; whatever fails, the connection is free again afterwards.
///
/// IMMEDIATE: a transaction that reads first and writes later would fail as soon as another process writes between.
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

/// Some errors (a full disk among them) roll back by themselves. Where the rollback fails the connection is of no use
/// any more: the next BEGIN says so.
pub(crate) fn roll_back(connection: &Connection) {
    if !connection.is_autocommit() {
        let _ = connection.execute_batch("ROLLBACK");
    }
}

//! The user's own SQL in the transaction of a commit.

use std::fmt;
use std::time::Duration;

use evercore_core::BoxError;
use rusqlite::Connection;

use crate::connection::user_sql;
use crate::error::Result;

type Run = Box<dyn FnOnce(&Connection) -> Result<(), BoxError> + Send>;

/// The user's code that runs in the transaction of a commit.
pub(crate) struct OwnSql(Run);

impl OwnSql {
    pub(crate) fn new(run: impl FnOnce(&Connection) -> Result<(), BoxError> + Send + 'static) -> Self {
        Self(Box::new(run))
    }

    /// Runs it in the open transaction, which must be rolled back after an error.
    pub(crate) fn run(self, connection: &Connection, timeout: Duration) -> Result<()> {
        user_sql::run(connection, timeout, "the SQL of `commit_with`", self.0)
    }
}

impl fmt::Debug for OwnSql {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnSql").finish_non_exhaustive()
    }
}

//! The read connections.

use std::path::Path;

use r2d2_sqlite::SqliteConnectionManager;
use rusqlite::Connection;

use crate::builder::Settings;
use crate::connection::{self, Role};
use crate::error::Result;

/// Read connections, shared by all calls.
#[derive(Clone, Debug)]
pub(crate) struct Pool(r2d2::Pool<SqliteConnectionManager>);

impl Pool {
    pub(crate) fn open(path: &Path, settings: &Settings) -> Result<Self> {
        let (timeout, durability) = (settings.busy_timeout, settings.durability);
        let manager = SqliteConnectionManager::file(path)
            .with_flags(connection::flags(Role::Reader, false))
            .with_init(move |connection| {
                connection::wait_for_locks(connection, timeout)?;
                connection::settle(connection, Role::Reader, durability)
            });
        let pool = r2d2::Pool::builder()
            .max_size(settings.read_connections)
            // What a failed connection says comes back to the caller; nothing is to be logged.
            .error_handler(Box::new(r2d2::NopErrorHandler))
            // A connection to a file does not go stale, so there is nothing to test before each use.
            .test_on_check_out(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .connection_timeout(timeout)
            .build(manager)?;
        Ok(Self(pool))
    }

    pub(crate) fn with<T>(&self, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        work(&*self.0.get()?)
    }
}

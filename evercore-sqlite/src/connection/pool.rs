//! The read connections. Each is opened when it is first needed, and stays open until the store is closed.

use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use evercore_core::{Error, ErrorKind};
use rusqlite::Connection;

use crate::connection::open::{self, Role};
use crate::error::Result;
use crate::settings::Settings;

/// The read connections of one store, shared by all calls.
#[derive(Debug)]
pub(crate) struct Readers {
    path: PathBuf,
    settings: Settings,
    state: Mutex<State>,
    /// Rung when a connection is returned.
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Connection>,
    in_use: u32,
    /// Connections for long work, which the limit does not count.
    separate: u32,
    is_closed: bool,
}

impl Readers {
    pub(crate) fn new(path: PathBuf, settings: Settings) -> Self {
        Self { path, settings, state: Mutex::default(), returned: Condvar::new() }
    }

    /// Reads on one of the shared connections, as soon as one is free.
    pub(crate) fn read<T>(&self, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        let mut checkout = self.check_out()?;
        let connection = match checkout.connection.take() {
            Some(idle) => idle,
            None => self.open()?,
        };
        work(checkout.connection.insert(connection))
    }

    /// Reads on a separate connection, which is closed afterwards. For long work.
    pub(crate) fn read_separately<T>(&self, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        let mut state = self.lock();
        if state.is_closed {
            return Err(Error::closed().into());
        }
        state.separate += 1;
        drop(state);
        let mut checkout = Checkout { readers: self, connection: None, is_separate: true };
        work(checkout.connection.insert(self.open()?))
    }

    /// Closes all connections, after running reads have ended.
    pub(crate) fn close(&self) {
        self.abandon();
        let mut state = self.lock();
        while state.in_use + state.separate > 0 {
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Closes idle connections now, and the others when they are returned.
    pub(crate) fn abandon(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        let idle = std::mem::take(&mut state.idle);
        drop(state);
        drop(idle);
        self.returned.notify_all();
    }

    /// An idle connection, or the right to open one.
    fn check_out(&self) -> Result<Checkout<'_>> {
        let mut until = None;
        let mut state = self.lock();
        loop {
            if state.is_closed {
                return Err(Error::closed().into());
            }
            if let Some(connection) = state.idle.pop() {
                state.in_use += 1;
                return Ok(Checkout { readers: self, connection: Some(connection), is_separate: false });
            }
            if state.in_use < self.settings.read_connections {
                state.in_use += 1;
                return Ok(Checkout { readers: self, connection: None, is_separate: false });
            }
            let now = Instant::now();
            let until = *until.get_or_insert(now + self.settings.busy_timeout);
            if now >= until {
                return Err(none_free().into());
            }
            let waited = self.returned.wait_timeout(state, until - now);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn open(&self) -> Result<Connection> {
        let role = if self.settings.immutable { Role::Immutable } else { Role::Reader };
        open::configured(&self.path, role, false, &self.settings)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No read connection became free in time.
pub(crate) fn none_free() -> Error {
    Error::new(ErrorKind::Unavailable, "no read connection became free within the busy time-out")
}

/// A connection in use. It is returned when this is dropped.
struct Checkout<'a> {
    readers: &'a Readers,
    /// None until it is opened.
    connection: Option<Connection>,
    is_separate: bool,
}

impl Drop for Checkout<'_> {
    fn drop(&mut self) {
        let mut state = self.readers.lock();
        if self.is_separate || state.is_closed {
            // Closed before it is no longer counted: when the count is 0, the file must be free.
            drop(state);
            drop(self.connection.take());
            state = self.readers.lock();
        }
        state.idle.extend(self.connection.take());
        if self.is_separate {
            state.separate -= 1;
        } else {
            state.in_use -= 1;
        }
        drop(state);
        self.readers.returned.notify_all();
    }
}

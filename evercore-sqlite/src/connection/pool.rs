//! The read connections: each is opened when it is first needed, and kept until the store is closed.

use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use evercore_core::{Error, ErrorKind};
use rusqlite::Connection;

use crate::connection::open::{self, Role};
use crate::error::{Result, closed};
use crate::settings::Settings;

/// The read connections of one store, shared by all calls.
#[derive(Debug)]
pub(crate) struct Readers {
    path: PathBuf,
    settings: Settings,
    state: Mutex<State>,
    /// Rung when a connection comes back.
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Connection>,
    lent: u32,
    /// Connections of their own for long work, which are not counted against the bound.
    apart: u32,
    is_closed: bool,
}

impl Readers {
    pub(crate) fn new(path: PathBuf, settings: Settings) -> Self {
        Self { path, settings, state: Mutex::default(), returned: Condvar::new() }
    }

    /// Reads on one of the shared connections, once one is free.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        let mut lent = self.lend()?;
        let connection = match lent.connection.take() {
            Some(idle) => idle,
            None => self.open()?,
        };
        work(lent.connection.insert(connection))
    }

    /// Reads for long on a connection of its own, which is closed afterwards.
    pub(crate) fn apart<T>(&self, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        let mut state = self.lock();
        if state.is_closed {
            return Err(closed().into());
        }
        state.apart += 1;
        drop(state);
        let mut lent = Lent { readers: self, connection: None, is_apart: true };
        work(lent.connection.insert(self.open()?))
    }

    /// Closes all connections, after the reads under way have ended.
    pub(crate) fn close(&self) {
        self.abandon();
        let mut state = self.lock();
        while state.lent + state.apart > 0 {
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Closes what is idle now; what is in use is closed when it comes back.
    pub(crate) fn abandon(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        let idle = std::mem::take(&mut state.idle);
        drop(state);
        drop(idle);
        self.returned.notify_all();
    }

    /// An idle connection, or the right to open one.
    fn lend(&self) -> Result<Lent<'_>> {
        let mut until = None;
        let mut state = self.lock();
        loop {
            if state.is_closed {
                return Err(closed().into());
            }
            if let Some(connection) = state.idle.pop() {
                state.lent += 1;
                return Ok(Lent { readers: self, connection: Some(connection), is_apart: false });
            }
            if state.lent < self.settings.read_connections {
                state.lent += 1;
                return Ok(Lent { readers: self, connection: None, is_apart: false });
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
        let role = if self.settings.immutable { Role::Archive } else { Role::Reader };
        open::ready(&self.path, role, false, &self.settings)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No read connection became free in time.
pub(crate) fn none_free() -> Error {
    Error::new(ErrorKind::Unavailable, "no read connection became free within the busy time-out")
}

/// A connection in use; it goes back when this is dropped.
struct Lent<'a> {
    readers: &'a Readers,
    /// None until it is opened.
    connection: Option<Connection>,
    is_apart: bool,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut state = self.readers.lock();
        if self.is_apart || state.is_closed {
            // Closed before it is counted as gone: after the last one the file is free.
            drop(state);
            drop(self.connection.take());
            state = self.readers.lock();
        }
        state.idle.extend(self.connection.take());
        if self.is_apart {
            state.apart -= 1;
        } else {
            state.lent -= 1;
        }
        drop(state);
        self.readers.returned.notify_all();
    }
}

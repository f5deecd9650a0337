//! A panic that travels as an error.

use std::any::Any;
use std::fmt;
use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};

use crate::error::Error;

/// A panic of the user's code that an engine caught. It becomes the source of an [`Error`].
///
/// For engines: code of the user may run on another thread, or in a transaction that must be rolled back first. In the
/// caller, [`Error::resume_panic`] lets the panic continue.
pub struct CaughtPanic(Mutex<Option<Box<dyn Any + Send>>>);

impl CaughtPanic {
    /// What [`catch_unwind`](std::panic::catch_unwind) returned.
    pub fn new(payload: Box<dyn Any + Send>) -> Self {
        Self(Mutex::new(Some(payload)))
    }

    /// Lets the panic continue, the first time that this is called.
    pub fn resume(&self) {
        let payload = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }
}

impl fmt::Debug for CaughtPanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CaughtPanic")
    }
}

impl fmt::Display for CaughtPanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a panic")
    }
}

impl std::error::Error for CaughtPanic {}

impl Error {
    /// Lets the panic continue if a [`CaughtPanic`] is the source of this error; otherwise returns the error. For engines,
    /// in the caller's own task.
    #[must_use]
    pub fn resume_panic(self) -> Self {
        if let Some(panic) = self.cause::<CaughtPanic>() {
            panic.resume();
        }
        self
    }
}

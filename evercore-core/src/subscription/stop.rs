//! The shutdown of one worker, shared by its runners.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::race::Signal;

/// Whether the worker is shutting down.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    is_set: Arc<AtomicBool>,
    signal: Signal,
}

impl Stop {
    pub(crate) fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    /// Waits for the shutdown.
    pub(crate) async fn set(&self) {
        self.signal.after(0).await;
    }

    pub(crate) fn set_now(&self) {
        self.is_set.store(true, Ordering::Release);
        self.signal.send();
    }

    /// The flag alone, for deliveries.
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.is_set)
    }
}

//! The shutdown of one worker, shared by its runners.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::race::Signal;

/// Whether the worker is shutting down.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    is_set: Arc<AtomicBool>,
    signal: Signal,
    /// How many cursors this worker has.
    held: AtomicUsize,
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

    pub(crate) fn set_held(&self, cursors: usize) {
        self.held.store(cursors, Ordering::Relaxed);
    }

    /// Whether this worker may release a cursor to another owner. It may release its last one too: nobody asks for it but
    /// a newer version that is about to take over.
    pub(crate) fn may_give_up(&self) -> bool {
        self.held.load(Ordering::Relaxed) > 0
    }
}

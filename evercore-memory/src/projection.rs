//! Projections into a value in memory. The value and the cursor change together or not at all.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use evercore_core::engine::{Advance, Outcome, Sink, Step};
use evercore_core::{BoxError, BoxFuture, Delivery};

use crate::memory_engine::MemoryEngine;

type Handle<S> = Box<dyn Fn(&mut S, &Delivery) -> Result<(), BoxError> + Send + Sync>;

/// A value that a subscription updates exactly once per event. The other engines have tables for this, which they
/// write in the same transaction as the cursor.
///
/// Made by [`MemoryEngine::projection`].
pub struct Projection<S> {
    engine: MemoryEngine,
    value: Arc<Mutex<S>>,
    handle: Handle<S>,
}

impl MemoryEngine {
    /// A projection into this value, for [`Subscription::run_sink`](evercore_core::Subscription::run_sink). The handler
    /// works on a copy, which replaces the value when the cursor moves. After an error, a panic or a lost lease the
    /// value is unchanged.
    ///
    /// The handler runs while the store is locked, so it must not call the store. Only this projection may write the
    /// value; a write from elsewhere is lost if a handler is running.
    pub fn projection<S, F>(&self, value: Arc<Mutex<S>>, handle: F) -> Projection<S>
    where
        S: Clone + Send + 'static,
        F: Fn(&mut S, &Delivery) -> Result<(), BoxError> + Send + Sync + 'static,
    {
        Projection { engine: self.clone(), value, handle: Box::new(handle) }
    }
}

impl<S: Clone> Projection<S> {
    fn handle_now(&self, delivery: &Delivery, advance: &Advance) -> Outcome {
        let mut state = match self.engine.state() {
            Ok(state) => state,
            Err(error) => return Outcome::Refused(error),
        };
        let outcome = match state.take(delivery.cursor(), &Step::Advance(advance.clone())) {
            Ok(outcome) => outcome,
            Err(error) => return Outcome::Refused(error),
        };
        // The value is not locked while the handler runs: a panic in the handler would poison the mutex.
        let mut next = self.value().clone();
        if let Err(error) = (self.handle)(&mut next, delivery) {
            return Outcome::Failed { handled: 0, error };
        }
        *self.value() = next;
        match state.put(delivery.cursor(), outcome) {
            Some(cursor) => Outcome::Advanced(cursor),
            None => Outcome::Handled(delivery.events().len()),
        }
    }

    fn value(&self) -> MutexGuard<'_, S> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Clone + Send> Sink for Projection<S> {
    fn deliver<'a>(&'a self, delivery: &'a Delivery, advance: &'a Advance) -> BoxFuture<'a, Outcome> {
        Box::pin(async move { self.handle_now(delivery, advance) })
    }

    fn tells_which(&self) -> bool {
        false
    }

    fn holds_cursor(&self) -> bool {
        true
    }
}

impl<S> fmt::Debug for Projection<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Projection").field("engine", &self.engine).finish_non_exhaustive()
    }
}

//! The end of the log that this engine has seen.

use evercore_core::Position;
use tokio::sync::watch;

/// The end of the log as far as this engine knows it, for all that wait for it to grow.
#[derive(Debug, Default)]
pub(crate) struct SeenHead(watch::Sender<i64>);

impl SeenHead {
    pub(crate) fn get(&self) -> Position {
        Position::new(*self.0.borrow()).unwrap_or_default()
    }

    /// A receiver for the end of the log. It wakes when the end changes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<i64> {
        self.0.subscribe()
    }

    /// Records that the log reaches at least this position.
    pub(crate) fn raise(&self, head: Position) {
        self.0.send_if_modified(|seen| {
            let is_further = *seen < head.get();
            *seen = head.get().max(*seen);
            is_further
        });
    }

    /// Records the end that a query has found; `known` is the end that was known when the query began. If the new end
    /// is smaller, the log has lost its tail, as a failover may cause, and callers must no longer see the lost end.
    pub(crate) fn found(&self, known: Position, head: Position) {
        self.0.send_if_modified(|seen| {
            let is_other = *seen < head.get() || (head < known && *seen == known.get());
            if is_other {
                *seen = head.get();
            }
            is_other
        });
    }

    /// Wakes all receivers, so that they see that the engine is closed.
    pub(crate) fn wake_all(&self) {
        self.0.send_modify(|_| {});
    }
}

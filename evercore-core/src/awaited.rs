//! Callers that wait until a subscription has reached a position.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use crate::ids::Position;
use crate::name::SubscriptionName;
use crate::race::{Signal, lock};

/// The callers that wait for subscriptions, by name.
#[derive(Debug, Default)]
pub(crate) struct Waits(Mutex<HashMap<SubscriptionName, Weak<Awaited>>>);

impl Waits {
    /// The callers that wait for this subscription.
    pub(crate) fn of(&self, name: &SubscriptionName) -> Arc<Awaited> {
        let mut known = lock(&self.0);
        if let Some(awaited) = known.get(name).and_then(Weak::upgrade) {
            return awaited;
        }
        known.retain(|_, awaited| awaited.strong_count() > 0);
        let awaited = Arc::default();
        known.insert(name.clone(), Arc::downgrade(&awaited));
        awaited
    }
}

/// The callers that wait for one subscription.
#[derive(Debug, Default)]
pub(crate) struct Awaited {
    targets: Mutex<BTreeMap<u64, Position>>,
    next: AtomicU64,
    /// Sent when one more caller waits.
    pub(crate) came: Signal,
    /// Sent when a cursor has reached a position for which a caller waits.
    pub(crate) reached: Signal,
}

impl Awaited {
    /// Waits for this position as long as the result lives.
    pub(crate) fn wait_for(self: &Arc<Self>, position: Position) -> Target {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.targets).insert(number, position);
        self.came.send();
        Target { awaited: Arc::clone(self), number }
    }

    /// Whether a caller waits for a position after the first and up to the second.
    pub(crate) fn is_between(&self, after: Position, up_to: Position) -> bool {
        lock(&self.targets).values().any(|target| *target > after && *target <= up_to)
    }

    /// A cursor has moved to this position.
    pub(crate) fn moved_to(&self, position: Position) {
        if self.is_between(Position::ZERO, position) {
            self.reached.send();
        }
    }
}

/// A caller that waits.
#[derive(Debug)]
pub(crate) struct Target {
    awaited: Arc<Awaited>,
    number: u64,
}

impl Drop for Target {
    fn drop(&mut self) {
        lock(&self.awaited.targets).remove(&self.number);
    }
}

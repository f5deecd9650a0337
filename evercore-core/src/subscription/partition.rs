//! Which partition an event belongs to.

use std::fmt;
use std::sync::Arc;

use crate::event::Event;
use crate::hash::hash;

/// The key by which events are divided among partitions.
#[derive(Clone)]
pub(crate) struct PartitionKey(Arc<dyn Fn(&Event) -> u64 + Send + Sync>);

impl PartitionKey {
    pub(crate) fn new<K: AsRef<[u8]>>(key: impl Fn(&Event) -> K + Send + Sync + 'static) -> Self {
        Self(Arc::new(move |event| hash([key(event).as_ref()])))
    }

    /// The partition of this event among so many. Without a key, that of its aggregate.
    pub(crate) fn partition_of(key: Option<&Self>, event: &Event, partitions: u32) -> u32 {
        let number = match key {
            Some(Self(key)) => key(event),
            // Ids are given out one after the other, so the remainder spreads them evenly. None is negative.
            None => event.aggregate().get().unsigned_abs(),
        };
        u32::try_from(number % u64::from(partitions.max(1))).unwrap_or(0)
    }
}

impl fmt::Debug for PartitionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PartitionKey")
    }
}

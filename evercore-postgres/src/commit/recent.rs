//! Remembers the aggregates that this engine has written, so that the next commit need not check each of them.
//!
//! A log can only lose its tail, in a failover or a restore: while an event is there, everything before it is there
//! too. So the newest event that this engine knows is a witness for all that it remembers. If a statement finds the
//! witness, it need not check the aggregates.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use evercore_core::engine::{Batch, Mark, NameTable, Witness};
use evercore_core::{AggregateId, Position, Receipt, Sequence};

/// How many aggregates to remember, which takes some megabytes. Then the older half is forgotten.
const MOST: usize = 1 << 16;

/// The memory that the flights of an engine share.
#[derive(Debug, Default)]
pub(crate) struct Recent(Mutex<Memory>);

/// The sequences of aggregates, and the witness for them.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    witness: Option<Witness>,
    recent: HashMap<AggregateId, Reached>,
    /// Those that were recent before. They are forgotten when the recent ones take their place.
    older: HashMap<AggregateId, Reached>,
}

/// The last known sequence of an aggregate, the mark of that event, and the id of the aggregate's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reached {
    pub(crate) type_id: u32,
    pub(crate) sequence: Sequence,
    pub(crate) mark: Mark,
}

impl Recent {
    pub(crate) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets everything, because the witness may be lost.
    pub(crate) fn forget(&self) {
        *self.memory() = Memory::default();
    }

    /// Records the batches of one transaction. If it has not checked for the present witness, its own last event cannot
    /// become the witness, so nothing is recorded.
    pub(crate) fn note(
        &self,
        batches: &[(&Batch, &Receipt)],
        checked_witness: Option<Witness>,
        table: &NameTable,
    ) {
        let mut memory = self.memory();
        if memory.witness != checked_witness {
            return;
        }
        let last = batches.iter().rfind(|(_, receipt)| receipt.last > Position::ZERO);
        let Some((_, last)) = last else { return };
        memory.witness = Some(Witness::new(last.last, last.mark));
        for (batch, receipt) in batches {
            let made = batch.creates().iter().map(|made| (made.id, &made.aggregate_type, Sequence::ZERO));
            let grown = batch.sequence_changes().iter();
            let grown = grown.map(|change| (change.aggregate, &change.aggregate_type, change.last));
            for (aggregate, aggregate_type, sequence) in made.chain(grown) {
                if let Some(type_id) = table.aggregate_type_id(aggregate_type) {
                    memory.insert(aggregate, Reached { type_id, sequence, mark: receipt.mark });
                }
            }
        }
    }
}

impl Memory {
    pub(crate) fn witness(&self) -> Option<Witness> {
        self.witness
    }

    /// The last known sequence of an aggregate. It holds while the witness is there.
    pub(crate) fn reached(&self, aggregate: AggregateId) -> Option<Reached> {
        self.recent.get(&aggregate).or_else(|| self.older.get(&aggregate)).copied()
    }

    fn insert(&mut self, aggregate: AggregateId, reached: Reached) {
        self.recent.insert(aggregate, reached);
        if self.recent.len() >= MOST / 2 {
            self.older = std::mem::take(&mut self.recent);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use evercore_core::engine::{Append, NewEvent, Payload};
    use evercore_core::{AggregateType, EventType, Metadata, Timestamp};

    use super::*;

    fn id(number: i64) -> AggregateId {
        AggregateId::new(number).unwrap()
    }

    /// One more event of an aggregate.
    fn grown(aggregate: i64, expected: i64) -> Batch {
        let event = NewEvent {
            event_type: EventType::new("Counted").unwrap(),
            payload: Payload::default(),
            time: Timestamp::MIN,
            metadata: Arc::new(Metadata::new()),
        };
        let (aggregate_type, expected) =
            (AggregateType::new("counter").unwrap(), Sequence::new(expected).unwrap());
        let mut batch = Batch::new();
        batch
            .append(Append { aggregate: id(aggregate), aggregate_type, expected, events: vec![event] })
            .unwrap();
        batch
    }

    fn table() -> NameTable {
        let mut table = NameTable::new();
        table.set_aggregate_type(1, &AggregateType::new("counter").unwrap());
        table
    }

    fn note(recent: &Recent, batch: &Batch, head: i64, checked_witness: Option<Witness>) {
        let receipt =
            Receipt::of(batch, Position::new(head).unwrap(), Timestamp::MIN).with_mark(Mark::random());
        recent.note(&[(batch, &receipt)], checked_witness, &table());
    }

    #[test]
    fn a_commit_becomes_the_witness_only_if_it_has_found_the_one_before() {
        let recent = Recent::default();
        note(&recent, &grown(7, 0), 0, None);
        let witness = || recent.memory().witness();
        let reached = |number| recent.memory().reached(id(number)).map(|reached| reached.sequence.get());
        let first = witness();
        assert_eq!(first.map(|witness| witness.position.get()), Some(1));
        // It has not checked: the first event may be lost, and with it aggregate 7.
        note(&recent, &grown(8, 4), 1, None);
        assert_eq!(witness(), first);
        assert_eq!(reached(8), None);
        note(&recent, &grown(8, 5), 2, first);
        assert_eq!((reached(7), reached(8)), (Some(1), Some(6)));
        assert_eq!(witness().map(|witness| witness.position.get()), Some(3));
        recent.forget();
        assert_eq!((witness(), reached(7)), (None, None));
    }

    #[test]
    fn the_memory_is_bounded() {
        let recent = Recent::default();
        for number in 1..=3 * MOST {
            let number = i64::try_from(number).unwrap();
            let witness = recent.memory().witness();
            note(&recent, &grown(number, 0), number, witness);
        }
        let memory = recent.memory();
        assert!(memory.recent.len() + memory.older.len() <= MOST);
        assert!(memory.reached(id(1)).is_none() && memory.reached(id(3 * MOST as i64)).is_some());
    }
}

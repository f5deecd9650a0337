//! What this engine has written need not be looked up again.
//!
//! A log may lose its tail, in a failover or a restore, and nothing else: while an event is still there, so is all that
//! was written before it. So the newest event of which this engine knows is a witness for all that it knows: a statement
//! that finds it need not look at each aggregate.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use evercore_core::{AggregateId, Batch, Mark, NameTable, Position, Receipt, Sequence, Witness};

/// How many aggregates are known before the older half of them is forgotten: some megabytes.
const MOST: usize = 1 << 16;

/// Shared by all flights of an engine.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    book: Mutex<Book>,
    /// Where the log ended when this engine last wrote to it.
    log_end: AtomicI64,
}

/// Up to where aggregates have been written, and the event that stands for it.
#[derive(Debug, Default)]
pub(crate) struct Book {
    witness: Option<Witness>,
    recent: HashMap<AggregateId, Reached>,
    /// Those that were recent before; forgotten when as many are recent again.
    older: HashMap<AggregateId, Reached>,
}

/// How far an aggregate has come at least, by which event, and the number of its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reached {
    pub(crate) type_number: u32,
    pub(crate) sequence: Sequence,
    pub(crate) mark: Mark,
}

impl Recent {
    pub(crate) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the log ended when this engine last wrote to it. It ends there or later, unless it has lost its tail.
    pub(crate) fn log_end(&self) -> Position {
        Position::new(self.log_end.load(Ordering::Relaxed)).unwrap_or_default()
    }

    /// Records the end of the log. A smaller one is taken too: then the log has lost its tail.
    pub(crate) fn ends_at(&self, log_end: Position) {
        self.log_end.store(log_end.get(), Ordering::Relaxed);
    }

    /// The witness may be gone, and with it what it stood for.
    pub(crate) fn forget(&self) {
        *self.book() = Book::default();
    }

    /// Notes what one transaction has written. Where it has not looked for the witness of what is known, it cannot take
    /// the witness's place.
    pub(crate) fn note(
        &self,
        batches: &[(&Batch, &Receipt)],
        looked_for: Option<Witness>,
        table: &NameTable,
    ) {
        let mut book = self.book();
        if book.witness != looked_for {
            return;
        }
        let last = batches.iter().rfind(|(_, receipt)| receipt.last > Position::ZERO);
        let Some((_, last)) = last else { return };
        book.witness = Some(Witness::new(last.last, last.mark));
        for (batch, receipt) in batches {
            let made = batch.creates().iter().map(|made| (made.id, &made.aggregate_type, Sequence::ZERO));
            let grown = batch.sequence_changes().iter();
            let grown = grown.map(|change| (change.aggregate, &change.aggregate_type, change.last));
            for (aggregate, aggregate_type, sequence) in made.chain(grown) {
                if let Some(type_number) = table.aggregate_type_number(aggregate_type) {
                    book.insert(aggregate, Reached { type_number, sequence, mark: receipt.mark });
                }
            }
        }
    }
}

impl Book {
    pub(crate) fn witness(&self) -> Option<Witness> {
        self.witness
    }

    /// What is known of an aggregate, as long as the witness is there.
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

    use evercore_core::{AggregateType, Append, EventType, Metadata, NewEvent, Payload, Timestamp};

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

    fn note(recent: &Recent, batch: &Batch, head: i64, looked_for: Option<Witness>) {
        let receipt =
            Receipt::of(batch, Position::new(head).unwrap(), Timestamp::MIN).with_mark(Mark::random());
        recent.note(&[(batch, &receipt)], looked_for, &table());
    }

    #[test]
    fn only_who_has_found_the_witness_takes_its_place() {
        let recent = Recent::default();
        note(&recent, &grown(7, 0), 0, None);
        let witness = || recent.book().witness();
        let reached = |number| recent.book().reached(id(number)).map(|reached| reached.sequence.get());
        let first = witness();
        assert_eq!(first.map(|witness| witness.position.get()), Some(1));
        // It has not looked: perhaps the first event is gone, and aggregate 7 with it.
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
    fn it_does_not_grow_for_ever() {
        let recent = Recent::default();
        for number in 1..=3 * MOST {
            let number = i64::try_from(number).unwrap();
            let witness = recent.book().witness();
            note(&recent, &grown(number, 0), number, witness);
        }
        let book = recent.book();
        assert!(book.recent.len() + book.older.len() <= MOST);
        assert!(book.reached(id(1)).is_none() && book.reached(id(3 * MOST as i64)).is_some());
    }
}

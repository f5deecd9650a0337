//! One commit. All checks run before the first write, so a failed check leaves nothing written.

use std::sync::Arc;

use evercore_core::engine::{Append, Batch, Checked, KnownCommand, Lookup, Mark, Snapshot, StoredAggregate};
use evercore_core::{AggregateId, AggregateType, CommandId, Error, Key, Receipt, Result, Timestamp};

use crate::state::{AggregateState, State, Stored, StoredCommand};

impl State {
    pub(crate) fn commit(&mut self, batch: &Batch) -> Result<Receipt> {
        let snapshots = match batch.check(&mut &*self)? {
            Checked::Done(receipt) => return Ok(receipt),
            Checked::Write { snapshots } => snapshots,
        };
        let now = self.now();
        let recorded_at = self.log.last().map_or(now, |last| last.recorded_at.max(now));
        let receipt = Receipt::of(batch, self.head(), recorded_at);
        let projected = self.project(batch, &receipt)?;
        self.write(batch, &snapshots, &receipt);
        projected.into_iter().for_each(|write| write());
        if batch.events() > 0 {
            self.move_inline();
        }
        Ok(receipt)
    }

    /// Writes a batch that has passed every check; nothing here can fail.
    fn write(&mut self, batch: &Batch, snapshots: &[(AggregateId, &Snapshot)], receipt: &Receipt) {
        for new in batch.creates() {
            self.types.entry(new.aggregate_type.clone()).or_default();
            self.aggregates.insert(
                new.id,
                AggregateState {
                    aggregate_type: new.aggregate_type.clone(),
                    key: None,
                    positions: Vec::new(),
                    snapshot: None,
                },
            );
        }
        self.write_keys(batch);
        for append in batch.appends() {
            self.write_events(append, receipt.recorded_at);
        }
        for (aggregate, snapshot) in snapshots {
            self.write_snapshot(*aggregate, snapshot);
        }
        if let Some(id) = batch.command_id() {
            let (fingerprint, receipt) = (batch.fingerprint(), receipt.clone());
            let recorded_at = receipt.recorded_at;
            let what = KnownCommand::Committed { fingerprint, receipt };
            self.commands.insert(id.clone(), StoredCommand { what, recorded_at });
        }
    }

    /// Removes the old keys before it adds the new ones, so that two aggregates can swap keys.
    fn write_keys(&mut self, batch: &Batch) {
        for change in batch.key_changes() {
            let old = self.aggregates.get_mut(&change.aggregate).and_then(|known| known.key.take());
            if let Some(old) = old {
                self.keys.remove(&(change.aggregate_type.clone(), old));
            }
        }
        for new in batch.creates() {
            if let Some(key) = &new.key {
                self.give_key(new.id, &new.aggregate_type, key);
            }
        }
        for change in batch.key_changes() {
            self.give_key(change.aggregate, &change.aggregate_type, &change.key);
        }
    }

    fn give_key(&mut self, id: AggregateId, aggregate_type: &AggregateType, key: &Key) {
        self.keys.insert((aggregate_type.clone(), key.clone()), id);
        if let Some(known) = self.aggregates.get_mut(&id) {
            known.key = Some(key.clone());
        }
    }

    fn write_events(&mut self, append: &Append, recorded_at: Timestamp) {
        let mut sequence = append.expected;
        for event in &append.events {
            sequence = sequence.next();
            let position = self.head().next();
            let (aggregate_type, event_type) = self.intern(&append.aggregate_type, &event.event_type);
            self.log.push(Stored {
                aggregate: append.aggregate,
                aggregate_type,
                sequence,
                event_type,
                time: event.time,
                recorded_at,
                payload: event.payload.clone(),
                metadata: Arc::clone(&event.metadata),
            });
            if let Some(known) = self.aggregates.get_mut(&append.aggregate) {
                known.positions.push(position);
            }
        }
    }

    fn write_snapshot(&mut self, id: AggregateId, new: &Snapshot) {
        if let Some(known) = self.aggregates.get_mut(&id)
            && known.snapshot.as_ref().is_none_or(|stored| new.replaces(stored))
        {
            known.snapshot = Some(new.clone());
        }
    }

    /// The receipt of a command that took effect. Any other command is marked so that it can never take effect.
    pub(crate) fn settle(&mut self, id: &CommandId, now: Timestamp) -> Option<Receipt> {
        let abandoned = StoredCommand { what: KnownCommand::Abandoned, recorded_at: now };
        self.commands.entry(id.clone()).or_insert(abandoned).what.clone().into_receipt()
    }

    pub(crate) fn forget_commands(&mut self, before: Timestamp) -> u64 {
        let known = self.commands.len();
        self.commands.retain(|_, command| command.recorded_at >= before);
        (known - self.commands.len()) as u64
    }
}

/// Answers from the maps.
impl Lookup for &State {
    type Error = Error;

    fn command(&mut self, id: &CommandId) -> Result<Option<KnownCommand>> {
        Ok(self.commands.get(id).map(|known| known.what.clone()))
    }

    fn aggregate(&mut self, id: AggregateId) -> Result<Option<StoredAggregate>> {
        Ok(self.aggregates.get(&id).map(|known| StoredAggregate {
            aggregate_type: known.aggregate_type.clone(),
            sequence: known.sequence(),
            mark: Some(Mark::ALWAYS),
        }))
    }

    fn holder(&mut self, aggregate_type: &AggregateType, key: &Key) -> Result<Option<AggregateId>> {
        Ok(self.keys.get(&(aggregate_type.clone(), key.clone())).copied())
    }
}

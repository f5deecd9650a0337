//! One commit. All checks run before the first write, so a failed check leaves nothing written.

use std::collections::HashSet;
use std::sync::Arc;

use evercore_core::{
    AggregateId, AggregateType, Append, Batch, CommandId, Error, Key, KnownCommand, Mark, Receipt, Result,
    Sequence, Snapshot, Timestamp,
};

use crate::state::{AggregateState, State, Stored, StoredCommand};

impl State {
    pub(crate) fn commit(&mut self, batch: &Batch) -> Result<Receipt> {
        if let Some(first) = self.command_outcome(batch)? {
            return Ok(first);
        }
        self.check_creates(batch)?;
        self.check_sequences(batch)?;
        self.check_keys(batch)?;
        let now = self.now();
        let recorded_at = self.log.last().map_or(now, |last| last.recorded_at.max(now));
        let receipt = Receipt::of(batch, self.head(), recorded_at);
        let projected = self.project(batch, &receipt)?;
        self.write(batch, &receipt);
        projected.into_iter().for_each(|write| write());
        if batch.events() > 0 {
            self.move_inline();
        }
        Ok(receipt)
    }

    /// The command id is checked first: a repeated command gets its original outcome, whatever has happened since.
    fn command_outcome(&self, batch: &Batch) -> Result<Option<Receipt>> {
        let known = batch.command_id().and_then(|id| self.commands.get(id));
        known.map(|known| known.what.answer(batch)).transpose()
    }

    fn check_creates(&self, batch: &Batch) -> Result<()> {
        match batch.creates().iter().find(|new| self.aggregates.contains_key(&new.id)) {
            Some(new) => Err(Error::invalid(format!("aggregate {} exists already", new.id))),
            None => Ok(()),
        }
    }

    fn check_sequences(&self, batch: &Batch) -> Result<()> {
        for growth in batch.growths() {
            let (aggregate_type, actual) = self.find(batch, growth.aggregate)?;
            check_type(growth.aggregate, &growth.aggregate_type, aggregate_type)?;
            check_sequence(growth.aggregate, growth.expected, actual)?;
            batch.check_read(growth.aggregate, actual, Some(Mark::ALWAYS))?;
        }
        for guard in batch.guards() {
            let (_, actual) = self.find(batch, guard.aggregate)?;
            check_sequence(guard.aggregate, guard.expected, actual)?;
            batch.check_read(guard.aggregate, actual, Some(Mark::ALWAYS))?;
        }
        for (aggregate, _) in batch.snapshots() {
            self.find(batch, *aggregate)?;
        }
        Ok(())
    }

    /// A key is free if no aggregate holds it, or if its holder changes to another key in the same batch.
    fn check_keys(&self, batch: &Batch) -> Result<()> {
        let moving: HashSet<AggregateId> =
            batch.key_changes().iter().map(|change| change.aggregate).collect();
        let created =
            batch.creates().iter().filter_map(|new| Some((new.id, &new.aggregate_type, new.key.as_ref()?)));
        let changed =
            batch.key_changes().iter().map(|change| (change.aggregate, &change.aggregate_type, &change.key));
        for (id, aggregate_type, key) in created.chain(changed) {
            let holder = self.keys.get(&(aggregate_type.clone(), key.clone()));
            if holder.is_some_and(|holder| *holder != id && !moving.contains(holder)) {
                return Err(Error::key_taken(aggregate_type.clone()));
            }
        }
        for change in batch.key_changes() {
            let (aggregate_type, _) = self.find(batch, change.aggregate)?;
            check_type(change.aggregate, &change.aggregate_type, aggregate_type)?;
        }
        Ok(())
    }

    /// The type and sequence of an aggregate that exists or that the batch creates.
    fn find<'a>(&'a self, batch: &'a Batch, id: AggregateId) -> Result<(&'a AggregateType, Sequence)> {
        if let Some(known) = self.aggregates.get(&id) {
            return Ok((&known.aggregate_type, known.sequence()));
        }
        let made = batch.created(id).ok_or_else(|| Error::not_found(id))?;
        Ok((&made.aggregate_type, Sequence::ZERO))
    }

    /// Writes a batch that has passed every check; nothing here can fail.
    fn write(&mut self, batch: &Batch, receipt: &Receipt) {
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
        for (aggregate, snapshot) in batch.snapshots() {
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

    /// Drops a snapshot that is ahead of its aggregate or older than the stored one.
    fn write_snapshot(&mut self, id: AggregateId, new: &Snapshot) {
        let Some(known) = self.aggregates.get_mut(&id) else { return };
        let is_ahead = new.sequence > known.sequence();
        let is_behind = known
            .snapshot
            .as_ref()
            .is_some_and(|old| old.version == new.version && old.sequence > new.sequence);
        if !is_ahead && !is_behind {
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

fn check_type(id: AggregateId, expected: &AggregateType, actual: &AggregateType) -> Result<()> {
    if expected != actual {
        return Err(Error::wrong_type(id, expected.clone(), actual.clone()));
    }
    Ok(())
}

fn check_sequence(id: AggregateId, expected: Sequence, actual: Sequence) -> Result<()> {
    if expected != actual {
        return Err(Error::conflict(id, expected, actual));
    }
    Ok(())
}

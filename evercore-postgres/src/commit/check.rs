//! What the store knows of the aggregates, keys and commands that a flight touches, read under the lock; and every
//! reason to refuse a batch.

use std::collections::{HashMap, HashSet};

use evercore_core::{
    AggregateId, AggregateType, Batch, CommandId, Error, Key, KnownCommand, Mark, NameTable, Receipt,
    Result as CoreResult, Sequence,
};
use tokio_postgres::Row;

use crate::error::{Result, damaged};
use crate::names::{checked, stored};

/// The store as a batch finds it: what was read, and what earlier batches of the flight do to it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    aggregates: HashMap<i64, Aggregate>,
    holders: HashMap<(u32, String), i64>,
    commands: HashMap<String, KnownCommand>,
}

#[derive(Clone, Debug)]
struct Aggregate {
    type_number: u32,
    sequence: Sequence,
    /// The mark of its last event, unless that is written by this flight.
    mark: Option<Mark>,
    key: Option<String>,
}

/// What to ask the store about some batches.
#[derive(Debug, Default)]
pub(crate) struct Questions {
    pub(crate) aggregates: Vec<i64>,
    pub(crate) key_types: Vec<i32>,
    pub(crate) keys: Vec<String>,
    pub(crate) commands: Vec<String>,
}

impl Questions {
    pub(crate) fn about(batches: &[&Batch], table: &NameTable) -> Self {
        let mut questions = Self::default();
        let mut aggregates = HashSet::new();
        for batch in batches {
            aggregates.extend(batch.creates().iter().map(|made| made.id.get()));
            aggregates.extend(batch.growths().iter().map(|growth| growth.aggregate.get()));
            aggregates.extend(batch.guards().iter().map(|guard| guard.aggregate.get()));
            aggregates.extend(batch.snapshots().iter().map(|(id, _)| id.get()));
            aggregates.extend(batch.key_changes().iter().map(|change| change.aggregate.get()));
            for (aggregate_type, key) in keys_of(batch) {
                let Some(number) = table.aggregate_type_number(aggregate_type) else { continue };
                questions.key_types.push(stored(number));
                questions.keys.push(key.as_str().to_owned());
            }
            questions.commands.extend(batch.command_id().map(|id| id.as_str().to_owned()));
        }
        questions.aggregates = aggregates.into_iter().collect();
        questions
    }
}

/// The keys that a batch gives.
fn keys_of(batch: &Batch) -> impl Iterator<Item = (&AggregateType, &Key)> {
    let made = batch.creates().iter().filter_map(|made| Some((&made.aggregate_type, made.key.as_ref()?)));
    made.chain(batch.key_changes().iter().map(|change| (&change.aggregate_type, &change.key)))
}

/// What the checks say of a batch that they do not refuse.
#[derive(Debug)]
pub(crate) enum Checked {
    /// It was written before.
    Done(Receipt),
    /// It may be written.
    Write,
}

impl Known {
    /// From the store's answers.
    pub(crate) fn read(aggregates: &[Row], holders: &[Row], commands: &[Row]) -> Result<Self> {
        let mut known = Self::default();
        for row in aggregates {
            let aggregate = Aggregate {
                type_number: checked(row.try_get(1)?)?,
                sequence: Sequence::new(row.try_get(3)?).map_err(damaged)?,
                mark: row.try_get::<_, Option<i64>>(4)?.map(Mark::new),
                key: row.try_get(2)?,
            };
            known.aggregates.insert(row.try_get(0)?, aggregate);
        }
        known = known.with_holders(holders)?;
        for row in commands {
            known.commands.insert(row.try_get(0)?, KnownCommand::stored(row.try_get(1)?, row.try_get(2)?)?);
        }
        Ok(known)
    }

    /// The same with other holders of keys.
    pub(crate) fn with_holders(mut self, holders: &[Row]) -> Result<Self> {
        self.holders.clear();
        for row in holders {
            self.holders.insert((checked(row.try_get(1)?)?, row.try_get(2)?), row.try_get(0)?);
        }
        Ok(self)
    }

    /// Whether a type among those read is not in the table.
    pub(crate) fn has_unknown_type(&self, table: &NameTable) -> bool {
        self.aggregates.values().any(|aggregate| table.aggregate_type(aggregate.type_number).is_none())
    }

    pub(crate) fn command(&self, id: &CommandId) -> Option<&KnownCommand> {
        self.commands.get(id.as_str())
    }

    /// Every reason to refuse the batch. The command id goes before everything else: what it did, it did, whatever has
    /// happened since.
    pub(crate) fn check(&self, batch: &Batch, table: &NameTable) -> CoreResult<Checked> {
        if let Some(command) = batch.command_id().and_then(|id| self.command(id)) {
            return command.answer(batch).map(Checked::Done);
        }
        for growth in batch.growths() {
            let found = self.find(batch, growth.aggregate, table)?;
            check_type(growth.aggregate, &growth.aggregate_type, &found, table)?;
            check_sequence(growth.aggregate, growth.expected, found.sequence)?;
            batch.check_read(growth.aggregate, found.sequence, found.mark)?;
            // Beyond the largest number there is no sequence: nobody can be there, so it is a conflict too.
            if growth.last == Sequence::MAX {
                return Err(Error::conflict(growth.aggregate, growth.expected, found.sequence));
            }
        }
        for guard in batch.guards() {
            let found = self.find(batch, guard.aggregate, table)?;
            check_sequence(guard.aggregate, guard.expected, found.sequence)?;
            batch.check_read(guard.aggregate, found.sequence, found.mark)?;
        }
        for (id, _) in batch.snapshots() {
            self.find(batch, *id, table)?;
        }
        self.check_keys(batch, table)?;
        match batch.creates().iter().find(|made| self.aggregates.contains_key(&made.id.get())) {
            Some(made) => Err(Error::invalid(format!("aggregate {} exists already", made.id))),
            None => Ok(Checked::Write),
        }
    }

    /// A key is free if nobody holds it, or if its holder gets another in the same batch.
    fn check_keys(&self, batch: &Batch, table: &NameTable) -> CoreResult<()> {
        let moving: HashSet<i64> = batch.key_changes().iter().map(|change| change.aggregate.get()).collect();
        for (aggregate_type, key) in keys_of(batch) {
            let Some(number) = table.aggregate_type_number(aggregate_type) else { continue };
            let holder = self.holders.get(&(number, key.as_str().to_owned()));
            if holder.is_some_and(|holder| !moving.contains(holder)) {
                return Err(Error::key_taken(aggregate_type.clone()));
            }
        }
        for change in batch.key_changes() {
            let found = self.find(batch, change.aggregate, table)?;
            check_type(change.aggregate, &change.aggregate_type, &found, table)?;
        }
        Ok(())
    }

    /// An aggregate that exists, or that the batch makes.
    fn find(&self, batch: &Batch, id: AggregateId, table: &NameTable) -> CoreResult<Aggregate> {
        if let Some(made) = batch.created(id) {
            let type_number = table.aggregate_type_number(&made.aggregate_type).unwrap_or_default();
            return Ok(Aggregate { type_number, sequence: Sequence::ZERO, mark: None, key: None });
        }
        self.aggregates.get(&id.get()).cloned().ok_or_else(|| Error::not_found(id))
    }

    /// Where an aggregate will be after the batch: what a snapshot must not be ahead of.
    pub(crate) fn sequence_after(&self, batch: &Batch, id: AggregateId) -> Sequence {
        let stored = || self.aggregates.get(&id.get()).map_or(Sequence::ZERO, |found| found.sequence);
        batch.growth_of(id).map_or_else(stored, |growth| growth.last)
    }

    /// Does to what is known what the batch will do to the store; a command id comes once in a flight.
    pub(crate) fn apply(&mut self, batch: &Batch, table: &NameTable) {
        for change in batch.key_changes() {
            let Some(known) = self.aggregates.get_mut(&change.aggregate.get()) else { continue };
            if let Some(old) = known.key.replace(change.key.as_str().to_owned()) {
                self.holders.remove(&(known.type_number, old));
            }
        }
        for made in batch.creates() {
            let type_number = table.aggregate_type_number(&made.aggregate_type).unwrap_or_default();
            let key = made.key.as_ref().map(|key| key.as_str().to_owned());
            let made_now = Aggregate { type_number, sequence: Sequence::ZERO, mark: None, key };
            self.aggregates.insert(made.id.get(), made_now);
        }
        let made = batch.creates().iter().filter_map(|made| Some((made.id, made.key.as_ref()?)));
        let changed = batch.key_changes().iter().map(|change| (change.aggregate, &change.key));
        for (id, key) in made.chain(changed) {
            let Some(known) = self.aggregates.get(&id.get()) else { continue };
            self.holders.insert((known.type_number, key.as_str().to_owned()), id.get());
        }
        for growth in batch.growths() {
            if let Some(known) = self.aggregates.get_mut(&growth.aggregate.get()) {
                (known.sequence, known.mark) = (growth.last, None);
            }
        }
    }
}

fn check_type(
    id: AggregateId,
    expected: &AggregateType,
    found: &Aggregate,
    table: &NameTable,
) -> CoreResult<()> {
    if table.aggregate_type_number(expected) == Some(found.type_number) {
        return Ok(());
    }
    let actual = table.aggregate_type(found.type_number).cloned();
    let actual = actual.ok_or_else(|| Error::from(damaged("an aggregate has an unknown type")))?;
    Err(Error::wrong_type(id, expected.clone(), actual))
}

fn check_sequence(id: AggregateId, expected: Sequence, actual: Sequence) -> CoreResult<()> {
    if actual == expected { Ok(()) } else { Err(Error::conflict(id, expected, actual)) }
}

//! The stored aggregates, keys and commands that a flight touches, read under the lock. They answer the questions of
//! [`Batch::check`], the rule that all engines share: a new check of a commit goes there.

use std::collections::{HashMap, HashSet};

use evercore_core::engine::{Batch, KnownCommand, Lookup, Mark, NameTable, StoredAggregate};
use evercore_core::{AggregateId, AggregateType, CommandId, Error, Key, Result as CoreResult, Sequence};
use tokio_postgres::Row;

use crate::error::{Result, damaged};
use crate::names::{sql_id, type_id};

/// The rows that a flight touches, as stored, and then as changed by its batches one after the other.
#[derive(Debug, Default)]
pub(crate) struct Known {
    aggregates: HashMap<i64, Aggregate>,
    holders: HashMap<(u32, String), i64>,
    commands: HashMap<String, KnownCommand>,
}

#[derive(Debug)]
struct Aggregate {
    type_id: u32,
    sequence: Sequence,
    /// The mark of its last event; `None` if this flight writes that event.
    mark: Option<Mark>,
    key: Option<String>,
}

/// The ids, keys and commands that some batches touch, as parameters of queries.
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
            aggregates.extend(batch.sequence_changes().iter().map(|change| change.aggregate.get()));
            aggregates.extend(batch.guards().iter().map(|guard| guard.aggregate.get()));
            aggregates.extend(batch.snapshots().iter().map(|(id, _)| id.get()));
            aggregates.extend(batch.key_changes().iter().map(|change| change.aggregate.get()));
            for (aggregate_type, key) in batch.keys() {
                let Some(type_id) = table.aggregate_type_id(aggregate_type) else { continue };
                questions.key_types.push(sql_id(type_id));
                questions.keys.push(key.as_str().to_owned());
            }
            questions.commands.extend(batch.command_id().map(|id| id.as_str().to_owned()));
        }
        questions.aggregates = aggregates.into_iter().collect();
        questions
    }
}

impl Known {
    /// From the rows of the queries.
    pub(crate) fn read(aggregates: &[Row], holders: &[Row], commands: &[Row]) -> Result<Self> {
        let mut known = Self::default();
        for row in aggregates {
            let aggregate = Aggregate {
                type_id: type_id(row.try_get(1)?)?,
                sequence: Sequence::new(row.try_get(3)?).map_err(damaged)?,
                mark: row.try_get::<_, Option<i64>>(4)?.map(Mark::new),
                key: row.try_get(2)?,
            };
            known.aggregates.insert(row.try_get(0)?, aggregate);
        }
        for row in holders {
            known.holders.insert((type_id(row.try_get(1)?)?, row.try_get(2)?), row.try_get(0)?);
        }
        for row in commands {
            known.commands.insert(row.try_get(0)?, KnownCommand::stored(row.try_get(1)?, row.try_get(2)?)?);
        }
        Ok(known)
    }

    /// Whether an aggregate has a type that is not in the table.
    pub(crate) fn has_unknown_type(&self, table: &NameTable) -> bool {
        self.aggregates.values().any(|aggregate| table.aggregate_type(aggregate.type_id).is_none())
    }

    /// Makes the changes of a batch. A command id comes only once in a flight, so commands need no change.
    pub(crate) fn apply(&mut self, batch: &Batch, table: &NameTable) {
        for change in batch.key_changes() {
            let Some(known) = self.aggregates.get_mut(&change.aggregate.get()) else { continue };
            if let Some(old) = known.key.replace(change.key.as_str().to_owned()) {
                self.holders.remove(&(known.type_id, old));
            }
        }
        for made in batch.creates() {
            let type_id = table.aggregate_type_id(&made.aggregate_type).unwrap_or_default();
            let key = made.key.as_ref().map(|key| key.as_str().to_owned());
            let made_now = Aggregate { type_id, sequence: Sequence::ZERO, mark: None, key };
            self.aggregates.insert(made.id.get(), made_now);
        }
        let made = batch.creates().iter().filter_map(|made| Some((made.id, made.key.as_ref()?)));
        let changed = batch.key_changes().iter().map(|change| (change.aggregate, &change.key));
        for (id, key) in made.chain(changed) {
            let Some(known) = self.aggregates.get(&id.get()) else { continue };
            self.holders.insert((known.type_id, key.as_str().to_owned()), id.get());
        }
        for change in batch.sequence_changes() {
            if let Some(known) = self.aggregates.get_mut(&change.aggregate.get()) {
                (known.sequence, known.mark) = (change.last, None);
            }
        }
    }
}

/// The rows, with the names that belong to their type ids.
pub(crate) struct Answers<'a> {
    pub(crate) known: &'a Known,
    pub(crate) table: &'a NameTable,
}

impl Lookup for Answers<'_> {
    type Error = Error;

    fn command(&mut self, id: &CommandId) -> CoreResult<Option<KnownCommand>> {
        Ok(self.known.commands.get(id.as_str()).cloned())
    }

    fn aggregate(&mut self, id: AggregateId) -> CoreResult<Option<StoredAggregate>> {
        let Some(found) = self.known.aggregates.get(&id.get()) else { return Ok(None) };
        let aggregate_type = self.table.aggregate_type(found.type_id).cloned();
        let aggregate_type = aggregate_type.ok_or_else(|| damaged("an aggregate has an unknown type"))?;
        Ok(Some(StoredAggregate { aggregate_type, sequence: found.sequence, mark: found.mark }))
    }

    fn holder(&mut self, aggregate_type: &AggregateType, key: &Key) -> CoreResult<Option<AggregateId>> {
        let Some(type_id) = self.table.aggregate_type_id(aggregate_type) else { return Ok(None) };
        let holder = self.known.holders.get(&(type_id, key.as_str().to_owned()));
        Ok(holder.copied().map(AggregateId::new).transpose().map_err(damaged)?)
    }
}

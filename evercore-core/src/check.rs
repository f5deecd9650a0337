//! The rule of a commit: every reason to refuse a batch, in one order that all engines share.

use crate::batch::{Batch, Receipt, Snapshot};
use crate::command::KnownCommand;
use crate::error::Error;
use crate::ids::{AggregateId, Sequence};
use crate::mark::Mark;
use crate::name::{AggregateType, CommandId, Key};

/// The lookups that [`Batch::check`] needs, answered by an engine from its store.
///
/// An engine may read each answer when it is asked for, or all of them before. No other commit may change an answer
/// before the batch is written.
pub trait Lookup {
    /// The error of a lookup that failed. A refusal of the batch is converted to this type, too.
    type Error: From<Error>;

    /// The stored command with this id; `None` if the store does not know it.
    ///
    /// # Errors
    /// If the lookup fails.
    fn command(&mut self, id: &CommandId) -> Result<Option<KnownCommand>, Self::Error>;

    /// The stored aggregate with this id; `None` if there is none.
    ///
    /// # Errors
    /// If the lookup fails.
    fn aggregate(&mut self, id: AggregateId) -> Result<Option<StoredAggregate>, Self::Error>;

    /// The aggregate of this type that has this natural key; `None` if the key is free.
    ///
    /// # Errors
    /// If the lookup fails.
    fn holder(
        &mut self,
        aggregate_type: &AggregateType,
        key: &Key,
    ) -> Result<Option<AggregateId>, Self::Error>;

    /// Whether an aggregate with this id exists. This is asked last, for each aggregate that the batch creates.
    ///
    /// An engine may always answer `false` if its insert fails for an id that is in use. That failure is then
    /// [`Error::id_in_use`], and nothing of the batch may remain.
    ///
    /// # Errors
    /// If the lookup fails.
    fn exists(&mut self, id: AggregateId) -> Result<bool, Self::Error> {
        Ok(self.aggregate(id)?.is_some())
    }
}

/// The part of a stored aggregate that a commit checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredAggregate {
    /// Its type.
    pub aggregate_type: AggregateType,
    /// The sequence of its last event; [`Sequence::ZERO`] if it has none.
    pub sequence: Sequence,
    /// The mark of its last event; [`Mark::ALWAYS`] if the log cannot lose its tail.
    pub mark: Option<Mark>,
}

/// The decision about a batch that is not refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checked<'b> {
    /// Write nothing and return this receipt: the command took effect before.
    Done(Receipt),
    /// Write the batch.
    Write {
        /// The snapshots of the batch that may be stored, if they [replace](Snapshot::replaces) the stored ones.
        snapshots: Vec<(AggregateId, &'b Snapshot)>,
    },
}

impl Batch {
    /// Decides whether this batch may be written.
    ///
    /// If a batch has several faults, the first one in this order is returned:
    ///
    /// 1. The command id. If the store knows it, nothing else is checked, and [`KnownCommand::answer`] decides.
    /// 2. Appends, in the order in which the batch first names the aggregates. For each: it exists, it has the expected
    ///    type, it has the expected sequence, and its last event is the one that was [read](Batch::has_read). A batch that
    ///    would reach [`Sequence::MAX`] is a conflict too.
    /// 3. Guards, in order. For each: the aggregate exists, has the expected sequence, and still has the event that was
    ///    read.
    /// 4. Snapshots: the aggregates exist.
    /// 5. Changed keys: the aggregates exist and have the expected type.
    /// 6. All keys that the batch gives, those of new aggregates first: each is free, or its holder gets another key in
    ///    the same batch.
    /// 7. New aggregates: their ids are not in use.
    ///
    /// An aggregate that the batch itself creates exists, and is at [`Sequence::ZERO`].
    ///
    /// # Errors
    /// [`CommandReused`](crate::ErrorKind::CommandReused), [`CommandAbandoned`](crate::ErrorKind::CommandAbandoned),
    /// [`NotFound`](crate::ErrorKind::NotFound), [`WrongType`](crate::ErrorKind::WrongType),
    /// [`Conflict`](crate::ErrorKind::Conflict), [`KeyTaken`](crate::ErrorKind::KeyTaken); and
    /// [`Invalid`](crate::ErrorKind::Invalid) if the id of a new aggregate is in use. The engine's own error if a lookup
    /// fails.
    pub fn check<L: Lookup>(&self, store: &mut L) -> Result<Checked<'_>, L::Error> {
        if let Some(id) = self.command_id()
            && let Some(known) = store.command(id)?
        {
            return Ok(Checked::Done(known.answer(self)?));
        }
        for change in self.sequence_changes() {
            let found = self.find(store, change.aggregate)?;
            check_type(change.aggregate, &change.aggregate_type, &found)?;
            self.check_sequence(change.aggregate, change.expected, &found)?;
            // No event can have a sequence after the largest number.
            if change.last == Sequence::MAX {
                return Err(Error::conflict(change.aggregate, change.expected, found.sequence).into());
            }
        }
        for guard in self.guards() {
            let found = self.find(store, guard.aggregate)?;
            self.check_sequence(guard.aggregate, guard.expected, &found)?;
        }
        let snapshots =
            self.snapshots_to_keep(|id| self.find(store, id).map(|aggregate| aggregate.sequence))?;
        for change in self.key_changes() {
            let found = self.find(store, change.aggregate)?;
            check_type(change.aggregate, &change.aggregate_type, &found)?;
        }
        for (aggregate_type, key) in self.keys() {
            if store.holder(aggregate_type, key)?.is_some_and(|holder| !self.changes_key(holder)) {
                return Err(Error::key_taken(aggregate_type.clone()).into());
            }
        }
        for new in self.creates() {
            if store.exists(new.id)? {
                return Err(Error::id_in_use(new.id).into());
            }
        }
        Ok(Checked::Write { snapshots })
    }

    /// The snapshots of this batch that may be stored: a snapshot must not be ahead of its aggregate after the batch.
    /// `stored` is asked for the sequence of aggregates that the batch neither creates nor appends to.
    ///
    /// # Errors
    /// Those of `stored`.
    pub fn snapshots_to_keep<E>(
        &self,
        mut stored: impl FnMut(AggregateId) -> Result<Sequence, E>,
    ) -> Result<Vec<(AggregateId, &Snapshot)>, E> {
        let mut kept = Vec::new();
        for (id, snapshot) in self.snapshots() {
            let after = self.sequence_after(*id).map_or_else(|| stored(*id), Ok)?;
            if snapshot.sequence <= after {
                kept.push((*id, snapshot));
            }
        }
        Ok(kept)
    }

    /// An aggregate that this batch creates, or that is stored.
    fn find<L: Lookup>(&self, store: &mut L, id: AggregateId) -> Result<StoredAggregate, L::Error> {
        if let Some(new) = self.created(id) {
            let aggregate_type = new.aggregate_type.clone();
            return Ok(StoredAggregate { aggregate_type, sequence: Sequence::ZERO, mark: None });
        }
        store.aggregate(id)?.ok_or_else(|| Error::not_found(id).into())
    }

    fn check_sequence(
        &self,
        id: AggregateId,
        expected: Sequence,
        found: &StoredAggregate,
    ) -> Result<(), Error> {
        if found.sequence != expected {
            return Err(Error::conflict(id, expected, found.sequence));
        }
        self.check_read(id, found.sequence, found.mark)
    }
}

impl Snapshot {
    /// Whether this snapshot takes the place of a stored one of the same aggregate: it does, unless it has the same
    /// version and is older.
    pub fn replaces(&self, stored: &Self) -> bool {
        self.version != stored.version || self.sequence >= stored.sequence
    }
}

fn check_type(id: AggregateId, expected: &AggregateType, found: &StoredAggregate) -> Result<(), Error> {
    if found.aggregate_type != *expected {
        return Err(Error::wrong_type(id, expected.clone(), found.aggregate_type.clone()));
    }
    Ok(())
}

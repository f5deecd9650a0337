//! The content of one commit, and its receipt.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::event::{NewEvent, Payload};
use crate::ids::{AggregateId, Position, Sequence};
use crate::limits;
use crate::mark::Mark;
use crate::metadata::Metadata;
use crate::name::{AggregateType, CommandId, Key};
use crate::time::Timestamp;

/// A new aggregate in a commit.
#[derive(Clone, Debug)]
pub struct NewAggregate {
    /// An id reserved for it.
    pub id: AggregateId,
    /// Its type.
    pub aggregate_type: AggregateType,
    /// Its natural key, if it has one.
    pub key: Option<Key>,
}

/// A new natural key of an aggregate. It replaces an older one.
#[derive(Clone, Debug)]
pub struct KeyChange {
    /// The aggregate.
    pub aggregate: AggregateId,
    /// Its type. The key must be free within this type.
    pub aggregate_type: AggregateType,
    /// Its new key.
    pub key: Key,
}

/// Consecutive new events of one aggregate. The engine numbers them from `expected + 1`.
#[derive(Clone, Debug)]
pub struct Append {
    /// The aggregate.
    pub aggregate: AggregateId,
    /// Its type.
    pub aggregate_type: AggregateType,
    /// The sequence that the aggregate must have, including events that the batch has added before.
    pub expected: Sequence,
    /// The events, in order; at least one.
    pub events: Vec<NewEvent>,
}

impl Append {
    /// The sequence of the last event, once they are written.
    pub fn last(&self) -> Sequence {
        self.expected.plus(self.events.len())
    }
}

/// The change that all appends of a batch together make to the sequence of one aggregate.
#[derive(Clone, Debug)]
pub struct SequenceChange {
    /// The aggregate.
    pub aggregate: AggregateId,
    /// Its type.
    pub aggregate_type: AggregateType,
    /// The sequence that it must have before the batch.
    pub expected: Sequence,
    /// The sequence that it has after the batch.
    pub last: Sequence,
}

/// An aggregate that was read and must not have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Guard {
    /// The aggregate.
    pub aggregate: AggregateId,
    /// The sequence that it must have.
    pub expected: Sequence,
}

/// The state of an aggregate after an event. It saves the replay of the events before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The sequence of the last event that is in the state.
    pub sequence: Sequence,
    /// The version of the state's shape; another version is not read.
    pub version: u32,
    /// The state, as its codec wrote it.
    pub state: Payload,
}

/// The content of one unit of work, in the form that an engine writes: all of it or nothing.
///
/// Its content is checked: names and values when they are made, limits and contradictions when they are added here.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    creates: Vec<NewAggregate>,
    key_changes: Vec<KeyChange>,
    appends: Vec<Append>,
    guards: Vec<Guard>,
    snapshots: Vec<(AggregateId, Snapshot)>,
    command_id: Option<CommandId>,
    fingerprint: Option<i64>,
    sequence_changes: Vec<SequenceChange>,
    created: HashMap<AggregateId, usize>,
    sequence_change_of: HashMap<AggregateId, usize>,
    given_keys: HashMap<(AggregateType, Key), AggregateId>,
    key_change_of: HashMap<AggregateId, usize>,
    snapshot_of: HashMap<AggregateId, usize>,
    known_guards: HashSet<Guard>,
    read: HashMap<AggregateId, (Sequence, Mark)>,
    events: usize,
    bytes: usize,
}

impl Batch {
    /// An empty batch, which writes nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a new aggregate.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the batch already makes an aggregate with that id, or
    /// [`limits::UNIT_AGGREGATES`] others;
    /// [`KeyTaken`](crate::ErrorKind::KeyTaken) if it already gives that key to another aggregate.
    pub fn create(&mut self, aggregate: NewAggregate) -> Result<()> {
        if self.created.contains_key(&aggregate.id) {
            return Err(Error::invalid(format!("aggregate {} is created twice", aggregate.id)));
        }
        check_limit("new aggregates", self.creates.len() + 1, limits::UNIT_AGGREGATES)?;
        if let Some(key) = &aggregate.key {
            self.give_key(aggregate.id, &aggregate.aggregate_type, key)?;
        }
        self.created.insert(aggregate.id, self.creates.len());
        self.creates.push(aggregate);
        Ok(())
    }

    /// Gives an aggregate another natural key; the last of several changes counts.
    ///
    /// # Errors
    /// [`KeyTaken`](crate::ErrorKind::KeyTaken) if the batch already gives that key to another aggregate;
    /// [`Invalid`](crate::ErrorKind::Invalid) if it changes the keys of [`limits::UNIT_AGGREGATES`] others.
    pub fn change_key(&mut self, change: KeyChange) -> Result<()> {
        // A new aggregate of this batch gets the key at once.
        if !self.created.contains_key(&change.aggregate)
            && !self.key_change_of.contains_key(&change.aggregate)
        {
            check_limit("key changes", self.key_changes.len() + 1, limits::UNIT_AGGREGATES)?;
        }
        self.give_key(change.aggregate, &change.aggregate_type, &change.key)?;
        if let Some(index) = self.created.get(&change.aggregate) {
            self.creates[*index].key = Some(change.key);
            return Ok(());
        }
        match self.key_change_of.entry(change.aggregate) {
            Entry::Occupied(place) => self.key_changes[*place.get()] = change,
            Entry::Vacant(place) => {
                place.insert(self.key_changes.len());
                self.key_changes.push(change);
            }
        }
        Ok(())
    }

    fn give_key(&mut self, id: AggregateId, aggregate_type: &AggregateType, key: &Key) -> Result<()> {
        let name = (aggregate_type.clone(), key.clone());
        if self.given_keys.get(&name).is_some_and(|holder| *holder != id) {
            return Err(Error::key_taken(aggregate_type.clone()));
        }
        let created = self.created.get(&id).and_then(|index| self.creates[*index].key.clone());
        let earlier =
            self.key_change_of.get(&id).map(|index| self.key_changes[*index].key.clone()).or(created);
        if let Some(earlier) = earlier {
            self.given_keys.remove(&(aggregate_type.clone(), earlier));
        }
        self.given_keys.insert(name, id);
        Ok(())
    }

    /// Adds events to an aggregate, after all other events of the batch. The log keeps the order of the appends.
    ///
    /// # Errors
    /// [`Conflict`](crate::ErrorKind::Conflict) if the batch already has events for that aggregate and `expected`
    /// does not follow them; [`Invalid`](crate::ErrorKind::Invalid) if the batch passes [`limits::UNIT_EVENTS`] or
    /// [`limits::UNIT_BYTES`].
    pub fn append(&mut self, append: Append) -> Result<()> {
        let events = self.events + append.events.len();
        let bytes =
            self.bytes + append.events.iter().map(|event| event.payload.as_bytes().len()).sum::<usize>();
        check_events(events, bytes)?;
        if append.events.is_empty() {
            return Ok(());
        }
        self.change_sequence(&append)?;
        (self.events, self.bytes) = (events, bytes);
        match self.appends.last_mut() {
            Some(last) if last.aggregate == append.aggregate => last.events.extend(append.events),
            _ => self.appends.push(append),
        }
        Ok(())
    }

    fn change_sequence(&mut self, append: &Append) -> Result<()> {
        match self.sequence_change_of.entry(append.aggregate) {
            Entry::Vacant(place) => {
                place.insert(self.sequence_changes.len());
                self.sequence_changes.push(SequenceChange {
                    aggregate: append.aggregate,
                    aggregate_type: append.aggregate_type.clone(),
                    expected: append.expected,
                    last: append.last(),
                });
            }
            Entry::Occupied(place) => {
                let known = &mut self.sequence_changes[*place.get()];
                if known.last != append.expected {
                    return Err(Error::conflict(append.aggregate, append.expected, known.last));
                }
                known.last = append.last();
            }
        }
        Ok(())
    }

    /// Requires that an aggregate is still at this sequence when the batch is written.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the batch has [`limits::UNIT_AGGREGATES`] other guards.
    pub fn guard(&mut self, guard: Guard) -> Result<()> {
        if !self.known_guards.contains(&guard) {
            check_limit("guards", self.guards.len() + 1, limits::UNIT_AGGREGATES)?;
            self.known_guards.insert(guard);
            self.guards.push(guard);
        }
        Ok(())
    }

    /// Names the last event of the aggregate when it was read, by sequence and mark. If the log has lost its tail since,
    /// another event may have that sequence. Appends and guards are then a conflict.
    ///
    /// # Errors
    /// [`Conflict`](crate::ErrorKind::Conflict) if the batch has read another event there.
    pub fn has_read(&mut self, aggregate: AggregateId, sequence: Sequence, mark: Mark) -> Result<()> {
        let read = *self.read.entry(aggregate).or_insert((sequence, mark));
        if read.0 == sequence && read.1 != mark {
            return Err(Error::other_event(aggregate, sequence));
        }
        Ok(())
    }

    /// The events that were named as read: aggregate, sequence and mark. In no order.
    pub fn reads(&self) -> impl Iterator<Item = (AggregateId, Sequence, Mark)> + '_ {
        self.read.iter().map(|(aggregate, (sequence, mark))| (*aggregate, *sequence, *mark))
    }

    /// The mark that the event at this sequence had when the aggregate was read, if it was named.
    pub fn mark_read(&self, aggregate: AggregateId, sequence: Sequence) -> Option<Mark> {
        self.read.get(&aggregate).filter(|read| read.0 == sequence).map(|read| read.1)
    }

    /// Checks that the last event of an aggregate is still the one that was read at this sequence; `found` is its mark now.
    ///
    /// # Errors
    /// [`Conflict`](crate::ErrorKind::Conflict) if it is another event.
    pub fn check_read(&self, aggregate: AggregateId, sequence: Sequence, found: Option<Mark>) -> Result<()> {
        match self.mark_read(aggregate, sequence) {
            Some(mark) if found != Some(mark) => Err(Error::other_event(aggregate, sequence)),
            _ => Ok(()),
        }
    }

    /// Adds a snapshot, in place of an earlier one of the same aggregate.
    pub fn snapshot(&mut self, aggregate: AggregateId, snapshot: Snapshot) {
        match self.snapshot_of.entry(aggregate) {
            Entry::Occupied(place) => self.snapshots[*place.get()].1 = snapshot,
            Entry::Vacant(place) => {
                place.insert(self.snapshots.len());
                self.snapshots.push((aggregate, snapshot));
            }
        }
    }

    /// Sets the command that the batch carries out, so that it takes effect once, and its fingerprint, if it has one. See
    /// [`Command`](crate::Command).
    pub fn set_command(&mut self, id: CommandId, fingerprint: Option<i64>) {
        (self.command_id, self.fingerprint) = (Some(id), fingerprint);
    }

    /// The new aggregates.
    pub fn creates(&self) -> &[NewAggregate] {
        &self.creates
    }

    /// The new aggregate with this id.
    pub fn created(&self, aggregate: AggregateId) -> Option<&NewAggregate> {
        self.created.get(&aggregate).map(|index| &self.creates[*index])
    }

    /// The aggregate to which this batch gives this key.
    pub fn holder_of(&self, aggregate_type: &AggregateType, key: &Key) -> Option<AggregateId> {
        self.given_keys.get(&(aggregate_type.clone(), key.clone())).copied()
    }

    /// The changed natural keys: at most one per aggregate, none for a new aggregate.
    pub fn key_changes(&self) -> &[KeyChange] {
        &self.key_changes
    }

    /// The keys that the batch gives, each with the aggregate type within which it must be free; those of new aggregates
    /// come first.
    pub fn keys(&self) -> impl Iterator<Item = (&AggregateType, &Key)> {
        let created = self.creates.iter().filter_map(|new| Some((&new.aggregate_type, new.key.as_ref()?)));
        created.chain(self.key_changes.iter().map(|change| (&change.aggregate_type, &change.key)))
    }

    /// Whether the batch gives another key to this stored aggregate, so that its old key becomes free.
    pub fn changes_key(&self, aggregate: AggregateId) -> bool {
        self.key_change_of.contains_key(&aggregate)
    }

    /// The appends, in the order in which their events go into the log. An aggregate may come several times. No append is
    /// empty.
    pub fn appends(&self) -> &[Append] {
        &self.appends
    }

    /// How the batch changes the sequences of the aggregates that it appends to, each aggregate once.
    pub fn sequence_changes(&self) -> &[SequenceChange] {
        &self.sequence_changes
    }

    /// How the batch changes the sequence of this aggregate, if it appends to it.
    pub fn sequence_change_of(&self, aggregate: AggregateId) -> Option<&SequenceChange> {
        self.sequence_change_of.get(&aggregate).map(|index| &self.sequence_changes[*index])
    }

    /// The sequence of this aggregate after the batch, if the batch creates it or appends to it.
    pub fn sequence_after(&self, aggregate: AggregateId) -> Option<Sequence> {
        let appended = self.sequence_change_of(aggregate).map(|change| change.last);
        appended.or_else(|| self.created(aggregate).map(|_| Sequence::ZERO))
    }

    /// The aggregates that must not have changed.
    pub fn guards(&self) -> &[Guard] {
        &self.guards
    }

    /// The snapshots, at most one per aggregate.
    pub fn snapshots(&self) -> &[(AggregateId, Snapshot)] {
        &self.snapshots
    }

    /// The command id, if the unit has one.
    pub fn command_id(&self) -> Option<&CommandId> {
        self.command_id.as_ref()
    }

    /// The fingerprint of the command, if it has one.
    pub fn fingerprint(&self) -> Option<i64> {
        self.fingerprint
    }

    /// How many events there are.
    pub fn events(&self) -> usize {
        self.events
    }

    /// How many payload bytes the events have.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// About how many bytes an engine sends to its store: payloads, metadata, snapshots, keys, and a constant for each row.
    /// Headers that consecutive events share count once. Engines use it to bound the size of a flight.
    pub fn encoded_bytes(&self) -> usize {
        let mut bytes = self.bytes + self.events * ROW_BYTES;
        let mut last: Option<&Arc<Metadata>> = None;
        for event in self.appends.iter().flat_map(|append| &append.events) {
            bytes += event.metadata.text_bytes();
            let is_shared = |last: &Arc<Metadata>| {
                Arc::ptr_eq(last, &event.metadata) || last.headers() == event.metadata.headers()
            };
            if !last.is_some_and(is_shared) {
                bytes += event.metadata.header_json_bytes();
                last = Some(&event.metadata);
            }
        }
        let keys = self
            .creates
            .iter()
            .map(|made| made.key.as_ref())
            .chain(self.key_changes.iter().map(|change| Some(&change.key)));
        bytes += keys.map(|key| ROW_BYTES + key.map_or(0, |key| key.as_str().len())).sum::<usize>();
        bytes += self
            .snapshots
            .iter()
            .map(|(_, snapshot)| ROW_BYTES + snapshot.state.as_bytes().len())
            .sum::<usize>();
        let checks = self.sequence_changes.len() + self.guards.len();
        bytes + checks * ROW_BYTES + self.command_id.as_ref().map_or(0, |id| ROW_BYTES + id.as_str().len())
    }

    /// Whether there is nothing to write and nothing to check.
    pub fn is_empty(&self) -> bool {
        self.creates.is_empty()
            && self.key_changes.is_empty()
            && self.appends.is_empty()
            && self.guards.is_empty()
            && self.snapshots.is_empty()
            && self.command_id.is_none()
    }
}

/// The bytes of a row besides its texts and payloads: numbers, times and lengths.
const ROW_BYTES: usize = 64;

/// Refuses more events, or payload bytes, than one unit of work may have.
///
/// # Errors
/// [`Invalid`](crate::ErrorKind::Invalid)
pub(crate) fn check_events(events: usize, bytes: usize) -> Result<()> {
    check_limit("events", events, limits::UNIT_EVENTS)?;
    check_limit("payload bytes", bytes, limits::UNIT_BYTES)
}

fn check_limit(what: &str, count: usize, limit: usize) -> Result<()> {
    if count > limit {
        let message = format!(
            "a unit of work with {count} {what}, the limit is {limit}: spread them over several units"
        );
        return Err(Error::invalid(message));
    }
    Ok(())
}

/// The result of a commit: the positions and sequences of its events.
///
/// A repeated command gets an equal receipt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The first position of the unit's events; [`Position::ZERO`] if it wrote none.
    pub first: Position,
    /// The last position of the unit's events; [`Position::ZERO`] if it wrote none. A reader that is past it has seen them
    /// all.
    pub last: Position,
    /// When it was committed, by the engine's clock.
    pub recorded_at: Timestamp,
    /// The mark of the unit's events.
    pub mark: Mark,
    /// The aggregates that were made or got events, each with its sequence after the commit; new ones first, then in the
    /// order of the batch.
    pub aggregates: Vec<(AggregateId, Sequence)>,
    pub(crate) repeat: Repeat,
}

/// Whether a receipt answers a repeated command. It does not count when receipts are compared.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Repeat(bool);

impl PartialEq for Repeat {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Repeat {}

impl Receipt {
    /// The receipt of a batch whose events follow `head`.
    pub fn of(batch: &Batch, head: Position, recorded_at: Timestamp) -> Self {
        let made =
            batch.creates().iter().map(|new| (new.id, batch.sequence_after(new.id).unwrap_or_default()));
        let appended =
            batch.sequence_changes().iter().filter(|change| batch.created(change.aggregate).is_none());
        let aggregates = made.chain(appended.map(|change| (change.aggregate, change.last))).collect();
        let (first, last) = match batch.events() {
            0 => (Position::ZERO, Position::ZERO),
            events => (head.next(), head.plus(events)),
        };
        Self { first, last, recorded_at, mark: Mark::ALWAYS, aggregates, repeat: Repeat::default() }
    }

    /// The same receipt with the mark of the events.
    #[must_use]
    pub fn with_mark(mut self, mark: Mark) -> Self {
        self.mark = mark;
        self
    }

    /// Whether this is the first receipt of a command that took effect before, and not the receipt of a commit that wrote
    /// just now. The two are equal. The text form of a receipt does not keep this.
    pub fn is_repeated(&self) -> bool {
        self.repeat.0
    }

    /// The same receipt as the answer to a repeated command.
    pub(crate) fn repeated(mut self) -> Self {
        self.repeat = Repeat(true);
        self
    }

    /// The sequence of this aggregate after the commit, if the unit made it or added events to it.
    pub fn sequence_of(&self, aggregate: AggregateId) -> Option<Sequence> {
        self.aggregates.iter().find(|(id, _)| *id == aggregate).map(|(_, sequence)| *sequence)
    }
}

/// The form in which engines store a receipt: `first last recorded_at mark;id sequence;id sequence…`.
impl fmt::Display for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.first, self.last, self.recorded_at.as_micros(), self.mark.get())?;
        self.aggregates.iter().try_for_each(|(id, sequence)| write!(f, ";{id} {sequence}"))
    }
}

impl std::str::FromStr for Receipt {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let damaged =
            || Error::new(crate::ErrorKind::NotAStore, "a stored receipt is damaged, restore a backup");
        let mut parts = text.split(';').map(|part| {
            part.split(' ').map(str::parse).collect::<Result<Vec<i64>, _>>().map_err(|_| damaged())
        });
        let head = parts.next().ok_or_else(damaged)??;
        let [first, last, recorded_at, mark] = head[..] else { return Err(damaged()) };
        // Each type checks its number. A bad number here means damage, not a mistake of the caller.
        let number = |error: Error| damaged().with_source(error);
        let pair = |part: Result<Vec<i64>>| match part?[..] {
            [id, sequence] => {
                let id = AggregateId::new(id).map_err(number)?;
                Ok((id, Sequence::new(sequence).map_err(number)?))
            }
            _ => Err(damaged()),
        };
        Ok(Self {
            first: Position::new(first).map_err(number)?,
            last: Position::new(last).map_err(number)?,
            recorded_at: Timestamp::from_micros(recorded_at).map_err(number)?,
            mark: Mark::new(mark),
            aggregates: parts.map(pair).collect::<Result<_>>()?,
            repeat: Repeat::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_damaged_receipt_is_not_a_store() {
        assert!("1 2 3 4;5 6".parse::<Receipt>().is_ok());
        let damaged =
            ["", "1 2 3", "1 2 3 x", "-1 2 3 4", "1 -2 3 4", "1 2 3 4;0 1", "1 2 3 4;5 -6", "1 2 3 4;5"];
        let beyond = format!("1 2 {} 4", i64::MAX);
        for text in damaged.into_iter().chain([beyond.as_str()]) {
            assert_eq!(*text.parse::<Receipt>().unwrap_err().kind(), ErrorKind::NotAStore, "{text}");
        }
    }
}

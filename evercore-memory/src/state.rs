//! The state of the engine: the log, the lookups into it, and the cursors.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use evercore_core::engine::{EventRow, EventsBuilder, KnownCommand, Payload, Snapshot};
use evercore_core::{
    AggregateId, AggregateType, BoxError, CommandId, Cursor, CursorId, Event, EventType, Events, Key,
    KnownType, Metadata, PageLimit, Parked, Position, Sequence, Timestamp,
};

/// The whole store. Only [`commit`](crate::commit) changes the log. The cursors are changed in
/// [`subscriptions`](crate::subscriptions).
#[derive(Default)]
pub(crate) struct State {
    pub(crate) clock: Clock,
    /// The log. The event at position p has index p - 1.
    pub(crate) log: Vec<Stored>,
    pub(crate) aggregates: HashMap<AggregateId, AggregateState>,
    pub(crate) keys: HashMap<(AggregateType, Key), AggregateId>,
    pub(crate) commands: HashMap<CommandId, StoredCommand>,
    pub(crate) types: BTreeMap<AggregateType, BTreeSet<EventType>>,
    pub(crate) reserved: i64,
    pub(crate) cursors: BTreeMap<CursorId, Cursor>,
    pub(crate) parked: HashMap<CursorId, BTreeMap<Position, Parked>>,
    pub(crate) inline: Vec<InlineProjection>,
    pub(crate) is_closed: bool,
}

/// The source of the current time.
pub(crate) struct Clock(pub(crate) Box<dyn Fn() -> Timestamp + Send + Sync>);

impl Default for Clock {
    fn default() -> Self {
        Self(Box::new(Timestamp::now))
    }
}

/// Stores the result of an inline handler.
pub(crate) type Write = Box<dyn FnOnce() + Send>;

type InlineHandle = dyn Fn(&[Event]) -> Result<Write, BoxError> + Send + Sync;

/// A projection that every commit updates.
pub(crate) struct InlineProjection {
    pub(crate) id: CursorId,
    pub(crate) handle: Box<InlineHandle>,
}

pub(crate) struct AggregateState {
    pub(crate) aggregate_type: AggregateType,
    pub(crate) key: Option<Key>,
    /// The log position of each event; sequence s has index s - 1.
    pub(crate) positions: Vec<Position>,
    pub(crate) snapshot: Option<Snapshot>,
}

pub(crate) struct Stored {
    pub(crate) aggregate: AggregateId,
    pub(crate) aggregate_type: AggregateType,
    pub(crate) sequence: Sequence,
    pub(crate) event_type: EventType,
    pub(crate) time: Timestamp,
    pub(crate) recorded_at: Timestamp,
    pub(crate) payload: Payload,
    pub(crate) metadata: Arc<Metadata>,
}

/// The outcome of a command id, and when it was recorded.
pub(crate) struct StoredCommand {
    pub(crate) what: KnownCommand,
    pub(crate) recorded_at: Timestamp,
}

impl AggregateState {
    pub(crate) fn sequence(&self) -> Sequence {
        Sequence::ZERO.plus(self.positions.len())
    }
}

impl State {
    pub(crate) fn now(&self) -> Timestamp {
        (self.clock.0)()
    }

    pub(crate) fn head(&self) -> Position {
        Position::ZERO.plus(self.log.len())
    }

    pub(crate) fn at(&self, position: Position) -> Option<&Stored> {
        self.log.get(usize::try_from(position.get()).ok()?.checked_sub(1)?)
    }

    /// Returns the shared copy of a type name, so that pages can compare names quickly.
    pub(crate) fn intern(
        &mut self,
        aggregate_type: &AggregateType,
        event_type: &EventType,
    ) -> (AggregateType, EventType) {
        let events = self.types.entry(aggregate_type.clone()).or_default();
        let event_type = match events.get(event_type) {
            Some(known) => known.clone(),
            None => {
                events.insert(event_type.clone());
                event_type.clone()
            }
        };
        let known = self.types.get_key_value(aggregate_type).map_or(aggregate_type, |(known, _)| known);
        (known.clone(), event_type)
    }

    pub(crate) fn known_types(&self) -> Vec<KnownType> {
        let known = |(aggregate_type, events): (&AggregateType, &BTreeSet<EventType>)| KnownType {
            aggregate_type: aggregate_type.clone(),
            event_types: events.iter().cloned().collect(),
        };
        self.types.iter().map(known).collect()
    }

    /// Fills a page from these positions, and returns whether the limit cut it short.
    pub(crate) fn page(&self, positions: impl Iterator<Item = Position>, limit: PageLimit) -> (Events, bool) {
        let mut page = EventsBuilder::new();
        for position in positions {
            let Some(event) = self.at(position) else { continue };
            if !page.push_within(limit, event.row(position)) {
                return (page.finish(), true);
            }
        }
        (page.finish(), false)
    }
}

impl Stored {
    pub(crate) fn row(&self, position: Position) -> EventRow<'_> {
        EventRow {
            position,
            aggregate: self.aggregate,
            aggregate_type: &self.aggregate_type,
            sequence: self.sequence,
            event_type: &self.event_type,
            time: self.time,
            recorded_at: self.recorded_at,
            payload: self.payload.as_bytes(),
            reference: self.metadata.reference(),
            correlation_id: self.metadata.correlation_id(),
            causation_id: self.metadata.causation_id(),
            headers: Some(self.metadata.headers()).filter(|headers| !headers.is_empty()),
        }
    }
}

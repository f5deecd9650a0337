//! The contract of an engine: one object-safe trait that needs only `std`.

use std::any::Any;
use std::fmt::{self, Debug};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use crate::aggregate::{Aggregate, aggregate_type};
use crate::batch::{Batch, Receipt, Snapshot};
use crate::command::KnownCommand;
use crate::error::{Error, Result};
use crate::event::{Event, EventRow, Events};
use crate::future::BoxFuture;
use crate::ids::{AggregateId, IdBlock, Position, Sequence};
use crate::mark::{Mark, Witness};
use crate::name::{AggregateType, CommandId, EventType, Key};
use crate::page_limit::PageLimit;
use crate::store_id::StoreId;
use crate::subscription::SubscriptionStorage;
use crate::target::Target;
use crate::time::Timestamp;
use crate::{limits, metadata};

/// The storage of events. Engines implement it, and [`EventStore`](crate::EventStore) calls it.
///
/// The bullets are the promises. Each has cases with a similar name in `evercore-testkit`, which an engine must pass.
///
/// Promises of the whole engine:
///
/// * every future may be dropped at any await without harm: nothing is half written, nothing is left locked;
/// * no call blocks the executor's thread on disk or network, unless the user asked for it;
/// * a begun page of the log that is not polled holds nothing that other calls need, since pages are read ahead;
/// * bad input never arrives here: names, keys, payloads and batches are checked when they are made;
/// * no error, log line or `Debug` output has a payload, a natural key or a password in it;
/// * an engine may intern type names, and an interner knows only names that have committed;
/// * all of a store is there after reopening, and after a crash all that was acknowledged: events, keys, snapshots,
///   commands with their content, cursors and parked events;
/// * after an answer no other answer is older: heads, waits, pages, loads and cursors show what was acknowledged;
/// * names, keys and command ids compare bytewise up to the last byte: texts that differ in case, or only by Unicode
///   normalisation, are different;
/// * an empty text is not the same as no text.
///
/// With [`Any`] an engine can tell whether a unit of work belongs to it. Every type implements it.
pub trait StorageEngine: SubscriptionStorage + Any + Debug + Send + Sync {
    /// The identity of the store. It is known when the engine is opened, so this call costs nothing.
    ///
    /// * all engines on one storage have the same identity, also after reopening, so a handle of one engine is good for
    ///   another; engines on different storages differ, and a handle of another store is refused. A copy is the same store.
    fn identity(&self) -> StoreId;

    /// Reserves `count` ids for new aggregates, at least 1 and at most [`limits::RESERVE_IDS`].
    ///
    /// * no id is given out twice, by any engine on the same storage, also after reopening;
    /// * unused ids are lost, which is harmless.
    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>>;

    /// Writes a batch.
    ///
    /// [`Batch::check`] is the rule by which a batch is refused or written. An engine looks up what the rule asks for, and
    /// keeps other commits out until the batch is written.
    ///
    /// * all of it is written, or nothing of it, and a large unit is seen whole or not at all;
    /// * after a failed unit its keys, its ids and its command id are free;
    /// * without a command id, a unit that is sent twice may land twice: this is the limit of the promise;
    /// * an acknowledged commit is durable, at the level that the user chose;
    /// * a stale append is a conflict, names expected and actual sequence, and writes nothing; so is a stale guard;
    /// * an append or a guard that [names the event](Batch::has_read) that was read is a conflict if another event now has
    ///   its sequence, as can happen after the log has lost its tail;
    /// * sequences go on from `expected + 1` without gaps, and positions from the head of the log without gaps, in commit
    ///   order; the events of a batch are contiguous, in the order of its appends;
    /// * a key held by another aggregate of the same type is `KeyTaken`; a key that the same batch takes from its
    ///   holder is free;
    /// * an aggregate that does not exist is `NotFound`, in an append, a guard, a changed key or a snapshot; an aggregate of
    ///   another type is `WrongType`; a new aggregate whose id is in use is `Invalid`;
    /// * a batch with several faults gets the error of the first, in the order of [`Batch::check`]: command id, appends, guards,
    ///   snapshots, changed keys, taken keys, ids in use;
    /// * the command id is checked before everything else, and [`KnownCommand::answer`] decides about a known one: the first
    ///   receipt comes back and nothing is written, unless both fingerprints have the same half and it differs: then it is
    ///   `CommandReused`; settled as never committed, `CommandAbandoned`;
    /// * an aggregate has one snapshot: a later snapshot, or one of another version, takes its place, an earlier one of the
    ///   same version does not; a snapshot that is ahead of the aggregate after the batch is not kept;
    /// * `recorded_at` is the time of the engine's clock, and never earlier than that of the event before, also when the clock
    ///   goes back.
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>>;

    /// The stored command with this id; `None` if the store does not know it.
    ///
    /// * a receipt keeps the order of its unit.
    fn command<'a>(&'a self, id: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>>;

    /// Settles whether the command with this id took effect: its receipt, or `None` for "never, and never will".
    ///
    /// * after `None`, a commit with that id is `CommandAbandoned`, also one that was sent before.
    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>>;

    /// Removes the commands that took effect or were settled before this time, by the engine's clock, and returns how many.
    ///
    /// * a command that is forgotten is unknown: a commit with its id takes effect;
    /// * younger commands are kept, and so is every event;
    /// * it delays no commit for long, also with very many commands. After a drop halfway, some are removed.
    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>>;

    /// Loads an aggregate: its newest usable snapshot and the events after it; `None` if there is no such aggregate.
    ///
    /// * a snapshot is usable if it has the requested version and is not ahead of the aggregate or of `up_to`;
    /// * `History::sequence` and the events belong to one moment.
    fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<Option<History>>>;

    /// A page of one aggregate's events; empty if there is no such aggregate.
    fn read_aggregate(&self, query: AggregateQuery) -> BoxFuture<'_, Result<Events>>;

    /// A page of the log.
    ///
    /// * a page is a prefix of the matching events: no event is skipped, none comes twice;
    /// * page after page gives the same events as the whole log, with every filter, limit and direction;
    /// * a page ends at `limit`, and no matching event is left up to `LogPage::scanned`;
    /// * a page that must look at events one by one, as for a filter with many event types, ends after
    ///   [`limits::PAGE_SCANNED`] positions ([`LogQuery::bounded`]), so that it returns soon in a log of any length;
    /// * a filter means the same to every engine: [`Filter::matches_row`] is the rule;
    /// * a name that no event has yet matches nothing, and matches as soon as one event has it;
    /// * reading forward from past the head is `CursorAhead`;
    /// * a page has the marks of the events at which it began and ended, so that the next read can see whether the log has
    ///   lost its tail in between.
    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>>;

    /// The position of the last event; [`Position::ZERO`] in an empty store.
    fn head(&self) -> BoxFuture<'_, Result<Position>>;

    /// The position of the last event recorded at this time or before, by `recorded_at`.
    fn position_at(&self, time: Timestamp) -> BoxFuture<'_, Result<Position>>;

    /// Waits until there is an event after this position, at most this long, and returns the head.
    ///
    /// * a commit through this engine wakes all waiters at once; two commits at once wake all waiters of both;
    /// * a commit without events ends no wait;
    /// * waiting ends when time is up, also while others commit and when the clock goes back.
    fn wait(&self, after: Position, at_most: Duration) -> BoxFuture<'_, Result<Position>>;

    /// Sleeps. This is core's only timer.
    fn pause(&self, time: Duration) -> BoxFuture<'_, ()>;

    /// Registers these names if they are new, and keeps them in memory for later calls. A second call is harmless.
    ///
    /// * a type without events is registered too.
    fn warmup<'a>(&'a self, types: &'a [KnownType]) -> BoxFuture<'a, Result<()>>;

    /// All names registered by commits and warm-ups, ordered.
    fn types(&self) -> BoxFuture<'_, Result<Vec<KnownType>>>;

    /// Closes the engine for all that share it.
    ///
    /// * a later call is `Closed`, and a wait that is under way ends as `Closed`, at once;
    /// * a commit that is under way has ended when this returns: its events are written, or it is an error;
    /// * closing again is harmless.
    fn close(&self) -> BoxFuture<'_, Result<()>>;
}

/// An aggregate type with the event types seen in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KnownType {
    /// The aggregate type.
    pub aggregate_type: AggregateType,
    /// Its event types.
    pub event_types: Vec<EventType>,
}

/// A request to load an aggregate.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    /// The aggregate.
    pub target: Target,
    /// The version that a usable snapshot has; `None` to load without a snapshot.
    pub snapshot: Option<u32>,
    /// The last sequence to load; [`Sequence::MAX`] for all.
    pub up_to: Sequence,
    /// The limit of events and bytes. [`StorageEngine::read_aggregate`] reads the rest.
    pub limit: PageLimit,
}

/// An aggregate as it is stored.
#[derive(Clone, Debug)]
pub struct History {
    /// Its id.
    pub id: AggregateId,
    /// Its type.
    pub aggregate_type: AggregateType,
    /// Its natural key.
    pub key: Option<Key>,
    /// The sequence of its last event, also if that is not loaded; [`Sequence::ZERO`] if it has none.
    pub sequence: Sequence,
    /// The mark of its last event, [`Mark::ALWAYS`] where the log cannot lose its tail; `None` if it has no event.
    pub mark: Option<Mark>,
    /// The snapshot, if a usable one was found.
    pub snapshot: Option<Snapshot>,
    /// The events after the snapshot, as many as the limit allows.
    pub events: Events,
}

/// The direction of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Oldest first.
    Forward,
    /// Newest first.
    Backward,
}

/// A query for a page of one aggregate's events.
#[derive(Clone, Copy, Debug)]
pub struct AggregateQuery {
    /// The aggregate.
    pub aggregate: AggregateId,
    /// The direction.
    pub direction: Direction,
    /// The start, which is excluded: forward, the first event is the one after it; backward, the one before it.
    pub from: Sequence,
    /// The end, which is included.
    pub to: Sequence,
    /// The limit of events and bytes.
    pub limit: PageLimit,
}

impl AggregateQuery {
    /// The events of this aggregate after this sequence, oldest first. [`Sequence::ZERO`] is the beginning.
    pub fn after(aggregate: AggregateId, sequence: Sequence) -> Self {
        let (direction, limit) = (Direction::Forward, PageLimit::default());
        Self { aggregate, direction, from: sequence, to: Sequence::MAX, limit }
    }

    /// The events of this aggregate before this sequence, newest first. [`Sequence::MAX`] is the end.
    pub fn before(aggregate: AggregateId, sequence: Sequence) -> Self {
        Self { direction: Direction::Backward, to: Sequence::ZERO, ..Self::after(aggregate, sequence) }
    }

    /// Ends at this sequence, which is included.
    #[must_use]
    pub fn up_to(mut self, sequence: Sequence) -> Self {
        self.to = sequence;
        self
    }

    /// Limits the events and bytes of a page.
    #[must_use]
    pub fn with_limit(mut self, limit: PageLimit) -> Self {
        self.limit = limit;
        self
    }
}

/// A filter of events. An event passes if it matches every part that is set.
///
/// A part that can be set several times, such as the aggregate type, matches if any of its values does.
///
/// ```
/// # use evercore_core::{Aggregate, Filter, Json, Result};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Clone, Default, Serialize, Deserialize)] struct Order;
/// # #[derive(Clone, Default, Serialize, Deserialize)] struct Invoice;
/// # #[derive(Serialize, Deserialize)] enum Done { Sent {} }
/// # impl Aggregate for Order { type Event = Done; type Codec = Json; const TYPE: &'static str = "order"; fn apply(&mut self, _: Done) {} }
/// # impl Aggregate for Invoice { type Event = Done; type Codec = Json; const TYPE: &'static str = "invoice"; fn apply(&mut self, _: Done) {} }
/// // Everything about case 4711, of orders and of invoices.
/// let filter = Filter::of::<Order>()?.and_of::<Invoice>()?.with_reference("4711")?;
/// # Ok::<(), evercore_core::Error>(())
/// ```
///
/// The SQL engines find an aggregate, a reference, a correlation id and up to [`limits::INDEXED_TYPES`] event types by an
/// index, so a filter that matches rarely does not read the whole log. They look at events one by one for a filter with
/// more types, or with several of these conditions. Then a page ends after [`limits::PAGE_SCANNED`] positions, and it may
/// be empty although a matching event comes later. `Debug` does not show the reference and the correlation id.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Filter {
    aggregate_types: Vec<AggregateType>,
    event_types: Vec<EventType>,
    aggregate: Option<AggregateId>,
    reference: Option<Arc<str>>,
    correlation_id: Option<Arc<str>>,
}

impl Filter {
    /// All events.
    pub fn all() -> Self {
        Self::default()
    }

    /// Only events of aggregates of the type `T`.
    ///
    /// # Errors
    /// [`InvalidName`](crate::ErrorKind::InvalidName) if `T::TYPE` breaks a rule.
    pub fn of<T: Aggregate>() -> Result<Self> {
        Self::all().and_of::<T>()
    }

    /// Also events of aggregates of the type `T`.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn and_of<T: Aggregate>(self) -> Result<Self> {
        Ok(self.with_aggregate_type(aggregate_type::<T>()?))
    }

    /// Also events of aggregates of this type. Without an aggregate type, all types pass.
    #[must_use]
    pub fn with_aggregate_type(mut self, aggregate_type: AggregateType) -> Self {
        self.aggregate_types.push(aggregate_type);
        self
    }

    /// Also events of this type. Without an event type, all types pass.
    #[must_use]
    pub fn with_event_type(mut self, event_type: EventType) -> Self {
        self.event_types.push(event_type);
        self
    }

    pub(crate) fn without_event_types(mut self) -> Self {
        self.event_types.clear();
        self
    }

    /// Only events of this aggregate, also if its natural key changes. [`EventStore::filter_by_key`](crate::EventStore::filter_by_key) finds the aggregate by
    /// its natural key.
    #[must_use]
    pub fn with_aggregate(mut self, aggregate: AggregateId) -> Self {
        self.aggregate = Some(aggregate);
        self
    }

    /// Only events with this [reference](crate::Metadata::with_reference).
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if no event can have it: with a NUL, or over
    /// [`limits::REFERENCE_BYTES`].
    pub fn with_reference(mut self, reference: impl AsRef<str>) -> Result<Self> {
        self.reference = Some(metadata::checked("reference", reference.as_ref())?);
        Ok(self)
    }

    /// Only events with this [correlation id](crate::Metadata::with_correlation_id).
    ///
    /// # Errors
    /// As [`with_reference`](Self::with_reference).
    pub fn with_correlation_id(mut self, id: impl AsRef<str>) -> Result<Self> {
        self.correlation_id = Some(metadata::checked("correlation id", id.as_ref())?);
        Ok(self)
    }

    /// The aggregate types that pass; empty if all do.
    pub fn aggregate_types(&self) -> &[AggregateType] {
        &self.aggregate_types
    }

    /// The event types that pass; empty if all do.
    pub fn event_types(&self) -> &[EventType] {
        &self.event_types
    }

    /// The aggregate whose events pass, if it is set.
    pub fn aggregate(&self) -> Option<AggregateId> {
        self.aggregate
    }

    /// The reference of events that pass, if it is set.
    pub fn reference(&self) -> Option<&str> {
        self.reference.as_deref()
    }

    /// The correlation id of events that pass, if it is set.
    pub fn correlation_id(&self) -> Option<&str> {
        self.correlation_id.as_deref()
    }

    /// Whether types of aggregates or of events are set.
    pub fn is_by_type(&self) -> bool {
        !(self.aggregate_types.is_empty() && self.event_types.is_empty())
    }

    /// Whether this event passes.
    pub fn matches(&self, event: &Event) -> bool {
        self.matches_row(&event.as_row())
    }

    /// Whether the event of this row passes. This is the rule for all engines.
    pub fn matches_row(&self, row: &EventRow<'_>) -> bool {
        self.aggregate.is_none_or(|wanted| wanted == row.aggregate)
            && self.reference().is_none_or(|wanted| row.reference == Some(wanted))
            && self.correlation_id().is_none_or(|wanted| row.correlation_id == Some(wanted))
            && self.matches_type(row.aggregate_type, row.event_type)
    }

    /// Whether events of this type, in aggregates of this type, pass.
    pub fn matches_type(&self, aggregate_type: &AggregateType, event: &EventType) -> bool {
        (self.aggregate_types.is_empty() || self.aggregate_types.contains(aggregate_type))
            && (self.event_types.is_empty() || self.event_types.contains(event))
    }
}

/// Shows only whether a reference and a correlation id are set, since they may name a person.
impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filter")
            .field("aggregate_types", &self.aggregate_types)
            .field("event_types", &self.event_types)
            .field("aggregate", &self.aggregate)
            .field("reference", &self.reference.is_some())
            .field("correlation_id", &self.correlation_id.is_some())
            .finish()
    }
}

/// A query for a page of the log.
#[derive(Clone, Debug)]
pub struct LogQuery {
    /// The direction.
    pub direction: Direction,
    /// The start, which is excluded: forward, the first event is the one after it; backward, the one before it.
    pub from: Position,
    /// The end, which is included.
    pub to: Position,
    /// The filter.
    pub filter: Filter,
    /// The limit of events and bytes.
    pub limit: PageLimit,
}

impl LogQuery {
    /// Everything after this position, oldest first. [`Position::ZERO`] is the beginning.
    pub fn after(position: Position) -> Self {
        Self {
            direction: Direction::Forward,
            from: position,
            to: Position::MAX,
            filter: Filter::all(),
            limit: PageLimit::default(),
        }
    }

    /// Everything before this position, newest first. [`Position::MAX`] is the end.
    pub fn before(position: Position) -> Self {
        Self { direction: Direction::Backward, to: Position::ZERO, ..Self::after(position) }
    }

    /// Ends at this position, which is included.
    #[must_use]
    pub fn up_to(mut self, position: Position) -> Self {
        self.to = position;
        self
    }

    /// Only events that pass this filter.
    #[must_use]
    pub fn with_filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// Limits the events and bytes of a page.
    #[must_use]
    pub fn with_limit(mut self, limit: PageLimit) -> Self {
        self.limit = limit;
        self
    }

    /// The positions to search in a log that ends at `head`, from the smallest to the largest, whatever the direction.
    ///
    /// # Errors
    /// [`CursorAhead`](crate::ErrorKind::CursorAhead) when reading forward from past the head.
    pub fn range(&self, head: Position) -> Result<RangeInclusive<i64>> {
        match self.direction {
            Direction::Forward if self.from > head => Err(Error::cursor_ahead(self.from, head)),
            Direction::Forward => Ok(self.from.next().get()..=self.to.min(head).get()),
            Direction::Backward => Ok(self.to.get().max(1)..=self.from.prev().min(head).get()),
        }
    }

    /// Whether an index gives the matching events and hardly any others, so that a page need not be
    /// [bounded](Self::bounded). `types` is the number of event types that pass the filter; `None` if all do.
    pub fn is_by_index(&self, types: Option<usize>) -> bool {
        let filter = &self.filter;
        let conditions = [filter.reference().is_some(), filter.correlation_id().is_some(), types.is_some()];
        let is_one = conditions.into_iter().filter(|is_set| *is_set).count() <= 1;
        // The events of an aggregate have a separate index, whatever else the filter asks.
        filter.aggregate().is_some()
            || types == Some(0)
            || is_one && types.is_none_or(|types| types <= limits::INDEXED_TYPES)
    }

    /// The part of this query that one page may search if it must look at events one by one: at most
    /// [`limits::PAGE_SCANNED`] positions of a log that ends at `head`.
    #[must_use]
    pub fn bounded(&self, head: Position) -> Self {
        let to = match self.direction {
            Direction::Forward => self.to.min(self.from.plus(limits::PAGE_SCANNED)),
            Direction::Backward => {
                let first = self.from.get().min(head.get().saturating_add(1));
                let last = first.saturating_sub(i64::try_from(limits::PAGE_SCANNED).unwrap_or(i64::MAX));
                self.to.max(Position::new(last).unwrap_or_default())
            }
        };
        Self { to, ..self.clone() }
    }

    /// The value of [`LogPage::scanned`] for a page that met its limit (`is_full`) or not.
    ///
    /// Forward, a full page was searched up to its last event, any other up to the head or `to`. Backward, a full page was
    /// searched down to its last event, any other down to `to`. The value never passes `from` in the other direction.
    pub fn scanned(&self, events: &Events, is_full: bool, head: Position) -> Position {
        let last = events.last().map(|event| event.position());
        match (is_full, self.direction) {
            (true, _) => last.unwrap_or(self.from),
            (false, Direction::Forward) => head.min(self.to).max(self.from),
            (false, Direction::Backward) => self.to.min(self.from),
        }
    }
}

/// A page of the log.
#[derive(Clone, Debug)]
pub struct LogPage {
    /// The events, in the requested order.
    pub events: Events,
    /// The end of the part that was searched: the `from` of the next page. It includes events that did
    /// not pass the filter.
    pub scanned: Position,
    /// The position of the last event of the log, as of this page.
    pub head: Position,
    /// The mark of the event at which the query began, if there is one.
    pub began: Option<Mark>,
    /// Forward, the mark of the event at `scanned`; at the beginning of the log [`Mark::ALWAYS`].
    pub ended: Option<Mark>,
}

impl LogPage {
    /// A page for this query, from a log that cannot lose its tail; `is_full` if the page met its limit.
    pub fn new(query: &LogQuery, events: Events, is_full: bool, head: Position) -> Self {
        let began = (query.from > Position::ZERO).then_some(Mark::ALWAYS);
        Self {
            scanned: query.scanned(&events, is_full, head),
            events,
            head,
            began,
            ended: Some(Mark::ALWAYS),
        }
    }

    /// Forward, the event at the end of the page. If it is unchanged later, the log before it is unchanged too.
    pub fn witness(&self) -> Option<Witness> {
        Some(Witness::new(self.scanned, self.ended?))
    }
}

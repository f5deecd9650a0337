//! The contract between evercore and its storage: one trait, object safe, in terms of `std` alone.

use crate::future::BoxFuture;
use crate::target::Target;
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
use crate::ids::{AggregateId, IdBlock, Position, Sequence};
use crate::mark::{Mark, Witness};
use crate::name::{AggregateType, CommandId, EventType, Key};
use crate::store_id::StoreId;
use crate::subscription::SubscriptionStorage;
use crate::time::Timestamp;
use crate::{limits, metadata};

/// Where the events lie. Implemented by engines, called by [`EventStore`](crate::EventStore).
///
/// The bullets are the promises; each has a case of the same words in `evercore-testkit`, which an engine must pass.
///
/// For the whole of an engine:
///
/// * every future may be dropped at any await without harm: nothing is half written, nothing is left locked;
/// * no call blocks the executor's thread on disk or network, unless the user asked for it;
/// * a page of the log that was begun holds nothing that others need while nobody polls it: it is read ahead;
/// * bad input never arrives here: names, keys, payloads and batches were checked where they were born;
/// * nothing it says, logs or shows by `Debug` has a payload, a natural key or a password in it;
/// * type names are the engine's to intern, and an interner remembers only what has committed;
/// * all of a store is there after reopening, and after a crash all that was acknowledged: events, keys, snapshots,
///   commands with their content, cursors and parked events;
/// * after an answer nothing tells of less: heads, waits, pages, loads and cursors have what was acknowledged;
/// * names, keys and command ids compare bytewise up to the last byte: those that differ in case, or only by Unicode
///   normalisation, are different;
/// * empty texts are not none.
///
/// [`Any`] is here so that an engine can tell whether a unit of work is its own; it is implemented by itself.
pub trait StorageEngine: SubscriptionStorage + Any + Debug + Send + Sync {
    /// Which store this is. Known when the engine is opened, so that asking costs nothing.
    ///
    /// * all engines on one storage say the same, also after reopening, so a handle that one of them gave is good for
    ///   another; engines on different storages differ, and a handle of another store is refused. A copy is the same store.
    fn identity(&self) -> StoreId;

    /// Reserves `count` ids for aggregates to be made, at least 1 and at most [`limits::RESERVE_IDS`].
    ///
    /// * no id is given out twice, by any engine on the same storage, also after reopening;
    /// * ids that are not used are lost, and that is harmless.
    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>>;

    /// Writes a batch.
    ///
    /// [`Batch::check`] is the rule by which a batch is refused or written. An engine looks up what the rule asks for, and
    /// keeps other commits out until the batch is written.
    ///
    /// * all of it is written, or nothing of it, and a large unit is seen whole or not at all;
    /// * what a failed unit wanted is free: its keys, its ids and its command id;
    /// * without a command id, a unit that is sent twice may land twice: this is the limit of the promise;
    /// * what is acknowledged is durable, as far as the user asked for;
    /// * a stale append is a conflict, names expected and actual sequence, and writes nothing; so is a stale guard;
    /// * an append or a guard that [names the event](Batch::has_read) that was read is a conflict if another event has come
    ///   to its sequence, as it may after the log has lost its tail;
    /// * events are numbered from `expected + 1`, without holes, and positions from the log's head, without holes, in
    ///   commit order; the events of a batch are contiguous, in the order of its appends;
    /// * a key held by another aggregate of the same type is `KeyTaken`; a key that the same batch takes from its
    ///   holder is free;
    /// * an aggregate that does not exist is `NotFound`, whether appended to, guarded, renamed or given a snapshot; one
    ///   of another type is `WrongType`; an aggregate to be made whose id is in use is `Invalid`;
    /// * of several faults the first is told, in the order of [`Batch::check`]: command id, appends, guards, snapshots, changed
    ///   keys, taken keys, ids in use;
    /// * the command id is looked at before everything else, and one that is known is answered as
    ///   [`KnownCommand::answer`] says: the first receipt comes back and nothing is written, unless both fingerprints say
    ///   something in the same half and it differs: then it is `CommandReused`; settled as never committed, `CommandAbandoned`;
    /// * an aggregate has one snapshot: a later one, or one of another version, takes its place, an earlier one of the
    ///   same version does not; one that is ahead of the aggregate after the batch is not kept;
    /// * `recorded_at` is the engine's clock, never less than that of the event before, also when the clock goes back.
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>>;

    /// What is remembered of the command with this id; `None` if nothing is.
    ///
    /// * a receipt keeps the order of its unit.
    fn command<'a>(&'a self, id: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>>;

    /// Settles whether the command with this id took effect: its receipt, or `None` for "never, and never will".
    ///
    /// * after `None`, a commit with that id is `CommandAbandoned`, however long it was on its way.
    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>>;

    /// Forgets the commands that took effect or were settled before this time, by the engine's clock; tells how many.
    ///
    /// * a command that is forgotten is unknown: a commit with its id takes effect;
    /// * what is younger is kept, and so is every event;
    /// * it holds up no commit for long, however many there are. Dropped halfway, it has forgotten some.
    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>>;

    /// Loads an aggregate: its newest usable snapshot and the events behind it; `None` if there is no such aggregate.
    ///
    /// * a snapshot is usable if it has the version asked for and is not ahead of the aggregate nor of `up_to`;
    /// * `History::sequence` is that of the aggregate, and the events are those up to it, as of one moment.
    fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<Option<History>>>;

    /// A page of one aggregate's events; empty if there is no such aggregate.
    fn read_aggregate(&self, query: AggregateQuery) -> BoxFuture<'_, Result<Events>>;

    /// A page of the log.
    ///
    /// * a page is a prefix of what there was to read: no event is skipped, none comes twice;
    /// * page after page is the log read whole, with every filter, limit and direction;
    /// * a page ends at `limit`, and `LogPage::scanned` tells up to where there is nothing more to find;
    /// * a filter means the same to every engine: what [`Filter::matches_row`] says;
    /// * a name that no event has yet matches nothing, and matches as soon as one has it;
    /// * reading forward from past the head is `CursorAhead`;
    /// * a page tells by their marks at which event it began and at which it ended, so that whoever reads on sees whether the
    ///   log has lost its tail in between.
    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>>;

    /// The position of the last event; [`Position::ZERO`] in an empty store.
    fn head(&self) -> BoxFuture<'_, Result<Position>>;

    /// The position of the last event recorded at this time or before, by `recorded_at`.
    fn position_at(&self, time: Timestamp) -> BoxFuture<'_, Result<Position>>;

    /// Waits until there is an event past `after`, at most this long; tells the head it saw.
    ///
    /// * a commit through this engine wakes all who wait, at once; two commits at once wake all who wait for both;
    /// * a commit without events ends no wait;
    /// * waiting ends when time is up, also while others commit and when the clock goes back.
    fn wait(&self, after: Position, at_most: Duration) -> BoxFuture<'_, Result<Position>>;

    /// Lets this much time pass: the one clock that core has.
    fn pause(&self, time: Duration) -> BoxFuture<'_, ()>;

    /// Registers these names, if they are new, and has them at hand for what follows; again is harmless.
    ///
    /// * a type without events is registered too.
    fn warmup<'a>(&'a self, types: &'a [KnownType]) -> BoxFuture<'a, Result<()>>;

    /// All names registered by commits and warm-ups, ordered.
    fn types(&self) -> BoxFuture<'_, Result<Vec<KnownType>>>;

    /// Closes the engine, for all who share it.
    ///
    /// * what is called later is `Closed`, and a wait that is under way ends as `Closed`, at once;
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

/// What to load.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    /// Which aggregate.
    pub target: Target,
    /// The version a snapshot must have to be usable; `None`: no snapshot.
    pub snapshot: Option<u32>,
    /// The last sequence to load; [`Sequence::MAX`] for all.
    pub up_to: Sequence,
    /// How much to load at once; what lies behind is read by [`StorageEngine::read_aggregate`].
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
    /// The sequence of its last event, whether loaded or not; [`Sequence::ZERO`] if it has none.
    pub sequence: Sequence,
    /// The mark of its last event, [`Mark::ALWAYS`] where the log cannot lose its tail; `None` if it has no event.
    pub mark: Option<Mark>,
    /// The snapshot to begin with.
    pub snapshot: Option<Snapshot>,
    /// The events behind the snapshot, as many as the limit allowed.
    pub events: Events,
}

/// Which way to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Oldest first.
    Forward,
    /// Newest first.
    Backward,
}

/// Which events of one aggregate to read.
#[derive(Clone, Copy, Debug)]
pub struct AggregateQuery {
    /// The aggregate.
    pub aggregate: AggregateId,
    /// Which way.
    pub direction: Direction,
    /// Where to begin, itself not read: the events behind it going forward, before it going backward.
    pub from: Sequence,
    /// Where to end, itself read.
    pub to: Sequence,
    /// How much at once.
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

    /// Ends at this sequence, which is still read.
    #[must_use]
    pub fn up_to(mut self, sequence: Sequence) -> Self {
        self.to = sequence;
        self
    }

    /// How much at once.
    #[must_use]
    pub fn with_limit(mut self, limit: PageLimit) -> Self {
        self.limit = limit;
        self
    }
}

/// How much one page may hold; it ends at whichever comes first, but has one event at least (unless `events` is 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLimit {
    events: usize,
    bytes: usize,
}

impl PageLimit {
    /// How a history is read to be folded: pages small enough to lie in memory that was used a moment before.
    /// Measured on SQLite with histories of 10,000 events: pages of 10,000 are slower by a third.
    pub(crate) const FOLD: Self = Self { events: 1_000, bytes: 512 * 1024 };

    /// At most this many events, and the default number of bytes.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) over [`limits::PAGE_EVENTS`].
    pub fn events(events: usize) -> Result<Self> {
        check_page("events", events, limits::PAGE_EVENTS)?;
        Ok(Self { events, ..Self::default() })
    }

    /// The same, with at most this many bytes: payloads, references, correlation and causation ids, and headers.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) over [`limits::PAGE_BYTES`].
    pub fn and_bytes(self, bytes: usize) -> Result<Self> {
        check_page("bytes", bytes, limits::PAGE_BYTES)?;
        Ok(Self { bytes, ..self })
    }

    /// The most events.
    pub const fn max_events(self) -> usize {
        self.events
    }

    /// The most bytes, as [`and_bytes`](Self::and_bytes) counts them.
    pub const fn max_bytes(self) -> usize {
        self.bytes
    }

    /// The same with one event at least: what is read for ever gets somewhere.
    pub(crate) fn at_least_one(self) -> Self {
        Self { events: self.events.max(1), ..self }
    }

    /// Whether a page that holds `events` events and `bytes` bytes has room for one event of `next` bytes.
    pub const fn has_room(self, events: usize, bytes: usize, next: usize) -> bool {
        events < self.events && (events == 0 || bytes + next <= self.bytes)
    }
}

impl Default for PageLimit {
    fn default() -> Self {
        Self { events: limits::DEFAULT_PAGE_EVENTS, bytes: limits::DEFAULT_PAGE_BYTES }
    }
}

fn check_page(what: &str, count: usize, limit: usize) -> Result<()> {
    if count > limit {
        return Err(Error::invalid(format!("a page of {count} {what}, the limit is {limit}")));
    }
    Ok(())
}

/// Which events to read or to be given: those for which every part that is set holds.
///
/// A part that can be set several times, such as the aggregate type, holds if any of its values does.
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
/// The SQL engines find an aggregate, a reference, a correlation id and up to 24 event types by an index, so a filter
/// that matches rarely does not read the whole log. `Debug` does not show the reference and the correlation id.
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

    /// Also events of aggregates of this type; without any, events of aggregates of all types.
    #[must_use]
    pub fn with_aggregate_type(mut self, aggregate_type: AggregateType) -> Self {
        self.aggregate_types.push(aggregate_type);
        self
    }

    /// Also events of this type; without any, events of all types.
    #[must_use]
    pub fn with_event_type(mut self, event_type: EventType) -> Self {
        self.event_types.push(event_type);
        self
    }

    /// Only events of this aggregate. A filter means the aggregate, not the natural key it has today:
    /// [`EventStore::filter_by_key`](crate::EventStore::filter_by_key) looks the key up.
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

    /// The aggregate types of which one is asked for; empty: all.
    pub fn aggregate_types(&self) -> &[AggregateType] {
        &self.aggregate_types
    }

    /// The event types of which one is asked for; empty: all.
    pub fn event_types(&self) -> &[EventType] {
        &self.event_types
    }

    /// The aggregate that is asked for.
    pub fn aggregate(&self) -> Option<AggregateId> {
        self.aggregate
    }

    /// The reference that is asked for.
    pub fn reference(&self) -> Option<&str> {
        self.reference.as_deref()
    }

    /// The correlation id that is asked for.
    pub fn correlation_id(&self) -> Option<&str> {
        self.correlation_id.as_deref()
    }

    /// Whether it asks for types of aggregates or of events.
    pub fn is_by_type(&self) -> bool {
        !(self.aggregate_types.is_empty() && self.event_types.is_empty())
    }

    /// Whether this event passes.
    pub fn matches(&self, event: &Event) -> bool {
        self.matches_row(&event.as_row())
    }

    /// Whether an event that is read from this row passes: the one meaning that all engines share.
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

/// A reference may name a person: only whether one is asked for is shown.
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

/// Which page of the log to read.
#[derive(Clone, Debug)]
pub struct LogQuery {
    /// Which way.
    pub direction: Direction,
    /// Where to begin, itself not read: the events behind it going forward, before it going backward.
    pub from: Position,
    /// Where to end, itself read.
    pub to: Position,
    /// Which events.
    pub filter: Filter,
    /// How much at once.
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

    /// Ends at this position, which is still read.
    #[must_use]
    pub fn up_to(mut self, position: Position) -> Self {
        self.to = position;
        self
    }

    /// Only what passes.
    #[must_use]
    pub fn with_filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// How much at once.
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

    /// What `scanned` is when a page met its limit, or read to the end of what there is.
    ///
    /// Going forward, a page that met its limit was searched up to its last event, otherwise up to the head or `to`;
    /// going backward, down to its last event, otherwise down to `to`. Never back over `from`.
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
    /// The events, in the order asked for.
    pub events: Events,
    /// Up to where the log was searched: the `from` of the next page. Goes on past what did not pass the filter.
    pub scanned: Position,
    /// The position of the last event of the log, as of this page.
    pub head: Position,
    /// The mark of the event at which the query began, if there is one.
    pub began: Option<Mark>,
    /// Going forward, the mark of the event at `scanned`; at the beginning of the log [`Mark::ALWAYS`].
    pub ended: Option<Mark>,
}

impl LogPage {
    /// The answer to this query, of a log that cannot lose its tail; `is_full` if the limit ended it.
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

    /// Going forward, the event that proves all that was read up to here.
    pub fn witness(&self) -> Option<Witness> {
        Some(Witness::new(self.scanned, self.ended?))
    }
}

//! Events: new ones for a commit, and pages of recorded ones.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ids::{AggregateId, Position, Sequence};
use crate::limits;
use crate::metadata::{Headers, Metadata};
use crate::name::{AggregateType, EventType};
use crate::page_limit::PageLimit;
use crate::time::Timestamp;

/// The content of an event or of a snapshot, at most [`limits::PAYLOAD_BYTES`] bytes.
///
/// `Debug` shows only the length.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Payload(Vec<u8>);

impl Payload {
    /// Checks the length before it takes or copies the bytes.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if there are more than [`limits::PAYLOAD_BYTES`].
    pub fn new(bytes: impl AsRef<[u8]> + Into<Vec<u8>>) -> Result<Self> {
        let (length, limit) = (bytes.as_ref().len(), limits::PAYLOAD_BYTES);
        if length > limit {
            return Err(Error::invalid(format!("payload has {length} bytes, the limit is {limit}")));
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes)", self.0.len())
    }
}

/// An event to commit. The engine gives it its sequence and position.
#[derive(Clone, Debug)]
pub struct NewEvent {
    /// The type of the event.
    pub event_type: EventType,
    /// The content.
    pub payload: Payload,
    /// When it happened.
    pub time: Timestamp,
    /// Its metadata, often shared by all events of a unit. The `time` in it is ignored: the field above counts.
    pub metadata: Arc<Metadata>,
}

/// One event, borrowed from a row. An engine gives it to an [`EventsBuilder`].
#[derive(Clone, Copy)]
#[expect(missing_debug_implementations, reason = "it is all content, and content is not shown")]
pub struct EventRow<'a> {
    /// Its place in the log.
    pub position: Position,
    /// The aggregate it belongs to.
    pub aggregate: AggregateId,
    /// The type of that aggregate.
    pub aggregate_type: &'a AggregateType,
    /// Its number within the aggregate.
    pub sequence: Sequence,
    /// The type of the event.
    pub event_type: &'a EventType,
    /// When it happened.
    pub time: Timestamp,
    /// When it was committed, by the engine's clock. It never decreases along the log.
    pub recorded_at: Timestamp,
    /// The content.
    pub payload: &'a [u8],
    /// The application's reference.
    pub reference: Option<&'a str>,
    /// The correlation id, shared by all events of one conversation.
    pub correlation_id: Option<&'a str>,
    /// The causation id: the command or event that caused this one.
    pub causation_id: Option<&'a str>,
    /// The headers, if there are any.
    pub headers: Option<&'a Headers>,
}

impl EventRow<'_> {
    /// How many bytes it adds to a page, for its payload, texts and headers.
    pub fn bytes(&self) -> usize {
        let texts = [self.reference, self.correlation_id, self.causation_id];
        let texts: usize = texts.into_iter().flatten().map(str::len).sum();
        let headers = self.headers.into_iter().flatten();
        let headers: usize = headers.map(|(name, value)| name.len() + value.len()).sum();
        self.payload.len() + texts + headers
    }
}

/// Collects a page of events without an allocation per event: one buffer has all payloads, and one has all texts.
#[derive(Default)]
#[expect(missing_debug_implementations, reason = "lives for one read")]
pub struct EventsBuilder {
    page: Page,
    bytes: usize,
}

impl EventsBuilder {
    /// An empty page.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next event.
    pub fn push(&mut self, row: EventRow<'_>) {
        self.add(row, row.bytes());
    }

    fn add(&mut self, row: EventRow<'_>, bytes: usize) {
        self.bytes += bytes;
        let page = &mut self.page;
        let stored = Row {
            position: row.position,
            aggregate: row.aggregate,
            sequence: row.sequence,
            time: row.time,
            recorded_at: row.recorded_at,
            aggregate_type: index_of(&mut page.aggregate_types, row.aggregate_type, AggregateType::is_same),
            event_type: index_of(&mut page.event_types, row.event_type, EventType::is_same),
            payload: Span::after(page.bytes.len(), row.payload.len()),
            reference: page.keep(row.reference),
            correlation_id: page.keep(row.correlation_id),
            causation_id: page.keep(row.causation_id),
            headers: row.headers.map_or(NONE, |headers| page.keep_headers(headers)),
        };
        page.bytes.extend_from_slice(row.payload);
        page.rows.push(stored);
    }

    /// Adds the next event if the page has room for it within this limit. Returns whether it had.
    pub fn push_within(&mut self, limit: PageLimit, row: EventRow<'_>) -> bool {
        let bytes = row.bytes();
        let has_room = limit.has_room(self.len(), self.bytes, bytes);
        if has_room {
            self.add(row, bytes);
        }
        has_room
    }

    /// How many events the page has so far.
    pub fn len(&self) -> usize {
        self.page.rows.len()
    }

    /// Whether the page has no event yet.
    pub fn is_empty(&self) -> bool {
        self.page.rows.is_empty()
    }

    /// How many bytes the page has so far: payloads, references, ids and headers.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The finished page.
    pub fn finish(self) -> Events {
        Events { page: Arc::new(self.page), rows: None }
    }
}

/// Events in the order in which they were read. Cheap to clone.
///
/// Each [`Event`] of a page keeps the whole page in memory.
#[derive(Clone, Default)]
pub struct Events {
    page: Arc<Page>,
    /// The rows of the page that belong to this value; `None` for all.
    rows: Option<Arc<[u32]>>,
}

impl Events {
    /// How many events there are.
    pub fn len(&self) -> usize {
        self.rows.as_ref().map_or(self.page.rows.len(), |rows| rows.len())
    }

    /// Whether there are no events.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The event at `index`, counted from 0.
    pub fn at(&self, index: usize) -> Option<Event> {
        let row = match &self.rows {
            Some(rows) => *rows.get(index)? as usize,
            None => index,
        };
        (row < self.page.rows.len()).then(|| Event { page: Arc::clone(&self.page), row })
    }

    /// The rows of the whole page, from this one on, each with its number.
    pub(crate) fn rows_from(&self, first: usize) -> impl Iterator<Item = (usize, EventRow<'_>)> {
        (first..self.page.rows.len()).map(|row| (row, self.page.row(row)))
    }

    /// These rows of the page. The content is shared; a few rows are copied, so that they do not keep a large page in memory.
    pub(crate) fn picked(&self, rows: Vec<u32>) -> Self {
        if rows.len() * 16 < self.page.rows.len() {
            let mut few = EventsBuilder::new();
            rows.iter().for_each(|row| few.push(self.page.row(*row as usize)));
            return few.finish();
        }
        let rows = (rows.len() < self.page.rows.len()).then(|| rows.into());
        Self { page: Arc::clone(&self.page), rows }
    }

    /// About how many bytes of memory the page takes.
    pub(crate) fn size(&self) -> usize {
        self.page.rows.len() * size_of::<Row>() + self.page.bytes.len() + self.page.text.len()
    }

    /// The first event.
    pub fn first(&self) -> Option<Event> {
        self.at(0)
    }

    /// The last event.
    pub fn last(&self) -> Option<Event> {
        self.at(self.len().checked_sub(1)?)
    }

    /// The events, in order.
    pub fn iter(&self) -> EventsIter {
        EventsIter { page: self.clone(), next: 0 }
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl IntoIterator for Events {
    type Item = Event;
    type IntoIter = EventsIter;

    fn into_iter(self) -> EventsIter {
        EventsIter { page: self, next: 0 }
    }
}

impl IntoIterator for &Events {
    type Item = Event;
    type IntoIter = EventsIter;

    fn into_iter(self) -> EventsIter {
        self.iter()
    }
}

/// The events of a page, one after another.
#[derive(Clone, Debug)]
pub struct EventsIter {
    page: Events,
    next: usize,
}

impl Iterator for EventsIter {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let event = self.page.at(self.next)?;
        self.next += 1;
        Some(event)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.page.len() - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for EventsIter {}

/// A recorded event, with its aggregate, its time and its place in the log.
///
/// Cheap to clone. Two events are equal if all their fields are equal. `Debug` shows no content.
#[derive(Clone)]
pub struct Event {
    page: Arc<Page>,
    row: usize,
}

impl Metadata {
    /// Sets this event as the cause: its position becomes the causation id, and its correlation id is kept. If it has
    /// no correlation id, it starts the conversation, and its position becomes the correlation id.
    #[must_use]
    pub fn caused_by(self, event: &Event) -> Self {
        let position: Arc<str> = event.position().to_string().into();
        let correlation_id = event.correlation_id().map_or_else(|| Arc::clone(&position), Arc::from);
        self.with_cause(correlation_id, position)
    }
}

impl Event {
    fn row(&self) -> &Row {
        &self.page.rows[self.row]
    }

    /// The event as a borrowed row, for engines that copy events, and for [`Filter`](crate::Filter).
    pub fn as_row(&self) -> EventRow<'_> {
        self.page.row(self.row)
    }

    /// Its place in the log of the store.
    pub fn position(&self) -> Position {
        self.row().position
    }

    /// The aggregate it belongs to.
    pub fn aggregate(&self) -> AggregateId {
        self.row().aggregate
    }

    /// The type of that aggregate.
    pub fn aggregate_type(&self) -> &AggregateType {
        &self.page.aggregate_types[self.row().aggregate_type as usize]
    }

    /// Its number within the aggregate.
    pub fn sequence(&self) -> Sequence {
        self.row().sequence
    }

    /// The type of the event.
    pub fn event_type(&self) -> &EventType {
        &self.page.event_types[self.row().event_type as usize]
    }

    /// When it happened, according to the writer.
    pub fn time(&self) -> Timestamp {
        self.row().time
    }

    /// When it was committed, by the engine's clock. It never decreases along the log.
    pub fn recorded_at(&self) -> Timestamp {
        self.row().recorded_at
    }

    /// The content, in the encoding of its codec.
    pub fn payload(&self) -> &[u8] {
        &self.page.bytes[self.row().payload.range()]
    }

    /// The application's reference.
    pub fn reference(&self) -> Option<&str> {
        self.page.text(self.row().reference)
    }

    /// The correlation id, shared by all events of one conversation.
    pub fn correlation_id(&self) -> Option<&str> {
        self.page.text(self.row().correlation_id)
    }

    /// The causation id: the command or event that caused this one.
    pub fn causation_id(&self) -> Option<&str> {
        self.page.text(self.row().causation_id)
    }

    /// The headers; empty if there are none.
    pub fn headers(&self) -> &Headers {
        static EMPTY: Headers = Headers::new();
        self.page.headers(self.row()).unwrap_or(&EMPTY)
    }
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.position() == other.position()
            && self.aggregate() == other.aggregate()
            && self.aggregate_type() == other.aggregate_type()
            && self.sequence() == other.sequence()
            && self.event_type() == other.event_type()
            && self.time() == other.time()
            && self.recorded_at() == other.recorded_at()
            && self.payload() == other.payload()
            && self.reference() == other.reference()
            && self.correlation_id() == other.correlation_id()
            && self.causation_id() == other.causation_id()
            && self.headers() == other.headers()
    }
}

impl Eq for Event {}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event")
            .field("position", &self.position())
            .field("aggregate", &self.aggregate())
            .field("aggregate_type", self.aggregate_type())
            .field("sequence", &self.sequence())
            .field("event_type", self.event_type())
            .field("time", &self.time())
            .field("recorded_at", &self.recorded_at())
            .field("payload_bytes", &self.payload().len())
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Page {
    rows: Vec<Row>,
    bytes: Vec<u8>,
    text: String,
    headers: Vec<Headers>,
    aggregate_types: Vec<AggregateType>,
    event_types: Vec<EventType>,
}

/// Small, because a page has up to [`limits::PAGE_EVENTS`] of them. The buffers of a page are far below 4 GiB.
struct Row {
    position: Position,
    aggregate: AggregateId,
    sequence: Sequence,
    time: Timestamp,
    recorded_at: Timestamp,
    aggregate_type: u32,
    event_type: u32,
    payload: Span,
    reference: Span,
    correlation_id: Span,
    causation_id: Span,
    headers: u32,
}

/// A range of a page's buffer.
#[derive(Clone, Copy)]
struct Span {
    start: u32,
    length: u32,
}

/// The index that means "none".
const NONE: u32 = u32::MAX;

impl Span {
    const NONE: Self = Self { start: NONE, length: 0 };

    fn after(start: usize, length: usize) -> Self {
        Self { start: small(start), length: small(length) }
    }

    fn range(self) -> std::ops::Range<usize> {
        let start = self.start as usize;
        start..start + self.length as usize
    }
}

/// A length or index within a page.
///
/// # Panics
/// From 4 GiB on. The limits of pages and events keep a page far below that.
fn small(number: usize) -> u32 {
    match u32::try_from(number) {
        Ok(small) if small != NONE => small,
        _ => panic!("a page of events cannot hold {number} bytes"),
    }
}

impl Page {
    fn row(&self, row: usize) -> EventRow<'_> {
        let row = &self.rows[row];
        EventRow {
            position: row.position,
            aggregate: row.aggregate,
            aggregate_type: &self.aggregate_types[row.aggregate_type as usize],
            sequence: row.sequence,
            event_type: &self.event_types[row.event_type as usize],
            time: row.time,
            recorded_at: row.recorded_at,
            payload: &self.bytes[row.payload.range()],
            reference: self.text(row.reference),
            correlation_id: self.text(row.correlation_id),
            causation_id: self.text(row.causation_id),
            headers: self.headers(row).filter(|headers| !headers.is_empty()),
        }
    }

    fn headers(&self, row: &Row) -> Option<&Headers> {
        self.headers.get(row.headers as usize)
    }

    fn keep(&mut self, text: Option<&str>) -> Span {
        let Some(text) = text else { return Span::NONE };
        let span = Span::after(self.text.len(), text.len());
        self.text.push_str(text);
        span
    }

    fn keep_headers(&mut self, headers: &Headers) -> u32 {
        self.headers.push(headers.clone());
        small(self.headers.len() - 1)
    }

    fn text(&self, span: Span) -> Option<&str> {
        (span.start != NONE).then(|| &self.text[span.range()])
    }
}

/// The index of a name in a page's table. Engines intern their names, so equal names are usually the same allocation.
/// If not, or if the name was added long ago, it is added again.
fn index_of<T: Clone>(table: &mut Vec<T>, name: &T, is_same: fn(&T, &T) -> bool) -> u32 {
    let looked_at = table.len().saturating_sub(32);
    if let Some(back) = table[looked_at..].iter().rev().position(|known| is_same(known, name)) {
        return small(table.len() - 1 - back);
    }
    table.push(name.clone());
    small(table.len() - 1)
}

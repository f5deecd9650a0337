//! Inline projections: values that change in the commit itself, so that they never lag.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use evercore_core::{
    Batch, BoxError, CursorId, CursorStatus, Error, ErrorKind, Event, EventRow, Events, EventsBuilder,
    Position, Receipt, Result, Step, SubscriptionName, limits,
};

use crate::engine::MemoryEngine;
use crate::state::State;

/// Writes what a handler has made of events.
type Write = Box<dyn FnOnce() + Send>;

type Handle = dyn Fn(&[Event]) -> Result<Write, BoxError> + Send + Sync;

/// A projection that goes along with every commit.
pub(crate) struct Inline {
    id: CursorId,
    handle: Box<Handle>,
}

impl MemoryEngine {
    /// Keeps a value up to date in every commit: whoever sees the event sees the value changed. The handler works on a
    /// copy, which takes the value's place when the commit is sure; if it fails, the commit is
    /// [`Rejected`](ErrorKind::Rejected) and writes nothing. What is in the log already is handled at once.
    ///
    /// The handler runs while the store is locked: it must not call it. The value belongs to this one projection, others
    /// only read it: what they write is lost where a commit is at work. Its cursor is listed among the subscriptions.
    ///
    /// After it was paused or reset, the next commit with events waits until it has caught up. It gets pages of 1,000
    /// events then, and the store is free between two of them; the last 1,000 at most come with the commit's own events.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    ///
    /// # fn main() -> evercore_memory::Result<()> {
    /// let engine = evercore_memory::MemoryEngine::new();
    /// let count = Arc::new(Mutex::new(0));
    /// engine.inline_projection("count", 1, Arc::clone(&count), |count, events| {
    ///     *count += events.len();
    ///     Ok(())
    /// })?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName); [`Invalid`](ErrorKind::Invalid) for version 0, or if it is there already;
    /// [`Rejected`](ErrorKind::Rejected) with the handler's error if it fails on the log; [`Closed`](ErrorKind::Closed).
    pub fn inline_projection<S, F>(
        &self,
        name: impl AsRef<str>,
        version: u32,
        value: Arc<Mutex<S>>,
        handle: F,
    ) -> Result<()>
    where
        S: Clone + Send + 'static,
        F: Fn(&mut S, &[Event]) -> Result<(), BoxError> + Send + Sync + 'static,
    {
        if version == 0 {
            return Err(Error::invalid("the version of a projection is 1 at least"));
        }
        let id = CursorId { subscription: SubscriptionName::new(name)?, version, partition: 0 };
        let handle = move |events: &[Event]| -> Result<Write, BoxError> {
            let mut next = value.lock().unwrap_or_else(PoisonError::into_inner).clone();
            handle(&mut next, events)?;
            let value = Arc::clone(&value);
            Ok(Box::new(move || *value.lock().unwrap_or_else(PoisonError::into_inner) = next))
        };
        self.state()?.add_inline(Inline { id, handle: Box::new(handle) })
    }
}

impl State {
    fn add_inline(&mut self, inline: Inline) -> Result<()> {
        if self.inline.iter().any(|known| known.id == inline.id) {
            let message = format!("the inline projection \"{}\" is there twice", inline.id.subscription);
            return Err(Error::invalid(message));
        }
        self.step(&inline.id, &Step::declare(1, Position::ZERO, Some(Position::ZERO)))?;
        if let Some(events) = self.behind(&inline, usize::MAX, &Events::default()) {
            inline.handle(&events)?();
        }
        self.move_to_head(&inline.id);
        self.inline.push(inline);
        Ok(())
    }

    /// What the inline projections make of a batch that is about to be written; nothing is changed yet.
    pub(crate) fn project(&self, batch: &Batch, receipt: &Receipt) -> Result<Vec<Write>> {
        if self.inline.is_empty() || batch.events() == 0 {
            return Ok(Vec::new());
        }
        let behind = self.inline.iter().filter_map(|inline| {
            let events = self.behind(inline, usize::MAX, &events_of(batch, receipt))?;
            Some(inline.handle(&events))
        });
        behind.collect()
    }

    /// Hands a page to a projection that is more than a page behind; `false` if there is none. It is also `false` if that
    /// failed: then the commit fails as well, and tells it.
    pub(crate) fn draw_near(&mut self) -> bool {
        let head = self.head().get();
        let page = i64::try_from(limits::DEFAULT_PAGE_EVENTS).unwrap_or(i64::MAX);
        let is_far = |inline: &&Inline| {
            let cursor = self.cursors.get(&inline.id);
            cursor.is_some_and(|it| it.status == CursorStatus::Active && head - it.position.get() > page)
        };
        let Some(inline) = self.inline.iter().find(is_far) else { return false };
        let events = self.behind(inline, limits::DEFAULT_PAGE_EVENTS, &Events::default());
        let events = events.unwrap_or_default();
        let Some(last) = events.last().map(Event::position) else { return false };
        let Ok(write) = inline.handle(&events) else { return false };
        let id = inline.id.clone();
        write();
        if let Some(cursor) = self.cursors.get_mut(&id) {
            cursor.position = last;
        }
        true
    }

    /// What is before a projection, so many at most, and these; `None` if its cursor was paused, retired or removed by hand.
    fn behind(&self, inline: &Inline, most: usize, more: &Events) -> Option<Vec<Event>> {
        let cursor = self.cursors.get(&inline.id).filter(|cursor| cursor.status == CursorStatus::Active)?;
        let mut before = EventsBuilder::new();
        let done = usize::try_from(cursor.position.get()).unwrap_or(usize::MAX).min(self.log.len());
        for (event, place) in self.log[done..].iter().take(most).zip(1..) {
            before.push(event.row(cursor.position.plus(place)));
        }
        Some(before.finish().iter().chain(more.iter()).collect())
    }

    /// To the end of the log, all that may move; they have handled what was before it.
    pub(crate) fn move_inline(&mut self) {
        for id in self.inline.iter().map(|inline| inline.id.clone()).collect::<Vec<_>>() {
            self.move_to_head(&id);
        }
    }

    fn move_to_head(&mut self, id: &CursorId) {
        let head = self.head();
        if let Some(cursor) = self.cursors.get_mut(id)
            && cursor.status == CursorStatus::Active
        {
            cursor.position = head;
        }
    }
}

impl Inline {
    fn handle(&self, events: &[Event]) -> Result<Write> {
        (self.handle)(events).map_err(|source| {
            let message = format!("the inline projection \"{}\" said no", self.id.subscription);
            Error::new(ErrorKind::Rejected, message).with_source(source)
        })
    }
}

/// The events of a batch as they will be read.
fn events_of(batch: &Batch, receipt: &Receipt) -> Events {
    let (mut page, mut position) = (EventsBuilder::new(), receipt.first);
    for append in batch.appends() {
        let mut sequence = append.expected;
        for event in &append.events {
            sequence = sequence.next();
            page.push(EventRow {
                position,
                aggregate: append.aggregate,
                aggregate_type: &append.aggregate_type,
                sequence,
                event_type: &event.event_type,
                time: event.time,
                recorded_at: receipt.recorded_at,
                payload: event.payload.as_bytes(),
                reference: event.metadata.reference(),
                correlation_id: event.metadata.correlation_id(),
                causation_id: event.metadata.causation_id(),
                headers: Some(event.metadata.headers()).filter(|headers| !headers.is_empty()),
            });
            position = position.next();
        }
    }
    page.finish()
}

impl fmt::Debug for Inline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inline").field("id", &self.id).finish_non_exhaustive()
    }
}

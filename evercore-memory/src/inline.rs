//! Inline projections: values that are updated inside the commit, so that they never lag.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use evercore_core::engine::{Batch, EventRow, EventsBuilder, Step};
use evercore_core::{
    BoxError, CursorId, CursorStatus, Error, ErrorKind, Event, Events, Position, Receipt, Result, limits,
};

use crate::state::{InlineProjection, State, Write};

impl State {
    pub(crate) fn add_inline(&mut self, inline: InlineProjection) -> Result<()> {
        self.step(&inline.id, &Step::declare(1, Position::ZERO, Some(Position::ZERO)))?;
        if let Some(events) = self.unhandled(&inline, usize::MAX, &Events::default()) {
            inline.handle(&events)?();
        }
        self.move_to_head(&inline.id);
        self.inline.push(inline);
        Ok(())
    }

    /// Runs the inline projections on a batch before it is written. Changes nothing yet; returns the writes.
    pub(crate) fn project(&self, batch: &Batch, receipt: &Receipt) -> Result<Vec<Write>> {
        if self.inline.is_empty() || batch.events() == 0 {
            return Ok(Vec::new());
        }
        let writes = self.inline.iter().filter_map(|inline| {
            let events = self.unhandled(inline, usize::MAX, &events_of(batch, receipt))?;
            Some(inline.handle(&events))
        });
        writes.collect()
    }

    /// Hands a page to a projection that lags by more than a page. Returns `false` if there is none, or if the handler
    /// failed: then the commit fails as well and reports the error.
    pub(crate) fn catch_up_by_a_page(&mut self) -> bool {
        let head = self.head().get();
        let page = i64::try_from(limits::DEFAULT_PAGE_EVENTS).unwrap_or(i64::MAX);
        let is_far = |inline: &&InlineProjection| {
            let cursor = self.cursors.get(&inline.id);
            cursor.is_some_and(|it| it.status == CursorStatus::Active && head - it.position.get() > page)
        };
        let Some(inline) = self.inline.iter().find(is_far) else { return false };
        let events = self.unhandled(inline, limits::DEFAULT_PAGE_EVENTS, &Events::default());
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

    /// At most `most` events that the projection has not handled yet, followed by `more`. `None` if the cursor was
    /// paused, retired or removed by hand.
    fn unhandled(&self, inline: &InlineProjection, most: usize, more: &Events) -> Option<Vec<Event>> {
        let cursor = self.cursors.get(&inline.id).filter(|cursor| cursor.status == CursorStatus::Active)?;
        let mut before = EventsBuilder::new();
        let done = usize::try_from(cursor.position.get()).unwrap_or(usize::MAX).min(self.log.len());
        for (event, place) in self.log[done..].iter().take(most).zip(1..) {
            before.push(event.row(cursor.position.plus(place)));
        }
        Some(before.finish().iter().chain(more.iter()).collect())
    }

    /// Moves the cursors of all active inline projections to the end of the log, after they handled
    /// every event up to it.
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

impl InlineProjection {
    pub(crate) fn new<S, F>(id: CursorId, value: Arc<Mutex<S>>, handle: F) -> Self
    where
        S: Clone + Send + 'static,
        F: Fn(&mut S, &[Event]) -> Result<(), BoxError> + Send + Sync + 'static,
    {
        let handle = move |events: &[Event]| -> Result<Write, BoxError> {
            let mut next = value.lock().unwrap_or_else(PoisonError::into_inner).clone();
            handle(&mut next, events)?;
            let value = Arc::clone(&value);
            Ok(Box::new(move || *value.lock().unwrap_or_else(PoisonError::into_inner) = next))
        };
        Self { id, handle: Box::new(handle) }
    }

    fn handle(&self, events: &[Event]) -> Result<Write> {
        (self.handle)(events).map_err(|source| {
            let message = format!("the inline projection \"{}\" failed", self.id.subscription);
            Error::new(ErrorKind::Rejected, message).with_source(source)
        })
    }
}

/// The events of a batch, in the form in which they will be read.
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

impl fmt::Debug for InlineProjection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlineProjection").field("id", &self.id).finish_non_exhaustive()
    }
}

//! What a handler is given, and the one who hands it over.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::cursor::{Cursor, CursorId, Lease};
use super::step::Advance;
use crate::engine::BoxFuture;
use crate::error::{BoxError, Error};
use crate::event::Event;
use crate::ids::Position;

/// Events that are delivered together, in the order of the log; one at least. Cheap to clone.
#[derive(Clone)]
pub struct Delivery {
    pub(crate) events: Arc<[Event]>,
    pub(crate) context: Arc<Context>,
    pub(crate) attempt: u32,
    pub(crate) is_replay: bool,
    /// Where the cursor stands when all of it is done: the last event, or further if nothing is to come between.
    pub(crate) end: Position,
}

/// What all deliveries of one lease share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) id: CursorId,
    pub(crate) lease: Lease,
    pub(crate) is_stopping: Arc<AtomicBool>,
}

impl Delivery {
    /// A first delivery of live events, for sinks and tests of sinks.
    pub fn new(id: CursorId, lease: Lease, events: Vec<Event>) -> Self {
        let context = Arc::new(Context { id, lease, is_stopping: Arc::default() });
        let end = events.last().map(|event| event.position()).unwrap_or_default();
        Self { events: events.into(), context, attempt: 1, is_replay: false, end }
    }

    /// The events.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// Where the cursor stands when all of it is done: at the last event, or further if what follows concerns nobody.
    pub fn end(&self) -> Position {
        self.end
    }

    /// 1 the first time, 2 when it is tried again, and so on. An owner that takes over begins with 1 again.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Whether these events were handled before by another version of the subscription, or before it was reset: what
    /// cannot be taken back, such as a mail, is not to be done again.
    pub fn is_replay(&self) -> bool {
        self.is_replay
    }

    /// The cursor to which it belongs.
    pub fn cursor(&self) -> &CursorId {
        &self.context.id
    }

    /// The lease under which it is delivered: its epoch is a fencing token.
    pub fn lease(&self) -> &Lease {
        &self.context.lease
    }

    /// Whether the runner wants to stop: a handler that goes through many events may end early, with an error.
    pub fn is_stopping(&self) -> bool {
        self.context.is_stopping.load(Ordering::Acquire)
    }

    /// One of its events, to be given up alone.
    pub(crate) fn only(&self, index: usize) -> Option<Self> {
        let event = self.events.get(index)?.clone();
        Some(Self { end: event.position(), events: Arc::new([event]), ..self.clone() })
    }

    /// Each event with what the delivery says about it.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Delivered> + '_ {
        (0..self.events.len()).map(|index| Delivered { delivery: self.clone(), index })
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("cursor", &self.context.id)
            .field("events", &self.events.len())
            .field("attempt", &self.attempt)
            .field("is_replay", &self.is_replay)
            .finish_non_exhaustive()
    }
}

/// One event that is delivered; it is the [`Event`], and knows how it is delivered.
#[derive(Clone)]
pub struct Delivered {
    delivery: Delivery,
    index: usize,
}

impl Delivered {
    /// The event.
    pub fn event(&self) -> &Event {
        &self.delivery.events[self.index]
    }

    /// As [`Delivery::attempt`].
    pub fn attempt(&self) -> u32 {
        self.delivery.attempt
    }

    /// As [`Delivery::is_replay`].
    pub fn is_replay(&self) -> bool {
        self.delivery.is_replay
    }

    /// As [`Delivery::lease`].
    pub fn lease(&self) -> &Lease {
        self.delivery.lease()
    }
}

impl Deref for Delivered {
    type Target = Event;

    fn deref(&self) -> &Event {
        self.event()
    }
}

impl fmt::Debug for Delivered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivered").field("event", self.event()).finish_non_exhaustive()
    }
}

/// Takes deliveries. Users write handlers; this is for engines, whose sinks move the cursor in the transaction in which
/// the handler writes.
pub trait Sink: Send + Sync {
    /// Has a delivery handled. `advance` is what moves the cursor past it.
    fn deliver<'a>(&'a self, delivery: &'a Delivery, advance: &'a Advance) -> BoxFuture<'a, Outcome>;

    /// Whether a failure is that of the event behind those that were handled, and none behind that was tried.
    fn tells_which(&self) -> bool {
        false
    }

    /// Whether nobody else can get the cursor while this is at work, so that the lease need not be renewed meanwhile:
    /// as it is where the cursor is moved in a transaction before the handler runs in it.
    fn holds_cursor(&self) -> bool {
        true
    }
}

/// What became of a delivery.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// So many of its events were handled, from the first on; the cursor is still to be moved, and the rest comes next. To
    /// have handled none is to have failed.
    Handled(usize),
    /// All were handled, and the cursor was moved together with what the handler wrote: it is like this now.
    Advanced(Cursor),
    /// The handler failed after so many events, on the next or on one of those behind it; the cursor did not move.
    Failed {
        /// How many events were handled, from the first on.
        handled: usize,
        /// What the handler said.
        error: BoxError,
    },
    /// The engine failed, or refused to move the cursor.
    Refused(Error),
}

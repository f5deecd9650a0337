//! The input of a handler, and the trait that calls handlers.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::cursor::{Cursor, CursorId, Lease};
use super::step::Advance;
use crate::error::{BoxError, Error};
use crate::event::Event;
use crate::future::BoxFuture;
use crate::ids::Position;

/// One or more events that are delivered together, in the order of the log. Cheap to clone.
#[derive(Clone)]
pub struct Delivery {
    pub(crate) events: Arc<[Event]>,
    pub(crate) context: Arc<Context>,
    pub(crate) attempt: u32,
    pub(crate) is_replay: bool,
    /// The position of the cursor after this delivery: the last event, or later if no event in between is for this
    /// subscription.
    pub(crate) end: Position,
}

/// Shared by all deliveries of one lease.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) id: CursorId,
    pub(crate) lease: Lease,
    pub(crate) is_stopping: Arc<AtomicBool>,
    /// The subscription was paused, or another worker gets this cursor.
    pub(crate) gives_up: AtomicBool,
}

impl Delivery {
    /// A first delivery of live events, for sinks and tests of sinks.
    pub fn new(id: CursorId, lease: Lease, events: Vec<Event>) -> Self {
        let context =
            Arc::new(Context { id, lease, is_stopping: Arc::default(), gives_up: AtomicBool::new(false) });
        let end = events.last().map(|event| event.position()).unwrap_or_default();
        Self { events: events.into(), context, attempt: 1, is_replay: false, end }
    }

    /// The events.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The position of the cursor after this delivery: the last event, or later if the events in between are not for this
    /// subscription.
    pub fn end(&self) -> Position {
        self.end
    }

    /// The number of this try: 1 for the first. Tries of other owners count, as far as they were stored with the cursor: each
    /// failure of an event that was tried alone, and each lease that was lost at the event.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Whether these events were handled before, by another version of the subscription or before a reset, or were in the
    /// log before the subscription was [declared](super::Subscription::declare). Do not repeat effects that cannot be taken
    /// back, such as a mail.
    pub fn is_replay(&self) -> bool {
        self.is_replay
    }

    /// The cursor of this delivery.
    pub fn cursor(&self) -> &CursorId {
        &self.context.id
    }

    /// The lease of this delivery. Its epoch is a fencing token.
    pub fn lease(&self) -> &Lease {
        &self.context.lease
    }

    /// Whether the runner wants to stop: the shutdown has come, the subscription is paused, or another process gets the
    /// cursor. A handler of many events may then return early, with an error, which does not count.
    pub fn is_stopping(&self) -> bool {
        self.context.is_stopping.load(Ordering::Acquire) || self.context.gives_up.load(Ordering::Acquire)
    }

    /// One event of this delivery, to be skipped or parked alone.
    pub(crate) fn only(&self, index: usize) -> Option<Self> {
        let event = self.events.get(index)?.clone();
        Some(Self { end: event.position(), events: Arc::new([event]), ..self.clone() })
    }

    /// Each event, with the data of this delivery.
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

/// A delivered event: derefs to [`Event`], and has the data of its delivery.
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
    /// Gives a delivery to the handler. `advance` moves the cursor past it.
    fn deliver<'a>(&'a self, delivery: &'a Delivery, advance: &'a Advance) -> BoxFuture<'a, Outcome>;

    /// Whether a failure belongs to the first event that was not handled, and no later event was tried.
    fn tells_which(&self) -> bool;

    /// Whether nobody else can get the cursor while this sink is at work. Then the lease is not renewed meanwhile. Return
    /// `true` only if the cursor is moved in a transaction before the handler runs in it; otherwise another owner gets the
    /// cursor as soon as the lease ends.
    fn holds_cursor(&self) -> bool;

    /// How long a delivery may take. The runner gives the sink fewer events at a time if it needs more than half of that, and
    /// more again if it is quick.
    fn time_limit(&self) -> Option<Duration> {
        None
    }
}

/// The result of a delivery.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// The first events, this many, were handled. The runner moves the cursor and delivers the rest next. Zero counts as a
    /// failure.
    Handled(usize),
    /// All events were handled, and the cursor was moved together with the handler's writes. This is the cursor now.
    Advanced(Cursor),
    /// The handler failed. The cursor did not move.
    Failed {
        /// How many events were handled, from the first on. The failure is at the next event or at a later one.
        handled: usize,
        /// The handler's error.
        error: BoxError,
    },
    /// The handler failed for a reason that no event causes: the read model is locked or slow. The cursor did not move. The
    /// try does not count.
    Hindered {
        /// The handler's error.
        error: BoxError,
        /// Whether the delivery took longer than its [limit](Sink::time_limit). Fewer events are given then.
        is_too_slow: bool,
    },
    /// The engine failed, or refused to move the cursor.
    Refused(Error),
}

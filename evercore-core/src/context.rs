//! What an aggregate may know of an event beside its content.

use std::fmt;

use crate::event::Event;
use crate::ids::Sequence;
use crate::metadata::{Headers, Metadata};
use crate::time::Timestamp;

/// What is known of an event beside its content when it is applied; see
/// [`Aggregate::apply_with`](crate::Aggregate::apply_with).
///
/// It holds only what is fixed when the event is recorded, and so is the same whenever the event is applied. Position
/// and time of recording are given by the commit and are not in it: a state that had them would differ from one that is
/// replayed.
#[derive(Clone, Copy)]
pub struct EventContext<'a> {
    sequence: Sequence,
    time: Timestamp,
    beside: Beside<'a>,
}

#[derive(Clone, Copy)]
enum Beside<'a> {
    /// The event is being recorded.
    Metadata(&'a Metadata),
    /// The event is read.
    Event(&'a Event),
}

impl<'a> EventContext<'a> {
    /// The context of an event that is not stored, for tests of an aggregate. A time in `metadata` is not looked at.
    pub fn new(sequence: Sequence, time: Timestamp, metadata: &'a Metadata) -> Self {
        Self { sequence, time, beside: Beside::Metadata(metadata) }
    }

    /// The context of a recorded event.
    pub fn of(event: &'a Event) -> Self {
        Self { sequence: event.sequence(), time: event.time(), beside: Beside::Event(event) }
    }

    /// The event's number within its aggregate.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }

    /// When it happened, as the writer said.
    pub fn time(&self) -> Timestamp {
        self.time
    }

    /// The application's own word.
    pub fn reference(&self) -> Option<&'a str> {
        match self.beside {
            Beside::Metadata(metadata) => metadata.reference(),
            Beside::Event(event) => event.reference(),
        }
    }

    /// The id of the conversation.
    pub fn correlation_id(&self) -> Option<&'a str> {
        match self.beside {
            Beside::Metadata(metadata) => metadata.correlation_id(),
            Beside::Event(event) => event.correlation_id(),
        }
    }

    /// The id of the cause.
    pub fn causation_id(&self) -> Option<&'a str> {
        match self.beside {
            Beside::Metadata(metadata) => metadata.causation_id(),
            Beside::Event(event) => event.causation_id(),
        }
    }

    /// The headers; empty if there are none.
    pub fn headers(&self) -> &'a Headers {
        match self.beside {
            Beside::Metadata(metadata) => metadata.headers(),
            Beside::Event(event) => event.headers(),
        }
    }
}

/// Shows sequence and time, not what else is set.
impl fmt::Debug for EventContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventContext")
            .field("sequence", &self.sequence)
            .field("time", &self.time)
            .finish_non_exhaustive()
    }
}

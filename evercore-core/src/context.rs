//! The data of an event that an aggregate may use besides its content.

use std::fmt;

use crate::event::Event;
use crate::ids::Sequence;
use crate::metadata::{Headers, Metadata};
use crate::time::Timestamp;

/// The data of an event besides its content, for [`Aggregate::apply_with`](crate::Aggregate::apply_with).
///
/// It contains only data that is fixed when the event is recorded, so it is the same whenever the event is applied. The
/// position and the time of recording are missing, because they are known only after the commit: a state that used them
/// would be different after a replay.
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
    /// The event is replayed.
    Event(&'a Event),
}

impl<'a> EventContext<'a> {
    /// The context of an event that is not stored, for tests of an aggregate. A time in `metadata` is ignored.
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

    /// When it happened, according to the writer.
    pub fn time(&self) -> Timestamp {
        self.time
    }

    /// The application's reference.
    pub fn reference(&self) -> Option<&'a str> {
        match self.beside {
            Beside::Metadata(metadata) => metadata.reference(),
            Beside::Event(event) => event.reference(),
        }
    }

    /// The correlation id, shared by all events of one conversation.
    pub fn correlation_id(&self) -> Option<&'a str> {
        match self.beside {
            Beside::Metadata(metadata) => metadata.correlation_id(),
            Beside::Event(event) => event.correlation_id(),
        }
    }

    /// The causation id: the command or event that caused this one.
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

/// Shows the sequence and the time, and nothing else.
impl fmt::Debug for EventContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventContext")
            .field("sequence", &self.sequence)
            .field("time", &self.time)
            .finish_non_exhaustive()
    }
}

//! The faults that a projection must survive.

/// A fault that a projection is exposed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The process dies before its handler is called.
    CrashBefore,
    /// The process dies at an await inside its handler, for instance between two events.
    CrashInside,
    /// The process dies after its handler has ended, before the acknowledgement.
    CrashAfter,
    /// The delivery fails before the handler is called, and is repeated.
    FailBefore,
    /// The handler ends its work, but its result is lost: it counts as failed, or the outcome is not known.
    FailAfter,
    /// The process stops before, inside or after its handler. Its lease ends, and another process goes on. Then the
    /// handler finishes. This happens when a process is paused for longer than its lease, or when its requests are
    /// delayed. A sink that holds its cursor stops only before or after the handler.
    LeaseLost,
    /// An at-least-once handler gets several deliveries before the first is acknowledged. A crash then repeats all of
    /// them.
    LateAck,
    /// The cursor is set to an earlier position, and the projection stays as it is. Only for at-least-once handlers:
    /// a sink that holds its cursor cannot know about it.
    OlderCursor,
    /// The subscription is reset to the beginning and the projection is emptied, while a process runs.
    Reset,
    /// A new version is built on a fresh storage while the old one runs, and takes over.
    NewVersion,
    /// The process is asked to stop, and another one starts.
    ShutDown,
    /// An event is committed while the handler runs.
    Arrival,
}

impl Fault {
    /// All faults.
    pub const ALL: &[Self] = &[
        Self::CrashBefore,
        Self::CrashInside,
        Self::CrashAfter,
        Self::FailBefore,
        Self::FailAfter,
        Self::LeaseLost,
        Self::LateAck,
        Self::OlderCursor,
        Self::Reset,
        Self::NewVersion,
        Self::ShutDown,
        Self::Arrival,
    ];

    /// The faults of a single delivery; the others concern the whole life of a process.
    pub(crate) fn is_of_delivery(self) -> bool {
        !matches!(self, Self::LateAck | Self::NewVersion)
    }

    /// Whether the projection is built again, which hides earlier damage.
    pub(crate) fn builds_again(self) -> bool {
        matches!(self, Self::Reset | Self::NewVersion)
    }

    /// Whether it also concerns a sink that moves the cursor together with its writes.
    pub(crate) fn is_for_sinks(self) -> bool {
        !matches!(self, Self::LateAck | Self::OlderCursor)
    }
}

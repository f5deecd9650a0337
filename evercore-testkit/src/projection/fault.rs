//! All that may happen to a projection.

/// What is done to a projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The process dies before its handler is called.
    CrashBefore,
    /// The process dies at an await of its handler, between two events for instance.
    CrashInside,
    /// The process dies when its handler is done, before the acknowledgement.
    CrashAfter,
    /// The delivery fails before the handler is called, and comes again.
    FailBefore,
    /// The handler does its work, but that is not heard: it counts as failed, or nobody knows.
    FailAfter,
    /// The process stands still, before its handler, at an await of it or behind it; its lease ends, another process goes
    /// on, and then the handler does what it has begun. So it is where a process is stopped for longer than its lease, or
    /// what it has sent is long on its way. A sink that holds its cursor stands still before or behind only.
    LeaseLost,
    /// A handler of at-least-once gets several deliveries before the first is acknowledged: a crash brings all of them
    /// again.
    LateAck,
    /// The cursor is put back to an older place, and the projection stays as it is. Only for handlers of at-least-once: no
    /// sink can know what it has written for a cursor that was elsewhere.
    OlderCursor,
    /// The subscription is reset to the beginning and the projection emptied, while a process runs.
    Reset,
    /// A new version is built beside the old one, on a fresh storage, and takes over.
    NewVersion,
    /// The process is told to stop, and another starts.
    ShutDown,
    /// Something happens while the handler is at work.
    Arrival,
}

impl Fault {
    /// All of them.
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

    /// Those that happen to a delivery; the others happen to a life as a whole.
    pub(crate) fn is_of_delivery(self) -> bool {
        !matches!(self, Self::LateAck | Self::NewVersion)
    }

    /// Whether the projection is built again by it, so that what was wrong before is not seen any more.
    pub(crate) fn builds_again(self) -> bool {
        matches!(self, Self::Reset | Self::NewVersion)
    }

    /// Whether a sink that moves the cursor together with what it writes has to bear it, too.
    pub(crate) fn is_for_sinks(self) -> bool {
        !matches!(self, Self::LateAck | Self::OlderCursor)
    }
}

//! What to do when a handler fails.

use std::time::Duration;

/// What becomes of an event that its handler cannot handle: it is tried again, and then stopped at, passed over or
/// parked. An event that does not decode is such an event.
///
/// The default stops after five attempts, with pauses from 100 ms up to 10 s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FailurePolicy {
    /// How often an event is tried at most, the first time included; 0 counts as 1.
    pub attempts: u32,
    /// The upper bound of the first pause; each is a random part of its bound, and bounds double.
    pub first_pause: Duration,
    /// The upper bound of all pauses, and the rest after a stop: for so long nobody may claim the cursor, so a program that
    /// starts its subscription again at once does not fail at full speed.
    pub longest_pause: Duration,
    /// What then.
    pub then: Then,
}

/// What becomes of an event that was tried often enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Then {
    /// The subscription stops with the handler's error, which is stored with the cursor. The next owner begins with this
    /// event, after a rest of [`longest_pause`](FailurePolicy::longest_pause), which is 10 s by default. Until then a run
    /// waits, or is [`AlreadyOwned`](crate::ErrorKind::AlreadyOwned) without standby;
    /// [`CursorState::rest`](crate::CursorState::rest) tells how long that is, and
    /// [`resume_subscription`](crate::EventStore::resume_subscription) ends it.
    Stop,
    /// The event is passed over, for good.
    Skip,
    /// The event is parked with its error; others go on, and those of the same aggregate wait for it.
    Park,
    /// The event is parked with its error; all others go on, those of the same aggregate too.
    ParkAlone,
}

impl FailurePolicy {
    /// The default attempts and pauses, and then this.
    pub const fn then(then: Then) -> Self {
        let (first_pause, longest_pause) = (Duration::from_millis(100), Duration::from_secs(10));
        Self { attempts: 5, first_pause, longest_pause, then }
    }

    /// The same with other attempts.
    #[must_use]
    pub const fn with_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// The same with other pauses.
    #[must_use]
    pub const fn with_pauses(mut self, first: Duration, longest: Duration) -> Self {
        self.first_pause = first;
        self.longest_pause = longest;
        self
    }
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self::then(Then::Stop)
    }
}

//! What to do when a handler fails.

use std::time::Duration;

/// What happens when a handler fails at an event: the event is tried again, and then the subscription stops, skips the event
/// or parks it. An event that cannot be decoded counts as a failure too.
///
/// The default stops after five attempts, with pauses from 100 ms up to 10 s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FailurePolicy {
    /// The most tries of an event, the first included; 0 counts as 1.
    pub attempts: u32,
    /// The upper bound of the first pause; each is a random part of its bound, and bounds double.
    pub first_pause: Duration,
    /// The upper bound of all pauses, and the length of the rest after a stop. During the rest the cursor cannot be claimed, so a
    /// program that starts its subscription again at once does not fail at full speed.
    pub longest_pause: Duration,
    /// What to do after the last try.
    pub action: FailureAction,
}

/// What to do with an event after the last try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureAction {
    /// The subscription stops with the handler's error, which is stored with the cursor. The next owner begins with this
    /// event, after a rest of [`longest_pause`](FailurePolicy::longest_pause), which is 10 s by default. Until then a run
    /// waits, or fails with [`AlreadyOwned`](crate::ErrorKind::AlreadyOwned) without standby.
    /// [`CursorState::rest`](crate::CursorState::rest) tells how long the rest lasts, and
    /// [`resume_subscription`](crate::EventStore::resume_subscription) ends it.
    Stop,
    /// The event is skipped for good.
    Skip,
    /// The event is parked with its error. Later events of the same aggregate wait for it; all others go on.
    Park,
    /// The event is parked with its error. All others go on, also those of the same aggregate.
    ParkAlone,
}

impl FailurePolicy {
    /// The default attempts and pauses, and then this action.
    pub const fn new(action: FailureAction) -> Self {
        let (first_pause, longest_pause) = (Duration::from_millis(100), Duration::from_secs(10));
        Self { attempts: 5, first_pause, longest_pause, action }
    }

    /// The same policy with this number of attempts.
    #[must_use]
    pub const fn with_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// The same policy with these pauses.
    #[must_use]
    pub const fn with_pauses(mut self, first: Duration, longest: Duration) -> Self {
        self.first_pause = first;
        self.longest_pause = longest;
        self
    }
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self::new(FailureAction::Stop)
    }
}

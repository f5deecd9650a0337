//! What to do when a handler fails.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::cursor::CursorId;
use crate::backoff::backoff;
use crate::error::BoxError;
use crate::event::Event;

/// What happens when a handler fails at an event: the event is tried again some times, and then the action is taken. An event
/// that cannot be decoded counts as a failure too.
///
/// The default tries five times, with pauses from 100 ms up to 10 s, and then lets the partition
/// [rest](FailureAction::Rest).
///
/// This is the same for every error. To decide for each error, let the handler return [`Failed`], or set a function with
/// [`decide_on_failure`](super::Subscription::decide_on_failure).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FailurePolicy {
    /// The most tries of an event, the first included; 0 counts as 1. A lease that was lost at the event counts as a try.
    pub attempts: u32,
    /// The upper bound of the first pause; each is a random part of its bound, and bounds double.
    pub first_pause: Duration,
    /// The upper bound of all pauses, and the length of the rest after [`Rest`](FailureAction::Rest) and
    /// [`Stop`](FailureAction::Stop). During the rest the cursor cannot be claimed, so nobody fails at full speed.
    pub longest_pause: Duration,
    /// What to do after the last try.
    pub action: FailureAction,
}

/// What to do with an event at which the handler failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureAction {
    /// The partition stops before the event and rests for [`longest_pause`](FailurePolicy::longest_pause). Then the event is
    /// tried once more, by any process, and the partition rests again if that fails. Other partitions go on, and the run
    /// does not end. The error is stored with the cursor. [`CursorState::rest`](crate::CursorState::rest) tells how long
    /// the rest lasts, and [`resume_subscription`](crate::EventStore::resume_subscription) ends it.
    Rest,
    /// The run ends with the handler's error, in this process. The error is stored with the cursor, and the partition rests as
    /// with [`Rest`](Self::Rest). If another process runs the subscription, it claims the cursor after the rest, tries the
    /// event once, and its run ends as well.
    Stop,
    /// The event is skipped for good.
    Skip,
    /// The event is parked with its error. Later events of the same aggregate wait for it; all others go on. If
    /// [too many](super::Subscription::with_most_parked) are parked already, the partition rests instead.
    Park,
    /// The event is parked with its error. All others go on, also those of the same aggregate.
    ParkAlone,
    /// The event is tried again after this time. The try counts.
    RetryAfter(Duration),
    /// The event is not at fault: something that the handler needs is down. The partition pauses, and then tries one event
    /// again and again, with growing pauses up to [`longest_pause`](FailurePolicy::longest_pause), until that succeeds.
    /// These tries do not count.
    DependencyDown,
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

    /// The pause after this many tries: a random part of a bound that doubles.
    pub(crate) fn pause(&self, tries: u32) -> Duration {
        backoff(tries, self.first_pause, self.longest_pause)
    }
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self::new(FailureAction::Rest)
    }
}

/// An error of a handler that says what to do about it. It goes before the [policy](FailurePolicy).
///
/// ```
/// # use evercore_core::{BoxError, Delivered, Failed};
/// # fn send(_: &Delivered) -> std::io::Result<()> { Ok(()) }
/// async fn mail(event: Delivered) -> Result<(), BoxError> {
///     // The mail server is down: every event would fail, so none of them is at fault.
///     send(&event).map_err(Failed::dependency_down)?;
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Failed {
    action: FailureAction,
    source: BoxError,
}

impl Failed {
    /// This error, and what to do about it.
    pub fn new(action: FailureAction, error: impl Into<BoxError>) -> Self {
        Self { action, source: error.into() }
    }

    /// Something that the handler needs is down: [`DependencyDown`](FailureAction::DependencyDown).
    pub fn dependency_down(error: impl Into<BoxError>) -> Self {
        Self::new(FailureAction::DependencyDown, error)
    }

    /// The handler's request.
    pub const fn action(&self) -> FailureAction {
        self.action
    }

    pub(crate) fn into_source(self) -> BoxError {
        self.source
    }

    /// In this error, or among its causes.
    pub(crate) fn within<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(failed) = error.downcast_ref() {
                return Some(failed);
            }
            next = error.source();
        }
        None
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.action {
            FailureAction::Rest => "the handler lets the partition rest",
            FailureAction::Stop => "the handler stops the subscription",
            FailureAction::Skip => "the handler skips the event",
            FailureAction::Park | FailureAction::ParkAlone => "the handler parks the event",
            FailureAction::RetryAfter(_) => "the handler asks for another try",
            FailureAction::DependencyDown => "something that the handler needs is down",
        })
    }
}

impl StdError for Failed {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.source)
    }
}

/// A failure of a handler, for a function that [decides](super::Subscription::decide_on_failure) about it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct FailedEvent<'a> {
    /// The handler's error.
    pub error: &'a (dyn StdError + Send + Sync + 'static),
    /// The event. If several events were tried together, and it is not known which of them failed, it is the first of them;
    /// then only [`DependencyDown`](FailureAction::DependencyDown) counts, and after any other answer the events are tried
    /// one by one.
    pub event: &'a Event,
    /// The number of this try: 1 for the first.
    pub attempt: u32,
    /// Whether the event was handled before, by another version or before a reset.
    pub is_replay: bool,
    /// The cursor: subscription, version and partition.
    pub cursor: &'a CursorId,
    pub(crate) policy: FailurePolicy,
}

impl FailedEvent<'_> {
    /// The decision without the function: the handler's request with [`Failed`], or the policy.
    pub fn usual(&self) -> FailureAction {
        match Failed::within(self.error) {
            Some(failed) => failed.action,
            None if self.attempt < self.policy.attempts => {
                FailureAction::RetryAfter(self.policy.pause(self.attempt))
            }
            None => self.policy.action,
        }
    }
}

/// The function of the user that decides about failures.
#[derive(Clone)]
pub(crate) struct Decide(pub(crate) Arc<dyn Fn(&FailedEvent<'_>) -> FailureAction + Send + Sync>);

impl fmt::Debug for Decide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a function")
    }
}

/// The fewest leases that are lost at an event before the policy acts on it without another try. A process may also have
/// ended for another reason.
const LOST_LEASES: u32 = 3;

/// Whether too many leases were lost at the next event to try it again.
pub(crate) fn is_lost_too_often(lost_leases: u32, policy: &FailurePolicy) -> bool {
    lost_leases >= policy.attempts.max(LOST_LEASES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_handler_asks_for_is_found_below_other_errors() {
        let failed = Failed::dependency_down("connection refused");
        let wrapped = crate::Error::rejected(failed);
        let found = Failed::within(&wrapped).map(Failed::action);
        assert_eq!(found, Some(FailureAction::DependencyDown));
        assert!(Failed::within(&crate::Error::closed()).is_none());
    }

    #[test]
    fn a_process_that_dies_for_its_own_reasons_condemns_no_event() {
        let once = FailurePolicy::default().with_attempts(1);
        assert!(!is_lost_too_often(2, &once) && is_lost_too_often(3, &once));
        assert!(!is_lost_too_often(4, &FailurePolicy::default()));
        assert!(is_lost_too_often(5, &FailurePolicy::default()));
    }
}

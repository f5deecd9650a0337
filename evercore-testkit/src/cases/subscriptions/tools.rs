//! Helpers of the cases of subscriptions.

use std::time::Duration;

use evercore_core::{CursorState, EventStore, FailureAction, FailurePolicy, Position, RunEnd, Subscription};

use crate::tools::*;

pub(super) const LEASE: Duration = Duration::from_millis(300);
pub(super) const NO_PAUSE: Duration = Duration::ZERO;
pub(super) const SOON: Duration = Duration::from_secs(20);

pub(super) fn subscription(store: &EventStore, name: &str) -> Subscription {
    store.subscription(name).unwrap().with_lease(LEASE).with_batch(events_per_page(7))
}

/// Runs until the handler has got this many events.
pub(super) async fn run_until(engine: &Engine, of: &Subscription, seen: &Seen, count: usize) -> RunEnd {
    let handler = seen.clone();
    let shutdown = until(engine, || seen.len() >= count);
    let end = of.run(shutdown, move |event| {
        handler.push(&event);
        async { Ok(()) }
    });
    end.await.unwrap()
}

pub(super) async fn state(store: &EventStore, name: &str) -> CursorState {
    store.subscription_states(name).await.unwrap().remove(0)
}

pub(super) async fn events_seen(engine: &Engine, of: &Subscription, count: usize) -> Vec<i64> {
    let seen = Seen::default();
    assert_eq!(run_until(engine, of, &seen, count).await, RunEnd::ShutDown);
    seen.numbers()
}

pub(super) fn no_pause(action: FailureAction) -> FailurePolicy {
    FailurePolicy::new(action).with_attempts(3).with_pauses(NO_PAUSE, NO_PAUSE)
}

pub(super) async fn state_or_none(store: &EventStore, name: &str) -> Option<Position> {
    store.subscription_states(name).await.ok().map(|states| states[0].cursor.position)
}

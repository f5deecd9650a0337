//! Spans, events and metrics of the optional features `tracing` and `metrics`.
//!
//! All names are here and in docs/observability.md. None of them shows a payload, a natural key or the text of a user's
//! error.

#![cfg_attr(not(all(feature = "tracing", feature = "metrics")), allow(unused_variables))]

use std::future::Future;
use std::time::Duration;

#[cfg(feature = "tracing")]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::ids::Position;
#[cfg(feature = "metrics")]
use crate::subscription::CursorStatus;
use crate::subscription::{Cursor, CursorId, CursorState, Delivery, Outcome};

/// Adds to a counter with labels.
macro_rules! count {
    ($name:literal, $count:expr $(, $label:literal => $value:expr)*) => {
        #[cfg(feature = "metrics")]
        metrics::counter!($name $(, $label => $value)*).increment($count);
    };
}

/// Emits a tracing event.
macro_rules! say {
    ($level:ident, $($rest:tt)*) => {
        #[cfg(feature = "tracing")]
        tracing::$level!(target: "evercore", $($rest)*);
    };
}

/// A span around a future.
macro_rules! spanned {
    ($future:expr, $($rest:tt)*) => {{
        #[cfg(feature = "tracing")]
        {
            tracing::Instrument::instrument($future, tracing::info_span!(target: "evercore", $($rest)*))
        }
        #[cfg(not(feature = "tracing"))]
        {
            $future
        }
    }};
}

/// Describes each metric to the recorder. Repeating it is harmless.
pub(crate) fn describe() {
    #[cfg(feature = "metrics")]
    {
        for (name, help) in COUNTERS {
            metrics::describe_counter!(*name, *help);
        }
        for (name, help) in GAUGES {
            metrics::describe_gauge!(*name, *help);
        }
        for (name, help) in SECONDS {
            metrics::describe_histogram!(*name, metrics::Unit::Seconds, *help);
        }
    }
}

#[cfg(feature = "metrics")]
const COUNTERS: &[(&str, &str)] = &[
    ("evercore_commits_total", "Units of work that were committed."),
    ("evercore_committed_events_total", "Events of committed units of work."),
    ("evercore_conflicts_total", "Commits that met a conflict."),
    ("evercore_commit_errors_total", "Commits that failed for another reason than a conflict."),
    (
        "evercore_retries_total",
        "Work that was run again after a conflict, or because the engine was unavailable.",
    ),
    ("evercore_loads_total", "Aggregates that were loaded."),
    ("evercore_snapshots_ignored_total", "Snapshots that did not decode and were ignored."),
    (
        "evercore_snapshots_skipped_total",
        "Snapshots that were not written: the state does not come back from its codec.",
    ),
    ("evercore_deliveries_total", "Deliveries to handlers of subscriptions."),
    ("evercore_delivered_events_total", "Events that handlers have handled."),
    ("evercore_handler_failures_total", "Handler calls that failed."),
    ("evercore_rests_total", "Partitions that rest, because their handler failed at an event."),
    (
        "evercore_dependency_waits_total",
        "Failures that no event causes: a dependency of the handler is down, or its read model is locked or slow.",
    ),
    ("evercore_subscription_store_errors_total", "Errors of the store that a subscription waited out."),
    (
        "evercore_smaller_deliveries_total",
        "Deliveries to projections that were made smaller, because they were slow.",
    ),
    ("evercore_parked_events_total", "Events that were parked after their handler had failed."),
    ("evercore_skipped_events_total", "Events that were skipped after their handler had failed."),
    (
        "evercore_tails_lost_total",
        "Returns to a stored cursor, because the log had lost events that were read.",
    ),
    ("evercore_lease_changes_total", "Leases of cursors that were claimed, released, lost or wanted."),
];

#[cfg(feature = "metrics")]
const GAUGES: &[(&str, &str)] = &[
    ("evercore_lag_events", "Events after the cursor, as of its last move or the last query of the health."),
    ("evercore_lag_seconds", "How long ago the oldest event after the cursor was recorded."),
    ("evercore_parked_events", "Parked events of the cursor."),
    ("evercore_oldest_parked_seconds", "How long ago the first of the parked events was parked."),
    ("evercore_failed_attempts", "Attempts at the event at which the handler fails; 0 if it does not fail."),
    ("evercore_cursor_status", "Whether the cursor may be moved: 0 active, 1 paused, 2 retired."),
    ("evercore_held_back_aggregates", "Aggregates that wait for a parked event."),
];

#[cfg(feature = "metrics")]
const SECONDS: &[(&str, &str)] = &[
    ("evercore_commit_seconds", "How long commits took, also those that failed."),
    ("evercore_delivery_seconds", "How long handlers took."),
];

/// Observes a commit.
pub(crate) async fn commit<T>(batch_events: usize, work: impl Future<Output = Result<T>>) -> Result<T> {
    #[cfg(feature = "metrics")]
    let began = std::time::Instant::now();
    let outcome = spanned!(work, "commit", events = batch_events).await;
    #[cfg(feature = "metrics")]
    metrics::histogram!("evercore_commit_seconds").record(began.elapsed().as_secs_f64());
    committed(batch_events, outcome.as_ref().err());
    outcome
}

fn committed(events: usize, error: Option<&Error>) {
    let Some(error) = error else {
        count!("evercore_commits_total", 1);
        count!("evercore_committed_events_total", events as u64);
        return;
    };
    if error.is_conflict() {
        count!("evercore_conflicts_total", 1);
        say!(debug, "a commit met a conflict");
    } else {
        count!("evercore_commit_errors_total", 1);
        refused(error);
    }
}

/// Emits a tracing event for a failed commit: a warning, unless applications expect such an error.
fn refused(error: &Error) {
    #[cfg(feature = "tracing")]
    if is_an_answer(error) {
        say!(debug, kind = kind(error), "a commit was refused");
    } else {
        say!(warn, kind = kind(error), "a commit failed");
    }
}

/// Whether applications expect this error, so that it is no problem of the store.
#[cfg(feature = "tracing")]
fn is_an_answer(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::KeyTaken { .. }
            | ErrorKind::NotFound
            | ErrorKind::Rejected
            | ErrorKind::CommandReused
            | ErrorKind::CommandAbandoned
    )
}

/// Observes a load.
pub(crate) fn load<T>(
    aggregate_type: &'static str,
    work: impl Future<Output = T>,
) -> impl Future<Output = T> {
    count!("evercore_loads_total", 1);
    spanned!(work, "load", aggregate_type)
}

/// Work is repeated after a conflict, or because the engine was unavailable.
pub(crate) fn run_again() {
    count!("evercore_retries_total", 1);
}

/// A snapshot did not decode.
pub(crate) fn ignored_snapshot() {
    count!("evercore_snapshots_ignored_total", 1);
    say!(warn, "a snapshot did not decode and was ignored; the events are replayed");
}

/// A state could not be kept as a snapshot.
pub(crate) fn skipped_snapshot(aggregate_type: &'static str) {
    count!("evercore_snapshots_skipped_total", 1);
    say!(warn, aggregate_type, "a state cannot be kept as a snapshot");
}

/// Observes a handler.
pub(crate) fn within<T>(delivery: &Delivery, work: impl Future<Output = T>) -> impl Future<Output = T> {
    spanned!(
        work,
        "deliver",
        subscription = delivery.cursor().subscription.as_str(),
        version = delivery.cursor().version,
        partition = delivery.cursor().partition,
        events = delivery.events().len(),
        first = delivery.events().first().map(|event| event.position().get()),
        attempt = delivery.attempt(),
        replay = delivery.is_replay(),
    )
}

pub(crate) fn delivered(delivery: &Delivery, outcome: &Outcome, time: Duration) {
    let handled = match outcome {
        Outcome::Advanced(_) => delivery.events().len(),
        Outcome::Handled(handled) | Outcome::Failed { handled, .. } => *handled,
        Outcome::Hindered { .. } | Outcome::Refused(_) => 0,
    };
    count!("evercore_deliveries_total", 1, "subscription" => name(delivery.cursor()), "version" => version(delivery.cursor()));
    count!("evercore_delivered_events_total", handled as u64, "subscription" => name(delivery.cursor()), "version" => version(delivery.cursor()));
    #[cfg(feature = "metrics")]
    metrics::histogram!("evercore_delivery_seconds", "subscription" => name(delivery.cursor()), "version" => version(delivery.cursor()))
        .record(time.as_secs_f64());
}

pub(crate) fn retried(cursor: &CursorId, delivery: &Delivery, pause: Duration) {
    count!("evercore_handler_failures_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    say!(
        warn,
        subscription = cursor.subscription.as_str(),
        partition = cursor.partition,
        first = delivery.events().first().map(|event| event.position().get()),
        events = delivery.events().len(),
        attempt = delivery.attempt(),
        pause_ms = pause.as_millis() as u64,
        "a handler failed; its events are tried again"
    );
}

pub(crate) fn stopped(cursor: &CursorId, position: Position, attempts: u32) {
    count!("evercore_handler_failures_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    count!("evercore_rests_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    say!(
        error,
        subscription = cursor.subscription.as_str(),
        partition = cursor.partition,
        position = position.get(),
        attempts,
        "a partition of a subscription stops and rests, because its handler failed"
    );
}

/// Something that a handler needs is down, or its read model is locked.
pub(crate) fn waits(cursor: &CursorId, event: Option<&Event>, probes: u32) {
    count!("evercore_dependency_waits_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    if is_told(probes) {
        say!(
            warn,
            subscription = cursor.subscription.as_str(),
            partition = cursor.partition,
            position = event.map(|event| event.position().get()),
            probes,
            "what a handler needs is down or locked; one event is tried again and again"
        );
    }
}

/// The dependency of a handler is back.
pub(crate) fn works_again(cursor: &CursorId) {
    say!(
        info,
        subscription = cursor.subscription.as_str(),
        partition = cursor.partition,
        "what a handler needs is there again"
    );
}

/// The engine failed this many times in a row, and the subscription waits.
pub(crate) fn store_failed(cursor: &CursorId, error: &Error, failures: u32) {
    count!("evercore_subscription_store_errors_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    if is_told(failures) {
        say!(
            warn,
            subscription = cursor.subscription.as_str(),
            kind = kind(error),
            failures,
            "the store failed; a subscription waits and tries again"
        );
    }
}

/// The 1st, 2nd, 4th, 8th, … of many in a row.
#[cfg_attr(not(feature = "tracing"), allow(dead_code))]
const fn is_told(nth: u32) -> bool {
    nth.is_power_of_two()
}

/// Deliveries have another size from now on, because the last one took this long.
pub(crate) fn resized(cursor: &CursorId, events: usize, took: Duration) {
    count!("evercore_smaller_deliveries_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    say!(
        warn,
        subscription = cursor.subscription.as_str(),
        partition = cursor.partition,
        events,
        took_ms = took.as_millis() as u64,
        "a delivery took too much of its time limit; the next ones have fewer events"
    );
}

pub(crate) fn too_many_parked(cursor: &CursorId, position: Position) {
    say!(
        error,
        subscription = cursor.subscription.as_str(),
        partition = cursor.partition,
        position = position.get(),
        "too many events are parked; the partition rests instead"
    );
}

pub(crate) fn skipped(cursor: &CursorId, position: Position, attempts: u32) {
    count!("evercore_handler_failures_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    count!("evercore_skipped_events_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    say!(
        error,
        subscription = cursor.subscription.as_str(),
        position = position.get(),
        attempts,
        "an event is skipped, because its handler failed"
    );
}

pub(crate) fn parked_one(cursor: &CursorId, position: Position, attempts: u32) {
    count!("evercore_handler_failures_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    count!("evercore_parked_events_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    say!(
        error,
        subscription = cursor.subscription.as_str(),
        position = position.get(),
        attempts,
        "an event is parked, because its handler failed"
    );
}

/// How many aggregates wait for a parked event.
pub(crate) fn held_back(cursor: &CursorId, aggregates: usize) {
    #[cfg(feature = "metrics")]
    metrics::gauge!("evercore_held_back_aggregates", "subscription" => name(cursor), "version" => version(cursor), "partition" => partition(cursor))
        .set(aggregates as f64);
}

pub(crate) fn moved(cursor: &Cursor, head: Position) {
    #[cfg(feature = "metrics")]
    metrics::gauge!(
        "evercore_lag_events",
        "subscription" => name(&cursor.id), "version" => version(&cursor.id),
        "partition" => partition(&cursor.id)
    )
    .set((head.get() - cursor.position.get()).max(0) as f64);
}

/// The state of a cursor, which somebody has asked for. A retired cursor has nothing to do any more.
pub(crate) fn sampled(state: &CursorState) {
    #[cfg(feature = "metrics")]
    {
        let id = &state.cursor.id;
        let is_retired = state.cursor.status == CursorStatus::Retired;
        let (lag_events, lag_time) =
            if is_retired { (0, Duration::ZERO) } else { (state.lag_events, state.lag_time) };
        let attempts = state.cursor.failure.as_ref().map_or(0, |failure| failure.attempts);
        let set = |gauge: &'static str, value: f64| {
            let labels = [("subscription", name(id)), ("version", version(id)), ("partition", partition(id))];
            metrics::gauge!(gauge, &labels).set(value);
        };
        set("evercore_lag_events", lag_events as f64);
        set("evercore_lag_seconds", lag_time.as_secs_f64());
        set("evercore_parked_events", state.parked as f64);
        set("evercore_oldest_parked_seconds", state.parked_time.as_secs_f64());
        set("evercore_failed_attempts", f64::from(attempts));
        set("evercore_cursor_status", f64::from(state.cursor.status.code()));
    }
}

/// The health could not be asked for.
pub(crate) fn not_sampled(error: &Error) {
    say!(warn, kind = kind(error), "the health of the subscriptions is not known");
}

/// A runner goes back to the stored cursor.
pub(crate) fn tail_lost(cursor: &CursorId, position: Position) {
    count!("evercore_tails_lost_total", 1, "subscription" => name(cursor), "version" => version(cursor));
    say!(
        warn,
        subscription = cursor.subscription.as_str(),
        position = position.get(),
        "the log has lost its tail; a subscription goes back to its stored cursor"
    );
}

/// A version that has caught up does not take over.
pub(crate) fn waits_to_take_over(cursor: &CursorId, why: &'static str) {
    count!(
        "evercore_lease_changes_total", 1,
        "subscription" => name(cursor), "version" => version(cursor), "change" => "waits to take over"
    );
    say!(
        warn,
        subscription = cursor.subscription.as_str(),
        version = cursor.version,
        why,
        "a version has caught up and does not take over"
    );
}

pub(crate) fn lease_changed(cursor: &CursorId, change: &'static str) {
    count!("evercore_lease_changes_total", 1, "subscription" => name(cursor), "version" => version(cursor), "change" => change);
    say!(
        info,
        subscription = cursor.subscription.as_str(),
        version = cursor.version,
        partition = cursor.partition,
        change,
        "a lease changed"
    );
}

#[cfg(feature = "metrics")]
fn name(cursor: &CursorId) -> String {
    cursor.subscription.as_str().to_owned()
}

#[cfg(feature = "metrics")]
fn version(cursor: &CursorId) -> String {
    cursor.version.to_string()
}

#[cfg(feature = "metrics")]
fn partition(cursor: &CursorId) -> String {
    cursor.partition.to_string()
}

/// The kind without its values.
#[cfg(feature = "tracing")]
fn kind(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::KeyTaken { .. } => "KeyTaken",
        ErrorKind::NotFound => "NotFound",
        ErrorKind::OutcomeUnknown => "OutcomeUnknown",
        ErrorKind::Unavailable => "Unavailable",
        ErrorKind::Full => "Full",
        ErrorKind::ReadOnly => "ReadOnly",
        ErrorKind::Backend => "Backend",
        ErrorKind::NotAStore => "NotAStore",
        ErrorKind::SchemaTooNew { .. } => "SchemaTooNew",
        ErrorKind::Invalid => "Invalid",
        ErrorKind::CursorAhead { .. } => "CursorAhead",
        ErrorKind::Closed => "Closed",
        ErrorKind::Rejected => "Rejected",
        _ => "other",
    }
}

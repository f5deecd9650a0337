//! The spans and metrics of the features `tracing` and `metrics`, by their documented names.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use evercore_memory::{
    Aggregate, AsOf, EventStore, FailureAction, FailurePolicy, Json, MemoryEngine, Sequence, Timestamp,
};
use futures_lite::future::block_on;
use metrics::{Counter, Gauge, Histogram, Key as MetricKey, KeyName, Recorder, SharedString, Unit};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use serde::{Deserialize, Serialize};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Patient {
    fever: f64,
}

#[derive(Serialize, Deserialize)]
enum PatientEvent {
    Admitted(String),
}

impl Aggregate for Patient {
    const TYPE: &'static str = "patient";
    const SNAPSHOT_EVERY: u32 = 2;
    type Event = PatientEvent;
    type Codec = Json;

    /// JSON cannot represent this number, so no snapshot is stored.
    fn apply(&mut self, _: PatientEvent) {
        self.fever = f64::INFINITY;
    }
}

/// The counters and gauges, summed over all labels of a name.
fn values(snapshotter: &Snapshotter) -> BTreeMap<String, f64> {
    let mut values = BTreeMap::new();
    for (key, _, _, value) in snapshotter.snapshot().into_vec() {
        let value = match value {
            DebugValue::Counter(count) => count as f64,
            DebugValue::Gauge(value) => value.into_inner(),
            DebugValue::Histogram(all) => all.len() as f64,
        };
        *values.entry(key.key().name().to_owned()).or_insert(0.0) += value;
    }
    values
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

async fn work(store: &EventStore) {
    for number in 0..4 {
        let mut work = store.begin();
        let mut patient = work.create_with_key::<Patient>(format!("secret key {number}")).await.unwrap();
        work.record(&mut patient, PatientEvent::Admitted("secret illness".to_owned())).unwrap();
        work.commit().await.unwrap();
    }
    let stale = store.load::<Patient>("secret key 0").await.unwrap();
    for is_stale in [false, true] {
        let (mut work, mut patient) = (store.begin(), stale.clone());
        work.record(&mut patient, PatientEvent::Admitted("secret again".to_owned())).unwrap();
        assert_eq!(work.commit().await.is_err(), is_stale);
    }
    let policy =
        FailurePolicy::new(FailureAction::Park).with_attempts(2).with_pauses(Duration::ZERO, Duration::ZERO);
    let of = store.subscription("wards").unwrap().on_failure(policy);
    let shutdown = async {
        while store.subscription_states("wards").await.map_or(5, |states| states[0].lag_events) > 0 {
            store.engine().pause(Duration::from_millis(1)).await;
        }
    };
    let handler = |event: evercore_memory::Delivered| async move {
        if event.position().get() == 2 { Err("secret error".into()) } else { Ok(()) }
    };
    of.run(shutdown, handler).await.unwrap();
    store.health().await.unwrap();
}

/// One test at a time, because `tracing` caches its decision about a place in the code for all threads.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn commits_loads_deliveries_and_leases_are_told_without_any_content() {
    let _alone = alone();
    let (recorder, lines) = (DebuggingRecorder::new(), Lines::default());
    let (snapshotter, writer) = (recorder.snapshotter(), lines.clone());
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_span_events(tracing_subscriber::fmt::format::FmtSpan::CLOSE)
        .with_writer(move || writer.clone())
        .finish();
    let store = EventStore::new(MemoryEngine::new());
    let _guard = tracing_subscriber::util::SubscriberInitExt::set_default(subscriber);
    metrics::with_local_recorder(&recorder, || block_on(work(&store)));

    let values = values(&snapshotter);
    let expected = [
        ("evercore_commits_total", 5.0),
        ("evercore_committed_events_total", 5.0),
        ("evercore_conflicts_total", 1.0),
        ("evercore_commit_seconds", 6.0),
        ("evercore_loads_total", 1.0),
        ("evercore_snapshots_skipped_total", 2.0), // including the one of the unit with a conflict
        ("evercore_delivered_events_total", 4.0),
        ("evercore_parked_events_total", 1.0),
        ("evercore_handler_failures_total", 2.0),
        ("evercore_held_back_aggregates", 1.0),
        ("evercore_lag_events", 0.0),
        ("evercore_lag_seconds", 0.0),
        ("evercore_parked_events", 1.0),
        ("evercore_failed_attempts", 0.0),
        ("evercore_cursor_status", 0.0),
        ("evercore_lease_changes_total", 2.0),
    ];
    for (name, value) in expected {
        assert_eq!(values.get(name), Some(&value), "{name} in {values:#?}");
    }
    assert!(values["evercore_oldest_parked_seconds"] > 0.0);
    assert!(values["evercore_deliveries_total"] >= 3.0 && values["evercore_delivery_seconds"] >= 3.0);

    let told = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    for line in [
        "commit{events=1}",
        "load{aggregate_type=\"patient\"}",
        "deliver{subscription=\"wards\"",
        "an event is parked",
        "a state cannot be kept as a snapshot",
    ] {
        assert!(told.contains(line), "{line} in {told}");
    }
    assert!(!told.contains("secret"), "{told}");
    assert!(!format!("{values:?}").contains("secret"));
}

#[test]
fn every_load_is_counted_and_every_metric_is_described() {
    let _alone = alone();
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    metrics::with_local_recorder(&recorder, || {
        block_on(async {
            let store = EventStore::new(MemoryEngine::new());
            work(&store).await;
            values(&snapshotter); // reading resets a counter
            store.load::<Patient>("secret key 0").await.unwrap();
            store.load_as_of::<Patient>("secret key 0", AsOf::Sequence(Sequence::ZERO)).await.unwrap();
            store.load_as_of::<Patient>("secret key 0", AsOf::Time(Timestamp::MAX)).await.unwrap();
            store.begin().load::<Patient>("secret key 0").await.unwrap();
            store
                .update("secret key 0", |_: &Patient| [PatientEvent::Admitted(String::new())])
                .await
                .unwrap();
        });
    });
    let mut loads = 0;
    for (key, _, help, value) in snapshotter.snapshot().into_vec() {
        let name = key.key().name();
        assert!(help.is_some_and(|help| help.ends_with('.')), "{name} has no help");
        if let ("evercore_loads_total", DebugValue::Counter(count)) = (name, value) {
            loads += count;
        }
    }
    assert_eq!(loads, 5);
}

/// Collects the names of described metrics.
#[derive(Default)]
struct Described(Mutex<BTreeSet<String>>);

impl Described {
    fn add(&self, name: &KeyName) {
        self.0.lock().unwrap().insert(name.as_str().to_owned());
    }
}

impl Recorder for Described {
    fn describe_counter(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
        self.add(&name);
    }

    fn describe_gauge(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
        self.add(&name);
    }

    fn describe_histogram(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
        self.add(&name);
    }

    fn register_counter(&self, _: &MetricKey, _: &metrics::Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, _: &MetricKey, _: &metrics::Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &MetricKey, _: &metrics::Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// Some metrics count rare events, so that the test above never sees them.
#[test]
fn the_metrics_of_the_guide_are_those_that_are_described() {
    let _alone = alone();
    let described = Described::default();
    metrics::with_local_recorder(&described, || EventStore::new(MemoryEngine::new()));
    let guide = include_str!("../../docs/observability.md");
    let names = guide.split('`').filter(|word| word.starts_with("evercore_")).map(str::to_owned);
    assert_eq!(names.collect::<BTreeSet<_>>(), described.0.into_inner().unwrap());
}

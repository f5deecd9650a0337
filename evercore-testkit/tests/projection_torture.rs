//! Tests of the crash tests: correct handlers survive every seed, and each wrong one is caught within a few seeds.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use evercore_core::engine::Sink;
use evercore_core::{AggregateId, BoxError, Delivered, Event, EventStore, EventType, Filter, Position};
use evercore_memory::MemoryEngine;
use evercore_testkit::block_on;
use evercore_testkit::projection::{
    Dice, Fault, ProjectionUnderTest, Torture, each, may_crash_here, plain_events, whole,
};

/// A table with the number of events of each aggregate, the sum of their numbers, and the last number.
type Model = BTreeMap<AggregateId, (usize, i64, i64)>;

/// The storage, which survives a crash.
#[derive(Clone, Debug, Default)]
struct Tables {
    model: Model,
    /// The handled positions, as a table with a unique key.
    handled: BTreeSet<Position>,
    /// The last handled position.
    last: Position,
}

type Storage = Arc<Mutex<Tables>>;

fn number(event: &Event) -> i64 {
    std::str::from_utf8(event.payload()).unwrap().parse().unwrap()
}

impl Tables {
    fn count(&mut self, event: &Event) {
        let (events, sum, last) = self.model.entry(event.aggregate()).or_default();
        (*events, *sum, *last) = (*events + 1, *sum + number(event), number(event));
    }

    fn count_once(&mut self, event: &Event) {
        if self.handled.insert(event.position()) {
            self.count(event);
        }
    }
}

fn fold(events: &[Event]) -> Model {
    let mut of: BTreeMap<AggregateId, Vec<i64>> = BTreeMap::new();
    events.iter().for_each(|event| of.entry(event.aggregate()).or_default().push(number(event)));
    of.into_iter().map(|(id, all)| (id, (all.len(), all.iter().sum(), all[all.len() - 1]))).collect()
}

/// A projection into separate tables; only the handler differs.
macro_rules! projections {
    ($($(#[$doc:meta])* $name:ident($storage:ident, $engine:ident) $handler:block)*) => {
        $($(#[$doc])*
        struct $name(Storage, Arc<MemoryEngine>);

        impl ProjectionUnderTest for $name {
            type Engine = MemoryEngine;
            type Model = Model;

            async fn empty(engine: &Arc<MemoryEngine>) -> Self {
                Self(Storage::default(), Arc::clone(engine))
            }

            fn handler(&self) -> impl Sink + 'static {
                let ($storage, $engine) = (Arc::clone(&self.0), Arc::clone(&self.1));
                let _ = &$engine;
                $handler
            }

            async fn clear(&self) {
                *self.0.lock().unwrap() = Tables::default();
            }

            async fn model(&self) -> Model {
                self.0.lock().unwrap().model.clone()
            }

            async fn happen(store: &EventStore, dice: &mut Dice) {
                plain_events(store, dice).await;
            }

            fn fold(events: &[Event]) -> Model {
                fold(events)
            }
        })*
    };
}

/// A handler that does everything at once, with an await before it and one after it.
fn at_once<F>(storage: Storage, handle: F) -> impl Sink + 'static
where
    F: Fn(&mut Tables, &Delivered) -> Result<(), BoxError> + Clone + Send + Sync + 'static,
{
    each(move |event| {
        let (storage, handle) = (Arc::clone(&storage), handle.clone());
        async move {
            may_crash_here().await;
            handle(&mut storage.lock().unwrap(), &event)?;
            may_crash_here().await;
            Ok(())
        }
    })
}

projections! {
    /// Right: a unique key makes each position count once.
    Idempotent(storage, _engine) {
        at_once(storage, |tables, event| {
            tables.count_once(event);
            Ok(())
        })
    }

    /// Right: the last position is in the storage, and a whole batch is written at once.
    Guarded(storage, _engine) {
        whole(move |delivery| {
            let storage = Arc::clone(&storage);
            async move {
                may_crash_here().await;
                let mut tables = storage.lock().unwrap();
                for event in delivery.events() {
                    if event.position() > tables.last {
                        tables.last = event.position();
                        tables.count(event);
                    }
                }
                Ok(())
            }
        })
    }

    /// Right, although it counts every event that comes: a sink of the engine writes in the transaction of the
    /// cursor.
    ExactlyOnce(storage, engine) {
        engine.projection(storage, |tables: &mut Tables, delivery| {
            delivery.events().iter().for_each(|event| tables.count(event));
            Ok(())
        })
    }

    /// Wrong: counts every event that comes.
    Counts(storage, _engine) {
        at_once(storage, |tables, event| {
            tables.count(event);
            Ok(())
        })
    }

    /// Wrong: the last position is only in memory. It is gone after a crash and wrong after a reset.
    RemembersInMemory(storage, _engine) {
        let seen = Arc::new(AtomicI64::new(0));
        at_once(storage, move |tables, event| {
            let position = event.position().get();
            if seen.fetch_max(position, Ordering::AcqRel) < position {
                tables.count(event);
            }
            Ok(())
        })
    }

    /// Wrong: treats a delivery as one event.
    LastOfBatch(storage, _engine) {
        whole(move |delivery| {
            let storage = Arc::clone(&storage);
            async move {
                if let Some(last) = delivery.events().last() {
                    storage.lock().unwrap().count_once(last);
                }
                Ok(())
            }
        })
    }

    /// Wrong: returns early and writes in the background, up to three events later. If the process ends regularly, it
    /// writes the rest.
    WritesLater(storage, _engine) {
        let buffer = Buffer { waiting: Mutex::default(), storage };
        let buffer = Arc::new(buffer);
        each(move |event| {
            let buffer = Arc::clone(&buffer);
            async move {
                buffer.waiting.lock().unwrap().push(event.event().clone());
                if buffer.waiting.lock().unwrap().len() >= 3 {
                    buffer.flush();
                }
                Ok(())
            }
        })
    }

    /// Wrong: believes that a replayed event is in the table already.
    SkipsReplays(storage, _engine) {
        at_once(storage, |tables, event| {
            if !event.is_replay() {
                tables.count_once(event);
            }
            Ok(())
        })
    }

    /// Wrong: inserts, and always fails if the row exists.
    Inserts(storage, _engine) {
        at_once(storage, |tables, event| {
            if !tables.handled.insert(event.position()) {
                return Err("duplicate key".into());
            }
            tables.count(event);
            Ok(())
        })
    }

    /// Wrong: believes that the first attempt has done the work.
    SkipsRetries(storage, _engine) {
        at_once(storage, |tables, event| {
            if event.attempt() == 1 {
                tables.count_once(event);
            }
            Ok(())
        })
    }

    /// Wrong: stores the position first, and counts after an await.
    NotesTooEarly(storage, _engine) {
        each(move |event| {
            let storage = Arc::clone(&storage);
            async move {
                let is_new = storage.lock().unwrap().handled.insert(event.position());
                may_crash_here().await;
                if is_new {
                    storage.lock().unwrap().count(&event);
                }
                Ok(())
            }
        })
    }

    /// Wrong in the last column: overwrites it with every event, also with late ones.
    OverwritesLate(storage, _engine) {
        at_once(storage, |tables, event| {
            tables.count_once(event);
            tables.model.get_mut(&event.aggregate()).unwrap().2 = number(event);
            Ok(())
        })
    }

    /// Wrong: a sink of the engine that also writes outside of the transaction.
    WritesBeside(storage, engine) {
        let beside = Arc::clone(&storage);
        engine.projection(Arc::default(), move |_: &mut Tables, delivery| {
            delivery.events().iter().for_each(|event| beside.lock().unwrap().count(event));
            if delivery.events().len() > 1 { Err("too many".into()) } else { Ok(()) }
        })
    }
}

/// Events that are not written yet.
struct Buffer {
    waiting: Mutex<Vec<Event>>,
    storage: Storage,
}

impl Buffer {
    fn flush(&self) {
        let mut tables = self.storage.lock().unwrap();
        self.waiting.lock().unwrap().drain(..).for_each(|event| tables.count_once(&event));
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.flush();
    }
}

fn torture<P: ProjectionUnderTest<Engine = MemoryEngine>>() -> Torture<P, impl AsyncFn() -> MemoryEngine> {
    Torture::<P>::on(async || MemoryEngine::new())
}

/// Survives 200 seeds, and each fault that concerns it at least a few times.
fn bears<P: ProjectionUnderTest<Engine = MemoryEngine>>(spared: &[Fault]) {
    let report = block_on(torture::<P>().seeds(200).happenings(20).run());
    println!("{}: {report}", std::any::type_name::<P>());
    // With `EVERCORE_SEED` only one seed runs.
    for fault in Fault::ALL.iter().filter(|_| report.seeds() == 200) {
        assert!(report.times(*fault) > 20 || spared.contains(fault), "{fault:?}: {report}");
    }
}

/// The number of seeds until a wrong projection is caught.
fn caught<P: ProjectionUnderTest<Engine = MemoryEngine>>(within: u64) {
    let torture = torture::<P>();
    let verdicts: Vec<_> = (0..50).map(|seed| block_on(torture.try_seed(seed)).err()).collect();
    let first = verdicts.iter().position(Option::is_some).map_or(u64::MAX, |at| at as u64 + 1);
    let times = verdicts.iter().flatten().count();
    println!("{}: caught with seed {first}, by {times} of 50", std::any::type_name::<P>());
    assert!(first <= within, "caught with seed {first} only");
}

#[test]
fn an_idempotent_handler_bears_all() {
    bears::<Idempotent>(&[]);
}

#[test]
fn a_handler_with_its_position_in_the_storage_bears_all() {
    bears::<Guarded>(&[]);
}

#[test]
fn an_exactly_once_sink_bears_all_though_it_counts_whatever_comes() {
    bears::<ExactlyOnce>(&[Fault::LateAck, Fault::OlderCursor]);
}

macro_rules! caught {
    ($($test:ident: $projection:ident within $seeds:literal;)*) => {
        $(#[test]
        fn $test() {
            caught::<$projection>($seeds);
        })*
    };
}

caught! {
    counting_whatever_comes_is_caught: Counts within 10;
    remembering_in_memory_is_caught: RemembersInMemory within 10;
    taking_a_delivery_for_one_event_is_caught: LastOfBatch within 10;
    writing_in_the_background_is_caught: WritesLater within 10;
    skipping_replays_is_caught: SkipsReplays within 10;
    inserting_is_caught: Inserts within 10;
    skipping_retries_is_caught: SkipsRetries within 10;
    noting_too_early_is_caught: NotesTooEarly within 10;
    overwriting_late_is_caught: OverwritesLate within 40;
    writing_beside_the_transaction_is_caught: WritesBeside within 10;
}

#[test]
fn overwriting_late_is_the_fault_of_lost_leases_alone() {
    for fault in [Fault::LateAck, Fault::OlderCursor] {
        assert!(
            (0..10).any(|seed| block_on(torture::<OverwritesLate>().without(fault).try_seed(seed)).is_err())
        );
    }
    block_on(torture::<OverwritesLate>().without(Fault::LeaseLost).seeds(50).run());
}

#[test]
fn what_does_not_pass_the_filter_is_of_no_concern() {
    let changed = Filter::all().with_event_type(EventType::new("Changed").unwrap());
    block_on(torture::<Idempotent>().with_filter(changed.clone()).seeds(30).run());
    block_on(torture::<ExactlyOnce>().with_filter(changed).seeds(30).run());
}

#[test]
fn a_store_may_be_filled_before() {
    let filled = async || {
        let engine = MemoryEngine::new();
        let (store, mut dice) = (EventStore::new(engine.clone()), Dice::new(1));
        for _ in 0..20 {
            plain_events(&store, &mut dice).await;
        }
        engine
    };
    let report = block_on(Torture::<Idempotent>::on(filled).happenings(0).seeds(30).run());
    assert!(report.times(Fault::CrashAfter) > 0 && report.times(Fault::Arrival) == 0, "{report}");
    assert!(
        (0..10).any(|seed| block_on(Torture::<Counts>::on(filled).happenings(0).try_seed(seed)).is_err())
    );
}

#[test]
fn a_finding_tells_all_that_is_needed() {
    let finding = block_on(torture::<Counts>().try_seed(0)).unwrap_err();
    let text = finding.to_string();
    for part in
        ["with seed 0: incremental differs from fold", "  rebuilt: {", "EVERCORE_SEED=0", "`.seed(0)`"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(finding.story().iter().all(|line| text.contains(line)));
    println!("{text}");
}

#[test]
#[should_panic(expected = "again with EVERCORE_SEED=")]
fn a_run_ends_with_the_first_finding() {
    block_on(torture::<Counts>().run());
}

#[test]
fn the_same_seed_does_the_same_again() {
    for seed in 0..20 {
        let [first, second] = [(); 2].map(|()| block_on(torture::<Idempotent>().try_seed(seed)).unwrap());
        assert_eq!(first, second, "seed {seed}");
        let [first, second] = [(); 2].map(|()| block_on(torture::<ExactlyOnce>().try_seed(seed)).unwrap());
        assert_eq!(first, second, "seed {seed}");
        let [first, second] = [(); 2].map(|()| block_on(torture::<RemembersInMemory>().try_seed(seed)));
        assert_eq!(first, second, "seed {seed}");
    }
}

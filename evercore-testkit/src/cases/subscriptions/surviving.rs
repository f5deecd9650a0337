//! A run that goes on: through errors of the store, failures of single partitions, handlers that are slow, that block, or that
//! lose what they need.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use evercore_core::engine::Step;
use evercore_core::{
    BoxError, ErrorKind, EventStore, Failed, FailureAction, FailurePolicy, OwnerId, Position, RunEnd,
    Subscription,
};

use crate::fixture::Fixture;
use crate::tools::*;

use super::tools::*;
use super::unwell::Unwell;

/// For waits that a test does not reach.
const LONG: Duration = Duration::from_secs(600);

type Side<'a> = Pin<Box<dyn Future<Output = RunEnd> + 'a>>;

/// Runs beside other work, until both have ended.
async fn beside(
    run: impl Future<Output = evercore_core::Result<RunEnd>>,
    other: impl Future<Output = ()>,
) -> RunEnd {
    let run: Side<'_> = Box::pin(async { run.await.unwrap() });
    let other: Side<'_> = Box::pin(async {
        other.await;
        RunEnd::ShutDown
    });
    join_all([run, other]).await.remove(0)
}

pub(crate) async fn a_run_outlasts_every_error_of_the_store(fixture: &mut Fixture) {
    let unwell = Arc::new(Unwell::new(fixture.engine()));
    let engine: Engine = Arc::clone(&unwell) as _;
    let store = EventStore::shared(Arc::clone(&engine));
    let id = grown(&engine, "user", 1).await;
    let kinds = [
        ErrorKind::Unavailable,
        ErrorKind::OutcomeUnknown,
        ErrorKind::ReadOnly,
        ErrorKind::Full,
        ErrorKind::Backend,
        ErrorKind::NotAStore,
        ErrorKind::Invalid,
        ErrorKind::CommandReused,
    ];
    let seen = Seen::default();
    let of = subscription(&store, "mails").with_lease(Duration::from_millis(40));
    let handler = seen.clone();
    let run = of.run(until(&engine, || seen.len() > kinds.len()), move |event| {
        handler.push(&event);
        async { Ok(()) }
    });
    let trouble = async {
        for (nth, kind) in kinds.iter().enumerate() {
            until(&engine, || seen.len() > nth).await;
            unwell.fail_with(Some(kind.clone()));
            // Longer than the lease: the run has to claim its cursor again.
            until(&engine, || unwell.failed() > 10).await;
            unit().append(id, "user", nth as i64 + 1, 1).commit(&engine).await.unwrap();
            unwell.fail_with(None);
        }
    };
    assert_eq!(beside(run, trouble).await, RunEnd::ShutDown);
    let mut numbers = seen.numbers();
    numbers.dedup();
    assert_eq!(numbers, (1..=kinds.len() as i64 + 1).collect::<Vec<_>>());
}

pub(crate) async fn a_mistake_of_the_program_ends_a_run_that_begins(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let refused = async |of: Subscription| {
        of.run(engine.pause(SOON), |_| async { Ok(()) }).await.unwrap_err().kind().clone()
    };
    assert_eq!(refused(subscription(&store, "mails").with_version(0)).await, ErrorKind::Invalid);
    subscription(&store, "mails").declare().await.unwrap();
    assert_eq!(refused(subscription(&store, "mails").with_partitions(2)).await, ErrorKind::Invalid);
}

pub(crate) async fn a_failed_acknowledgement_repeats_no_event(fixture: &mut Fixture) {
    let unwell = Arc::new(Unwell::new(fixture.engine()));
    let engine: Engine = Arc::clone(&unwell) as _;
    let store = EventStore::shared(Arc::clone(&engine));
    grown(&engine, "user", 5).await;
    let (of, seen) = (subscription(&store, "mails").with_lease(LONG), Seen::default());
    unwell.fail_moves(4);
    let handler = seen.clone();
    let shutdown = async {
        while state_or_none(&store, "mails").await != Some(place(5)) {
            engine.pause(Duration::from_millis(2)).await;
        }
    };
    let shutdown: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(shutdown);
    let run = of.run(shutdown, move |event| {
        handler.push(&event);
        async { Ok(()) }
    });
    run.await.unwrap();
    assert_eq!(seen.numbers(), [1, 2, 3, 4, 5]);
}

/// As many aggregates as there are partitions, one for each, with the number of their partition.
async fn one_for_each(engine: &Engine, partitions: usize) -> BTreeMap<i64, evercore_core::AggregateId> {
    let mut found = BTreeMap::new();
    while found.len() < partitions {
        let id = new_id(engine).await;
        found.entry(id.get() % partitions as i64).or_insert(id);
    }
    for id in found.values() {
        unit().create(*id, "user").append(*id, "user", 0, 10).commit(engine).await.unwrap();
    }
    found
}

pub(crate) async fn a_partition_that_fails_rests_and_the_others_go_on(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let ids = one_for_each(&engine, 4).await;
    let (poison, is_mended) = (ids[&1], Arc::new(AtomicBool::new(false)));
    let rest = Duration::from_millis(400);
    let policy = FailurePolicy::default().with_attempts(2).with_pauses(NO_PAUSE, rest);
    let (seen, tries) = (Seen::default(), Arc::new(Mutex::new(Vec::new())));
    let of = subscription(&store, "mails").with_partitions(4).on_failure(policy);
    let (handler, handler_tries, mended) = (seen.clone(), Arc::clone(&tries), Arc::clone(&is_mended));
    let run = of.run(until(&engine, || seen.len() >= 40), move |event| {
        let (seen, tries, mended) = (handler.clone(), Arc::clone(&handler_tries), Arc::clone(&mended));
        async move {
            if event.aggregate() == poison && event.sequence().get() == 1 {
                tries.lock().unwrap().push(event.attempt());
                if !mended.load(Ordering::SeqCst) {
                    return Err("poison".into());
                }
            }
            seen.push(&event);
            Ok(())
        }
    });
    let watch = async {
        until(&engine, || seen.len() >= 30).await;
        until(&engine, || tries.lock().unwrap().len() >= 3).await;
        let states = store.subscription_states("mails").await.unwrap();
        let failure = states[1].cursor.failure.clone().unwrap();
        assert!(failure.attempts >= 2 && failure.error == "poison", "{failure:?}");
        assert!(states.iter().all(|it| it.cursor.id.partition == 1 || it.cursor.failure.is_none()));
        assert_eq!(seen.len(), 30, "all of the others, and nothing of this one");
        is_mended.store(true, Ordering::SeqCst);
    };
    assert_eq!(beside(run, watch).await, RunEnd::ShutDown);
    // After a rest one try, and the tries before it count.
    assert_eq!(tries.lock().unwrap()[..3], [1, 2, 3]);
    let of_poison: Vec<_> = seen.events().into_iter().filter(|event| event.aggregate() == poison).collect();
    assert!(of_poison.iter().map(|event| event.sequence().get()).eq(1..=10));
}

pub(crate) async fn the_function_decides_about_each_failure(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 6).await;
    let (seen, asked) = (Seen::default(), Arc::new(Mutex::new(Vec::new())));
    let asks = Arc::clone(&asked);
    let of = subscription(&store, "mails").on_failure(no_pause(FailureAction::Stop)).decide_on_failure(
        move |failed| {
            asks.lock().unwrap().push((failed.event.position().get(), failed.attempt));
            assert_eq!(failed.cursor.subscription.as_str(), "mails");
            match failed.error.to_string().as_str() {
                "skip" => FailureAction::Skip,
                "park" => FailureAction::ParkAlone,
                "again" if failed.attempt < 5 => FailureAction::RetryAfter(Duration::from_millis(1)),
                _ => failed.usual(),
            }
        },
    );
    let handler = seen.clone();
    let run = of.run(until(&engine, || seen.len() >= 4), move |event| {
        let seen = handler.clone();
        async move {
            let fails: Result<(), BoxError> = match event.position().get() {
                2 => Err("skip".into()),
                3 => Err("park".into()),
                4 if event.attempt() < 5 => Err("again".into()),
                5 if event.attempt() < 3 => Err("other".into()),
                _ => Ok(()),
            };
            fails?;
            seen.push(&event);
            Ok(())
        }
    });
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    assert_eq!(seen.numbers(), [1, 4, 5, 6]);
    assert_eq!(store.parked("mails").await.unwrap()[0].1.position, place(3));
    let expected = [(2, 1), (3, 1), (4, 1), (4, 2), (4, 3), (4, 4), (5, 1), (5, 2)];
    assert_eq!(*asked.lock().unwrap(), expected);
}

pub(crate) async fn while_a_dependency_is_down_one_event_is_tried_and_no_try_counts(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 14).await;
    let (seen, tries) = (Seen::default(), Arc::new(Mutex::new(Vec::new())));
    let (handler, handler_tries) = (seen.clone(), Arc::clone(&tries));
    let short = Duration::from_millis(2);
    let policy = FailurePolicy::new(FailureAction::Skip).with_attempts(1).with_pauses(short, short);
    let of = subscription(&store, "mails").on_failure(policy);
    let run = of.run_batches(until(&engine, || seen.len() >= 14), move |delivery| {
        let (seen, tries) = (handler.clone(), Arc::clone(&handler_tries));
        async move {
            let mut tries = tries.lock().unwrap();
            tries.push((delivery.events().len(), delivery.attempt()));
            if tries.len() <= 20 {
                return Err(Failed::dependency_down("connection refused").into());
            }
            delivery.events().iter().for_each(|event| seen.push(event));
            Ok(())
        }
    });
    let watch = async {
        until(&engine, || tries.lock().unwrap().len() >= 10).await;
        let failure = state(&store, "mails").await.cursor.failure;
        assert!(
            seen.len() > 0 || failure.is_some_and(|failure| failure.error.contains("connection refused"))
        );
    };
    assert_eq!(beside(run, watch).await, RunEnd::ShutDown);
    assert_eq!(seen.numbers(), (1..=14).collect::<Vec<_>>(), "none was skipped");
    let tries = tries.lock().unwrap();
    assert_eq!(tries[0], (7, 1));
    assert_eq!(tries[1..=20], [(1, 1); 20]);
    assert_eq!(tries[21..24], [(2, 1), (4, 1), (7, 1)], "more and more again");
}

pub(crate) async fn a_handler_that_takes_too_long_has_failed(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 3).await;
    let (seen, batches) = (Seen::default(), Seen::default());
    let of = |name| {
        subscription(&store, name)
            .on_failure(no_pause(FailureAction::ParkAlone))
            .with_handler_timeout(Duration::from_millis(30))
    };
    let (handler, sleeping) = (seen.clone(), Arc::clone(&engine));
    let (mails, sums) = (of("mails"), of("sums"));
    let run = mails.run(until(&engine, || seen.len() >= 2), move |event| {
        let (seen, engine) = (handler.clone(), Arc::clone(&sleeping));
        async move {
            if event.position() == place(2) {
                engine.pause(LONG).await;
            }
            seen.push(&event);
            Ok(())
        }
    });
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    let (handler, sleeping) = (batches.clone(), Arc::clone(&engine));
    let run = sums.run_batches(until(&engine, || batches.len() >= 2), move |delivery| {
        let (seen, engine) = (handler.clone(), Arc::clone(&sleeping));
        async move {
            if delivery.events().iter().any(|event| event.position() == place(2)) {
                engine.pause(LONG).await;
            }
            delivery.events().iter().for_each(|event| seen.push(event));
            Ok(())
        }
    });
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    for (name, seen) in [("mails", seen), ("sums", batches)] {
        assert_eq!(seen.numbers(), [1, 3]);
        let (_, parked) = store.parked(name).await.unwrap().remove(0);
        assert_eq!((parked.position, parked.attempts), (place(2), 3));
        assert!(parked.error.contains("longer than 30ms"), "{}", parked.error);
    }
}

pub(crate) async fn an_event_at_which_lease_after_lease_is_lost_is_given_up(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 3).await;
    let of = subscription(&store, "mails").on_failure(no_pause(FailureAction::ParkAlone));
    of.declare().await.unwrap();
    let id = state(&store, "mails").await.cursor.id;
    for nth in 1..=4 {
        // A process that gets the first event and dies at it.
        let owner = OwnerId::new(format!("victim {nth}")).unwrap();
        let claimed = engine.step(&id, &Step::claim(owner, Duration::from_millis(10))).await.unwrap();
        assert_eq!(claimed.unwrap().lost_leases, nth - 1);
        engine.pause(Duration::from_millis(20)).await;
    }
    assert_eq!(events_seen(&engine, &of, 2).await, [2, 3]);
    let (_, parked) = store.parked("mails").await.unwrap().remove(0);
    assert_eq!((parked.position, parked.attempts), (place(1), 4));
    assert!(parked.error.contains("lease was lost 4 times"), "{}", parked.error);
}

pub(crate) async fn tries_of_another_owner_count(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 3).await;
    let policy = FailurePolicy::new(FailureAction::ParkAlone).with_attempts(4).with_pauses(LONG, LONG);
    let of = subscription(&store, "mails").on_failure(policy);
    let tries = Arc::new(Mutex::new(Vec::new()));
    for _ in 0..5 {
        // The pause after a failure is long, and the process ends meanwhile.
        let (handler_tries, before) = (Arc::clone(&tries), tries.lock().unwrap().len());
        let is_over = || {
            let cursor = tries.lock().unwrap();
            cursor.len() > before
        };
        let shutdown = async {
            until(&engine, is_over).await;
            engine.pause(Duration::from_millis(30)).await;
        };
        let run = of.run(shutdown, move |event| {
            let tries = Arc::clone(&handler_tries);
            async move {
                if event.position() == place(2) {
                    tries.lock().unwrap().push(event.attempt());
                    return Err("poison".into());
                }
                Ok(())
            }
        });
        if tries.lock().unwrap().len() == 4 {
            break;
        }
        assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    }
    assert_eq!(*tries.lock().unwrap(), [1, 2, 3, 4]);
    let (_, parked) = store.parked("mails").await.unwrap().remove(0);
    assert_eq!((parked.position, parked.attempts), (place(2), 4));
}

/// The positions of the cursor that the handler finds, at each event.
async fn positions_at_events(
    fixture: &mut Fixture,
    name: &str,
    of: impl Fn(Subscription) -> Subscription,
    pause_at: Option<i64>,
) -> Vec<Position> {
    let (engine, store) = (fixture.engine(), fixture.store());
    let of = of(subscription(&store, name).with_batch(events_per_page(100)).with_lease(LONG));
    let found = Arc::new(Mutex::new(Vec::new()));
    let (handler, own, name) = (Arc::clone(&found), store.clone(), name.to_owned());
    let shutdown = async {
        until(&engine, || found.lock().unwrap().len() >= if pause_at.is_some() { 1 } else { 10 }).await;
        if pause_at.is_some() {
            while state(&own, "paused").await.is_owned {
                engine.pause(Duration::from_millis(2)).await;
            }
        }
    };
    let shutdown: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(shutdown);
    let store = store.clone();
    let run = of.run(shutdown, move |event| {
        let (found, store, name) = (Arc::clone(&handler), store.clone(), name.clone());
        async move {
            let states = store.subscription_states(&name).await?;
            found.lock().unwrap().push(states[0].cursor.position);
            if pause_at == Some(event.position().get()) {
                store.pause_subscription(&name).await?;
                // The runner hears of it at the next await.
                store.engine().pause(Duration::from_millis(50)).await;
            }
            Ok(())
        }
    });
    run.await.unwrap();
    let found = found.lock().unwrap();
    found.clone()
}

pub(crate) async fn events_are_acknowledged_before_the_end_of_a_long_batch(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "user", 10).await;
    let by_count = positions_at_events(fixture, "count", |of| of.with_ack_every(3, LONG), None).await;
    assert_eq!(by_count, [0, 0, 0, 3, 3, 3, 6, 6, 6, 9].map(place));
    let by_time =
        positions_at_events(fixture, "time", |of| of.with_ack_every(1_000, Duration::ZERO), None).await;
    assert_eq!(by_time, (0..10).map(place).collect::<Vec<_>>());
}

pub(crate) async fn a_pause_takes_effect_between_two_events(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "user", 10).await;
    let until_pause =
        positions_at_events(fixture, "paused", |of| of.with_ack_every(1_000, LONG), Some(4)).await;
    assert_eq!(until_pause.len(), 4, "the events after the pause wait");
    let paused = state(&fixture.store(), "paused").await;
    assert_eq!((paused.cursor.position, paused.is_owned), (place(4), false));
}

/// A spawner with a thread for each task, for handlers that block.
fn in_threads(of: Subscription) -> Subscription {
    of.with_spawner(|task| {
        std::thread::spawn(|| block_on(task));
    })
}

pub(crate) async fn with_a_spawner_a_handler_that_blocks_keeps_its_lease(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 4).await;
    let seen = Seen::default();
    fixture.threads(2, async |_| {
        let of = in_threads(subscription(&store, "mails").with_lease(Duration::from_millis(60)));
        let handler = seen.clone();
        let run = of.run(until(&engine, || seen.len() >= 4), move |event| {
            handler.push(&event);
            // Longer than the lease, and the other process is waiting for it.
            std::thread::sleep(Duration::from_millis(150));
            async { Ok(()) }
        });
        assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    });
    assert_eq!(seen.numbers(), [1, 2, 3, 4]);
}

pub(crate) async fn with_a_spawner_partitions_run_at_the_same_time(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    one_for_each(&engine, 4).await;
    let (now, most, seen) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)), Seen::default());
    let (handler_now, handler_most, handler) = (Arc::clone(&now), Arc::clone(&most), seen.clone());
    let of = in_threads(subscription(&store, "images").with_partitions(4));
    let run = of.run(until(&engine, || seen.len() >= 40), move |event| {
        let at_work = handler_now.fetch_add(1, Ordering::SeqCst) + 1;
        handler_most.fetch_max(at_work, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(20));
        handler_now.fetch_sub(1, Ordering::SeqCst);
        handler.push(&event);
        async { Ok(()) }
    });
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    assert!(most.load(Ordering::SeqCst) >= 2, "the handlers ran one after the other");
    assert_eq!(now.load(Ordering::SeqCst), 0, "the run ends after its handlers");
}

pub(crate) async fn parked_events_are_tried_again_by_time(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 4).await;
    let (seen, tries) = (Seen::default(), Arc::new(AtomicUsize::new(0)));
    let (handler, handler_tries) = (seen.clone(), Arc::clone(&tries));
    let of = subscription(&store, "mails")
        .on_failure(no_pause(FailureAction::Park).with_attempts(1))
        .with_lease(LONG)
        .retrying_parked(Duration::from_millis(40));
    let run = of.run(until(&engine, || seen.len() >= 4), move |event| {
        let (seen, tries) = (handler.clone(), Arc::clone(&handler_tries));
        async move {
            if event.position() == place(2) && tries.fetch_add(1, Ordering::SeqCst) < 3 {
                return Err("not yet".into());
            }
            seen.push(&event);
            Ok(())
        }
    });
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    assert_eq!(seen.numbers(), [1, 2, 3, 4], "also those that waited for it");
    assert_eq!(tries.load(Ordering::SeqCst), 4);
    assert!(store.parked("mails").await.unwrap().is_empty());
}

/// Position 1 is parked, 3 waits for it. A delivery of 2 and 4 is cut after 2, and then 1 succeeds.
pub(crate) async fn events_that_wait_for_a_parked_one_outlast_a_cut_delivery(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let (poison, other) = (grown(&engine, "user", 1).await, grown(&engine, "user", 1).await);
    unit().append(poison, "user", 1, 1).commit(&engine).await.unwrap();
    unit().append(other, "user", 1, 1).commit(&engine).await.unwrap();
    let (seen, tries) = (Seen::default(), Arc::new(AtomicUsize::new(0)));
    let (handler, handler_engine) = (seen.clone(), Arc::clone(&engine));
    let of = subscription(&store, "mails")
        .on_failure(no_pause(FailureAction::Park).with_attempts(1))
        .with_lease(LONG)
        .with_ack_every(1, LONG)
        .retrying_parked(Duration::from_millis(40));
    let run = of.run(until(&engine, || seen.len() >= 4), move |event| {
        let (seen, tries, engine) = (handler.clone(), Arc::clone(&tries), Arc::clone(&handler_engine));
        async move {
            if event.position() == place(1) && tries.fetch_add(1, Ordering::SeqCst) == 0 {
                return Err("not yet".into());
            }
            if event.position() == place(2) {
                engine.pause(Duration::from_millis(60)).await;
            }
            seen.push(&event);
            Ok(())
        }
    });
    let run: Pin<Box<dyn Future<Output = evercore_core::Result<RunEnd>> + Send>> = Box::pin(run);
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    let mut numbers = seen.numbers();
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 2, 3, 4]);
}

pub(crate) async fn with_too_many_parked_events_the_partition_rests(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 10).await;
    let policy = FailurePolicy::new(FailureAction::ParkAlone).with_attempts(1).with_pauses(NO_PAUSE, LONG);
    let of = subscription(&store, "mails").on_failure(policy).with_most_parked(3);
    let shutdown = async {
        while state_or_none(&store, "mails").await.is_none()
            || state(&store, "mails").await.rest == Duration::ZERO
        {
            engine.pause(Duration::from_millis(2)).await;
        }
    };
    let shutdown: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(shutdown);
    assert_eq!(of.run(shutdown, |_| async { Err("broken".into()) }).await.unwrap(), RunEnd::ShutDown);
    assert_eq!(store.parked("mails").await.unwrap().len(), 3);
    let failed = state(&store, "mails").await.cursor;
    assert_eq!((failed.position, failed.failure.unwrap().position), (place(3), place(4)));
}

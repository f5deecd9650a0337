//! A failing handler: the event is repeated, the subscription stops, or the event is skipped or parked.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use evercore_core::{ErrorKind, Event, FailureAction, FailurePolicy, RunEnd, Start, Subscription};

use crate::fixture::Fixture;
use crate::tools::*;

use super::tools::*;

pub(crate) async fn a_failing_handler_is_tried_again(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 5).await;
    let (seen, tries) = (Seen::default(), Arc::new(Mutex::new(Vec::new())));
    let (handler_seen, handler_tries) = (seen.clone(), Arc::clone(&tries));
    let of = subscription(&store, "mails").on_failure(no_pause(FailureAction::Stop));
    let run = of.run(until(&engine, || seen.len() >= 5), move |event| {
        let (seen, tries) = (handler_seen.clone(), Arc::clone(&handler_tries));
        async move {
            if event.position() == place(3) {
                tries.lock().unwrap().push(event.attempt());
                if event.attempt() < 3 {
                    return Err("not yet".into());
                }
            }
            seen.push(&event);
            Ok(())
        }
    });
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    assert_eq!(seen.numbers(), [1, 2, 3, 4, 5], "each event once, in order");
    assert_eq!(*tries.lock().unwrap(), [1, 2, 3]);
}

/// Runs with a handler that fails at this position.
async fn run_with_poison(
    engine: &Engine,
    of: &Subscription,
    seen: &Seen,
    poison: i64,
    count: usize,
) -> evercore_core::Result<RunEnd> {
    let handler = seen.clone();
    of.run(until(engine, || seen.len() >= count), move |event| {
        let seen = handler.clone();
        async move {
            if event.position() == place(poison) {
                return Err("poison".into());
            }
            seen.push(&event);
            Ok(())
        }
    })
    .await
}

pub(crate) async fn then_it_stops_and_says_where(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 5).await;
    let (of, seen) =
        (subscription(&store, "mails").on_failure(no_pause(FailureAction::Stop)), Seen::default());
    let stopped = run_with_poison(&engine, &of, &seen, 3, 5).await;
    let error = stopped.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Rejected), "{error:?}");
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "poison");
    let failed = state(&store, "mails").await;
    let failure = failed.cursor.failure.unwrap();
    assert_eq!((failure.position, failure.attempts, failure.error.as_str()), (place(3), 3, "poison"));
    assert_eq!((failed.cursor.position, failed.is_owned, failed.lag_events), (place(2), false, 3));
    assert_eq!(seen.numbers(), [1, 2]);
    // The handler is repaired: the subscription goes on where it stopped, and the error is gone.
    assert_eq!(events_seen(&engine, &of, 3).await, [3, 4, 5]);
    assert_eq!(state(&store, "mails").await.cursor.failure, None);
}

pub(crate) async fn after_a_stop_nobody_tries_at_full_speed(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 1).await;
    let rest = Duration::from_secs(600);
    let policy = FailurePolicy::new(FailureAction::Stop).with_attempts(1).with_pauses(NO_PAUSE, rest);
    let (of, seen) = (subscription(&store, "mails").on_failure(policy), Seen::default());
    assert_kind!(run_with_poison(&engine, &of, &seen, 1, 1).await, ErrorKind::Rejected);
    assert_kind!(of.clone().without_standby().claim().await, ErrorKind::AlreadyOwned);
    let told = state(&store, "mails").await.rest;
    assert!(told > rest / 2 && told <= rest, "{told:?}");
    store.resume_subscription("mails").await.unwrap();
    assert_eq!(state(&store, "mails").await.rest, Duration::ZERO);
    assert_eq!(events_seen(&engine, &of, 1).await, [1]);
}

pub(crate) async fn then_it_skips(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 5).await;
    let (of, seen) =
        (subscription(&store, "mails").on_failure(no_pause(FailureAction::Skip)), Seen::default());
    run_with_poison(&engine, &of, &seen, 3, 4).await.unwrap();
    assert_eq!(seen.numbers(), [1, 2, 4, 5]);
    assert_eq!(state(&store, "mails").await.cursor.position, place(5));
}

/// Two aggregates with alternating events: odd positions and even positions.
async fn two_in_turn(engine: &Engine, events: i64) {
    let (odd, even) = (grown(engine, "user", 0).await, grown(engine, "user", 0).await);
    for nth in 0..events {
        let id = if nth % 2 == 0 { odd } else { even };
        unit().append(id, "user", nth / 2, 1).commit(engine).await.unwrap();
    }
}

pub(crate) async fn then_it_parks_and_later_events_of_the_aggregate_wait(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    two_in_turn(&engine, 10).await;
    let (of, seen) =
        (subscription(&store, "mails").on_failure(no_pause(FailureAction::Park)), Seen::default());
    run_with_poison(&engine, &of, &seen, 3, 6).await.unwrap();
    assert_eq!(seen.numbers(), [1, 2, 4, 6, 8, 10]);
    let parked = store.parked("mails").await.unwrap();
    let (cursor, event) = &parked[0];
    assert_eq!(
        (parked.len(), event.position, event.attempts, event.error.as_str()),
        (1, place(3), 3, "poison")
    );

    // It is still parked after a restart, and after another failed attempt.
    store.resume_parked(cursor, None).await.unwrap();
    let (again, later) = (Seen::default(), grown(&engine, "user", 1));
    later.await;
    run_with_poison(&engine, &of, &again, 3, 1).await.unwrap();
    assert_eq!(again.numbers(), [11]);
    assert_eq!(store.parked("mails").await.unwrap()[0].1.attempts, 4);

    // The handler is repaired: the parked event and the waiting ones come in order.
    store.resume_parked(cursor, Some(place(3))).await.unwrap();
    assert_eq!(events_seen(&engine, &of, 4).await, [3, 5, 7, 9]);
    assert!(store.parked("mails").await.unwrap().is_empty());
    assert!(events_seen(&engine, &of, 0).await.is_empty());
}

pub(crate) async fn then_it_parks_alone_and_all_others_go_on(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    two_in_turn(&engine, 10).await;
    let (of, seen) =
        (subscription(&store, "mails").on_failure(no_pause(FailureAction::ParkAlone)), Seen::default());
    run_with_poison(&engine, &of, &seen, 3, 9).await.unwrap();
    assert_eq!(seen.numbers(), [1, 2, 4, 5, 6, 7, 8, 9, 10]);
    let parked = store.parked("mails").await.unwrap();
    assert_eq!(parked.len(), 1);
    store.resume_parked(&parked[0].0, None).await.unwrap();
    assert_eq!(events_seen(&engine, &of, 1).await, [3]);
}

pub(crate) async fn a_parked_event_is_resumed_and_dropped_while_it_runs(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    two_in_turn(&engine, 8).await;
    let (seen, is_mended) = (Seen::default(), Arc::new(AtomicBool::new(false)));
    let of = subscription(&store, "mails")
        .on_failure(no_pause(FailureAction::Park))
        .with_lease(Duration::from_millis(30));
    let (handler_seen, handler_mended) = (seen.clone(), Arc::clone(&is_mended));
    let run = of.run(until(&engine, || seen.len() >= 10), move |event| {
        let (seen, is_mended) = (handler_seen.clone(), Arc::clone(&handler_mended));
        async move {
            if !is_mended.load(Ordering::SeqCst) && [1, 2].contains(&event.position().get()) {
                return Err("poison".into());
            }
            seen.push(&event);
            Ok(())
        }
    });
    let operator = async {
        let parked = loop {
            let parked = store.parked("mails").await.unwrap_or_default();
            if parked.len() == 2 {
                break parked;
            }
            engine.pause(Duration::from_millis(5)).await;
        };
        // By then all other events of the aggregate wait for it. A later one would be delivered.
        while state(&store, "mails").await.cursor.position < place(8) {
            engine.pause(Duration::from_millis(5)).await;
        }
        store.drop_parked(&parked[1].0, Some(place(2))).await.unwrap();
        is_mended.store(true, Ordering::SeqCst);
        store.resume_parked(&parked[0].0, Some(place(1))).await.unwrap();
        until(&engine, || seen.len() >= 4).await;
        let (odd, even) = (ids_of(&engine).await[0], ids_of(&engine).await[1]);
        // Nothing waits for either of them any more.
        unit().append(odd, "user", 4, 3).append(even, "user", 4, 3).commit(&engine).await.unwrap();
        RunEnd::ShutDown
    };
    let futures: [std::pin::Pin<Box<dyn Future<Output = RunEnd>>>; 2] =
        [Box::pin(async { run.await.unwrap() }), Box::pin(operator)];
    join_all(futures).await;
    let of_even: Vec<i64> =
        seen.numbers().into_iter().filter(|position| *position <= 8 && position % 2 == 0).collect();
    assert!(seen.numbers().starts_with(&[1, 3, 5, 7]), "{:?}", seen.numbers());
    assert!(of_even.is_empty(), "what waited behind a dropped event is passed over: {of_even:?}");
    assert_eq!(seen.numbers()[4..], [9, 10, 11, 12, 13, 14]);
}

async fn ids_of(engine: &Engine) -> Vec<evercore_core::AggregateId> {
    let ids: BTreeSet<_> = log(engine).await.iter().map(Event::aggregate).collect();
    ids.into_iter().collect()
}

pub(crate) async fn what_was_parked_is_not_forgotten_by_a_reset_nor_resumed_in_vain(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    two_in_turn(&engine, 4).await;
    let (of, seen) =
        (subscription(&store, "mails").on_failure(no_pause(FailureAction::Park)), Seen::default());
    run_with_poison(&engine, &of, &seen, 3, 3).await.unwrap();
    assert_kind!(store.reset_subscription("mails", Start::Beginning).await, ErrorKind::Invalid);
    let (cursor, _) = store.parked("mails").await.unwrap().remove(0);
    let again = Seen::default();
    run_until(&engine, &of.clone().with_version(2), &again, 4).await;
    // It does not take over by itself while there are parked events.
    assert_eq!(store.promote_version("mails", 2).await.unwrap().left_parked, 1);
    assert_kind!(store.resume_parked(&cursor, None).await, ErrorKind::Superseded);
    store.drop_parked(&cursor, None).await.unwrap();
    assert!(store.parked("mails").await.unwrap().is_empty());
    store.reset_subscription("mails", Start::Beginning).await.unwrap();
}

pub(crate) async fn an_event_that_does_not_decode_is_a_failure_too(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "account", 0).await;
    let good = || event("Deposited", br#"{"amount":1}"#);
    unit()
        .events(id, "account", 0, vec![good(), event("Deposited", b"{"), good()])
        .commit(&engine)
        .await
        .unwrap();
    let (of, seen) =
        (subscription(&store, "sums").on_failure(no_pause(FailureAction::Skip)), Seen::default());
    let handler = seen.clone();
    let run = of.run(until(&engine, || seen.len() >= 2), move |event| {
        let seen = handler.clone();
        async move {
            assert_eq!(event.decode::<Account>()?, deposited(1));
            seen.push(&event);
            Ok(())
        }
    });
    run.await.unwrap();
    assert_eq!(seen.numbers(), [1, 3]);
}

pub(crate) async fn a_handler_that_panics_has_failed(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 6).await;
    let panic_at = |position: i64| {
        if position == 3 {
            std::panic::resume_unwind(Box::new("no third"));
        }
    };
    let (each, batches) = (Seen::default(), Seen::default());
    let seen = each.clone();
    let of = subscription(&store, "mails").on_failure(no_pause(FailureAction::ParkAlone));
    let run = of.run(until(&engine, || each.len() >= 5), move |event| {
        // The handler panics when it is called in the first attempt, and when it is polled in the others.
        if event.attempt() == 1 {
            panic_at(event.position().get());
        }
        let seen = seen.clone();
        async move {
            panic_at(event.position().get());
            seen.push(&event);
            Ok(())
        }
    });
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    let seen = batches.clone();
    let of = subscription(&store, "sums").on_failure(no_pause(FailureAction::ParkAlone));
    let run = of.run_batches(until(&engine, || batches.len() >= 5), move |delivery| {
        let seen = seen.clone();
        async move {
            delivery.events().iter().for_each(|event| panic_at(event.position().get()));
            delivery.events().iter().for_each(|event| seen.push(event));
            Ok(())
        }
    });
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    for (name, seen) in [("mails", each), ("sums", batches)] {
        assert_eq!(seen.numbers(), [1, 2, 4, 5, 6]);
        let parked = store.parked(name).await.unwrap();
        let [(_, parked)] = &parked[..] else { panic!("{parked:?}") };
        assert_eq!((parked.position, parked.attempts), (place(3), 3));
        assert_eq!(parked.error, "the handler panicked: no third");
    }
}

pub(crate) async fn a_batch_that_fails_is_tried_one_by_one(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 10).await;
    let (sizes, seen) = (Arc::new(Mutex::new(Vec::new())), Seen::default());
    let (handler_sizes, handler_seen) = (Arc::clone(&sizes), seen.clone());
    let of = subscription(&store, "mails")
        .with_batch(events_per_page(5))
        .on_failure(no_pause(FailureAction::Skip));
    let run = of.run_batches(until(&engine, || seen.len() >= 9), move |delivery| {
        let (sizes, seen) = (Arc::clone(&handler_sizes), handler_seen.clone());
        async move {
            sizes.lock().unwrap().push(delivery.events().len());
            if delivery.events().iter().any(|event| event.position() == place(2)) {
                return Err("poison".into());
            }
            delivery.events().iter().for_each(|event| seen.push(event));
            Ok(())
        }
    });
    run.await.unwrap();
    assert_eq!(seen.numbers(), [1, 3, 4, 5, 6, 7, 8, 9, 10]);
    assert_eq!(*sizes.lock().unwrap(), [5, 1, 1, 1, 1, 1, 1, 5]);
}

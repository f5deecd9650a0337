//! Reading the log as it grows: each event once and in order, whoever owns the cursor and whatever the handler does.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evercore_core::{
    CursorState, CursorStatus, ErrorKind, Event, EventStore, FailurePolicy, Filter, LogQuery, Metadata,
    OwnerId, Position, RunEnd, Start, Step, Subscription, SubscriptionName, Then, Timestamp,
};

use crate::fixture::Fixture;
use crate::tools::*;

const LEASE: Duration = Duration::from_millis(300);
const NO_PAUSE: Duration = Duration::ZERO;
const SOON: Duration = Duration::from_secs(20);

fn subscription(store: &EventStore, name: &str) -> Subscription {
    store.subscription(name).unwrap().with_lease(LEASE).with_batch(events_per_page(7))
}

/// Runs until so many events were seen.
async fn run_until(engine: &Engine, of: &Subscription, seen: &Seen, count: usize) -> RunEnd {
    let handler = seen.clone();
    let shutdown = until(engine, || seen.len() >= count);
    let end = of.run(shutdown, move |event| {
        handler.push(&event);
        async { Ok(()) }
    });
    end.await.unwrap()
}

async fn state(store: &EventStore, name: &str) -> CursorState {
    store.subscription_states(name).await.unwrap().remove(0)
}

async fn events_seen(engine: &Engine, of: &Subscription, count: usize) -> Vec<i64> {
    let seen = Seen::default();
    assert_eq!(run_until(engine, of, &seen, count).await, RunEnd::ShutDown);
    seen.numbers()
}

fn no_pause(then: Then) -> FailurePolicy {
    FailurePolicy::then(then).with_attempts(3).with_pauses(NO_PAUSE, NO_PAUSE)
}

pub(crate) async fn it_begins_where_it_is_told_to(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 4).await;
    engine.pause(Duration::from_millis(2)).await;
    grown(&engine, "user", 3).await;
    let time =
        store.read_log(&LogQuery::after(place(4))).await.unwrap().events.first().unwrap().recorded_at();
    let starts = [
        ("beginning", Start::Beginning, 1),
        ("position", Start::After(place(2)), 3),
        ("time", Start::At(time), 5),
        ("before all", Start::At(Timestamp::MIN), 1),
        ("end", Start::End, 8),
    ];
    for (name, start, _) in starts {
        let mut owned = subscription(&store, name).starting(start).claim().await.unwrap();
        owned
            .ack(&evercore_core::Delivery::new(owned.cursor().id.clone(), owned.lease().clone(), Vec::new()))
            .await
            .unwrap();
        owned.release().await.unwrap();
    }
    grown(&engine, "user", 2).await;
    for (name, start, first) in starts {
        let of = subscription(&store, name).starting(start);
        assert_eq!(
            events_seen(&engine, &of, 10 - first).await,
            (first as i64..=9).collect::<Vec<_>>(),
            "{name}"
        );
    }
    let ahead = subscription(&store, "ahead").starting(Start::After(place(10))).claim().await;
    assert_kind!(ahead, ErrorKind::CursorAhead { .. });
}

pub(crate) async fn at_the_end_of_an_empty_store_it_misses_nothing_after_a_restart(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let of = subscription(&store, "news").starting(Start::End);
    assert!(events_seen(&engine, &of, 0).await.is_empty());
    grown(&engine, "user", 3).await;
    assert_eq!(events_seen(&engine, &of, 3).await, [1, 2, 3], "written while nobody ran it");
    grown(&engine, "user", 2).await;
    assert_eq!(events_seen(&engine, &of, 2).await, [4, 5]);
}

pub(crate) async fn a_second_claim_is_refused_or_waits_as_asked(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let of = subscription(&store, "mails");
    let first = of.claim().await.unwrap();
    assert_kind!(of.clone().without_standby().claim().await, ErrorKind::AlreadyOwned);
    let refused = of.clone().without_standby().run(engine.pause(SOON), |_| async { Ok(()) }).await;
    assert_kind!(refused, ErrorKind::AlreadyOwned);
    let waiting = async {
        let second = of.claim().await.unwrap();
        assert_eq!(second.lease().epoch, 2);
    };
    let letting_go = async {
        engine.pause(Duration::from_millis(30)).await;
        first.release().await.unwrap();
    };
    let began = Instant::now();
    let futures: [std::pin::Pin<Box<dyn Future<Output = ()>>>; 2] = [Box::pin(waiting), Box::pin(letting_go)];
    join_all(futures).await;
    assert!(began.elapsed() >= Duration::from_millis(30));
}

pub(crate) async fn an_owner_that_dies_is_replaced_and_nothing_is_missed(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 20).await;
    let of = subscription(&store, "mails");
    let mut first = of.claim().await.unwrap();
    let delivery = first.next().await.unwrap();
    first.ack(&delivery).await.unwrap();
    let unacknowledged = first.next().await.unwrap();
    assert_eq!(numbers(unacknowledged.events())[0], 8);
    // It does nothing for longer than its lease, and another comes.
    let seen = events_seen(&engine, &of, 13).await;
    assert_eq!(seen, (8..=20).collect::<Vec<_>>(), "what was not acknowledged comes again");
    assert_kind!(first.ack(&unacknowledged).await, ErrorKind::LeaseLost);
    assert_kind!(first.next().await, ErrorKind::LeaseLost);
    assert_eq!(state(&store, "mails").await.cursor.position, place(20));
}

pub(crate) async fn a_lease_is_renewed_while_the_handler_runs(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 1).await;
    let (seen, entered) = (Seen::default(), Arc::new(AtomicUsize::new(0)));
    let of = subscription(&store, "slow").with_lease(Duration::from_millis(400));
    let run = |of: Subscription| {
        let (engine, handler_engine, seen, entered) =
            (engine.clone(), engine.clone(), seen.clone(), entered.clone());
        async move {
            let (handler_seen, ended) = (seen.clone(), seen.clone());
            let shutdown = async move { until(&engine, || ended.len() > 0).await };
            let end = of.run(shutdown, move |event| {
                entered.fetch_add(1, Ordering::SeqCst);
                let (engine, seen) = (handler_engine.clone(), handler_seen.clone());
                async move {
                    engine.pause(Duration::from_millis(1_000)).await;
                    seen.push(&event);
                    Ok(())
                }
            });
            end.await.unwrap()
        }
    };
    join_all([run(of.clone()), run(of)]).await;
    assert_eq!(
        (seen.len(), entered.load(Ordering::SeqCst)),
        (1, 1),
        "the standby got it although it was renewed"
    );
    assert_eq!(state(&store, "slow").await.cursor.epoch, 1);
}

pub(crate) async fn a_failing_handler_is_tried_again(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 5).await;
    let (seen, tries) = (Seen::default(), Arc::new(Mutex::new(Vec::new())));
    let (handler_seen, handler_tries) = (seen.clone(), Arc::clone(&tries));
    let of = subscription(&store, "mails").on_failure(no_pause(Then::Stop));
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

/// A handler that cannot handle this position.
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
    let (of, seen) = (subscription(&store, "mails").on_failure(no_pause(Then::Stop)), Seen::default());
    let stopped = run_with_poison(&engine, &of, &seen, 3, 5).await;
    let error = stopped.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Rejected), "{error:?}");
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "poison");
    let failed = state(&store, "mails").await;
    let failure = failed.cursor.failure.unwrap();
    assert_eq!((failure.position, failure.attempts, failure.error.as_str()), (place(3), 3, "poison"));
    assert_eq!((failed.cursor.position, failed.is_owned, failed.lag_events), (place(2), false, 3));
    assert_eq!(seen.numbers(), [1, 2]);
    // Mended, it goes on where it stopped, and the failure is forgotten.
    assert_eq!(events_seen(&engine, &of, 3).await, [3, 4, 5]);
    assert_eq!(state(&store, "mails").await.cursor.failure, None);
}

pub(crate) async fn after_a_stop_nobody_tries_at_full_speed(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 1).await;
    let rest = Duration::from_secs(600);
    let policy = FailurePolicy::then(Then::Stop).with_attempts(1).with_pauses(NO_PAUSE, rest);
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
    let (of, seen) = (subscription(&store, "mails").on_failure(no_pause(Then::Skip)), Seen::default());
    run_with_poison(&engine, &of, &seen, 3, 4).await.unwrap();
    assert_eq!(seen.numbers(), [1, 2, 4, 5]);
    assert_eq!(state(&store, "mails").await.cursor.position, place(5));
}

/// Two aggregates, whose events take turns: odd positions and even ones.
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
    let (of, seen) = (subscription(&store, "mails").on_failure(no_pause(Then::Park)), Seen::default());
    run_with_poison(&engine, &of, &seen, 3, 6).await.unwrap();
    assert_eq!(seen.numbers(), [1, 2, 4, 6, 8, 10]);
    let parked = store.parked("mails").await.unwrap();
    let (cursor, event) = &parked[0];
    assert_eq!(
        (parked.len(), event.position, event.attempts, event.error.as_str()),
        (1, place(3), 3, "poison")
    );

    // It still waits after a restart; tried again in vain, it stays.
    store.resume_parked(cursor, None).await.unwrap();
    let (again, later) = (Seen::default(), grown(&engine, "user", 1));
    later.await;
    run_with_poison(&engine, &of, &again, 3, 1).await.unwrap();
    assert_eq!(again.numbers(), [11]);
    assert_eq!(store.parked("mails").await.unwrap()[0].1.attempts, 4);

    // Mended, it and those that waited come in order.
    store.resume_parked(cursor, Some(place(3))).await.unwrap();
    assert_eq!(events_seen(&engine, &of, 4).await, [3, 5, 7, 9]);
    assert!(store.parked("mails").await.unwrap().is_empty());
    assert!(events_seen(&engine, &of, 0).await.is_empty());
}

pub(crate) async fn then_it_parks_alone_and_all_others_go_on(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    two_in_turn(&engine, 10).await;
    let (of, seen) = (subscription(&store, "mails").on_failure(no_pause(Then::ParkAlone)), Seen::default());
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
    let of =
        subscription(&store, "mails").on_failure(no_pause(Then::Park)).with_lease(Duration::from_millis(30));
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
        // All the others wait behind them by then; what comes later would be delivered.
        while state(&store, "mails").await.cursor.position < place(8) {
            engine.pause(Duration::from_millis(5)).await;
        }
        store.drop_parked(&parked[1].0, Some(place(2))).await.unwrap();
        is_mended.store(true, Ordering::SeqCst);
        store.resume_parked(&parked[0].0, Some(place(1))).await.unwrap();
        until(&engine, || seen.len() >= 4).await;
        let (odd, even) = (ids_of(&engine).await[0], ids_of(&engine).await[1]);
        // Both are free again.
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
    let (of, seen) = (subscription(&store, "mails").on_failure(no_pause(Then::Park)), Seen::default());
    run_with_poison(&engine, &of, &seen, 3, 3).await.unwrap();
    assert_kind!(store.reset_subscription("mails", Start::Beginning).await, ErrorKind::Invalid);
    let (cursor, _) = store.parked("mails").await.unwrap().remove(0);
    let again = Seen::default();
    run_until(&engine, &of.clone().with_version(2), &again, 4).await;
    while store.live_version("mails").await.unwrap() != 2 {
        run_until(&engine, &of.clone().with_version(2), &again, 0).await;
    }
    assert_kind!(store.resume_parked(&cursor, None).await, ErrorKind::Superseded);
    store.drop_parked(&cursor, None).await.unwrap();
    assert!(store.parked("mails").await.unwrap().is_empty());
    store.reset_subscription("mails", Start::Beginning).await.unwrap();
}

pub(crate) async fn operators_of_the_same_store_are_heard_at_once(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 3).await;
    let of = subscription(&store, "mails").with_lease(Duration::from_secs(600));
    let seen = Seen::default();
    let operator = async {
        while state_or_none(&store, "mails").await != Some(place(3)) {
            engine.pause(Duration::from_millis(2)).await;
        }
        store.reset_subscription("mails", Start::Beginning).await.unwrap();
        until(&engine, || seen.len() >= 6).await;
        store.pause_subscription("mails").await.unwrap();
        assert_eq!(state(&store, "mails").await.cursor.status, CursorStatus::Paused);
        while state(&store, "mails").await.is_owned {
            engine.pause(Duration::from_millis(2)).await;
        }
        store.resume_subscription("mails").await.unwrap();
        grown(&engine, "user", 1).await;
        RunEnd::ShutDown
    };
    let began = Instant::now();
    let futures: [std::pin::Pin<Box<dyn Future<Output = RunEnd>>>; 2] =
        [Box::pin(run_until(&engine, &of, &seen, 7)), Box::pin(operator)];
    join_all(futures).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!(seen.numbers(), [1, 2, 3, 1, 2, 3, 4]);
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
    let (of, seen) = (subscription(&store, "sums").on_failure(no_pause(Then::Skip)), Seen::default());
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
    let of = subscription(&store, "mails").on_failure(no_pause(Then::ParkAlone));
    let run = of.run(until(&engine, || each.len() >= 5), move |event| {
        // One panics when it is called, or when it is polled: here at the first attempt, there at the others.
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
    let of = subscription(&store, "sums").on_failure(no_pause(Then::ParkAlone));
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
    let of = subscription(&store, "mails").with_batch(events_per_page(5)).on_failure(no_pause(Then::Skip));
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

pub(crate) async fn a_filter_that_matches_rarely_still_moves_the_cursor(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 50).await;
    let rare = Filter::all().with_event_type(event_named("Rare"));
    let (of, seen) = (subscription(&store, "rare").with_filter(rare), Seen::default());
    let shutdown = async {
        while state_or_none(&store, "rare").await != Some(place(50)) {
            engine.pause(Duration::from_millis(2)).await;
        }
        // A name that nobody has used yet matches as soon as somebody does.
        unit()
            .events(id, "user", 50, vec![event("Rare", b"1"), event("Other", b"2")])
            .commit(&engine)
            .await
            .unwrap();
        until(&engine, || seen.len() > 0).await;
        while state_or_none(&store, "rare").await != Some(place(52)) {
            engine.pause(Duration::from_millis(2)).await;
        }
    };
    let shutdown: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(shutdown);
    let handler = seen.clone();
    of.run(shutdown, move |event| {
        handler.push(&event);
        async { Ok(()) }
    })
    .await
    .unwrap();
    assert_eq!(seen.numbers(), [51]);
}

async fn state_or_none(store: &EventStore, name: &str) -> Option<Position> {
    store.subscription_states(name).await.ok().map(|states| states[0].cursor.position)
}

pub(crate) async fn a_changed_filter_takes_effect_after_the_claim_and_whole(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 3).await;
    let of_users =
        subscription(&store, "mails").with_filter(Filter::all().with_aggregate_type(type_named("user")));
    let of_orders =
        subscription(&store, "mails").with_filter(Filter::all().with_aggregate_type(type_named("order")));
    let mut owner = of_users.claim().await.unwrap();
    assert_kind!(of_orders.clone().without_standby().claim().await, ErrorKind::AlreadyOwned);
    let first = owner.next().await.unwrap();
    grown(&engine, "order", 2).await;
    grown(&engine, "user", 1).await;
    let second = owner.next().await.unwrap();
    assert_eq!((numbers(first.events()), numbers(second.events())), (vec![1, 2, 3], vec![6]));
    owner.ack(&first).await.unwrap();
    owner.release().await.unwrap();
    assert_eq!(events_seen(&engine, &of_orders, 2).await, [4, 5]);
}

pub(crate) async fn it_is_paused_and_resumed(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 3).await;
    let of = subscription(&store, "mails").with_lease(Duration::from_millis(60));
    let seen = Seen::default();
    let operator = async {
        until(&engine, || seen.len() >= 3).await;
        store.pause_subscription("mails").await.unwrap();
        assert_eq!(state(&store, "mails").await.cursor.status, CursorStatus::Paused);
        while state(&store, "mails").await.is_owned {
            engine.pause(Duration::from_millis(2)).await;
        }
        grown(&engine, "user", 2).await;
        engine.pause(Duration::from_millis(50)).await;
        assert_eq!(seen.len(), 3, "nothing is delivered while it is paused");
        assert_kind!(of.clone().without_standby().claim().await, ErrorKind::Paused);
        store.resume_subscription("mails").await.unwrap();
        RunEnd::ShutDown
    };
    let futures: [std::pin::Pin<Box<dyn Future<Output = RunEnd>>>; 2] =
        [Box::pin(run_until(&engine, &of, &seen, 5)), Box::pin(operator)];
    join_all(futures).await;
    assert_eq!(seen.numbers(), [1, 2, 3, 4, 5]);
}

pub(crate) async fn it_is_reset_while_it_runs_and_tells_what_is_a_replay(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 5).await;
    let of = subscription(&store, "mails").with_lease(Duration::from_millis(60));
    let all = Arc::new(Mutex::new(Vec::new()));
    let handler = Arc::clone(&all);
    let operator = async {
        while state_or_none(&store, "mails").await != Some(place(5)) {
            engine.pause(Duration::from_millis(2)).await;
        }
        store.reset_subscription("mails", Start::After(place(2))).await.unwrap();
        until(&engine, || all.lock().unwrap().len() >= 8).await;
        grown(&engine, "user", 1).await;
        until(&engine, || all.lock().unwrap().len() >= 9).await;
    };
    let operator: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(operator);
    let run = of.run(operator, move |event| {
        handler.lock().unwrap().push((event.position().get(), event.is_replay()));
        async { Ok(()) }
    });
    run.await.unwrap();
    let all = all.lock().unwrap().clone();
    let live = (1..=5).map(|position| (position, false));
    let again = (3..=5).map(|position| (position, true));
    let expected: Vec<_> = live.chain(again).chain([(6, false)]).collect();
    assert_eq!(all, expected);
    assert_kind!(
        store.reset_subscription("mails", Start::After(place(99))).await,
        ErrorKind::CursorAhead { .. }
    );
    assert_kind!(store.reset_subscription("none", Start::End).await, ErrorKind::NotFound);
}

pub(crate) async fn a_shutdown_acknowledges_what_is_done_and_nothing_else(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 20).await;
    let (of, seen) = (subscription(&store, "mails").with_batch(events_per_page(20)), Seen::default());
    let (handler, wait) = (seen.clone(), engine.clone());
    let run = of.run(until(&engine, || seen.len() >= 5), move |event| {
        let (seen, engine) = (handler.clone(), wait.clone());
        async move {
            seen.push(&event);
            engine.pause(Duration::from_millis(20)).await;
            Ok(())
        }
    });
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    let after = state(&store, "mails").await;
    assert_eq!(after.cursor.position.get(), seen.len() as i64, "the handler at work ended, no other began");
    assert!(seen.len() < 20 && !after.is_owned);
    let done = seen.len();
    assert_eq!(events_seen(&engine, &of, 20 - done).await[0], done as i64 + 1);
}

pub(crate) async fn a_handler_that_does_not_end_is_dropped_after_the_grace(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 1).await;
    let (of, seen) = (subscription(&store, "mails").with_grace(Duration::from_millis(30)), Seen::default());
    let handler = seen.clone();
    let run = of.run(until(&engine, || seen.len() >= 1), move |event| {
        handler.push(&event);
        std::future::pending()
    });
    assert_eq!(run.await.unwrap(), RunEnd::ShutDown);
    let after = state(&store, "mails").await;
    assert_eq!((after.cursor.position, after.is_owned), (Position::ZERO, false));
    assert_eq!(events_seen(&engine, &of, 1).await, [1]);
}

pub(crate) async fn dropping_a_runner_acknowledges_nothing(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 5).await;
    let of = subscription(&store, "mails").with_lease(Duration::from_millis(40));
    for polls in 0..12 {
        let run = of.run(std::future::pending(), |event| async move {
            if event.position() == place(1) { std::future::pending().await } else { Ok(()) }
        });
        poll_at_most(polls, run).await;
        // What is still on its way, and the lease.
        engine.pause(Duration::from_millis(10)).await;
    }
    assert_eq!(state(&store, "mails").await.cursor.position, Position::ZERO);
    assert_eq!(events_seen(&engine, &of, 5).await, [1, 2, 3, 4, 5]);
}

pub(crate) async fn runners_that_come_and_go_miss_nothing(fixture: &mut Fixture) {
    const EVENTS: usize = 400;
    let (engine, seen) = (fixture.engine(), Mutex::new(BTreeSet::new()));
    let (regressions, deliveries) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let furthest = Arc::new(Mutex::new(HashMap::new()));
    fixture.threads(6, async |number| {
        let store = EventStore::shared(Arc::clone(&engine));
        if number == 0 {
            let id = grown(&engine, "user", 0).await;
            for nth in 0..EVENTS as i64 / 4 {
                unit().append(id, "user", nth * 4, 4).commit(&engine).await.unwrap();
            }
            return;
        }
        let mut random = Random(number as u64);
        let lease = Duration::from_millis(40);
        let of = subscription(&store, "mails").with_lease(lease).on_failure(no_pause(Then::Stop));
        let began = Instant::now();
        while seen.lock().unwrap().len() < EVENTS {
            assert!(began.elapsed() < Duration::from_secs(60), "not all events came");
            let (crash, stop) = (random.one_in(3), Duration::from_millis(random.below(60) as u64));
            let Ok(mut owned) = of.clone().without_standby().claim().await else {
                engine.pause(Duration::from_millis(random.below(10) as u64)).await;
                continue;
            };
            let until = Instant::now() + stop;
            while Instant::now() < until {
                let Some(Ok(delivery)) = drop_after(&engine, lease, owned.next()).await else { break };
                deliveries.fetch_add(1, Ordering::Relaxed);
                seen.lock().unwrap().extend(numbers(delivery.events()));
                if random.one_in(20) {
                    engine.pause(lease * 2).await; // sleeps, and does not know it
                }
                if random.one_in(10) || owned.ack(&delivery).await.is_err() {
                    break;
                }
                let mut furthest = furthest.lock().unwrap();
                let before = furthest.insert(number, owned.position()).unwrap_or_default();
                regressions.fetch_add(usize::from(owned.position() < before), Ordering::Relaxed);
            }
            if !crash {
                let _ = owned.release().await;
            }
        }
    });
    assert_eq!(seen.lock().unwrap().len(), EVENTS, "missed");
    assert_eq!(regressions.load(Ordering::Relaxed), 0);
}

pub(crate) async fn delivery_equals_storage_in_every_field(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 2).await;
    let metadata = Metadata::new()
        .with_reference("ticket 7")
        .unwrap()
        .with_correlation_id("conversation")
        .unwrap()
        .with_causation_id("cause")
        .unwrap()
        .with_header("tenant", "blue")
        .unwrap();
    let time = Timestamp::from_micros(-1).unwrap();
    let event = event_with("Marked", b"\x00\xff", time, metadata);
    unit().events(id, "user", 2, vec![event]).commit(&engine).await.unwrap();
    let seen = Seen::default();
    run_until(&engine, &subscription(&store, "all"), &seen, 3).await;
    let stored = log(&engine).await;
    assert_eq!(seen.events(), stored);
    assert_eq!(seen.events()[2].reference(), Some("ticket 7"));
}

pub(crate) async fn an_ephemeral_subscription_follows_the_log_and_writes_nothing(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 3).await;
    let filter = Filter::all().with_aggregate_type(type_named("user"));
    let mut all =
        store.subscribe(filter.clone(), Start::Beginning).await.unwrap().with_batch(events_per_page(2));
    let mut news = store.subscribe(filter, Start::End).await.unwrap();
    let mut found = Vec::new();
    while found.len() < 3 {
        for polls in 0..3 {
            if let Some(page) = poll_at_most(polls, all.next()).await {
                found.extend(page.unwrap().iter());
            }
        }
        if found.len() < 3 {
            found.extend(all.next().await.unwrap().iter());
        }
    }
    assert_eq!(numbers(&found), [1, 2, 3]);
    assert!(drop_after(&engine, Duration::from_millis(20), all.next()).await.is_none());
    grown(&engine, "order", 1).await;
    grown(&engine, "user", 1).await;
    for subscription in [&mut all, &mut news] {
        assert_eq!(numbers(&subscription.next().await.unwrap().iter().collect::<Vec<_>>()), [5]);
        assert_eq!(subscription.position(), place(5));
    }
    grown(&engine, "order", 1).await;
    assert!(news.next_page().await.unwrap().events.is_empty());
    assert_eq!(news.position(), place(6));
    assert!(engine.cursors(None).await.unwrap().cursors.is_empty());
}

pub(crate) async fn a_new_version_is_built_beside_the_old_one_and_takes_over(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 30).await;
    let old = subscription(&store, "totals");
    let first = Seen::default();
    run_until(&engine, &old, &first, 30).await;
    assert_eq!(store.live_version("totals").await.unwrap(), 1);
    unit().append(id, "user", 30, 5).commit(&engine).await.unwrap();

    // The old one has not seen five events: for the new one they are live.
    let new = subscription(&store, "totals").with_version(2);
    let all = Arc::new(Mutex::new(Vec::new()));
    let handler = Arc::clone(&all);
    let run = new.run(until(&engine, || all.lock().unwrap().len() >= 35), move |event| {
        handler.lock().unwrap().push((event.position().get(), event.is_replay()));
        async { Ok(()) }
    });
    run.await.unwrap();
    let expected: Vec<_> = (1..=35).map(|position| (position, position <= 30)).collect();
    assert_eq!(*all.lock().unwrap(), expected);
    assert_eq!(store.live_version("totals").await.unwrap(), 2);
    let ended = old.run(engine.pause(SOON), |_| async { panic!("the old version is over") }).await.unwrap();
    assert_eq!(ended, RunEnd::Superseded);
    store.remove_subscription("totals", 1).await.unwrap();
    assert_eq!(store.subscription_states("totals").await.unwrap().len(), 1);
}

pub(crate) async fn versions_that_run_side_by_side_change_over_without_a_gap(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 50).await;
    // As mails would be: an event is live in one version, or in both if the old one was about to acknowledge it.
    let live: Arc<Mutex<BTreeSet<i64>>> = Arc::default();
    let run = |version: u32, stop_at: usize| {
        let (engine, live, of) =
            (engine.clone(), Arc::clone(&live), subscription(&store, "mails").with_version(version));
        async move {
            let (handler, seen) = (Arc::clone(&live), Arc::clone(&live));
            of.run(
                async move { until(&engine, || seen.lock().unwrap().len() >= stop_at).await },
                move |event| {
                    if !event.is_replay() {
                        handler.lock().unwrap().insert(event.position().get());
                    }
                    async { Ok(()) }
                },
            )
            .await
            .unwrap()
        }
    };
    let writer = async {
        for nth in 0..50 {
            unit().append(id, "user", 50 + nth * 2, 2).commit(&engine).await.unwrap();
            engine.pause(Duration::from_millis(1)).await;
        }
        RunEnd::ShutDown
    };
    let late = async {
        until(&engine, || live.lock().unwrap().len() >= 20).await;
        run(2, 150).await
    };
    let futures: [std::pin::Pin<Box<dyn Future<Output = RunEnd>>>; 3] =
        [Box::pin(run(1, 150)), Box::pin(late), Box::pin(writer)];
    let ends = join_all(futures).await;
    assert_eq!(ends[0], RunEnd::Superseded);
    assert_eq!(*live.lock().unwrap(), (1..=150).collect(), "an event was live in neither version");
}

pub(crate) async fn who_wrote_it_can_wait_until_a_projection_has_it(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 1).await;
    let receipt = unit().append(id, "user", 1, 2).commit(&engine).await.unwrap();
    assert_kind!(store.wait_for(&receipt, "totals", NO_PAUSE).await, ErrorKind::NotFound);
    let seen = Seen::default();
    // A filter that does not let it through is no reason to wait longer.
    let of =
        subscription(&store, "totals").with_filter(Filter::all().with_aggregate_type(type_named("order")));
    of.claim().await.unwrap().release().await.unwrap();
    assert_kind!(store.wait_for(&receipt, "totals", Duration::from_millis(5)).await, ErrorKind::Unavailable);
    let reader = async {
        store.wait_for(&receipt, "totals", SOON).await.unwrap();
        assert!(state(&store, "totals").await.cursor.position >= receipt.last);
        grown(&engine, "order", 1).await;
        RunEnd::ShutDown
    };
    let futures: [std::pin::Pin<Box<dyn Future<Output = RunEnd>>>; 2] =
        [Box::pin(run_until(&engine, &of, &seen, 1)), Box::pin(reader)];
    join_all(futures).await;
    store.wait_for(&receipt, "totals", NO_PAUSE).await.unwrap();
}

pub(crate) async fn partitions_share_the_work_and_keep_each_aggregates_order(fixture: &mut Fixture) {
    const AGGREGATES: u32 = 12;
    let (engine, store) = (fixture.engine(), fixture.store());
    let ids = new_ids(&engine, AGGREGATES).await;
    for id in &ids {
        unit().create(*id, "user").commit(&engine).await.unwrap();
    }
    let total = ids.len() * 20;
    let all: Mutex<Vec<(usize, Event)>> = Mutex::default();
    let all = Arc::new(all);
    fixture.threads(4, async |number| {
        let store = EventStore::shared(Arc::clone(&engine));
        if number == 0 {
            for nth in 0..20 {
                for id in &ids {
                    unit().append(*id, "user", nth, 1).commit(&engine).await.unwrap();
                }
            }
            return;
        }
        let (handler, seen) = (Arc::clone(&all), Arc::clone(&all));
        let of = subscription(&store, "shared").with_partitions(6).with_lease(Duration::from_millis(60));
        let shutdown = until(&engine, || {
            let seen = seen.lock().unwrap();
            seen.len() >= total
                && seen.iter().map(|(_, event)| event.position()).collect::<BTreeSet<_>>().len() >= total
        });
        of.run(shutdown, move |event| {
            handler.lock().unwrap().push((number, event.event().clone()));
            async { Ok(()) }
        })
        .await
        .unwrap();
    });
    let all = std::mem::take(&mut *all.lock().unwrap());
    let mut last: HashMap<_, i64> = HashMap::new();
    let mut unique = BTreeSet::new();
    for (_, event) in &all {
        // One that comes again does so with all that follow it.
        let before = last.insert(event.aggregate(), event.sequence().get()).unwrap_or(0);
        assert!(event.sequence().get() <= before + 1, "an event came before the one before it");
        unique.insert(event.position());
    }
    assert_eq!(unique.len(), total);
    assert_eq!(store.subscription_states("shared").await.unwrap().len(), 6);
    let refused = subscription(&store, "shared").with_partitions(5).claim().await;
    assert_kind!(refused, ErrorKind::Invalid);
}

pub(crate) async fn partitions_are_shared_evenly_when_runners_come_and_go(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let of = subscription(&store, "shared").with_partitions(6).with_lease(Duration::from_millis(60));
    let run = |shutdown: Arc<AtomicBool>| {
        let (engine, of) = (engine.clone(), of.clone());
        async move {
            let shutdown = async move { until(&engine, || shutdown.load(Ordering::SeqCst)).await };
            of.run(shutdown, |_| async { Ok(()) }).await.unwrap();
        }
    };
    let stops: [Arc<AtomicBool>; 3] = Default::default();
    let watcher = async {
        let shares = || async {
            let name = SubscriptionName::new("shared").unwrap();
            let found = engine.cursors(Some(&name)).await.unwrap();
            let mut owners: HashMap<OwnerId, usize> = HashMap::new();
            for cursor in found.cursors.iter().filter(|cursor| cursor.is_owned(found.now)) {
                *owners.entry(cursor.owner.clone().unwrap()).or_default() += 1;
            }
            let mut shares: Vec<usize> = owners.into_values().collect();
            shares.sort_unstable();
            shares
        };
        let comes_to = async |expected: &[usize]| {
            let began = Instant::now();
            while shares().await != expected {
                assert!(began.elapsed() < SOON, "expected {expected:?}, is {:?}", shares().await);
                engine.pause(Duration::from_millis(10)).await;
            }
        };
        comes_to(&[2, 2, 2]).await;
        stops[0].store(true, Ordering::SeqCst);
        comes_to(&[3, 3]).await;
        stops[1].store(true, Ordering::SeqCst);
        comes_to(&[6]).await;
        stops[2].store(true, Ordering::SeqCst);
        comes_to(&[]).await;
    };
    let later = async {
        engine.pause(Duration::from_millis(100)).await;
        run(Arc::clone(&stops[2])).await;
    };
    let futures: [std::pin::Pin<Box<dyn Future<Output = ()>>>; 4] = [
        Box::pin(run(Arc::clone(&stops[0]))),
        Box::pin(run(Arc::clone(&stops[1]))),
        Box::pin(later),
        Box::pin(watcher),
    ];
    join_all(futures).await;
}

pub(crate) async fn a_lag_is_told_in_events_and_in_time(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 4).await;
    let mut owned = subscription(&store, "mails").with_batch(events_per_page(1)).claim().await.unwrap();
    let first = owned.next().await.unwrap();
    owned.ack(&first).await.unwrap();
    engine.pause(Duration::from_millis(20)).await;
    let behind = state(&store, "mails").await;
    assert_eq!((behind.lag_events, behind.is_owned), (3, true));
    assert!(behind.lag_time >= Duration::from_millis(20) && behind.lag_time < SOON, "{:?}", behind.lag_time);
    for _ in 0..3 {
        let next = owned.next().await.unwrap();
        owned.ack(&next).await.unwrap();
    }
    let level = state(&store, "mails").await;
    assert_eq!((level.lag_events, level.lag_time), (0, Duration::ZERO));
    assert_eq!(store.subscriptions().await.unwrap().len(), 1);
}

pub(crate) async fn a_cursor_ahead_of_the_log_is_an_error(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 3).await;
    let of = subscription(&store, "mails");
    let owned = of.claim().await.unwrap();
    engine.step(&owned.cursor().id, &Step::reset(place(9))).await.unwrap();
    let run = of.run(engine.pause(SOON), |_| async { Ok(()) }).await;
    assert_kind!(run, ErrorKind::CursorAhead { .. });
}

pub(crate) async fn futures_of_subscriptions_are_send(fixture: &mut Fixture) {
    fn is_send<T: Send>(work: T) -> T {
        work
    }
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 1).await;
    let of = subscription(&store, "mails");
    is_send(of.run(std::future::ready(()), |event| async move {
        event.decode::<Account>()?;
        Ok(())
    }))
    .await
    .unwrap();
    let mut owned = is_send(of.claim()).await.unwrap();
    let delivery = is_send(owned.next()).await.unwrap();
    is_send(owned.keep(engine.pause(NO_PAUSE))).await.unwrap();
    is_send(owned.ack(&delivery)).await.unwrap();
    is_send(owned.release()).await.unwrap();
    is_send(store.wait_for_position(place(1), "mails", NO_PAUSE)).await.unwrap();
    let mut all = is_send(store.subscribe(Filter::all(), Start::Beginning)).await.unwrap();
    is_send(all.next()).await.unwrap();
}

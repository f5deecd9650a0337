//! The deliveries of a subscription: from its start, through its filter, until its shutdown.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evercore_core::engine::Step;
use evercore_core::{
    CursorStatus, ErrorKind, Filter, LogQuery, Metadata, Position, RunEnd, Start, Timestamp,
};

use crate::fixture::Fixture;
use crate::tools::*;

use super::tools::*;

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

pub(crate) async fn a_filter_that_matches_rarely_still_moves_the_cursor(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 50).await;
    let rare = Filter::all().with_event_type(event_named("Rare"));
    let (of, seen) = (subscription(&store, "rare").with_filter(rare), Seen::default());
    let shutdown = async {
        while state_or_none(&store, "rare").await != Some(place(50)) {
            engine.pause(Duration::from_millis(2)).await;
        }
        // A new name matches from its first use on.
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
    let of = subscription(&store, "mails").with_live_past().with_lease(Duration::from_millis(60));
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
        // Requests that are still running, and the lease.
        engine.pause(Duration::from_millis(10)).await;
    }
    assert_eq!(state(&store, "mails").await.cursor.position, Position::ZERO);
    assert_eq!(events_seen(&engine, &of, 5).await, [1, 2, 3, 4, 5]);
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

pub(crate) async fn who_wrote_it_can_wait_until_a_projection_has_it(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 1).await;
    let receipt = unit().append(id, "user", 1, 2).commit(&engine).await.unwrap();
    assert_kind!(store.wait_for(&receipt, "totals", NO_PAUSE).await, ErrorKind::NotFound);
    let seen = Seen::default();
    // An event that the filter leaves out does not delay the end.
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

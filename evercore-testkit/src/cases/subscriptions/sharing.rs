//! The owner of a cursor: leases, versions and partitions.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evercore_core::{
    ErrorKind, Event, EventStore, FailureAction, OwnerId, RunEnd, Subscription, SubscriptionName,
};

use crate::fixture::Fixture;
use crate::tools::*;

use super::tools::*;

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
    // It does nothing for longer than its lease, and another one takes over.
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
        let of = subscription(&store, "mails").with_lease(lease).on_failure(no_pause(FailureAction::Stop));
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
                    engine.pause(lease * 2).await; // as if the process was asleep
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

pub(crate) async fn a_new_version_is_built_beside_the_old_one_and_takes_over(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 30).await;
    let old = subscription(&store, "totals");
    let first = Seen::default();
    run_until(&engine, &old, &first, 30).await;
    assert_eq!(store.live_version("totals").await.unwrap(), 1);
    unit().append(id, "user", 30, 5).commit(&engine).await.unwrap();

    // The old version has not handled five events. They are live for the new one.
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
    let over = |_| async { panic!("the old version is over") };
    let ended = old.clone().without_standby().run(engine.pause(SOON), over).await.unwrap();
    assert_eq!(ended, RunEnd::Superseded);
    store.remove_version("totals", 1).await.unwrap();
    assert_eq!(old.run(engine.pause(SOON), over).await.unwrap(), RunEnd::Superseded);
    assert_eq!(store.subscription_states("totals").await.unwrap().len(), 1);
}

pub(crate) async fn versions_that_run_side_by_side_change_over_without_a_gap(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 50).await;
    // An event is live in one version. It is live in both if the old one was about to acknowledge it.
    let live: Arc<Mutex<BTreeSet<i64>>> = Arc::default();
    let run = |version: u32, stop_at: usize| {
        let (engine, live, of) =
            (engine.clone(), Arc::clone(&live), subscription(&store, "mails").with_version(version));
        let of = of.with_live_past();
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
    join_all(futures).await;
    assert_eq!(*live.lock().unwrap(), (1..=150).collect(), "an event was live in neither version");
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
        // A repeated event is followed by all later ones.
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

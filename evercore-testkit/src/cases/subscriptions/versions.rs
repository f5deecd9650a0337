//! Versions of a projection: when a new one takes over, who is told, and how an operator decides otherwise.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evercore_core::{
    BoxError, Delivered, ErrorKind, EventStore, FailureAction, RunEnd, Start, Subscription, VersionState,
};

use crate::fixture::Fixture;
use crate::tools::*;

use super::tools::*;

type Work<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

fn version(store: &EventStore, version: u32) -> Subscription {
    subscription(store, "totals")
        .with_version(version)
        .with_live_past()
        .on_failure(no_pause(FailureAction::Stop))
}

/// What one version has got: for each position, whether it was live, and how often.
#[derive(Clone, Default)]
struct Got(Arc<Mutex<BTreeMap<i64, Vec<bool>>>>);

impl Got {
    fn note(&self, event: &Delivered) {
        let mut got = self.0.lock().unwrap();
        got.entry(event.position().get()).or_default().push(!event.is_replay());
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn live(&self) -> Vec<i64> {
        let got = self.0.lock().unwrap();
        got.iter().filter(|(_, times)| times.contains(&true)).map(|(position, _)| *position).collect()
    }

    fn handler(
        &self,
    ) -> impl Fn(Delivered) -> std::future::Ready<Result<(), BoxError>> + Send + Sync + 'static {
        let got = self.clone();
        move |event| {
            got.note(&event);
            std::future::ready(Ok(()))
        }
    }
}

/// Runs a version until it has got this many events.
async fn run_to(engine: &Engine, of: &Subscription, got: &Got, count: usize) -> RunEnd {
    of.run(until(engine, || got.count() >= count), got.handler()).await.unwrap()
}

/// Waits until something is so.
async fn wait_until(engine: &Engine, what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < SOON, "in vain: {what}");
        engine.pause(Duration::from_millis(5)).await;
    }
}

async fn state_of(store: &EventStore, version: u32) -> Option<VersionState> {
    let states = store.subscription_states("totals").await.unwrap();
    states.iter().map(|it| &it.cursor).find(|it| it.id.version == version).map(|it| it.version_state())
}

pub(crate) async fn a_version_that_fails_does_not_take_over(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 5).await;
    run_to(&engine, &version(&store, 1), &Got::default(), 5).await;
    // Its distance is less than a batch, and it cannot handle the first event.
    let new = version(&store, 2).without_standby();
    assert_kind!(new.run(engine.pause(SOON), |_| async { Err("no".into()) }).await, ErrorKind::Rejected);
    assert_eq!(store.live_version("totals").await.unwrap(), 1);
    assert_eq!(state_of(&store, 1).await, Some(VersionState::Live));
    assert_eq!(state_of(&store, 2).await, Some(VersionState::Building));
    // The old version goes on with live events.
    unit().append(new_id_in(&engine).await, "user", 0, 1).commit(&engine).await.unwrap();
    let got = Got::default();
    run_to(&engine, &version(&store, 1), &got, 1).await;
    assert_eq!(got.live(), [6]);
    let head = engine.head().await.unwrap();
    store.wait_for_position(head, "totals", SOON).await.unwrap();
}

async fn new_id_in(engine: &Engine) -> evercore_core::AggregateId {
    let id = new_id(engine).await;
    unit().create(id, "user").commit(engine).await.unwrap();
    id
}

pub(crate) async fn a_version_takes_over_when_all_its_partitions_have_handled_enough(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let ids = new_ids(&engine, 4).await;
    for id in &ids {
        unit().create(*id, "user").append(*id, "user", 0, 3).commit(&engine).await.unwrap();
    }
    let of = |number| version(&store, number).with_partitions(2);
    run_to(&engine, &of(1), &Got::default(), 12).await;
    wait_until(&engine, "it is stored", async || {
        let states = store.subscription_states("totals").await.unwrap();
        states.iter().all(|state| state.lag_events == 0) || {
            run_for(&engine, &of(1)).await;
            false
        }
    })
    .await;
    // One partition of the new version is ready, the other one is in the hands of a slow owner.
    let mut slow = of(2).claim().await.unwrap();
    let slow_partition = slow.cursor().id.partition;
    let delivery = slow.next().await.unwrap();
    let (got, stop) = (Got::default(), AtomicBool::new(false));
    let ready = of(2);
    let run = async {
        let ended = ready.run(until(&engine, || stop.load(Ordering::SeqCst)), got.handler()).await;
        ended.unwrap();
    };
    let watch = async {
        wait_until(&engine, "the other partition is ready", async || {
            let states = store.subscription_states("totals").await.unwrap();
            let other = states
                .iter()
                .find(|it| it.cursor.id.version == 2 && it.cursor.id.partition != slow_partition)
                .unwrap();
            slow.keep(engine.pause(Duration::from_millis(1))).await.unwrap();
            other.lag_events == 0
        })
        .await;
        engine.pause(LEASE / 2).await;
        assert_eq!(store.live_version("totals").await.unwrap(), 1, "one partition has handled nothing yet");
        slow.ack(&delivery).await.unwrap();
        slow.release().await.unwrap();
        wait_until(&engine, "it takes over", async || store.live_version("totals").await.unwrap() == 2).await;
        stop.store(true, Ordering::SeqCst);
    };
    join_all([Box::pin(run) as Work<'_>, Box::pin(watch)]).await;
    assert_eq!(got.live(), [0; 0], "all of it was handled by version 1");
    assert_eq!(state_of(&store, 1).await, Some(VersionState::Retired));
}

async fn run_for(engine: &Engine, of: &Subscription) {
    of.run(engine.pause(Duration::from_millis(60)), |_| async { Ok(()) }).await.unwrap();
}

pub(crate) async fn a_version_catches_up_with_one_that_never_stands_still(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 40).await;
    let (one, two, stop) = (Got::default(), Got::default(), AtomicBool::new(false));
    let old = version(&store, 1).with_batch(events_per_page(1));
    let new = version(&store, 2).with_batch(events_per_page(1));
    run_to(&engine, &old, &one, 40).await;
    let stopped = || until(&engine, || stop.load(Ordering::SeqCst));
    let writer = async {
        let mut length = 40;
        while !stop.load(Ordering::SeqCst) {
            unit().append(id, "user", length, 1).commit(&engine).await.unwrap();
            length += 1;
            engine.pause(Duration::ZERO).await; // with an engine that works on this thread, the others come first
        }
    };
    let run_old = async { assert!(old.run(stopped(), one.handler()).await.is_ok()) };
    let run_new = async { assert!(new.run(stopped(), two.handler()).await.is_ok()) };
    let watch = async {
        wait_until(&engine, "it takes over", async || store.live_version("totals").await.unwrap() == 2).await;
        let seen = two.count();
        wait_until(&engine, "it goes on", async || two.count() > seen + 5).await;
        stop.store(true, Ordering::SeqCst);
    };
    join_all([Box::pin(writer) as Work<'_>, Box::pin(run_old), Box::pin(run_new), Box::pin(watch)]).await;
    // Each event was live in one version. In both only if the old one was about to acknowledge it.
    let (one, two) = (one.live(), two.live());
    assert_eq!(one, (1..=one.len() as i64).collect::<Vec<_>>());
    assert!(
        two[0] <= one.len() as i64 + 1,
        "an event was live in no version: {} and then {}",
        one.len(),
        two[0]
    );
    assert!(two[0] > one.len() as i64 - 2, "many events were live twice");
    assert!(two.windows(2).all(|pair| pair[1] == pair[0] + 1));
}

pub(crate) async fn a_held_version_follows_and_waits_for_its_promotion(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 5).await;
    let (one, two, stop) = (Got::default(), Got::default(), AtomicBool::new(false));
    run_to(&engine, &version(&store, 1), &one, 5).await;
    let new = version(&store, 2).held();
    let run = async {
        let ended = new.run(until(&engine, || stop.load(Ordering::SeqCst)), two.handler()).await;
        assert_eq!(ended.unwrap(), RunEnd::ShutDown);
    };
    let watch = async {
        wait_until(&engine, "it is built", async || two.count() == 5).await;
        engine.pause(LEASE).await;
        assert_eq!(store.live_version("totals").await.unwrap(), 1, "nobody has promoted it");
        assert_eq!(state_of(&store, 2).await, Some(VersionState::Held));
        unit().append(id, "user", 5, 2).commit(&engine).await.unwrap();
        engine.pause(LEASE).await;
        assert_eq!(two.count(), 5, "it does not pass the live version");
        run_to(&engine, &version(&store, 1), &one, 7).await;
        wait_until(&engine, "it follows", async || two.count() == 7).await;
        let promotion = store.promote_version("totals", 2).await.unwrap();
        assert_eq!((promotion.version, promotion.former, promotion.left_parked), (2, Some(1), 0));
        assert_eq!(store.live_version("totals").await.unwrap(), 2);
        let receipt = unit().append(id, "user", 7, 1).commit(&engine).await.unwrap();
        store.wait_for(&receipt, "totals", SOON).await.unwrap();
        stop.store(true, Ordering::SeqCst);
    };
    join_all([Box::pin(run) as Work<'_>, Box::pin(watch)]).await;
    assert_eq!((one.live(), two.live()), ((1..=7).collect(), vec![8]));
    assert_kind!(store.promote_version("totals", 2).await, ErrorKind::Invalid);
}

pub(crate) async fn a_roll_back_goes_on_where_the_newer_version_was(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 5).await;
    let (one, two) = (Got::default(), Got::default());
    run_to(&engine, &version(&store, 1), &one, 5).await;
    run_to(&engine, &version(&store, 2), &two, 5).await;
    wait_for_take_over(&engine, &store, &two).await;
    unit().append(id, "user", 5, 3).commit(&engine).await.unwrap();
    run_to(&engine, &version(&store, 2), &two, 8).await;
    assert_eq!(two.live(), [6, 7, 8]);
    let rolled_back = store.roll_back("totals").await.unwrap();
    assert_eq!((rolled_back.version, rolled_back.former, rolled_back.behind), (1, Some(2), 3));
    assert_eq!(store.live_version("totals").await.unwrap(), 1);
    assert_eq!(state_of(&store, 2).await, Some(VersionState::Held));
    unit().append(id, "user", 8, 1).commit(&engine).await.unwrap();
    run_to(&engine, &version(&store, 1), &one, 9).await;
    assert_eq!(one.live(), [1, 2, 3, 4, 5, 9], "version 2 has handled the events between");
    assert_kind!(store.roll_back("totals").await, ErrorKind::Invalid);
    // A version that mends the fault takes over from it, as from any.
    let three = Got::default();
    run_to(&engine, &version(&store, 3), &three, 9).await;
    let name = version(&store, 3);
    wait_until(&engine, "version 3 takes over", async || {
        run_for(&engine, &name).await;
        store.live_version("totals").await.unwrap() == 3
    })
    .await;
    assert_eq!(three.live(), [0; 0]);
    assert_eq!(state_of(&store, 2).await, Some(VersionState::Retired));
}

pub(crate) async fn a_run_stands_by_while_its_version_is_retired(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 5).await;
    let (one, two, stop) = (Got::default(), Got::default(), AtomicBool::new(false));
    let (old, new) = (version(&store, 1), version(&store, 2));
    let run_old = async {
        // It ends when its version is removed.
        let ended = old.run(std::future::pending(), one.handler()).await;
        assert_eq!(ended.unwrap(), RunEnd::Superseded);
    };
    let run_new = async {
        wait_until(&engine, "version 1 is done", async || one.count() == 5).await;
        let ended = new.run(until(&engine, || stop.load(Ordering::SeqCst)), two.handler()).await;
        assert_eq!(ended.unwrap(), RunEnd::ShutDown);
    };
    let operator = async {
        let live = async || store.live_version("totals").await.unwrap_or(1);
        wait_until(&engine, "version 2 takes over", async || live().await == 2).await;
        unit().append(id, "user", 5, 1).commit(&engine).await.unwrap();
        wait_until(&engine, "version 2 handles it", async || two.count() == 6).await;
        store.roll_back("totals").await.unwrap();
        // The call does not wait for the owners of version 2.
        engine.pause(LEASE).await;
        unit().append(id, "user", 6, 1).commit(&engine).await.unwrap();
        wait_until(&engine, "version 1 goes on without a restart", async || one.count() == 7).await;
        assert_eq!((one.live(), two.live()), (vec![1, 2, 3, 4, 5, 7], vec![6]));
        wait_until(&engine, "version 2 follows", async || two.count() == 7).await;
        store.promote_version("totals", 2).await.unwrap();
        store.remove_version("totals", 1).await.unwrap();
        unit().append(id, "user", 7, 1).commit(&engine).await.unwrap();
        wait_until(&engine, "version 2 is live again", async || two.live() == [6, 8]).await;
        stop.store(true, Ordering::SeqCst);
    };
    join_all([Box::pin(run_old) as Work<'_>, Box::pin(run_new), Box::pin(operator)]).await;
}

async fn wait_for_take_over(engine: &Engine, store: &EventStore, two: &Got) {
    let of = version(store, 2);
    wait_until(engine, "version 2 takes over", async || {
        of.run(engine.pause(Duration::from_millis(30)), two.handler()).await.unwrap();
        store.live_version("totals").await.unwrap() == 2
    })
    .await;
}

pub(crate) async fn a_take_over_drops_no_parked_event(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 5).await;
    let failing = Arc::new(AtomicBool::new(true));
    let old = version(&store, 1).on_failure(no_pause(FailureAction::ParkAlone));
    let (is_failing, seen) = (Arc::clone(&failing), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&seen);
    let run = old.run(until(&engine, || seen.load(Ordering::SeqCst) >= 4), move |event| {
        let fails = event.position().get() == 3 && is_failing.load(Ordering::SeqCst);
        count.fetch_add(usize::from(!fails), Ordering::SeqCst);
        async move { if fails { Err("no".into()) } else { Ok(()) } }
    });
    run.await.unwrap();
    assert_eq!(store.parked("totals").await.unwrap().len(), 1);
    let two = Got::default();
    run_to(&engine, &version(&store, 2), &two, 5).await;
    version(&store, 2).run(engine.pause(LEASE), two.handler()).await.unwrap();
    assert_eq!(store.live_version("totals").await.unwrap(), 1, "event 3 would be handled by no version");
    // An operator may decide that it does not matter.
    let promotion = store.promote_version("totals", 2).await.unwrap();
    assert_eq!(promotion.left_parked, 1);
    let parked = store.parked("totals").await.unwrap();
    assert_eq!((parked.len(), parked[0].0.version, parked[0].1.position), (1, 1, place(3)));
}

pub(crate) async fn what_an_operator_asks_of_a_retired_version_is_an_error(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 3).await;
    run_to(&engine, &version(&store, 1), &Got::default(), 3).await;
    version(&store, 2).declare().await.unwrap();
    store.promote_version("totals", 2).await.unwrap();
    assert_kind!(store.remove_version("totals", 2).await, ErrorKind::Invalid);
    assert_kind!(store.hold_version("totals", 1).await, ErrorKind::Invalid);
    assert_kind!(version(&store, 1).claim().await, ErrorKind::Superseded);
    store.roll_back("totals").await.unwrap();
    // Version 1 is live again, and version 2 is held: it does not take over while nobody decides.
    let two = Got::default();
    run_to(&engine, &version(&store, 2), &two, 3).await;
    version(&store, 2).run(engine.pause(LEASE), two.handler()).await.unwrap();
    assert_eq!(store.live_version("totals").await.unwrap(), 1);
    store.release_version("totals", 2).await.unwrap();
    wait_for_take_over(&engine, &store, &two).await;
    store.reset_subscription("totals", Start::Beginning).await.unwrap();
    store.remove_version("totals", 1).await.unwrap();
    assert_kind!(store.roll_back("totals").await, ErrorKind::Invalid);
    assert_kind!(version(&store, 1).declare().await, ErrorKind::Superseded);
    store.remove_subscription("totals").await.unwrap();
    for nothing in [store.pause_subscription("totals").await, store.resume_subscription("totals").await] {
        assert_kind!(nothing, ErrorKind::NotFound);
    }
}

pub(crate) async fn versions_that_are_declared_at_once_end_with_the_newest(fixture: &mut Fixture) {
    const NODES: usize = 6;
    let engine = fixture.engine();
    let further = fixture.further().await;
    let id = grown(&engine, "user", 30).await;
    let store = EventStore::shared(Arc::clone(&engine));
    run_to(&engine, &version(&store, 1), &Got::default(), 30).await;
    let got: [Got; 4] = std::array::from_fn(|_| Got::default());
    let is_over = AtomicBool::new(false);
    // Each node begins with a version, and goes on to the next one when that is rolled out.
    fixture.threads(NODES + 1, async |number| {
        let engine = if number % 2 == 0 { &engine } else { &further };
        let store = EventStore::shared(Arc::clone(engine));
        if number == NODES {
            for nth in 0..60 {
                unit().append(id, "user", 30 + nth, 1).commit(engine).await.unwrap();
                engine.pause(Duration::from_millis(2)).await;
            }
            let head = engine.head().await.unwrap();
            wait_until(engine, "the newest takes over and is done", async || {
                let live = store.live_version("totals").await.unwrap();
                live == 3 && store.wait_for_position(head, "totals", Duration::ZERO).await.is_ok()
            })
            .await;
            is_over.store(true, Ordering::SeqCst);
            return;
        }
        for nth in 1 + number as u32 % 3..=3 {
            let of = version(&store, nth);
            let deadline = Instant::now() + LEASE;
            let is_done = || match nth {
                3 => is_over.load(Ordering::SeqCst),
                _ => Instant::now() > deadline,
            };
            let ended = of.run(until(engine, is_done), got[nth as usize].handler()).await;
            // A version that comes too late, after a newer one was declared, is refused.
            assert!(matches!(ended, Ok(RunEnd::ShutDown | RunEnd::Superseded)), "{ended:?}");
        }
    });
    let mut live: BTreeMap<i64, usize> = BTreeMap::new();
    for position in got.iter().flat_map(Got::live) {
        *live.entry(position).or_default() += 1;
    }
    assert_eq!(live.keys().copied().collect::<Vec<_>>(), (31..=90).collect::<Vec<_>>(), "missed");
    let states = store.subscription_states("totals").await.unwrap();
    let live = states.iter().filter(|it| it.cursor.version_state() == VersionState::Live);
    assert_eq!(live.map(|it| it.cursor.id.version).collect::<Vec<_>>(), [3]);
    let older = states.iter().filter(|it| it.cursor.id.version < 3);
    assert!(older.into_iter().all(|it| it.cursor.version_state() == VersionState::Retired));
}

//! Versions of a projection: which events a new version gets as replay.

use std::time::Duration;

use evercore_memory::{
    Aggregate, Error, ErrorKind, EventStore, Json, MemoryEngine, PageLimit, RunEnd, Start, Subscription,
};
use futures_lite::future::{block_on, or, zip};
use serde::{Deserialize, Serialize};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Tally {
    count: u32,
}

#[derive(Serialize, Deserialize)]
enum TallyEvent {
    Counted,
}

impl Aggregate for Tally {
    const TYPE: &'static str = "tally";
    type Event = TallyEvent;
    type Codec = Json;

    fn apply(&mut self, TallyEvent::Counted: TallyEvent) {
        self.count += 1;
    }
}

async fn grown(events: usize) -> EventStore {
    let store = EventStore::new(MemoryEngine::new());
    grow(&store, events).await;
    store
}

async fn grow(store: &EventStore, events: usize) {
    for _ in 0..events {
        let mut work = store.begin();
        let mut tally = work.load_or_create::<Tally>("one").await.unwrap();
        work.record(&mut tally, TallyEvent::Counted).unwrap();
        work.commit().await.unwrap();
    }
}

fn version(store: &EventStore, version: u32) -> Subscription {
    let batch = PageLimit::events(2).unwrap();
    store.subscription("tallies").unwrap().with_version(version).with_batch(batch).with_live_past()
}

/// Handles this many events, and gives for each whether it was a replay.
async fn handle(subscription: &Subscription, events: usize) -> Vec<bool> {
    let mut owned = subscription.claim().await.unwrap();
    let mut replays = Vec::new();
    while replays.len() < events {
        let delivery = owned.next().await.unwrap();
        replays.extend(delivery.events().iter().map(|_| delivery.is_replay()));
        owned.ack(&delivery).await.unwrap();
    }
    owned.release().await.unwrap();
    replays
}

#[test]
fn a_new_version_replays_what_the_old_one_has_handled() {
    block_on(async {
        let store = grown(6).await;
        assert_eq!(handle(&version(&store, 1), 4).await, [false; 4]);
        assert_eq!(handle(&version(&store, 2), 6).await, [true, true, true, true, false, false]);
    });
}

#[test]
fn a_new_version_replays_what_the_old_one_had_handled_before_it_was_reset() {
    block_on(async {
        let store = grown(6).await;
        handle(&version(&store, 1), 4).await;
        store.reset_subscription("tallies", Start::Beginning).await.unwrap();
        assert_eq!(handle(&version(&store, 2), 6).await, [true, true, true, true, false, false]);
    });
}

#[test]
fn an_old_version_is_told_that_it_is_superseded() {
    block_on(async {
        let store = grown(2).await;
        handle(&version(&store, 1), 2).await;
        handle(&version(&store, 2), 2).await;
        store.promote_version("tallies", 2).await.unwrap();
        let refused = version(&store, 1).claim().await;
        assert!(matches!(refused.as_ref().map_err(Error::kind), Err(evercore_memory::ErrorKind::Superseded)));
    });
}

/// Without a wake-up it would end after a third of its lease, which is 10 s here.
#[test]
fn a_version_that_waits_for_events_ends_as_soon_as_it_is_superseded() {
    block_on(async {
        let store = grown(3).await;
        let (old, new) = (version(&store, 1), version(&store, 2));
        let old = old.without_standby();
        let old = old.run(std::future::pending(), |_| async { Ok(()) });
        let new = async {
            store.engine().pause(Duration::from_millis(20)).await;
            let took_over = async {
                while store.live_version("tallies").await.unwrap_or(1) < 2 {
                    store.engine().pause(Duration::from_millis(1)).await;
                }
                store.engine().pause(Duration::from_secs(2)).await;
            };
            new.run(took_over, |_| async { Ok(()) }).await
        };
        let too_late = async {
            store.engine().pause(Duration::from_secs(1)).await;
            Err(Error::invalid("it still runs"))
        };
        let (old, new) = zip(or(old, too_late), new).await;
        assert_eq!((old.unwrap(), new.unwrap()), (RunEnd::Superseded, RunEnd::ShutDown));
    });
}

/// Its handled events would be live again for the new version.
#[test]
fn a_version_is_not_removed_while_a_newer_one_is_being_built() {
    block_on(async {
        let store = grown(4).await;
        assert_eq!(handle(&version(&store, 1), 4).await, [false; 4]);
        version(&store, 2).declare().await.unwrap();
        let refused = store.remove_version("tallies", 1).await.unwrap_err();
        assert_eq!(*refused.kind(), ErrorKind::Invalid, "{refused}");
        assert_eq!(handle(&version(&store, 2), 4).await, [true; 4]);
        store.remove_version("tallies", 2).await.unwrap();
        store.remove_version("tallies", 1).await.unwrap();
        assert!(store.subscriptions().await.unwrap().is_empty());
    });
}

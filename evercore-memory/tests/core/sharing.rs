//! How workers share the partitions of a subscription.

use std::collections::BTreeMap;
use std::time::Duration;

use evercore_memory::{Aggregate, EventStore, Json, MemoryEngine, PageLimit, Start};
use futures_lite::future::{block_on, or};
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

async fn pause(ms: u64) {
    futures_timer::Delay::new(Duration::from_millis(ms)).await;
}

#[test]
fn workers_come_to_rest() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let mut work = store.begin();
        let mut tally = work.create::<Tally>().await.unwrap();
        work.record_all(&mut tally, (0..600).map(|_| TallyEvent::Counted)).unwrap();
        work.commit().await.unwrap();
        let shared = store.subscription("shared").unwrap().starting(Start::End).with_partitions(8);
        let shared = shared.with_lease(Duration::from_millis(1_200));
        let one = async { shared.run(std::future::pending(), async |_| Ok(())).await.map(drop) };
        let two = async {
            pause(100).await;
            shared.run(std::future::pending(), async |_| Ok(())).await.map(drop)
        };
        // Each move of another subscription makes a worker that waits for a cursor look again, long before its owner
        // does.
        let one_each = PageLimit::events(1).unwrap();
        let mut other = store.subscription("other").unwrap().with_batch(one_each).claim().await.unwrap();
        let moves = async {
            for _ in 0..600 {
                let delivery = other.next().await?;
                other.ack(&delivery).await?;
                pause(5).await;
            }
            Ok(())
        };
        or(or(one, two), moves).await.unwrap();

        let states = store.subscription_states("shared").await.unwrap();
        let mut shares: BTreeMap<_, usize> = BTreeMap::new();
        for state in &states {
            *shares.entry(state.cursor.owner.clone()).or_default() += 1;
        }
        assert_eq!(shares.into_values().collect::<Vec<_>>(), [4, 4]);
        let claims: i64 = states.iter().map(|state| state.cursor.epoch).sum();
        assert!(claims < 20, "{claims} claims, where 8 and then 4 are enough");
    });
}

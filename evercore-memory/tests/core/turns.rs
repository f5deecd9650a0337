//! Writers of one aggregate in one process wait for one another and do not race.

use std::time::{Duration, Instant};

use evercore_memory::{Aggregate, EventStore, Json, MemoryEngine, RetryPolicy};
use serde::{Deserialize, Serialize};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Product {
    sold: u64,
}

#[derive(Serialize, Deserialize)]
enum ProductEvent {
    Sold,
}

impl Aggregate for Product {
    const TYPE: &'static str = "product";
    type Event = ProductEvent;
    type Codec = Json;

    fn apply(&mut self, _: ProductEvent) {
        self.sold += 1;
    }
}

const WRITERS: usize = 24;
const ORDERS: usize = 20;

#[test]
fn updates_of_one_aggregate_meet_no_conflict() {
    let once = RetryPolicy::default().with_attempts(1);
    let store = EventStore::new(MemoryEngine::new()).with_retry(once);
    futures_lite::future::block_on(store.load_or_create::<Product>("hot")).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..WRITERS {
            scope.spawn(|| {
                for _ in 0..ORDERS {
                    let update = store.update::<Product, _, _>("hot", |_| [ProductEvent::Sold]);
                    futures_lite::future::block_on(update).unwrap();
                }
            });
        }
    });
    let product = futures_lite::future::block_on(store.load::<Product>("hot")).unwrap();
    assert_eq!(product.sold, (WRITERS * ORDERS) as u64);
}

/// The inner update waits for the outer one, which waits for the inner one. After a second the inner one goes first,
/// and nothing waits again.
#[test]
fn an_update_inside_an_update_of_the_same_aggregate_comes_to_an_end() {
    let store = EventStore::new(MemoryEngine::new());
    futures_lite::future::block_on(store.load_or_create::<Product>("hot")).unwrap();
    let started = Instant::now();
    let mut is_first = true;
    let update = store.update::<Product, _, _>("hot", |_| {
        if std::mem::take(&mut is_first) {
            for _ in 0..3 {
                let inner = store.update::<Product, _, _>("hot", |_| [ProductEvent::Sold]);
                futures_lite::future::block_on(inner).unwrap();
            }
        }
        [ProductEvent::Sold]
    });
    futures_lite::future::block_on(update).unwrap();
    let took = started.elapsed();
    let product = futures_lite::future::block_on(store.load::<Product>("hot")).unwrap();
    assert_eq!(product.sold, 4);
    assert!(took < Duration::from_secs(2), "{took:?}");
}

//! Orders for a few popular products: how many conflicts happen, and how many reach the caller.
//!
//! `SMOL_THREADS=4 cargo test --release -p evercore-sqlite --test torture five_hot -- --ignored --nocapture`

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use evercore_sqlite::{Aggregate, EventStore, Json, Result, RetryPolicy, SqliteEngine};
use serde::{Deserialize, Serialize};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Product {
    sold: usize,
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

const PRODUCTS: [&str; 5] = ["a", "b", "c", "d", "e"];
const WRITERS: usize = 24;
const ORDERS: usize = 3_000;

/// Orders one product, by `update`.
async fn order_one(store: &EventStore, order: usize) -> Result<()> {
    store.update::<Product, _, _>(PRODUCTS[order % 5], |_| [ProductEvent::Sold]).await?;
    Ok(())
}

/// Orders two products in any order, by `retry`.
async fn order_two(store: &EventStore, order: usize) -> Result<()> {
    store
        .retry(|| async {
            let mut work = store.begin();
            let mut one = work.load::<Product>(PRODUCTS[order % 5]).await?;
            let mut other = work.load::<Product>(PRODUCTS[(order + 1 + order % 4) % 5]).await?;
            work.record(&mut one, ProductEvent::Sold)?;
            work.record(&mut other, ProductEvent::Sold)?;
            work.commit().await?;
            Ok(())
        })
        .await
}

async fn measure(name: &str, store: EventStore, policy: RetryPolicy, products_of_an_order: usize) {
    let store = store.with_retry(policy);
    for product in PRODUCTS {
        store.load_or_create::<Product>(product).await.unwrap();
    }
    let started = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let writers: Vec<_> = (0..WRITERS)
        .map(|_| {
            let (store, next) = (store.clone(), Arc::clone(&next));
            smol::spawn(async move {
                let mut conflicts = 0;
                loop {
                    let order = next.fetch_add(1, Ordering::Relaxed);
                    if order >= ORDERS {
                        return conflicts;
                    }
                    let outcome = match products_of_an_order {
                        1 => order_one(&store, order).await,
                        _ => order_two(&store, order).await,
                    };
                    match outcome {
                        Err(error) if error.is_conflict() => conflicts += 1,
                        outcome => outcome.unwrap(),
                    }
                }
            })
        })
        .collect();
    let mut conflicts = 0;
    for writer in writers {
        conflicts += writer.await;
    }
    let took = started.elapsed();
    let mut sold = 0;
    for product in PRODUCTS {
        sold += store.load::<Product>(product).await.unwrap().sold;
    }
    assert_eq!(
        sold,
        (ORDERS - conflicts) * products_of_an_order,
        "every order took effect once or not at all"
    );
    println!(
        "{name}, {products_of_an_order} products, {} attempts: {conflicts} of {ORDERS} orders failed by a conflict; {took:.1?}",
        policy.attempts
    );
}

#[test]
#[ignore = "a measurement"]
fn five_hot_products() {
    smol::block_on(async {
        for (products, attempts) in [(1, 1), (1, 20), (2, 3), (2, 20)] {
            let policy = RetryPolicy::default().with_attempts(attempts);
            let memory = EventStore::new(evercore_memory::MemoryEngine::new());
            measure("memory", memory, policy, products).await;
            let folder = tempfile::tempdir().unwrap();
            let sqlite = EventStore::new(SqliteEngine::open(folder.path().join("store.db")).await.unwrap());
            measure("sqlite", sqlite, policy, products).await;
        }
    });
}

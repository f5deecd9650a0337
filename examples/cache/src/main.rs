//! A cache that keeps itself fresh: prices in memory, fed by a subscription that lives as long as its process.
//!
//! It is filled at the start, and never loads from the store after that. A writer that changed a price waits until the cache
//! has seen the commit, and then reads the new price. Nothing is written to the store for the cache.
//!
//!     cargo run -p cache

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use evercore_sqlite::{
    Aggregate, EphemeralSubscription, Error, ErrorKind, EventStore, Filter, Json, Position, Receipt, Result,
    SqliteEngine, Start,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::timeout;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Product {
    cents: i64,
}

#[derive(Debug, Serialize, Deserialize)]
enum ProductEvent {
    Priced { name: String, cents: i64 },
}

impl Aggregate for Product {
    const TYPE: &'static str = "product";
    type Event = ProductEvent;
    type Codec = Json;

    fn apply(&mut self, ProductEvent::Priced { cents, .. }: ProductEvent) {
        self.cents = cents;
    }
}

/// Prices by name, as of a position of the log. Cheap to clone; ends with the last clone.
#[derive(Clone, Debug)]
struct Prices {
    cents: Arc<RwLock<HashMap<String, i64>>>,
    seen: watch::Receiver<Position>,
}

impl Prices {
    /// A cache that has all events of the store, and follows new ones.
    async fn warm(store: &EventStore) -> Result<Self> {
        let (seen_to, seen) = watch::channel(Position::ZERO);
        let prices = Self { cents: Arc::default(), seen };
        let head = store.head().await?;
        // All events, not only those of products: a task may wait for the position of any commit.
        let news = store.subscribe(Filter::all(), Start::Beginning).await?;
        tokio::spawn(follow(news, Arc::clone(&prices.cents), seen_to));
        prices.has_seen(head).await?;
        Ok(prices)
    }

    /// Waits until the cache has seen this position.
    async fn has_seen(&self, position: Position) -> Result<()> {
        let mut seen = self.seen.clone();
        let wait = seen.wait_for(|seen| *seen >= position);
        let in_time = timeout(Duration::from_secs(5), wait).await;
        in_time.map_err(unavailable)?.map_err(unavailable)?;
        Ok(())
    }

    fn of(&self, name: &str) -> Option<i64> {
        self.cents.read().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }
}

/// Runs until the last clone of the cache is dropped, or until an error. Tasks that wait for the cache then get an error.
async fn follow(
    mut news: EphemeralSubscription,
    prices: Arc<RwLock<HashMap<String, i64>>>,
    seen_to: watch::Sender<Position>,
) -> Result<()> {
    loop {
        let events = tokio::select! {
            events = news.next() => events?,
            () = seen_to.closed() => return Ok(()),
        };
        for event in events.iter().filter(|event| event.aggregate_type().as_str() == Product::TYPE) {
            let ProductEvent::Priced { name, cents } = event.decode::<Product>()?;
            prices.write().unwrap_or_else(PoisonError::into_inner).insert(name, cents);
        }
        seen_to.send_replace(news.position());
    }
}

fn unavailable(cause: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Unavailable, "the cache is not that far").with_source(cause)
}

#[tokio::main]
async fn main() -> Result<()> {
    run().await
}

pub(crate) async fn run() -> Result<()> {
    let store = EventStore::new(SqliteEngine::open_in_memory().await?);
    let names: Vec<String> = (0..200).map(|n| format!("product {n}")).collect();
    for (name, cents) in names.iter().zip(100..) {
        set_price(&store, name, cents).await?;
    }

    let prices = Prices::warm(&store).await?;
    println!("the cache is warm, at position {}", *prices.seen.borrow());

    let began = Instant::now();
    let hits = names.iter().cycle().take(100_000).filter(|name| prices.of(name).is_some()).count();
    assert_eq!(hits, 100_000);
    println!("{hits} of 100000 lookups were hits, {:?} each", began.elapsed() / 100_000);
    let began = Instant::now();
    for name in &names {
        assert_eq!(prices.of(name), Some(store.load::<Product>(name).await?.cents));
    }
    println!("the store says the same, in {:?} each", began.elapsed() / 200);

    let mut stale = 0;
    for (name, cents) in names.iter().cycle().take(500).zip(1_000..) {
        let receipt = set_price(&store, name, cents).await?;
        stale += usize::from(prices.of(name) != Some(cents));
        prices.has_seen(receipt.last).await?; // this is what makes it read-your-writes
        assert_eq!(prices.of(name), Some(cents));
    }
    println!("500 prices changed: {stale} were still old in the cache right after the commit,");
    println!("    none after waiting for the position of the commit");

    assert_eq!(store.head().await?.get(), 700, "there are events that are not prices");
    assert!(store.subscriptions().await?.is_empty(), "there is a cursor");
    println!("nothing was written for the cache: 700 events, all prices, and no cursor");
    Ok(())
}

async fn set_price(store: &EventStore, name: &str, cents: i64) -> Result<Receipt> {
    let priced = |_: &Product| [ProductEvent::Priced { name: name.to_owned(), cents }];
    store.update_or_create(name, priced).await
}

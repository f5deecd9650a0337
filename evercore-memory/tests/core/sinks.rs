//! Sinks of users: how the runner treats their results.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use evercore_core::engine::{Advance, Outcome, Sink};
use evercore_memory::{Aggregate, BoxFuture, Delivery, ErrorKind, EventStore, Json, MemoryEngine, Position};
use futures_lite::future::block_on;
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

/// Handles at most two events of a delivery, and stores them with the attempt.
#[derive(Clone, Default)]
struct TwoAtMost(Arc<Mutex<Vec<(i64, u32)>>>);

impl Sink for TwoAtMost {
    fn deliver<'a>(&'a self, delivery: &'a Delivery, _: &'a Advance) -> BoxFuture<'a, Outcome> {
        let taken = delivery.events().iter().take(2);
        let noted: Vec<_> = taken.map(|event| (event.position().get(), delivery.attempt())).collect();
        let handled = noted.len();
        self.0.lock().unwrap().extend(noted);
        Box::pin(async move { Outcome::Handled(handled) })
    }

    fn tells_which(&self) -> bool {
        false
    }

    fn holds_cursor(&self) -> bool {
        false
    }
}

#[test]
fn what_a_sink_has_not_handled_comes_next() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let mut work = store.begin();
        let mut tally = work.create::<Tally>().await.unwrap();
        for _ in 0..7 {
            work.record(&mut tally, TallyEvent::Counted).unwrap();
        }
        let receipt = work.commit().await.unwrap();
        let sink = TwoAtMost::default();
        let done = async {
            while store.wait_for(&receipt, "two", Duration::from_secs(5)).await.is_err() {
                futures_lite::future::yield_now().await;
            }
        };
        store.subscription("two").unwrap().run_sink(done, sink.clone()).await.unwrap();
        let states = store.subscription_states("two").await.unwrap();
        assert_eq!(states[0].cursor.position, Position::new(7).unwrap());
        assert_eq!(*sink.0.lock().unwrap(), (1..=7).map(|position| (position, 1)).collect::<Vec<_>>());
    });
}

/// It would never find a cursor there.
#[test]
fn a_projection_of_another_store_is_refused() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let mut work = store.begin();
        let mut tally = work.create::<Tally>().await.unwrap();
        work.record(&mut tally, TallyEvent::Counted).unwrap();
        work.commit().await.unwrap();
        let elsewhere = MemoryEngine::new();
        let sink = elsewhere.projection(Arc::new(Mutex::new(0)), |count, delivery| {
            *count += delivery.events().len();
            Ok(())
        });
        let soon = store.engine().pause(Duration::from_secs(2));
        let refused = store.subscription("tallies").unwrap().run_sink(soon, sink).await;
        assert_eq!(*refused.unwrap_err().kind(), ErrorKind::Invalid);
    });
}

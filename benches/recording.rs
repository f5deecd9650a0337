//! The cost of `record`, which decodes its own output: nanoseconds per event, compared with a trusted codec.

use std::collections::HashMap;
use std::time::Instant;

use evercore_memory::{Aggregate, EventStore, Json, MemoryEngine, Result};
use evercore_testkit::block_on;
use serde::{Deserialize, Serialize};

/// The number of events in a unit of work.
const EVENTS: u32 = 500;
/// The number of units of each kind. Kinds take turns, and the median of a kind counts.
const ROUNDS: usize = 101;

#[derive(Clone, Default, Serialize, Deserialize)]
struct Counted<const TRUSTS: bool> {
    events: u64,
    last: String,
}

#[derive(Clone, Serialize, Deserialize)]
enum CountedEvent {
    Touched,
    Paid { amount: i64, currency: String, note: String, by: Option<String>, lines: Vec<(u32, String)> },
    Stocked(HashMap<String, u32>),
}

impl<const TRUSTS: bool> Aggregate for Counted<TRUSTS> {
    const TYPE: &'static str = "counted";
    const TRUSTS_CODEC: bool = TRUSTS;
    type Event = CountedEvent;
    type Codec = Json;

    fn apply(&mut self, event: CountedEvent) {
        self.events += 1;
        if let CountedEvent::Paid { note, .. } = event {
            self.last = note;
        }
    }
}

/// Nanoseconds per `record` of this event. The event is copied before the clock starts.
async fn timed<const TRUSTS: bool>(store: &EventStore, event: &CountedEvent) -> Result<f64> {
    let events: Vec<_> = (0..EVENTS).map(|_| event.clone()).collect();
    let mut work = store.begin();
    let mut counted = work.create::<Counted<TRUSTS>>().await?;
    let began = Instant::now();
    for event in events {
        work.record(&mut counted, event)?;
    }
    Ok(began.elapsed().as_nanos() as f64 / f64::from(EVENTS))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

async fn compared(store: &EventStore, name: &str, event: CountedEvent) -> Result<()> {
    let (mut trusted, mut read_back) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        trusted.push(timed::<true>(store, &event).await?);
        read_back.push(timed::<false>(store, &event).await?);
    }
    let (trusted, read_back) = (median(trusted), median(read_back));
    println!(
        "{name:<34} {trusted:>8.0} {read_back:>10.0} {:>8.0} {:>6.2}",
        read_back - trusted,
        read_back / trusted
    );
    Ok(())
}

fn main() -> Result<()> {
    let text = |length| "a word and another ".chars().cycle().take(length).collect::<String>();
    let paid = CountedEvent::Paid {
        amount: -4_711,
        currency: "EUR".into(),
        note: text(60),
        by: Some("clerk 112".into()),
        lines: (1..=3).map(|number| (number, text(12))).collect(),
    };
    let stocked = CountedEvent::Stocked((0..20).map(|number| (format!("item {number}"), number)).collect());
    println!("{:<34} {:>8} {:>10} {:>8} {:>6}", "ns per record", "trusted", "read back", "more", "ratio");
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        compared(&store, "without content", CountedEvent::Touched).await?;
        compared(&store, "200 bytes of JSON", paid).await?;
        compared(&store, "a map of 20 entries, in any order", stocked).await
    })
}

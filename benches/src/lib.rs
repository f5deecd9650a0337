//! Both engines are measured with the same counting aggregate, the same event of 200 bytes of JSON, and the same
//! comparison with a floor.

#![allow(clippy::unwrap_used, missing_docs)] // a benchmark that meets an error stops there

use std::time::Instant;

use evercore_memory::{Aggregate, EventStore, Json, Loaded, LogQuery, PageLimit, Position};
use serde::{Deserialize, Serialize};

/// How often a workload and its floor run in turn.
pub const ROUNDS: usize = 5;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Content {
    pub number: i64,
    pub amount: i64,
    pub note: String,
}

impl Content {
    pub fn new(number: i64) -> Self {
        Self { number, amount: number % 97, note: "x".repeat(160) }
    }

    pub fn payload(number: i64) -> Vec<u8> {
        serde_json::to_vec(&Self::new(number)).unwrap()
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub enum CounterEvent {
    Counted(Content),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counter {
    pub events: i64,
    pub amount: i64,
    pub note_bytes: usize,
}

impl Counter {
    pub fn count(&mut self, content: &Content) {
        self.events += 1;
        self.amount += content.amount;
        self.note_bytes += content.note.len();
    }
}

impl Aggregate for Counter {
    const TYPE: &'static str = "counter";
    type Event = CounterEvent;
    type Codec = Json;
    // With this feature the difference to a run without it is the price of reading back each recorded event.
    const TRUSTS_CODEC: bool = cfg!(feature = "trusts-codec");

    fn apply(&mut self, CounterEvent::Counted(content): CounterEvent) {
        self.count(&content);
    }
}

pub fn counted(number: i64) -> CounterEvent {
    CounterEvent::Counted(Content::new(number))
}

/// Runs both in turn and prints the medians: events per second of each, and the ratio.
pub fn compare(
    name: &str,
    target: &str,
    events: i64,
    mut ours: impl FnMut(usize),
    mut floor: impl FnMut(usize),
) {
    let rate = |round, work: &mut dyn FnMut(usize)| {
        let began = Instant::now();
        work(round);
        events as f64 / began.elapsed().as_secs_f64()
    };
    let (mut our_rates, mut floor_rates, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let theirs = rate(round, &mut floor);
        let our = rate(round, &mut ours);
        our_rates.push(our);
        floor_rates.push(theirs);
        ratios.push(our / theirs);
    }
    let [our, theirs, ratio] = [our_rates, floor_rates, ratios].map(median);
    println!("{name:42} {our:>12.0} {theirs:>12.0} {ratio:>7.2}  {target}");
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The lines that the import prints.
pub fn rate(events: i64, began: Instant) -> String {
    format!("{:.0} events/s", events as f64 / began.elapsed().as_secs_f64())
}

pub async fn append(store: &EventStore, counter: &mut Loaded<Counter>, events: i64) {
    let mut work = store.begin();
    let next = counter.sequence().get() + 1;
    work.record_all(counter, (next..next + events).map(counted)).unwrap();
    work.commit().await.unwrap();
}

pub async fn read_all(store: &EventStore, page: usize) -> i64 {
    let query = LogQuery::after(Position::ZERO).with_limit(PageLimit::events(page).unwrap());
    let mut log = store.log_reader(query);
    let mut counter = Counter::default();
    while let Some(page) = log.next().await.unwrap() {
        for event in &page.events {
            counter.apply(event.decode::<Counter>().unwrap());
        }
    }
    counter.events
}

//! Both engines are measured with the same aggregate, which counts, and the same event of 200 bytes of JSON.

#![allow(clippy::unwrap_used, missing_docs)] // a benchmark that meets an error stops there

use evercore_memory::{Aggregate, Json};
use serde::{Deserialize, Serialize};

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

    fn apply(&mut self, CounterEvent::Counted(content): CounterEvent) {
        self.count(&content);
    }
}

pub fn counted(number: i64) -> CounterEvent {
    CounterEvent::Counted(Content::new(number))
}

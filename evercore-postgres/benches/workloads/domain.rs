//! What is measured with: an aggregate that counts, and an event of 200 bytes of JSON.

use evercore_postgres::{Aggregate, Json};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Content {
    pub(crate) number: i64,
    pub(crate) amount: i64,
    pub(crate) note: String,
}

impl Content {
    pub(crate) fn new(number: i64) -> Self {
        Self { number, amount: number % 97, note: "x".repeat(160) }
    }

    pub(crate) fn payload(number: i64) -> Vec<u8> {
        serde_json::to_vec(&Self::new(number)).unwrap()
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum CounterEvent {
    Counted(Content),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counter {
    pub(crate) events: i64,
    pub(crate) amount: i64,
    pub(crate) note_bytes: usize,
}

impl Counter {
    pub(crate) fn count(&mut self, content: &Content) {
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

pub(crate) fn counted(number: i64) -> CounterEvent {
    CounterEvent::Counted(Content::new(number))
}

//! The floor of the memory engine: a mutex around a vector and maps, with the same checks.

use std::collections::HashMap;
use std::sync::Mutex;

use benches::{Content, Counter};

#[derive(Default)]
pub(crate) struct MemoryFloor(Mutex<State>);

#[derive(Default)]
struct State {
    log: Vec<(i64, i64, Vec<u8>)>,
    streams: HashMap<i64, Vec<usize>>,
    keys: HashMap<String, i64>,
}

impl MemoryFloor {
    pub(crate) fn create(&self, id: i64, key: Option<String>) {
        let mut state = self.0.lock().unwrap();
        assert!(state.streams.insert(id, Vec::new()).is_none());
        if let Some(key) = key {
            assert!(state.keys.insert(key, id).is_none());
        }
    }

    pub(crate) fn append(&self, id: i64, events: i64) {
        let sequence = self.0.lock().unwrap().streams[&id].len() as i64;
        let payloads: Vec<_> = (1..=events).map(|n| Content::payload(sequence + n)).collect();
        let mut guard = self.0.lock().unwrap();
        let State { log, streams, .. } = &mut *guard;
        let stream = streams.get_mut(&id).unwrap();
        assert_eq!(stream.len() as i64, sequence);
        for payload in payloads {
            stream.push(log.len());
            log.push((id, stream.len() as i64, payload));
        }
    }

    pub(crate) fn load(&self, id: i64) -> Counter {
        let state = self.0.lock().unwrap();
        fold(state.streams[&id].iter().map(|at| &state.log[*at]))
    }

    pub(crate) fn read(&self) -> Counter {
        fold(self.0.lock().unwrap().log.iter())
    }
}

fn fold<'a>(events: impl Iterator<Item = &'a (i64, i64, Vec<u8>)>) -> Counter {
    let mut counter = Counter::default();
    for (_, _, payload) in events {
        counter.count(&serde_json::from_slice::<Content>(payload).unwrap());
    }
    counter
}

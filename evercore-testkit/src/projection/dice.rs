//! Seeded random numbers.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::sync::Arc;

use evercore_core::{AggregateId, EventStore};

use crate::tools::{self, Random};

/// Seeded dice: the same seed gives the same numbers on every machine.
#[derive(Clone)]
pub struct Dice(Random);

impl Dice {
    /// Dice with this seed.
    pub fn new(seed: u64) -> Self {
        Self(Random(seed))
    }

    /// A number from 0 to `bound` - 1.
    ///
    /// # Panics
    /// If the bound is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0.below(bound)
    }

    /// True once in `bound` calls, on average.
    ///
    /// # Panics
    /// If the bound is 0.
    pub fn one_in(&mut self, bound: usize) -> bool {
        self.0.one_in(bound)
    }

    /// Makes more dice. Their numbers do not depend on how often these are thrown later.
    pub(crate) fn fork(&mut self) -> Self {
        Self::new(self.0.below(usize::MAX) as u64)
    }
}

impl std::fmt::Debug for Dice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dice").finish_non_exhaustive()
    }
}

/// Commits one to three events of the types `Happened` and `Changed`, with a number as their payload, to one of a few
/// aggregates of the type `plain`.
///
/// # Panics
/// If the engine fails.
pub async fn plain_events(store: &EventStore, dice: &mut Dice) {
    let engine = Arc::clone(store.engine());
    let known = store.head().await.unwrap();
    let chosen = tools::place(dice.below(2 * known.get() as usize + 4) as i64);
    let count = 1 + dice.below(3);
    let events = (0..count).map(|_| {
        let name = ["Happened", "Changed"][dice.below(2)];
        tools::event(name, dice.below(100).to_string().as_bytes())
    });
    let events = events.collect();
    // An old aggregate as often as a new one.
    let old = tools::log(&engine).await.into_iter().find(|event| event.position() == chosen);
    let old: Option<AggregateId> = old.filter(is_plain).map(|event| event.aggregate());
    let batch = match old {
        Some(id) => tools::unit().events(id, "plain", tools::sequence_of(&engine, id).await, events),
        None => {
            let id = tools::new_id(&engine).await;
            tools::unit().create(id, "plain").events(id, "plain", 0, events)
        }
    };
    batch.commit(&engine).await.unwrap();
}

fn is_plain(event: &evercore_core::Event) -> bool {
    event.aggregate_type().as_str() == "plain"
}

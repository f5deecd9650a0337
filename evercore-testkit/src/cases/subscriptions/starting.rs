//! The start of a subscription: where it begins, and which events are its past.

use std::sync::{Arc, Mutex};

use evercore_core::{EventStore, Start, Subscription};

use crate::fixture::Fixture;
use crate::tools::*;

use super::tools::*;

/// Runs until the event at this position, and returns the position of each event and whether it was a replay.
async fn replays(engine: &Engine, of: &Subscription, last: i64) -> Vec<(i64, bool)> {
    let all = Arc::new(Mutex::new(Vec::new()));
    let (handler, seen) = (Arc::clone(&all), Arc::clone(&all));
    let is_last = move || seen.lock().unwrap().last().is_some_and(|(position, _)| *position >= last);
    let run = of.run(until(engine, is_last), move |event| {
        handler.lock().unwrap().push((event.position().get(), event.is_replay()));
        async { Ok(()) }
    });
    run.await.unwrap();
    all.lock().unwrap().clone()
}

pub(crate) async fn a_first_version_has_its_past_as_replay_unless_told_otherwise(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 4).await;
    let of = |store: &EventStore, name: &str, start| subscription(store, name).starting(start);
    let cases = [
        (subscription(&store, "default"), 1, 4),
        (of(&store, "position", Start::After(place(2))), 3, 4),
        (of(&store, "end", Start::End), 5, 4),
        (of(&store, "live", Start::After(place(2))).with_live_past(), 3, 2),
    ];
    for (subscription, ..) in &cases {
        subscription.declare().await.unwrap();
    }
    grown(&engine, "user", 2).await;
    for (subscription, first, past) in &cases {
        // The declaration counts, not the first run, and not a later change of the settings.
        let again = subscription.clone().with_live_past();
        again.declare().await.unwrap();
        let expected: Vec<_> = (*first..=6).map(|position| (position, position <= *past)).collect();
        assert_eq!(replays(&engine, &again, 6).await, expected, "{}", subscription.name());
    }

    // A version after it gets as replay what the first one has handled.
    let second = subscription(&store, "default").with_version(2);
    grown(&engine, "user", 1).await;
    let expected: Vec<_> = (1..=7).map(|position| (position, position <= 6)).collect();
    assert_eq!(replays(&engine, &second, 7).await, expected);
}

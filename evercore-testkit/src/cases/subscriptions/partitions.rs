//! A partition key of the user's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use evercore_core::{ErrorKind, EventStore, FailureAction, Metadata, Subscription};

use crate::fixture::Fixture;
use crate::tools::*;

use super::tools::*;

const CASES: i64 = 6;
const PARTITIONS: u32 = 3;

fn by_reference(store: &EventStore) -> Subscription {
    subscription(store, "cases")
        .with_partitions(PARTITIONS)
        .partition_by(|event| event.reference().unwrap_or_default().to_owned())
}

/// An order and an invoice, each with an event of each case.
async fn cases_happen(engine: &Engine, rounds: i64) {
    for of_type in ["order", "invoice"] {
        let id = grown(engine, of_type, 0).await;
        for nth in 0..CASES * rounds {
            let metadata = Metadata::new().with_reference(format!("case {}", nth % CASES)).unwrap();
            let happened = event_with("Happened", b"", place_in_time(nth), metadata);
            unit().events(id, of_type, nth, vec![happened]).commit(engine).await.unwrap();
        }
    }
}

fn place_in_time(nth: i64) -> evercore_core::Timestamp {
    evercore_core::Timestamp::from_micros(nth).unwrap()
}

pub(crate) async fn equal_keys_belong_to_one_partition_and_stay_in_order(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    cases_happen(&engine, 4).await;
    let total = 2 * 4 * CASES as usize;
    let all: Arc<Mutex<Vec<(String, u32, i64)>>> = Arc::default();
    let (handler, seen) = (Arc::clone(&all), Arc::clone(&all));
    let of = by_reference(&store);
    let run = of.run_batches(
        until(&engine, || seen.lock().unwrap().len() >= total),
        move |delivery: evercore_core::Delivery| {
            let partition = delivery.cursor().partition;
            let events = delivery.events().iter();
            handler.lock().unwrap().extend(
                events.map(|it| (it.reference().unwrap().to_owned(), partition, it.position().get())),
            );
            async { Ok(()) }
        },
    );
    run.await.unwrap();
    let all = all.lock().unwrap().clone();
    assert_eq!(all.len(), total, "an event was missed or came twice");
    let mut last: HashMap<String, (u32, i64)> = HashMap::new();
    for (case, partition, position) in all {
        let before = last.insert(case, (partition, position));
        assert!(before.is_none_or(|before| before.0 == partition && before.1 < position));
    }
    let expected = [("case 0", 0), ("case 1", 2), ("case 2", 2), ("case 3", 1), ("case 4", 2), ("case 5", 1)];
    let found: HashMap<&str, u32> =
        last.iter().map(|(case, (partition, _))| (case.as_str(), *partition)).collect();
    assert_eq!(found, HashMap::from(expected), "the hash must never change");
}

pub(crate) async fn a_parked_event_holds_back_its_aggregate_in_its_partition(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    cases_happen(&engine, 2).await;
    // The first event is poison, and the one at position 7 has the same case and the same aggregate.
    let of = by_reference(&store).on_failure(no_pause(FailureAction::Park));
    let seen = Seen::default();
    let handler = seen.clone();
    let others = 4 * CASES as usize - 2;
    let run = of.run(until(&engine, || seen.len() >= others), move |event| {
        let is_poison = event.position() == place(1);
        if !is_poison {
            handler.push(&event);
        }
        async move { if is_poison { Err("poison".into()) } else { Ok(()) } }
    });
    run.await.unwrap();
    let parked = store.parked("cases").await.unwrap();
    assert_eq!(parked.len(), 1);
    store.resume_parked(&parked[0].0, None).await.unwrap();
    let after = Seen::default();
    run_until(&engine, &of, &after, 2).await;
    assert_eq!(after.numbers(), [1, 7], "events of the aggregate in other partitions were handled before");
    let mut all: Vec<i64> = seen.numbers().into_iter().chain(after.numbers()).collect();
    all.sort_unstable();
    assert_eq!(all, (1..=4 * CASES).collect::<Vec<_>>());
}

async fn is_at_end(store: &EventStore, version: u32, head: i64) -> bool {
    let states = store.subscription_states("cases").await.unwrap();
    let mut own = states.iter().filter(|state| state.cursor.id.version == version);
    own.all(|state| state.cursor.position == place(head))
}

pub(crate) async fn a_new_version_may_have_another_number_of_partitions(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    cases_happen(&engine, 2).await;
    let head = engine.head().await.unwrap().get();
    let one = subscription(&store, "cases").with_partitions(2).with_live_past();
    let at_the_end = async || {
        let states = store.subscription_states("cases").await.unwrap_or_default();
        !states.is_empty() && states.iter().all(|state| state.lag_events == 0)
    };
    let shutdown = async {
        while !at_the_end().await {
            engine.pause(std::time::Duration::from_millis(2)).await;
        }
    };
    one.run(shutdown, |_| async { Ok(()) }).await.unwrap();
    assert_kind!(one.clone().with_partitions(3).declare().await, ErrorKind::Invalid);

    for (version, partitions) in [(2, 3), (3, 1)] {
        let two = one.clone().with_version(version).with_partitions(partitions);
        let all: Arc<Mutex<Vec<(i64, bool)>>> = Arc::default();
        let (handler, seen) = (Arc::clone(&all), Arc::clone(&all));
        let has_taken_over = async {
            until(&engine, || seen.lock().unwrap().len() as i64 >= head).await;
            // Also past the events of other partitions: the next version begins to be live at the slowest.
            while store.live_version("cases").await.unwrap() != version
                || !is_at_end(&store, version, head).await
            {
                engine.pause(std::time::Duration::from_millis(2)).await;
            }
        };
        let run = two.run(has_taken_over, move |event| {
            handler.lock().unwrap().push((event.position().get(), event.is_replay()));
            async { Ok(()) }
        });
        run.await.unwrap();
        let mut all = all.lock().unwrap().clone();
        all.sort_unstable();
        let expected: Vec<_> = (1..=head).map(|position| (position, true)).collect();
        assert_eq!(
            all, expected,
            "{partitions} partitions: each event once, and replay, as it was handled before"
        );
    }
    assert_eq!(store.live_version("cases").await.unwrap(), 3);
}

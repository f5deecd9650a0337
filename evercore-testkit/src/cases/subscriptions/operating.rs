//! What operators do with one cursor, and that the others do not notice.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use evercore_core::{
    CursorId, CursorStatus, ErrorKind, EventStore, FailureAction, RunEnd, Selection, Start, Subscription,
    SubscriptionName,
};

use crate::fixture::Fixture;
use crate::tools::*;

use super::tools::*;

fn cursor(partition: u32) -> CursorId {
    CursorId { subscription: SubscriptionName::new("mails").unwrap(), version: 1, partition }
}

/// Two partitions, each with ten events of its own, in turn. The partition of each event, by position.
async fn two_partitions(engine: &Engine) -> Vec<u32> {
    let mut ids = [new_id(engine).await, new_id(engine).await];
    while (ids[0].get() + ids[1].get()) % 2 == 0 {
        ids[1] = new_id(engine).await; // an engine may leave ids out
    }
    for nth in 0..10 {
        for id in ids {
            let at = unit();
            let at = if nth == 0 { at.create(id, "user") } else { at };
            at.append(id, "user", nth, 1).commit(engine).await.unwrap();
        }
    }
    log(engine).await.iter().map(|event| u32::try_from(event.aggregate().get() % 2).unwrap()).collect()
}

/// Runs until this is so. Positions at the given place fail; the others are noted.
async fn run(
    of: &Subscription,
    poison: &Arc<Mutex<Vec<i64>>>,
    seen: &Seen,
    shutdown: impl Future<Output = ()> + Send,
) -> evercore_core::Result<RunEnd> {
    let (poison, seen) = (Arc::clone(poison), seen.clone());
    let handler = move |event: evercore_core::Delivered| {
        let is_poison = poison.lock().unwrap().contains(&event.position().get());
        if !is_poison {
            seen.push(&event);
        }
        async move { if is_poison { Err("poison".into()) } else { Ok(()) } }
    };
    of.run(shutdown, handler).await
}

async fn failing_at(store: &EventStore, partition: u32) -> Option<i64> {
    let states = store.subscription_states("mails").await.ok()?;
    let failure = states.into_iter().find(|it| it.cursor.id.partition == partition)?.cursor.failure?;
    Some(failure.position.get())
}

pub(crate) async fn one_event_of_one_partition_is_skipped_and_nothing_else(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let partitions = two_partitions(&engine).await;
    // The fourth event of a partition is poison.
    let poisoned = 1;
    let of_poisoned: Vec<i64> =
        (1..).zip(&partitions).filter(|it| *it.1 == poisoned).map(|it| it.0).collect();
    let poison = Arc::new(Mutex::new(vec![of_poisoned[3]]));
    let policy = no_pause(FailureAction::Stop).with_pauses(NO_PAUSE, Duration::from_millis(1));
    let of = subscription(&store, "mails").with_partitions(2).on_failure(policy);
    let seen = Seen::default();
    let fails = async {
        while failing_at(&store, poisoned).await.is_none() {
            engine.pause(Duration::from_millis(2)).await;
        }
    };
    let _ = run(&of, &poison, &seen, fails).await;
    let failed = of_poisoned[3];
    assert_eq!(failing_at(&store, poisoned).await, Some(failed));
    let states = store.subscription_states("mails").await.unwrap();
    let other = states[1 - poisoned as usize].cursor.clone();

    // Only the event at which it fails, and only while it fails there.
    assert_kind!(store.skip_event(&cursor(poisoned), place(failed + 1)).await, ErrorKind::Invalid);
    assert_kind!(store.skip_event(&cursor(1 - poisoned), place(failed)).await, ErrorKind::Invalid);
    assert_kind!(store.skip_event(&cursor(7), place(failed)).await, ErrorKind::NotFound);
    store.skip_event(&cursor(poisoned), place(failed)).await.unwrap();
    assert_kind!(store.skip_event(&cursor(poisoned), place(failed)).await, ErrorKind::Invalid);
    let states = store.subscription_states("mails").await.unwrap();
    assert_eq!(states[1 - poisoned as usize].cursor, other, "the other partition has not moved");
    let skipped = &states[poisoned as usize].cursor;
    assert_eq!((skipped.position, skipped.failure.clone()), (place(failed), None));

    let at_the_end = until(&engine, || seen.len() >= 19);
    assert_eq!(run(&of, &poison, &seen, at_the_end).await.unwrap(), RunEnd::ShutDown);
    let mut all = seen.numbers();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all, (1..=20).filter(|position| *position != failed).collect::<Vec<_>>());
}

pub(crate) async fn one_partition_is_paused_reset_and_resumed_alone(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let partitions = two_partitions(&engine).await;
    let of = subscription(&store, "mails").with_partitions(2);
    let (seen, nothing) = (Seen::default(), Arc::default());
    run(&of, &nothing, &seen, until(&engine, || seen.len() >= 20)).await.unwrap();
    let cursors = async || {
        let states = store.subscription_states("mails").await.unwrap();
        states.into_iter().map(|state| state.cursor).collect::<Vec<_>>()
    };
    let before = cursors().await;
    let first = Selection::of_partition(0);
    store.pause_cursors("mails", first).await.unwrap();
    store.reset_cursors("mails", first, Start::After(place(8))).await.unwrap();
    let after = cursors().await;
    assert_eq!((after[0].position, after[0].status), (place(8), CursorStatus::Paused));
    assert_eq!(after[1], before[1], "the other partition was touched");

    // The other partition goes on meanwhile.
    let last = engine.head().await.unwrap();
    let ids: Vec<_> = log(&engine).await.iter().take(2).map(|event| event.aggregate()).collect();
    for id in ids {
        unit().append(id, "user", 10, 1).commit(&engine).await.unwrap();
    }
    let other = Seen::default();
    run(&of, &nothing, &other, until(&engine, || other.len() >= 1)).await.unwrap();
    let new = (last.get() + 1..=last.get() + 2).zip([partitions[0], partitions[1]]);
    let expected: Vec<i64> = new.clone().filter(|it| it.1 == 1).map(|it| it.0).collect();
    assert_eq!(other.numbers(), expected);

    store.resume_cursors("mails", first).await.unwrap();
    let again = Seen::default();
    let own: Vec<i64> =
        (1..=20).zip(partitions).chain(new).filter(|it| it.1 == 0 && it.0 > 8).map(|it| it.0).collect();
    run(&of, &nothing, &again, until(&engine, || again.len() >= own.len())).await.unwrap();
    assert_eq!(again.numbers(), own);

    assert_kind!(store.pause_cursors("mails", Selection::of_partition(2)).await, ErrorKind::NotFound);
    assert_kind!(store.resume_cursors("mails", Selection::of_version(2)).await, ErrorKind::NotFound);
    let ahead = store.reset_cursors("mails", Selection::all(), Start::After(place(99))).await;
    assert_kind!(ahead, ErrorKind::CursorAhead { .. });
}

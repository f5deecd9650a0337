//! Appends: numbered by the engine, checked against the expected sequence, all of a batch or nothing.

use std::future::Future;
use std::time::{Duration, Instant};

use evercore_core::engine::Mark;
use evercore_core::{AggregateId, ErrorKind, Position, Sequence, limits};

use crate::fixture::Fixture;
use crate::tools::*;

pub(crate) async fn the_first_sequence_is_one_and_there_are_no_holes(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 1).await;
    unit().append(id, "user", 1, 3).commit(&engine).await.unwrap();
    unit().append(id, "user", 4, 1).commit(&engine).await.unwrap();
    let sequences: Vec<_> = events_of(&engine, id).await.iter().map(|event| event.sequence().get()).collect();
    assert_eq!(sequences, [1, 2, 3, 4, 5]);
    for event in events_of(&engine, id).await {
        assert_eq!(event.payload(), event.sequence().to_string().as_bytes());
    }
}

pub(crate) async fn a_stale_append_is_a_conflict_and_writes_nothing(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 3).await;
    let before = everything(&engine).await;
    for stale in [0, 1, 2] {
        assert_conflict(unit().append(id, "user", stale, 2).commit(&engine).await, id, stale, 3);
    }
    assert_eq!(everything(&engine).await, before);
    assert_eq!(sequence_of(&engine, id).await, 3);
}

pub(crate) async fn an_expectation_from_the_future_is_a_conflict(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 3).await;
    let before = everything(&engine).await;
    for future in [4, 5, 1_000_000, i64::MAX - 1] {
        assert_conflict(unit().append(id, "user", future, 1).commit(&engine).await, id, future, 3);
    }
    assert_eq!(everything(&engine).await, before);
}

pub(crate) async fn a_new_aggregate_is_at_zero(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    assert_conflict(unit().create(id, "user").append(id, "user", 1, 1).commit(&engine).await, id, 1, 0);
    assert!(!exists(&engine, id).await);
}

/// After a lost tail, another event may have the same sequence.
pub(crate) async fn an_append_or_a_guard_that_read_another_event_is_a_conflict(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (id, other) = (grown(&engine, "user", 3).await, grown(&engine, "user", 1).await);
    let read = history(&engine, id).await.mark.expect("the mark of its last event");
    let before = everything(&engine).await;
    let wrong = Mark::new(read.get().wrapping_add(1));
    assert_conflict(unit().append(id, "user", 3, 1).read(id, 3, wrong).commit(&engine).await, id, 3, 3);
    let guarded = unit().append(other, "user", 1, 1).guard(id, 3);
    assert_conflict(guarded.read(id, 3, wrong).commit(&engine).await, id, 3, 3);
    assert_eq!(everything(&engine).await, before);
    let receipt = unit().append(id, "user", 3, 1).read(id, 3, read).commit(&engine).await.unwrap();
    let last = history(&engine, id).await.mark;
    assert_eq!(last, Some(receipt.mark));
    let (guarded, last) = (unit().append(other, "user", 1, 1).guard(id, 4), last.unwrap());
    guarded.read(id, 4, last).commit(&engine).await.unwrap();
}

fn assert_conflict<T>(result: evercore_core::Result<T>, id: AggregateId, wanted: i64, found: i64) {
    let error = result.err().expect("a conflict");
    assert!(error.is_conflict() && error.is_retryable(), "expected a conflict, was {error:?}");
    match error.kind() {
        ErrorKind::Conflict { aggregate, expected, actual, .. } => {
            assert_eq!((*aggregate, *expected, *actual), (id, at(wanted), at(found)));
        }
        _ => panic!("expected a conflict, was {error:?}"),
    }
}

pub(crate) async fn a_conflict_names_the_aggregate_that_is_stale(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (fresh, stale) = (grown(&engine, "user", 2).await, grown(&engine, "order", 5).await);
    let batch = unit().append(fresh, "user", 2, 1).append(stale, "order", 4, 1);
    assert_conflict(batch.commit(&engine).await, stale, 4, 5);
}

pub(crate) async fn a_hot_aggregate_has_no_hole_and_no_double(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "hot", 0).await;
    let (writers, each) = (16, 10);
    fixture.threads(writers, async |_| {
        for _ in 0..each {
            loop {
                let expected = sequence_of(&engine, id).await;
                match unit().append(id, "hot", expected, 1).commit(&engine).await {
                    Ok(_) => break,
                    Err(error) => assert!(error.is_conflict(), "{error:?}"),
                }
            }
        }
    });
    let events = log(&engine).await;
    assert_eq!(events.len(), writers * each);
    assert_no_holes(&events);
}

pub(crate) async fn of_racing_appends_one_wins(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 1).await;
    for round in 1..10 {
        let results = fixture.threads(8, async |_| unit().append(id, "user", round, 1).commit(&engine).await);
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        for result in results.into_iter().filter(Result::is_err) {
            assert_conflict(result, id, round, round + 1);
        }
    }
}

pub(crate) async fn an_empty_unit_is_fine_and_writes_nothing(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "user", 1).await;
    let before = everything(&engine).await;
    let receipt = unit().commit(&engine).await.unwrap();
    assert_eq!((receipt.first, receipt.last), (Position::ZERO, Position::ZERO));
    assert!(receipt.aggregates.is_empty());
    fixture.store().begin().commit().await.unwrap();
    assert_eq!(everything(&engine).await, before);
}

pub(crate) async fn a_thousand_events_go_in_one_unit(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 1_000).await;
    assert_eq!(sequence_of(&engine, id).await, 1_000);
    assert_no_holes(&log(&engine).await);
}

pub(crate) async fn the_largest_unit_is_written_and_a_larger_one_refused(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    let mut batch = unit().create(id, "user").append(id, "user", 0, limits::UNIT_EVENTS as i64).0;
    let mut more = evercore_core::engine::Append {
        aggregate: id,
        aggregate_type: type_named("user"),
        expected: at(limits::UNIT_EVENTS as i64),
        events: vec![event("Happened", b"")],
    };
    assert_kind!(batch.append(more.clone()), ErrorKind::Invalid);
    engine.commit(batch).await.unwrap();
    assert_eq!(sequence_of(&engine, id).await, limits::UNIT_EVENTS as i64);

    let large = event("Large", &vec![0; limits::PAYLOAD_BYTES]);
    more.events = vec![large; limits::UNIT_BYTES / limits::PAYLOAD_BYTES + 1];
    assert_kind!(unit().0.append(more), ErrorKind::Invalid);
}

pub(crate) async fn all_of_a_unit_is_written(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (first, second) = (grown(&engine, "user", 1).await, grown(&engine, "order", 1).await);
    let third = new_id(&engine).await;
    let batch = unit().append(first, "user", 1, 2).append(second, "order", 1, 1);
    let batch =
        batch.create_keyed(third, "user", "third").append(third, "user", 0, 1).key(first, "user", "first");
    batch.commit(&engine).await.unwrap();
    assert_eq!(sequence_of(&engine, first).await, 3);
    assert_eq!(sequence_of(&engine, second).await, 2);
    assert_eq!(sequence_of(&engine, third).await, 1);
    assert_eq!(holder(&engine, "user", "first").await, Some(first));
    assert_eq!(holder(&engine, "user", "third").await, Some(third));
}

pub(crate) async fn or_nothing_of_it_keys_snapshots_and_command_included(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (first, stale) = (grown(&engine, "user", 1).await, grown(&engine, "order", 2).await);
    let made = new_id(&engine).await;
    let before = everything(&engine).await;
    let batch =
        unit().append(first, "user", 1, 2).create_keyed(made, "user", "made").append(made, "user", 0, 1);
    let batch = batch.key(first, "user", "first").snapshot(first, 3, 1, b"state").command("command");
    assert_conflict(batch.append(stale, "order", 1, 1).commit(&engine).await, stale, 1, 2);
    assert_eq!(everything(&engine).await, before);
    assert!(!exists(&engine, made).await);
    assert_eq!(holder(&engine, "user", "first").await, None);
    assert_eq!(holder(&engine, "user", "made").await, None);
    let target = evercore_core::engine::Target::Id(first);
    assert_eq!(load(&engine, target, Some(1), Sequence::MAX).await.unwrap().snapshot, None);
    assert_eq!(receipt_of(&engine, &command("command")).await, None);
}

pub(crate) async fn units_of_three_aggregates_in_any_order_never_deadlock(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let mut ids = Vec::new();
    for _ in 0..8 {
        ids.push(grown(&engine, "user", 0).await);
    }
    fixture.threads(8, async |number| {
        let mut random = Random(number as u64);
        for _ in 0..10 {
            let mut chosen = ids.clone();
            (0..3).for_each(|index| chosen.swap(index, index + random.below(8 - index)));
            loop {
                let mut batch = unit();
                for id in &chosen[..3] {
                    batch = batch.append(*id, "user", sequence_of(&engine, *id).await, 1);
                }
                match batch.commit(&engine).await {
                    Ok(_) => break,
                    Err(error) => assert!(error.is_conflict(), "{error:?}"),
                }
            }
        }
    });
    let events = log(&engine).await;
    assert_eq!(events.len(), 8 * 10 * 3);
    assert_no_holes(&events);
}

pub(crate) async fn events_of_a_batch_lie_in_the_order_of_its_appends(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (a, b) = (grown(&engine, "user", 0).await, grown(&engine, "user", 0).await);
    let batch = unit()
        .append(b, "user", 0, 1)
        .append(a, "user", 0, 2)
        .append(b, "user", 1, 1)
        .append(a, "user", 2, 1);
    batch.commit(&engine).await.unwrap();
    let order: Vec<_> =
        log(&engine).await.iter().map(|event| (event.aggregate(), event.sequence().get())).collect();
    assert_eq!(order, [(b, 1), (a, 1), (a, 2), (b, 2), (a, 3)]);
}

pub(crate) async fn the_receipt_tells_where_the_events_stand(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let old = grown(&engine, "user", 4).await;
    let (made, bare) = (new_id(&engine).await, new_id(&engine).await);
    let batch =
        unit().append(old, "user", 4, 2).create(made, "user").append(made, "user", 0, 1).create(bare, "user");
    let receipt = batch.commit(&engine).await.unwrap();
    assert_eq!((receipt.first, receipt.last), (place(5), place(7)));
    assert_eq!(receipt.aggregates, [(made, at(1)), (bare, at(0)), (old, at(6))]);
    assert_eq!(receipt.sequence_of(old), Some(at(6)));
    for event in &log(&engine).await[4..] {
        assert_eq!(event.recorded_at(), receipt.recorded_at);
    }
}

pub(crate) async fn one_stale_unit_among_fifty_fails_alone(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let mut ids = Vec::new();
    for _ in 0..50 {
        ids.push(grown(&engine, "user", 1).await);
    }
    let expected = |number: usize| i64::from(number != 17);
    let commit = |number: usize| unit().append(ids[number], "user", expected(number), 1).commit(&engine);
    for (number, result) in join_all((0..50).map(commit)).await.into_iter().enumerate() {
        assert_eq!(result.is_ok(), number != 17, "unit {number}");
    }
    assert_no_holes(&log(&engine).await);
    let expected = |number: usize| if number == 17 { 0 } else { 2 };
    let results = fixture.threads(50, async |number| {
        unit().append(ids[number], "user", expected(number), 1).commit(&engine).await.is_ok()
    });
    assert_eq!(results.iter().filter(|is_ok| **is_ok).count(), 49);
    assert!(!results[17]);
    assert_no_holes(&log(&engine).await);
}

pub(crate) async fn two_engines_on_one_storage_see_each_others_appends(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let other = fixture.further().await;
    let id = grown(&engine, "user", 1).await;
    unit().append(id, "user", 1, 1).commit(&other).await.unwrap();
    assert_conflict(unit().append(id, "user", 1, 1).commit(&engine).await, id, 1, 2);
    unit().append(id, "user", 2, 1).commit(&engine).await.unwrap();
    assert_eq!(sequence_of(&other, id).await, 3);
    assert_eq!(log(&engine).await, log(&other).await);
}

pub(crate) async fn what_is_acknowledged_is_there_after_reopening(fixture: &mut Fixture) {
    let engine = fixture.engine();
    for count in 1..5 {
        grown(&engine, "user", count).await;
    }
    let before = everything(&engine).await;
    drop(engine);
    let engine = fixture.reopen().await;
    assert_eq!(everything(&engine).await, before);
}

pub(crate) async fn what_a_failed_unit_wanted_is_free(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (ann, stale) = (keyed(&engine, "user", "ann").await, grown(&engine, "user", 2).await);
    let made = new_id(&engine).await;
    let wants = || {
        let batch =
            unit().create_keyed(made, "user", "made").append(made, "user", 0, 2).key(ann, "user", "anna");
        batch.append(ann, "user", 0, 1).command("command")
    };
    for _ in 0..2 {
        assert_kind!(wants().append(stale, "user", 1, 1).commit(&engine).await, ErrorKind::Conflict { .. });
        assert_kind!(wants().guard(stale, 1).commit(&engine).await, ErrorKind::Conflict { .. });
    }
    // Its old key is still taken, and the keys that it wanted are free.
    let other = new_id(&engine).await;
    let taken = unit().create_keyed(other, "user", "ann").commit(&engine).await;
    assert_kind!(taken, ErrorKind::KeyTaken { .. });
    unit().create_keyed(other, "user", "anna").commit(&engine).await.unwrap();
    unit().key(other, "user", "other").commit(&engine).await.unwrap();
    let next = keyed(&engine, "user", "made").await;
    unit().key(next, "user", "next").commit(&engine).await.unwrap();
    let receipt = wants().commit(&engine).await.unwrap();
    assert_eq!((receipt.first, receipt.last), (place(3), place(5)));
    assert_eq!(holder(&engine, "user", "anna").await, Some(ann));
    assert_eq!(holder(&engine, "user", "made").await, Some(made));
    assert_eq!(holder(&engine, "user", "ann").await, None);
    assert_no_holes(&log(&engine).await);
}

pub(crate) async fn no_poll_of_a_large_commit_takes_half_its_time(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (id, payload) = (grown(&engine, "user", 0).await, vec![b'x'; 1_000]);
    let mut seen = Vec::new();
    // On a busy machine a poll may be slow for other reasons. One good round of several is enough.
    for round in 0..5 {
        let events = vec![event("Large", &payload); 5_000];
        let mut commit = Box::pin(unit().events(id, "user", round * 5_000, events).commit(&engine));
        let (mut longest, began) = (Duration::ZERO, Instant::now());
        std::future::poll_fn(|context| {
            let polled = Instant::now();
            let result = commit.as_mut().poll(context);
            longest = longest.max(polled.elapsed());
            result
        })
        .await
        .unwrap();
        let whole = began.elapsed();
        if longest * 2 < whole {
            return;
        }
        seen.push((longest, whole));
    }
    panic!("the longest poll and the whole commit, five times: {seen:?}");
}

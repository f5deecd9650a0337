//! Aggregates: created once, with one type and a unique id.

use std::collections::HashSet;

use evercore_core::{AggregateId, Error, ErrorKind, Sequence, limits};

use crate::fixture::Fixture;
use crate::tools::*;

pub(crate) async fn a_new_aggregate_is_empty_and_not_missing(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    assert!(!exists(&engine, id).await, "reserving an id makes nothing");
    let receipt = unit().create(id, "user").commit(&engine).await.unwrap();
    assert_eq!(receipt.aggregates, [(id, Sequence::ZERO)]);
    let made = history(&engine, id).await;
    assert_eq!((made.id, made.aggregate_type.as_str(), made.key), (id, "user", None));
    assert_eq!((made.sequence, made.snapshot, made.events.len()), (Sequence::ZERO, None, 0));
}

pub(crate) async fn a_missing_aggregate_differs_from_an_empty_one(fixture: &mut Fixture) {
    let store = fixture.store();
    let mut work = store.begin();
    let id = work.create::<Account>().await.unwrap().id();
    work.commit().await.unwrap();
    assert_eq!(store.load::<Account>(id).await.unwrap().sequence(), Sequence::ZERO);
    assert_kind!(store.load::<Account>(AggregateId::new(i64::MAX).unwrap()).await, ErrorKind::NotFound);
    assert_kind!(store.load::<Account>("nobody").await, ErrorKind::NotFound);
    assert_kind!(store.load::<Tally<0, 1>>(id).await, ErrorKind::WrongType { .. });
}

pub(crate) async fn no_id_is_given_out_twice(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = fixture.threads(16, async |number| {
        let mut ids = Vec::new();
        for count in 1..20 {
            ids.extend(new_ids(&engine, count + number as u32).await);
        }
        ids
    });
    let ids: Vec<AggregateId> = ids.into_iter().flatten().collect();
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len());
}

pub(crate) async fn no_id_is_given_out_twice_by_any_engine_on_the_same_storage(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let other = fixture.further().await;
    let engines = [engine, other];
    let ids = fixture.threads(4, async |number| {
        let mut ids = Vec::new();
        for _ in 0..10 {
            ids.extend(new_ids(&engines[number % 2], 7).await);
        }
        ids
    });
    let ids: Vec<AggregateId> = ids.into_iter().flatten().collect();
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len());
}

pub(crate) async fn no_id_is_given_out_twice_also_after_reopening(fixture: &mut Fixture) {
    let before = new_ids(&fixture.engine(), 50).await;
    let engine = fixture.reopen().await;
    let after = new_ids(&engine, 50).await;
    assert!(after.iter().all(|id| !before.contains(id)));
}

pub(crate) async fn a_block_has_as_many_ids_as_asked_for(fixture: &mut Fixture) {
    let engine = fixture.engine();
    for count in [1, 2, 256, limits::RESERVE_IDS] {
        assert_eq!(new_ids(&engine, count).await.len(), count as usize);
    }
}

pub(crate) async fn ids_that_are_not_used_are_lost_and_that_is_harmless(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = new_ids(&engine, 100).await;
    // In any order, with gaps.
    for id in [ids[90], ids[3], ids[42]] {
        unit().create(id, "user").append(id, "user", 0, 1).commit(&engine).await.unwrap();
    }
    assert_no_holes(&log(&engine).await);
    assert!(!exists(&engine, ids[4]).await);
}

pub(crate) async fn an_aggregate_that_does_not_exist_is_not_found(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let known = grown(&engine, "user", 1).await;
    let missing = new_id(&engine).await;
    let before = everything(&engine).await;
    let append = unit().append(known, "user", 1, 1).append(missing, "user", 0, 1);
    assert_kind!(append.commit(&engine).await, ErrorKind::NotFound);
    let guard = unit().append(known, "user", 1, 1).guard(missing, 0);
    assert_kind!(guard.commit(&engine).await, ErrorKind::NotFound);
    let change = unit().append(known, "user", 1, 1).key(missing, "user", "key");
    assert_kind!(change.commit(&engine).await, ErrorKind::NotFound);
    assert_eq!(everything(&engine).await, before);
    assert_eq!(sequence_of(&engine, known).await, 1);
}

pub(crate) async fn an_aggregate_of_another_type_is_wrong_type(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (user, other) = (grown(&engine, "user", 1).await, grown(&engine, "order", 1).await);
    let before = everything(&engine).await;
    let error =
        unit().append(other, "order", 1, 1).append(user, "order", 1, 1).commit(&engine).await.unwrap_err();
    assert_is_wrong_type(&error, "order", "user");
    let error =
        unit().append(other, "order", 1, 1).key(user, "order", "key").commit(&engine).await.unwrap_err();
    assert_is_wrong_type(&error, "order", "user");
    assert_eq!(everything(&engine).await, before);
    assert_eq!(holder(&engine, "order", "key").await, None);
}

fn assert_is_wrong_type(error: &Error, wanted: &str, found: &str) {
    match error.kind() {
        ErrorKind::WrongType { expected, actual, .. } => {
            assert_eq!((expected.as_str(), actual.as_str()), (wanted, found));
        }
        _ => panic!("expected WrongType, was {error:?}"),
    }
}

pub(crate) async fn an_aggregate_is_not_made_twice(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 2).await;
    let before = everything(&engine).await;
    let again = unit().create(id, "user").append(id, "user", 0, 1).commit(&engine).await;
    assert!(again.is_err(), "the id is in use");
    assert_eq!(everything(&engine).await, before);
    assert_eq!(sequence_of(&engine, id).await, 2);
}

pub(crate) async fn a_unit_may_make_many_aggregates(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = new_ids(&engine, 500).await;
    let mut batch = unit();
    for (number, id) in ids.iter().enumerate() {
        batch = batch.create_keyed(*id, "user", &format!("user {number}")).append(*id, "user", 0, 1);
    }
    let receipt = batch.commit(&engine).await.unwrap();
    let made: Vec<_> = ids.iter().map(|id| (*id, at(1))).collect();
    assert_eq!(receipt.aggregates, made);
    assert_eq!(holder(&engine, "user", "user 499").await, Some(ids[499]));
    assert_no_holes(&log(&engine).await);
}

pub(crate) async fn aggregates_survive_reopening(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (empty, full) = (keyed(&engine, "user", "empty").await, grown(&engine, "user", 3).await);
    drop(engine);
    let engine = fixture.reopen().await;
    assert_eq!(holder(&engine, "user", "empty").await, Some(empty));
    assert_eq!(sequence_of(&engine, empty).await, 0);
    assert_eq!(sequence_of(&engine, full).await, 3);
}

pub(crate) async fn an_id_in_use_is_invalid(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (grown, keyed) = (grown(&engine, "user", 2).await, keyed(&engine, "user", "ann").await);
    let empty = new_id(&engine).await;
    unit().create(empty, "user").commit(&engine).await.unwrap();
    let other = new_id(&engine).await;
    let before = everything(&engine).await;
    for id in [grown, keyed, empty] {
        for of_type in ["user", "order"] {
            let attempts = [
                unit().create(id, of_type),
                unit().create_keyed(id, of_type, "new"),
                unit().create(id, of_type).append(id, of_type, 0, 1),
                unit()
                    .create(other, "user")
                    .append(other, "user", 0, 1)
                    .create(id, of_type)
                    .command("command"),
            ];
            for attempt in attempts {
                assert_kind!(attempt.commit(&engine).await, ErrorKind::Invalid);
            }
        }
    }
    assert_eq!(everything(&engine).await, before);
    assert!(!exists(&engine, other).await);
    for of_type in ["user", "order"] {
        assert_eq!(holder(&engine, of_type, "new").await, None);
    }
    assert_eq!(holder(&engine, "user", "ann").await, Some(keyed));
    for id in [grown, keyed, empty] {
        assert_eq!(history(&engine, id).await.aggregate_type.as_str(), "user");
    }
    // Another commit can create the aggregate that failed.
    unit().create_keyed(other, "user", "new").command("command").commit(&engine).await.unwrap();
}

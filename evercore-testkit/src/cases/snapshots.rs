//! Snapshots: one per aggregate, and they never change a result.

use evercore_core::engine::{Snapshot, Target};
use evercore_core::{AggregateId, AsOf, ErrorKind, Json, Sequence, StateCodec, limits};

use crate::fixture::Fixture;
use crate::tools::*;

async fn kept(engine: &Engine, id: AggregateId, version: u32) -> Option<Snapshot> {
    load(engine, Target::Id(id), Some(version), Sequence::MAX).await.unwrap().snapshot
}

/// Sequence and state of the stored snapshot.
async fn brief(engine: &Engine, id: AggregateId, version: u32) -> Option<(i64, Vec<u8>)> {
    kept(engine, id, version).await.map(|it| (it.sequence.get(), it.state.as_bytes().to_vec()))
}

pub(crate) async fn a_snapshot_comes_with_the_events_behind_it(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    unit().snapshot(id, 3, 1, b"three").commit(&engine).await.unwrap();
    let found = load(&engine, Target::Id(id), Some(1), Sequence::MAX).await.unwrap();
    assert_eq!(found.snapshot.unwrap().state.as_bytes(), b"three");
    let sequences: Vec<_> = found.events.iter().map(|event| event.sequence().get()).collect();
    assert_eq!((sequences, found.sequence), (vec![4, 5], at(5)));
    unit().snapshot(id, 5, 1, b"five").commit(&engine).await.unwrap();
    let found = load(&engine, Target::Id(id), Some(1), Sequence::MAX).await.unwrap();
    assert_eq!((found.snapshot.unwrap().sequence, found.events.len(), found.sequence), (at(5), 0, at(5)));
    let found = load(&engine, Target::Id(id), None, Sequence::MAX).await.unwrap();
    assert_eq!((found.snapshot, found.events.len()), (None, 5));
}

pub(crate) async fn a_later_one_takes_its_place(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    unit().snapshot(id, 2, 1, b"two").commit(&engine).await.unwrap();
    unit().snapshot(id, 4, 1, b"four").commit(&engine).await.unwrap();
    assert_eq!(brief(&engine, id, 1).await, Some((4, b"four".to_vec())));
}

pub(crate) async fn an_earlier_one_does_not_take_its_place(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    unit().snapshot(id, 4, 1, b"four").commit(&engine).await.unwrap();
    unit().snapshot(id, 2, 1, b"two").commit(&engine).await.unwrap();
    assert_eq!(brief(&engine, id, 1).await, Some((4, b"four".to_vec())));
}

pub(crate) async fn one_of_another_version_takes_its_place(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    unit().snapshot(id, 4, 1, b"old shape").commit(&engine).await.unwrap();
    unit().snapshot(id, 2, 2, b"new shape").commit(&engine).await.unwrap();
    assert_eq!(brief(&engine, id, 2).await, Some((2, b"new shape".to_vec())));
    assert_eq!(brief(&engine, id, 1).await, None, "an aggregate has one snapshot");
}

pub(crate) async fn one_of_another_version_is_not_usable(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    unit().snapshot(id, 4, 1, b"state").commit(&engine).await.unwrap();
    for version in [0, 2, u32::MAX] {
        let found = load(&engine, Target::Id(id), Some(version), Sequence::MAX).await.unwrap();
        assert_eq!((found.snapshot, found.events.len()), (None, 5));
    }
}

pub(crate) async fn the_largest_version_is_kept(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 1).await;
    unit().snapshot(id, 1, u32::MAX, b"state").commit(&engine).await.unwrap();
    assert_eq!(kept(&engine, id, u32::MAX).await.unwrap().version, u32::MAX);
}

pub(crate) async fn one_ahead_of_the_aggregate_is_not_kept(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    unit().snapshot(id, 5, 1, b"five").commit(&engine).await.unwrap();
    unit().append(id, "user", 5, 1).snapshot(id, 7, 1, b"seven").commit(&engine).await.unwrap();
    assert_eq!(sequence_of(&engine, id).await, 6, "the unit itself goes through");
    assert_eq!(brief(&engine, id, 1).await, Some((5, b"five".to_vec())));
    unit().append(id, "user", 6, 2).commit(&engine).await.unwrap();
    assert_eq!(brief(&engine, id, 1).await, Some((5, b"five".to_vec())));
}

pub(crate) async fn one_of_the_events_of_its_own_unit_is_kept(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    unit()
        .create(id, "user")
        .append(id, "user", 0, 3)
        .snapshot(id, 3, 1, b"three")
        .commit(&engine)
        .await
        .unwrap();
    assert_eq!(brief(&engine, id, 1).await, Some((3, b"three".to_vec())));
}

pub(crate) async fn one_behind_what_is_asked_for_is_usable_and_one_ahead_is_not(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 6).await;
    unit().snapshot(id, 3, 1, b"three").commit(&engine).await.unwrap();
    for (up_to, has_snapshot, events) in
        [(2, false, 2), (3, true, 0), (4, true, 1), (6, true, 3), (9, true, 3)]
    {
        let found = load(&engine, Target::Id(id), Some(1), at(up_to)).await.unwrap();
        assert_eq!((found.snapshot.is_some(), found.events.len()), (has_snapshot, events), "up to {up_to}");
        assert_eq!(found.sequence, at(6));
    }
}

pub(crate) async fn one_is_rolled_back_with_its_unit(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    unit().snapshot(id, 2, 1, b"two").commit(&engine).await.unwrap();
    let stale = unit().append(id, "user", 4, 1).snapshot(id, 5, 1, b"five").commit(&engine).await;
    assert_kind!(stale, ErrorKind::Conflict { .. });
    assert_eq!(brief(&engine, id, 1).await, Some((2, b"two".to_vec())));
}

pub(crate) async fn one_of_a_missing_aggregate_is_not_found(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    assert_kind!(unit().snapshot(id, 0, 1, b"").commit(&engine).await, ErrorKind::NotFound);
    assert!(!exists(&engine, id).await);
}

pub(crate) async fn any_state_comes_back(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 3).await;
    let largest = vec![0xff; limits::PAYLOAD_BYTES];
    for (sequence, state) in [(1, &b""[..]), (2, b"\0\xff\xfe not UTF-8"), (3, &largest)] {
        unit().snapshot(id, sequence, 1, state).commit(&engine).await.unwrap();
        assert!(brief(&engine, id, 1).await == Some((sequence, state.to_vec())), "state at {sequence}");
    }
}

pub(crate) async fn snapshots_survive_reopening(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    unit().snapshot(id, 4, 1, b"four").commit(&engine).await.unwrap();
    drop(engine);
    let engine = fixture.reopen().await;
    assert_eq!(brief(&engine, id, 1).await, Some((4, b"four".to_vec())));
}

type Kept = Tally<5, 1>;
type Plain = Tally<0, 1>;
type Changed = Tally<5, 2>;

async fn counted(fixture: &Fixture, events: i64) -> AggregateId {
    let store = fixture.store();
    let mut work = store.begin();
    let id = work.create::<Kept>().await.unwrap().id();
    work.commit().await.unwrap();
    for number in 1..=events {
        store.update::<Kept, _, _>(id, |_| [TallyEvent::Counted(number)]).await.unwrap();
    }
    id
}

pub(crate) async fn a_load_equals_a_snapshot_and_the_rest_at_every_sequence(fixture: &mut Fixture) {
    let store = fixture.store();
    let id = counted(fixture, 23).await;
    assert_eq!(brief(&fixture.engine(), id, 1).await.map(|(sequence, _)| sequence), Some(20));
    for sequence in 0..=23 {
        let as_of = AsOf::Sequence(at(sequence));
        let kept = store.load_as_of::<Kept>(id, as_of).await.unwrap();
        assert_eq!(
            (kept.total, kept.events, kept.sequence()),
            (sequence * (sequence + 1) / 2, sequence, at(sequence))
        );
    }
    assert_eq!(store.load::<Kept>(id).await.unwrap().total, 23 * 24 / 2);
    assert_eq!(store.snapshots_ignored(), 0);
}

pub(crate) async fn a_changed_shape_is_read_from_the_events(fixture: &mut Fixture) {
    let store = fixture.store();
    let id = counted(fixture, 12).await;
    let changed = store.load::<Changed>(id).await.unwrap();
    assert_eq!((changed.total, changed.events), (78, 12));
    for number in 13..=15 {
        store.update::<Changed, _, _>(id, |_| [TallyEvent::Counted(number)]).await.unwrap();
    }
    assert_eq!(kept(&fixture.engine(), id, 2).await.unwrap().sequence, at(15));
    assert_eq!(store.load::<Changed>(id).await.unwrap().total, 120);
    assert_eq!(store.load::<Kept>(id).await.unwrap().total, 120);
}

pub(crate) async fn one_that_does_not_decode_is_ignored_and_counted(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = counted(fixture, 7).await;
    unit().snapshot(id, 7, 1, b"{ this is no state").commit(&engine).await.unwrap();
    assert_eq!(store.load::<Kept>(id).await.unwrap().total, 28);
    assert_eq!(store.snapshots_ignored(), 1);
    let mut work = store.begin();
    assert_eq!(work.load::<Kept>(id).await.unwrap().total, 28);
    assert_eq!(store.snapshots_ignored(), 2);
}

pub(crate) async fn writers_with_and_without_snapshots_agree(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = counted(fixture, 0).await;
    fixture.threads(6, async |number| {
        for _ in 0..10 {
            let result = match number % 2 {
                0 => store.update::<Kept, _, _>(id, |_| [TallyEvent::Counted(1)]).await,
                _ => store.update::<Plain, _, _>(id, |_| [TallyEvent::Counted(1)]).await,
            };
            if let Err(error) = result {
                assert!(error.is_conflict(), "{error:?}");
            }
        }
    });
    let sequence = sequence_of(&engine, id).await;
    let (with, without) = (store.load::<Kept>(id).await.unwrap(), store.load::<Plain>(id).await.unwrap());
    assert_eq!(with.total, sequence);
    assert_eq!((with.total, with.sequence()), (without.total, without.sequence()));
    if let Some(snapshot) = kept(&engine, id, 1).await {
        let state: Kept = Json::decode_state(snapshot.state.as_bytes()).unwrap();
        assert_eq!((state.total, state.events), (snapshot.sequence.get(), snapshot.sequence.get()));
    }
}

pub(crate) async fn every_snapshot_of_a_unit_is_kept(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(grown(&engine, "user", 2).await);
    }
    let state = |id: &AggregateId| format!("state of {id}").into_bytes();
    let batch = ids.iter().fold(unit(), |batch, id| batch.snapshot(*id, 2, 1, &state(id)));
    batch.commit(&engine).await.unwrap();
    for id in ids {
        assert_eq!(brief(&engine, id, 1).await, Some((2, state(&id))));
    }
}

//! Changes of several cursors of one subscription: declared, paused, reset, removed, taken over and rolled back together.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evercore_core::engine::{Advance, Changed, ParkedChange, Step, SubscriptionChange};
use evercore_core::{
    AggregateId, Cursor, CursorId, CursorStatus, ErrorKind, Lease, OwnerId, Parked, Position, Result,
    Selection, SubscriptionName, Timestamp, VersionState,
};

use crate::fixture::Fixture;
use crate::tools::*;

const LONG: Duration = Duration::from_secs(600);
const PARTITIONS: u32 = 3;

fn name() -> SubscriptionName {
    SubscriptionName::new("totals").unwrap()
}

fn id(version: u32, partition: u32) -> CursorId {
    CursorId { subscription: name(), version, partition }
}

async fn change(engine: &Engine, change: SubscriptionChange) -> Result<Changed> {
    engine.change(&name(), &change).await
}

/// A log of this length.
async fn log_of(engine: &Engine, events: i64) {
    grown(engine, "letter", events).await;
}

async fn declare(engine: &Engine, version: u32) -> Changed {
    change(engine, SubscriptionChange::declare(version, PARTITIONS, Position::ZERO, false)).await.unwrap()
}

async fn cursors(engine: &Engine) -> Vec<Cursor> {
    engine.cursors(Some(&name())).await.unwrap().cursors
}

async fn of_version(engine: &Engine, version: u32) -> Vec<Cursor> {
    cursors(engine).await.into_iter().filter(|cursor| cursor.id.version == version).collect()
}

async fn states(engine: &Engine) -> Vec<(u32, VersionState)> {
    let mut states: Vec<_> =
        cursors(engine).await.iter().map(|cursor| (cursor.id.version, cursor.version_state())).collect();
    states.dedup();
    states
}

/// Claims a cursor and moves it to this position.
async fn moved(engine: &Engine, id: &CursorId, to: i64) -> Lease {
    moved_and_parked(engine, id, to, Vec::new()).await
}

async fn moved_and_parked(engine: &Engine, id: &CursorId, to: i64, parked: Vec<ParkedChange>) -> Lease {
    let owner = OwnerId::new("owner").unwrap();
    let claimed = engine.step(id, &Step::claim(owner.clone(), LONG)).await.unwrap().unwrap();
    let lease = Lease { owner, epoch: claimed.epoch };
    let advance = Advance::new(lease.clone(), claimed.position, place(to), LONG).with_parked(parked);
    engine.step(id, &Step::Advance(advance)).await.unwrap();
    lease
}

fn parked_at(position: i64) -> ParkedChange {
    ParkedChange::Keep(Parked {
        position: place(position),
        aggregate: AggregateId::new(7).unwrap(),
        holds_back: true,
        attempts: 3,
        error: String::new(),
        parked_at: Timestamp::from_micros(0).unwrap(),
        is_due: false,
    })
}

pub(crate) async fn a_change_returns_the_subscription_as_it_is_listed(fixture: &mut Fixture) {
    let engine = fixture.engine();
    log_of(&engine, 9).await;
    let other = SubscriptionName::new("totals 2").unwrap();
    engine.change(&other, &SubscriptionChange::declare(1, 1, place(3), false)).await.unwrap();
    let untouched = engine.cursors(Some(&other)).await.unwrap().cursors;
    let made = declare(&engine, 1).await;
    assert_eq!(made.cursors.len(), PARTITIONS as usize);
    assert_eq!(declare(&engine, 1).await, made, "one that is there stays as it is");
    let held = SubscriptionChange::declare(2, PARTITIONS, place(4), true);
    let pause = SubscriptionChange::each(Selection::of_partition(1), Step::Pause);
    let reset = SubscriptionChange::each(Selection::of_version(1).and_partition(0), Step::reset(place(5)));
    let resume = SubscriptionChange::each(Selection::all(), Step::Resume);
    let release = SubscriptionChange::hold(2, false);
    let promote = SubscriptionChange::promote(Some(2));
    let remove = SubscriptionChange::remove(Some(1));
    for step in [held, pause, reset, resume, release, promote, remove] {
        let changed = change(&engine, step.clone()).await.unwrap();
        assert_eq!(cursors(&engine).await, changed.cursors, "after {step:?}");
        assert_eq!(engine.cursors(Some(&other)).await.unwrap().cursors, untouched, "after {step:?}");
    }
    assert_eq!(states(&engine).await, [(2, VersionState::Live)]);
    assert!(change(&engine, SubscriptionChange::remove(None)).await.unwrap().cursors.is_empty());
    assert!(cursors(&engine).await.is_empty());
    assert_kind!(change(&engine, SubscriptionChange::remove(None)).await, ErrorKind::NotFound);
}

pub(crate) async fn a_change_that_is_refused_changes_no_cursor(fixture: &mut Fixture) {
    let engine = fixture.engine();
    log_of(&engine, 9).await;
    declare(&engine, 1).await;
    moved(&engine, &id(1, 0), 4).await;
    moved_and_parked(&engine, &id(1, 2), 4, vec![parked_at(3)]).await;
    let before = cursors(&engine).await;
    let reset = SubscriptionChange::each(Selection::all(), Step::reset(Position::ZERO));
    assert_kind!(change(&engine, reset.clone()).await, ErrorKind::Invalid);
    assert_eq!(cursors(&engine).await, before);
    // Another partition is not in its way.
    let of_one = SubscriptionChange::each(Selection::of_partition(0), Step::reset(place(1)));
    change(&engine, of_one).await.unwrap();
    let positions: Vec<i64> = cursors(&engine).await.iter().map(|cursor| cursor.position.get()).collect();
    assert_eq!(positions, [1, 0, 4]);
    engine.step(&id(1, 2), &Step::drop_parked(None)).await.unwrap();
    change(&engine, reset).await.unwrap();
    assert!(cursors(&engine).await.iter().all(|cursor| cursor.position == Position::ZERO));
}

pub(crate) async fn a_change_is_seen_as_a_whole_and_loses_no_step(fixture: &mut Fixture) {
    const RESETS: usize = 30;
    const STEPS: usize = 40;
    let engine = fixture.engine();
    log_of(&engine, 9).await;
    declare(&engine, 1).await;
    let (done, looks) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let went_wrong = AtomicBool::new(false);
    fixture.threads(4, async |number| {
        match number {
            0 | 1 => {
                for nth in 0..RESETS {
                    let to = place((nth % 4 + number * 4) as i64);
                    let reset = SubscriptionChange::each(Selection::all(), Step::reset(to));
                    change(&engine, reset).await.unwrap();
                }
            }
            2 => {
                for nth in 0..STEPS {
                    let id = id(1, nth as u32 % PARTITIONS);
                    engine.step(&id, &Step::resume_parked(None)).await.unwrap();
                }
            }
            _ => {
                // Looks once also if the others are done already.
                while looks.load(Ordering::SeqCst) == 0 || done.load(Ordering::SeqCst) < 3 {
                    let cursors = cursors(&engine).await;
                    let is_whole = cursors.iter().all(|cursor| cursor.position == cursors[0].position);
                    went_wrong.fetch_or(!is_whole, Ordering::SeqCst);
                    looks.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
        done.fetch_add(1, Ordering::SeqCst);
    });
    assert!(!went_wrong.load(Ordering::SeqCst), "a change was seen in part");
    assert!(looks.load(Ordering::SeqCst) > 0);
    let changes: i64 = cursors(&engine).await.iter().map(|cursor| cursor.parked_changes).sum();
    assert_eq!(changes as usize, 2 * RESETS * PARTITIONS as usize + STEPS, "a step was lost");
}

pub(crate) async fn racing_declarations_make_each_version_once_and_whole(fixture: &mut Fixture) {
    let engine = fixture.engine();
    log_of(&engine, 9).await;
    let refused = AtomicUsize::new(0);
    // Two threads for each of three versions.
    fixture.threads(6, async |number| {
        let version = number as u32 / 2 + 1;
        let declare = SubscriptionChange::declare(version, PARTITIONS, place(number as i64), false);
        match change(&engine, declare).await {
            Ok(changed) => {
                let own = changed.cursors.iter().filter(|cursor| cursor.id.version == version);
                assert_eq!(own.count(), PARTITIONS as usize);
            }
            Err(error) => {
                assert_kind!(Err::<(), _>(error), ErrorKind::Superseded);
                refused.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    let made = cursors(&engine).await;
    let versions: Vec<u32> =
        (1..=3).filter(|version| made.iter().any(|cursor| cursor.id.version == *version)).collect();
    assert!(versions.contains(&3));
    assert_eq!(made.len(), versions.len() * PARTITIONS as usize, "a version is there in part: {made:?}");
    assert_eq!(refused.load(Ordering::SeqCst), (3 - versions.len()) * 2);
    let live: Vec<u32> = made.iter().filter(|it| it.live_from.is_some()).map(|it| it.id.version).collect();
    assert_eq!(live, vec![versions[0]; PARTITIONS as usize], "the first one is live, and only that");
}

pub(crate) async fn a_version_takes_over_with_all_partitions_at_once(fixture: &mut Fixture) {
    let engine = fixture.engine();
    log_of(&engine, 9).await;
    declare(&engine, 1).await;
    for partition in 0..PARTITIONS {
        moved(&engine, &id(1, partition), 4 + i64::from(partition)).await;
    }
    let declared = declare(&engine, 2).await;
    assert!(declared.cursors.iter().filter(|it| it.id.version == 2).all(|it| it.live_from.is_none()));
    let mut lease = moved(&engine, &id(2, 0), 4).await;
    for (partition, to) in [(1, 5), (2, 5)] {
        moved(&engine, &id(2, partition), to).await;
        let before = cursors(&engine).await;
        let early = SubscriptionChange::take_over(id(2, 0), lease.clone(), Duration::ZERO);
        let changed = change(&engine, early).await.unwrap();
        assert_eq!((changed.cursors, cursors(&engine).await), (before.clone(), before), "it is too early");
    }
    // Only a partition of the live version is asked to wait.
    let asking = SubscriptionChange::take_over(id(2, 0), lease.clone(), LONG);
    change(&engine, asking).await.unwrap();
    assert!(of_version(&engine, 1).await.iter().all(|cursor| cursor.wanted_by == Some(lease.owner.clone())));
    assert!(of_version(&engine, 2).await.iter().all(|cursor| cursor.wanted_by.is_none()));

    let own = moved(&engine, &id(2, 2), 6).await;
    let stale = Lease { epoch: lease.epoch - 1, ..lease.clone() };
    let refused = SubscriptionChange::take_over(id(2, 0), stale, Duration::ZERO);
    assert_kind!(change(&engine, refused).await, ErrorKind::LeaseLost);
    let take_over = SubscriptionChange::take_over(id(2, 0), lease.clone(), Duration::ZERO);
    let changed = change(&engine, take_over).await.unwrap();
    assert_eq!((changed.former, changed.left_parked), (vec![1], 0));
    assert_eq!(states(&engine).await, [(1, VersionState::Retired), (2, VersionState::Live)]);
    let from: Vec<_> = of_version(&engine, 2).await.iter().map(|cursor| cursor.live_from).collect();
    assert_eq!(from, [Some(place(4)), Some(place(5)), Some(place(6))]);
    // The owners of the old version have lost their leases, those of the new one have not.
    for cursor in of_version(&engine, 1).await {
        assert_eq!((cursor.owner, cursor.status), (None, CursorStatus::Retired));
    }
    lease.epoch = of_version(&engine, 2).await[0].epoch;
    for (partition, lease) in [(0, lease), (2, own)] {
        engine.step(&id(2, partition), &Step::renew(lease, LONG)).await.unwrap();
    }
}

pub(crate) async fn a_take_over_waits_for_what_is_paused_parked_or_held(fixture: &mut Fixture) {
    let engine = fixture.engine();
    log_of(&engine, 9).await;
    declare(&engine, 1).await;
    moved_and_parked(&engine, &id(1, 0), 4, vec![parked_at(3), parked_at(4)]).await;
    declare(&engine, 2).await;
    let lease = moved(&engine, &id(2, 0), 4).await;
    let is_taken = async || {
        let take_over = SubscriptionChange::take_over(id(2, 0), lease.clone(), Duration::ZERO);
        change(&engine, take_over).await.unwrap();
        states(&engine).await == [(1, VersionState::Retired), (2, VersionState::Live)]
    };
    assert!(!is_taken().await, "there are parked events");
    engine.step(&id(1, 0), &Step::drop_parked(None)).await.unwrap();
    change(&engine, SubscriptionChange::each(Selection::of_version(1), Step::Pause)).await.unwrap();
    assert!(!is_taken().await, "it is paused");
    change(&engine, SubscriptionChange::each(Selection::of_version(1), Step::Resume)).await.unwrap();
    change(&engine, SubscriptionChange::hold(2, true)).await.unwrap();
    assert!(!is_taken().await, "it is held");
    assert_kind!(change(&engine, SubscriptionChange::hold(2, true)).await, ErrorKind::Invalid);
    change(&engine, SubscriptionChange::hold(2, false)).await.unwrap();
    assert!(is_taken().await);
}

pub(crate) async fn versions_are_promoted_and_rolled_back_in_one_step(fixture: &mut Fixture) {
    let engine = fixture.engine();
    log_of(&engine, 9).await;
    declare(&engine, 1).await;
    let old = moved_and_parked(&engine, &id(1, 0), 4, vec![parked_at(3)]).await;
    let held = SubscriptionChange::declare(2, PARTITIONS, Position::ZERO, true);
    change(&engine, held).await.unwrap();
    assert_eq!(states(&engine).await, [(1, VersionState::Live), (2, VersionState::Held)]);
    let new = moved(&engine, &id(2, 0), 2).await;
    // An operator's promotion does not wait. What version 1 has handled is replay, and what it has parked stays listed.
    let promoted = change(&engine, SubscriptionChange::promote(Some(2))).await.unwrap();
    assert_eq!((promoted.former, promoted.left_parked), (vec![1], 1));
    assert_eq!(states(&engine).await, [(1, VersionState::Retired), (2, VersionState::Live)]);
    assert_eq!(of_version(&engine, 2).await[0].live_from, Some(place(4)));
    assert_eq!(engine.parked(&id(1, 0), Position::ZERO, 9).await.unwrap().len(), 1);
    assert_kind!(engine.step(&id(1, 0), &Step::renew(old, LONG)).await, ErrorKind::Superseded);
    assert_kind!(engine.step(&id(2, 0), &Step::renew(new, LONG)).await, ErrorKind::LeaseLost);
    assert_kind!(change(&engine, SubscriptionChange::promote(Some(2))).await, ErrorKind::Invalid);
    assert_kind!(change(&engine, SubscriptionChange::promote(Some(3))).await, ErrorKind::NotFound);

    let later = moved(&engine, &id(2, 0), 7).await;
    let rolled_back = change(&engine, SubscriptionChange::promote(None)).await.unwrap();
    assert_eq!(rolled_back.former, [2]);
    assert_eq!(states(&engine).await, [(1, VersionState::Live), (2, VersionState::Held)]);
    let back = &of_version(&engine, 1).await[0];
    assert_eq!((back.position, back.live_from), (place(4), Some(place(7))), "version 2 has handled up to 7");
    assert_kind!(engine.step(&id(2, 0), &Step::renew(later, LONG)).await, ErrorKind::LeaseLost);
    assert_kind!(change(&engine, SubscriptionChange::promote(None)).await, ErrorKind::Invalid);
    moved(&engine, &id(1, 0), 8).await;
    change(&engine, SubscriptionChange::promote(Some(2))).await.unwrap();
    assert_eq!(of_version(&engine, 2).await[0].live_from, Some(place(8)));
}

pub(crate) async fn nothing_that_changes_nothing_is_a_success(fixture: &mut Fixture) {
    let engine = fixture.engine();
    log_of(&engine, 9).await;
    let each = |which, step| SubscriptionChange::each(which, step);
    assert_kind!(change(&engine, each(Selection::all(), Step::Pause)).await, ErrorKind::NotFound);
    declare(&engine, 1).await;
    declare(&engine, 2).await;
    change(&engine, SubscriptionChange::promote(Some(2))).await.unwrap();
    let one = Selection::of_version(1);
    for step in [Step::Pause, Step::Resume, Step::reset(Position::ZERO)] {
        assert_kind!(change(&engine, each(one, step)).await, ErrorKind::Superseded);
    }
    for which in
        [Selection::of_version(3), Selection::of_partition(PARTITIONS), one.and_partition(PARTITIONS)]
    {
        assert_kind!(change(&engine, each(which, Step::Pause)).await, ErrorKind::NotFound);
    }
    assert_kind!(change(&engine, SubscriptionChange::remove(Some(3))).await, ErrorKind::NotFound);
    assert_kind!(change(&engine, SubscriptionChange::hold(1, true)).await, ErrorKind::Invalid);
    assert_kind!(change(&engine, SubscriptionChange::hold(2, true)).await, ErrorKind::Invalid);
    let older = SubscriptionChange::declare(1, PARTITIONS + 1, Position::ZERO, false);
    assert_kind!(change(&engine, older).await, ErrorKind::Invalid);
    // The live version goes only together with the others.
    assert_kind!(change(&engine, SubscriptionChange::remove(Some(2))).await, ErrorKind::Invalid);
    change(&engine, SubscriptionChange::remove(Some(1))).await.unwrap();
    let older = SubscriptionChange::declare(1, PARTITIONS, Position::ZERO, false);
    assert_kind!(change(&engine, older).await, ErrorKind::Superseded);
    assert!(change(&engine, SubscriptionChange::remove(Some(2))).await.unwrap().cursors.is_empty());
}

pub(crate) async fn changes_from_two_engines_follow_one_another(fixture: &mut Fixture) {
    const ROUNDS: usize = 12;
    let engine = fixture.engine();
    log_of(&engine, 9).await;
    declare(&engine, 1).await;
    declare(&engine, 2).await;
    let further = fixture.further().await;
    let (promoted, began) = (AtomicUsize::new(0), Instant::now());
    fixture.threads(4, async |number| {
        let engine = if number % 2 == 0 { &engine } else { &further };
        for _ in 0..ROUNDS {
            assert!(began.elapsed() < Duration::from_secs(60), "they wait for each other");
            match number {
                0 | 1 => {
                    let version = number as u32 + 1;
                    let change = change(engine, SubscriptionChange::promote(Some(version))).await;
                    promoted.fetch_add(usize::from(change.is_ok()), Ordering::SeqCst);
                }
                2 => drop(
                    change(engine, SubscriptionChange::each(Selection::all(), Step::Pause)).await.unwrap(),
                ),
                _ => drop(engine.step(&id(1, 1), &Step::resume_parked(None)).await),
            }
            let live: Vec<u32> = cursors(engine)
                .await
                .iter()
                .filter(|cursor| cursor.version_state() == VersionState::Live)
                .map(|cursor| cursor.id.version)
                .collect();
            assert_eq!(live.len(), PARTITIONS as usize, "one version is live at any time");
            assert!(live.iter().all(|version| *version == live[0]));
        }
    });
    assert!(promoted.load(Ordering::SeqCst) >= 1);
}

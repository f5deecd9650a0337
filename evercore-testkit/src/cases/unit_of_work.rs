//! The unit of work: it writes nothing before its commit and all or nothing in it. Guards protect aggregates that it
//! only read.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use evercore_core::{
    Aggregate, BoxError, CommandId, Error, ErrorKind, EventStore, Json, Metadata, RetryPolicy, Timestamp,
};
use serde::{Deserialize, Serialize};

use crate::fixture::Fixture;
use crate::tools::*;

pub(crate) async fn nothing_is_visible_before_the_commit(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let mut work = store.begin();
    let mut account = work.create_with_key::<Account>("ann").await.unwrap();
    work.record(&mut account, deposited(1)).unwrap();
    assert_eq!(everything(&engine).await, (vec![], vec![]));
    assert_kind!(store.load::<Account>(account.id()).await, ErrorKind::NotFound);
    assert_eq!(store.find::<Account>("ann").await.unwrap(), None);
    let receipt = work.commit().await.unwrap();
    assert_eq!(receipt.sequence_of(account.id()), Some(at(1)));
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 1);
}

pub(crate) async fn an_aggregate_loaded_twice_has_the_staged_events(fixture: &mut Fixture) {
    let store = fixture.store();
    store.update_or_create::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    let mut work = store.begin();
    let mut first = work.load::<Account>("ann").await.unwrap();
    work.record_all(&mut first, [deposited(2), deposited(3)]).unwrap();
    let mut second = work.load::<Account>(first.id()).await.unwrap();
    assert_eq!((second.balance, second.sequence()), (6, at(3)));
    work.record(&mut second, deposited(4)).unwrap();
    assert!(work.record(&mut first, deposited(5)).unwrap_err().is_conflict(), "the first handle is behind");
    work.commit().await.unwrap();
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 10);
}

pub(crate) async fn dropping_it_writes_nothing(fixture: &mut Fixture) {
    let store = fixture.store();
    let mut work = store.begin();
    let mut account = work.create_with_key::<Account>("ann").await.unwrap();
    work.record(&mut account, deposited(1)).unwrap();
    drop(work);
    assert_eq!(everything(&fixture.engine()).await, (vec![], vec![]));
    assert_is_healthy(&store).await;
}

pub(crate) async fn an_error_in_it_leaves_nothing(fixture: &mut Fixture) {
    async fn fail(store: &EventStore) -> evercore_core::Result<()> {
        let mut work = store.begin();
        let mut account = work.create_with_key::<Account>("ann").await?;
        work.record(&mut account, deposited(1))?;
        work.record(&mut account, AccountEvent::Withdrawn { amount: 2 })?;
        work.commit().await.map(|_| ())
    }
    let store = fixture.store();
    assert_kind!(fail(&store).await, ErrorKind::InvalidState);
    assert_eq!(everything(&fixture.engine()).await, (vec![], vec![]));
    assert_is_healthy(&store).await;
}

pub(crate) async fn a_panic_in_it_leaves_nothing_and_a_healthy_engine(fixture: &mut Fixture) {
    let store = fixture.store();
    let panicked = fixture.threads(2, async |_| {
        let mut work = store.begin();
        let mut account = work.create_with_key::<Account>("ann").await.unwrap();
        work.record(&mut account, deposited(1)).unwrap();
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _held = work;
            std::panic::resume_unwind(Box::new("a panic with a unit in hand"));
        }))
        .is_err()
    });
    assert_eq!(panicked, [true, true]);
    assert_eq!(everything(&fixture.engine()).await, (vec![], vec![]));
    assert_is_healthy(&store).await;
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Brittle {
    events: i64,
}

#[derive(Debug, Serialize, Deserialize)]
enum BrittleEvent {
    Happened,
    Broke,
}

impl Aggregate for Brittle {
    const TYPE: &'static str = "brittle";
    type Event = BrittleEvent;
    type Codec = Json;

    fn apply(&mut self, event: BrittleEvent) {
        self.events += 1;
        if matches!(event, BrittleEvent::Broke) {
            std::panic::resume_unwind(Box::new("a panic in the midst of an event"));
        }
    }
}

pub(crate) async fn a_panic_while_recording_leaves_aggregate_and_unit_as_before(fixture: &mut Fixture) {
    let store = fixture.store();
    let mut work = store.begin();
    let mut brittle = work.create_with_key::<Brittle>("b").await.unwrap();
    work.record(&mut brittle, BrittleEvent::Happened).unwrap();
    let record = || {
        let events = [BrittleEvent::Happened, BrittleEvent::Broke, BrittleEvent::Happened];
        work.record_all(&mut brittle, events)
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(record)).unwrap_err();
    assert_eq!((brittle.events, brittle.sequence()), (1, at(1)));
    work.record(&mut brittle, BrittleEvent::Happened).unwrap();
    let receipt = work.commit().await.unwrap();
    assert_eq!(receipt.sequence_of(brittle.id()), Some(at(2)));
    assert_eq!(store.load::<Brittle>("b").await.unwrap().events, 2);
}

async fn assert_is_healthy(store: &EventStore) {
    store.update_or_create::<Account, _, _>("healthy", |_| [deposited(1)]).await.unwrap();
    assert_eq!(store.load::<Account>("healthy").await.unwrap().balance, 1);
}

pub(crate) async fn a_stale_guard_is_a_conflict_and_writes_nothing(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (read, written) = (grown(&engine, "user", 3).await, grown(&engine, "user", 1).await);
    let before = everything(&engine).await;
    for wrong in [0, 2, 4] {
        let error =
            unit().guard(read, wrong).append(written, "user", 1, 1).commit(&engine).await.unwrap_err();
        match error.kind() {
            ErrorKind::Conflict { aggregate, expected, actual, .. } => {
                assert_eq!((*aggregate, *expected, *actual), (read, at(wrong), at(3)));
            }
            _ => panic!("expected a conflict, was {error:?}"),
        }
    }
    assert_eq!(everything(&engine).await, before);
    assert_eq!(sequence_of(&engine, written).await, 1);
}

pub(crate) async fn a_guard_that_holds_lets_the_unit_through(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (read, written) = (grown(&engine, "user", 3).await, grown(&engine, "user", 1).await);
    let receipt = unit().guard(read, 3).append(written, "user", 1, 1).commit(&engine).await.unwrap();
    assert_eq!(receipt.aggregates, [(written, at(2))]);
    unit().guard(written, 2).append(written, "user", 2, 1).commit(&engine).await.unwrap();
    assert_eq!(sequence_of(&engine, written).await, 3);
}

pub(crate) async fn a_guard_alone_is_checked(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 2).await;
    unit().guard(id, 2).commit(&engine).await.unwrap();
    assert_kind!(unit().guard(id, 1).commit(&engine).await, ErrorKind::Conflict { .. });
}

pub(crate) async fn a_guard_on_an_aggregate_that_the_batch_makes_is_at_zero(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    unit().create(id, "user").guard(id, 0).append(id, "user", 0, 2).commit(&engine).await.unwrap();
    assert_eq!(sequence_of(&engine, id).await, 2);
}

/// Two doctors are on call. Each may leave if the other one stays.
async fn two_doctors(store: &EventStore, round: usize) -> [String; 2] {
    let names = [format!("doctor {round}a"), format!("doctor {round}b")];
    for name in &names {
        store.update_or_create::<Account, _, _>(name, |_| [deposited(1)]).await.unwrap();
    }
    names
}

async fn leave(store: &EventStore, me: &str, other: &str, is_guarded: bool) -> evercore_core::Result<()> {
    let mut work = store.begin();
    let mut mine = work.load::<Account>(me).await?;
    let theirs = work.load::<Account>(other).await?;
    if is_guarded {
        work.guard(&theirs).unwrap();
    }
    if theirs.balance == 1 {
        work.record(&mut mine, AccountEvent::Withdrawn { amount: 1 })?;
    }
    work.commit().await.map(|_| ())
}

async fn on_call(store: &EventStore, names: &[String; 2]) -> i64 {
    store.load::<Account>(&names[0]).await.unwrap().balance
        + store.load::<Account>(&names[1]).await.unwrap().balance
}

pub(crate) async fn write_skew_is_prevented_by_guards(fixture: &mut Fixture) {
    let store = fixture.store();
    let names = two_doctors(&store, 0).await;
    let (mut one, mut two) = (store.begin(), store.begin());
    for (work, me, other) in [(&mut one, 0, 1), (&mut two, 1, 0)] {
        let mut mine = work.load::<Account>(&names[me]).await.unwrap();
        let theirs = work.load::<Account>(&names[other]).await.unwrap();
        work.guard(&theirs).unwrap();
        work.record(&mut mine, AccountEvent::Withdrawn { amount: 1 }).unwrap();
    }
    one.commit().await.unwrap();
    assert!(two.commit().await.unwrap_err().is_conflict());
    assert_eq!(on_call(&store, &names).await, 1);
}

pub(crate) async fn write_skew_is_possible_without_guards(fixture: &mut Fixture) {
    let store = fixture.store();
    let names = two_doctors(&store, 0).await;
    let (mut one, mut two) = (store.begin(), store.begin());
    for (work, me, other) in [(&mut one, 0, 1), (&mut two, 1, 0)] {
        let mut mine = work.load::<Account>(&names[me]).await.unwrap();
        work.load::<Account>(&names[other]).await.unwrap();
        work.record(&mut mine, AccountEvent::Withdrawn { amount: 1 }).unwrap();
    }
    one.commit().await.unwrap();
    two.commit().await.unwrap();
    assert_eq!(on_call(&store, &names).await, 0);
}

pub(crate) async fn racing_guards_never_let_both_through(fixture: &mut Fixture) {
    let store = fixture.store();
    for round in 0..20 {
        let names = two_doctors(&store, round).await;
        fixture.threads(2, async |me| {
            if let Err(error) = leave(&store, &names[me], &names[1 - me], true).await {
                assert!(error.is_conflict(), "{error:?}");
            }
        });
        assert!(on_call(&store, &names).await >= 1, "round {round}: nobody is on call");
    }
}

pub(crate) async fn a_retry_runs_again_on_fresh_state(fixture: &mut Fixture) {
    let store = fixture.store();
    store.update_or_create::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    let runs = AtomicU32::new(0);
    let receipt = store
        .retry(async || {
            let mut work = store.begin();
            let mut account = work.load::<Account>("ann").await?;
            if runs.fetch_add(1, Ordering::SeqCst) == 0 {
                store.update::<Account, _, _>("ann", |_| [deposited(10)]).await?;
            }
            let doubled = deposited(account.balance);
            work.record(&mut account, doubled)?;
            work.commit().await
        })
        .await
        .unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 2);
    assert_eq!(receipt.last, place(3));
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 22);
}

fn brief(attempts: u32) -> RetryPolicy {
    let pauses = (Duration::from_micros(10), Duration::from_micros(100));
    RetryPolicy::new().with_attempts(attempts).with_pauses(pauses.0, pauses.1)
}

pub(crate) async fn a_retry_is_bounded(fixture: &mut Fixture) {
    let store = fixture.store().with_retry(brief(5));
    let id = grown(&fixture.engine(), "account", 0).await;
    let runs = AtomicU32::new(0);
    let result: evercore_core::Result<()> = store
        .retry(async || {
            runs.fetch_add(1, Ordering::SeqCst);
            Err(Error::conflict(id, at(0), at(1)))
        })
        .await;
    assert_kind!(result, ErrorKind::Conflict { .. });
    assert_eq!(runs.load(Ordering::SeqCst), 5);
}

#[derive(Debug, PartialEq)]
struct TooPoor;

impl fmt::Display for TooPoor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too poor")
    }
}

impl std::error::Error for TooPoor {}

pub(crate) async fn the_users_own_errors_are_not_tried_again(fixture: &mut Fixture) {
    let store = fixture.store();
    store.load_or_create::<Account>("ann").await.unwrap();
    let mut runs = 0;
    let result = store
        .update::<Account, _, _>("ann", |_| {
            runs += 1;
            Err::<[AccountEvent; 0], _>(TooPoor)
        })
        .await;
    assert_eq!(runs, 1);
    let error = result.unwrap_err();
    assert_eq!((error.kind(), error.cause::<TooPoor>()), (&ErrorKind::Rejected, Some(&TooPoor)));
    let runs = AtomicU32::new(0);
    let result: evercore_core::Result<()> = store
        .retry(async || {
            runs.fetch_add(1, Ordering::SeqCst);
            Err(Error::rejected(TooPoor))
        })
        .await;
    assert_kind!(result, ErrorKind::Rejected);
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

pub(crate) async fn an_invalid_state_is_not_staged_and_leaves_the_aggregate_as_before(fixture: &mut Fixture) {
    let store = fixture.store();
    let mut work = store.begin();
    let mut account = work.create_with_key::<Account>("ann").await.unwrap();
    work.record(&mut account, deposited(5)).unwrap();
    let events = [deposited(1), AccountEvent::Withdrawn { amount: 7 }, deposited(100)];
    let error = work.record_all(&mut account, events).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::InvalidState);
    let source: &dyn std::error::Error = std::error::Error::source(&error).expect("the reason");
    assert_eq!(source.to_string(), BoxError::from("an account is not overdrawn").to_string());
    assert_eq!((account.balance, account.sequence()), (5, at(1)));
    work.record(&mut account, AccountEvent::Withdrawn { amount: 5 }).unwrap();
    work.commit().await.unwrap();
    let account = store.load::<Account>("ann").await.unwrap();
    assert_eq!((account.balance, account.sequence()), (0, at(2)));
}

pub(crate) async fn racing_updates_all_count(fixture: &mut Fixture) {
    let store = fixture.store().with_retry(RetryPolicy::new().with_attempts(1_000));
    fixture.threads(16, async |_| {
        for _ in 0..4 {
            store.update_or_create::<Account, _, _>("hot", |_| [deposited(1)]).await.unwrap();
        }
    });
    let account = store.load::<Account>("hot").await.unwrap();
    assert_eq!((account.balance, account.sequence()), (64, at(64)));
}

pub(crate) async fn a_decision_without_events_writes_nothing(fixture: &mut Fixture) {
    let store = fixture.store();
    store.load_or_create::<Account>("ann").await.unwrap();
    store.update::<Account, _, _>("ann", |_| None).await.unwrap();
    assert_eq!(log(&fixture.engine()).await.len(), 0);
}

pub(crate) async fn one_event_may_override_the_metadata_of_its_unit(fixture: &mut Fixture) {
    let store = fixture.store();
    let time = |micros| Timestamp::from_micros(micros).unwrap();
    let of_unit = Metadata::new().with_time(time(1)).with_reference("unit").unwrap();
    let of_unit = of_unit.with_header("a", "unit").unwrap().with_correlation_id("talk").unwrap();
    let of_event = Metadata::new().with_time(time(2)).with_reference("event").unwrap();
    let of_event = of_event.with_header("b", "event").unwrap();
    let mut work = store.begin();
    work.set_metadata(of_unit).unwrap();
    let mut account = work.create::<Account>().await.unwrap();
    work.record(&mut account, deposited(1)).unwrap();
    work.record_with(&mut account, deposited(2), &of_event).unwrap();
    work.commit().await.unwrap();
    let events = log(&fixture.engine()).await;
    let (first, second) = (&events[0], &events[1]);
    assert_eq!((first.time(), first.reference(), first.headers().len()), (time(1), Some("unit"), 1));
    assert_eq!((second.time(), second.reference(), second.headers().len()), (time(2), Some("event"), 2));
    assert!(
        events.iter().all(|event| event.correlation_id() == Some("talk") && event.causation_id().is_none())
    );
    assert_eq!(second.decode::<Account>().unwrap(), deposited(2));
}

pub(crate) async fn a_handle_of_a_repeated_command_is_not_committed(fixture: &mut Fixture) {
    let store = fixture.store();
    store.update_or_create::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    let mut handles = Vec::new();
    for _ in 0..2 {
        let mut work = store.begin();
        work.set_command(CommandId::new("request 1").unwrap());
        let mut account = work.load::<Account>("ann").await.unwrap();
        work.record(&mut account, deposited(10)).unwrap();
        work.commit().await.unwrap();
        handles.push(account);
    }
    let mut work = store.begin();
    work.record(&mut handles[0], deposited(100)).unwrap();
    work.commit().await.unwrap();
    // The second handle contains the deposit of 10 twice. The sequences agree now, so only its unit can refuse it.
    let mut work = store.begin();
    assert_kind!(work.record(&mut handles[1], deposited(1_000)), ErrorKind::Invalid);
    assert_kind!(work.change_key(&mut handles[1], "another key"), ErrorKind::Invalid);
}

pub(crate) async fn a_guard_on_what_never_was_does_not_hold(fixture: &mut Fixture) {
    let store = fixture.store();
    store.update_or_create::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    let mut failed = store.begin();
    let mut phantom = failed.load::<Account>("ann").await.unwrap();
    failed.record(&mut phantom, deposited(1_000)).unwrap();
    store.update::<Account, _, _>("ann", |_| [deposited(2)]).await.unwrap();
    assert!(failed.commit().await.unwrap_err().is_conflict());

    let mut work = store.begin();
    assert_kind!(work.guard(&phantom), ErrorKind::Invalid);
}

pub(crate) async fn a_handle_is_good_for_every_engine_on_the_same_storage(fixture: &mut Fixture) {
    let (engine, further) = (fixture.engine(), fixture.further().await);
    assert_eq!(engine.identity(), further.identity());
    let (store, other) = (EventStore::shared(engine), EventStore::shared(further));
    store.update_or_create::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    let mut account = store.load::<Account>("ann").await.unwrap();
    let mut work = other.begin();
    work.record(&mut account, deposited(2)).unwrap();
    work.commit().await.unwrap();
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 3);
}

pub(crate) async fn a_guard_on_an_older_read_is_a_conflict(fixture: &mut Fixture) {
    let store = fixture.store();
    store.update_or_create::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    let old = store.load::<Account>("ann").await.unwrap();
    store.update::<Account, _, _>("ann", |_| [deposited(2)]).await.unwrap();
    let mut work = store.begin();
    let mut fresh = work.load::<Account>("ann").await.unwrap();
    work.record(&mut fresh, deposited(4)).unwrap();
    work.guard(&old).unwrap();
    assert!(work.commit().await.unwrap_err().is_conflict());
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 3);
}

pub(crate) async fn joined_headers_keep_their_limit(fixture: &mut Fixture) {
    let store = fixture.store();
    let half = "x".repeat(evercore_core::limits::HEADERS_BYTES / 2);
    let mut work = store.begin();
    work.set_metadata(Metadata::new().with_header("unit", half.as_str()).unwrap()).unwrap();
    let mut account = work.create::<Account>().await.unwrap();
    let own = Metadata::new().with_header("event", half).unwrap();
    assert_kind!(work.record_with(&mut account, deposited(1), &own), ErrorKind::Invalid);
    assert_eq!(account.sequence(), at(0));
}

pub(crate) async fn a_lost_race_to_create_is_a_conflict_whatever_else_the_unit_renames(
    fixture: &mut Fixture,
) {
    let store = fixture.store();
    store.load_or_create::<Account>("bob").await.unwrap();
    store.load_or_create::<Account>("taken").await.unwrap();
    let rename = async |created: &str, key: &str, is_raced: bool| {
        let mut work = store.begin();
        work.load_or_create::<Account>(created).await?;
        let mut bob = work.load::<Account>("bob").await?;
        work.change_key(&mut bob, key)?;
        if is_raced {
            store.load_or_create::<Account>(created).await?;
        }
        work.commit().await
    };
    assert!(rename("ann", "robert", true).await.unwrap_err().is_conflict());
    assert_kind!(rename("cid", "taken", false).await, ErrorKind::KeyTaken { .. });
    rename("ann", "robert", false).await.unwrap();
}

pub(crate) async fn updates_of_a_store_with_metadata_carry_it(fixture: &mut Fixture) {
    let store = fixture.store();
    let first = store.with_metadata(Metadata::new().with_reference("clerk 112").unwrap());
    first.update_or_create::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    let cause = log(&fixture.engine()).await.remove(0);
    let second = store.with_metadata(Metadata::new().caused_by(&cause));
    let pay = CommandId::new("pay").unwrap();
    second.update_once::<Account, _, _>(pay, "ann", |_| [deposited(1)]).await.unwrap();
    let effect = log(&fixture.engine()).await.remove(1);
    let third = store.with_metadata(Metadata::new().caused_by(&effect));
    third.update::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    store.update::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    let told: Vec<_> = log(&fixture.engine())
        .await
        .iter()
        .map(|event| {
            let text = |text: Option<&str>| text.unwrap_or("-").to_owned();
            [text(event.reference()), text(event.correlation_id()), text(event.causation_id())].join(" ")
        })
        .collect();
    assert_eq!(told, ["clerk 112 - -", "- 1 1", "- 1 2", "- - -"]);
}

pub(crate) async fn every_guard_is_checked(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let mut ids = Vec::new();
    for _ in 0..40 {
        ids.push(grown(&engine, "user", 1).await);
    }
    let guarded = |stale: usize| {
        let guards = ids.iter().enumerate();
        let batch = guards.fold(unit(), |batch, (place, id)| batch.guard(*id, i64::from(place != stale)));
        batch.key(ids[0], "user", "ann")
    };
    for stale in [0, 1, 3, 15, 39] {
        assert_kind!(guarded(stale).commit(&engine).await, ErrorKind::Conflict { .. });
    }
    assert_eq!(holder(&engine, "user", "ann").await, None);
    guarded(ids.len()).commit(&engine).await.unwrap();
    assert_eq!(holder(&engine, "user", "ann").await, Some(ids[0]));
}

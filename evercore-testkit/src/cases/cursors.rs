//! The stored part of subscriptions: cursors, leases and parked events, step by step.

use std::time::Duration;

use evercore_core::engine::{Advance, Mark, ParkedChange, Step, Witness};
use evercore_core::{
    Cursor, CursorId, CursorStatus, ErrorKind, Failure, Lease, LogQuery, OwnerId, Parked, Position, Result,
    SubscriptionName, Timestamp,
};

use crate::fixture::Fixture;
use crate::tools::*;

const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_millis(30);

fn cursor(name: &str, version: u32, partition: u32) -> CursorId {
    CursorId { subscription: SubscriptionName::new(name).unwrap(), version, partition }
}

fn owner(name: &str) -> OwnerId {
    OwnerId::new(name).unwrap()
}

async fn step(engine: &Engine, id: &CursorId, step: Step) -> Result<Cursor> {
    engine.step(id, &step).await.map(|cursor| cursor.expect("the cursor is there"))
}

/// A cursor at the beginning of a log. The log has this length, because no cursor moves past its end.
async fn declared(engine: &Engine, name: &str) -> CursorId {
    let id = cursor(name, 1, 0);
    grown(engine, "letter", 50).await;
    step(engine, &id, Step::declare(1, Position::ZERO, Some(Position::ZERO))).await.unwrap();
    id
}

async fn claimed(engine: &Engine, id: &CursorId, by: &str, time: Duration) -> Lease {
    let cursor = step(engine, id, Step::claim(owner(by), time)).await.unwrap();
    Lease { owner: owner(by), epoch: cursor.epoch }
}

fn advance(lease: &Lease, from: i64, to: i64) -> Step {
    Step::Advance(Advance::new(lease.clone(), place(from), place(to), LONG))
}

fn parked_at(position: i64) -> Parked {
    Parked {
        position: place(position),
        aggregate: evercore_core::AggregateId::new(7).unwrap(),
        holds_back: true,
        attempts: 3,
        error: "it \u{fffd} said 'no'; DROP TABLE cursors".to_owned(),
        parked_at: Timestamp::from_micros(1_700_000_000_123_456).unwrap(),
        is_due: false,
    }
}

async fn all_parked(engine: &Engine, id: &CursorId) -> Vec<Parked> {
    engine.parked(id, Position::ZERO, 100).await.unwrap()
}

async fn the(engine: &Engine, id: &CursorId) -> Cursor {
    let all = engine.cursors(Some(&id.subscription)).await.unwrap().cursors;
    all.into_iter().find(|cursor| cursor.id == *id).expect("the cursor is there")
}

pub(crate) async fn a_cursor_is_made_once(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = cursor("mails", 1, 0);
    assert_kind!(step(&engine, &id, Step::claim(owner("a"), LONG)).await, ErrorKind::NotFound);
    let made = step(&engine, &id, Step::declare(1, place(5), None)).await.unwrap();
    assert_eq!((made.position, made.epoch, made.owner.clone(), made.live_from), (place(5), 0, None, None));
    assert_eq!(made.status, CursorStatus::Active);
    let again = step(&engine, &id, Step::declare(1, place(9), Some(place(9)))).await.unwrap();
    assert_eq!(again, made, "one that is there stays as it is");
    assert_kind!(step(&engine, &id, Step::declare(2, place(5), None)).await, ErrorKind::Invalid);
    assert_eq!(the(&engine, &id).await, made);
}

pub(crate) async fn cursors_are_listed_in_order_with_the_engines_time(fixture: &mut Fixture) {
    let engine = fixture.engine();
    for (name, version, partition) in [("b", 1, 0), ("a", 10, 1), ("a", 10, 0), ("a", 2, 0), ("B", 1, 0)] {
        step(&engine, &cursor(name, version, partition), Step::declare(2, place(1), None)).await.unwrap();
    }
    let listed = engine.cursors(None).await.unwrap();
    let ids: Vec<CursorId> = listed.cursors.into_iter().map(|cursor| cursor.id).collect();
    let expected = [("B", 1, 0), ("a", 2, 0), ("a", 10, 0), ("a", 10, 1), ("b", 1, 0)];
    assert_eq!(ids, expected.map(|(name, version, partition)| cursor(name, version, partition)));
    let distance = listed.now.since(Timestamp::now()).max(Timestamp::now().since(listed.now));
    assert!(distance < Duration::from_secs(60), "{distance:?}");
    let one = engine.cursors(Some(&SubscriptionName::new("a").unwrap())).await.unwrap().cursors;
    assert_eq!(one.len(), 3);
    assert!(engine.cursors(Some(&SubscriptionName::new("c").unwrap())).await.unwrap().cursors.is_empty());
}

pub(crate) async fn a_claim_is_refused_while_another_has_the_lease(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    claimed(&engine, &id, "first", LONG).await;
    assert_kind!(step(&engine, &id, Step::claim(owner("second"), LONG)).await, ErrorKind::AlreadyOwned);
    assert_eq!(the(&engine, &id).await.owner, Some(owner("first")));
}

pub(crate) async fn every_claim_raises_the_epoch_also_for_the_same_owner(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let first = claimed(&engine, &id, "same", LONG).await;
    let second = claimed(&engine, &id, "same", LONG).await;
    assert_eq!((first.epoch, second.epoch), (1, 2));
    assert_kind!(step(&engine, &id, advance(&first, 0, 1)).await, ErrorKind::LeaseLost);
    step(&engine, &id, Step::release(second)).await.unwrap();
    assert_eq!(claimed(&engine, &id, "other", LONG).await.epoch, 3);
}

pub(crate) async fn lost_leases_are_counted_until_the_cursor_moves(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lost = async || the(&engine, &id).await.lost_leases;
    let claims = std::cell::Cell::new(0);
    let lose = async || {
        claims.set(claims.get() + 1);
        let lease = claimed(&engine, &id, &format!("owner {}", claims.get()), SHORT).await;
        engine.pause(SHORT * 2).await;
        lease
    };
    lose().await;
    assert_eq!(lost().await, 0, "nobody had it before");
    lose().await;
    lose().await;
    let lease = claimed(&engine, &id, "owner 3", LONG).await;
    assert_eq!(lost().await, 2, "the same owner is still there, and has not lost it to another");
    step(&engine, &id, Step::renew(lease.clone(), LONG)).await.unwrap();
    assert_eq!(lost().await, 2, "the owner may still be at the event");
    let moved = Advance::new(lease, place(0), place(1), SHORT);
    step(&engine, &id, Step::Advance(moved)).await.unwrap();
    assert_eq!(lost().await, 0);
    engine.pause(SHORT * 2).await;
    step(&engine, &id, Step::renew_idle(lose().await, SHORT)).await.unwrap();
    assert_eq!(lost().await, 0, "an idle owner has no event that could be at fault");
    engine.pause(SHORT * 2).await;
    step(&engine, &id, Step::release(lose().await)).await.unwrap();
    lose().await;
    assert_eq!(lost().await, 1, "a lease that was given back is not lost");
    step(&engine, &id, Step::Resume).await.unwrap();
    assert_eq!(lost().await, 0);
    lose().await;
    let failure = Failure { position: place(2), attempts: 4, error: "no".to_owned() };
    step(&engine, &id, Step::fail(lose().await, failure, Duration::ZERO)).await.unwrap();
    assert_eq!(lost().await, 0, "the failure counts the attempts from here on");
    lose().await;
    lose().await;
    step(&engine, &id, Step::reset(place(3))).await.unwrap();
    assert_eq!(lost().await, 0);
}

pub(crate) async fn a_reported_failure_leaves_the_lease(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "first", LONG).await;
    let failure = Failure { position: place(2), attempts: 2, error: "not yet".to_owned() };
    let reported = step(&engine, &id, Step::report(lease.clone(), failure.clone())).await.unwrap();
    assert_eq!((reported.failure, reported.owner), (Some(failure.clone()), Some(owner("first"))));
    step(&engine, &id, advance(&lease, 0, 1)).await.unwrap();
    assert_eq!(the(&engine, &id).await.failure, Some(failure.clone()));
    step(&engine, &id, advance(&lease, 1, 2)).await.unwrap();
    assert_eq!(the(&engine, &id).await.failure, None);
    claimed(&engine, &id, "first", LONG).await;
    assert_kind!(step(&engine, &id, Step::report(lease, failure)).await, ErrorKind::LeaseLost);
}

pub(crate) async fn a_lease_that_has_expired_is_taken_over(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let first = claimed(&engine, &id, "first", SHORT).await;
    engine.pause(SHORT * 2).await;
    let second = claimed(&engine, &id, "second", LONG).await;
    assert_eq!(second.epoch, first.epoch + 1);
    // The owner that slept comes back.
    assert_kind!(step(&engine, &id, advance(&first, 0, 3)).await, ErrorKind::LeaseLost);
    assert_kind!(step(&engine, &id, Step::renew(first.clone(), LONG)).await, ErrorKind::LeaseLost);
    step(&engine, &id, Step::release(first)).await.unwrap();
    let now = the(&engine, &id).await;
    assert_eq!((now.position, now.owner), (Position::ZERO, Some(owner("second"))));
}

pub(crate) async fn a_lease_that_is_renewed_lasts(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "first", SHORT).await;
    step(&engine, &id, Step::renew(lease.clone(), LONG)).await.unwrap();
    engine.pause(SHORT * 2).await;
    assert_kind!(step(&engine, &id, Step::claim(owner("second"), LONG)).await, ErrorKind::AlreadyOwned);
    step(&engine, &id, Step::release(lease)).await.unwrap();
    claimed(&engine, &id, "second", LONG).await;
}

pub(crate) async fn a_move_renews_the_lease(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "first", SHORT).await;
    step(&engine, &id, advance(&lease, 0, 2)).await.unwrap();
    engine.pause(SHORT * 2).await;
    assert_kind!(step(&engine, &id, Step::claim(owner("second"), LONG)).await, ErrorKind::AlreadyOwned);
}

pub(crate) async fn a_cursor_moves_from_where_it_stands_and_never_back(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "first", LONG).await;
    step(&engine, &id, advance(&lease, 0, 10)).await.unwrap();
    for (from, to) in [(0, 20), (9, 20), (11, 20), (10, 9)] {
        assert_kind!(step(&engine, &id, advance(&lease, from, to)).await, ErrorKind::LeaseLost);
    }
    assert_eq!(the(&engine, &id).await.position, place(10));
    step(&engine, &id, advance(&lease, 10, 10)).await.unwrap();
    step(&engine, &id, advance(&lease, 10, 50)).await.unwrap();
    assert_eq!(the(&engine, &id).await.position, place(50));
}

/// A step names the event that was read, because other events may have replaced it.
pub(crate) async fn a_move_that_read_another_event_is_refused(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "first", LONG).await;
    let page = engine.read_log(&LogQuery::after(place(0)).with_limit(events_per_page(20))).await.unwrap();
    let read = page.witness().expect("a page that was read forward");
    assert_eq!(read.position, place(20));
    let other = Witness::new(read.position, Mark::new(read.mark.get().wrapping_add(1)));
    let gone = Witness::new(place(51), read.mark);
    let to = |to: i64, read: Witness| {
        Step::Advance(Advance::new(lease.clone(), place(0), place(to), LONG).having_read(read))
    };
    for lost in [other, gone] {
        assert_kind!(step(&engine, &id, to(10, lost)).await, ErrorKind::TailLost { .. });
    }
    assert_kind!(step(&engine, &id, to(21, read)).await, ErrorKind::Invalid);
    assert_eq!(the(&engine, &id).await.position, place(0));
    assert_eq!(step(&engine, &id, to(10, read)).await.unwrap().position, place(10));
}

/// A log that lost its tail in a failover must not have a cursor past its end: the cursor would skip the next events.
pub(crate) async fn a_cursor_does_not_move_past_the_end_of_the_log(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "first", LONG).await;
    for to in [51, i64::MAX] {
        assert_kind!(step(&engine, &id, advance(&lease, 0, to)).await, ErrorKind::TailLost { .. });
        let parks = vec![ParkedChange::Keep(parked_at(to))];
        let parks = Advance::new(lease.clone(), place(0), place(to), LONG).with_parked(parks);
        let parked = step(&engine, &id, Step::Advance(parks)).await;
        assert_kind!(parked, ErrorKind::TailLost { .. });
    }
    assert_eq!((the(&engine, &id).await.position, all_parked(&engine, &id).await), (place(0), Vec::new()));
    grown(&engine, "letter", 1).await;
    step(&engine, &id, advance(&lease, 0, 51)).await.unwrap();
}

pub(crate) async fn of_racing_claims_one_wins(fixture: &mut Fixture) {
    let engine = fixture.engine();
    race_for_claims(fixture, &[engine.clone(), engine]).await;
}

pub(crate) async fn of_racing_claims_one_wins_whichever_engine_it_came_by(fixture: &mut Fixture) {
    let engines = [fixture.engine(), fixture.further().await];
    race_for_claims(fixture, &engines).await;
}

async fn race_for_claims(fixture: &Fixture, engines: &[Engine; 2]) {
    let engine = &engines[0];
    let id = declared(engine, "mails").await;
    for round in 1..=10 {
        let won = fixture.threads(8, async |number| {
            let claim = Step::claim(owner(&format!("{number}")), LONG);
            match engines[number % 2].step(&id, &claim).await {
                Ok(cursor) => Some(cursor.unwrap().epoch),
                Err(error) => {
                    assert!(matches!(error.kind(), ErrorKind::AlreadyOwned), "{error:?}");
                    None
                }
            }
        });
        let won: Vec<i64> = won.into_iter().flatten().collect();
        assert_eq!(won, [round]);
        let holder = the(engine, &id).await.owner.unwrap();
        step(engine, &id, Step::release(Lease { owner: holder, epoch: round })).await.unwrap();
    }
    // Also side by side on one thread.
    let claims = (0..8).map(|number| Step::claim(owner(&format!("{number}")), LONG));
    let claims: Vec<Step> = claims.collect();
    let won = join_all(claims.iter().map(|claim| engine.step(&id, claim))).await;
    assert_eq!(won.iter().filter(|result| result.is_ok()).count(), 1);
}

pub(crate) async fn racing_declarations_make_one_cursor(fixture: &mut Fixture) {
    let (engine, id) = (fixture.engine(), cursor("mails", 1, 0));
    let made = fixture.threads(8, async |number| {
        step(&engine, &id, Step::declare(1, place(number as i64), None)).await.unwrap()
    });
    assert!(made.windows(2).all(|pair| pair[0] == pair[1]), "{made:?}");
}

pub(crate) async fn racing_moves_are_made_one_after_the_other(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "all", LONG).await;
    let moved = fixture.threads(4, async |_| {
        let mut moved = 0;
        while moved < 10 {
            let from = the(&engine, &id).await.position.get();
            moved += i64::from(step(&engine, &id, advance(&lease, from, from + 1)).await.is_ok());
        }
        moved
    });
    assert_eq!(the(&engine, &id).await.position.get(), moved.into_iter().sum::<i64>());
}

pub(crate) async fn every_field_of_a_cursor_comes_back(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let text = "Ünïcode 🎈 'quoted'; --";
    let id = cursor(text, u32::MAX, 1_023);
    let parked = parked_at(3);
    grown(&engine, "letter", 5).await;
    step(&engine, &id, Step::declare(1_024, place(2), None)).await.unwrap();
    let lease = claimed(&engine, &id, text, LONG).await;
    let keep = vec![ParkedChange::Keep(parked.clone())];
    let moved = Advance::new(lease.clone(), place(2), place(4), LONG).with_parked(keep);
    step(&engine, &id, Step::Advance(moved)).await.unwrap();
    let failed =
        Step::fail(lease, Failure { position: place(5), attempts: u32::MAX, error: text.to_owned() }, LONG);
    let failed = step(&engine, &id, failed).await.unwrap();
    assert_eq!(the(&engine, &id).await, failed);
    assert_eq!(failed.failure.as_ref().map(|failure| failure.error.as_str()), Some(text));
    assert_kind!(step(&engine, &id, Step::claim(owner("next"), LONG)).await, ErrorKind::AlreadyOwned);
    step(&engine, &id, Step::Pause).await.unwrap();
    assert_kind!(step(&engine, &id, Step::claim(owner("next"), LONG)).await, ErrorKind::Paused);
    step(&engine, &id, Step::Resume).await.unwrap();
    let claimed = step(&engine, &id, Step::claim(owner("next"), LONG)).await.unwrap();
    let lease = Lease { owner: owner("next"), epoch: claimed.epoch };
    step(&engine, &id, Step::want(owner("third"), LONG)).await.unwrap();
    let live = step(&engine, &id, Step::go_live(lease, place(4))).await.unwrap();
    assert_eq!((live.wanted_by.clone(), live.live_from), (Some(owner("third")), Some(place(4))));
    assert_eq!(the(&engine, &id).await, live);
    assert_eq!(all_parked(&engine, &id).await, [parked]);
}

pub(crate) async fn parked_events_are_kept_listed_and_forgotten(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (id, other) = (declared(&engine, "mails").await, declared(&engine, "others").await);
    let lease = claimed(&engine, &id, "first", LONG).await;
    let keep = (1..=5).map(|position| ParkedChange::Keep(parked_at(position))).collect();
    step(
        &engine,
        &id,
        Step::Advance(Advance::new(lease.clone(), place(0), place(9), LONG).with_parked(keep)),
    )
    .await
    .unwrap();
    let at = |parked: &[Parked]| parked.iter().map(|it| it.position.get()).collect::<Vec<_>>();
    assert_eq!(at(&all_parked(&engine, &id).await), [1, 2, 3, 4, 5]);
    assert_eq!(at(&engine.parked(&id, place(2), 2).await.unwrap()), [3, 4]);
    assert!(all_parked(&engine, &other).await.is_empty());

    let before = the(&engine, &id).await.parked_changes;
    step(&engine, &id, Step::resume_parked(Some(place(2)))).await.unwrap();
    let due = |parked: Vec<Parked>| at(&parked.into_iter().filter(|it| it.is_due).collect::<Vec<_>>());
    assert_eq!(due(all_parked(&engine, &id).await), [2]);
    step(&engine, &id, Step::resume_parked(None)).await.unwrap();
    assert_eq!(due(all_parked(&engine, &id).await), [1, 2, 3, 4, 5]);
    step(&engine, &id, Step::drop_parked(Some(place(4)))).await.unwrap();
    assert!(the(&engine, &id).await.parked_changes > before);

    let changed = Parked { attempts: 9, holds_back: false, error: String::new(), ..parked_at(3) };
    let changes = vec![ParkedChange::Remove(place(1)), ParkedChange::Keep(changed.clone())];
    step(
        &engine,
        &id,
        Step::Advance(Advance::new(lease.clone(), place(9), place(9), LONG).with_parked(changes)),
    )
    .await
    .unwrap();
    let left = all_parked(&engine, &id).await;
    assert_eq!(at(&left), [2, 3, 5]);
    assert_eq!(left[1], changed);

    // A refused move writes no parked events.
    let refused = Advance::new(lease, place(8), place(10), LONG).with_parked(vec![ParkedChange::RemoveAll]);
    assert_kind!(step(&engine, &id, Step::Advance(refused)).await, ErrorKind::LeaseLost);
    assert_eq!(at(&all_parked(&engine, &id).await), [2, 3, 5]);
    step(&engine, &id, Step::drop_parked(None)).await.unwrap();
    assert!(all_parked(&engine, &id).await.is_empty());
}

pub(crate) async fn a_move_that_knows_less_of_parked_events_is_refused(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "reader").await;
    let lease = claimed(&engine, &id, "owner", LONG).await;
    let keep = vec![ParkedChange::Keep(parked_at(3))];
    let parks = Advance::new(lease.clone(), place(0), place(4), LONG).with_parked(keep.clone());
    let seen = step(&engine, &id, Step::Advance(parks)).await.unwrap().parked_changes;
    step(&engine, &id, Step::drop_parked(None)).await.unwrap();
    for parked in [Vec::new(), keep] {
        let late = Advance::new(lease.clone(), place(4), place(5), LONG).with_parked_seen(seen);
        let late = Step::Advance(late.with_parked(parked));
        assert_kind!(step(&engine, &id, late).await, ErrorKind::LeaseLost);
    }
    let cursor = the(&engine, &id).await;
    assert_eq!((cursor.position, all_parked(&engine, &id).await), (place(4), Vec::new()));
    let now = Advance::new(lease, place(4), place(5), LONG).with_parked_seen(cursor.parked_changes);
    assert_eq!(step(&engine, &id, Step::Advance(now)).await.unwrap().position, place(5));
}

pub(crate) async fn a_reset_takes_the_lease_and_forgets_what_was_parked(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "first", LONG).await;
    let keep = vec![ParkedChange::Keep(parked_at(3))];
    step(
        &engine,
        &id,
        Step::Advance(Advance::new(lease.clone(), place(0), place(9), LONG).with_parked(keep)),
    )
    .await
    .unwrap();
    let reset = step(&engine, &id, Step::reset(place(4))).await.unwrap();
    assert_eq!((reset.position, reset.live_from, reset.owner), (place(4), Some(place(9)), None));
    assert!(reset.epoch > lease.epoch);
    assert_kind!(step(&engine, &id, advance(&lease, 4, 5)).await, ErrorKind::LeaseLost);
    assert!(all_parked(&engine, &id).await.is_empty());
    claimed(&engine, &id, "second", LONG).await;
}

pub(crate) async fn a_retired_or_removed_cursor_is_nobodys(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "first", LONG).await;
    let retired = step(&engine, &id, Step::Retire).await.unwrap();
    assert_eq!(retired.status, CursorStatus::Retired);
    assert_eq!(step(&engine, &id, Step::Retire).await.unwrap(), retired, "again is harmless");
    for refused in [advance(&lease, 0, 1), Step::claim(owner("b"), LONG), Step::Pause, Step::reset(place(0))]
    {
        assert_kind!(step(&engine, &id, refused).await, ErrorKind::Superseded);
    }
    assert!(engine.step(&id, &Step::Remove).await.unwrap().is_none());
    assert_kind!(engine.step(&id, &Step::Remove).await, ErrorKind::NotFound);
    assert!(engine.cursors(None).await.unwrap().cursors.is_empty());
    assert_eq!(step(&engine, &id, Step::declare(3, place(0), None)).await.unwrap().epoch, 0);
}

pub(crate) async fn cursors_and_parked_events_survive_reopening(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "first", LONG).await;
    let keep = vec![ParkedChange::Keep(parked_at(3))];
    step(&engine, &id, Step::Advance(Advance::new(lease, place(0), place(9), LONG).with_parked(keep)))
        .await
        .unwrap();
    let before = the(&engine, &id).await;
    drop(engine);
    let engine = fixture.reopen().await;
    assert_eq!(the(&engine, &id).await, before);
    assert_eq!(all_parked(&engine, &id).await, [parked_at(3)]);
    assert_kind!(step(&engine, &id, Step::claim(owner("second"), LONG)).await, ErrorKind::AlreadyOwned);
}

pub(crate) async fn a_step_dropped_at_any_await_is_whole_or_absent(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = declared(&engine, "mails").await;
    let lease = claimed(&engine, &id, "first", LONG).await;
    for polls in 0..30 {
        let from = settled(&engine, &id).await.0;
        let keep = vec![ParkedChange::Keep(parked_at(from + 1))];
        let moved =
            Step::Advance(Advance::new(lease.clone(), place(from), place(from + 1), LONG).with_parked(keep));
        let ended = poll_at_most(polls, engine.step(&id, &moved)).await.is_some();
        let (position, parked) = settled(&engine, &id).await;
        assert!(position == from || position == from + 1);
        assert_eq!(parked, position, "as many parked events as moves");
        assert!(!ended || position == from + 1);
    }
}

/// Position and number of parked events at one moment. A step that was dropped may still be running, and end before,
/// during or after this.
async fn settled(engine: &Engine, id: &CursorId) -> (i64, i64) {
    let position =
        async || step(engine, id, Step::want(owner("nobody"), SHORT)).await.unwrap().position.get();
    loop {
        let (before, parked) = (position().await, all_parked(engine, id).await.len() as i64);
        if position().await == before {
            return (before, parked);
        }
    }
}

pub(crate) async fn each_cursor_has_its_own_parked_events_in_order(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "letter", 50).await;
    let ids = [cursor("mails", 1, 0), cursor("mails", 1, 1), cursor("mails", 2, 0), cursor("mail", 1, 0)];
    let mut leases = Vec::new();
    for (number, id) in (1..).zip(&ids) {
        step(&engine, id, Step::declare(2, Position::ZERO, None)).await.unwrap();
        let lease = claimed(&engine, id, "owner", LONG).await;
        // Not in order, and in several steps.
        for (from, positions) in [(0, [30, 9, 10]), (40, [21, 3, 1])] {
            let keep = |position| {
                let error = format!("{number} {position}");
                ParkedChange::Keep(Parked { error, ..parked_at(position) })
            };
            let moved = Advance::new(lease.clone(), place(from), place(40 + from / 40), LONG);
            let moved = moved.with_parked(positions.map(keep).to_vec());
            step(&engine, id, Step::Advance(moved)).await.unwrap();
        }
        leases.push(lease);
    }
    let parked = async |id: &CursorId| {
        let all = all_parked(&engine, id).await;
        all.into_iter().map(|it| (it.position.get(), it.error, it.is_due)).collect::<Vec<_>>()
    };
    let of = |number: usize| {
        [1, 3, 9, 10, 21, 30].map(|position| (position, format!("{number} {position}"), false))
    };
    for (number, id) in (1..).zip(&ids) {
        assert_eq!(parked(id).await, of(number));
        let two = engine.parked(id, place(9), 2).await.unwrap();
        assert_eq!(two.iter().map(|it| it.position.get()).collect::<Vec<_>>(), [10, 21]);
    }
    // A change of one cursor changes no other.
    step(&engine, &ids[0], Step::resume_parked(None)).await.unwrap();
    step(&engine, &ids[0], Step::drop_parked(Some(place(3)))).await.unwrap();
    step(&engine, &ids[1], Step::drop_parked(None)).await.unwrap();
    let remove = vec![ParkedChange::Remove(place(1)), ParkedChange::Remove(place(30))];
    let moved = Advance::new(leases[2].clone(), place(41), place(42), LONG).with_parked(remove);
    step(&engine, &ids[2], Step::Advance(moved)).await.unwrap();
    assert!(parked(&ids[0]).await.iter().all(|it| it.2) && parked(&ids[0]).await.len() == 5);
    assert!(parked(&ids[1]).await.is_empty());
    assert_eq!(parked(&ids[2]).await.len(), 4);
    assert_eq!(parked(&ids[3]).await, of(4));
    // Removing a cursor removes its parked events. Declared again, it has none.
    engine.step(&ids[3], &Step::Remove).await.unwrap();
    step(&engine, &ids[3], Step::declare(2, Position::ZERO, None)).await.unwrap();
    assert!(parked(&ids[3]).await.is_empty());
    assert_eq!(parked(&ids[2]).await.len(), 4);
}

pub(crate) async fn a_backlog_tells_what_each_cursor_has_to_do(fixture: &mut Fixture) {
    let engine = fixture.engine();
    assert!(engine.backlogs(None).await.unwrap().backlogs.is_empty());
    grown(&engine, "letter", 50).await;
    let ids = [cursor("mail", 1, 0), cursor("mails", 1, 0), cursor("mails", 1, 1), cursor("mails", 2, 0)];
    let many: Vec<i64> = (1..=30).collect();
    let parked: [&[i64]; 4] = [&[7], &[30, 9, 10], &[], &many];
    for (id, (parked, to)) in ids.iter().zip(parked.iter().zip([50, 30, 0, 49])) {
        step(&engine, id, Step::declare(2, Position::ZERO, None)).await.unwrap();
        let lease = claimed(&engine, id, "owner", LONG).await;
        let keep = |position: &i64| {
            let parked_at = Timestamp::from_micros(1_000_000 + position).unwrap();
            ParkedChange::Keep(Parked { parked_at, ..self::parked_at(*position) })
        };
        let moved = Advance::new(lease, place(0), place(to), LONG);
        let moved = moved.with_parked(parked.iter().map(keep).collect());
        step(&engine, id, Step::Advance(moved)).await.unwrap();
    }
    let log: Vec<_> = engine.read_log(&LogQuery::after(place(0))).await.unwrap().events.iter().collect();
    let at = |position: usize| log.get(position - 1).map(|event| event.recorded_at());
    let time = |micros: i64| Some(Timestamp::from_micros(1_000_000 + micros).unwrap());
    let expected = [(None, 1, time(7)), (at(31), 3, time(9)), (at(1), 0, None), (at(50), 30, time(1))];

    let all = engine.backlogs(None).await.unwrap();
    assert_eq!(all.head, place(50));
    let cursors = engine.cursors(None).await.unwrap();
    let listed: Vec<_> = all.backlogs.iter().map(|it| it.cursor.clone()).collect();
    assert_eq!(listed, cursors.cursors);
    assert!(all.now <= cursors.now && cursors.now.since(all.now) < LONG);
    let found: Vec<_> =
        all.backlogs.iter().map(|it| (it.next_recorded_at, it.parked, it.oldest_parked_at)).collect();
    assert_eq!(found, expected);
    let some = engine.backlogs(Some(&SubscriptionName::new("mails").unwrap())).await.unwrap();
    assert_eq!((some.backlogs, some.head), (all.backlogs[1..].to_vec(), place(50)));
}

pub(crate) async fn cursors_are_listed_by_the_whole_name(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let long = |last: &str| "n".repeat(evercore_core::limits::NAME_BYTES - 1) + last;
    let names = [
        "mails",
        "mail",
        "mails 2",
        "Mails",
        "mail%",
        "mail_",
        "m",
        " mails",
        "caf\u{e9}",
        "cafe\u{301}",
        &long("a"),
        &long("b"),
    ];
    for (number, name) in names.iter().enumerate() {
        let id = cursor(name, 1, 0);
        step(&engine, &id, Step::declare(1, place(number as i64), None)).await.unwrap();
        step(&engine, &cursor(name, 2, 0), Step::declare(1, place(number as i64), None)).await.unwrap();
        if number % 2 == 0 {
            step(&engine, &id, Step::claim(owner(name), LONG)).await.unwrap();
        }
    }
    for (number, name) in names.iter().enumerate() {
        let found = engine.cursors(Some(&SubscriptionName::new(name).unwrap())).await.unwrap().cursors;
        let found: Vec<_> = found.into_iter().map(|it| (it.id, it.position.get(), it.owner)).collect();
        let owner = (number % 2 == 0).then(|| owner(name));
        let number = number as i64;
        assert_eq!(found, [(cursor(name, 1, 0), number, owner), (cursor(name, 2, 0), number, None)]);
    }
    assert_eq!(engine.cursors(None).await.unwrap().cursors.len(), 2 * names.len());
}

pub(crate) async fn every_step_is_kept_with_all_that_came_of_it(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (id, other) = (declared(&engine, "mails").await, declared(&engine, "others").await);
    let untouched = the(&engine, &other).await;
    let mut lease = claimed(&engine, &id, "owner", LONG).await;
    let failure =
        |position, error: &str| Failure { position: place(position), attempts: 1, error: error.to_owned() };
    for nth in 0..16 {
        let from = the(&engine, &id).await.position.get();
        let taken = match nth {
            0 => advance(&lease, from, 7),
            1 => Step::renew(lease.clone(), LONG * 2),
            2 => Step::want(owner("second"), LONG),
            3 => Step::go_live(lease.clone(), place(3)),
            4 => Step::fail(lease.clone(), failure(9, ""), LONG),
            5 | 7 | 11 => Step::Resume,
            6 | 10 => Step::Pause,
            8 => Step::claim(owner("second"), LONG),
            9 => advance(&lease, from, 8),
            12 => Step::reset(place(2)),
            13 => Step::resume_parked(None),
            14 => Step::release(lease.clone()),
            _ => Step::Retire,
        };
        let answer = step(&engine, &id, taken.clone()).await.unwrap();
        if let (Step::Claim { .. }, Some(owner)) = (&taken, &answer.owner) {
            lease = Lease { owner: owner.clone(), epoch: answer.epoch };
        }
        assert_eq!(the(&engine, &id).await, answer, "after {taken:?}");
        assert_eq!(the(&engine, &other).await, untouched, "after {taken:?}");
    }
    assert_eq!(the(&engine, &id).await.status, CursorStatus::Retired);
}

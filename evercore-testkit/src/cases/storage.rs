//! Durability: reopening a store and recovering from a crash lose nothing.

use std::time::{Duration, Instant};

use evercore_core::engine::{Advance, ParkedChange, Snapshot, Step, Target};
use evercore_core::{
    AggregateId, Cursor, CursorId, ErrorKind, Event, Failure, KnownType, Lease, OwnerId, Parked, Position,
    Receipt, Sequence, SubscriptionName, Timestamp,
};

use crate::fixture::Fixture;
use crate::tools::*;

const LONG: Duration = Duration::from_secs(600);

/// One aggregate, loaded with a snapshot of some version.
type Loaded = (AggregateId, String, Option<String>, Sequence, Option<Snapshot>, Vec<Event>);

/// The readable content of a store.
#[derive(Debug, PartialEq)]
struct Whole {
    head: Position,
    log: Vec<Event>,
    types: Vec<KnownType>,
    aggregates: Vec<Option<Loaded>>,
    receipts: Vec<Option<Receipt>>,
    cursors: Vec<(Cursor, Vec<Parked>)>,
    last_of_time: Vec<Position>,
}

const COMMANDS: [&str; 4] = ["paid", "nothing", "never", "unheard of"];

async fn whole(engine: &Engine, ids: &[AggregateId]) -> Whole {
    let log = log(engine).await;
    let mut aggregates = Vec::new();
    for id in ids {
        for version in [None, Some(1), Some(2)] {
            let found = load(engine, Target::Id(*id), version, Sequence::MAX).await;
            aggregates.push(found.map(|it| {
                let (of_type, key) = (it.aggregate_type.as_str().to_owned(), it.key);
                let key = key.map(|key| key.as_str().to_owned());
                (it.id, of_type, key, it.sequence, it.snapshot, it.events.iter().collect())
            }));
        }
    }
    let mut receipts = Vec::new();
    for name in COMMANDS {
        receipts.push(receipt_of(engine, &command(name)).await);
    }
    let mut cursors = Vec::new();
    for cursor in engine.cursors(None).await.unwrap().cursors {
        let parked = engine.parked(&cursor.id, Position::ZERO, 100).await.unwrap();
        cursors.push((cursor, parked));
    }
    let mut last_of_time = Vec::new();
    for event in &log {
        last_of_time.push(engine.position_at(event.recorded_at()).await.unwrap());
    }
    let types = engine.types().await.unwrap();
    Whole { head: engine.head().await.unwrap(), log, types, aggregates, receipts, cursors, last_of_time }
}

fn cursor(name: &str, version: u32, partition: u32) -> CursorId {
    CursorId { subscription: SubscriptionName::new(name).unwrap(), version, partition }
}

fn owner(name: &str) -> OwnerId {
    OwnerId::new(name).unwrap()
}

fn parked_at(position: i64, holds_back: bool, error: &str) -> ParkedChange {
    ParkedChange::Keep(Parked {
        position: place(position),
        aggregate: AggregateId::new(position).unwrap(),
        holds_back,
        attempts: 3,
        error: error.to_owned(),
        parked_at: Timestamp::from_micros(1_700_000_000_123_456).unwrap(),
        is_due: false,
    })
}

async fn step(engine: &Engine, id: &CursorId, step: Step) -> Cursor {
    engine.step(id, &step).await.unwrap().expect("the cursor is there")
}

async fn claimed(engine: &Engine, id: &CursorId, partitions: u32) -> Lease {
    step(engine, id, Step::declare(partitions, Position::ZERO, Some(Position::ZERO))).await;
    let epoch = step(engine, id, Step::claim(owner("first"), LONG)).await.epoch;
    Lease { owner: owner("first"), epoch }
}

fn advance(lease: &Lease, from: i64, to: i64) -> Advance {
    Advance::new(lease.clone(), place(from), place(to), LONG)
}

fn failed(lease: Lease, position: i64, rest: Duration) -> Step {
    let failure = Failure { position: place(position), attempts: 7, error: "it said no".to_owned() };
    Step::fail(lease, failure, rest)
}

/// The content that was written to a store.
struct Furnished {
    /// All reserved ids, used or not.
    ids: Vec<AggregateId>,
    mails: Lease,
}

/// Aggregates, keys, snapshots, commands and names of each kind.
async fn furnish_aggregates(engine: &Engine) -> Vec<AggregateId> {
    let warm = |name: &str, events: &[&str]| KnownType {
        aggregate_type: type_named(name),
        event_types: events.iter().map(|name| event_named(name)).collect(),
    };
    engine.warmup(&[warm("warm", &["Warmed"]), warm("bare", &[])]).await.unwrap();
    let ids = new_ids(engine, 12).await;
    let [ann, bob, carl, dora, emil, fay] = ids[..6] else { unreachable!() };
    unit().create_keyed(ann, "user", "ann").append(ann, "user", 0, 5).commit(engine).await.unwrap();
    unit().snapshot(ann, 3, 1, b"three").commit(engine).await.unwrap();
    unit().create_keyed(bob, "user", "bob").append(bob, "user", 0, 2).commit(engine).await.unwrap();
    unit().key(bob, "user", "robert").commit(engine).await.unwrap();
    unit().create(carl, "order").commit(engine).await.unwrap();
    unit().create_keyed(dora, "user", "d").create_keyed(emil, "user", "e").commit(engine).await.unwrap();
    unit().key(dora, "user", "e").key(emil, "user", "d").commit(engine).await.unwrap();
    unit().create(fay, "order").append(fay, "order", 0, 3).commit(engine).await.unwrap();
    unit().snapshot(fay, 3, 1, b"old shape").commit(engine).await.unwrap();
    unit().snapshot(fay, 2, 2, b"").commit(engine).await.unwrap();
    paid(ann, bob).commit(engine).await.unwrap();
    unit().command("nothing").commit(engine).await.unwrap();
    assert_eq!(engine.settle(&command("never")).await.unwrap(), None);
    ids
}

fn paid(ann: AggregateId, bob: AggregateId) -> Unit {
    unit().append(bob, "user", 2, 2).append(ann, "user", 5, 1).command_with("paid", 1)
}

/// Writes one of each kind of data.
async fn furnish(engine: &Engine) -> Furnished {
    let ids = furnish_aggregates(engine).await;
    let id = cursor("mails", 1, 0);
    let mails = claimed(engine, &id, 1).await;
    let parked = vec![parked_at(3, true, "it said no"), parked_at(1, false, "")];
    step(engine, &id, Step::Advance(advance(&mails, 0, 4).with_parked(parked))).await;
    step(engine, &id, Step::resume_parked(Some(place(3)))).await;
    step(engine, &id, Step::want(owner("second"), LONG)).await;
    step(engine, &cursor("mails", 2, 0), Step::declare(1, place(2), None)).await;
    step(engine, &cursor("mail", 1, 0), Step::declare(1, place(7), Some(place(7)))).await;
    for partition in 0..3 {
        let id = cursor("parts", 1, partition);
        let lease = claimed(engine, &id, 3).await;
        let parked = vec![parked_at(1, true, "it said no")];
        let to = i64::from(partition) + 2;
        step(engine, &id, Step::Advance(advance(&lease, 0, to).with_parked(parked))).await;
        match partition {
            0 => step(engine, &id, Step::release(lease)).await,
            1 => step(engine, &id, failed(lease, 4, LONG)).await,
            _ => step(engine, &id, failed(lease, 5, Duration::ZERO)).await,
        };
    }
    claimed(engine, &cursor("paused", 1, 0), 1).await;
    step(engine, &cursor("paused", 1, 0), Step::Pause).await;
    claimed(engine, &cursor("retired", 1, 0), 1).await;
    step(engine, &cursor("retired", 1, 0), Step::Retire).await;
    claimed(engine, &cursor("reset", 1, 0), 1).await;
    step(engine, &cursor("reset", 1, 0), Step::reset(place(1))).await;
    claimed(engine, &cursor("removed", 1, 0), 1).await;
    assert_eq!(engine.step(&cursor("removed", 1, 0), &Step::Remove).await.unwrap(), None);
    Furnished { ids, mails }
}

/// Checks that a reopened store works as before.
async fn goes_on(fixture: &Fixture, engine: &Engine, known: &Furnished) {
    let [ann, bob, carl, ..] = known.ids[..] else { unreachable!() };
    // Commands: the same content, other content, and settled.
    let first = receipt_of(engine, &command("paid")).await.expect("a receipt");
    assert_eq!(paid(ann, bob).commit(engine).await.unwrap(), first);
    let other = unit().append(carl, "order", 0, 1).command_with("paid", 2).commit(engine).await;
    assert_kind!(other, ErrorKind::CommandReused);
    let late = unit().append(carl, "order", 0, 1).command("never").commit(engine).await;
    assert_kind!(late, ErrorKind::CommandAbandoned);
    // Ids, including reserved ones that were not used; keys; sequences.
    assert!(new_ids(engine, 300).await.iter().all(|id| !known.ids.contains(id)), "an id was given out twice");
    let again = unit().create(carl, "order").commit(engine).await;
    assert_kind!(again, ErrorKind::Invalid);
    let next = new_id(engine).await;
    let taken = unit().create_keyed(next, "user", "robert").commit(engine).await;
    assert_kind!(taken, ErrorKind::KeyTaken { .. });
    unit().create_keyed(next, "user", "bob").append(next, "user", 0, 1).commit(engine).await.unwrap();
    assert_kind!(unit().append(ann, "user", 5, 1).commit(engine).await, ErrorKind::Conflict { .. });
    unit().append(ann, "user", 6, 1).commit(engine).await.unwrap();
    assert_no_holes(&log(engine).await);
    // Leases.
    let claim = async |name: &str, partition| {
        let claim = Step::claim(owner("second"), LONG);
        engine.step(&cursor(name, 1, partition), &claim).await.map(|cursor| cursor.unwrap().epoch)
    };
    assert_kind!(claim("mails", 0).await, ErrorKind::AlreadyOwned);
    assert_eq!(claim("parts", 0).await.unwrap(), 2, "it was released");
    assert_kind!(claim("parts", 1).await, ErrorKind::AlreadyOwned);
    assert_eq!(claim("parts", 2).await.unwrap(), 2, "it does not rest");
    assert_kind!(claim("paused", 0).await, ErrorKind::Paused);
    assert_kind!(claim("retired", 0).await, ErrorKind::Superseded);
    assert_kind!(claim("removed", 0).await, ErrorKind::NotFound);
    let moved = step(engine, &cursor("mails", 1, 0), Step::Advance(advance(&known.mails, 4, 5))).await;
    assert_eq!(moved.position, place(5));
    // Waiters.
    let head = engine.head().await.unwrap();
    let began = Instant::now();
    let heads = fixture.threads(3, async |number| match number {
        0 => {
            engine.pause(Duration::from_millis(20)).await;
            unit().append(ann, "user", 7, 1).commit(engine).await.unwrap().last
        }
        _ => engine.wait(head, Duration::from_secs(6)).await.unwrap(),
    });
    assert_eq!(heads, [head.next(); 3]);
    assert!(began.elapsed() < Duration::from_secs(5), "it was the commit that woke them");
}

pub(crate) async fn all_of_a_store_is_there_after_reopening(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let known = furnish(&engine).await;
    let before = whole(&engine, &known.ids).await;
    drop(engine);
    let engine = fixture.reopen().await;
    assert_eq!(whole(&engine, &known.ids).await, before);
    goes_on(fixture, &engine, &known).await;
}

pub(crate) async fn all_of_a_store_is_there_after_a_crash(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let known = furnish(&engine).await;
    let before = whole(&engine, &known.ids).await;
    let image = fixture.crash_image().await;
    assert_eq!(whole(&image, &known.ids).await, before);
    goes_on(fixture, &image, &known).await;
    assert_eq!(whole(&engine, &known.ids).await, before, "the store itself stays as it is");
}

pub(crate) async fn what_is_acknowledged_is_there_after_a_crash(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 1).await;
    let mails = cursor("mails", 1, 0);
    let lease = claimed(&engine, &mails, 1).await;
    // After each answer its data must be on disk, without the next call.
    for answer in 0..8 {
        match answer {
            0 => drop(unit().append(id, "user", 1, 1).commit(&engine).await.unwrap()),
            1 => drop(unit().key(id, "user", "late").commit(&engine).await.unwrap()),
            2 => drop(unit().snapshot(id, 2, 1, b"two").commit(&engine).await.unwrap()),
            3 => drop(unit().command("nothing").commit(&engine).await.unwrap()),
            4 => assert_eq!(engine.settle(&command("never")).await.unwrap(), None),
            5 => {
                let move_and_park = advance(&lease, 0, 2).with_parked(vec![parked_at(1, true, "no")]);
                step(&engine, &mails, Step::Advance(move_and_park)).await;
            }
            6 => drop(step(&engine, &mails, Step::resume_parked(None)).await),
            _ => drop(step(&engine, &mails, Step::release(lease.clone())).await),
        }
        let image = fixture.crash_image().await;
        assert_eq!(whole(&image, &[id]).await, whole(&engine, &[id]).await, "after answer {answer}");
        if answer == 4 {
            let late = unit().append(id, "user", 2, 1).command("never").commit(&image).await;
            assert_kind!(late, ErrorKind::CommandAbandoned);
        }
    }
    let reserved = new_ids(&engine, 20).await;
    let image = fixture.crash_image().await;
    assert!(new_ids(&image, 20).await.iter().all(|id| !reserved.contains(id)), "an id was given out twice");
}

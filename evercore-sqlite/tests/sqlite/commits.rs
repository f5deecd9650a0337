//! Commits: combined, dropped, on the caller's thread, under every executor.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use evercore_core::engine::{Batch, KeyChange, LoadRequest, Payload, Snapshot, Target};
use evercore_sqlite::{
    AggregateId, CommandId, Direction, ErrorKind, EventType, Filter, Key, KnownType, LogQuery, PageLimit,
    Position, Receipt, Result, Sequence, SqliteEngine, StorageEngine, Timestamp,
};

use crate::common::{
    Folder, aggregate_type, append, block_on, create, event, guard, kind, new_aggregate, one_event, positions,
};

async fn both_modes(folder: &Folder) -> [SqliteEngine; 3] {
    let on_caller = SqliteEngine::builder().commit_on_caller_thread(true);
    [
        SqliteEngine::open(folder.store()).await.unwrap(),
        on_caller.open(folder.file("caller.db")).await.unwrap(),
        SqliteEngine::open_in_memory().await.unwrap(),
    ]
}

/// Commits all batches at the same time; with one thread they form one flight.
async fn together(engine: &SqliteEngine, batches: Vec<Batch>) -> Vec<Result<Receipt>> {
    let tasks: Vec<_> = batches
        .into_iter()
        .map(|batch| {
            let engine = engine.clone();
            smol::spawn(async move { engine.commit(batch).await })
        })
        .collect();
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.push(task.await);
    }
    outcomes
}

#[test]
fn one_stale_batch_among_fifty_fails_alone() {
    let folder = Folder::new();
    block_on(async {
        for engine in both_modes(&folder).await {
            let mut ids = Vec::new();
            for _ in 0..50 {
                ids.push(create(&engine, None).await.unwrap().0);
            }
            let batches =
                ids.iter().zip(0..).map(|(id, n)| one_event(*id, if n == 17 { 5 } else { 1 })).collect();
            let outcomes = together(&engine, batches).await;
            for (n, outcome) in outcomes.into_iter().enumerate() {
                match outcome {
                    Ok(_) => assert_ne!(n, 17),
                    Err(error) => {
                        assert_eq!(n, 17);
                        let ErrorKind::Conflict { aggregate, expected, actual, .. } = error.kind() else {
                            panic!()
                        };
                        assert_eq!((*aggregate, expected.get(), actual.get()), (ids[17], 5, 1));
                    }
                }
            }
            assert_eq!(positions(&engine).await, (1..=99).collect::<Vec<_>>());
        }
    });
}

#[test]
fn a_write_that_no_check_foresaw_fails_alone() {
    let folder = Folder::new();
    block_on(async {
        for engine in both_modes(&folder).await {
            let (there, _) = create(&engine, None).await.unwrap();
            let fresh: Vec<AggregateId> = engine.reserve(20).await.unwrap().collect();
            let batches = (0..20).map(|n| {
                let mut batch = Batch::new();
                let id = if n == 7 { there } else { fresh[n] };
                batch.create(new_aggregate(id, None)).unwrap();
                batch.append(append(id, 0, vec![event("New name", b"")])).unwrap();
                batch
            });
            let outcomes = together(&engine, batches.collect()).await;
            let failed: Vec<usize> = (0..20).filter(|n| outcomes[*n].is_err()).collect();
            assert_eq!(failed, [7]);
            assert_eq!(outcomes[7].as_ref().unwrap_err().kind(), &ErrorKind::Invalid);
            assert_eq!(positions(&engine).await, (1..=20).collect::<Vec<_>>());
        }
    });
}

#[test]
fn a_dropped_commit_is_written_whole_or_not_at_all() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let (id, _) = create(&engine, None).await.unwrap();
        let ids: Vec<AggregateId> = engine.reserve(200).await.unwrap().collect();
        for (n, new) in ids.iter().enumerate() {
            let mut batch = Batch::new();
            batch.create(new_aggregate(*new, None)).unwrap();
            batch.append(append(*new, 0, vec![event("A", b""), event("B", b"")])).unwrap();
            let mut commit = pin!(engine.commit(batch));
            for _ in 0..n % 3 {
                let polled = commit.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                if let Poll::Ready(receipt) = polled {
                    receipt.unwrap();
                    break;
                }
            }
        }
        // Nothing is locked, and a commit that was polled once still arrives.
        engine.commit(one_event(id, 1)).await.unwrap();
        engine.close().await.unwrap();
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        for new in &ids {
            let found = load(&engine, *new).await;
            assert!(found.is_none_or(|history| history.events.len() == 2));
        }
        let all = positions(&engine).await;
        assert_eq!(all, (1..=i64::try_from(all.len()).unwrap()).collect::<Vec<_>>());
    });
}

async fn load(engine: &SqliteEngine, id: AggregateId) -> Option<evercore_core::engine::History> {
    let request = LoadRequest {
        target: Target::Id(id),
        snapshot: Some(1),
        up_to: Sequence::MAX,
        limit: PageLimit::default(),
    };
    engine.load(request).await.unwrap()
}

fn command(id: AggregateId, expected: i64, payload: &[u8]) -> Batch {
    let mut batch = Batch::new();
    batch.append(append(id, expected, vec![event("Paid", payload)])).unwrap();
    batch.set_command(CommandId::new("command 1").unwrap(), Some(payload.len() as i64));
    batch
}

#[test]
fn a_command_takes_effect_once_and_can_be_settled() {
    let folder = Folder::new();
    block_on(async {
        for engine in both_modes(&folder).await {
            let store = evercore_sqlite::EventStore::new(engine.clone());
            let (id, _) = create(&engine, None).await.unwrap();
            let outcomes = together(&engine, (0..16).map(|_| command(id, 1, b"x")).collect()).await;
            let receipts: Vec<Receipt> = outcomes.into_iter().map(Result::unwrap).collect();
            assert!(receipts.iter().all(|receipt| *receipt == receipts[0]));
            assert_eq!(kind(engine.commit(command(id, 2, b"other")).await), ErrorKind::CommandReused);
            let name = CommandId::new("command 1").unwrap();
            assert_eq!(store.receipt(&name).await.unwrap().as_ref(), Some(&receipts[0]));
            assert_eq!(engine.settle(&name).await.unwrap().as_ref(), Some(&receipts[0]));

            let late = CommandId::new("late").unwrap();
            assert_eq!(store.receipt(&late).await.unwrap(), None);
            assert_eq!(engine.settle(&late).await.unwrap(), None);
            assert_eq!(engine.settle(&late).await.unwrap(), None);
            let mut batch = one_event(id, 2);
            batch.set_command(late, None);
            assert_eq!(kind(engine.commit(batch).await), ErrorKind::CommandAbandoned);
        }
    });
}

#[test]
fn two_aggregates_swap_their_keys_in_one_batch() {
    block_on(async {
        let engine = SqliteEngine::open_in_memory().await.unwrap();
        let (a, _) = create(&engine, Some("a")).await.unwrap();
        let (b, _) = create(&engine, Some("b")).await.unwrap();
        let change = |aggregate, key| KeyChange {
            aggregate,
            aggregate_type: aggregate_type(),
            key: Key::new(key).unwrap(),
        };
        let mut swap = Batch::new();
        swap.change_key(change(a, "b")).unwrap();
        swap.change_key(change(b, "a")).unwrap();
        engine.commit(swap).await.unwrap();
        assert_eq!(load(&engine, a).await.unwrap().key.unwrap().as_str(), "b");
        assert_eq!(load(&engine, b).await.unwrap().key.unwrap().as_str(), "a");

        let mut free = Batch::new();
        let c = engine.reserve(1).await.unwrap().next().unwrap();
        free.change_key(change(a, "c")).unwrap();
        free.create(new_aggregate(c, Some("b"))).unwrap();
        engine.commit(free).await.unwrap();

        let mut taken = Batch::new();
        taken.change_key(change(a, "b")).unwrap();
        assert!(matches!(kind(engine.commit(taken).await), ErrorKind::KeyTaken { .. }));
    });
}

#[test]
fn guards_and_snapshots_are_held_against_the_sequences() {
    block_on(async {
        let engine = SqliteEngine::open_in_memory().await.unwrap();
        let (a, _) = create(&engine, None).await.unwrap();
        let (b, _) = create(&engine, None).await.unwrap();
        let mut batch = one_event(a, 1);
        batch.guard(guard(b, 2)).unwrap();
        assert!(matches!(kind(engine.commit(batch).await), ErrorKind::Conflict { .. }));
        assert_eq!(positions(&engine).await, [1, 2]);

        let snapshot = |sequence, version| Snapshot {
            sequence: Sequence::new(sequence).unwrap(),
            version,
            state: Payload::new(vec![u8::try_from(sequence).unwrap()]).unwrap(),
        };
        let kept = async |sequence, version| {
            let mut batch = Batch::new();
            batch.snapshot(a, snapshot(sequence, version));
            engine.commit(batch).await.unwrap();
            load(&engine, a).await.unwrap().snapshot.map(|snapshot| snapshot.sequence.get())
        };
        engine.commit(one_event(a, 1)).await.unwrap();
        assert_eq!(kept(3, 1).await, None, "ahead");
        assert_eq!(kept(2, 1).await, Some(2));
        assert_eq!(kept(1, 1).await, Some(2), "behind the one that is kept");
        assert_eq!(kept(1, 2).await, None, "of another version");
        assert_eq!(kept(1, 1).await, Some(1), "back again");
        let history = load(&engine, a).await.unwrap();
        assert_eq!((history.events.len(), history.sequence.get()), (1, 2));
    });
}

#[test]
fn a_rolled_back_name_is_not_remembered() {
    block_on(async {
        let engine = SqliteEngine::open_in_memory().await.unwrap();
        let (there, _) = create(&engine, None).await.unwrap();
        let mut batch = Batch::new();
        batch.create(new_aggregate(there, None)).unwrap();
        batch.append(append(there, 0, vec![event("Never", b"")])).unwrap();
        engine.commit(batch).await.unwrap_err();
        let event_types = &engine.types().await.unwrap()[0].event_types;
        assert_eq!(event_types, &[EventType::new("Opened").unwrap()]);
        let mut batch = Batch::new();
        batch.append(append(there, 1, vec![event("Never", b""), event("Other", b"")])).unwrap();
        engine.commit(batch).await.unwrap();
        let page = engine.read_log(&LogQuery::after(Position::ZERO)).await.unwrap();
        let names: Vec<String> =
            page.events.iter().map(|event| event.event_type().as_str().to_owned()).collect();
        assert_eq!(names, ["Opened", "Never", "Other"]);
    });
}

#[test]
fn a_filter_finds_what_a_full_read_finds() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let other = SqliteEngine::open(folder.store()).await.unwrap();
        let ids: Vec<AggregateId> = engine.reserve(5).await.unwrap().collect();
        for (n, id) in ids.iter().enumerate() {
            let mut batch = Batch::new();
            batch.create(new_aggregate(*id, None)).unwrap();
            let events = (0..40).map(|e| event(&format!("Type{}", (e * (n + 1)) % 31), b"x")).collect();
            batch.append(append(*id, 0, events)).unwrap();
            engine.commit(batch).await.unwrap();
        }
        let types = |count: usize| {
            (0..count).fold(Filter::all(), |filter, n| {
                filter.with_event_type(EventType::new(format!("Type{n}")).unwrap())
            })
        };
        let unknown = Filter::all().with_event_type(EventType::new("Unknown").unwrap());
        let filters = [
            Filter::all(),
            Filter::all().with_aggregate_type(aggregate_type()),
            Filter::all().with_aggregate(ids[2]),
            types(1),
            types(3),
            types(24),
            types(28),
            types(3).with_aggregate(ids[4]),
            types(3).with_aggregate_type(aggregate_type()),
            unknown,
        ];
        let all = engine.read_log(&LogQuery::after(Position::ZERO)).await.unwrap().events;
        for filter in filters {
            let expected: Vec<i64> = all
                .iter()
                .filter(|event| filter.matches(event))
                .map(|event| event.position().get())
                .collect();
            for direction in [Direction::Forward, Direction::Backward] {
                for limit in [1, 7, 1000] {
                    let mut query = LogQuery::after(Position::ZERO);
                    if direction == Direction::Backward {
                        query = LogQuery::before(Position::MAX);
                    }
                    query = query.with_filter(filter.clone()).with_limit(PageLimit::events(limit).unwrap());
                    let mut found = Vec::new();
                    let end = if direction == Direction::Forward { 200 } else { 0 };
                    while query.from.get() != end {
                        let page = other.read_log(&query).await.unwrap();
                        found.extend(page.events.iter().map(|event| event.position().get()));
                        assert!(page.events.len() <= limit);
                        query.from = page.scanned;
                        if page.events.is_empty()
                            || (direction == Direction::Backward && query.from.get() <= 1)
                        {
                            break;
                        }
                    }
                    if direction == Direction::Backward {
                        found.reverse();
                    }
                    assert_eq!(found, expected, "{filter:?} {direction:?} {limit}");
                }
            }
        }
    });
}

#[test]
fn a_commit_wakes_those_who_wait_and_so_does_another_process() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let other = SqliteEngine::open(folder.store()).await.unwrap();
        assert_eq!(engine.wait(Position::ZERO, Duration::ZERO).await.unwrap(), Position::ZERO);
        for writer in [&engine, &other] {
            let head = engine.head().await.unwrap();
            let waiting = smol::spawn({
                let engine = engine.clone();
                async move { engine.wait(head, Duration::from_secs(60)).await }
            });
            engine.pause(Duration::from_millis(20)).await;
            create(writer, None).await.unwrap();
            assert_eq!(waiting.await.unwrap(), head.next());
        }
        let waiting = smol::spawn({
            let engine = engine.clone();
            async move { engine.wait(Position::MAX, Duration::from_secs(60)).await }
        });
        engine.pause(Duration::from_millis(20)).await;
        engine.close().await.unwrap();
        assert_eq!(kind(waiting.await), ErrorKind::Closed);
    });
}

/// A call of `head` sees the commit of another engine first. Other tasks then no longer see it as new.
#[test]
fn a_commit_of_others_that_is_first_seen_by_another_call_wakes_those_who_wait() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let other = SqliteEngine::open(folder.store()).await.unwrap();
        for _ in 0..3 {
            let head = engine.head().await.unwrap();
            let waiting = smol::spawn({
                let engine = engine.clone();
                async move { engine.wait(head, Duration::from_secs(5)).await }
            });
            engine.pause(Duration::from_millis(20)).await;
            create(&other, None).await.unwrap();
            assert_eq!(engine.head().await.unwrap(), head.next());
            let seen = std::time::Instant::now();
            assert_eq!(waiting.await.unwrap(), head.next());
            assert!(seen.elapsed() < Duration::from_secs(2), "{:?}", seen.elapsed());
        }
    });
}

/// A waiter must listen before it looks at the head. Here the look has ended, its result was not taken yet, and then
/// the commit rings.
#[test]
fn a_commit_between_the_look_and_the_wait_is_not_missed() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let mut times = Vec::new();
        for _ in 0..7 {
            let head = engine.head().await.unwrap();
            let mut waiting = pin!(engine.wait(head, Duration::from_secs(60)));
            assert!(futures_lite::future::poll_once(waiting.as_mut()).await.is_none());
            engine.pause(Duration::from_millis(20)).await;
            engine.head().await.unwrap(); // called after the look, so the look has ended
            create(&engine, None).await.unwrap();
            let rung = std::time::Instant::now();
            assert_eq!(waiting.await.unwrap(), head.next());
            times.push(rung.elapsed());
        }
        times.sort();
        // A waiter that missed it notices the commit when the engine looks for other processes, after 50 ms.
        assert!(times[3] < Duration::from_millis(40), "{times:?}");
    });
}

#[test]
fn the_clock_finds_the_position() {
    block_on(async {
        let engine = SqliteEngine::open_in_memory().await.unwrap();
        assert_eq!(engine.position_at(Timestamp::MAX).await.unwrap(), Position::ZERO);
        let mut receipts = Vec::new();
        for _ in 0..9 {
            receipts.push(create(&engine, None).await.unwrap().1);
            engine.pause(Duration::from_millis(2)).await;
        }
        assert_eq!(engine.position_at(Timestamp::MIN).await.unwrap(), Position::ZERO);
        for receipt in receipts {
            assert_eq!(engine.position_at(receipt.recorded_at).await.unwrap(), receipt.last);
        }
    });
}

#[test]
fn names_can_be_registered_ahead() {
    block_on(async {
        let engine = SqliteEngine::open_in_memory().await.unwrap();
        let known =
            KnownType { aggregate_type: aggregate_type(), event_types: vec![EventType::new("A").unwrap()] };
        for _ in 0..2 {
            engine.warmup(std::slice::from_ref(&known)).await.unwrap();
            assert_eq!(engine.types().await.unwrap(), std::slice::from_ref(&known));
        }
    });
}

async fn a_day_at_work(engine: SqliteEngine) {
    let (id, _) = create(&engine, Some("a")).await.unwrap();
    engine.commit(one_event(id, 1)).await.unwrap();
    assert_eq!(load(&engine, id).await.unwrap().events.len(), 2);
    assert_eq!(engine.wait(Position::ZERO, Duration::from_secs(5)).await.unwrap().get(), 2);
    engine.pause(Duration::from_millis(1)).await;
    engine.close().await.unwrap();
}

#[test]
fn works_under_a_bare_block_on() {
    let folder = Folder::new();
    block_on(async {
        for engine in both_modes(&folder).await {
            a_day_at_work(engine).await;
        }
    });
}

#[test]
fn works_under_smol() {
    let folder = Folder::new();
    smol::block_on(async {
        for engine in both_modes(&folder).await {
            smol::spawn(a_day_at_work(engine)).await;
        }
    });
}

#[tokio::test]
async fn works_under_tokio() {
    let folder = Folder::new();
    for engine in both_modes(&folder).await {
        tokio::spawn(a_day_at_work(engine)).await.unwrap();
    }
}

//! The log: one order without gaps, and a reader misses no event.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evercore_core::engine::{Step, Witness};
use evercore_core::{CursorId, ErrorKind, Filter, LogQuery, OwnerId, Position, SubscriptionName, Timestamp};

use crate::fixture::Fixture;
use crate::tools::*;

pub(crate) async fn an_empty_log_ends_at_zero(fixture: &mut Fixture) {
    let engine = fixture.engine();
    assert_eq!(engine.head().await.unwrap(), Position::ZERO);
    let page = engine.read_log(&LogQuery::after(Position::ZERO)).await.unwrap();
    assert_eq!((page.events.len(), page.scanned, page.head), (0, Position::ZERO, Position::ZERO));
    let page = engine.read_log(&LogQuery::before(Position::MAX)).await.unwrap();
    assert_eq!((page.events.len(), page.head), (0, Position::ZERO));
    assert_eq!(engine.position_at(Timestamp::MAX).await.unwrap(), Position::ZERO);
    keyed(&engine, "user", "without events").await;
    assert_eq!(engine.head().await.unwrap(), Position::ZERO);
}

pub(crate) async fn positions_have_no_holes_after_conflicts_and_rollbacks(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 1).await;
    keyed(&engine, "user", "ann").await;
    for expected in 1..10 {
        unit().append(id, "user", expected, 1).commit(&engine).await.unwrap();
        assert_kind!(unit().append(id, "user", 0, 3).commit(&engine).await, ErrorKind::Conflict { .. });
        let second = new_id(&engine).await;
        let taken = unit().create_keyed(second, "user", "ann").append(second, "user", 0, 2);
        assert_kind!(taken.commit(&engine).await, ErrorKind::KeyTaken { .. });
    }
    let events = log(&engine).await;
    assert_no_holes(&events);
    assert_eq!(events.len(), 10);
    assert_eq!(engine.head().await.unwrap(), place(10));
}

pub(crate) async fn the_events_of_a_batch_are_contiguous(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let units = fixture.threads(8, async |number| {
        let (a, b) = (grown(&engine, "user", 0).await, grown(&engine, "user", 0).await);
        let mut receipts = Vec::new();
        for round in 0..10 {
            let name = format!("{number} {round}");
            let events = || vec![event("Happened", name.as_bytes()), event("Happened", name.as_bytes())];
            let batch = unit().events(a, "user", round * 2, events()).events(b, "user", round * 2, events());
            receipts.push((name.clone(), batch.commit(&engine).await.unwrap()));
        }
        receipts
    });
    let events = log(&engine).await;
    assert_no_holes(&events);
    assert_eq!(events.len(), 8 * 10 * 4);
    for (name, receipt) in units.into_iter().flatten() {
        let (first, last) = (receipt.first.get() as usize, receipt.last.get() as usize);
        assert_eq!(last - first, 3);
        assert!(events[first - 1..last].iter().all(|event| event.payload() == name.as_bytes()));
    }
}

pub(crate) async fn a_reader_that_follows_64_writers_skips_nothing_and_sees_nothing_twice(
    fixture: &mut Fixture,
) {
    let engine = fixture.engine();
    let (writers, each) = (64, 6);
    let total = writers * each;
    let seen = fixture.threads(writers + 2, async |number| {
        if number >= 2 {
            let id = grown(&engine, "user", 0).await;
            for expected in 0..each {
                unit().append(id, "user", expected as i64, 1).commit(&engine).await.unwrap();
            }
            return Vec::new();
        }
        let mut query = LogQuery::after(Position::ZERO);
        let mut seen = Vec::new();
        let began = Instant::now();
        while query.from.get() < total as i64 && began.elapsed() < Duration::from_secs(30) {
            engine.wait(query.from, Duration::from_secs(5)).await.unwrap();
            let page = engine.read_log(&query).await.unwrap();
            seen.extend(&page.events);
            query.from = page.scanned;
        }
        seen
    });
    assert_eq!(numbers(&seen[0]), (1..=total as i64).collect::<Vec<_>>());
    assert_no_holes(&seen[0]);
    assert_eq!(seen[0], seen[1], "two readers see the same");
}

pub(crate) async fn a_commit_of_another_engine_is_never_skipped(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let other = fixture.further().await;
    let engines = [engine, other];
    let running = AtomicUsize::new(6);
    let seen = fixture.threads(8, async |number| {
        if number >= 2 {
            let engine = &engines[number % 2];
            let id = grown(engine, "user", 0).await;
            for expected in 0..8 {
                // Large and small units, so that a later one may end earlier.
                let count = if number == 2 { 50 } else { 1 };
                unit().append(id, "user", expected * count, count).commit(engine).await.unwrap();
            }
            running.fetch_sub(1, Ordering::SeqCst);
            return Vec::new();
        }
        let engine = &engines[number];
        let mut query = LogQuery::after(Position::ZERO).with_limit(events_per_page(7));
        let mut seen = Vec::new();
        let began = Instant::now();
        loop {
            let is_last = running.load(Ordering::SeqCst) == 0 || began.elapsed() > Duration::from_secs(30);
            let page = engine.read_log(&query).await.unwrap();
            seen.extend(&page.events);
            query.from = page.scanned;
            if is_last && page.scanned == page.head {
                return seen;
            }
            engine.wait(query.from, Duration::from_millis(5)).await.unwrap();
        }
    });
    assert_no_holes(&seen[0]);
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0], log(&engines[0]).await);
    assert_eq!(seen[0].len(), 50 * 8 + 5 * 8);
}

pub(crate) async fn positions_survive_reopening(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    let before = log(&engine).await;
    drop(engine);
    let engine = fixture.reopen().await;
    assert_eq!(log(&engine).await, before);
    let receipt = unit().append(id, "user", 5, 1).commit(&engine).await.unwrap();
    assert_eq!(receipt.first, place(6));
    assert_no_holes(&log(&engine).await);
}

pub(crate) async fn reading_forward_from_past_the_head_is_cursor_ahead(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "user", 3).await;
    for ahead in [4, 5, i64::MAX] {
        let error = engine.read_log(&LogQuery::after(place(ahead))).await.unwrap_err();
        match error.kind() {
            ErrorKind::CursorAhead { cursor, head, .. } => {
                assert_eq!((*cursor, *head), (place(ahead), place(3)));
            }
            _ => panic!("expected CursorAhead, was {error:?}"),
        }
    }
    let page = engine.read_log(&LogQuery::after(place(3))).await.unwrap();
    assert_eq!((page.events.len(), page.scanned, page.head), (0, place(3), place(3)));
    let page = engine.read_log(&LogQuery::before(place(100))).await.unwrap();
    assert_eq!(page.events.len(), 3, "going backward there is nothing ahead");
}

pub(crate) async fn a_page_tells_at_which_events_it_began_and_ended(fixture: &mut Fixture) {
    let engine = fixture.engine();
    assert_eq!(engine.read_log(&LogQuery::after(place(0))).await.unwrap().witness(), Some(Witness::START));
    for _ in 0..3 {
        grown(&engine, "user", 4).await;
    }
    // It ends at the last event; commits without events do not count.
    keyed(&engine, "user", "made last").await;
    let mark_at =
        async |position: i64| engine.read_log(&LogQuery::after(place(position))).await.unwrap().began;
    assert_eq!(mark_at(0).await, None);
    let nothing = Filter::all().with_event_type(event_named("Never"));
    for filter in [Filter::all(), nothing] {
        for (from, to, limit) in [(0, 12, 5), (5, 12, 5), (2, 7, 100), (10, 100, 5), (12, 100, 5), (3, 3, 9)]
        {
            let query = LogQuery::after(place(from)).up_to(place(to)).with_filter(filter.clone());
            let page = engine.read_log(&query.with_limit(events_per_page(limit))).await.unwrap();
            let witness = page.witness().expect("a page that was read forward");
            assert_eq!((witness.position, page.began), (page.scanned, mark_at(from).await));
            assert_eq!(Some(witness.mark), mark_at(page.scanned.get()).await, "{from} to {to}, {limit}");
        }
    }
}

pub(crate) async fn an_empty_log_knows_a_cursor_that_is_ahead(fixture: &mut Fixture) {
    let engine = fixture.engine();
    assert_kind!(engine.read_log(&LogQuery::after(place(1))).await, ErrorKind::CursorAhead { .. });
}

pub(crate) async fn recorded_at_is_the_engines_clock_and_never_goes_back(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let began = Timestamp::now().as_micros();
    let minute = 60_000_000;
    fixture.threads(4, async |_| {
        let id = grown(&engine, "user", 0).await;
        for (expected, time) in [Timestamp::MAX, Timestamp::MIN, Timestamp::now()].into_iter().enumerate() {
            let told = vec![event_with("Happened", b"", time, Default::default())];
            let receipt = unit().events(id, "user", expected as i64, told).commit(&engine).await.unwrap();
            assert!((began - minute..began + 10 * minute).contains(&receipt.recorded_at.as_micros()));
        }
    });
    let events = log(&engine).await;
    assert!(events.is_sorted_by_key(|event| event.recorded_at()));
    assert!(events.iter().all(|event| event.recorded_at() < Timestamp::MAX));
}

pub(crate) async fn a_position_is_found_by_the_time_of_recording(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    assert_eq!(store.position_from(Timestamp::MIN).await.unwrap(), None);
    for _ in 0..10 {
        grown(&engine, "user", 2).await;
        engine.pause(Duration::from_millis(1)).await;
    }
    let events = log(&engine).await;
    let micro = |time: Timestamp, by| Timestamp::from_micros(time.as_micros() + by).unwrap();
    for event in &events {
        for time in [micro(event.recorded_at(), -1), event.recorded_at(), micro(event.recorded_at(), 1)] {
            let expected = events.iter().take_while(|other| other.recorded_at() <= time).count();
            assert_eq!(engine.position_at(time).await.unwrap().get(), expected as i64);
            let first = events.iter().find(|other| other.recorded_at() >= time).map(|event| event.position());
            assert_eq!(store.position_from(time).await.unwrap(), first);
        }
    }
    assert_eq!(engine.position_at(Timestamp::MIN).await.unwrap(), Position::ZERO);
    assert_eq!(store.position_from(Timestamp::MIN).await.unwrap(), Some(place(1)));
    assert_eq!(store.position_from(Timestamp::MAX).await.unwrap(), None);
    assert_eq!(engine.position_at(Timestamp::MAX).await.unwrap(), place(20));
}

pub(crate) async fn waiting_ends_at_once_if_there_is_something(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "user", 3).await;
    let began = Instant::now();
    assert_eq!(engine.wait(Position::ZERO, Duration::from_secs(60)).await.unwrap(), place(3));
    assert_eq!(engine.wait(place(2), Duration::from_secs(60)).await.unwrap(), place(3));
    assert!(began.elapsed() < Duration::from_secs(10));
}

pub(crate) async fn waiting_ends_when_time_is_up(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "user", 3).await;
    let began = Instant::now();
    assert_eq!(engine.wait(place(3), Duration::from_millis(30)).await.unwrap(), place(3));
    assert!(began.elapsed() >= Duration::from_millis(25));
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(engine.wait(place(3), Duration::ZERO).await.unwrap(), place(3));
    assert_eq!(engine.wait(Position::MAX, Duration::ZERO).await.unwrap(), place(3));
}

pub(crate) async fn a_commit_wakes_all_who_wait_at_once(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 1).await;
    let began = Instant::now();
    fixture.threads(9, async |number| {
        if number == 0 {
            engine.pause(Duration::from_millis(50)).await;
            unit().append(id, "user", 1, 1).commit(&engine).await.unwrap();
            return;
        }
        assert_eq!(engine.wait(place(1), Duration::from_secs(60)).await.unwrap(), place(2));
    });
    assert!(began.elapsed() < Duration::from_secs(10), "it was the commit that woke them");
    // Also side by side on one thread.
    let waiters = (0..4).map(|_| engine.wait(place(2), Duration::from_secs(60)));
    let commit = async {
        unit().append(id, "user", 2, 1).commit(&engine).await.unwrap();
        Ok(place(3))
    };
    let mut all: Vec<evercore_core::BoxFuture<'_, evercore_core::Result<Position>>> = waiters.collect();
    all.push(Box::pin(commit));
    for head in join_all(all).await {
        assert_eq!(head.unwrap(), place(3));
    }
    assert!(began.elapsed() < Duration::from_secs(20), "it was the commit that woke them");
}

pub(crate) async fn a_pause_lets_time_pass(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let began = Instant::now();
    join_all((0..10).map(|_| engine.pause(Duration::from_millis(20)))).await;
    assert!(began.elapsed() >= Duration::from_millis(19));
    assert!(began.elapsed() < Duration::from_secs(10));
}

pub(crate) async fn a_reader_that_stands_still_does_not_stall_writers(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "user", 100).await;
    let query = LogQuery::after(Position::ZERO).with_limit(events_per_page(10));
    let held = engine.read_log(&query).await.unwrap();
    let mut waiting = engine.wait(place(1_000), Duration::from_secs(60));
    let _ = poll_at_most(1, &mut waiting).await;
    for _ in 0..20 {
        grown(&engine, "user", 1).await;
    }
    assert_eq!(engine.head().await.unwrap(), place(120));
    assert_eq!((held.events.len(), held.head), (10, place(100)));
}

pub(crate) async fn two_commits_at_once_wake_all_who_wait_for_both(fixture: &mut Fixture) {
    const ROUNDS: i64 = 40;
    let engine = fixture.engine();
    let ids = [grown(&engine, "user", 0).await, grown(&engine, "user", 0).await];
    let start = std::sync::Barrier::new(5);
    let slowest = fixture.threads(5, async |number| {
        let mut slowest = Duration::ZERO;
        for round in 0..ROUNDS {
            start.wait();
            if let Some(id) = ids.get(number) {
                unit().append(*id, "user", round, 1).commit(&engine).await.unwrap();
                continue;
            }
            let (began, both) = (Instant::now(), place(2 * round + 2));
            let mut head = place(2 * round);
            while head < both {
                head = engine.wait(head, Duration::from_secs(6)).await.unwrap();
            }
            slowest = slowest.max(began.elapsed());
        }
        slowest
    });
    assert!(slowest.iter().all(|time| *time < Duration::from_secs(5)), "a commit woke nobody: {slowest:?}");
}

pub(crate) async fn after_an_answer_nothing_tells_of_less(fixture: &mut Fixture) {
    let engine = fixture.engine();
    fixture.threads(4, async |number| {
        let id = grown(&engine, "user", 0).await;
        let name = format!("reader {number}");
        let subscription = SubscriptionName::new(&name).unwrap();
        let cursor = CursorId { subscription: subscription.clone(), version: 1, partition: 0 };
        for sequence in 1..=15 {
            let last = unit().append(id, "user", sequence - 1, 1).commit(&engine).await.unwrap().last;
            assert!(engine.head().await.unwrap() >= last, "the head");
            assert!(engine.wait(last, Duration::ZERO).await.unwrap() >= last, "the head that a wait tells");
            let before = Position::new(last.get() - 1).unwrap();
            assert!(engine.wait(before, Duration::from_secs(20)).await.unwrap() >= last, "the end of a wait");
            let page = engine.read_log(&LogQuery::after(before)).await.unwrap();
            assert_eq!(page.events.first().map(|event| event.position()), Some(last), "the log");
            assert!(page.head >= last, "the head of a page");
            assert!(engine.position_at(Timestamp::MAX).await.unwrap() >= last, "the last position");
            assert_eq!(sequence_of(&engine, id).await, sequence, "the aggregate");
            let text = format!("{number} {sequence}");
            unit().key(id, "user", &text).commit(&engine).await.unwrap();
            assert_eq!(holder(&engine, "user", &text).await, Some(id), "the key");
            let step = match sequence {
                1 => Step::declare(1, last, None),
                _ => Step::reset(last),
            };
            engine.step(&cursor, &step).await.unwrap();
            let known = engine.cursors(Some(&subscription)).await.unwrap().cursors;
            assert_eq!(known.first().map(|cursor| cursor.position), Some(last), "the cursor");
        }
    });
}

pub(crate) async fn waiting_ends_when_time_is_up_also_while_others_commit(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 0).await;
    let is_over = std::sync::atomic::AtomicBool::new(false);
    fixture.threads(2, async |number| {
        if number == 0 {
            let (mut sequence, began) = (0, Instant::now());
            while !is_over.load(Ordering::SeqCst) && began.elapsed() < Duration::from_secs(4) {
                unit().append(id, "user", sequence, 1).commit(&engine).await.unwrap();
                sequence += 1;
                engine.pause(Duration::from_millis(3)).await;
            }
            return;
        }
        let began = Instant::now();
        engine.wait(Position::MAX, Duration::from_millis(100)).await.unwrap();
        let took = began.elapsed();
        is_over.store(true, Ordering::SeqCst);
        assert!(took >= Duration::from_millis(95) && took < Duration::from_secs(3), "{took:?}");
    });
}

pub(crate) async fn a_commit_without_events_ends_no_wait(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 1).await;
    fixture.threads(2, async |number| {
        if number == 0 {
            for round in 0..5 {
                engine.pause(Duration::from_millis(8)).await;
                unit().key(id, "user", &format!("key {round}")).commit(&engine).await.unwrap();
            }
            return;
        }
        let began = Instant::now();
        assert_eq!(engine.wait(place(1), Duration::from_millis(80)).await.unwrap(), place(1));
        assert!(began.elapsed() >= Duration::from_millis(75), "ended after {:?}", began.elapsed());
    });
}

pub(crate) async fn a_begun_page_holds_nothing_that_others_need(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 300).await;
    let query = LogQuery::after(Position::ZERO);
    for polls in 1..4 {
        let mut begun: Vec<_> = (0..30).map(|_| engine.read_log(&query)).collect();
        for page in &mut begun {
            for _ in 0..polls {
                if let Some(page) = poll_at_most(1, page.as_mut()).await {
                    assert!(page.unwrap().events.len() >= 300);
                    break;
                }
            }
        }
        let before = sequence_of(&engine, id).await;
        let others = async {
            for sequence in before..before + 5 {
                unit().append(id, "user", sequence, 1).commit(&engine).await.unwrap();
            }
            assert_eq!(history(&engine, id).await.events.len() as i64, before + 5);
            engine.settle(&command("never")).await.unwrap();
            new_id(&engine).await;
        };
        let ended = drop_after(&engine, Duration::from_secs(5), others).await;
        assert!(ended.is_some(), "others wait for pages that nobody asks for");
        drop(begun);
    }
    // A page that is polled late still comes. It contains a prefix of the log at that time.
    let mut begun = engine.read_log(&query);
    if poll_at_most(1, begun.as_mut()).await.is_none() {
        unit().append(id, "user", 315, 1).commit(&engine).await.unwrap();
        let page = begun.await.unwrap();
        assert!(page.head == place(315) || page.head == place(316));
        assert_no_holes(&page.events.iter().collect::<Vec<_>>());
        assert_eq!(page.events.len() as i64, page.head.get());
    }
}

pub(crate) async fn recorded_at_never_goes_back_when_the_clock_does(fixture: &mut Fixture) {
    const HOUR: Duration = Duration::from_secs(3_600);
    let engine = fixture.engine();
    let id = grown(&engine, "user", 2).await;
    fixture.turn_clock_back(HOUR).await;
    let last = log(&engine).await[1].recorded_at();
    for sequence in 2..5 {
        let receipt = unit().append(id, "user", sequence, 1).commit(&engine).await.unwrap();
        assert!(receipt.recorded_at >= last, "it went back by {:?}", last.since(receipt.recorded_at));
    }
    let events = log(&engine).await;
    assert!(events.is_sorted_by_key(|event| event.recorded_at()));
    assert_eq!(engine.position_at(events[4].recorded_at()).await.unwrap(), place(5));
    let before = Timestamp::from_micros(events[0].recorded_at().as_micros() - 1).unwrap();
    assert_eq!(engine.position_at(before).await.unwrap(), Position::ZERO);
    let began = Instant::now();
    assert_eq!(engine.wait(place(5), Duration::from_millis(30)).await.unwrap(), place(5));
    assert!(began.elapsed() < Duration::from_secs(10), "a wait is no matter of the clock");
}

pub(crate) async fn a_lease_is_not_lost_when_the_clock_goes_back(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "user", 2).await;
    let owner = |name: &str| OwnerId::new(name).unwrap();
    let cursor = CursorId { subscription: SubscriptionName::new("mails").unwrap(), version: 1, partition: 0 };
    engine.step(&cursor, &Step::declare(1, Position::ZERO, None)).await.unwrap();
    let lease = Duration::from_secs(60);
    let claimed = engine.step(&cursor, &Step::claim(owner("first"), lease)).await.unwrap().unwrap();
    fixture.turn_clock_back(Duration::from_secs(3_600)).await;
    let stolen = engine.step(&cursor, &Step::claim(owner("second"), lease)).await;
    assert_kind!(stolen, ErrorKind::AlreadyOwned);
    let held = evercore_core::Lease { owner: owner("first"), epoch: claimed.epoch };
    engine.step(&cursor, &Step::renew(held.clone(), lease)).await.unwrap();
    engine.step(&cursor, &Step::release(held)).await.unwrap();
    let next = engine.step(&cursor, &Step::claim(owner("second"), lease)).await.unwrap().unwrap();
    assert_eq!(next.epoch, claimed.epoch + 1);
}

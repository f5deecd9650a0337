//! Closing an engine: later calls fail, running calls end.

use std::time::{Duration, Instant};

use evercore_core::engine::{LoadRequest, Step, Target};
use evercore_core::{
    AggregateQuery, CursorId, Direction, ErrorKind, LogQuery, PageLimit, Position, Sequence,
    SubscriptionName, Timestamp,
};

use crate::fixture::Fixture;
use crate::tools::*;

pub(crate) async fn what_is_called_later_is_closed(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let store = fixture.store();
    let id = grown(&engine, "user", 1).await;
    store.close().await.unwrap();
    let next = unit().append(id, "user", 1, 1);
    assert_kind!(next.commit(&engine).await, ErrorKind::Closed);
    assert_kind!(engine.reserve(1).await, ErrorKind::Closed);
    assert_kind!(engine.command(&command("one")).await, ErrorKind::Closed);
    assert_kind!(engine.forget_commands(Timestamp::MAX).await, ErrorKind::Closed);
    assert_kind!(engine.settle(&command("one")).await, ErrorKind::Closed);
    let (target, limit) = (Target::Id(id), PageLimit::default());
    let request = LoadRequest { target, snapshot: None, up_to: Sequence::MAX, limit };
    assert_kind!(engine.load(request).await, ErrorKind::Closed);
    let (direction, from, to) = (Direction::Forward, Sequence::ZERO, Sequence::MAX);
    let query = AggregateQuery { aggregate: id, direction, from, to, limit };
    assert_kind!(engine.read_aggregate(query).await, ErrorKind::Closed);
    assert_kind!(engine.read_log(&LogQuery::after(Position::ZERO)).await, ErrorKind::Closed);
    assert_kind!(engine.head().await, ErrorKind::Closed);
    assert_kind!(engine.position_at(Timestamp::now()).await, ErrorKind::Closed);
    assert_kind!(engine.wait(Position::ZERO, Duration::ZERO).await, ErrorKind::Closed);
    assert_kind!(engine.warmup(&[]).await, ErrorKind::Closed);
    assert_kind!(engine.types().await, ErrorKind::Closed);
    let subscription = SubscriptionName::new("mails").unwrap();
    let cursor = CursorId { subscription, version: 1, partition: 0 };
    assert_kind!(engine.step(&cursor, &Step::Remove).await, ErrorKind::Closed);
    assert_kind!(engine.cursors(None).await, ErrorKind::Closed);
    assert_kind!(engine.parked(&cursor, Position::ZERO, 10).await, ErrorKind::Closed);
    // Closing again changes nothing.
    engine.close().await.unwrap();
    assert_kind!(engine.head().await, ErrorKind::Closed);
}

pub(crate) async fn a_wait_that_is_under_way_ends_at_once(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let began = Instant::now();
    let ended = fixture.threads(3, async |number| {
        if number > 0 {
            return engine.wait(place(9), Duration::from_secs(60)).await.map(drop);
        }
        engine.pause(Duration::from_millis(50)).await;
        engine.close().await
    });
    assert!(began.elapsed() < Duration::from_secs(20));
    assert!(ended[0].is_ok());
    for waited in ended.into_iter().skip(1) {
        assert_kind!(waited, ErrorKind::Closed);
    }
}

pub(crate) async fn a_commit_under_way_is_written_or_an_error(fixture: &mut Fixture) {
    const LATEST: i64 = 100_000;
    let engine = fixture.engine();
    let written: Vec<i64> = fixture.threads(5, async |number| {
        if number == 0 {
            engine.pause(Duration::from_millis(30)).await;
            engine.close().await.unwrap();
            assert_kind!(engine.head().await, ErrorKind::Closed);
            return 0;
        }
        let Ok(mut ids) = engine.reserve(1).await else { return 0 };
        let id = ids.next().unwrap();
        let made = unit().create(id, "user").commit(&engine).await;
        if made.is_err() {
            return 0;
        }
        for sequence in 0..LATEST {
            if let Err(error) = unit().append(id, "user", sequence, 1).commit(&engine).await {
                assert_kind!(Err::<(), _>(error), ErrorKind::Closed);
                return sequence;
            }
        }
        panic!("it was never closed");
    });
    drop(engine);
    let engine = fixture.reopen().await;
    // If reopening gives the same engine, it is closed.
    if let Ok(head) = engine.head().await {
        assert_eq!(head.get(), written.iter().sum::<i64>());
    }
}

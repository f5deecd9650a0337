//! Reading the whole log with one page read ahead: each event comes once.

use std::time::Duration;

use evercore_core::{ErrorKind, Event, Filter, LogQuery, LogReader, Position};

use crate::fixture::Fixture;
use crate::tools::*;

async fn rest(reader: &mut LogReader) -> Vec<Event> {
    let mut found = Vec::new();
    while let Some(page) = reader.next().await.unwrap() {
        assert_eq!(page.scanned, reader.position());
        found.extend(&page.events);
    }
    found
}

pub(crate) async fn it_gives_what_page_after_page_gives(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = grown(&engine, "user", 20).await;
    let rare = || vec![event("Rare", b"{}")];
    for expected in [20, 21, 22] {
        unit().events(id, "user", expected, rare()).commit(&engine).await.unwrap();
        grown(&engine, "order", 9).await;
    }
    let filters = [
        Filter::all(),
        Filter::all().with_event_type(event_named("Rare")),
        Filter::all().with_aggregate(id),
        Filter::all().with_event_type(event_named("Never")),
    ];
    for filter in filters {
        for limit in [1, 3, 7, 1_000] {
            let queries = [
                LogQuery::after(Position::ZERO),
                LogQuery::after(place(4)).up_to(place(30)),
                LogQuery::after(place(50)),
                LogQuery::before(Position::MAX),
                LogQuery::before(place(30)).up_to(place(4)),
            ];
            for query in queries {
                let query = query.with_filter(filter.clone()).with_limit(events_per_page(limit));
                let expected = read_all(&engine, query.clone()).await;
                assert_eq!(rest(&mut store.log_reader(query)).await, expected);
            }
        }
    }
}

pub(crate) async fn at_the_end_it_looks_again_for_what_came_later(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let mut reader = store.log_reader(LogQuery::after(Position::ZERO).with_limit(events_per_page(2)));
    let mut found = Vec::new();
    for round in 0..5 {
        assert!(rest(&mut reader).await.is_empty(), "nothing new");
        grown(&engine, "user", round).await;
        store.wait(reader.position(), Duration::ZERO).await.unwrap();
        found.extend(rest(&mut reader).await);
    }
    assert_no_holes(&found);
    assert_eq!(found.len(), 10);
    assert_eq!(reader.position(), place(10));
}

pub(crate) async fn two_that_follow_writers_skip_nothing_and_see_nothing_twice(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let seen = fixture.threads(8, async |number| {
        if number >= 2 {
            let id = grown(&engine, "user", 0).await;
            for expected in 0..20 {
                unit().append(id, "user", expected * 3, 3).commit(&engine).await.unwrap();
            }
            return Vec::new();
        }
        let mut reader = store.log_reader(LogQuery::after(Position::ZERO).with_limit(events_per_page(4)));
        let mut seen = Vec::new();
        while seen.len() < 6 * 20 * 3 {
            let head = store.wait(reader.position(), Duration::from_secs(5)).await.unwrap();
            assert!(head > reader.position(), "nothing came for five seconds");
            seen.extend(rest(&mut reader).await);
        }
        seen
    });
    assert_no_holes(&seen[0]);
    assert_eq!(seen[0], seen[1]);
}

pub(crate) async fn its_next_may_be_dropped_at_any_await(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 30).await;
    for polls in 0..4 {
        let query = LogQuery::after(Position::ZERO).with_limit(events_per_page(4));
        let (mut reader, mut found) = (store.log_reader(query), Vec::new());
        loop {
            for _ in 0..3 {
                if let Some(page) = poll_at_most(polls, reader.next()).await {
                    found.extend(page.unwrap().into_iter().flat_map(|page| page.events));
                }
            }
            match reader.next().await.unwrap() {
                Some(page) => found.extend(page.events),
                None if found.len() < 30 => {} // the end was told to a future that was dropped, or not yet reached
                None => break,
            }
        }
        assert_no_holes(&found);
        assert_eq!(found.len(), 30);
    }
}

pub(crate) async fn a_cursor_past_the_head_is_an_error_each_time(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    grown(&engine, "user", 3).await;
    let mut reader = store.log_reader(LogQuery::after(place(4)));
    for _ in 0..2 {
        assert_kind!(reader.next().await, ErrorKind::CursorAhead { .. });
        assert_eq!(reader.position(), place(4));
    }
    grown(&engine, "user", 2).await;
    assert_eq!(numbers(&rest(&mut reader).await), [5]);
}

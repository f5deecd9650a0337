//! Reading: exact at every boundary, equal in all ways, and a prefix while others write.

use std::sync::Arc;

use evercore_core::engine::{LoadRequest, NewEvent, Target};
use evercore_core::{
    AggregateId, AggregateQuery, AsOf, Direction, ErrorKind, Event, Filter, LogQuery, Metadata, PageLimit,
    Position, Sequence, Timestamp, limits,
};

use crate::fixture::Fixture;
use crate::tools::*;

async fn sequences(
    engine: &Engine,
    aggregate: AggregateId,
    direction: Direction,
    (from, to): (i64, i64),
    limit: usize,
) -> Vec<i64> {
    let limit = events_per_page(limit);
    let query = AggregateQuery { aggregate, direction, from: at(from), to: at(to), limit };
    engine.read_aggregate(query).await.unwrap().iter().map(|event| event.sequence().get()).collect()
}

pub(crate) async fn an_aggregate_is_read_behind_from_and_up_to_to(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    let forward = Direction::Forward;
    assert_eq!(sequences(&engine, id, forward, (0, i64::MAX), 100).await, [1, 2, 3, 4, 5]);
    assert_eq!(sequences(&engine, id, forward, (2, 4), 100).await, [3, 4]);
    assert_eq!(sequences(&engine, id, forward, (0, 1), 100).await, [1]);
    assert_eq!(sequences(&engine, id, forward, (4, 4), 100).await, [0; 0]);
    assert_eq!(sequences(&engine, id, forward, (4, 2), 100).await, [0; 0]);
    assert_eq!(sequences(&engine, id, forward, (5, i64::MAX), 100).await, [0; 0]);
    assert_eq!(sequences(&engine, id, forward, (i64::MAX, i64::MAX), 100).await, [0; 0]);
    assert_eq!(sequences(&engine, id, forward, (1, 9), 2).await, [2, 3]);
    assert_eq!(sequences(&engine, id, forward, (0, 9), 0).await, [0; 0]);
}

pub(crate) async fn an_aggregate_is_read_backward_too(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    let backward = Direction::Backward;
    assert_eq!(sequences(&engine, id, backward, (i64::MAX, 0), 100).await, [5, 4, 3, 2, 1]);
    assert_eq!(sequences(&engine, id, backward, (4, 2), 100).await, [3, 2]);
    assert_eq!(sequences(&engine, id, backward, (6, 5), 100).await, [5]);
    assert_eq!(sequences(&engine, id, backward, (1, 0), 100).await, [0; 0]);
    assert_eq!(sequences(&engine, id, backward, (0, 0), 100).await, [0; 0]);
    assert_eq!(sequences(&engine, id, backward, (3, 3), 100).await, [0; 0]);
    assert_eq!(sequences(&engine, id, backward, (i64::MAX, 1), 2).await, [5, 4]);
}

pub(crate) async fn a_missing_aggregate_reads_empty(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    assert!(events_of(&engine, id).await.is_empty());
    assert!(events_of(&engine, AggregateId::new(i64::MAX).unwrap()).await.is_empty());
    let target = Target::Id(id);
    assert!(load(&engine, target, Some(1), Sequence::MAX).await.is_none());
}

pub(crate) async fn the_log_is_read_behind_from_and_up_to_to(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "user", 6).await;
    let forward = LogQuery::after(place(2)).up_to(place(5));
    assert_eq!(numbers(&read_all(&engine, forward).await), [3, 4, 5]);
    let backward = LogQuery::before(place(5)).up_to(place(2));
    assert_eq!(numbers(&read_all(&engine, backward).await), [4, 3, 2]);
    assert_eq!(numbers(&read_all(&engine, LogQuery::before(Position::MAX)).await), [6, 5, 4, 3, 2, 1]);
    assert_eq!(numbers(&read_all(&engine, LogQuery::before(place(1))).await), [0; 0]);
    assert_eq!(numbers(&read_all(&engine, LogQuery::before(Position::ZERO)).await), [0; 0]);
    assert_eq!(numbers(&read_all(&engine, LogQuery::after(place(4)).up_to(place(4))).await), [0; 0]);
    assert_eq!(numbers(&read_all(&engine, LogQuery::after(place(4)).up_to(place(2))).await), [0; 0]);
}

pub(crate) async fn a_page_ends_at_its_limit_of_events(fixture: &mut Fixture) {
    let engine = fixture.engine();
    grown(&engine, "user", 10).await;
    for limit in 0..=12 {
        let page =
            engine.read_log(&LogQuery::after(place(0)).with_limit(events_per_page(limit))).await.unwrap();
        assert_eq!(page.events.len(), limit.min(10));
        assert_eq!((page.scanned.get(), page.head), (limit.min(10) as i64, place(10)));
    }
    for limit in 1..=10 {
        let forward = LogQuery::after(Position::ZERO).with_limit(events_per_page(limit));
        assert_eq!(numbers(&read_all(&engine, forward).await), (1..=10).collect::<Vec<_>>());
        let backward = LogQuery::before(Position::MAX).with_limit(events_per_page(limit));
        assert_eq!(numbers(&read_all(&engine, backward).await), (1..=10).rev().collect::<Vec<_>>());
    }
}

pub(crate) async fn a_page_of_the_largest_limit_is_read_and_a_larger_one_refused(fixture: &mut Fixture) {
    let engine = fixture.engine();
    assert_kind!(PageLimit::events(limits::PAGE_EVENTS + 1), ErrorKind::Invalid);
    assert_kind!(PageLimit::default().and_bytes(limits::PAGE_BYTES + 1), ErrorKind::Invalid);
    for _ in 0..3 {
        grown(&engine, "user", 4_000).await;
    }
    let limit = events_per_page(limits::PAGE_EVENTS).and_bytes(limits::PAGE_BYTES).unwrap();
    let page = engine.read_log(&LogQuery::after(Position::ZERO).with_limit(limit)).await.unwrap();
    assert_eq!((page.events.len(), page.scanned), (10_000, place(10_000)));
    assert_no_holes(&log(&engine).await);
}

pub(crate) async fn a_page_ends_at_its_limit_of_bytes_and_has_one_event_at_least(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    let sizes = [100, 100, 100, 1_000, 0, 0, 50];
    let events = sizes.iter().map(|size| event("Sized", &vec![b'x'; *size])).collect();
    unit().create(id, "user").events(id, "user", 0, events).commit(&engine).await.unwrap();
    for (bytes, first_page) in [
        (0, 1),
        (99, 1),
        (100, 1),
        (199, 1),
        (200, 2),
        (300, 3),
        (1_299, 3),
        (1_300, 6),
        (1_349, 6),
        (1_350, 7),
    ] {
        let limit = PageLimit::default().and_bytes(bytes).unwrap();
        let query = LogQuery::after(Position::ZERO).with_limit(limit);
        assert_eq!(engine.read_log(&query).await.unwrap().events.len(), first_page, "{bytes} bytes");
        assert_eq!(numbers(&read_all(&engine, query).await), [1, 2, 3, 4, 5, 6, 7]);
        let (direction, from, to) = (Direction::Forward, Sequence::ZERO, Sequence::MAX);
        let page = AggregateQuery { aggregate: id, direction, from, to, limit };
        assert_eq!(engine.read_aggregate(page).await.unwrap().len(), first_page, "{bytes} bytes");
        let request = LoadRequest { target: Target::Id(id), snapshot: None, up_to: Sequence::MAX, limit };
        let found = engine.load(request).await.unwrap().unwrap();
        assert_eq!((found.events.len(), found.sequence), (first_page, at(7)), "{bytes} bytes");
    }
}

/// Not only payloads count: headers may be much larger.
pub(crate) async fn a_page_counts_the_bytes_of_metadata_too(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    let metadata = Metadata::new().with_header("name", "x".repeat(90)).unwrap();
    let metadata =
        metadata.with_reference("r".repeat(100)).unwrap().with_correlation_id("c".repeat(50)).unwrap();
    let metadata = Arc::new(metadata.with_causation_id("c".repeat(50)).unwrap());
    let events = (0..4).map(|_| NewEvent { metadata: Arc::clone(&metadata), ..event("Sized", b"123456") });
    unit().create(id, "user").events(id, "user", 0, events.collect()).commit(&engine).await.unwrap();
    // 300 bytes each: 94 of the header, 200 of the texts, 6 of the payload.
    for (bytes, first_page) in [(0, 1), (599, 1), (600, 2), (899, 2), (900, 3), (1_200, 4)] {
        let limit = PageLimit::default().and_bytes(bytes).unwrap();
        let query = LogQuery::after(Position::ZERO).with_limit(limit);
        assert_eq!(engine.read_log(&query).await.unwrap().events.len(), first_page, "{bytes} bytes");
        assert_eq!(numbers(&read_all(&engine, query).await), [1, 2, 3, 4]);
        let request = LoadRequest { target: Target::Id(id), snapshot: None, up_to: Sequence::MAX, limit };
        assert_eq!(engine.load(request).await.unwrap().unwrap().events.len(), first_page, "{bytes} bytes");
    }
}

pub(crate) async fn a_load_is_a_page_and_the_rest_is_read_behind_it(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 10).await;
    let limit = events_per_page(4);
    let request = LoadRequest { target: Target::Id(id), snapshot: None, up_to: Sequence::MAX, limit };
    let found = engine.load(request).await.unwrap().unwrap();
    assert_eq!((found.events.len(), found.sequence), (4, at(10)));
    assert_eq!(sequences(&engine, id, Direction::Forward, (4, 10), 100).await, [5, 6, 7, 8, 9, 10]);
}

pub(crate) async fn a_load_ends_where_it_is_asked_to(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 5).await;
    for up_to in 0..8 {
        let found = load(&engine, Target::Id(id), None, at(up_to)).await.unwrap();
        assert_eq!((found.events.len() as i64, found.sequence), (up_to.min(5), at(5)), "up to {up_to}");
    }
}

pub(crate) async fn a_long_history_is_folded_whole(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = new_id(&engine).await;
    let batch = (0..3).fold(unit().create(id, "tally"), |batch, nth| {
        batch.events(id, "tally", nth * 3_000, vec![event("Counted", b"1"); 3_000])
    });
    batch.commit(&engine).await.unwrap();
    unit().events(id, "tally", 9_000, vec![event("Counted", b"1"); 3_000]).commit(&engine).await.unwrap();
    let tally = store.load::<Tally<0, 1>>(id).await.unwrap();
    assert_eq!((tally.total, tally.sequence()), (12_000, at(12_000)));
}

pub(crate) async fn a_load_by_key_equals_a_load_by_id(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = keyed(&engine, "user", "ann").await;
    unit().append(id, "user", 0, 3).snapshot(id, 2, 1, b"two").commit(&engine).await.unwrap();
    let by_id = load(&engine, Target::Id(id), Some(1), at(3)).await.unwrap();
    let by_key = load(&engine, Target::Key(type_named("user"), key("ann")), Some(1), at(3)).await.unwrap();
    assert_eq!((by_id.id, by_id.key, by_id.sequence), (by_key.id, by_key.key, by_key.sequence));
    assert_eq!((by_id.snapshot, by_id.aggregate_type), (by_key.snapshot, by_key.aggregate_type));
    assert!(by_id.events.iter().eq(by_key.events.iter()));
}

pub(crate) async fn reading_while_others_append_sees_a_prefix(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 0).await;
    fixture.threads(5, async |number| {
        if number == 0 {
            for expected in 0..60 {
                unit().append(id, "user", expected * 2, 2).commit(&engine).await.unwrap();
            }
            return;
        }
        let began = std::time::Instant::now();
        while began.elapsed() < std::time::Duration::from_secs(30) {
            let found = history(&engine, id).await;
            let seen: Vec<_> = found.events.iter().map(|event| event.sequence().get()).collect();
            assert_eq!(seen, (1..=found.sequence.get()).collect::<Vec<_>>(), "as of one moment");
            assert_eq!(found.sequence.get() % 2, 0, "units are whole");
            let page = engine.read_log(&LogQuery::after(Position::ZERO)).await.unwrap();
            assert_eq!(
                numbers(&page.events.iter().collect::<Vec<_>>()),
                (1..=page.head.get()).collect::<Vec<_>>()
            );
            if found.sequence == at(120) {
                return;
            }
        }
    });
}

/// A log of three aggregates of two types with four event types, of which some have a reference or a correlation id.
async fn mixed(engine: &Engine) -> [AggregateId; 3] {
    let ids = [grown(engine, "a", 0).await, grown(engine, "a", 0).await, grown(engine, "b", 0).await];
    let mut random = Random(7);
    let mut next = [0; 3];
    for _ in 0..60 {
        let which = random.below(3);
        let name = ["X", "Y", "Z", "x"][random.below(4)];
        let mut metadata = Metadata::new();
        if let Some(text) = [Some("4711"), Some(""), None, None][random.below(4)] {
            metadata = metadata.with_reference(text).unwrap();
        }
        if let Some(text) = [Some("4711"), Some("talk"), None, None][random.below(4)] {
            metadata = metadata.with_correlation_id(text).unwrap();
        }
        let event = event_with(name, b"", Timestamp::now(), metadata);
        let batch = unit().events(ids[which], ["a", "a", "b"][which], next[which], vec![event]);
        batch.commit(engine).await.unwrap();
        next[which] += 1;
    }
    ids
}

/// Reads with a filter, forward and backward, and compares with the filter's answer for each event.
async fn check_filter(engine: &Engine, all: &[Event], filter: Filter) {
    let expected: Vec<Event> = all.iter().filter(|event| filter.matches(event)).cloned().collect();
    let query = LogQuery::after(Position::ZERO).with_filter(filter.clone());
    assert_eq!(read_all(engine, query).await, expected, "{filter:?}");
    let query = LogQuery::before(place(50)).up_to(place(10)).with_filter(filter.clone());
    let found = read_all(engine, query.with_limit(events_per_page(3))).await;
    let expected = expected.iter().rev().filter(|event| (10..50).contains(&event.position().get()));
    assert!(found.iter().eq(expected), "{filter:?} backward");
}

fn filter_of(aggregate_types: &[&str], event_types: &[&str], aggregate: Option<AggregateId>) -> Filter {
    let filter =
        aggregate_types.iter().map(|name| type_named(name)).fold(Filter::all(), Filter::with_aggregate_type);
    let filter = event_types.iter().map(|name| event_named(name)).fold(filter, Filter::with_event_type);
    aggregate.into_iter().fold(filter, Filter::with_aggregate)
}

pub(crate) async fn a_filter_means_the_same_to_every_engine(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = mixed(&engine).await;
    let all = log(&engine).await;
    let missing = new_id(&engine).await;
    let aggregate_types: &[&[&str]] =
        &[&[], &["a"], &["b"], &["A"], &["never"], &["a", "b"], &["never", "a"]];
    let event_types: &[&[&str]] =
        &[&[], &["X"], &["x"], &["X", "Z"], &["X", "X"], &["X", "Y", "Z", "x"], &["never"], &["X", "never"]];
    for aggregate_types in aggregate_types {
        for event_types in event_types {
            for aggregate in [None, Some(ids[0]), Some(ids[2]), Some(missing)] {
                check_filter(&engine, &all, filter_of(aggregate_types, event_types, aggregate)).await;
            }
        }
    }
}

pub(crate) async fn events_are_found_by_reference_and_by_correlation(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = mixed(&engine).await;
    let all = log(&engine).await;
    let with = |filter: Filter, reference: Option<&str>, correlation: Option<&str>| {
        let filter = reference.map_or(Ok(filter.clone()), |text| filter.with_reference(text)).unwrap();
        correlation.map_or(Ok(filter.clone()), |text| filter.with_correlation_id(text)).unwrap()
    };
    let found =
        all.iter().filter(|event| with(Filter::all(), Some("4711"), Some("talk")).matches(event)).count();
    assert!((1..all.len() / 4).contains(&found), "{found} events tell something apart");
    for (reference, correlation) in [
        (Some("4711"), None),
        (Some(""), None),
        (Some("471"), None),
        (None, Some("4711")),
        (None, Some("Talk")),
        (Some("4711"), Some("talk")),
        (Some("talk"), Some("4711")),
    ] {
        for (aggregate_types, event_types) in
            [(&[][..], &[][..]), (&["a"], &[]), (&[], &["X", "Z"]), (&[], &["never"])]
        {
            for aggregate in [None, Some(ids[0])] {
                let filter = filter_of(aggregate_types, event_types, aggregate);
                check_filter(&engine, &all, with(filter, reference, correlation)).await;
            }
        }
    }
}

pub(crate) async fn a_name_that_no_event_has_yet_matches_as_soon_as_one_has_it(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 3).await;
    let by_event =
        LogQuery::after(Position::ZERO).with_filter(Filter::all().with_event_type(event_named("Later")));
    let by_type =
        LogQuery::after(Position::ZERO).with_filter(Filter::all().with_aggregate_type(type_named("later")));
    for query in [&by_event, &by_type] {
        let page = engine.read_log(query).await.unwrap();
        assert_eq!((page.events.len(), page.scanned), (0, place(3)));
    }
    let other = new_id(&engine).await;
    let batch = unit().events(id, "user", 3, vec![event("Later", b"")]).create(other, "later");
    batch.append(other, "later", 0, 1).commit(&engine).await.unwrap();
    assert_eq!(numbers(&read_all(&engine, by_event).await), [4]);
    assert_eq!(numbers(&read_all(&engine, by_type).await), [5]);
}

pub(crate) async fn a_filtered_page_tells_how_far_it_searched(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let rare = grown(&engine, "rare", 1).await;
    grown(&engine, "common", 50).await;
    unit().append(rare, "rare", 1, 1).commit(&engine).await.unwrap();
    grown(&engine, "common", 50).await;
    let filter = Filter::all().with_aggregate_type(type_named("rare"));
    let query = LogQuery::after(Position::ZERO).with_filter(filter);
    let page = engine.read_log(&query).await.unwrap();
    assert_eq!((page.events.len(), page.scanned, page.head), (2, place(102), place(102)));
    let page = engine.read_log(&query.clone().with_limit(events_per_page(1))).await.unwrap();
    assert_eq!((page.events.len(), page.scanned), (1, place(1)));
    let page = engine.read_log(&query.clone().up_to(place(40))).await.unwrap();
    assert_eq!((page.events.len(), page.scanned, page.head), (1, place(40), place(102)));
    let from_rest = LogQuery { from: place(60), ..query };
    assert_eq!(engine.read_log(&from_rest).await.unwrap().scanned, place(102));
}

pub(crate) async fn every_field_is_equal_on_every_read_path(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = keyed(&engine, "user", "ann").await;
    let time = |micros| Timestamp::from_micros(micros).unwrap();
    let full = Metadata::new().with_reference("clerk 112").unwrap().with_correlation_id("talk").unwrap();
    let full = full.with_causation_id("cause").unwrap().with_header("tenant", "north").unwrap();
    let full = full.with_header("Tenant", "").unwrap();
    let one = Metadata::new().with_causation_id("only this").unwrap();
    let blank = Metadata::new().with_reference("").unwrap();
    let written = [
        event_with("First", b"1", time(1_234_567), full),
        event_with("Second", b"2", time(-1), Metadata::new()),
        event_with("Third", b"3", time(0), one),
        event_with("Fourth", b"4", time(5), blank),
    ];
    let receipt = unit().events(id, "user", 0, written.to_vec()).commit(&engine).await.unwrap();
    let from_log = log(&engine).await;
    for (index, (event, new)) in from_log.iter().zip(&written).enumerate() {
        assert_eq!((event.position().get(), event.sequence().get()), (index as i64 + 1, index as i64 + 1));
        assert_eq!((event.aggregate(), event.aggregate_type().as_str()), (id, "user"));
        assert_eq!((event.event_type(), event.payload()), (&new.event_type, new.payload.as_bytes()));
        assert_eq!((event.time(), event.recorded_at()), (new.time, receipt.recorded_at));
        assert_eq!(event.reference(), new.metadata.reference(), "reference of {index}");
        assert_eq!(event.correlation_id(), new.metadata.correlation_id(), "correlation id of {index}");
        assert_eq!(event.causation_id(), new.metadata.causation_id(), "causation id of {index}");
        assert_eq!(event.headers(), new.metadata.headers(), "headers of {index}");
    }
    let backward = read_all(&engine, LogQuery::before(Position::MAX)).await;
    assert!(backward.iter().rev().eq(&from_log), "the log read backward");
    let filtered = LogQuery::after(Position::ZERO).with_filter(Filter::all().with_aggregate(id));
    assert_eq!(read_all(&engine, filtered).await, from_log, "the log, filtered");
    assert!(events_of(&engine, id).await.iter().eq(from_log.iter().cloned()), "the aggregate");
    assert!(history(&engine, id).await.events.iter().eq(from_log.iter().cloned()), "loaded by id");
    let by_key =
        load(&engine, Target::Key(type_named("user"), key("ann")), None, Sequence::MAX).await.unwrap();
    assert!(by_key.events.iter().eq(from_log.iter().cloned()), "loaded by key");
}

pub(crate) async fn the_log_is_the_union_of_the_aggregates_events(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = mixed(&engine).await;
    let mut union: Vec<Event> = Vec::new();
    for id in ids {
        union.extend(events_of(&engine, id).await);
    }
    union.sort_by_key(Event::position);
    assert_eq!(union, log(&engine).await);
}

pub(crate) async fn an_aggregate_is_loaded_as_of_a_sequence_a_position_and_a_time(fixture: &mut Fixture) {
    let store = fixture.store();
    let time = |micros| Timestamp::from_micros(micros).unwrap();
    // Event times need not increase: the third event happened before the second.
    for (nth, micros) in [(1, 100), (2, 300), (4, 200), (8, 400)] {
        let mut work = store.begin();
        work.set_metadata(Metadata::new().with_time(time(micros))).unwrap();
        let mut account = work.load_or_create::<Account>("ann").await.unwrap();
        work.record(&mut account, deposited(nth)).unwrap();
        work.commit().await.unwrap();
        store.update_or_create::<Account, _, _>("other", |_| [deposited(1)]).await.unwrap();
    }
    let balance = async |as_of| store.load_as_of::<Account>("ann", as_of).await.unwrap().balance;
    for (sequence, expected) in [(0, 0), (1, 1), (3, 7), (4, 15), (9, 15)] {
        assert_eq!(balance(AsOf::Sequence(at(sequence))).await, expected, "as of sequence {sequence}");
    }
    for (position, expected) in [(0, 0), (1, 1), (2, 1), (3, 3), (5, 7), (7, 15), (100, 15)] {
        assert_eq!(balance(AsOf::Position(place(position))).await, expected, "as of position {position}");
    }
    for (micros, expected) in [(99, 0), (100, 1), (250, 1), (300, 7), (399, 7), (400, 15)] {
        assert_eq!(balance(AsOf::Time(time(micros))).await, expected, "as of time {micros}");
    }
    let second = log(&fixture.engine()).await[2].recorded_at();
    assert!(balance(AsOf::Recorded(second)).await >= 3);
    assert_eq!(balance(AsOf::Recorded(Timestamp::MIN)).await, 0);
    assert_eq!(balance(AsOf::Recorded(Timestamp::MAX)).await, 15);
    assert_kind!(store.load_as_of::<Account>("nobody", AsOf::Time(time(1))).await, ErrorKind::NotFound);
}

pub(crate) async fn an_event_that_does_not_decode_is_named(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let id = new_id(&engine).await;
    let events = vec![event("Deposited", br#"{"amount":1}"#), event("Unheard", b"{}")];
    unit().create(id, "account").events(id, "account", 0, events).commit(&engine).await.unwrap();
    let error = store.load::<Account>(id).await.unwrap_err();
    match error.kind() {
        ErrorKind::Codec { event_type, position, .. } => {
            assert_eq!((event_type, position), (&Some(event_named("Unheard")), &Some(place(2))));
        }
        _ => panic!("expected Codec, was {error:?}"),
    }
    assert_eq!(store.load_as_of::<Account>(id, AsOf::Sequence(at(1))).await.unwrap().balance, 1);
}

/// The events of a page as the docs of [`PageLimit`] define them.
fn first_page(events: &[Event], limit: PageLimit) -> usize {
    let mut bytes = 0;
    let fits = |(count, event): (usize, &Event)| {
        bytes += event.as_row().bytes();
        count < limit.max_events() && (count == 0 || bytes <= limit.max_bytes())
    };
    events.iter().enumerate().map(fits).take_while(|fits| *fits).count()
}

/// A log of events of different sizes in four aggregates of two types.
async fn sized(engine: &Engine) -> [AggregateId; 4] {
    let ids = new_ids(engine, 4).await;
    let types = ["a", "a", "b", "b"];
    let mut batch = ids.iter().zip(types).fold(unit(), |batch, (id, of_type)| batch.create(*id, of_type));
    let (mut random, mut next) = (Random(11), [0; 4]);
    for _ in 0..40 {
        let which = random.below(4);
        let payload = vec![b'x'; [0, 1, 50, 99, 100, 101, 400][random.below(7)]];
        let event = event(["X", "Y", "Z"][random.below(3)], &payload);
        batch = batch.events(ids[which], types[which], next[which], vec![event]);
        next[which] += 1;
    }
    batch.commit(engine).await.unwrap();
    [ids[0], ids[1], ids[2], ids[3]]
}

pub(crate) async fn page_after_page_is_the_log_read_whole(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = sized(&engine).await;
    let all = log(&engine).await;
    let filters = [
        Filter::all(),
        Filter::all().with_aggregate_type(type_named("b")),
        Filter::all().with_event_type(event_named("Y")),
        Filter::all().with_event_type(event_named("X")).with_event_type(event_named("Z")),
        Filter::all().with_aggregate(ids[0]),
        Filter::all().with_aggregate(ids[2]).with_event_type(event_named("X")),
    ];
    for (number, filter) in filters.into_iter().enumerate() {
        for (events, bytes) in [(1, 1_000), (3, 200), (7, 100), (1_000, 0), (1_000, 201), (2, 1_000_000)] {
            let limit = events_per_page(events).and_bytes(bytes).unwrap();
            let (low, high) = [(0, 40), (5, 33)][(number + events) % 2];
            for query in [
                LogQuery::after(place(low)).up_to(place(high)),
                LogQuery::before(place(high)).up_to(place(low)),
            ] {
                let mut query = query.with_filter(filter.clone()).with_limit(limit);
                let is_forward = query.direction == Direction::Forward;
                let is_asked_for = |event: &&Event| {
                    let position = event.position().get();
                    let (from, to) = if is_forward { (low + 1, high) } else { (low, high - 1) };
                    filter.matches(event) && (from..=to).contains(&position)
                };
                let mut left: Vec<Event> = all.iter().filter(is_asked_for).cloned().collect();
                if !is_forward {
                    left.reverse();
                }
                while !left.is_empty() {
                    let page = engine.read_log(&query).await.unwrap();
                    let rest = left.split_off(first_page(&left, limit));
                    assert!(page.events.iter().eq(left.iter().cloned()), "{query:?}");
                    assert_eq!(page.head, place(40));
                    assert_ne!(page.scanned, query.from, "it gets somewhere");
                    let is_past = |event: &Event| match query.direction {
                        Direction::Forward => event.position() <= page.scanned,
                        Direction::Backward => event.position() >= page.scanned,
                    };
                    assert!(left.iter().all(is_past) && !rest.iter().any(is_past), "scanned after {query:?}");
                    (query.from, left) = (page.scanned, rest);
                }
                assert!(engine.read_log(&query).await.unwrap().events.is_empty(), "{query:?}");
            }
        }
    }
}

pub(crate) async fn page_after_page_is_an_aggregate_read_whole(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let aggregate = sized(&engine).await[1];
    let all: Vec<Event> = events_of(&engine, aggregate).await.iter().collect();
    let last = all.len() as i64;
    for (events, bytes) in [(1, 1_000), (2, 100), (3, 1_000_000), (1_000, 0), (1_000, 150)] {
        let limit = events_per_page(events).and_bytes(bytes).unwrap();
        for direction in [Direction::Forward, Direction::Backward] {
            let is_forward = direction == Direction::Forward;
            let (mut from, to) = if is_forward { (0, last) } else { (last + 1, 1) };
            let mut left = all.clone();
            if !is_forward {
                left.reverse();
            }
            while !left.is_empty() {
                let query = AggregateQuery { aggregate, direction, from: at(from), to: at(to), limit };
                let page = engine.read_aggregate(query).await.unwrap();
                let rest = left.split_off(first_page(&left, limit));
                assert!(page.iter().eq(left.iter().cloned()), "{query:?}");
                from = left[left.len() - 1].sequence().get();
                left = rest;
            }
        }
        let request =
            LoadRequest { target: Target::Id(aggregate), snapshot: None, up_to: at(last - 1), limit };
        let found = engine.load(request).await.unwrap().unwrap();
        let expected = first_page(&all[..all.len() - 1], limit);
        assert!(found.events.iter().eq(all[..expected].iter().cloned()), "{events} events, {bytes} bytes");
        assert_eq!(found.sequence, at(last));
    }
}

pub(crate) async fn a_filter_may_have_many_event_types(fixture: &mut Fixture) {
    const NAMES: usize = 300;
    let engine = fixture.engine();
    let (first, second) = (new_id(&engine).await, new_id(&engine).await);
    let names: Vec<String> = (0..NAMES).map(|number| format!("Type {number}")).collect();
    let events = |of: &str| names.iter().map(|name| event(name, of.as_bytes())).collect();
    let batch = unit().create(first, "a").events(first, "a", 0, events("a"));
    batch.create(second, "b").events(second, "b", 0, events("b")).commit(&engine).await.unwrap();
    for count in [2, 3, 9, 16, 17, 32, 33, 64, 65, 100, 127, 128, 129, 255, 256, 257, 299] {
        // From the end of the log and not in its order. A search of the first few types finds nothing.
        let asked = (0..count).map(|number| NAMES - 1 - (number * 7) % count);
        let filter = asked
            .clone()
            .fold(Filter::all(), |filter, number| filter.with_event_type(event_named(&names[number])));
        let mut expected: Vec<i64> = asked.map(|number| number as i64 + 1).collect();
        expected.sort_unstable();
        expected.dedup();
        let of_second: Vec<i64> = expected.iter().map(|position| position + NAMES as i64).collect();
        let query =
            LogQuery::after(Position::ZERO).with_filter(filter.clone().with_aggregate_type(type_named("b")));
        assert_eq!(numbers(&read_all(&engine, query).await), of_second, "{count} types of b");
        let both: Vec<i64> = expected.into_iter().chain(of_second).collect();
        let query = LogQuery::after(Position::ZERO).with_filter(filter);
        assert_eq!(numbers(&read_all(&engine, query).await), both, "{count} types");
    }
}

pub(crate) async fn a_page_that_looks_at_events_one_by_one_ends_after_a_bound(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 0).await;
    let bound = limits::PAGE_SCANNED as i64;
    let mut sequence = 0;
    while sequence < bound + 5_000 {
        let count = (limits::UNIT_EVENTS as i64).min(bound + 5_000 - sequence);
        unit().append(id, "user", sequence, count).commit(&engine).await.unwrap();
        sequence += count;
    }
    let names: Vec<String> = (0..=limits::INDEXED_TYPES).map(|number| format!("Rare{number}")).collect();
    let rare: Vec<_> = names.iter().map(|name| event(name, b"")).collect();
    unit().events(id, "user", sequence, rare).commit(&engine).await.unwrap();
    let types = names.iter().map(|name| event_named(name));
    let filter = types.fold(Filter::all(), Filter::with_event_type);
    let head = place(sequence + names.len() as i64);
    let query = LogQuery::after(Position::ZERO).with_filter(filter.clone());
    let page = engine.read_log(&query).await.unwrap();
    assert_eq!(page.events.len(), 0, "the first rare event comes later");
    assert!(page.scanned > Position::ZERO, "a page makes progress");
    assert!(page.scanned <= place(bound), "a page searched {} positions", page.scanned);
    assert_eq!(page.head, head);
    let expected: Vec<i64> = (sequence + 1..=head.get()).collect();
    assert_eq!(numbers(&read_all(&engine, query.clone()).await), expected);
    // Backward, and with an end within the bound.
    let before = LogQuery::before(place(sequence + 1)).with_filter(filter.clone());
    let page = engine.read_log(&before).await.unwrap();
    assert_eq!(page.events.len(), 0);
    assert!(page.scanned >= place(sequence - bound), "a page searched back to {}", page.scanned);
    assert!(page.scanned <= place(sequence), "a page makes progress");
    let all = LogQuery::before(Position::MAX).with_filter(filter);
    let backward: Vec<i64> = expected.iter().rev().copied().collect();
    assert_eq!(numbers(&read_all(&engine, all).await), backward);
    let short = engine.read_log(&query.up_to(place(7))).await.unwrap();
    assert_eq!((short.events.len(), short.scanned), (0, place(7)));
}

pub(crate) async fn a_large_unit_is_seen_whole_or_not_at_all(fixture: &mut Fixture) {
    const SIZE: i64 = 1_500;
    let engine = fixture.engine();
    let (first, second) = (grown(&engine, "a", 0).await, grown(&engine, "b", 0).await);
    let is_over = std::sync::atomic::AtomicBool::new(false);
    fixture.threads(3, async |number| {
        if number == 0 {
            for round in 0..4 {
                let batch =
                    unit().append(first, "a", round * SIZE, SIZE).append(second, "b", round * SIZE, SIZE);
                batch.key(first, "a", &format!("{round}")).commit(&engine).await.unwrap();
            }
            is_over.store(true, std::sync::atomic::Ordering::SeqCst);
            return;
        }
        while !is_over.load(std::sync::atomic::Ordering::SeqCst) {
            let keys = [holder(&engine, "a", "0").await, holder(&engine, "a", "3").await];
            let head = engine.head().await.unwrap().get();
            assert_eq!(head % (2 * SIZE), 0, "the head is in the middle of a unit");
            assert!(keys[0].is_none() || head > 0, "a key before its events");
            assert!(keys[1].is_none() || head == 8 * SIZE, "a key before its events");
            for id in [second, first] {
                let limit = events_per_page(1);
                let request =
                    LoadRequest { target: Target::Id(id), snapshot: None, up_to: Sequence::MAX, limit };
                let sequence = engine.load(request).await.unwrap().unwrap().sequence.get();
                assert!(sequence % SIZE == 0 && 2 * sequence >= head, "half a unit: {sequence} of {head}");
            }
            let last = LogQuery::before(Position::MAX).with_limit(events_per_page(1));
            let last = engine.read_log(&last).await.unwrap().events.first();
            assert_eq!(last.map_or(0, |event| event.position().get()) % (2 * SIZE), 0);
        }
    });
}

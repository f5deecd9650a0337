//! Type names: interned by the engine, compared exactly, remembered only after the commit.

use std::time::{Duration, Instant};

use evercore_core::{AggregateType, ErrorKind, EventType, Filter, KnownType, LogQuery, Position, limits};

use crate::fixture::Fixture;
use crate::tools::*;

fn known(aggregate_type: &str, event_types: &[&str]) -> KnownType {
    KnownType {
        aggregate_type: type_named(aggregate_type),
        event_types: event_types.iter().map(|name| event_named(name)).collect(),
    }
}

pub(crate) async fn known_types_are_listed_in_order(fixture: &mut Fixture) {
    let engine = fixture.engine();
    assert_eq!(engine.types().await.unwrap(), []);
    let ids = new_ids(&engine, 2).await;
    let batch = unit().create(ids[0], "b").events(ids[0], "b", 0, vec![event("Z", b""), event("A", b"")]);
    batch.create(ids[1], "a").commit(&engine).await.unwrap();
    assert_eq!(engine.types().await.unwrap(), [known("a", &[]), known("b", &["A", "Z"])]);
}

pub(crate) async fn case_matters(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = new_ids(&engine, 2).await;
    let batch = unit().create(ids[0], "user").events(ids[0], "user", 0, vec![event("made", b"1")]);
    let batch = batch.create(ids[1], "User").events(ids[1], "User", 0, vec![event("Made", b"2")]);
    batch.commit(&engine).await.unwrap();
    assert_eq!(engine.types().await.unwrap(), [known("User", &["Made"]), known("user", &["made"])]);
    let names: Vec<_> =
        log(&engine).await.iter().map(|event| event.event_type().as_str().to_owned()).collect();
    assert_eq!(names, ["made", "Made"]);
}

pub(crate) async fn an_event_type_belongs_to_its_aggregate_type(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (first, second) = (grown(&engine, "a", 1).await, grown(&engine, "b", 1).await);
    assert_eq!(engine.types().await.unwrap(), [known("a", &["Happened"]), known("b", &["Happened"])]);
    assert_eq!(events_of(&engine, first).await.first().unwrap().aggregate_type().as_str(), "a");
    assert_eq!(events_of(&engine, second).await.first().unwrap().aggregate_type().as_str(), "b");
}

pub(crate) async fn concurrent_first_uses_of_a_name_give_one_type(fixture: &mut Fixture) {
    let engine = fixture.engine();
    fixture.threads(32, async |_| grown(&engine, "new", 1).await);
    assert_eq!(engine.types().await.unwrap(), [known("new", &["Happened"])]);
    let events = log(&engine).await;
    assert_eq!(events.len(), 32);
    assert!(events.iter().all(|event| event.event_type().as_str() == "Happened"));
}

pub(crate) async fn an_interner_remembers_only_what_has_committed(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "old", 1).await;
    let lost = new_id(&engine).await;
    let batch = unit().create(lost, "lost").events(lost, "lost", 0, vec![event("Lost", b"")]);
    assert_kind!(batch.append(id, "old", 7, 1).commit(&engine).await, ErrorKind::Conflict { .. });
    assert_eq!(engine.types().await.unwrap(), [known("old", &["Happened"])]);

    // New names may get the ids of the lost ones.
    let other = new_id(&engine).await;
    let batch = unit().create(other, "other").events(other, "other", 0, vec![event("Other", b"")]);
    batch.commit(&engine).await.unwrap();
    let again = new_id(&engine).await;
    let batch = unit().create(again, "lost").events(again, "lost", 0, vec![event("Lost", b"")]);
    batch.commit(&engine).await.unwrap();
    let event = events_of(&engine, again).await.first().unwrap();
    assert_eq!((event.aggregate_type().as_str(), event.event_type().as_str()), ("lost", "Lost"));
    let event = events_of(&engine, other).await.first().unwrap();
    assert_eq!((event.aggregate_type().as_str(), event.event_type().as_str()), ("other", "Other"));
}

pub(crate) async fn many_types_in_one_unit_keep_their_names(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = new_id(&engine).await;
    let names: Vec<String> = (0..300).map(|number| format!("Type{number:03}")).collect();
    let events = names.iter().map(|name| event(name, name.as_bytes())).collect();
    unit().create(id, "wide").events(id, "wide", 0, events).commit(&engine).await.unwrap();
    for (event, name) in events_of(&engine, id).await.iter().zip(&names) {
        assert_eq!(event.event_type().as_str(), name);
        assert_eq!(event.payload(), name.as_bytes());
    }
    assert_eq!(engine.types().await.unwrap()[0].event_types.len(), 300);
}

pub(crate) async fn the_longest_name_is_kept(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (long, wide) = ("n".repeat(limits::NAME_BYTES), "é".repeat(limits::NAME_BYTES / 2));
    let id = new_id(&engine).await;
    let batch = unit().create(id, &long).events(id, &long, 0, vec![event(&wide, b""), event(&long, b"")]);
    batch.commit(&engine).await.unwrap();
    let names: Vec<_> =
        log(&engine).await.iter().map(|event| event.event_type().as_str().to_owned()).collect();
    assert_eq!(names, [wide, long.clone()]);
    assert_eq!(history(&engine, id).await.aggregate_type.as_str(), long);
}

pub(crate) async fn a_bad_name_is_refused_where_it_is_born(_: &mut Fixture) {
    let long = "n".repeat(limits::NAME_BYTES + 1);
    for bad in ["", "a\0b", "\0", long.as_str()] {
        assert_kind!(AggregateType::new(bad), ErrorKind::InvalidName);
        assert_kind!(EventType::new(bad), ErrorKind::InvalidName);
    }
}

pub(crate) async fn warming_up_registers_names_and_again_is_harmless(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let types = [known("user", &["Made", "Renamed"])];
    engine.warmup(&types).await.unwrap();
    engine.warmup(&types).await.unwrap();
    assert_eq!(engine.types().await.unwrap(), types);
    grown(&engine, "user", 1).await;
    engine.warmup(&types).await.unwrap();
    assert_eq!(engine.types().await.unwrap(), [known("user", &["Happened", "Made", "Renamed"])]);
    assert_eq!(log(&engine).await.len(), 1);
}

pub(crate) async fn a_store_warms_up_with_the_names_of_its_codec(fixture: &mut Fixture) {
    let store = fixture.store();
    store.warmup::<Account>().await.unwrap();
    assert_eq!(store.types().await.unwrap(), [known("account", &["Deposited", "Noted", "Withdrawn"])]);
}

pub(crate) async fn warming_up_at_once_is_harmless(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let types = [known("a", &["A", "B"]), known("b", &["A"])];
    fixture.threads(16, async |_| engine.warmup(&types).await.unwrap());
    assert_eq!(engine.types().await.unwrap(), types);
}

pub(crate) async fn two_engines_on_one_storage_agree(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let other = fixture.further().await;
    let engines = [engine, other];
    fixture.threads(8, async |number| {
        for name in ["One", "Two", "Three"] {
            let engine = &engines[number % 2];
            let id = new_id(engine).await;
            let batch = unit().create(id, name).events(id, name, 0, vec![event(name, name.as_bytes())]);
            batch.commit(engine).await.unwrap();
        }
    });
    for engine in &engines {
        let all = [known("One", &["One"]), known("Three", &["Three"]), known("Two", &["Two"])];
        assert_eq!(engine.types().await.unwrap(), all);
        for event in log(engine).await {
            assert_eq!(event.event_type().as_str().as_bytes(), event.payload());
            assert_eq!(event.aggregate_type().as_str().as_bytes(), event.payload());
        }
    }
}

pub(crate) async fn a_reader_meets_names_as_they_come(fixture: &mut Fixture) {
    const NAMES: usize = 60;
    let engine = fixture.engine();
    let other = fixture.further().await;
    let id = grown(&engine, "user", 0).await;
    fixture.threads(4, async |number| {
        if number == 0 {
            for place in 0..NAMES {
                let (name, expected) = (format!("Name {place}"), i64::try_from(place).unwrap());
                let one = unit().events(id, "user", expected, vec![event(&name, name.as_bytes())]);
                one.commit(&engine).await.unwrap();
            }
            return;
        }
        let (mut seen, began) = (0, Instant::now());
        while seen < NAMES {
            assert!(began.elapsed() < Duration::from_secs(60), "only {seen} names have come");
            let page = other.read_log(&LogQuery::after(Position::ZERO)).await.unwrap();
            for event in &page.events {
                assert_eq!(event.event_type().as_str().as_bytes(), event.payload());
            }
            seen = page.events.len();
            history(&other, id).await;
        }
    });
}

pub(crate) async fn names_survive_reopening(fixture: &mut Fixture) {
    let id = grown(&fixture.engine(), "user", 1).await;
    fixture.engine().warmup(&[known("warm", &["Warmed"])]).await.unwrap();
    let engine = fixture.reopen().await;
    assert_eq!(engine.types().await.unwrap(), [known("user", &["Happened"]), known("warm", &["Warmed"])]);
    unit().append(id, "user", 1, 1).commit(&engine).await.unwrap();
    assert_eq!(sequence_of(&engine, id).await, 2);
}

/// Texts that collations or Unicode normal forms treat as equal, as long as a name may be.
fn look_alikes() -> [String; 6] {
    let long = |last: &str| "n".repeat(limits::NAME_BYTES - last.len()) + last;
    [
        long("a"),
        long("b"),
        long("A"),
        "caf\u{e9}".to_owned(),
        "cafe\u{301}".to_owned(),
        "caf\u{e9} ".to_owned(),
    ]
}

pub(crate) async fn names_compare_bytewise_up_to_the_last_byte(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let names = look_alikes();
    for name in &names {
        let id = new_id(&engine).await;
        let events = names.iter().map(|other| event(other, other.as_bytes())).collect();
        let batch = unit().create_keyed(id, name, name).events(id, name, 0, events).command(name);
        batch.commit(&engine).await.unwrap();
    }
    let types = engine.types().await.unwrap();
    assert_eq!(types.len(), names.len());
    assert!(types.iter().all(|known| known.event_types.len() == names.len()));
    assert!(types.is_sorted(), "in order");
    for (place, name) in names.iter().enumerate() {
        let of_type = Filter::all().with_aggregate_type(type_named(name));
        let found = read_all(&engine, LogQuery::after(Position::ZERO).with_filter(of_type)).await;
        let positions: Vec<i64> = (1..=6).map(|nth| place as i64 * 6 + nth).collect();
        assert_eq!(numbers(&found), positions, "of aggregate type {place}");
        assert!(found.iter().all(|event| event.event_type().as_str().as_bytes() == event.payload()));
        let of_event = Filter::all().with_event_type(event_named(name));
        let found = read_all(&engine, LogQuery::after(Position::ZERO).with_filter(of_event)).await;
        let positions: Vec<i64> = (0..6).map(|nth| nth * 6 + place as i64 + 1).collect();
        assert_eq!(numbers(&found), positions, "of event type {place}");
        let receipt = receipt_of(&engine, &command(name)).await.unwrap();
        assert_eq!(Some(receipt.aggregates[0].0), holder(&engine, name, name).await, "of command {place}");
    }
}

pub(crate) async fn a_type_without_events_is_registered_too(fixture: &mut Fixture) {
    let engine = fixture.engine();
    engine.warmup(&[known("bare", &[])]).await.unwrap();
    let id = new_id(&engine).await;
    unit().create(id, "empty").commit(&engine).await.unwrap();
    assert_eq!(engine.types().await.unwrap(), [known("bare", &[]), known("empty", &[])]);
}

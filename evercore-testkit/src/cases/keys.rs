//! Natural keys: unique per aggregate type, compared bytewise, without races.

use evercore_core::{ErrorKind, Key, limits};

use crate::fixture::Fixture;
use crate::tools::*;

pub(crate) async fn an_aggregate_is_found_by_its_key(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = keyed(&engine, "user", "ann").await;
    assert_eq!(holder(&engine, "user", "ann").await, Some(id));
    assert_eq!(history(&engine, id).await.key, Some(key("ann")));
    assert_eq!(holder(&engine, "user", "bob").await, None);
    assert_eq!(holder(&engine, "order", "ann").await, None);
}

pub(crate) async fn a_taken_key_is_key_taken_and_writes_nothing(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let first = keyed(&engine, "user", "ann").await;
    let other = grown(&engine, "user", 1).await;
    let before = everything(&engine).await;
    let second = new_id(&engine).await;
    let batch =
        unit().append(other, "user", 1, 1).create_keyed(second, "user", "ann").append(second, "user", 0, 1);
    match batch.commit(&engine).await.unwrap_err().kind() {
        ErrorKind::KeyTaken { aggregate_type, .. } => assert_eq!(aggregate_type.as_str(), "user"),
        kind => panic!("expected KeyTaken, was {kind:?}"),
    }
    assert_eq!(everything(&engine).await, before);
    assert!(!exists(&engine, second).await);
    assert_eq!(sequence_of(&engine, other).await, 1);
    assert_eq!(holder(&engine, "user", "ann").await, Some(first));
}

pub(crate) async fn the_same_key_for_another_type_is_allowed(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let user = keyed(&engine, "user", "4711").await;
    let order = keyed(&engine, "order", "4711").await;
    assert_eq!(holder(&engine, "user", "4711").await, Some(user));
    assert_eq!(holder(&engine, "order", "4711").await, Some(order));
}

pub(crate) async fn a_changed_key_finds_and_the_old_one_is_free(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ann = keyed(&engine, "user", "ann").await;
    unit().key(ann, "user", "anna").commit(&engine).await.unwrap();
    assert_eq!(holder(&engine, "user", "ann").await, None);
    assert_eq!(holder(&engine, "user", "anna").await, Some(ann));
    assert_eq!(history(&engine, ann).await.key, Some(key("anna")));
    let second = keyed(&engine, "user", "ann").await;
    assert_eq!(holder(&engine, "user", "ann").await, Some(second));
}

pub(crate) async fn a_key_does_not_change_to_a_taken_one(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (ann, bob) = (keyed(&engine, "user", "ann").await, keyed(&engine, "user", "bob").await);
    let batch = unit().append(bob, "user", 0, 1).key(bob, "user", "ann");
    assert_kind!(batch.commit(&engine).await, ErrorKind::KeyTaken { .. });
    assert_eq!(holder(&engine, "user", "ann").await, Some(ann));
    assert_eq!(holder(&engine, "user", "bob").await, Some(bob));
    assert_eq!(sequence_of(&engine, bob).await, 0);
}

pub(crate) async fn an_aggregate_without_a_key_can_get_one(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 1).await;
    unit().key(id, "user", "late").commit(&engine).await.unwrap();
    assert_eq!(holder(&engine, "user", "late").await, Some(id));
    assert_eq!(sequence_of(&engine, id).await, 1);
}

pub(crate) async fn a_key_changes_to_itself(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = keyed(&engine, "user", "ann").await;
    unit().key(id, "user", "ann").commit(&engine).await.unwrap();
    assert_eq!(holder(&engine, "user", "ann").await, Some(id));
}

pub(crate) async fn a_key_comes_back_to_its_first_holder(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = keyed(&engine, "user", "ann").await;
    unit().key(id, "user", "anna").commit(&engine).await.unwrap();
    unit().key(id, "user", "ann").commit(&engine).await.unwrap();
    assert_eq!(holder(&engine, "user", "ann").await, Some(id));
    assert_eq!(holder(&engine, "user", "anna").await, None);
}

pub(crate) async fn a_key_change_is_rolled_back_with_its_unit(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (ann, other) = (keyed(&engine, "user", "ann").await, grown(&engine, "user", 1).await);
    let batch = unit().key(ann, "user", "anna").append(other, "user", 0, 1);
    assert_kind!(batch.commit(&engine).await, ErrorKind::Conflict { .. });
    assert_eq!(holder(&engine, "user", "ann").await, Some(ann));
    assert_eq!(holder(&engine, "user", "anna").await, None);
}

pub(crate) async fn a_key_that_the_same_batch_takes_from_its_holder_is_free(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let old = keyed(&engine, "user", "ann").await;
    let new = new_id(&engine).await;
    unit().create_keyed(new, "user", "ann").key(old, "user", "ann (old)").commit(&engine).await.unwrap();
    assert_eq!(holder(&engine, "user", "ann").await, Some(new));
    assert_eq!(holder(&engine, "user", "ann (old)").await, Some(old));
}

pub(crate) async fn aggregates_change_keys_with_one_another(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let mut ids = Vec::new();
    for name in ["a", "b", "c"] {
        ids.push(keyed(&engine, "user", name).await);
    }
    let batch = unit().key(ids[0], "user", "b").key(ids[1], "user", "c").key(ids[2], "user", "a");
    batch.commit(&engine).await.unwrap();
    for (name, id) in [("a", ids[2]), ("b", ids[0]), ("c", ids[1])] {
        assert_eq!(holder(&engine, "user", name).await, Some(id));
        assert_eq!(history(&engine, id).await.key, Some(key(name)));
    }
}

/// Pairs that collations and Unicode normal forms treat as equal.
const LOOK_ALIKES: &[&str] = &[
    "caf\u{e9}",
    "cafe\u{301}",
    "CAF\u{c9}",
    "ann",
    "ann ",
    " ann",
    "Ann",
    "ANN",
    "i",
    "I",
    "\u{131}",
    "\u{130}",
    "ß",
    "ss",
    "😀",
    "😁",
    "\u{feff}ann",
    "a\u{200d}nn",
    "a%",
    "a_",
    "'; DROP TABLE events; --",
    "\"",
    "\\",
    "$1",
    "?",
    "\u{1}",
    "\n",
    "\t",
];

pub(crate) async fn keys_compare_bytewise(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let mut ids = Vec::new();
    for text in LOOK_ALIKES {
        ids.push(keyed(&engine, "user", text).await);
    }
    for (text, id) in LOOK_ALIKES.iter().zip(ids) {
        assert_eq!(holder(&engine, "user", text).await, Some(id), "{text:?}");
        assert_eq!(history(&engine, id).await.key, Some(key(text)));
    }
}

pub(crate) async fn the_longest_key_is_kept(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (long, wide) = ("k".repeat(limits::KEY_BYTES), "😀".repeat(limits::KEY_BYTES / 4));
    let (first, second) = (keyed(&engine, "user", &long).await, keyed(&engine, "user", &wide).await);
    assert_eq!(holder(&engine, "user", &long).await, Some(first));
    assert_eq!(holder(&engine, "user", &wide).await, Some(second));
    assert_eq!(holder(&engine, "user", &long[1..]).await, None);
}

pub(crate) async fn a_bad_key_is_refused_where_it_is_born(fixture: &mut Fixture) {
    let store = fixture.store();
    let long = "k".repeat(limits::KEY_BYTES + 1);
    for bad in ["", "\0", "ann\0", long.as_str()] {
        assert_kind!(Key::new(bad), ErrorKind::InvalidName);
        assert_kind!(store.load_or_create::<Account>(bad).await, ErrorKind::InvalidName);
        assert_kind!(store.begin().create_with_key::<Account>(bad).await, ErrorKind::InvalidName);
    }
    assert_eq!(everything(&fixture.engine()).await, (vec![], vec![]));
}

pub(crate) async fn racing_creations_of_one_key_leave_one_winner(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = new_ids(&engine, 32).await;
    let results = fixture.threads(32, async |number| {
        let id = ids[number];
        unit().create_keyed(id, "user", "ann").append(id, "user", 0, 1).commit(&engine).await
    });
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    for result in results.into_iter().filter(Result::is_err) {
        assert_kind!(result, ErrorKind::KeyTaken { .. });
    }
    assert_eq!(log(&engine).await.len(), 1);
}

pub(crate) async fn racing_load_or_create_makes_one_aggregate(fixture: &mut Fixture) {
    let store = fixture.store();
    let ids = fixture.threads(64, async |_| store.load_or_create::<Account>("ann").await.unwrap().id());
    assert!(ids.iter().all(|id| *id == ids[0]), "all get the same aggregate");
    assert_eq!(holder(&fixture.engine(), "account", "ann").await, Some(ids[0]));
    let tasks = (0..64).map(|_| store.load_or_create::<Account>("bob"));
    let ids: Vec<_> = join_all(tasks).await.into_iter().map(|loaded| loaded.unwrap().id()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "all get the same aggregate");
}

pub(crate) async fn one_who_lost_a_key_can_go_on(fixture: &mut Fixture) {
    let store = fixture.store();
    let mut loser = store.begin();
    let mut account = loser.load_or_create::<Account>("ann").await.unwrap();
    loser.record(&mut account, deposited(2)).unwrap();
    store.update_or_create::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    assert!(loser.commit().await.unwrap_err().is_conflict(), "on fresh state the same unit can succeed");
    store.update_or_create::<Account, _, _>("ann", |_| [deposited(2)]).await.unwrap();
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 3);
}

pub(crate) async fn a_unit_sees_the_keys_it_gives(fixture: &mut Fixture) {
    let store = fixture.store();
    let first = store.load_or_create::<Account>("ann").await.unwrap().id();
    let mut work = store.begin();
    let mut account = work.load::<Account>("ann").await.unwrap();
    work.change_key(&mut account, "anna").unwrap();
    assert_eq!(work.load::<Account>("anna").await.unwrap().id(), first);
    assert_kind!(work.load::<Account>("ann").await, ErrorKind::NotFound);
    assert_kind!(store.load::<Account>("anna").await, ErrorKind::NotFound);
    work.commit().await.unwrap();
    assert_eq!(store.find::<Account>("anna").await.unwrap(), Some(first));
    assert_eq!(store.find::<Account>("ann").await.unwrap(), None);
}

pub(crate) async fn keys_survive_reopening(fixture: &mut Fixture) {
    let ann = keyed(&fixture.engine(), "user", "ann").await;
    let engine = fixture.reopen().await;
    assert_eq!(holder(&engine, "user", "ann").await, Some(ann));
    let second = new_id(&engine).await;
    let again = unit().create_keyed(second, "user", "ann").commit(&engine).await;
    assert_kind!(again, ErrorKind::KeyTaken { .. });
}

pub(crate) async fn long_keys_differ_in_their_last_byte(fixture: &mut Fixture) {
    let engine = fixture.engine();
    for length in [63, 64, 127, 128, 255, 256, limits::KEY_BYTES] {
        let keys = ["a", "b"].map(|last| "k".repeat(length - 1) + last);
        let mut ids = Vec::new();
        for text in &keys {
            ids.push(keyed(&engine, "user", text).await);
        }
        for (text, id) in keys.iter().zip(ids) {
            assert_eq!(holder(&engine, "user", text).await, Some(id), "{length} bytes");
            assert_eq!(history(&engine, id).await.key, Some(key(text)), "{length} bytes");
        }
    }
}

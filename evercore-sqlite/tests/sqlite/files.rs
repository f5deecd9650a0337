//! Which files can be opened as a store.

use std::fs;
use std::pin::pin;
use std::time::{Duration, Instant};

use evercore_sqlite::{Aggregate, ErrorKind, EventStore, Json, Position, SqliteEngine, StorageEngine};
use futures_lite::future::{poll_once, zip};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};

use crate::common::{Folder, as_child, block_on, child, create, kind, one_event, positions};

fn open_kind(path: &std::path::Path) -> ErrorKind {
    kind(block_on(SqliteEngine::open(path)))
}

#[test]
fn a_store_opens_again_with_all_it_had() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let id = engine.store_id().to_owned();
        create(&engine, Some("a")).await.unwrap();
        engine.close().await.unwrap();
        assert_eq!(kind(engine.head().await), ErrorKind::Closed);
        assert_eq!(kind(engine.reserve(1).await), ErrorKind::Closed);
        assert_eq!(kind(create(&engine, None).await), ErrorKind::Closed);
        assert!(!folder.file("store.db-wal").exists(), "closing tidies the WAL away");

        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        assert_eq!(engine.store_id(), id);
        assert_eq!(positions(&engine).await, [1]);
        let debug = format!("{engine:?}");
        assert!(debug.contains("store.db") && debug.contains("PowerLoss"), "{debug}");
    });
}

/// The queue of commits and the store end together, or neither ends. The only thread for blocking work is busy here, so
/// a dropped call has not begun.
#[test]
fn a_dropped_close_leaves_a_store_that_works() {
    let Some(path) = as_child() else {
        let folder = Folder::new();
        let mut child = child("files::a_dropped_close_leaves_a_store_that_works", &folder.store());
        assert!(child.env("BLOCKING_MAX_THREADS", "1").status().unwrap().success());
        return;
    };
    block_on(async {
        let engine = SqliteEngine::open(path).await.unwrap();
        let (send, receive) = std::sync::mpsc::channel::<()>();
        let busy = blocking::unblock(move || receive.recv());
        assert!(poll_once(pin!(engine.close())).await.is_none());
        drop(send);
        busy.await.unwrap_err();
        create(&engine, None).await.unwrap();
        // The queue's thread also looks for commits of other engines.
        let (other, began) = (SqliteEngine::open(engine.path().unwrap()).await.unwrap(), Instant::now());
        let wait = engine.wait(Position::new(1).unwrap(), Duration::from_secs(10));
        let (head, _) = zip(wait, create(&other, None)).await;
        assert_eq!(head.unwrap().get(), 2);
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        engine.close().await.unwrap();
        assert_eq!(kind(create(&engine, None).await), ErrorKind::Closed);
    });
}

#[test]
fn a_file_that_is_no_database_is_refused_and_left_alone() {
    let folder = Folder::new();
    let text = "a letter, and no database at all ".repeat(200);
    fs::write(folder.store(), &text).unwrap();
    assert_eq!(open_kind(&folder.store()), ErrorKind::NotAStore);
    assert_eq!(fs::read_to_string(folder.store()).unwrap(), text);
}

#[test]
fn the_database_of_another_application_is_refused_and_left_alone() {
    let folder = Folder::new();
    for setup in ["CREATE TABLE letters (text)", "PRAGMA application_id = 7"] {
        let path = folder.file("other.db");
        Connection::open(&path).unwrap().execute_batch(setup).unwrap();
        let before = fs::read(&path).unwrap();
        assert_eq!(open_kind(&path), ErrorKind::NotAStore);
        assert_eq!(fs::read(&path).unwrap(), before);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_newer_schema_is_refused_with_both_numbers() {
    let folder = Folder::new();
    drop(block_on(SqliteEngine::open(folder.store())).unwrap());
    Connection::open(folder.store()).unwrap().execute_batch("UPDATE store SET schema_version = 99").unwrap();
    let error = block_on(SqliteEngine::open(folder.store())).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::SchemaTooNew { found: 99, known: 1, .. }), "{error:?}");
}

#[test]
fn a_file_that_was_cut_off_is_refused() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        create(&engine, None).await.unwrap();
        engine.close().await.unwrap();
    });
    let whole = fs::read(folder.store()).unwrap();
    for length in [1, 50, 100, 512, 4096, whole.len() - 4096, whole.len() - 1] {
        fs::write(folder.store(), &whole[..length]).unwrap();
        let opened =
            block_on(SqliteEngine::open(folder.store())).map(drop).map_err(|error| error.kind().clone());
        assert_eq!(opened, Err(ErrorKind::NotAStore), "{length} of {} bytes", whole.len());
    }
}

#[test]
fn a_store_that_is_not_to_be_created_is_not_created() {
    let folder = Folder::new();
    let open = || kind(block_on(SqliteEngine::builder().create(false).open(folder.store())));
    assert_eq!(open(), ErrorKind::NotAStore);
    assert!(!folder.store().exists());
    fs::write(folder.store(), "").unwrap();
    assert_eq!(open(), ErrorKind::NotAStore);
    assert_eq!(fs::metadata(folder.store()).unwrap().len(), 0);
    drop(block_on(SqliteEngine::open(folder.store())).unwrap());
    drop(block_on(SqliteEngine::builder().create(false).open(folder.store())).unwrap());
}

#[test]
fn a_store_that_was_begun_and_not_finished_is_finished() {
    let folder = Folder::new();
    let history = "CREATE TABLE evercore_schema_history (version int4 PRIMARY KEY, name VARCHAR(255),
                   applied_on VARCHAR(255), checksum VARCHAR(255))";
    Connection::open(folder.store()).unwrap().execute_batch(history).unwrap();
    let engine = block_on(SqliteEngine::open(folder.store())).unwrap();
    block_on(create(&engine, None)).unwrap();
}

#[test]
fn names_that_mean_no_file_are_refused() {
    for path in ["", ":memory:", "file:store.db", "file::memory:?cache=shared"] {
        assert_eq!(open_kind(path.as_ref()), ErrorKind::Invalid, "{path}");
    }
}

#[test]
fn a_folder_is_no_store_and_a_missing_folder_is_said_to_be_missing() {
    let folder = Folder::new();
    fs::create_dir(folder.store()).unwrap();
    assert_eq!(open_kind(&folder.store()), ErrorKind::NotAStore);
    assert_eq!(open_kind(&folder.file("nowhere").join("store.db")), ErrorKind::Backend);
}

#[test]
fn a_store_opened_for_reading_reads_and_does_not_write() {
    let folder = Folder::new();
    block_on(async {
        let writing = SqliteEngine::open(folder.store()).await.unwrap();
        let (id, _) = create(&writing, Some("a")).await.unwrap();
        let reading = SqliteEngine::builder().read_only(true).open(folder.store()).await.unwrap();
        assert_eq!(positions(&reading).await, [1]);
        assert_eq!(kind(reading.commit(one_event(id, 1)).await), ErrorKind::ReadOnly);
        assert_eq!(kind(reading.reserve(1).await), ErrorKind::ReadOnly);
        assert_eq!(kind(reading.warmup(&[]).await), ErrorKind::ReadOnly);
        writing.commit(one_event(id, 1)).await.unwrap();
        assert_eq!(positions(&reading).await, [1, 2]);
    });
}

/// Root can write everything, so permissions are tested only for other accounts.
#[cfg(unix)]
#[test]
fn a_file_without_leave_to_write_is_read_only() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    drop(block_on(SqliteEngine::open(folder.store())).unwrap());
    fs::set_permissions(folder.store(), fs::Permissions::from_mode(0o444)).unwrap();
    if fs::OpenOptions::new().append(true).open(folder.store()).is_ok() {
        eprintln!("SKIPPED: this user may write everything");
        return;
    }
    assert_eq!(open_kind(&folder.store()), ErrorKind::ReadOnly);
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Order;

#[derive(Serialize, Deserialize)]
enum OrderEvent {
    Placed,
}

impl Aggregate for Order {
    const TYPE: &'static str = "order";
    type Event = OrderEvent;
    type Codec = Json;

    fn apply(&mut self, OrderEvent::Placed: OrderEvent) {}
}

#[test]
fn a_handle_of_another_file_is_refused_and_one_from_before_reopening_is_good() {
    let folder = Folder::new();
    block_on(async {
        let ours = SqliteEngine::open(folder.store()).await.unwrap();
        let theirs = SqliteEngine::open(folder.file("other.db")).await.unwrap();
        let mut handles = Vec::new();
        for engine in [&ours, &theirs] {
            let store = EventStore::new(engine.clone());
            store.update_or_create::<Order, _, _>("a", |_| [OrderEvent::Placed]).await.unwrap();
            handles.push(store.load::<Order>("a").await.unwrap());
        }
        let [own, stranger] = &mut handles[..] else { panic!("two stores have two handles") };
        assert_eq!((own.id(), own.sequence()), (stranger.id(), stranger.sequence()));
        ours.close().await.unwrap();

        let again = EventStore::new(SqliteEngine::open(folder.store()).await.unwrap());
        let mut work = again.begin();
        let refused = work.record(stranger, OrderEvent::Placed).unwrap_err();
        assert!(refused.to_string().contains("another store"), "{refused}");
        assert_eq!(*refused.kind(), ErrorKind::Invalid);
        work.record(own, OrderEvent::Placed).unwrap();
        work.commit().await.unwrap();
        assert_eq!(again.load::<Order>("a").await.unwrap().sequence().get(), 2);
    });
}

#[test]
fn two_engines_on_one_file_agree() {
    let folder = Folder::new();
    block_on(async {
        let one = SqliteEngine::open(folder.store()).await.unwrap();
        let two = SqliteEngine::open(folder.store()).await.unwrap();
        assert_eq!(one.store_id(), two.store_id());
        let (id, _) = create(&one, Some("a")).await.unwrap();
        assert!(matches!(kind(create(&two, Some("a")).await), ErrorKind::KeyTaken { .. }));
        two.commit(one_event(id, 1)).await.unwrap();
        assert!(matches!(kind(one.commit(one_event(id, 1)).await), ErrorKind::Conflict { .. }));
        let types = one.types().await.unwrap();
        assert_eq!(types, two.types().await.unwrap());
        assert_eq!(types[0].event_types.len(), 2);
        assert_eq!(positions(&one).await, positions(&two).await);
    });
}

#[test]
fn two_engines_of_one_process_may_come_and_go() {
    let folder = Folder::new();
    block_on(async {
        let stays = SqliteEngine::open(folder.store()).await.unwrap();
        for _ in 0..3 {
            let goes = SqliteEngine::open(folder.store()).await.unwrap();
            create(&goes, None).await.unwrap();
            goes.close().await.unwrap();
            create(&stays, None).await.unwrap();
        }
        assert_eq!(positions(&stays).await, [1, 2, 3, 4, 5, 6]);
    });
}

#[test]
fn eight_processes_may_make_one_store_at_once() {
    if let Some(path) = as_child() {
        let engine = block_on(SqliteEngine::open(path)).unwrap();
        block_on(create(&engine, None)).unwrap();
        println!("store {}", engine.store_id());
        return;
    }
    for _ in 0..3 {
        let folder = Folder::new();
        let start =
            || child("files::eight_processes_may_make_one_store_at_once", &folder.store()).spawn().unwrap();
        let children: Vec<_> = (0..8).map(|_| start()).collect();
        let mut stores = Vec::new();
        for child in children {
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
            stores.extend(said.lines().filter_map(|line| Some(line.split_once("store ")?.1.to_owned())));
        }
        assert_eq!(stores.len(), 8);
        stores.dedup();
        assert_eq!(stores.len(), 1);
        let engine = block_on(SqliteEngine::open(folder.store())).unwrap();
        assert_eq!(block_on(positions(&engine)), [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}

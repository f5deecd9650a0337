//! The file of a store is closed, copied, linked, dumped, archived.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use evercore_core::engine::Batch;
use evercore_sqlite::{ErrorKind, SqliteEngine, StorageEngine};
use rusqlite::Connection;

use crate::common::{Folder, append, block_on, create, event, kind, one_event, positions};

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn wal_bytes(path: &Path) -> u64 {
    fs::metadata(beside(path, "-wal")).map_or(0, |wal| wal.len())
}

/// Opens it, adds this many events and copies the files as a crash would leave them.
fn crash_image(from: &Path, to: &Path, events: usize) {
    block_on(async {
        let engine = SqliteEngine::open(from).await.unwrap();
        for _ in 0..events {
            create(&engine, None).await.unwrap();
        }
        fs::copy(from, to).unwrap();
        fs::copy(beside(from, "-wal"), beside(to, "-wal")).unwrap();
    });
    assert!(wal_bytes(to) > 0);
}

#[test]
fn close_under_running_reads_leaves_all_commits_in_the_one_file() {
    let folder = Folder::new();
    for round in 0..3 {
        let path = folder.file(&format!("{round}.db"));
        let engine = block_on(SqliteEngine::open(&path)).unwrap();
        let (id, _) = block_on(create(&engine, None)).unwrap();
        for at in 1..50 {
            block_on(engine.commit(one_event(id, at))).unwrap();
        }
        let is_closed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while block_on(
                        engine.read_log(&evercore_sqlite::LogQuery::after(evercore_sqlite::Position::ZERO)),
                    )
                    .is_ok()
                    {}
                });
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            block_on(engine.close()).unwrap();
            is_closed.store(true, Ordering::SeqCst);
            // Now, not later.
            assert_eq!(wal_bytes(&path), 0, "round {round}");
            fs::copy(&path, beside(&path, ".copy")).unwrap();
        });
        let copy = block_on(SqliteEngine::open(beside(&path, ".copy"))).unwrap();
        assert_eq!(block_on(positions(&copy)).len(), 50);
    }
}

#[test]
fn close_tells_if_commits_stay_in_the_write_ahead_log() {
    let folder = Folder::new();
    block_on(async {
        let builder = SqliteEngine::builder().busy_timeout(std::time::Duration::from_millis(50));
        let engine = builder.open(folder.store()).await.unwrap();
        create(&engine, None).await.unwrap();
        let other = Connection::open(folder.store()).unwrap();
        other.execute_batch("BEGIN; SELECT count(*) FROM events").unwrap();
        let _: i64 = other.query_row("SELECT count(*) FROM events", [], |row| row.get(0)).unwrap();
        create(&engine, None).await.unwrap();
        let error = engine.close().await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Unavailable);
        assert!(error.to_string().contains("store.db-wal"), "{error}");
        assert_eq!(kind(engine.head().await), ErrorKind::Closed);
        engine.close().await.unwrap();
    });
}

#[test]
fn a_backup_is_not_written_where_sqlite_gives_the_name_a_meaning() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        create(&engine, None).await.unwrap();
        for name in ["file:other.db?x=", "file:other.db", ":memory:", ""] {
            assert_eq!(kind(engine.backup_to(name).await), ErrorKind::Invalid, "{name}");
        }
        assert!(!Path::new("other.db").exists());
    });
}

#[cfg(unix)]
#[test]
fn a_backup_is_as_private_as_its_store() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        for mode in [0o600, 0o640] {
            fs::set_permissions(folder.store(), fs::Permissions::from_mode(mode)).unwrap();
            let target = folder.file(&format!("{mode:o}.db"));
            engine.backup_to(&target).await.unwrap();
            assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, mode);
        }
    });
}

#[cfg(unix)]
#[test]
fn a_store_behind_links_is_opened_with_its_write_ahead_log() {
    let folder = Folder::new();
    let (link, second) = (folder.file("link.db"), folder.file("second.db"));
    fs::create_dir(folder.file("data")).unwrap();
    std::os::unix::fs::symlink("data/store.db", &link).unwrap();
    std::os::unix::fs::symlink("link.db", &second).unwrap();
    block_on(async {
        // A link to a missing file makes that file. All names are the same store.
        let first = SqliteEngine::open(&second).await.unwrap();
        create(&first, None).await.unwrap();
        assert!(folder.file("data/store.db").exists());
        assert!(first.wal_bytes() > 0, "the write-ahead log is found");
    });
    crash_image(&folder.file("data/store.db"), &folder.file("data/crashed.db"), 20);
    // The newest pages are only in the write-ahead log: the file alone is shorter than the database.
    std::os::unix::fs::symlink("data/crashed.db", folder.file("crashed.db")).unwrap();
    let engine = block_on(SqliteEngine::open(folder.file("crashed.db"))).unwrap();
    assert_eq!(block_on(positions(&engine)).len(), 21);
    assert_eq!(engine.path().unwrap(), folder.file("data/crashed.db").canonicalize().unwrap());
}

/// The times of the view are exact, and equal to PostgreSQL's.
#[test]
fn the_view_shows_times_to_the_microsecond() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let (id, _) = create(&engine, None).await.unwrap();
        engine.commit(one_event(id, 1)).await.unwrap();
    });
    let file = Connection::open(folder.store()).unwrap();
    for (micros, text) in [
        (0i64, "1970-01-01T00:00:00.000000Z"),
        (-1, "1969-12-31T23:59:59.999999Z"),
        (1_719_999_999_999_500, "2024-07-03T09:46:39.999500Z"),
        (-62_135_596_800_000_000, "0001-01-01T00:00:00.000000Z"),
        (253_402_300_799_999_999, "9999-12-31T23:59:59.999999Z"),
    ] {
        file.execute("UPDATE events SET event_time = ?1, recorded_at = ?1", [micros]).unwrap();
        let shown = "SELECT event_time, recorded_at FROM event_log WHERE position = 1";
        let shown: (String, String) =
            file.query_row(shown, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        assert_eq!(shown, (text.to_owned(), text.to_owned()), "{micros}");
    }
}

/// `.dump` contains tables, rows and views, and nothing of the header.
#[test]
fn a_store_that_was_dumped_and_read_in_again_is_a_store() {
    let folder = Folder::new();
    let id = block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        create(&engine, Some("a")).await.unwrap();
        let id = engine.store_id().to_owned();
        engine.close().await.unwrap();
        id
    });
    let dumped = Connection::open(folder.file("dumped.db")).unwrap();
    dumped.execute("ATTACH ?1 AS old", [folder.store().to_str().unwrap()]).unwrap();
    let texts = |sql: &str| -> Vec<(String, String)> {
        let mut statement = dumped.prepare(sql).unwrap();
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        rows.map(Result::unwrap).collect()
    };
    let schema = texts(
        "SELECT name, sql FROM old.sqlite_schema WHERE sql IS NOT NULL AND name <> 'sqlite_sequence' ORDER BY type = 'table' DESC",
    );
    dumped.execute_batch("PRAGMA foreign_keys = 0").unwrap();
    for (_, sql) in &schema {
        dumped.execute_batch(sql).unwrap();
    }
    for (name, _) in texts("SELECT name, type FROM old.sqlite_schema WHERE type = 'table'") {
        dumped
            .execute_batch(&format!(
                "DELETE FROM main.{name}; INSERT INTO main.{name} SELECT * FROM old.{name}"
            ))
            .unwrap();
    }
    drop(dumped);
    block_on(async {
        let reading = SqliteEngine::builder().read_only(true).open(folder.file("dumped.db")).await.unwrap();
        assert_eq!((positions(&reading).await, reading.store_id()), (vec![1], id.as_str()));
        drop(reading);
        let engine = SqliteEngine::open(folder.file("dumped.db")).await.unwrap();
        create(&engine, Some("b")).await.unwrap();
        assert!(matches!(kind(create(&engine, Some("a")).await), ErrorKind::KeyTaken { .. }));
        assert_eq!(positions(&engine).await, [1, 2]);
    });
    let file = Connection::open(folder.file("dumped.db")).unwrap();
    let mark: i64 = file.pragma_query_value(None, "application_id", |row| row.get(0)).unwrap();
    assert_eq!(mark, 0x4556_4352);
}

/// An application that migrates its tables with the same tool uses the tool's default name for its history.
#[test]
fn the_history_of_migrations_has_a_name_of_its_own() {
    let folder = Folder::new();
    drop(block_on(SqliteEngine::open(folder.store())).unwrap());
    let mut file = Connection::open(folder.store()).unwrap();
    let own = refinery::Migration::unapplied("V1__shop", "CREATE TABLE shop_orders (id INTEGER)").unwrap();
    refinery::Runner::new(&[own]).run(&mut file).unwrap();
    drop(block_on(SqliteEngine::open(folder.store())).unwrap());
}

#[test]
fn an_error_at_opening_names_the_file() {
    let folder = Folder::new();
    fs::write(folder.file("letter.db"), "a letter ".repeat(500)).unwrap();
    for path in [folder.file("letter.db"), folder.file("nowhere/store.db")] {
        let error = block_on(SqliteEngine::open(&path)).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_short_busy_time_out_is_no_deadline_for_opening() {
    let folder = Folder::new();
    let open = || {
        let builder = SqliteEngine::builder().busy_timeout(std::time::Duration::from_millis(1));
        block_on(builder.open(folder.store()))
    };
    drop(open().unwrap());
    let locked = Connection::open(folder.store()).unwrap();
    locked.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN IMMEDIATE").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(100));
            drop(locked);
        });
        drop(open().unwrap());
    });
}

/// Combines the file of one store, or of one moment, with the write-ahead log of another.
fn mix(file: &Path, log: &Path, into: &Path) {
    fs::copy(file, into).unwrap();
    fs::copy(beside(log, "-wal"), beside(into, "-wal")).unwrap();
}

#[test]
fn a_write_ahead_log_of_another_file_is_found_and_left_alone() {
    let folder = Folder::new();
    let (store, crashed, old) = (folder.store(), folder.file("crashed.db"), folder.file("old.db"));
    block_on(async {
        let engine = SqliteEngine::open(&store).await.unwrap();
        let (id, _) = create(&engine, None).await.unwrap();
        engine.backup_to(folder.file("backup.db")).await.unwrap();
        engine.close().await.unwrap();
        fs::copy(&store, &old).unwrap();
        let engine = SqliteEngine::open(&store).await.unwrap();
        // So large that the next log does not contain all of it.
        let mut batch = Batch::new();
        batch.append(append(id, 1, (0..30).map(|_| event("Large", &[7; 2_000])).collect())).unwrap();
        engine.commit(batch).await.unwrap();
        engine.close().await.unwrap();
        drop(SqliteEngine::open(folder.file("other.db")).await.unwrap());
    });
    crash_image(&store, &crashed, 20);
    crash_image(&folder.file("other.db"), &folder.file("other-crashed.db"), 40);
    let mixed = folder.file("mixed.db");
    for (file, log) in [
        ("backup.db", "crashed.db"),
        ("old.db", "crashed.db"),
        ("old.db", "other-crashed.db"),
        ("crashed.db", "other-crashed.db"),
        ("other-crashed.db", "crashed.db"),
    ] {
        mix(&folder.file(file), &folder.file(log), &mixed);
        let before = (fs::read(&mixed).unwrap(), fs::read(beside(&mixed, "-wal")).unwrap());
        let opened = block_on(SqliteEngine::open(&mixed)).map(drop).map_err(|error| error.kind().clone());
        assert_eq!(opened, Err(ErrorKind::NotAStore), "{file} with the log of {log}");
        assert!(before == (fs::read(&mixed).unwrap(), fs::read(beside(&mixed, "-wal")).unwrap()), "{file}");
        for suffix in ["", "-wal", "-shm"] {
            let _ = fs::remove_file(beside(&mixed, suffix));
        }
    }
    // A log without its file: SQLite would make a new file and delete the log.
    for file in [None, Some("")] {
        fs::copy(beside(&crashed, "-wal"), beside(&mixed, "-wal")).unwrap();
        file.into_iter().for_each(|nothing| fs::write(&mixed, nothing).unwrap());
        assert_eq!(kind(block_on(SqliteEngine::open(&mixed))), ErrorKind::NotAStore);
        assert!(wal_bytes(&mixed) > 0);
    }
    // Its own log fits.
    mix(&crashed, &crashed, &mixed);
    assert_eq!(block_on(positions(&block_on(SqliteEngine::open(&mixed)).unwrap())).len(), 51);
}

/// The files next to a file in use, and the file.
fn files(path: &Path) -> [Option<Vec<u8>>; 2] {
    ["", "-wal"].map(|suffix| fs::read(beside(path, suffix)).ok())
}

#[test]
fn a_restore_does_not_replace_a_broken_or_foreign_file_that_is_in_use() {
    let folder = Folder::new();
    let (backup, foreign) = (folder.file("backup.db"), folder.file("foreign.db"));
    let refused = |path: &Path| {
        let before = files(path);
        let error = block_on(SqliteEngine::restore_from(&backup, path)).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains("another application or process uses"), "{error}");
        assert_eq!(files(path), before);
    };
    let source = block_on(SqliteEngine::open(folder.file("source.db"))).unwrap();
    block_on(source.backup_to(&backup)).unwrap();
    // A program that holds the file as SQLite does, in this process or another one. SQLite sees no difference.
    let other = Connection::open(&foreign).unwrap();
    other.execute_batch("PRAGMA journal_mode = wal; CREATE TABLE letters (text)").unwrap();
    refused(&foreign);
    drop(other);
    block_on(SqliteEngine::restore_from(&backup, &foreign)).unwrap().unwrap();
    for length in [0, 1, 50, 4_000] {
        let path = folder.file(&format!("{length}.db"));
        let engine = block_on(SqliteEngine::open(&path)).unwrap();
        block_on(create(&engine, None)).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
        refused(&path);
        drop(engine);
    }
    let names = fs::read_dir(folder.store().parent().unwrap()).unwrap();
    assert!(names.flatten().all(|file| !file.file_name().to_string_lossy().contains(".part")));
}

/// Mistakes of operators: each error names the operation and the file, and nothing is lost.
#[test]
fn a_backup_or_a_restore_that_cannot_be_done_says_so_and_changes_nothing() {
    let folder = Folder::new();
    let (backup, link, nowhere) =
        (folder.file("backup.db"), folder.file("link.db"), folder.file("nowhere/store.db"));
    let a_folder = folder.file("folder");
    fs::create_dir(&a_folder).unwrap();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        create(&engine, None).await.unwrap();
        engine.backup_to(&backup).await.unwrap();
        fs::hard_link(folder.store(), &link).unwrap();
        let targets = [
            (&folder.store(), ErrorKind::Invalid),
            (&link, ErrorKind::Invalid),
            (&nowhere, ErrorKind::Backend),
        ];
        for (target, kind) in targets {
            let error = engine.backup_to(target).await.unwrap_err();
            let text = error.to_string();
            assert_eq!(error.kind(), &kind, "{text}");
            assert!(text.contains("backup") && text.contains(target.to_str().unwrap()), "{text}");
        }
        engine.close().await.unwrap();
        let restores = [
            (folder.store(), folder.store(), ErrorKind::Invalid),
            (link.clone(), folder.store(), ErrorKind::Invalid),
            (backup.clone(), nowhere.clone(), ErrorKind::Backend),
            (backup.clone(), a_folder.clone(), ErrorKind::NotAStore),
            (folder.file("none.db"), folder.store(), ErrorKind::NotAStore),
        ];
        for (from, to, kind) in restores {
            let error = SqliteEngine::restore_from(&from, &to).await.unwrap_err();
            let text = error.to_string();
            assert_eq!(error.kind(), &kind, "{text}");
            assert!(text.contains("restore") && text.contains(to.to_str().unwrap()), "{text}");
        }
        assert!(a_folder.is_dir());
        let mut names: Vec<_> = fs::read_dir(folder.store().parent().unwrap()).unwrap().collect();
        names.retain(|file| file.as_ref().unwrap().path() != a_folder);
        assert_eq!(names.len(), 3, "store, link and backup: {names:?}");
        assert_eq!(positions(&SqliteEngine::open(folder.store()).await.unwrap()).await, [1]);
    });
}

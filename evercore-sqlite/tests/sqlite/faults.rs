//! A full disk, a failed write, a long reader, a busy neighbour, a backup.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use evercore_core::engine::Batch;
use evercore_sqlite::{AggregateId, ErrorKind, SqliteEngine, StorageEngine};
use rusqlite::Connection;

use crate::common::{Folder, append, as_child, block_on, child, create, event, kind, one_event, positions};

fn large(id: AggregateId, expected: i64, bytes: usize) -> Batch {
    let mut batch = Batch::new();
    batch.append(append(id, expected, vec![event("Large", &vec![7; bytes])])).unwrap();
    batch
}

/// A file system of 1 MiB, until this is dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Option<Self> {
        std::fs::create_dir(at).unwrap();
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(at).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_writes_nothing_and_works_again_with_space() {
    let folder = Folder::new();
    let Some(disk) = SmallDisk::mount(&folder.file("disk")) else {
        eprintln!("SKIPPED: no leave to mount a small file system");
        return;
    };
    block_on(async {
        let engine = SqliteEngine::open(disk.0.join("store.db")).await.unwrap();
        let (id, _) = create(&engine, None).await.unwrap();
        let filler = disk.0.join("filler");
        std::fs::write(&filler, vec![1; 600 * 1024]).unwrap();
        let mut at = 1;
        let error = loop {
            match engine.commit(large(id, at, 50_000)).await {
                Ok(_) => at += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), &ErrorKind::Full);
        assert_eq!(engine.head().await.unwrap().get(), at);
        std::fs::remove_file(filler).unwrap();
        engine.commit(large(id, at, 50_000)).await.unwrap();
        assert_eq!(positions(&engine).await, (1..=at + 1).collect::<Vec<_>>());
    });
}

#[test]
fn a_backup_or_a_restore_onto_a_full_disk_leaves_it_as_it_was() {
    let folder = Folder::new();
    let Some(disk) = SmallDisk::mount(&folder.file("disk")) else {
        eprintln!("SKIPPED: no leave to mount a small file system");
        return;
    };
    let path = disk.0.join("store.db");
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let (id, _) = create(&engine, None).await.unwrap();
        let small = folder.file("small.db");
        engine.backup_to(&small).await.unwrap();
        SqliteEngine::restore_from(&small, &path).await.unwrap();
        engine.commit(large(id, 1, 1_500_000)).await.unwrap();
        let backup = folder.file("backup.db");
        engine.backup_to(&backup).await.unwrap();
        let before = std::fs::read(&path).unwrap();

        let target = disk.0.join("backup.db");
        let backed_up = engine.backup_to(&target).await.unwrap_err();
        let restored = SqliteEngine::restore_from(&backup, &path).await.unwrap_err();
        for (error, path) in [(backed_up, &target), (restored, &path)] {
            assert_eq!(error.kind(), &ErrorKind::Full, "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        let left: Vec<_> = std::fs::read_dir(&disk.0).unwrap().map(|file| file.unwrap().path()).collect();
        assert_eq!(left, std::slice::from_ref(&path));
        assert_eq!(std::fs::read(&path).unwrap(), before);
    });
}

/// A limit on the size of files makes the write inside a commit fail with another error than "disk full".
#[cfg(unix)]
#[test]
fn a_failed_flush_closes_the_engine_until_it_is_opened_again() {
    if let Some(path) = as_child() {
        block_on(async {
            let engine = SqliteEngine::open(path).await.unwrap();
            let (id, _) = create(&engine, None).await.unwrap();
            let mut at = 1;
            let error = loop {
                match engine.commit(large(id, at, 50_000)).await {
                    Ok(_) => at += 1,
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), &ErrorKind::OutcomeUnknown);
            assert_eq!(kind(engine.commit(one_event(id, at)).await), ErrorKind::Closed);
            assert_eq!(kind(engine.head().await), ErrorKind::Closed);
            assert_eq!(kind(engine.reserve(1).await), ErrorKind::Closed);
            engine.close().await.unwrap();
            println!("acknowledged {at}");
        });
        return;
    }
    let folder = Folder::new();
    let test = child("faults::a_failed_flush_closes_the_engine_until_it_is_opened_again", &folder.store());
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 1000; trap '' XFSZ; exec \"$0\" \"$@\""]).arg(test.get_program());
    let output = limited.args(test.get_args()).env("CHILD", folder.store()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let acknowledged =
        said.lines().find_map(|line| line.split_once("acknowledged ")?.1.parse::<i64>().ok()).unwrap();
    let engine = block_on(SqliteEngine::open(folder.store())).unwrap();
    let found = block_on(positions(&engine));
    assert!((acknowledged..=acknowledged + 1).contains(&i64::try_from(found.len()).unwrap()), "{found:?}");
}

#[test]
fn a_locked_store_is_unavailable_and_nothing_was_written() {
    let folder = Folder::new();
    block_on(async {
        let builder = SqliteEngine::builder().busy_timeout(Duration::from_millis(50));
        let engine = builder.open(folder.store()).await.unwrap();
        let (id, _) = create(&engine, None).await.unwrap();
        let neighbour = Connection::open(folder.store()).unwrap();
        neighbour.execute_batch("BEGIN IMMEDIATE").unwrap();
        let error = engine.commit(one_event(id, 1)).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Unavailable);
        assert!(error.is_retryable());
        assert_eq!(positions(&engine).await, [1]);
        neighbour.execute_batch("ROLLBACK").unwrap();
        engine.commit(one_event(id, 1)).await.unwrap();
    });
}

#[test]
fn a_long_reader_lets_the_wal_grow_and_the_next_flight_cuts_it() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let (id, _) = create(&engine, None).await.unwrap();
        let reader = Connection::open(folder.store()).unwrap();
        reader.execute_batch("BEGIN; SELECT count(*) FROM events").unwrap();
        let _: i64 = reader.query_row("SELECT count(*) FROM events", [], |row| row.get(0)).unwrap();
        let mut at = 1;
        let mut thousand = async || {
            let mut batch = Batch::new();
            let events = (0..1000).map(|_| event("Large", &[7; 4000])).collect();
            batch.append(append(id, at, events)).unwrap();
            at += 1000;
            engine.commit(batch).await.unwrap();
        };
        for _ in 0..8 {
            thousand().await;
        }
        let grown = engine.wal_bytes();
        assert!(grown > 16 * 1024 * 1024, "{grown}");
        assert_eq!(kind_of_checkpoint(&folder).await, ErrorKind::Unavailable);
        reader.execute_batch("COMMIT").unwrap();
        thousand().await;
        // The flight cleans up after its answers.
        for _ in 0..200 {
            if engine.wal_bytes() < grown {
                break;
            }
            engine.pause(Duration::from_millis(20)).await;
        }
        assert_eq!(engine.wal_bytes(), 0);
        engine.checkpoint().await.unwrap();
    });
}

async fn kind_of_checkpoint(folder: &Folder) -> ErrorKind {
    let builder = SqliteEngine::builder().busy_timeout(Duration::from_millis(20));
    kind(builder.open(folder.store()).await.unwrap().checkpoint().await)
}

#[test]
fn a_backup_under_writes_is_a_whole_store() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let (id, _) = create(&engine, Some("a")).await.unwrap();
        let writer = smol::spawn({
            let engine = engine.clone();
            async move {
                for at in 1..300 {
                    engine.commit(one_event(id, at)).await.unwrap();
                }
            }
        });
        for n in 0..5 {
            let before = engine.head().await.unwrap();
            let target = folder.file(&format!("backup{n}.db"));
            engine.backup_to(&target).await.unwrap();
            let copy = SqliteEngine::builder().create(false).open(&target).await.unwrap();
            let found = positions(&copy).await;
            assert_eq!(found, (1..=i64::try_from(found.len()).unwrap()).collect::<Vec<_>>());
            assert!(found.len() >= usize::try_from(before.get()).unwrap());
            assert_eq!(copy.store_id(), engine.store_id());
            assert_eq!(kind(engine.backup_to(&target).await), ErrorKind::Invalid);
        }
        writer.await;
        let parts = std::fs::read_dir(folder.store().parent().unwrap()).unwrap();
        assert!(parts.flatten().all(|file| !file.file_name().to_string_lossy().contains(".part")));

        let memory = SqliteEngine::open_in_memory().await.unwrap();
        create(&memory, None).await.unwrap();
        memory.backup_to(folder.file("memory.db")).await.unwrap();
        let copy = SqliteEngine::open(folder.file("memory.db")).await.unwrap();
        assert_eq!(positions(&copy).await, [1]);
    });
}

#[test]
fn of_backups_to_one_name_at_once_one_arrives() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        create(&engine, None).await.unwrap();
        let target = folder.file("backup.db");
        let backups: Vec<_> = (0..8)
            .map(|_| {
                let (engine, target) = (engine.clone(), target.clone());
                smol::spawn(
                    async move { engine.backup_to(target).await.map_err(|error| error.kind().clone()) },
                )
            })
            .collect();
        let mut outcomes = Vec::new();
        for backup in backups {
            outcomes.push(backup.await);
        }
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Err(ErrorKind::Invalid)).count(), 7);
        let copy = SqliteEngine::builder().create(false).open(&target).await.unwrap();
        assert_eq!(positions(&copy).await, [1]);
    });
}

#[cfg(unix)]
#[test]
fn a_backup_does_not_follow_a_link_to_nowhere() {
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        std::os::unix::fs::symlink(folder.file("nowhere"), folder.file("backup.db")).unwrap();
        assert_eq!(kind(engine.backup_to(folder.file("backup.db")).await), ErrorKind::Invalid);
        assert!(!folder.file("nowhere").exists());
    });
}

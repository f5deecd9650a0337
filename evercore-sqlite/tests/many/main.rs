//! Many at once: reads that wait, waiters without news, stores in one process. These tests count the threads and the
//! processor time of their process, so they have a process of their own.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

#[allow(dead_code, reason = "shared with the other tests, which need more of it")]
#[path = "../sqlite/common.rs"]
mod common;

use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use evercore_core::engine::Batch;
use evercore_sqlite::{ErrorKind, LogQuery, Position, SqliteEngine, StorageEngine};
use futures_lite::future;
use rusqlite::Connection;

use common::{Folder, as_child, block_on, child, create, event, kind, one_event};

/// Threads and processor time belong to the process, so these tests run one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[cfg(target_os = "linux")]
fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

#[cfg(target_os = "linux")]
fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The processor time of this process in seconds.
#[cfg(target_os = "linux")]
fn processor_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}

/// Running and waiting reads leave a thread for commits, and the other threads for the process.
#[cfg(target_os = "linux")]
#[test]
fn a_commit_does_not_wait_for_a_thousand_waiting_reads() {
    const READS: usize = 1_000;
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let folder = Folder::new();
    block_on(async {
        let builder = SqliteEngine::builder().busy_timeout(Duration::from_secs(60));
        let engine = builder.open(folder.store()).await.unwrap();
        let (id, _) = create(&engine, None).await.unwrap();
        let mut batch = Batch::new();
        batch
            .append(crate::common::append(id, 1, (0..1_000).map(|_| event("Large", &[7; 400])).collect()))
            .unwrap();
        engine.commit(batch).await.unwrap();
        let before = threads();
        let query = LogQuery::after(Position::ZERO);
        let mut reads = Vec::new();
        for _ in 0..READS {
            let mut read = engine.read_log(&query);
            if future::poll_once(&mut read).await.is_none() {
                reads.push(read);
            }
        }
        let started = Instant::now();
        engine.commit(one_event(id, 1_001)).await.unwrap();
        let (took, threads) = (started.elapsed(), threads() - before);
        let waiting = {
            let mut waiting = 0;
            for read in &mut reads {
                waiting += usize::from(future::poll_once(read).await.is_none());
            }
            waiting
        };
        println!(
            "commit beside {READS} waiting reads: {took:?}, {threads} more threads, {waiting} reads left"
        );
        assert!(threads <= 6, "{threads} threads");
        assert!(waiting > READS / 10, "only {waiting} reads were left: nothing was shown");
    });
}

#[cfg(target_os = "linux")]
#[test]
fn a_thousand_idle_waiters_cost_as_much_as_one_and_hear_of_others() {
    const WAITERS: usize = 1_000;
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let folder = Folder::new();
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let (id, _) = create(&engine, None).await.unwrap();
        let head = engine.head().await.unwrap();
        let waiters: Vec<_> = (0..WAITERS)
            .map(|_| {
                let engine = engine.clone();
                smol::spawn(async move { engine.wait(head, Duration::from_secs(20)).await.unwrap() })
            })
            .collect();
        futures_timer::Delay::new(Duration::from_millis(300)).await;
        let (started, before) = (Instant::now(), processor_seconds());
        futures_timer::Delay::new(Duration::from_secs(1)).await;
        let cores = (processor_seconds() - before) / started.elapsed().as_secs_f64();
        println!("{WAITERS} idle waiters: {cores:.3} cores");
        assert!(cores < 0.2, "{cores} cores");
        let other = SqliteEngine::open(folder.store()).await.unwrap();
        let started = Instant::now();
        other.commit(one_event(id, 1)).await.unwrap();
        for waiter in waiters {
            assert_eq!(waiter.await.get(), 2);
        }
        println!("all heard of another's commit after {:?}", started.elapsed());
        assert!(started.elapsed() < Duration::from_secs(5), "by a look, not by the end of their time");
    });
}

/// How many stores a process may open, and the error of one more: three descriptors each.
#[cfg(target_os = "linux")]
#[test]
fn a_store_takes_three_descriptors_and_who_has_none_left_is_told() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(folder) = as_child() {
        let mut stores = Vec::new();
        let (before, started) = (descriptors(), threads());
        let error = loop {
            match block_on(SqliteEngine::open(folder.join(format!("{}.db", stores.len())))) {
                Ok(store) => stores.push(store),
                Err(error) => break error,
            }
        };
        println!(
            "{} stores from {before} descriptors, {} more threads: {error}",
            stores.len(),
            threads() - started
        );
        assert_eq!(error.kind(), &ErrorKind::Unavailable);
        assert!(error.to_string().contains("too many files"), "{error}");
        assert!(stores.len() >= 60, "{} stores", stores.len());
        // With one store less, another store can have a reader.
        stores.pop();
        block_on(stores[0].read_log(&LogQuery::after(Position::ZERO))).unwrap();
        return;
    }
    let folder = Folder::new();
    fs::create_dir(folder.file("stores")).unwrap();
    let test = child("a_store_takes_three_descriptors_and_who_has_none_left_is_told", &folder.file("stores"));
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", "ulimit -n 200; exec \"$0\" \"$@\""]).arg(test.get_program());
    let output = limited.args(test.get_args()).env("CHILD", folder.file("stores")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{said}");
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_backup_takes_no_turn_of_the_reads() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let folder = Folder::new();
    block_on(async {
        let builder = SqliteEngine::builder().read_connections(1).busy_timeout(Duration::from_millis(50));
        let engine = builder.open(folder.store()).await.unwrap();
        let (id, _) = create(&engine, None).await.unwrap();
        for n in 0..10 {
            let mut batch = Batch::new();
            let events = (0..1_000).map(|_| event("Large", &[7; 2_000])).collect();
            batch.append(crate::common::append(id, 1 + n * 1_000, events)).unwrap();
            engine.commit(batch).await.unwrap();
        }
        let mut backup = Box::pin(engine.backup_to(folder.file("backup.db")));
        let mut heads = 0;
        while future::poll_once(&mut backup).await.is_none() {
            engine.position_at(evercore_sqlite::Timestamp::now()).await.unwrap();
            heads += 1;
        }
        assert!(heads > 3, "{heads} reads beside the backup");
    });
}

#[test]
fn an_archive_is_read_without_a_file_beside_it() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let folder = Folder::new();
    let archive = folder.file("archive %41?.db");
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        create(&engine, Some("a")).await.unwrap();
        let open = |path| SqliteEngine::builder().immutable(true).open(path);
        assert_eq!(kind(open(folder.store()).await), ErrorKind::NotAStore, "newest commits lie in the log");
        engine.close().await.unwrap();
        fs::copy(folder.store(), &archive).unwrap();
        let reading = open(archive.clone()).await.unwrap();
        assert_eq!(crate::common::positions(&reading).await, [1]);
        assert_eq!(kind(create(&reading, None).await), ErrorKind::ReadOnly);
        assert!(!fs::exists(folder.file("archive %41?.db-wal")).unwrap());
        assert!(!fs::exists(folder.file("archive %41?.db-shm")).unwrap());
    });
}

#[test]
fn a_backup_takes_the_place_of_a_store_and_the_store_is_kept() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let folder = Folder::new();
    let backup = folder.file("backup.db");
    block_on(async {
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        create(&engine, None).await.unwrap();
        engine.backup_to(&backup).await.unwrap();
        create(&engine, None).await.unwrap();
        let restore = || SqliteEngine::restore_from(&backup, folder.store());
        assert_eq!(kind(restore().await), ErrorKind::Unavailable, "the store is open");
        create(&engine, None).await.unwrap();
        engine.close().await.unwrap();

        let old = restore().await.unwrap().unwrap();
        let restored = SqliteEngine::open(folder.store()).await.unwrap();
        assert_eq!(crate::common::positions(&restored).await, [1]);
        create(&restored, None).await.unwrap();
        restored.close().await.unwrap();
        assert_eq!(crate::common::positions(&SqliteEngine::open(old).await.unwrap()).await, [1, 2, 3]);

        // A file that cannot be read, and its log, are kept unchanged.
        let broken = [folder.store(), folder.file("store.db-wal")];
        broken.iter().for_each(|path| fs::write(path, "broken").unwrap());
        let old = restore().await.unwrap().unwrap();
        assert_eq!(fs::read_to_string(&old).unwrap(), "broken");
        assert_eq!(fs::read_to_string(old.with_extension("replaced-2-wal")).unwrap(), "broken");
        assert_eq!(crate::common::positions(&SqliteEngine::open(folder.store()).await.unwrap()).await, [1]);

        fs::write(&backup, "no backup any more").unwrap();
        assert_eq!(kind(restore().await), ErrorKind::NotAStore);
        assert_eq!(crate::common::positions(&SqliteEngine::open(folder.store()).await.unwrap()).await, [1]);
    });
    drop(Connection::open(folder.store()));
}

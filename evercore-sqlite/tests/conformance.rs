//! The SQLite engine keeps every promise of the contract, on real files, in both of its modes.

#![allow(clippy::unwrap_used)]

use evercore_sqlite::SqliteEngine;
use evercore_testkit::Harness;
use tempfile::TempDir;

/// Reads and commits off the executor's threads, as opened by default.
struct Sqlite;

impl Harness for Sqlite {
    const NAME: &'static str = "sqlite";
    type Engine = SqliteEngine;
    type Guard = TempDir;

    async fn engine() -> Option<(TempDir, SqliteEngine)> {
        let folder = tempfile::tempdir().unwrap();
        let engine = SqliteEngine::open(folder.path().join("store.db")).await.unwrap();
        Some((folder, engine))
    }

    async fn another(folder: &TempDir) -> Option<SqliteEngine> {
        Some(SqliteEngine::open(folder.path().join("store.db")).await.unwrap())
    }
}

/// Reads and commits on the caller's thread.
struct OnCallersThread;

impl Harness for OnCallersThread {
    const NAME: &'static str = "sqlite";
    type Engine = SqliteEngine;
    type Guard = TempDir;

    async fn engine() -> Option<(TempDir, SqliteEngine)> {
        let folder = tempfile::tempdir().unwrap();
        let engine = Self::another(&folder).await?;
        Some((folder, engine))
    }

    async fn another(folder: &TempDir) -> Option<SqliteEngine> {
        let builder = SqliteEngine::builder().commit_on_caller_thread(true);
        Some(builder.open(folder.path().join("store.db")).await.unwrap())
    }
}

/// Without a file: one connection for everything.
struct InMemory;

impl Harness for InMemory {
    const NAME: &'static str = "sqlite-in-memory";
    type Engine = SqliteEngine;
    type Guard = SqliteEngine;

    async fn engine() -> Option<(SqliteEngine, SqliteEngine)> {
        let engine = SqliteEngine::open_in_memory().await.unwrap();
        Some((engine.clone(), engine))
    }

    async fn another(engine: &SqliteEngine) -> Option<SqliteEngine> {
        Some(engine.clone())
    }
}

mod default {
    evercore_testkit::conformance!(crate::Sqlite);
}

mod on_callers_thread {
    evercore_testkit::conformance!(crate::OnCallersThread);
}

mod in_memory {
    evercore_testkit::conformance!(crate::InMemory);
}

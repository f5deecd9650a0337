//! The conformance suite on the SQLite engine, on real files, in both modes.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::Duration;

use evercore_sqlite::{SqliteEngine, rusqlite};
use evercore_testkit::{Ability, Harness};
use tempfile::TempDir;

/// A store in its own folder.
struct Place(TempDir);

impl Place {
    fn fresh() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("store.db")
    }

    /// A copy of all files except the shared memory, which does not survive its processes.
    fn crash_image(&self) -> Self {
        let image = Self::fresh();
        for file in std::fs::read_dir(self.0.path()).unwrap().map(Result::unwrap) {
            if file.file_type().unwrap().is_file() && !file.file_name().to_string_lossy().ends_with("-shm") {
                std::fs::copy(file.path(), image.0.path().join(file.file_name())).unwrap();
            }
        }
        image
    }

    /// Makes the stored times this much later than the clock.
    fn turn_clock_back(&self, by: Duration) -> bool {
        let micros = i64::try_from(by.as_micros()).unwrap();
        let sql = format!(
            "UPDATE events SET recorded_at = recorded_at + {micros};
             UPDATE cursors SET expires_at = expires_at + {micros} WHERE expires_at > 0;"
        );
        rusqlite::Connection::open(self.file()).unwrap().execute_batch(&sql).unwrap();
        true
    }
}

/// Reads and commits outside of the executor's threads, which is the default.
struct Sqlite;

impl Harness for Sqlite {
    const NAME: &'static str = "sqlite";
    type Engine = SqliteEngine;
    type Guard = Place;

    async fn engine() -> Option<(Place, SqliteEngine)> {
        let place = Place::fresh();
        let engine = Self::further(&place).await?;
        Some((place, engine))
    }

    async fn further(place: &Place) -> Option<SqliteEngine> {
        Some(SqliteEngine::open(place.file()).await.unwrap())
    }

    async fn reopen(place: &Place) -> Option<SqliteEngine> {
        Self::further(place).await
    }

    async fn crash_image(place: &Place) -> Option<(Place, SqliteEngine)> {
        let image = place.crash_image();
        let engine = Self::further(&image).await?;
        Some((image, engine))
    }

    async fn turn_clock_back(place: &Place, by: Duration) -> bool {
        place.turn_clock_back(by)
    }
}

/// The cases that test the engine. The others test core, for which both ways of opening are the same.
const ENGINE_ITSELF: &[&str] = &[
    "types",
    "aggregates",
    "keys",
    "appends",
    "commands",
    "reading",
    "log::",
    "snapshots",
    "storage",
    "values",
    "cursors",
    "random::a_random_walk",
];

/// Reads and commits on the caller's thread.
struct OnCallersThread;

impl Harness for OnCallersThread {
    const NAME: &'static str = "sqlite";
    const CANNOT: &'static [Ability] = &[Ability::OffThread];
    const ONLY: &'static [&'static str] = ENGINE_ITSELF;
    type Engine = SqliteEngine;
    type Guard = Place;

    async fn engine() -> Option<(Place, SqliteEngine)> {
        let place = Place::fresh();
        let engine = Self::further(&place).await?;
        Some((place, engine))
    }

    async fn further(place: &Place) -> Option<SqliteEngine> {
        Some(SqliteEngine::builder().commit_on_caller_thread(true).open(place.file()).await.unwrap())
    }

    async fn reopen(place: &Place) -> Option<SqliteEngine> {
        Self::further(place).await
    }

    async fn crash_image(place: &Place) -> Option<(Place, SqliteEngine)> {
        let image = place.crash_image();
        let engine = Self::further(&image).await?;
        Some((image, engine))
    }

    async fn turn_clock_back(place: &Place, by: Duration) -> bool {
        place.turn_clock_back(by)
    }
}

/// Without a file: one connection for everything. The store exists as long as a clone of its engine.
struct InMemory;

impl Harness for InMemory {
    const NAME: &'static str = "sqlite-in-memory";
    const CANNOT: &'static [Ability] = &[Ability::Reopen, Ability::CrashImage, Ability::TurnClockBack];
    const ONLY: &'static [&'static str] = ENGINE_ITSELF;
    type Engine = SqliteEngine;
    type Guard = SqliteEngine;

    async fn engine() -> Option<(SqliteEngine, SqliteEngine)> {
        let engine = SqliteEngine::open_in_memory().await.unwrap();
        Some((engine.clone(), engine))
    }

    async fn further(engine: &SqliteEngine) -> Option<SqliteEngine> {
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

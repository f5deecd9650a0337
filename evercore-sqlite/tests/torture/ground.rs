//! SQLite for the shared long runs: a store in a file, and more tables in it.

use std::sync::Arc;

use evercore_sqlite::rusqlite::Connection;
use evercore_sqlite::{BoxError, EventStore, Projection, Result, SqliteEngine};
pub(crate) use futures_lite::future::block_on;
use tempfile::TempDir;

use crate::tally::counted;

pub(crate) type Engine = SqliteEngine;

/// Whether all processes use the clock of a server.
pub(crate) const HAS_ONE_CLOCK: bool = false;

/// Logs every move of a cursor. The engine replaces the row, so the trigger reads the old row before.
const WATCH: &str = "
    CREATE TABLE moves (nth INTEGER PRIMARY KEY, old_position INTEGER, position INTEGER, old_epoch INTEGER,
                        epoch INTEGER, owner TEXT) STRICT;
    CREATE TRIGGER watch BEFORE INSERT ON cursors BEGIN
        INSERT INTO moves (old_position, position, old_epoch, epoch, owner)
        SELECT position, new.position, epoch, new.epoch, new.owner FROM cursors
        WHERE (subscription, version, partition) = (new.subscription, new.version, new.partition);
    END;
    CREATE TRIGGER watch_unfenced AFTER UPDATE ON unfenced BEGIN
        INSERT INTO moves (old_position, position, old_epoch, epoch, owner)
        VALUES (old.position, new.position, 0, 0, NULL);
    END;";

/// A separate file.
pub(crate) struct Place {
    _folder: TempDir,
    pub(crate) address: String,
}

impl Place {
    #[allow(clippy::unnecessary_wraps, reason = "elsewhere there may be no server")]
    pub(crate) fn fresh() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let address = folder.path().join("store.db").to_str().unwrap().to_owned();
        Some(Self { _folder: folder, address })
    }
}

/// An engine on it, and SQL for the tests.
#[derive(Clone)]
pub(crate) struct Ground {
    pub(crate) engine: Engine,
}

impl Ground {
    pub(crate) async fn open(address: &str) -> Self {
        Self::of(SqliteEngine::open(address).await.unwrap())
    }

    pub(crate) fn of(engine: Engine) -> Self {
        Self { engine }
    }

    pub(crate) fn store(&self) -> EventStore {
        EventStore::new(self.engine.clone())
    }

    pub(crate) async fn watch(&self) {
        self.sql(WATCH).await;
    }

    /// Runs several statements. An `@` stands before the names of tables.
    pub(crate) async fn sql(&self, sql: &str) {
        let sql = sql.replace('@', "");
        let run = move |connection: &Connection| Ok(connection.execute_batch(&sql)?);
        self.engine.commit_with(self.store().begin(), run).await.unwrap();
    }

    /// Runs one statement and gives the number of changed rows.
    pub(crate) async fn execute(&self, sql: &str) -> u64 {
        let (sql, (send, receive)) = (sql.replace('@', ""), std::sync::mpsc::channel());
        let run = move |connection: &Connection| Ok(send.send(connection.execute(&sql, [])? as u64)?);
        self.engine.commit_with(self.store().begin(), run).await.unwrap();
        receive.recv().unwrap()
    }

    pub(crate) async fn rows<const N: usize>(&self, sql: &str) -> Vec<[i64; N]> {
        let (sql, (send, receive)) = (sql.replace('@', ""), std::sync::mpsc::channel());
        let ask = move |connection: &Connection| {
            let mut ask = connection.prepare_cached(&sql)?;
            let mut rows = ask.query([])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                let mut numbers = [0; N];
                for (at, number) in numbers.iter_mut().enumerate() {
                    *number = row.get(at)?;
                }
                found.push(numbers);
            }
            Ok(send.send(found)?)
        };
        self.engine.commit_with(self.store().begin(), ask).await.unwrap();
        receive.recv().unwrap()
    }

    /// Adds one to the row of each key, in a separate transaction.
    pub(crate) async fn count(&self, table: &str, keys: Vec<i64>) -> Result<(), BoxError> {
        let table = table.replace('@', "");
        let count = move |sql: &Connection| count(sql, &table, keys);
        self.engine.commit_with(self.store().begin(), count).await?;
        Ok(())
    }

    /// Writes these rows, new or not, in a separate transaction.
    pub(crate) async fn put(&self, table: &str, rows: Vec<(i64, i64)>) -> Result<(), BoxError> {
        let put = format!("INSERT OR REPLACE INTO {} VALUES (?1, ?2)", table.replace('@', ""));
        let put = move |sql: &Connection| {
            let mut put = sql.prepare_cached(&put)?;
            rows.into_iter().try_for_each(|row| put.execute(row).map(drop))?;
            Ok(())
        };
        self.engine.commit_with(self.store().begin(), put).await?;
        Ok(())
    }

    /// Adds one to the row of each event's key, exactly once, and then calls this in the same transaction.
    pub(crate) fn counting(
        &self,
        table: &str,
        key: fn(&evercore_sqlite::Event) -> i64,
        then: impl Fn() + Send + Sync + 'static,
    ) -> Projection {
        let (table, then) = (table.replace('@', ""), Arc::new(then));
        self.engine.projection(move |sql, delivery| {
            count(sql, &table, delivery.events().iter().map(key).collect())?;
            then();
            Ok(())
        })
    }
}

fn count(sql: &Connection, table: &str, keys: Vec<i64>) -> Result<(), BoxError> {
    let mut count = sql.prepare_cached(&format!(
        "INSERT INTO {table} VALUES (?1, ?2) ON CONFLICT DO UPDATE SET times = times + excluded.times"
    ))?;
    for row in counted(keys) {
        count.execute(row)?;
    }
    Ok(())
}

/// Runs the work of a process in a thread.
pub(crate) fn alone<T>(work: impl Future<Output = T>) -> T {
    block_on(work)
}

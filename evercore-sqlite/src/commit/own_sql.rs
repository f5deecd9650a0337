//! The user's own SQL in the transaction of a commit.

use std::any::Any;
use std::fmt;
use std::time::Duration;

use evercore_core::{BoxError, Error, Receipt, UnitOfWork};
use rusqlite::Connection;

use crate::connection::guard;
use crate::engine::SqliteEngine;

impl SqliteEngine {
    /// Commits a unit of work together with SQL of your own, in one transaction: a row of a read model, a message in
    /// an outbox. All of it is written, or nothing of it.
    ///
    /// The SQL runs first, then the unit's checks and writes. It queues for the one writer as every commit does, on a
    /// thread that may block, and has a transaction and a flush of its own. With a
    /// [command](UnitOfWork::set_command) it takes effect once: for a command that took effect before, it is
    /// not run. A unit that holds nothing is fine; that is how a table is made.
    ///
    /// ```
    /// # use evercore_sqlite::{Aggregate, EventStore, Json, Result, SqliteEngine};
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Clone, Default, Serialize, Deserialize)] struct Order { placed: bool }
    /// # #[derive(Serialize, Deserialize)] enum OrderEvent { Placed }
    /// # impl Aggregate for Order {
    /// #     const TYPE: &'static str = "order"; type Event = OrderEvent; type Codec = Json;
    /// #     fn apply(&mut self, _: OrderEvent) { self.placed = true }
    /// # }
    /// # fn main() -> Result<()> { futures_lite::future::block_on(async {
    /// let engine = SqliteEngine::open_in_memory().await?;
    /// let store = EventStore::new(engine.clone());
    /// let table = "CREATE TABLE IF NOT EXISTS shop_outbox (id INTEGER PRIMARY KEY, message TEXT NOT NULL) STRICT";
    /// engine.commit_with(store.begin(), move |sql| Ok(sql.execute_batch(table)?)).await?;
    ///
    /// let mut work = store.begin();
    /// let mut order = work.create_with_key::<Order>("order 7").await?;
    /// work.record(&mut order, OrderEvent::Placed)?;
    /// let message = format!("confirm order {}", order.id());
    /// engine
    ///     .commit_with(work, move |sql| {
    ///         sql.prepare_cached("INSERT INTO shop_outbox (message) VALUES (?1)")?.execute([message])?;
    ///         Ok(())
    ///     })
    ///     .await?;
    /// # Ok(()) }) }
    /// ```
    ///
    /// While it runs, nobody else writes. A statement that runs past [`sql_timeout`](crate::Builder::sql_timeout) is
    /// interrupted. Code that blocks or computes between two statements cannot be: the clock is looked at again when
    /// it returns, and then nothing is written. So it should do nothing but SQL, and must not wait for this store,
    /// which waits for it.
    ///
    /// The connection is the engine's: leave its settings and hooks as they are. It enforces foreign keys. The tables
    /// of evercore may be read, never written; give yours names of their own, with a prefix. COMMIT and ROLLBACK are
    /// refused, savepoints are fine. A panic writes nothing and goes on in the caller.
    ///
    /// # Errors
    /// [`Rejected`](crate::ErrorKind::Rejected) with the SQL's own error as its source, or if it took too long;
    /// [`Invalid`](crate::ErrorKind::Invalid) if the unit belongs to another engine, or if the SQL ended the
    /// transaction; otherwise as [`UnitOfWork::commit`].
    pub async fn commit_with<F>(&self, work: UnitOfWork, sql: F) -> Result<Receipt, Error>
    where
        F: FnOnce(&Connection) -> Result<(), BoxError> + Send + 'static,
    {
        if !self.is_engine_of(&work) {
            return Err(Error::invalid("the unit of work belongs to another engine"));
        }
        let sql = OwnSql(Box::new(sql));
        work.commit_by(|batch| self.commit_batch(batch, Some(sql))).await
    }

    fn is_engine_of(&self, work: &UnitOfWork) -> bool {
        let engine: &dyn Any = work.engine();
        engine.downcast_ref::<Self>().is_some_and(|other| std::ptr::eq(self.store(), other.store()))
    }
}

type Run = Box<dyn FnOnce(&Connection) -> Result<(), BoxError> + Send>;

/// What the user wants to run in the transaction of a commit.
pub(crate) struct OwnSql(Run);

impl OwnSql {
    /// Runs it in the open transaction, which is to be rolled back after an error.
    pub(crate) fn run(self, connection: &Connection, timeout: Duration) -> crate::error::Result<()> {
        guard::run(connection, timeout, "the SQL beside the commit", self.0)
    }
}

impl fmt::Debug for OwnSql {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnSql").finish_non_exhaustive()
    }
}

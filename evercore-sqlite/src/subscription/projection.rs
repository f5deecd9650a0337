//! Exactly-once projections: the handler writes in the transaction that moves the cursor.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use evercore_core::engine::{Advance, CaughtPanic, Outcome, Sink, Step};
use evercore_core::{BoxError, BoxFuture, Delivery, Result};
use rusqlite::Connection;

use crate::connection::transaction::{self, Failure};
use crate::connection::user_sql;
use crate::error::{self, Fault, SqliteError};
use crate::sqlite_engine::SqliteEngine;
use crate::store::Store;
use crate::subscription::subscriptions;

type Handle = dyn Fn(&Connection, &Delivery) -> Result<(), BoxError> + Send + Sync;

/// A read model in the store's file that a subscription keeps up to date, exactly once per event.
///
/// Made by [`SqliteEngine::projection`].
#[derive(Clone)]
pub struct Projection {
    engine: SqliteEngine,
    handle: Arc<Handle>,
}

impl SqliteEngine {
    /// A projection into tables of this store's file, for a subscription's `run_sink`. The handler writes in the
    /// transaction that moves the cursor, and only if the lease is still held. After an error, a panic, a crash or a
    /// lost lease the tables are unchanged, and the events come again.
    ///
    /// ```
    /// # use evercore_sqlite::{EventStore, Result, SqliteEngine};
    /// # fn main() -> Result<()> { futures_lite::future::block_on(async {
    /// let engine = SqliteEngine::open_in_memory().await?;
    /// let store = EventStore::new(engine.clone());
    /// let table = "CREATE TABLE IF NOT EXISTS shop_totals (aggregate INTEGER PRIMARY KEY, events INTEGER NOT NULL) STRICT";
    /// engine.commit_with(store.begin(), move |sql| Ok(sql.execute_batch(table)?)).await?;
    ///
    /// let totals = engine.projection(|sql, delivery| {
    ///     let mut count = sql.prepare_cached(
    ///         "INSERT INTO shop_totals VALUES (?1, 1) ON CONFLICT DO UPDATE SET events = events + 1",
    ///     )?;
    ///     for event in delivery.events() {
    ///         count.execute([event.aggregate().get()])?;
    ///     }
    ///     Ok(())
    /// });
    /// # let _ = totals;
    /// # Ok(()) }) }
    /// ```
    ///
    /// While it runs, nobody else can write. The handler may take [`sql_timeout`](crate::Builder::sql_timeout) for a
    /// delivery. If it takes more than half of that, the next deliveries have fewer events. Slowness and locks of other
    /// connections never count as a failure of an event: the delivery is tried again until it succeeds. The rules for the SQL of [`commit_with`](Self::commit_with) apply to it too. If it breaks them, the
    /// delivery has failed, and also if a deferred constraint fails at the end. A panic continues in the caller of
    /// `deliver`; a subscription counts it as a failure.
    pub fn projection<F>(&self, handle: F) -> Projection
    where
        F: Fn(&Connection, &Delivery) -> Result<(), BoxError> + Send + Sync + 'static,
    {
        Projection { engine: self.clone(), handle: Arc::new(handle) }
    }
}

impl Sink for Projection {
    fn deliver<'a>(&'a self, delivery: &'a Delivery, advance: &'a Advance) -> BoxFuture<'a, Outcome> {
        let (handle, delivery) = (Arc::clone(&self.handle), delivery.clone());
        let step = Step::Advance(advance.clone());
        let outcome = self.engine.write(move |store| deliver(store, &*handle, &delivery, &step));
        Box::pin(async move {
            let outcome = outcome.await.unwrap_or_else(Outcome::Refused);
            if let Outcome::Failed { error, .. } = &outcome
                && let Some(panic) = error.downcast_ref::<CaughtPanic>()
            {
                panic.resume();
            }
            outcome
        })
    }

    fn tells_which(&self) -> bool {
        false
    }

    fn holds_cursor(&self) -> bool {
        true
    }

    fn time_limit(&self) -> Option<Duration> {
        Some(self.engine.sql_timeout())
    }
}

/// The cursor moves first, so a runner that has lost its lease writes nothing.
fn deliver(store: &Store, handle: &Handle, delivery: &Delivery, step: &Step) -> Result<Outcome> {
    let mut writer = store.lock()?;
    let moved = transaction::write(&writer.get()?.connection, |connection| {
        let cursor = subscriptions::take(connection, delivery.cursor(), step)?;
        let sql = |connection: &Connection| handle(connection, delivery);
        user_sql::run(connection, store.settings.sql_timeout, "the projection", sql)?;
        Ok(cursor)
    });
    Ok(match moved {
        Ok(Some(cursor)) => Outcome::Advanced(cursor),
        Ok(None) => Outcome::Handled(delivery.events().len()),
        Err(Failure::RolledBack(SqliteError::User(Fault::TookTooLong(error)))) => {
            Outcome::Hindered { error: error.into(), is_too_slow: true }
        }
        Err(Failure::RolledBack(SqliteError::User(fault))) => {
            let error = fault.into_source();
            if error::was_busy(&*error) {
                Outcome::Hindered { error, is_too_slow: false }
            } else {
                Outcome::Failed { handled: 0, error }
            }
        }
        // Only a deferred constraint of the user's tables can fail here.
        Err(Failure::RolledBack(SqliteError::Sqlite(error))) if error::is_constraint(&error) => {
            Outcome::Failed { handled: 0, error: error.into() }
        }
        Err(failure) => Outcome::Refused(store.to_error(&mut writer, failure)),
    })
}

impl fmt::Debug for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Projection").field("engine", &self.engine).finish_non_exhaustive()
    }
}

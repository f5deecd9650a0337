//! `commit_with`: the user's own SQL in the transaction of a commit.

use std::any::Any;
use std::sync::Arc;

use evercore_core::engine::Batch;
use evercore_core::{BoxError, BoxFuture, Error, ErrorKind, Receipt, Result, UnitOfWork};
use tokio_postgres::Transaction;

use crate::commit::batch::FlightOutcome;
use crate::commit::flight::encoded_bytes;
use crate::commit::with_sql::UserSql;
use crate::connection::task::in_task;
use crate::postgres_engine::PostgresEngine;
use crate::store::Store;

impl PostgresEngine {
    /// Commits a unit of work together with your own SQL in one transaction, for example a row of a read model or a
    /// message in an outbox. Either all of it is written, or nothing.
    ///
    /// The SQL runs first, on a connection of the pool, while other commits continue. Then the log is locked, the unit
    /// is checked and written, and the transaction is committed. With a [command](UnitOfWork::set_command) it takes
    /// effect once: if the command took effect before, the SQL does not run. The unit may be empty.
    ///
    /// ```no_run
    /// # use evercore_postgres::{Aggregate, EventStore, Json, PostgresEngine, Result};
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Clone, Default, Serialize, Deserialize)] struct Order { placed: bool }
    /// # #[derive(Serialize, Deserialize)] enum OrderEvent { Placed }
    /// # impl Aggregate for Order {
    /// #     const TYPE: &'static str = "order"; type Event = OrderEvent; type Codec = Json;
    /// #     fn apply(&mut self, _: OrderEvent) { self.placed = true }
    /// # }
    /// # async fn order(engine: PostgresEngine) -> Result<()> {
    /// let store = EventStore::new(engine.clone());
    /// let mut work = store.begin();
    /// let mut order = work.create_with_key::<Order>("order 7").await?;
    /// work.record(&mut order, OrderEvent::Placed)?;
    /// let message = format!("confirm order {}", order.id());
    /// engine
    ///     .commit_with(work, move |sql| {
    ///         Box::pin(async move {
    ///             sql.execute("INSERT INTO shop.outbox (message) VALUES ($1)", &[&message]).await?;
    ///             Ok(())
    ///         })
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    ///
    /// The SQL is rolled back if it takes longer than [`sql_timeout`](crate::Builder::sql_timeout) in total. It blocks
    /// only transactions that need rows it has locked. It may read evercore's tables, but must not write or lock them.
    /// It never takes the last connection of the pool: with too many of these calls at once, a call waits, and after
    /// [`connect_timeout`](crate::Builder::connect_timeout) it is [`Unavailable`](ErrorKind::Unavailable). It runs in a
    /// task: dropping the call does not stop it. If it panics, nothing is written, and the panic continues in the
    /// caller.
    ///
    /// Qualify names with their schema, since the search path is that of the role. PostgreSQL plans the SQL with its
    /// default settings, without `jit`; the engine's planner settings do not apply. Settings that the SQL changes are
    /// reset. Through a pooler and on a pool of your own, use `SET LOCAL`, since only that is reset. Savepoints are
    /// allowed. COMMIT and ROLLBACK are not: the engine detects them and writes nothing of the unit, but rows that the
    /// SQL itself has committed stay.
    ///
    /// # Errors
    /// [`Rejected`](ErrorKind::Rejected) with the SQL's own error as its source, or if it took too long;
    /// [`Invalid`](ErrorKind::Invalid) if the unit belongs to another engine, or if the SQL ended the transaction;
    /// otherwise as [`UnitOfWork::commit`].
    pub async fn commit_with<F>(&self, work: UnitOfWork, sql: F) -> Result<Receipt>
    where
        F: for<'t> FnOnce(&'t Transaction<'t>) -> BoxFuture<'t, Result<(), BoxError>> + Send + 'static,
    {
        let engine: &dyn Any = work.engine();
        if !engine.downcast_ref::<Self>().is_some_and(|other| Arc::ptr_eq(self.store(), other.store())) {
            return Err(Error::invalid("the unit of work belongs to another engine"));
        }
        self.store().pools.check_writable()?;
        let store = Arc::clone(self.store());
        let sql: UserSql = Box::new(sql);
        work.commit_by(|batch| async move {
            // On the heap, since the caller's future would have a copy of its 18 KB at each level of the calls.
            let commit: BoxFuture<'static, Result<Receipt>> =
                Box::pin(async move { commit(&store, batch, sql).await });
            in_task(commit).await?.map_err(Error::resume_panic)
        })
        .await
    }
}

async fn commit(store: &Store, batch: Batch, sql: UserSql) -> Result<Receipt> {
    let (pools, with_sql) = (&store.pools, &store.with_sql);
    encoded_bytes(&batch)?;
    with_sql.inline.draw_near().await?;
    let checkout = pools.to_run_user_sql().await?;
    let committed = with_sql.commit(checkout, &[&batch], &store.names.table(), Some(sql)).await;
    // The SQL runs only once, so after an error the caller must try again.
    let outcome = match committed.map_err(|error| pools.if_stale(error))? {
        FlightOutcome::Done(outcomes) => {
            outcomes.into_iter().next().unwrap_or_else(|| Err(Error::outcome_unknown("the commit")))
        }
        FlightOutcome::Recheck => Err(Error::new(
            ErrorKind::Unavailable,
            "a concurrent commit conflicted with this one, nothing was written, try again",
        )),
        FlightOutcome::Unknown => Err(Error::outcome_unknown("the commit")),
    }?;
    store.watch.announce(outcome.last);
    Ok(outcome)
}

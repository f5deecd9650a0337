//! Exactly-once projections: the handler writes in the transaction that moves the cursor.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use evercore_core::engine::{Advance, Outcome, Sink, Step};
use evercore_core::{BoxError, BoxFuture, Delivery, Error, ErrorKind};
use tokio_postgres::Transaction;

use crate::connection::task::in_task;
use crate::connection::user_sql::{Ended, Fault, UserTransaction};
use crate::error::{Because, PostgresError, Result, passes, was_hindered};
use crate::postgres_engine::PostgresEngine;
use crate::store::Store;

/// Names the projection in error texts.
const WHAT: &str = "the projection";

/// How often a handler runs at most, if the server keeps rolling it back because of other transactions.
const ATTEMPTS: usize = 3;

type Handle =
    dyn for<'t> Fn(&'t Transaction<'t>, &'t Delivery) -> BoxFuture<'t, Result<(), BoxError>> + Send + Sync;

/// A read model in the store's database that a subscription keeps up to date, exactly once per event.
///
/// Made by [`PostgresEngine::projection`].
#[derive(Clone)]
pub struct Projection {
    engine: PostgresEngine,
    handle: Arc<Handle>,
}

impl PostgresEngine {
    /// A projection into tables of this database, for a subscription's `run_sink`. The handler writes in the
    /// transaction that moves the cursor, so its rows and the move are committed together or not at all.
    ///
    /// ```no_run
    /// # use evercore_postgres::{PostgresEngine, Projection};
    /// # fn orders_by_day(engine: &PostgresEngine) -> Projection {
    /// engine.projection(|sql, delivery| {
    ///     Box::pin(async move {
    ///         for event in delivery.events() {
    ///             let count = "INSERT INTO shop.events_per_order VALUES ($1, 1)
    ///                          ON CONFLICT (id) DO UPDATE SET events = events_per_order.events + 1";
    ///             sql.execute(count, &[&event.aggregate().get()]).await?;
    ///         }
    ///         Ok(())
    ///     })
    /// })
    /// # }
    /// ```
    ///
    /// The transaction moves the cursor first, so a runner that has lost its lease writes nothing. No other runner can
    /// claim the cursor while the handler runs, even if the lease expires meanwhile. After an error, a panic or a
    /// broken connection nothing is written. The handler may take [`sql_timeout`](crate::Builder::sql_timeout) for a
    /// delivery. If it takes more than half of that, the next deliveries have fewer events. Slowness and locks of the tables
    /// (SQLSTATE 55P03, 57014, 40P01, 40001) never count as a failure of an event: the delivery is tried again until it
    /// succeeds. The rules for the SQL of [`commit_with`](Self::commit_with) apply to it too. A handler that commits by
    /// itself has also committed the move of the cursor. It runs in a task: dropping the call does not stop it.
    pub fn projection<F>(&self, handler: F) -> Projection
    where
        F: for<'t> Fn(&'t Transaction<'t>, &'t Delivery) -> BoxFuture<'t, Result<(), BoxError>>
            + Send
            + Sync
            + 'static,
    {
        Projection { engine: self.clone(), handle: Arc::new(handler) }
    }
}

impl Sink for Projection {
    fn deliver<'a>(&'a self, delivery: &'a Delivery, advance: &'a Advance) -> BoxFuture<'a, Outcome> {
        let (store, handle) = (Arc::clone(self.engine.store()), Arc::clone(&self.handle));
        let (delivery, advance) = (delivery.clone(), advance.clone());
        Box::pin(async move {
            match in_task(async move { deliver(&store, &*handle, &delivery, advance).await }).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(error)) => Outcome::Refused(error.into()),
                Err(error) => Outcome::Refused(error),
            }
        })
    }

    fn tells_which(&self) -> bool {
        false
    }

    fn holds_cursor(&self) -> bool {
        true
    }

    fn time_limit(&self) -> Option<Duration> {
        Some(self.engine.store().pools.settings.sql_timeout)
    }
}

impl fmt::Debug for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Projection").field("engine", &self.engine).finish_non_exhaustive()
    }
}

/// Runs the handler again if the server rolled it back because of another transaction.
async fn deliver(store: &Store, handle: &Handle, delivery: &Delivery, advance: Advance) -> Result<Outcome> {
    let step = Step::Advance(advance);
    let attempt = || store.pools.again_if_stale(|| deliver_once(store, handle, delivery, &step));
    for _ in 1..ATTEMPTS {
        match attempt().await {
            Err(error) if passes(&error) => {}
            outcome => return outcome,
        }
    }
    match attempt().await {
        // Nothing was written, and the lease is still held: the runner waits, and tries again.
        Err(error) if passes(&error) => {
            Ok(Outcome::Hindered { error: Error::from(error).into(), is_too_slow: false })
        }
        outcome => outcome,
    }
}

/// Runs the whole transaction: move the cursor, call the handler, commit.
async fn deliver_once(store: &Store, handle: &Handle, delivery: &Delivery, step: &Step) -> Result<Outcome> {
    let pools = &store.pools;
    pools.check_writable()?;
    let mut checkout = pools.to_run_user_sql().await?;
    let transaction = UserTransaction::begin(pools, &mut checkout).await?;
    let moved = pools.in_time(store.cursors.step_within(transaction.sender(), delivery.cursor(), step)).await;
    let handled = match &moved {
        Ok(_) => transaction.run(WHAT, || handle(transaction.sql(), delivery)).await,
        Err(_) => Ok(()),
    };
    if moved.is_err() || handled.is_err() {
        let ended = transaction.roll_back().await;
        handled.as_ref().err().map_or(Ok(()), |fault| fault.unless_late(ended))?;
    } else {
        match transaction.commit(WHAT).await {
            Ended::Committed => {}
            Ended::RolledBack(error) => return failed_or_refused(error),
            Ended::Unknown(error) => {
                return Ok(Outcome::Refused(Error::outcome_unknown("the commit").because(error)));
            }
        }
    }
    let cursor = moved?;
    match handled {
        Ok(()) => {
            // After any other outcome the state of the connection is unknown.
            if cursor.is_some() {
                checkout.put_back();
            }
            Ok(cursor.map_or(Outcome::Handled(delivery.events().len()), Outcome::Advanced))
        }
        Err(Fault::Failed(error)) if was_hindered(&*error) => {
            Ok(Outcome::Hindered { error, is_too_slow: false })
        }
        Err(Fault::Failed(error)) => Ok(failed(error)),
        Err(Fault::TooLong(error)) => Ok(Outcome::Hindered { error: error.into(), is_too_slow: true }),
        Err(Fault::Other(error)) => failed_or_refused(error),
    }
}

/// An error counts as the handler's failure only if the handler caused it.
fn failed_or_refused(error: PostgresError) -> Result<Outcome> {
    match error {
        // At the COMMIT, for instance by a deferred constraint that waits for another session.
        PostgresError::Core(error) if matches!(error.kind(), ErrorKind::Rejected) && was_hindered(&error) => {
            Ok(Outcome::Hindered { error: error.into(), is_too_slow: false })
        }
        PostgresError::Core(error) if matches!(error.kind(), ErrorKind::Rejected | ErrorKind::Invalid) => {
            Ok(failed(error))
        }
        error => Err(error),
    }
}

fn failed(error: impl Into<BoxError>) -> Outcome {
    Outcome::Failed { handled: 0, error: error.into() }
}

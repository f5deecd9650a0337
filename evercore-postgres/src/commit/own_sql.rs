//! Runs the user's own SQL in the transaction of a commit, under a time-out and before the log is locked.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::ClientWrapper;
use evercore_core::{
    Batch, BoxError, BoxFuture, Error, ErrorKind, NameTable, Position, Receipt, Timestamp, UnitOfWork,
};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_postgres::{IsolationLevel, Transaction};

use crate::builder::Settings;
use crate::commit::batch::{self, Flown};
use crate::commit::flight;
use crate::connection::pool::Lent;
use crate::connection::task::in_task;
use crate::engine::PostgresEngine;
use crate::error::{
    Because, PostgresError, Result, damaged, is_ours, is_rolled_back, outcome_unknown, passes, said_no,
    was_undone,
};
use crate::read::wait;
use crate::sql::{Sender, set_local};
use crate::store::Store;
use crate::subscription::inline::{self, newest};

/// Planner settings for the user's SQL in our sessions: PostgreSQL's defaults. They are given as values, because
/// DEFAULT in such a session means our own start-up settings. `jit` stays off, since the SQL is short.
const AS_POSTGRES_PLANS: &str = "SET LOCAL enable_seqscan = on; SET LOCAL enable_bitmapscan = on; \
     SET LOCAL plan_cache_mode = auto";

/// The same in sessions of the application, which started with the application's settings.
const AS_THEY_BEGAN: &str = "SET LOCAL enable_seqscan TO DEFAULT; SET LOCAL enable_bitmapscan TO DEFAULT; \
     SET LOCAL plan_cache_mode TO DEFAULT; SET LOCAL jit TO DEFAULT";

/// Resets a session to its start. RESET ALL does not reset the role.
const BACK: &str = "RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL";

/// Detects a transaction that was ended and started again: it has another start time.
pub(crate) const WHICH: &str =
    "SELECT (extract(epoch FROM pg_catalog.transaction_timestamp())::numeric * 1000000::numeric)::bigint";

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
    pub async fn commit_with<F>(&self, work: UnitOfWork, sql: F) -> Result<Receipt, Error>
    where
        F: for<'t> FnOnce(&'t Transaction<'t>) -> BoxFuture<'t, Result<(), BoxError>> + Send + 'static,
    {
        let engine: &dyn Any = work.engine();
        if !engine.downcast_ref::<Self>().is_some_and(|other| Arc::ptr_eq(self.store(), other.store())) {
            return Err(Error::invalid("the unit of work belongs to another engine"));
        }
        self.store().check_writable()?;
        let store = Arc::clone(self.store());
        let sql = OwnSql(Box::new(sql));
        work.commit_by(|batch| async move {
            in_task(async move { fly(&store, batch, sql).await }).await?.map_err(inline::go_on)
        })
        .await
    }
}

type Run = Box<dyn for<'t> FnOnce(&'t Transaction<'t>) -> BoxFuture<'t, Result<(), BoxError>> + Send>;

/// The user's code that runs in the transaction of a commit.
struct OwnSql(Run);

impl fmt::Debug for OwnSql {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnSql").finish_non_exhaustive()
    }
}

/// How many pieces of the user's SQL may run at once: one less than there are connections, so that they never take all
/// and other commits continue.
#[derive(Debug)]
pub(crate) struct Turns(Semaphore);

impl Turns {
    pub(crate) fn new(connections: usize) -> Self {
        Self(Semaphore::new(connections.saturating_sub(1).max(1)))
    }

    pub(crate) async fn take(&self, at_most: Duration) -> Result<SemaphorePermit<'_>, Error> {
        let turn = tokio::time::timeout(at_most, self.0.acquire()).await;
        turn.ok().and_then(Result::ok).ok_or_else(|| {
            let message = "no connection became free in time: too many `commit_with` calls run at once";
            Error::new(ErrorKind::Unavailable, message)
        })
    }
}

async fn fly(store: &Arc<Store>, batch: Batch, sql: OwnSql) -> Result<Receipt, Error> {
    flight::bytes_of(&batch)?;
    inline::draw_near(store).await?;
    let _turn = store.turns.take(store.settings.connect_timeout).await?;
    let mut lent = Lent::to_write(store).await?;
    // The time for the user's SQL plus our own: a server that does not answer must not block the caller for ever.
    let handlers = u32::try_from(store.inline.len()).unwrap_or(u32::MAX);
    let patience = store.settings.sql_timeout.saturating_mul(handlers.saturating_add(1));
    let patience = patience.saturating_add(store.patience());
    let (flown, is_clean) =
        match tokio::time::timeout(patience, together(store, &mut lent, &batch, sql)).await {
            // The SQL runs only once, so the caller must try again.
            Ok(ended) => ended.map_err(|error| store.if_stale(error))?,
            // The unanswered statement may be the COMMIT.
            Err(_) => (Flown::Unknown, false),
        };
    if is_clean {
        lent.put_back();
    }
    let outcome = match flown {
        Flown::Done(outcomes) => outcomes.into_iter().next().unwrap_or_else(|| Err(outcome_unknown())),
        Flown::RolledBack(error) => Err(error.into()),
        Flown::Look => Err(Error::new(
            ErrorKind::Unavailable,
            "a concurrent commit conflicted with this one, nothing was written, try again",
        )),
        Flown::Unknown => Err(outcome_unknown()),
    }?;
    if outcome.last > Position::ZERO {
        store.watch.saw(outcome.last);
        wait::announce(store);
    }
    Ok(outcome)
}

/// Runs the whole transaction. Also returns whether the connection can be reused.
async fn together(store: &Store, lent: &mut Lent, batch: &Batch, sql: OwnSql) -> Result<(Flown, bool)> {
    let named = lent.is_named();
    let client = lent.client_mut()?;
    let transaction =
        client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await?;
    let sender = Sender { client: transaction.client(), cache: &transaction.statement_cache, named };
    sender.client.batch_execute(&settings_for_own_sql(&store.settings)).await?;
    if let Some(id) = batch.command_id()
        && let Some(known) = batch::command_on(store, sender, id).await?
    {
        let outcome = known.answer(batch);
        return Ok((Flown::Done(vec![outcome]), transaction.rollback().await.is_ok()));
    }
    run(store, sender, WHAT, || (sql.0)(&transaction)).await.map_err(|fault| fault.into_error(WHAT))?;
    sender.client.batch_execute(&settings_for_the_commit(&store.settings)).await?;
    let (receipt, fresh) = match write(store, sender, &transaction, batch).await? {
        Wrote::Unit(receipt, fresh) => (receipt, fresh),
        Wrote::Nothing(outcome) => {
            return Ok((Flown::Done(vec![outcome]), transaction.rollback().await.is_ok()));
        }
    };
    let doubt = store.heard.before_commit();
    match doubt.settle(transaction.commit().await.map_err(PostgresError::from)) {
        Ok(()) => {
            fresh.into_iter().for_each(|fresh| drop(store.names.learn(fresh)));
            Ok((Flown::Done(vec![Ok(receipt)]), true))
        }
        Err(error) if is_rolled_back(&error) => Err(at_the_end(WHAT, error)),
        Err(_) => Ok((Flown::Unknown, false)),
    }
}

/// The outcome of the unit in the transaction.
enum Wrote {
    /// It was written, with the names that were registered for it.
    Unit(Receipt, Option<NameTable>),
    /// It was refused, or the same command took effect while the SQL ran: the SQL must be rolled back.
    Nothing(Result<Receipt, Error>),
}

/// Locks the log, checks and writes. After an error nothing is written, since nothing was committed.
async fn write(
    store: &Store,
    sender: Sender<'_>,
    transaction: &Transaction<'_>,
    batch: &Batch,
) -> Result<Wrote> {
    if batch.is_empty() {
        return Ok(Wrote::Unit(Receipt::of(batch, Position::ZERO, Timestamp::now()), None));
    }
    let batches = [batch];
    let (known, table) = batch::look(store, sender, &batches, &store.names.table(), None).await?;
    let sorted = batch::sort_out(store, sender, &batches, known, &table).await?;
    if let Some(outcome) = sorted.outcomes.into_iter().flatten().next() {
        return Ok(Wrote::Nothing(outcome));
    }
    let written = batch::write_within(store, sender, &sorted.writing).await;
    match written.map(|receipts| receipts.into_iter().next()) {
        Ok(Some((_, receipt))) => {
            let table = newest(&table, sorted.fresh.as_ref());
            inline::apply(store, sender, transaction, &table, receipt.last).await?;
            Ok(Wrote::Unit(receipt, sorted.fresh))
        }
        Ok(None) => Err(damaged("the end of the log is missing")),
        Err(error) if is_ours(&error) => {
            let message = "a concurrent commit conflicted with this one, nothing was written, try again";
            Ok(Wrote::Nothing(Err(Error::new(ErrorKind::Unavailable, message).because(error))))
        }
        Err(error) => Err(error),
    }
}

/// Names the user's SQL in error texts.
const WHAT: &str = "the SQL beside the commit";

/// Why a transaction with the user's SQL in it is not committed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// It failed within its time.
    SaidNo(BoxError),
    /// It took too long. The server may have ended the session because of that.
    TooLong(Error),
    /// Any other failure, also a rollback by the server because of another transaction.
    Other(PostgresError),
}

impl Fault {
    /// From an error of the user's SQL that came within its time.
    fn of(source: BoxError) -> Self {
        if was_undone(&*source) { Self::Other(PostgresError::Undone(source)) } else { Self::SaidNo(source) }
    }

    pub(crate) fn into_error(self, what: &str) -> PostgresError {
        match self {
            Self::SaidNo(source) => said_no(what, source).into(),
            Self::TooLong(error) => error.into(),
            Self::Other(error) => error,
        }
    }

    /// Takes the end of the transaction into account: if the connection is gone, the handler did not cause the failure,
    /// unless it took too long.
    pub(crate) fn unless_late<T>(&self, ended: Result<T>) -> Result<()> {
        if matches!(self, Self::TooLong(_)) { Ok(()) } else { ended.map(drop) }
    }
}

impl From<PostgresError> for Fault {
    fn from(error: PostgresError) -> Self {
        Self::Other(error)
    }
}

/// Runs the user's SQL in our transaction, under its own settings, and resets them afterwards.
pub(crate) async fn run_within<'t>(
    store: &Store,
    sender: Sender<'_>,
    what: &str,
    sql: impl FnOnce() -> BoxFuture<'t, Result<(), BoxError>>,
) -> Result<(), Fault> {
    let set = |text: String| async move { Ok(sender.client.batch_execute(&text).await?) };
    store.in_time(set(settings_for_own_sql(&store.settings))).await?;
    run(store, sender, what, sql).await?;
    Ok(store.in_time(set(settings_for_the_commit(&store.settings))).await?)
}

/// Runs the user's SQL, and checks that the transaction is still the same and has not failed.
async fn run<'t>(
    store: &Store,
    sender: Sender<'_>,
    what: &str,
    sql: impl FnOnce() -> BoxFuture<'t, Result<(), BoxError>>,
) -> Result<(), Fault> {
    let which = || async {
        let rows = sender.client.query_typed(WHICH, &[]).await?;
        Ok(rows.first().map(|row| row.try_get::<_, i64>(0)).transpose()?)
    };
    let before = store.in_time(which()).await?;
    let (began, at_most) = (Instant::now(), store.settings.sql_timeout);
    let outcome = tokio::time::timeout(at_most, sql()).await;
    // The server's time-out may have ended a statement just before ours. Neither stops code that blocks.
    let is_late = outcome.is_err() || began.elapsed() >= at_most;
    let too_long = || rejected(what, &format!("took longer than {at_most:?}"));
    match outcome {
        Ok(Err(source)) if !is_late => return Err(Fault::of(source)),
        Ok(Err(source)) => return Err(Fault::TooLong(too_long().because(source))),
        _ if is_late => return Err(Fault::TooLong(too_long())),
        _ => {}
    }
    match store.in_time(which()).await {
        Ok(after) if after == before => Ok(()),
        Ok(_) => {
            let message = format!("{what} ended the transaction, which is not its own");
            Err(Fault::Other(Error::invalid(message).into()))
        }
        Err(error) => {
            Err(Fault::Other(rejected(what, "ignored an error of a statement").because(error).into()))
        }
    }
}

pub(crate) fn rejected(what: &str, why: &str) -> Error {
    Error::new(ErrorKind::Rejected, format!("{what} {why}"))
}

/// The error for a COMMIT that the server has rolled back. The cause is a deferred constraint of the user's, unless the
/// server rolled back because of another transaction.
pub(crate) fn at_the_end(what: &str, error: PostgresError) -> PostgresError {
    if passes(&error) { error } else { rejected(what, "failed when it was committed").because(error).into() }
}

/// Starts a transaction for the user's SQL, on any kind of connection.
pub(crate) async fn open<'c>(
    settings: &Settings,
    client: &'c mut ClientWrapper,
) -> Result<deadpool_postgres::Transaction<'c>> {
    let transaction =
        client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await?;
    if !settings.has_sessions() {
        transaction.batch_execute(&set_local(settings)).await?;
    }
    Ok(transaction)
}

/// Resets settings that the user's SQL has changed, also for the next user of the connection: those set without LOCAL
/// would stay. Does not reset the application's own connections.
fn settings_for_the_commit(settings: &Settings) -> String {
    if settings.has_sessions() { BACK.to_owned() } else { set_local(settings) }
}

fn settings_for_own_sql(settings: &Settings) -> String {
    let timeout = settings.sql_timeout.as_millis();
    let plans = if settings.has_sessions() { AS_POSTGRES_PLANS } else { AS_THEY_BEGAN };
    format!("{}; {plans}; SET LOCAL statement_timeout = {timeout}", set_local(settings))
}

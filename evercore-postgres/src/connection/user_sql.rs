//! Transactions that run the user's SQL, under a time-out and under the user's own planner settings.

use std::time::Instant;

use deadpool_postgres::Transaction;
use evercore_core::{BoxError, BoxFuture, Error, ErrorKind};
use futures_lite::future::zip;
use tokio_postgres::IsolationLevel;

use crate::connection::pool::{Checkout, Pools};
use crate::error::{Because, PostgresError, Result, is_rolled_back, passes, rejected_by, was_undone};
use crate::settings::Settings;
use crate::sql::Sender;

/// Planner settings for the user's SQL in our sessions: PostgreSQL's defaults. They are given as values, because
/// DEFAULT in such a session means our own start-up settings. `jit` stays off, since the SQL is short.
const POSTGRES_DEFAULTS: &str = "SET LOCAL enable_seqscan = on; SET LOCAL enable_bitmapscan = on; \
     SET LOCAL plan_cache_mode = auto";

/// The same in sessions of the application, which started with the application's settings.
const SESSION_DEFAULTS: &str = "SET LOCAL enable_seqscan TO DEFAULT; SET LOCAL enable_bitmapscan TO DEFAULT; \
     SET LOCAL plan_cache_mode TO DEFAULT; SET LOCAL jit TO DEFAULT";

/// Resets a session to its start. RESET ALL does not reset the role.
const RESET: &str = "RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL";

/// A transaction that was ended and started again has another start time.
pub(crate) const START_TIME: &str =
    "SELECT (extract(epoch FROM pg_catalog.transaction_timestamp())::numeric * 1000000::numeric)::bigint";

/// A transaction in which the user's SQL runs. If it is dropped, it is rolled back.
pub(crate) struct UserTransaction<'c> {
    pools: &'c Pools,
    transaction: Transaction<'c>,
    named: bool,
}

/// The end of a transaction with the user's SQL.
pub(crate) enum Ended {
    Committed,
    /// The server has rolled it back: a deferred constraint of the user's failed, or another transaction interfered.
    RolledBack(PostgresError),
    Unknown(PostgresError),
}

impl<'c> UserTransaction<'c> {
    pub(crate) async fn begin(pools: &'c Pools, checkout: &'c mut Checkout) -> Result<Self> {
        let (named, client) = (checkout.named, checkout.client_mut()?);
        let begin = async {
            let transaction =
                client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await?;
            if !pools.settings.has_sessions() {
                transaction.batch_execute(&pools.settings.set_local()).await?;
            }
            Ok(transaction)
        };
        Ok(Self { pools, transaction: pools.in_time(begin).await?, named })
    }

    /// For the engine's own statements.
    pub(crate) fn sender(&self) -> Sender<'_> {
        let cache = &self.transaction.statement_cache;
        Sender { client: self.transaction.client(), cache, named: self.named }
    }

    /// For the user's statements.
    pub(crate) fn sql(&self) -> &tokio_postgres::Transaction<'c> {
        &self.transaction
    }

    /// Runs the user's SQL under its own settings, and resets them afterwards. Checks that the transaction is still the
    /// same and has not failed. `what` names the SQL in errors.
    pub(crate) async fn run<'t>(
        &self,
        what: &str,
        sql: impl FnOnce() -> BoxFuture<'t, Result<(), BoxError>>,
    ) -> Result<(), Fault> {
        let (pools, sender) = (self.pools, self.sender());
        let settings = settings_for_user_sql(&pools.settings);
        let (set, before) = zip(pools.in_time(sender.execute(&settings)), self.start_time()).await;
        set?;
        let before = before?;
        let (began, at_most) = (Instant::now(), pools.settings.sql_timeout);
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
        match self.start_time().await {
            Ok(after) if after == before => {}
            Ok(_) => {
                let message = format!("{what} ended the transaction, which only the engine may end");
                return Err(Fault::Other(Error::invalid(message).into()));
            }
            Err(error) => {
                let ignored = rejected(what, "ignored an error of a statement").because(error);
                return Err(Fault::Other(ignored.into()));
            }
        }
        Ok(pools.in_time(sender.execute(&settings_after_user_sql(&pools.settings))).await?)
    }

    async fn start_time(&self) -> Result<Option<i64>> {
        let read = async {
            let rows = self.transaction.query_typed(START_TIME, &[]).await?;
            Ok(rows.first().map(|row| row.try_get(0)).transpose()?)
        };
        self.pools.in_time(read).await
    }

    /// `what` names the user's SQL in errors.
    pub(crate) async fn commit(self, what: &str) -> Ended {
        let pools = self.pools;
        match pools.notices.commit(self.commit_unwatched()).await {
            Ok(()) => Ended::Committed,
            Err(error) if is_rolled_back(&error) && passes(&error) => Ended::RolledBack(error),
            Err(error) if is_rolled_back(&error) => {
                Ended::RolledBack(rejected(what, "failed when it was committed").because(error).into())
            }
            Err(error) => Ended::Unknown(error),
        }
    }

    /// A commit on which no caller relies: whether it was replicated does not matter.
    pub(crate) async fn commit_unwatched(self) -> Result<()> {
        self.pools.in_time(async { Ok(self.transaction.commit().await?) }).await
    }

    pub(crate) async fn roll_back(self) -> Result<()> {
        self.pools.in_time(async { Ok(self.transaction.rollback().await?) }).await
    }
}

/// Why a transaction with the user's SQL in it is not committed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// It failed within its time.
    Failed(BoxError),
    /// It took too long. The server may have ended the session because of that.
    TooLong(Error),
    /// Any other failure, also a rollback by the server because of another transaction.
    Other(PostgresError),
}

impl Fault {
    /// From an error of the user's SQL that came within its time.
    fn of(source: BoxError) -> Self {
        if was_undone(&*source) { Self::Other(PostgresError::Undone(source)) } else { Self::Failed(source) }
    }

    pub(crate) fn into_error(self, what: &str) -> PostgresError {
        match self {
            Self::Failed(source) => rejected_by(what, source).into(),
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

fn rejected(what: &str, why: &str) -> Error {
    Error::new(ErrorKind::Rejected, format!("{what} {why}"))
}

/// Resets settings that the user's SQL has changed, also for the next user of the connection: those set without LOCAL
/// would stay. Does not reset the application's own connections.
fn settings_after_user_sql(settings: &Settings) -> String {
    if settings.has_sessions() { RESET.to_owned() } else { settings.set_local() }
}

fn settings_for_user_sql(settings: &Settings) -> String {
    let timeout = settings.sql_timeout.as_millis();
    let plans = if settings.has_sessions() { POSTGRES_DEFAULTS } else { SESSION_DEFAULTS };
    format!("{}; {plans}; SET LOCAL statement_timeout = {timeout}", settings.set_local())
}

//! Commits batches in a transaction that also runs the user's SQL: that of `commit_with`, and the inline projections.

use std::sync::Arc;

use evercore_core::engine::{Batch, NameTable};
use evercore_core::{BoxError, BoxFuture, Position, Receipt, Result as CoreResult, Timestamp};
use tokio_postgres::Transaction;

use crate::commit::batch::{Batches, FlightOutcome};
use crate::commit::commands::Commands;
use crate::connection::pool::{Checkout, Pools};
use crate::connection::user_sql::{Ended, UserTransaction};
use crate::error::{Result, is_ours, is_rolled_back};
use crate::subscription::inline::InlineProjections;

/// SQL of the user that runs once, before the log is locked.
pub(crate) type UserSql =
    Box<dyn for<'t> FnOnce(&'t Transaction<'t>) -> BoxFuture<'t, Result<(), BoxError>> + Send>;

/// Names the user's SQL in errors.
const SQL_OF_COMMIT_WITH: &str = "the SQL of `commit_with`";

/// Writes batches together with the user's SQL.
pub(crate) struct BatchesWithSql {
    pub(crate) pools: Arc<Pools>,
    pub(crate) batches: Arc<Batches>,
    pub(crate) commands: Arc<Commands>,
    pub(crate) inline: InlineProjections,
}

impl BatchesWithSql {
    /// Runs `sql`, then checks and writes the batches under the lock of the log, then runs the inline projections, and
    /// commits all of it.
    pub(crate) async fn commit(
        &self,
        mut checkout: Checkout,
        batches: &[&Batch],
        table: &Arc<NameTable>,
        sql: Option<UserSql>,
    ) -> Result<FlightOutcome> {
        match self.run(&mut checkout, batches, table, sql).await {
            Ok((outcome, is_clean)) => {
                if is_clean {
                    checkout.put_back();
                }
                Ok(outcome)
            }
            // Nothing was committed, since no COMMIT was sent yet.
            Err(error) if is_rolled_back(&error) && is_ours(&error) => Ok(FlightOutcome::Recheck),
            Err(error) => Err(error),
        }
    }

    /// Also returns whether the connection can be reused.
    async fn run(
        &self,
        checkout: &mut Checkout,
        batches: &[&Batch],
        table: &Arc<NameTable>,
        sql: Option<UserSql>,
    ) -> Result<(FlightOutcome, bool)> {
        let mut table = Arc::clone(table);
        let what = if sql.is_some() { SQL_OF_COMMIT_WITH } else { "an inline projection" };
        let transaction = UserTransaction::begin(&self.pools, checkout).await?;
        let sender = transaction.sender();
        if let Some(sql) = sql {
            for batch in batches {
                let Some(id) = batch.command_id() else { continue };
                let find = self.pools.in_time(self.commands.find_within(sender, id));
                if let Some(known) = find.await? {
                    let outcome = known.answer(batch);
                    return Ok((FlightOutcome::Done(vec![outcome]), transaction.roll_back().await.is_ok()));
                }
            }
            let ran = transaction.run(what, || sql(transaction.sql())).await;
            ran.map_err(|fault| fault.into_error(what))?;
            table = self.batches.names.table(); // the SQL took its time, and other names may be known now
        }
        if let [batch] = batches
            && batch.is_empty()
        {
            let receipt = Receipt::of(batch, Position::ZERO, Timestamp::now());
            return Self::end(transaction, what, || vec![Ok(receipt)]).await;
        }
        let check = self.batches.lock_and_check(sender, batches, &table, None);
        let sorted = self.pools.in_time(check).await?;
        if sorted.new_rows.is_empty() {
            let outcomes = sorted.outcomes.into_iter().flatten().collect();
            return Ok((FlightOutcome::Done(outcomes), transaction.roll_back().await.is_ok()));
        }
        let written = self.pools.in_time(self.batches.write_within(sender, &sorted.new_rows)).await?;
        let head = written.receipts.iter().map(|(_, receipt)| receipt.last).max().unwrap_or_default();
        self.inline.apply(&transaction, &sorted.table, head).await?;
        Self::end(transaction, what, || self.batches.complete(sorted, written)).await
    }

    async fn end(
        transaction: UserTransaction<'_>,
        what: &str,
        outcomes: impl FnOnce() -> Vec<CoreResult<Receipt>>,
    ) -> Result<(FlightOutcome, bool)> {
        match transaction.commit(what).await {
            Ended::Committed => Ok((FlightOutcome::Done(outcomes()), true)),
            Ended::RolledBack(error) => Err(error),
            Ended::Unknown(_) => Ok((FlightOutcome::Unknown, false)),
        }
    }
}

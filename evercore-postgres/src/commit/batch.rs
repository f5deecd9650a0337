//! Writes several batches in one transaction: the quick way, or the careful way under the lock of the log.
//!
//! The quick way is one statement in its own transaction. It assumes that no other commit has changed the aggregates of
//! the batches meanwhile. If one has, a condition or a constraint fails, and nothing is written. The careful way takes
//! the lock of the log's end, reads the rows that the batches touch, refuses those that are stale, each with its own
//! error, and writes the others.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use evercore_core::engine::{Batch, Checked, Mark, NameTable, NewAggregate, SequenceChange};
use evercore_core::{AggregateId, Error, Position, Receipt, Result as CoreResult, Sequence};
use futures_lite::future::zip;
use tokio_postgres::types::Type;

use crate::commit::check::{Answers, Known, Questions};
use crate::commit::columns::{NewRows, Written};
use crate::commit::commands::Commands;
use crate::commit::recent::Recent;
use crate::commit::statement::WriteSql;
use crate::connection::pool::{Checkout, Pools};
use crate::error::{PostgresError, Result, damaged, is_ours, is_rolled_back, is_stale, takes_no_writes};
use crate::names::{self, Names};
use crate::read::head::SeenHead;
use crate::sql::{LOCK_LOG_END, Sender, Sql};

const AGGREGATES: &str = "
    SELECT a.id, a.aggregate_type_id, a.natural_key,
           coalesce(e.sequence, 0), e.mark
    FROM @aggregates a
    LEFT JOIN LATERAL (SELECT e.sequence, e.mark FROM @events e WHERE e.aggregate_id = a.id
                       ORDER BY e.sequence DESC LIMIT 1) AS e ON true
    WHERE a.id = ANY ($1)";

const HOLDERS: &str = "
    SELECT a.id, a.aggregate_type_id, a.natural_key
    FROM unnest($1::int[], $2::text[]) AS k (type_id, natural_key)
    CROSS JOIN LATERAL (SELECT h.id, h.aggregate_type_id, h.natural_key FROM @aggregates h
                        WHERE h.aggregate_type_id = k.type_id AND h.natural_key = k.natural_key LIMIT 1) AS a";

/// The outcome of an attempt to commit some batches. If the attempt ends with an error instead, nothing was written.
pub(crate) enum FlightOutcome {
    /// Each batch has its own outcome.
    Done(Vec<CoreResult<Receipt>>),
    /// Nothing was written. A check under the lock will tell the reason.
    Recheck,
    Unknown,
}

/// Writes batches, and remembers the aggregates that it has written.
#[derive(Debug)]
pub(crate) struct Batches {
    pools: Arc<Pools>,
    pub(crate) names: Arc<Names>,
    commands: Arc<Commands>,
    lock: Sql,
    aggregates: Sql,
    holders: Sql,
    write: WriteSql,
    pub(crate) recent: Recent,
    /// The statement finds the row of `log_end` from here.
    seen: Arc<SeenHead>,
    /// Whether a statement of the current flight may have reached the server.
    pub(crate) is_sent: AtomicBool,
}

/// The outcome of each batch, if it is known already.
type Outcomes = Vec<Option<CoreResult<Receipt>>>;

/// The batches of a flight after the checks.
pub(crate) struct Sorted<'a> {
    pub(crate) outcomes: Outcomes,
    /// The rows of the other batches.
    pub(crate) new_rows: NewRows<'a>,
    /// The names, with those that this transaction registers.
    pub(crate) table: Arc<NameTable>,
    /// Whether this transaction registers names.
    pub(crate) is_table_new: bool,
}

impl Batches {
    pub(crate) fn new(
        pools: Arc<Pools>,
        names: Arc<Names>,
        commands: Arc<Commands>,
        seen: Arc<SeenHead>,
    ) -> Self {
        let schema = &pools.settings.schema;
        Self {
            lock: Sql::new(schema, LOCK_LOG_END, &[]),
            aggregates: Sql::new(schema, AGGREGATES, &[Type::INT8_ARRAY]),
            holders: Sql::new(schema, HOLDERS, &[Type::INT4_ARRAY, Type::TEXT_ARRAY]),
            write: WriteSql::new(schema),
            recent: Recent::default(),
            is_sent: AtomicBool::new(false),
            pools,
            names,
            commands,
            seen,
        }
    }

    /// Makes the statements that are otherwise made on first use, to check their plans.
    #[cfg(test)]
    pub(crate) fn make_all(&self) {
        assert!(self.write.all().count() > 0);
    }

    /// A connection for the current flight. From here on its statements may reach the server.
    pub(crate) async fn to_fly(&self) -> Result<Checkout> {
        let checkout = self.pools.to_commit().await?;
        self.is_sent.store(true, Ordering::Release);
        Ok(checkout)
    }

    /// One statement, one round trip.
    pub(crate) async fn quickly(&self, batches: &[&Batch], table: &NameTable) -> Result<FlightOutcome> {
        let Some(new_rows) = self.optimistic(batches, table)? else { return Ok(FlightOutcome::Recheck) };
        let checkout = self.to_fly().await?;
        let columns = new_rows.columns();
        let (sql, values) = self.write.of(&columns);
        // No statement that writes was sent before this one.
        let ready = self.pools.in_time(async { checkout.sender()?.ready(sql).await }).await?;
        let write = self.pools.in_time(ready.write(&self.pools.settings, &values));
        let answer = self.pools.notices.write(write).await;
        let is_known = answer.as_ref().err().is_none_or(is_rolled_back);
        if is_known && !answer.as_ref().is_err_and(|error| takes_no_writes(error) || is_stale(error)) {
            checkout.put_back();
        }
        match answer {
            Ok(rows) => match rows.first().map(|row| new_rows.written(row)) {
                Some(Ok(written)) => {
                    let receipts = written.receipts.iter().map(|(_, receipt)| receipt);
                    let batches: Vec<_> = new_rows.batches().zip(receipts).collect();
                    self.recent.note(&batches, new_rows.witness, table);
                    let receipts = written.receipts.into_iter();
                    Ok(FlightOutcome::Done(receipts.map(|(_, receipt)| Ok(receipt)).collect()))
                }
                Some(Err(_)) => Ok(FlightOutcome::Unknown),
                None => {
                    if new_rows.witness.is_some() {
                        self.recent.forget();
                    }
                    Ok(FlightOutcome::Recheck)
                }
            },
            Err(error) if is_known && is_ours(&error) => Ok(FlightOutcome::Recheck),
            Err(error) if is_known => Err(error),
            Err(_) => Ok(FlightOutcome::Unknown),
        }
    }

    /// The rows to write if no other commit was faster; `None` if a batch needs the careful way.
    fn optimistic<'a>(&self, batches: &[&'a Batch], table: &NameTable) -> Result<Option<NewRows<'a>>> {
        let mut dependencies = Dependencies::default();
        let mut new_rows = NewRows::assuming(table, self.seen.get());
        for (index, batch) in batches.iter().enumerate() {
            if !dependencies.takes(batch, table, &mut new_rows) {
                return Ok(None);
            }
            // Only snapshots of aggregates that the batch creates or appends to get here.
            let snapshots = batch.snapshots_to_keep(|_| Ok::<_, Error>(Sequence::ZERO))?;
            match new_rows.add(index, batch, table, snapshots) {
                // A new name is registered under the lock, in the same transaction as its first use.
                Err(PostgresError::UnknownName(_)) => return Ok(None),
                added => added?,
            }
        }
        new_rows.rely_on(&self.recent.memory());
        Ok(Some(new_rows))
    }

    /// Checks under the lock, then writes. The lock is held during two round trips. If this process stops between them,
    /// the server ends the transaction after its time-out for idle transactions.
    pub(crate) async fn carefully(
        &self,
        batches: &[&Batch],
        table: &Arc<NameTable>,
    ) -> Result<FlightOutcome> {
        let checkout = self.to_fly().await?;
        match self.pools.in_time(self.lock_and_write(&checkout, batches, table)).await {
            Ok((outcome, is_clean)) => {
                if is_clean {
                    checkout.put_back();
                }
                outcome
            }
            // For any other error, no COMMIT was sent.
            Err(PostgresError::Silent(_)) => Ok(FlightOutcome::Unknown),
            Err(error) => Err(error),
        }
    }

    /// Also returns whether the connection can be reused.
    async fn lock_and_write(
        &self,
        checkout: &Checkout,
        batches: &[&Batch],
        table: &Arc<NameTable>,
    ) -> Result<(Result<FlightOutcome>, bool)> {
        let sender = checkout.sender()?;
        let begin = self.pools.settings.begin();
        let sorted = self.lock_and_check(sender, batches, table, Some(&begin)).await?;
        if sorted.new_rows.is_empty() {
            let is_clean = sender.execute("ROLLBACK").await.is_ok();
            let outcomes = sorted.outcomes.into_iter().flatten().collect();
            return Ok((Ok(FlightOutcome::Done(outcomes)), is_clean));
        }
        let columns = sorted.new_rows.columns();
        let (sql, values) = self.write.of(&columns);
        let ready = sender.ready(sql).await?;
        let commit = self.pools.notices.commit(sender.execute("COMMIT"));
        let (rows, committed) = zip(ready.rows(&values), commit).await;
        // After an error, COMMIT rolls back without reporting one.
        let is_clean = committed.is_ok();
        let outcome = match (rows, committed) {
            (Ok(rows), Ok(())) => match rows.first().map(|row| sorted.new_rows.written(row)) {
                Some(Ok(written)) => FlightOutcome::Done(self.complete(sorted, written)),
                _ => FlightOutcome::Unknown,
            },
            (Err(error), _) if is_rolled_back(&error) && is_ours(&error) => FlightOutcome::Recheck,
            (Err(error), _) if is_rolled_back(&error) => return Ok((Err(error), is_clean)),
            (Ok(_), Err(error)) if is_rolled_back(&error) => FlightOutcome::Recheck,
            _ => FlightOutcome::Unknown,
        };
        Ok((Ok(outcome), is_clean))
    }

    /// The outcomes after the transaction has committed. Only now may others use the names that it registered.
    pub(crate) fn complete(&self, sorted: Sorted<'_>, written: Written) -> Vec<CoreResult<Receipt>> {
        let mut outcomes = sorted.outcomes;
        written.receipts.into_iter().for_each(|(index, receipt)| outcomes[index] = Some(Ok(receipt)));
        if sorted.is_table_new {
            self.names.learn(Arc::unwrap_or_clone(sorted.table));
        }
        outcomes.into_iter().flatten().collect()
    }

    /// Locks the log, reads the rows that the batches touch, checks the batches, and registers the names of those that
    /// will be written.
    pub(crate) async fn lock_and_check<'a>(
        &self,
        sender: Sender<'_>,
        batches: &[&'a Batch],
        table: &Arc<NameTable>,
        begin: Option<&str>,
    ) -> Result<Sorted<'a>> {
        let (known, table) = self.lock_and_read(sender, batches, table, begin).await?;
        let unknown = names::unknown(&table, batches.iter().copied());
        if unknown.is_empty() {
            let (outcomes, new_rows) = write_rest(batches, check_all(batches, known, &table), &table)?;
            return Ok(Sorted { outcomes, new_rows, table, is_table_new: false });
        }
        let mut fresh = self.names.lock(sender).await?;
        let checked = check_all(batches, known, &names::suppose(&fresh, &unknown));
        let rest =
            batches.iter().zip(&checked).filter(|(_, checked)| matches!(checked, Ok(Checked::Write { .. })));
        let needed = names::unknown(&fresh, rest.map(|(batch, _)| *batch));
        self.names.insert(sender, &mut fresh, &needed).await?;
        let (outcomes, new_rows) = write_rest(batches, checked, &fresh)?;
        Ok(Sorted { outcomes, new_rows, table: Arc::new(fresh), is_table_new: true })
    }

    /// Locks the log and reads the rows that the batches touch, in one round trip. Each statement sees all that was
    /// committed before the lock was given.
    async fn lock_and_read(
        &self,
        sender: Sender<'_>,
        batches: &[&Batch],
        table: &Arc<NameTable>,
        begin: Option<&str>,
    ) -> Result<(Known, Arc<NameTable>)> {
        let (ask, known_end) = (Questions::about(batches, table), self.seen.get());
        let (lock, aggregates) = (sender.ready(&self.lock).await?, sender.ready(&self.aggregates).await?);
        let (holders, commands) = (sender.ready(&self.holders).await?, self.commands.ready(sender).await?);
        let names = self.names.mark(sender).await?;
        let (begun, ((locked, names), (aggregates, (holders, commands)))) = zip(
            sender.begin(begin),
            zip(
                zip(lock.rows(&[]), names.rows(&[])),
                zip(
                    aggregates.rows(&[&ask.aggregates]),
                    zip(holders.rows(&[&ask.key_types, &ask.keys]), commands.rows(&[&ask.commands])),
                ),
            ),
        )
        .await;
        begun?;
        let locked = locked?;
        let log_end = locked.first().ok_or_else(|| damaged("the end of the log is missing"))?;
        // If the log has lost its tail, the end that was seen is too high, and no statement would find the row.
        self.seen.found(known_end, Position::new(log_end.try_get(0)?).map_err(damaged)?);
        let (aggregates, commands) = (aggregates?, commands?);
        let known = Known::read(&aggregates, &holders?, &commands)?;
        match names::check_mark(&names?, table) {
            Ok(()) if !known.has_unknown_type(table) => return Ok((known, Arc::clone(table))),
            Ok(()) | Err(PostgresError::OtherNames) => {}
            Err(error) => return Err(error),
        }
        let table = self.names.reload(sender).await?;
        // Keys of a type that was not known here were not asked for, or with the id of another type.
        let ask = Questions::about(batches, &table);
        let holders = sender.rows(&self.holders, &[&ask.key_types, &ask.keys]).await?;
        Ok((Known::read(&aggregates, &holders, &commands)?, table))
    }

    /// Writes the rows of checked batches, within an open transaction that holds the lock.
    pub(crate) async fn write_within(&self, sender: Sender<'_>, new_rows: &NewRows<'_>) -> Result<Written> {
        let columns = new_rows.columns();
        let (sql, values) = self.write.of(&columns);
        let rows = sender.rows(sql, &values).await?;
        let row = rows.first().ok_or_else(|| damaged("the end of the log is missing"))?;
        new_rows.written(row)
    }
}

/// The aggregates and keys that the batches of a flight change, to find batches that depend on each other.
#[derive(Default)]
struct Dependencies<'a> {
    /// The type and the last sequence of each aggregate.
    reached: HashMap<AggregateId, (u32, Sequence)>,
    keys: HashSet<(&'a str, &'a str)>,
}

impl<'a> Dependencies<'a> {
    /// Whether the batch can be written without a read before. Adds the checks that the statement must make itself.
    fn takes(&mut self, batch: &'a Batch, table: &NameTable, new_rows: &mut NewRows<'a>) -> bool {
        let is_plain = batch.guards().is_empty() && batch.key_changes().is_empty();
        let has = |id| batch.sequence_change_of(id).is_some() || batch.created(id).is_some();
        is_plain
            && batch.snapshots().iter().all(|(id, _)| has(*id))
            && batch.creates().iter().all(|made| self.makes(made, table))
            && batch.sequence_changes().iter().all(|change| {
                let read = batch.mark_read(change.aggregate, change.expected);
                self.grows(change, read, table, new_rows)
            })
    }

    fn makes(&mut self, made: &'a NewAggregate, table: &NameTable) -> bool {
        let Some(type_id) = table.aggregate_type_id(&made.aggregate_type) else { return false };
        let key = made.key.as_ref().map(|key| (made.aggregate_type.as_str(), key.as_str()));
        self.reached.insert(made.id, (type_id, Sequence::ZERO)).is_none()
            && key.is_none_or(|key| self.keys.insert(key))
    }

    /// If this flight has created or changed the aggregate before, its sequence is known. Otherwise the statement
    /// checks it.
    fn grows(
        &mut self,
        change: &SequenceChange,
        read: Option<Mark>,
        table: &NameTable,
        new_rows: &mut NewRows<'a>,
    ) -> bool {
        let Some(type_id) = table.aggregate_type_id(&change.aggregate_type) else { return false };
        let follows = match self.reached.insert(change.aggregate, (type_id, change.last)) {
            Some(reached) => reached == (type_id, change.expected) && read.is_none(),
            None => {
                new_rows.expect(change, read, type_id, table);
                true
            }
        };
        follows && change.last < Sequence::MAX
    }
}

/// Checks each batch against the rows as the batches before it leave them.
fn check_all<'a>(batches: &[&'a Batch], mut known: Known, table: &NameTable) -> Vec<CoreResult<Checked<'a>>> {
    let mut all = Vec::with_capacity(batches.len());
    for batch in batches {
        let checked = batch.check(&mut Answers { known: &known, table });
        if matches!(checked, Ok(Checked::Write { .. })) {
            known.apply(batch, table);
        }
        all.push(checked);
    }
    all
}

fn write_rest<'a>(
    batches: &[&'a Batch],
    checked: Vec<CoreResult<Checked<'a>>>,
    table: &NameTable,
) -> Result<(Outcomes, NewRows<'a>)> {
    let (mut outcomes, mut new_rows) = (Vec::with_capacity(batches.len()), NewRows::new());
    for ((index, batch), checked) in batches.iter().enumerate().zip(checked) {
        outcomes.push(match checked {
            Ok(Checked::Done(receipt)) => Some(Ok(receipt)),
            Err(refused) => Some(Err(refused)),
            Ok(Checked::Write { snapshots }) => {
                new_rows.add(index, batch, table, snapshots)?;
                None
            }
        });
    }
    Ok((outcomes, new_rows))
}

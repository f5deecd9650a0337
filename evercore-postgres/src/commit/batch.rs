//! Writes several batches in one transaction: the quick way, or the careful way under the lock of the log.
//!
//! The quick way is one statement in its own transaction. It assumes that no other commit has changed the aggregates of
//! the batches meanwhile. If one has, a condition or a constraint fails, and nothing is written. The careful way takes
//! the lock of the log's end, reads the rows that the batches touch, refuses those that are stale, each with its own
//! error, and writes the others.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use evercore_core::{
    AggregateId, Batch, Checked, Error, Mark, NameTable, NewAggregate, Position, Receipt,
    Result as CoreResult, Sequence, SequenceChange,
};
use futures_lite::future::zip;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use crate::commit::check::{Answers, Known, Questions};
use crate::commit::columns::Writing;
use crate::commit::commands::Commands;
use crate::commit::recent::Recent;
use crate::commit::statement::WriteSql;
use crate::connection::pool::{Checkout, Pools};
use crate::error::{PostgresError, Result, damaged, is_ours, is_rolled_back, is_stale, takes_no_writes};
use crate::names::{self, Names};
use crate::settings::Schema;
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

/// The statements of this module.
#[derive(Debug)]
pub(crate) struct BatchSql {
    lock: Sql,
    aggregates: Sql,
    holders: Sql,
    write: WriteSql,
}

impl BatchSql {
    pub(crate) fn new(schema: &Schema) -> Self {
        Self {
            lock: Sql::new(schema, LOCK_LOG_END, &[]),
            aggregates: Sql::new(schema, AGGREGATES, &[Type::INT8_ARRAY]),
            holders: Sql::new(schema, HOLDERS, &[Type::INT4_ARRAY, Type::TEXT_ARRAY]),
            write: WriteSql::new(schema),
        }
    }

    /// Makes the statements that are otherwise made on first use, to check their plans.
    #[cfg(test)]
    pub(crate) fn make_all(&self) {
        assert!(self.write.all().count() > 0);
    }
}

/// The outcome of an attempt to commit some batches.
pub(crate) enum FlightOutcome {
    /// Each batch has its own outcome.
    Done(Vec<CoreResult<Receipt>>),
    /// Certainly nothing was written.
    RolledBack(PostgresError),
    /// Nothing was written. A check under the lock will tell the reason.
    Recheck,
    Unknown,
}

/// Writes batches.
#[derive(Debug)]
pub(crate) struct Batches {
    pools: Arc<Pools>,
    names: Arc<Names>,
    commands: Arc<Commands>,
    sql: BatchSql,
    recent: Recent,
    /// Whether a statement of the current flight may have reached the server.
    is_sent: AtomicBool,
}

/// The outcome of each batch, if it is known already.
type Outcomes = Vec<Option<CoreResult<Receipt>>>;

/// The batches of a flight after the checks.
pub(crate) struct Sorted<'a> {
    pub(crate) outcomes: Outcomes,
    /// The rows of the other batches.
    pub(crate) writing: Writing<'a>,
    /// The names, with those that this transaction registers.
    pub(crate) table: Arc<NameTable>,
    /// Whether this transaction registers names.
    pub(crate) is_table_new: bool,
}

impl Batches {
    pub(crate) fn new(pools: Arc<Pools>, names: Arc<Names>, commands: Arc<Commands>) -> Self {
        let sql = BatchSql::new(&pools.settings.schema);
        Self { pools, names, commands, sql, recent: Recent::default(), is_sent: AtomicBool::new(false) }
    }

    pub(crate) fn begin_flight(&self) {
        self.is_sent.store(false, Ordering::Release);
    }

    pub(crate) fn is_sent(&self) -> bool {
        self.is_sent.load(Ordering::Acquire)
    }

    /// A connection for the current flight. From here on its statements may reach the server.
    pub(crate) async fn to_fly(&self) -> Result<Checkout> {
        let checkout = self.pools.to_commit().await?;
        self.is_sent.store(true, Ordering::Release);
        Ok(checkout)
    }

    /// One statement, one round trip.
    pub(crate) async fn quickly(&self, batches: &[&Batch], table: &NameTable) -> FlightOutcome {
        let (writing, checkout) = match self.prepare(batches, table).await {
            Ok(Some(prepared)) => prepared,
            Ok(None) => return FlightOutcome::Recheck,
            Err(error) => return FlightOutcome::RolledBack(error),
        };
        let sql = self.sql.write.form(writing.form());
        // No statement that writes was sent before this one.
        let ready = match self.pools.in_time(async { checkout.sender()?.ready(sql).await }).await {
            Ok(ready) => ready,
            Err(error) => return FlightOutcome::RolledBack(error),
        };
        let columns = writing.columns();
        let values = columns.values();
        let write = self.pools.in_time(ready.write(&self.pools.settings, &values));
        let written = self.pools.notices.write(write).await;
        let is_known = written.as_ref().err().is_none_or(is_rolled_back);
        if is_known && !written.as_ref().is_err_and(|error| takes_no_writes(error) || is_stale(error)) {
            checkout.put_back();
        }
        match written {
            Ok(rows) => match rows.first().map(|row| writing.receipts(row)) {
                Some(Ok(receipts)) => {
                    self.remember(&writing, &receipts, table);
                    self.remember_end(&writing, &rows[0]);
                    FlightOutcome::Done(in_place(batches.len(), receipts))
                }
                Some(Err(_)) => FlightOutcome::Unknown,
                None => {
                    if writing.witness().is_some() {
                        self.recent.forget();
                    }
                    FlightOutcome::Recheck
                }
            },
            Err(error) if is_known && is_ours(&error) => FlightOutcome::Recheck,
            Err(error) if is_known => FlightOutcome::RolledBack(error),
            Err(_) => FlightOutcome::Unknown,
        }
    }

    async fn prepare<'a>(
        &self,
        batches: &[&'a Batch],
        table: &NameTable,
    ) -> Result<Option<(Writing<'a>, Checkout)>> {
        let Some(writing) = self.optimistic(batches, table)? else { return Ok(None) };
        Ok(Some((writing, self.to_fly().await?)))
    }

    /// Remembers the sequences that were written, so that the next flight need not look them up.
    fn remember(&self, writing: &Writing<'_>, receipts: &[(usize, Receipt)], table: &NameTable) {
        let receipts = writing.batches().zip(receipts.iter().map(|(_, receipt)| receipt));
        self.recent.note(&receipts.collect::<Vec<_>>(), writing.witness(), table);
    }

    /// The next statement finds the row of `log_end` from here.
    fn remember_end(&self, writing: &Writing<'_>, row: &Row) {
        if let Ok(log_end) = writing.log_end(row) {
            self.recent.ends_at(log_end);
        }
    }

    /// The end of the log when the store was opened.
    pub(crate) fn ends_at(&self, head: Position) {
        self.recent.ends_at(head);
    }

    /// The rows to write if no other commit was faster; `None` if a batch needs the careful way.
    fn optimistic<'a>(&self, batches: &[&'a Batch], table: &NameTable) -> Result<Option<Writing<'a>>> {
        let mut dependencies = Dependencies::default();
        let mut writing = Writing::relying_on(table, self.recent.log_end());
        for (index, batch) in batches.iter().enumerate() {
            if !dependencies.takes(batch, table, &mut writing) {
                return Ok(None);
            }
            // Only snapshots of aggregates that the batch creates or appends to get here.
            let snapshots = batch.snapshots_to_keep(|_| Ok::<_, Error>(Sequence::ZERO))?;
            match writing.add(index, batch, table, snapshots) {
                // A new name is registered under the lock, in the same transaction as its first use.
                Err(PostgresError::UnknownName(_)) => return Ok(None),
                added => added?,
            }
        }
        writing.rely_on(&self.recent.book());
        Ok(Some(writing))
    }

    /// Checks under the lock, then writes. The lock is held during two round trips. If this process stops between them,
    /// the server ends the transaction after its time-out for idle transactions.
    pub(crate) async fn carefully(&self, batches: &[&Batch], table: &Arc<NameTable>) -> FlightOutcome {
        let checkout = match self.to_fly().await {
            Ok(checkout) => checkout,
            Err(error) => return FlightOutcome::RolledBack(error),
        };
        match self.pools.in_time(self.lock_and_write(&checkout, batches, table)).await {
            Ok((outcome, is_clean)) => {
                if is_clean {
                    checkout.put_back();
                }
                outcome
            }
            // No statement that writes was sent, or its own answer is the error.
            Err(PostgresError::Silent(_)) => FlightOutcome::Unknown,
            Err(error) => FlightOutcome::RolledBack(error),
        }
    }

    /// Also returns whether the connection can be reused.
    async fn lock_and_write(
        &self,
        checkout: &Checkout,
        batches: &[&Batch],
        table: &Arc<NameTable>,
    ) -> Result<(FlightOutcome, bool)> {
        let sender = checkout.sender()?;
        let begin = self.pools.settings.begin();
        let sorted = self.lock_and_check(sender, batches, table, Some(&begin)).await?;
        if sorted.writing.is_empty() {
            let is_clean = sender.execute("ROLLBACK").await.is_ok();
            return Ok((FlightOutcome::Done(sorted.outcomes.into_iter().flatten().collect()), is_clean));
        }
        let ready = sender.ready(self.sql.write.form(sorted.writing.form())).await?;
        let columns = sorted.writing.columns();
        let values = columns.values();
        let commit = self.pools.notices.commit(sender.execute("COMMIT"));
        let (rows, committed) = zip(ready.rows(&values), commit).await;
        // After an error, COMMIT rolls back and reports no error of its own.
        let is_clean = committed.is_ok();
        let outcome = match (rows, committed) {
            (Ok(rows), Ok(())) => match rows.first().map(|row| sorted.writing.receipts(row)) {
                Some(Ok(receipts)) => {
                    self.remember_end(&sorted.writing, &rows[0]);
                    FlightOutcome::Done(self.complete(sorted, receipts))
                }
                _ => FlightOutcome::Unknown,
            },
            (Err(error), _) if is_rolled_back(&error) && is_ours(&error) => FlightOutcome::Recheck,
            (Err(error), _) if is_rolled_back(&error) => FlightOutcome::RolledBack(error),
            (Ok(_), Err(error)) if is_rolled_back(&error) => FlightOutcome::Recheck,
            _ => FlightOutcome::Unknown,
        };
        Ok((outcome, is_clean))
    }

    /// The outcomes after the transaction has committed. Only now may others use the names that it registered.
    pub(crate) fn complete(
        &self,
        sorted: Sorted<'_>,
        receipts: Vec<(usize, Receipt)>,
    ) -> Vec<CoreResult<Receipt>> {
        let mut outcomes = sorted.outcomes;
        receipts.into_iter().for_each(|(index, receipt)| outcomes[index] = Some(Ok(receipt)));
        if sorted.is_table_new {
            self.names.learn(Arc::unwrap_or_clone(sorted.table));
        }
        outcomes.into_iter().flatten().collect()
    }

    /// Locks the log, reads the rows that the batches touch, checks the batches, and registers the names of those that
    /// are to be written.
    pub(crate) async fn lock_and_check<'a>(
        &self,
        sender: Sender<'_>,
        batches: &[&'a Batch],
        table: &Arc<NameTable>,
        begin: Option<&str>,
    ) -> Result<Sorted<'a>> {
        let (known, table) = self.lock_and_read(sender, batches, table, begin).await?;
        self.sort_out(sender, batches, known, table).await
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
        let sql = &self.sql;
        let ask = Questions::about(batches, table);
        let (lock, aggregates) = (sender.ready(&sql.lock).await?, sender.ready(&sql.aggregates).await?);
        let (holders, commands) = (sender.ready(&sql.holders).await?, self.commands.ready(sender).await?);
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
        if locked?.is_empty() {
            return Err(damaged("the end of the log is missing"));
        }
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
        let holders = sender.rows(&sql.holders, &[&ask.key_types, &ask.keys]).await?;
        Ok((Known::read(&aggregates, &holders, &commands)?, table))
    }

    async fn sort_out<'a>(
        &self,
        sender: Sender<'_>,
        batches: &[&'a Batch],
        known: Known,
        table: Arc<NameTable>,
    ) -> Result<Sorted<'a>> {
        let unknown = names::unknown(&table, batches.iter().copied());
        if unknown.is_empty() {
            let (outcomes, writing) = write_rest(batches, check_all(batches, known, &table), &table)?;
            return Ok(Sorted { outcomes, writing, table, is_table_new: false });
        }
        let mut fresh = self.names.lock(sender).await?;
        let checked = check_all(batches, known, &names::suppose(&fresh, &unknown));
        let rest =
            batches.iter().zip(&checked).filter(|(_, checked)| matches!(checked, Ok(Checked::Write { .. })));
        let needed = names::unknown(&fresh, rest.map(|(batch, _)| *batch));
        self.names.insert(sender, &mut fresh, &needed).await?;
        let (outcomes, writing) = write_rest(batches, checked, &fresh)?;
        Ok(Sorted { outcomes, writing, table: Arc::new(fresh), is_table_new: true })
    }

    /// Writes the rows of checked batches, within an open transaction that holds the lock.
    pub(crate) async fn write_within(
        &self,
        sender: Sender<'_>,
        writing: &Writing<'_>,
    ) -> Result<Vec<(usize, Receipt)>> {
        let ready = sender.ready(self.sql.write.form(writing.form())).await?;
        let columns = writing.columns();
        let rows = ready.rows(&columns.values()).await?;
        let row = rows.first().ok_or_else(|| damaged("the end of the log is missing"))?;
        writing.receipts(row)
    }
}

/// The aggregates and keys that the batches of a flight change, to find batches that depend on each other.
#[derive(Default)]
struct Dependencies<'a> {
    reached: HashMap<AggregateId, (u32, Sequence)>,
    keys: HashSet<(&'a str, &'a str)>,
}

impl<'a> Dependencies<'a> {
    /// Whether the batch can be written without a read before. Adds the checks that the statement must make itself.
    fn takes(&mut self, batch: &'a Batch, table: &NameTable, writing: &mut Writing<'a>) -> bool {
        let is_plain = batch.guards().is_empty() && batch.key_changes().is_empty();
        let has = |id| batch.sequence_change_of(id).is_some() || batch.created(id).is_some();
        is_plain
            && batch.snapshots().iter().all(|(id, _)| has(*id))
            && batch.creates().iter().all(|made| self.makes(made, table))
            && batch.sequence_changes().iter().all(|change| {
                let read = batch.mark_read(change.aggregate, change.expected);
                self.grows(change, read, table, writing)
            })
    }

    fn makes(&mut self, made: &'a NewAggregate, table: &NameTable) -> bool {
        let Some(type_id) = table.aggregate_type_number(&made.aggregate_type) else { return false };
        let key = made.key.as_ref().map(|key| (made.aggregate_type.as_str(), key.as_str()));
        self.reached.insert(made.id, (type_id, Sequence::ZERO)).is_none()
            && key.is_none_or(|key| self.keys.insert(key))
    }

    /// If this flight has created or changed the aggregate before, its sequence is known. Otherwise the statement checks
    /// it.
    fn grows(
        &mut self,
        change: &SequenceChange,
        read: Option<Mark>,
        table: &NameTable,
        writing: &mut Writing<'a>,
    ) -> bool {
        let Some(type_id) = table.aggregate_type_number(&change.aggregate_type) else { return false };
        let follows = match self.reached.insert(change.aggregate, (type_id, change.last)) {
            Some(reached) => reached == (type_id, change.expected) && read.is_none(),
            None => {
                writing.expect(change, read, type_id, table);
                true
            }
        };
        follows && change.last < Sequence::MAX
    }
}

fn in_place(batches: usize, receipts: Vec<(usize, Receipt)>) -> Vec<CoreResult<Receipt>> {
    let mut places: Vec<Option<CoreResult<Receipt>>> = (0..batches).map(|_| None).collect();
    for (index, receipt) in receipts {
        places[index] = Some(Ok(receipt));
    }
    let missing = || Err(Error::from(damaged("a batch of a flight has no outcome")));
    places.into_iter().map(|place| place.unwrap_or_else(missing)).collect()
}

/// Checks each batch as the batches before it leave the store.
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
) -> Result<(Outcomes, Writing<'a>)> {
    let (mut outcomes, mut writing) = (Vec::with_capacity(batches.len()), Writing::new());
    for ((index, batch), checked) in batches.iter().enumerate().zip(checked) {
        outcomes.push(match checked {
            Ok(Checked::Done(receipt)) => Some(Ok(receipt)),
            Err(refused) => Some(Err(refused)),
            Ok(Checked::Write { snapshots }) => {
                writing.add(index, batch, table, snapshots)?;
                None
            }
        });
    }
    Ok((outcomes, writing))
}

//! Committing some batches together: at once if nothing speaks against it, otherwise after a look under the lock.
//!
//! The quick way is one statement in a transaction of its own. It trusts that nobody was faster, and the constraints
//! find it out if somebody was: then it has written nothing. The careful way takes the lock of the log's end, reads what
//! the batches touch, drops those that are stale, each with its own error, and writes the others.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use evercore_core::{
    AggregateId, Batch, Checked, CommandId, Error, ErrorKind, IdBlock, KnownCommand, Mark, NameTable,
    NewAggregate, Receipt, Result as CoreResult, Sequence, SequenceChange, Timestamp,
};
use futures_lite::future::zip;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use crate::commit::check::{Answers, Known, Questions};
use crate::commit::columns::Writing;
use crate::commit::statement::WriteSql;
use crate::connection::pool::Lent;
use crate::error::{PostgresError, Result, damaged, is_ours, is_rolled_back, is_stale, takes_no_writes};
use crate::names;
use crate::sql::{LOCK_LOG_END, Schema, Sender, Sql, begin};
use crate::store::Store;

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

const COMMANDS: &str = "SELECT command_id, fingerprint, receipt FROM @commands WHERE command_id = ANY ($1)";

/// It waits for a commit with the same id that is on its way; the index makes them come one after the other.
const ABANDON: &str = "
    INSERT INTO @commands (command_id, recorded_at)
    VALUES ($1, (pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) * 1000000::double precision)::bigint)
    ON CONFLICT (command_id) DO NOTHING RETURNING command_id";

/// All commands, in pieces: old ones are looked for too rarely to pay for an index in every commit.
const COMMANDS_AFTER: &str =
    "SELECT command_id, recorded_at FROM @commands WHERE command_id > $1 ORDER BY command_id LIMIT 1000";

const FORGET: &str = "DELETE FROM @commands WHERE command_id = ANY ($1) AND recorded_at < $2";

/// Whether an id of a block is in use.
const ARE_USED: &str = "SELECT EXISTS (SELECT FROM @aggregates a WHERE a.id >= $1 AND a.id < $2)";

/// Up to here a number is the same in JSON and in every language.
const LARGEST_ID: u64 = (1 << 53) - 1;

/// How often to look for a block of ids of which none is in use; the first is free unless the store holds very many.
const BLOCKS: usize = 100;

/// The statements of this room.
#[derive(Debug)]
pub(crate) struct CommitSql {
    lock: Sql,
    aggregates: Sql,
    holders: Sql,
    commands: Sql,
    abandon: Sql,
    commands_after: Sql,
    forget: Sql,
    are_used: Sql,
    write: WriteSql,
}

impl CommitSql {
    pub(crate) fn new(schema: &Schema) -> Self {
        Self {
            lock: Sql::new(schema, LOCK_LOG_END, &[]),
            aggregates: Sql::new(schema, AGGREGATES, &[Type::INT8_ARRAY]),
            holders: Sql::new(schema, HOLDERS, &[Type::INT4_ARRAY, Type::TEXT_ARRAY]),
            commands: Sql::new(schema, COMMANDS, &[Type::TEXT_ARRAY]),
            abandon: Sql::new(schema, ABANDON, &[Type::TEXT]),
            commands_after: Sql::new(schema, COMMANDS_AFTER, &[Type::TEXT]),
            forget: Sql::new(schema, FORGET, &[Type::TEXT_ARRAY, Type::INT8]),
            are_used: Sql::new(schema, ARE_USED, &[Type::INT8, Type::INT8]),
            write: WriteSql::new(schema),
        }
    }

    /// Makes all that are made when first asked for, to look at their plans.
    #[cfg(test)]
    pub(crate) fn make_all(&self) {
        assert!(self.write.all().count() > 0);
    }
}

/// How a commit of several batches ended.
pub(crate) enum Flown {
    /// Each with its outcome.
    Done(Vec<CoreResult<Receipt>>),
    /// Nothing was written, for sure.
    RolledBack(PostgresError),
    /// Nothing was written, and a look under the lock will tell why.
    Look,
    /// Nobody knows.
    Unknown,
}

/// One statement, one round trip.
pub(crate) async fn quickly(store: &Store, batches: &[&Batch], table: &NameTable) -> Flown {
    let writing = match optimistic(store, batches, table) {
        Ok(Some(writing)) => writing,
        Ok(None) => return Flown::Look,
        Err(error) => return Flown::RolledBack(error),
    };
    let lent = match Lent::to_fly(store).await {
        Ok(lent) => lent,
        Err(error) => return Flown::RolledBack(error),
    };
    let sql = store.sql.commit.write.form(writing.form());
    // Until here nothing was sent that writes.
    let ready = match store.in_time(async { lent.sender()?.ready(sql).await }).await {
        Ok(ready) => ready,
        Err(error) => return Flown::RolledBack(error),
    };
    let columns = writing.columns();
    let doubt = store.heard.before_commit();
    let written = doubt.settle_rows(store.in_time(ready.write(&store.settings, &columns.values())).await);
    let is_known = written.as_ref().err().is_none_or(is_rolled_back);
    if is_known && !written.as_ref().is_err_and(|error| takes_no_writes(error) || is_stale(error)) {
        lent.put_back();
    }
    match written {
        Ok(rows) => match rows.first().map(|row| writing.receipts(row)) {
            Some(Ok(receipts)) => {
                note(store, &writing, &receipts, table);
                note_end(store, &writing, &rows[0]);
                Flown::Done(in_place(batches.len(), receipts))
            }
            Some(Err(_)) => Flown::Unknown,
            None => {
                if writing.witness().is_some() {
                    store.written.forget();
                }
                Flown::Look
            }
        },
        Err(error) if is_known && is_ours(&error) => Flown::Look,
        Err(error) if is_known => Flown::RolledBack(error),
        Err(_) => Flown::Unknown,
    }
}

/// What was written need not be looked up by the next.
fn note(store: &Store, writing: &Writing<'_>, receipts: &[(usize, Receipt)], table: &NameTable) {
    let receipts = writing.batches().zip(receipts.iter().map(|(_, receipt)| receipt));
    store.written.note(&receipts.collect::<Vec<_>>(), writing.witness(), table);
}

/// The next statement finds the row of `log_end` from here.
fn note_end(store: &Store, writing: &Writing<'_>, row: &Row) {
    if let Ok(log_end) = writing.log_end(row) {
        store.written.ends_at(log_end);
    }
}

/// What can be written without a look, if nobody was faster; `None` if something calls for one.
fn optimistic<'a>(store: &Store, batches: &[&'a Batch], table: &NameTable) -> Result<Option<Writing<'a>>> {
    let mut flight = Flight::default();
    let mut writing = Writing::relying_on(table, store.written.log_end());
    for (index, batch) in batches.iter().enumerate() {
        if !flight.takes(batch, table, &mut writing) {
            return Ok(None);
        }
        // The flight takes only snapshots of aggregates that the batch creates or appends to.
        let snapshots = batch.snapshots_to_keep(|_| Ok::<_, Error>(Sequence::ZERO))?;
        match writing.add(index, batch, table, snapshots) {
            // A new name is registered under the lock, together with what bears it.
            Err(PostgresError::UnknownName(_)) => return Ok(None),
            added => added?,
        }
    }
    writing.rely_on(&store.written.book());
    Ok(Some(writing))
}

/// What the batches of a flight do, to find those that depend on each other.
#[derive(Default)]
struct Flight<'a> {
    reached: HashMap<AggregateId, (u32, Sequence)>,
    keys: HashSet<(&'a str, &'a str)>,
}

impl<'a> Flight<'a> {
    /// Whether the batch may go without a look; notes down what the statement must look at by itself.
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
        let Some(number) = table.aggregate_type_number(&made.aggregate_type) else { return false };
        let key = made.key.as_ref().map(|key| (made.aggregate_type.as_str(), key.as_str()));
        self.reached.insert(made.id, (number, Sequence::ZERO)).is_none()
            && key.is_none_or(|key| self.keys.insert(key))
    }

    /// What this flight has made or grown before is where that left it; of the others the store must tell.
    fn grows(
        &mut self,
        change: &SequenceChange,
        read: Option<Mark>,
        table: &NameTable,
        writing: &mut Writing<'a>,
    ) -> bool {
        let Some(number) = table.aggregate_type_number(&change.aggregate_type) else { return false };
        let follows = match self.reached.insert(change.aggregate, (number, change.last)) {
            Some(reached) => reached == (number, change.expected) && read.is_none(),
            None => {
                writing.expect(change, read, number, table);
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

/// A look under the lock, and what it leaves to be written. Two round trips, in which the lock is held; should this
/// process stand still between them, the server ends the transaction after the time-out for idling.
pub(crate) async fn carefully(store: &Store, batches: &[&Batch], table: &Arc<NameTable>) -> Flown {
    let lent = match Lent::to_fly(store).await {
        Ok(lent) => lent,
        Err(error) => return Flown::RolledBack(error),
    };
    let flown = store.in_time(look_and_write(store, &lent, batches, table)).await;
    match flown {
        Ok((flown, is_clean)) => {
            if is_clean {
                lent.put_back();
            }
            flown
        }
        // Nothing was sent that writes, or it says so itself.
        Err(PostgresError::Silent(_)) => Flown::Unknown,
        Err(error) => Flown::RolledBack(error),
    }
}

async fn look_and_write(
    store: &Store,
    lent: &Lent,
    batches: &[&Batch],
    table: &Arc<NameTable>,
) -> Result<(Flown, bool)> {
    let sender = lent.sender()?;
    let begin = begin(&store.settings);
    let (known, table) = look(store, sender, batches, table, Some(&begin)).await?;
    let Sorted { mut outcomes, writing, fresh } = sort_out(store, sender, batches, known, &table).await?;
    if writing.is_empty() {
        let is_clean = sender.client.batch_execute("ROLLBACK").await.is_ok();
        return Ok((Flown::Done(outcomes.into_iter().flatten().collect()), is_clean));
    }
    let ready = sender.ready(store.sql.commit.write.form(writing.form())).await?;
    let columns = writing.columns();
    let values = columns.values();
    let doubt = store.heard.before_commit();
    let (rows, committed) = zip(ready.rows(&values), sender.client.batch_execute("COMMIT")).await;
    // COMMIT after an error is a rollback, and answers as if all were well.
    let committed = doubt.settle(committed.map_err(PostgresError::from));
    let is_clean = committed.is_ok();
    let flown = match (rows, committed) {
        (Ok(rows), Ok(())) => match rows.first().map(|row| writing.receipts(row)) {
            Some(Ok(receipts)) => {
                receipts.into_iter().for_each(|(index, receipt)| outcomes[index] = Some(Ok(receipt)));
                note_end(store, &writing, &rows[0]);
                fresh.into_iter().for_each(|fresh| drop(store.names.learn(fresh)));
                Flown::Done(outcomes.into_iter().flatten().collect())
            }
            _ => Flown::Unknown,
        },
        (Err(error), _) if is_rolled_back(&error) && is_ours(&error) => Flown::Look,
        (Err(error), _) if is_rolled_back(&error) => Flown::RolledBack(error),
        (Ok(_), Err(error)) if is_rolled_back(&error) => Flown::Look,
        _ => Flown::Unknown,
    };
    Ok((flown, is_clean))
}

/// Takes the lock and reads what the batches touch, in one round trip; each statement sees what had committed when the
/// lock was given.
pub(crate) async fn look(
    store: &Store,
    sender: Sender<'_>,
    batches: &[&Batch],
    table: &Arc<NameTable>,
    begin: Option<&str>,
) -> Result<(Known, Arc<NameTable>)> {
    let sql = &store.sql.commit;
    let ask = Questions::about(batches, table);
    let (lock, aggregates) = (sender.ready(&sql.lock).await?, sender.ready(&sql.aggregates).await?);
    let (holders, commands) = (sender.ready(&sql.holders).await?, sender.ready(&sql.commands).await?);
    let begun = async {
        match begin {
            Some(begin) => sender.client.batch_execute(begin).await,
            None => Ok(()),
        }
    };
    let names = store.names.mark(sender).await?;
    let (begun, ((locked, names), (aggregates, (holders, commands)))) = zip(
        begun,
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
    let table = store.names.reload(sender).await?;
    // Keys of a type that was not known here were not asked about, or by the number of another.
    let ask = Questions::about(batches, &table);
    let holders = sender.rows(&sql.holders, &[&ask.key_types, &ask.keys]).await?;
    Ok((Known::read(&aggregates, &holders, &commands)?, table))
}

/// What the checks say of the batches of a flight.
pub(crate) struct Sorted<'a> {
    /// The outcomes that are clear already.
    pub(crate) outcomes: Vec<Option<CoreResult<Receipt>>>,
    /// What is to be written for the others.
    pub(crate) writing: Writing<'a>,
    /// The names that are registered with them.
    pub(crate) fresh: Option<NameTable>,
}

/// Tells those that are refused from those that are to be written, and registers the names of these.
pub(crate) async fn sort_out<'a>(
    store: &Store,
    sender: Sender<'_>,
    batches: &[&'a Batch],
    known: Known,
    table: &NameTable,
) -> Result<Sorted<'a>> {
    let unknown = names::unknown(table, batches.iter().copied());
    if unknown.is_empty() {
        return write_rest(batches, check_all(batches, known, table), table);
    }
    let mut fresh = store.names.lock(sender).await?;
    let checked = check_all(batches, known, &names::suppose(&fresh, &unknown));
    let rest =
        batches.iter().zip(&checked).filter(|(_, checked)| matches!(checked, Ok(Checked::Write { .. })));
    let needed = names::unknown(&fresh, rest.map(|(batch, _)| *batch));
    store.names.insert(sender, &mut fresh, &needed).await?;
    let sorted = write_rest(batches, checked, &fresh)?;
    Ok(Sorted { fresh: Some(fresh), ..sorted })
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
) -> Result<Sorted<'a>> {
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
    Ok(Sorted { outcomes, writing, fresh: None })
}

/// Writes what [`sort_out`] has left, within a transaction that is open and holds the lock.
pub(crate) async fn write_within(
    store: &Store,
    sender: Sender<'_>,
    writing: &Writing<'_>,
) -> Result<Vec<(usize, Receipt)>> {
    let ready = sender.ready(store.sql.commit.write.form(writing.form())).await?;
    let columns = writing.columns();
    let rows = ready.rows(&columns.values()).await?;
    let row = rows.first().ok_or_else(|| damaged("the end of the log is missing"))?;
    writing.receipts(row)
}

/// What is known of a command id.
pub(crate) async fn command(store: &Store, id: &CommandId) -> Result<Option<KnownCommand>> {
    store.read(|lent| async move { command_on(store, lent.sender()?, id).await }).await
}

pub(crate) async fn command_on(
    store: &Store,
    sender: Sender<'_>,
    id: &CommandId,
) -> Result<Option<KnownCommand>> {
    let row = sender.row(&store.sql.commit.commands, &[&[id.as_str()].as_slice()]).await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(KnownCommand::stored(row.try_get(1)?, row.try_get(2)?)?))
}

/// The receipt; without one, it is written down that there never will be.
pub(crate) async fn settle(store: &Store, id: &CommandId) -> Result<Option<Receipt>> {
    store.write(|lent| async move { settle_on(store, &lent, id).await }).await
}

async fn settle_on(store: &Store, lent: &Lent, id: &CommandId) -> Result<Option<Receipt>> {
    let sender = lent.sender()?;
    let ready = sender.ready(&store.sql.commit.abandon).await?;
    let doubt = store.heard.before_commit();
    doubt.settle_rows(ready.write(&store.settings, &[&id.as_str()]).await)?;
    Ok(command_on(store, sender, id).await?.and_then(KnownCommand::into_receipt))
}

/// Removes the commands that are older than this, piece by piece; tells how many.
pub(crate) async fn forget_commands(store: &Store, before: Timestamp) -> Result<u64> {
    let (mut forgotten, mut after) = (0, String::new());
    loop {
        let (from, before) = (after.as_str(), before.as_micros());
        let (removed, last) =
            store.write(|lent| async move { forget_some(store, &lent, from, before).await }).await?;
        forgotten += removed;
        match last {
            Some(last) => after = last,
            None => return Ok(forgotten),
        }
    }
}

/// How many went, and up to which id was looked; `None` if there are no more.
async fn forget_some(store: &Store, lent: &Lent, after: &str, before: i64) -> Result<(u64, Option<String>)> {
    let sender = lent.sender()?;
    let piece = sender.ready(&store.sql.commit.commands_after).await?.rows(&[&after]).await?;
    let mut old: Vec<&str> = Vec::new();
    for row in &piece {
        if row.try_get::<_, i64>(1)? < before {
            old.push(row.try_get(0)?);
        }
    }
    if !old.is_empty() {
        let ready = sender.ready(&store.sql.commit.forget).await?;
        let doubt = store.heard.before_commit();
        doubt.settle(ready.write(&store.settings, &[&old, &before]).await)?;
    }
    let last = piece.last().map(|row| row.try_get(0)).transpose()?;
    Ok((old.len() as u64, last))
}

/// Ids that nobody else gets: a block that begins anywhere. A counter would be lost with the tail of the log and count up to
/// the same ids again, for others; and nobody would see that an aggregate is another one than before.
pub(crate) async fn reserve(store: &Store, count: u32) -> Result<IdBlock> {
    store.look(|lent| async move { reserve_on(store, &lent, count).await }).await
}

async fn reserve_on(store: &Store, lent: &Lent, count: u32) -> Result<IdBlock> {
    for _ in 0..BLOCKS {
        let block = anywhere(count);
        let end = block.saturating_add(i64::from(count));
        let row = lent.sender()?.row(&store.sql.commit.are_used, &[&block, &end]).await?;
        if !row.ok_or_else(|| damaged("the server did not answer"))?.try_get::<_, bool>(0)? {
            return Ok(IdBlock::new(block, count)?);
        }
    }
    Err(Error::new(ErrorKind::Backend, "there is no free block of ids, the store has too many aggregates")
        .into())
}

/// Where a block of so many ids begins.
fn anywhere(count: u32) -> i64 {
    let room = LARGEST_ID - u64::from(count);
    i64::try_from(1 + Mark::random().get().cast_unsigned() % room).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_numbers_that_json_keeps() {
        for count in [1, 256, u32::MAX] {
            let (first, last) = (anywhere(count), anywhere(count) + i64::from(count) - 1);
            assert!(first >= 1 && last.cast_unsigned() <= LARGEST_ID);
        }
    }
}

//! One batch within an open transaction: every check first, then the writes.
//!
//! A batch that fails a check has written nothing, so the batches that share its transaction go on without a
//! savepoint. A write that fails after the checks is not foreseen: it ends the whole transaction.

use std::sync::Arc;

use evercore_core::{
    AggregateId, AggregateType, Batch, Checked, CommandId, Error, Key, KeyChange, KnownCommand, Lookup, Mark,
    Metadata, NewEvent, Receipt, Sequence, Snapshot, StoredAggregate, Timestamp,
};
use rusqlite::{CachedStatement, Connection, OptionalExtension, ffi, params};

use crate::error::{Result, SqliteError, damaged};
use crate::log_end::LogEnd as Head;
use crate::names::Registrar;

const COMMAND: &str = "SELECT fingerprint, receipt FROM commands WHERE command_id = ?1";

/// Existence, type and sequence at one look; the sequence is the last entry of a covering index.
const AGGREGATE: &str = "
    SELECT aggregate_type_id, (SELECT max(sequence) FROM events WHERE aggregate_id = ?1)
    FROM aggregates WHERE id = ?1";

const HOLDER: &str = "SELECT id FROM aggregates WHERE aggregate_type_id = ?1 AND natural_key = ?2";

const INSERT_AGGREGATE: &str =
    "INSERT INTO aggregates (id, aggregate_type_id, natural_key) VALUES (?1, ?2, ?3)";

const SET_KEY: &str = "UPDATE aggregates SET natural_key = ?2 WHERE id = ?1";

const INSERT_EVENT: &str = "
    INSERT INTO events (position, aggregate_id, sequence, event_type_id, event_time, recorded_at, payload,
                        reference, correlation_id, causation_id, headers)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)";

/// An aggregate has one snapshot; an older one of the same version does not take the place of a newer.
const KEEP_SNAPSHOT: &str = "
    INSERT INTO snapshots (aggregate_id, sequence, version, state) VALUES (?1, ?2, ?3, ?4)
    ON CONFLICT (aggregate_id) DO UPDATE
    SET sequence = excluded.sequence, version = excluded.version, state = excluded.state
    WHERE excluded.sequence >= snapshots.sequence OR excluded.version <> snapshots.version";

const INSERT_COMMAND: &str =
    "INSERT INTO commands (command_id, fingerprint, receipt, recorded_at) VALUES (?1, ?2, ?3, ?4)";

/// Where a piece of the commands ends. Old ones are looked for too rarely to pay for an index in every commit.
const END_OF_PIECE: &str = "
    SELECT max(command_id) FROM
        (SELECT command_id FROM commands WHERE command_id > ?1 ORDER BY command_id LIMIT 1000)";

const FORGET: &str = "DELETE FROM commands WHERE command_id > ?1 AND command_id <= ?2 AND recorded_at < ?3";

/// What is known of a command id.
pub(crate) fn command(connection: &Connection, id: &CommandId) -> Result<Option<KnownCommand>> {
    let mut statement = connection.prepare_cached(COMMAND)?;
    let row = statement.query_row([id.as_str()], |row| {
        Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<String>>(1)?))
    });
    let Some((fingerprint, receipt)) = row.optional()? else { return Ok(None) };
    Ok(Some(KnownCommand::stored(fingerprint, receipt.as_deref())?))
}

/// The receipt; without one, it is written down that there never will be.
pub(crate) fn settle(connection: &Connection, id: &CommandId) -> Result<Option<Receipt>> {
    if let Some(known) = command(connection, id)? {
        return Ok(known.into_receipt());
    }
    let nothing = (id.as_str(), None::<i64>, None::<&str>, Timestamp::now().as_micros());
    connection.prepare_cached(INSERT_COMMAND)?.execute(nothing)?;
    Ok(None)
}

/// Removes the commands that are older than this from the piece after this id; tells how many, and where the piece
/// ends, if there are more.
pub(crate) fn forget_commands(
    connection: &Connection,
    after: &str,
    before: Timestamp,
) -> Result<(u64, Option<String>)> {
    let end: Option<String> =
        connection.prepare_cached(END_OF_PIECE)?.query_row([after], |row| row.get(0))?;
    let Some(end) = end else { return Ok((0, None)) };
    let removed = connection.prepare_cached(FORGET)?.execute((after, &end, before.as_micros()))?;
    Ok((removed as u64, Some(end)))
}

/// Writes batches into one transaction, one after the other.
pub(crate) struct Writer<'a> {
    connection: &'a Connection,
    names: Registrar<'a>,
    head: Head,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(connection: &'a Connection, names: Registrar<'a>) -> Result<Self> {
        Ok(Self { connection, names, head: Head::now(connection)? })
    }

    /// Where the log ends, with what was written by now.
    pub(crate) fn head(&self) -> Head {
        self.head
    }

    pub(crate) fn finish(self) -> (Head, Registrar<'a>) {
        (self.head, self.names)
    }

    /// The inner result is the batch's own, and an error there has written nothing; the outer one is the
    /// transaction's, which must then be rolled back.
    pub(crate) fn batch(&mut self, batch: &Batch) -> Result<Result<Receipt, Error>> {
        match batch.check(self) {
            Ok(Checked::Write { snapshots }) => self.write(batch, &snapshots).map(Ok),
            Ok(Checked::Done(receipt)) => Ok(Ok(receipt)),
            Err(SqliteError::Core(refused)) => Ok(Err(refused)),
            Err(failed) => Err(failed),
        }
    }

    /// A batch after the user's own SQL, which is not run for a command that took effect before. Whatever refuses
    /// either of them ends the transaction.
    pub(crate) fn batch_after(
        &mut self,
        sql: impl FnOnce(&Connection) -> Result<()>,
        batch: &Batch,
    ) -> Result<Receipt> {
        if let Some(id) = batch.command_id()
            && let Some(known) = command(self.connection, id)?
        {
            return Ok(known.answer(batch)?);
        }
        sql(self.connection)?;
        self.head = Head::now(self.connection)?; // the SQL took its time
        Ok(self.batch(batch)??)
    }

    fn write(&mut self, batch: &Batch, snapshots: &[(AggregateId, &Snapshot)]) -> Result<Receipt> {
        // Keys that change are freed first, all of them: two aggregates may swap theirs.
        self.set_keys(batch.key_changes(), |_| None)?;
        for made in batch.creates() {
            let type_id = self.names.aggregate_type(&made.aggregate_type)?;
            let key = made.key.as_ref().map(Key::as_str);
            let inserted =
                self.connection.prepare_cached(INSERT_AGGREGATE)?.execute((made.id.get(), type_id, key));
            inserted.map_err(|error| created_twice(made.id, error))?;
        }
        self.set_keys(batch.key_changes(), |change| Some(&change.key))?;
        let receipt = Receipt::of(batch, self.head.position, self.head.recorded_at);
        self.write_events(batch)?;
        self.keep_snapshots(snapshots)?;
        if let Some(id) = batch.command_id() {
            let recorded_at = receipt.recorded_at.as_micros();
            let row = (id.as_str(), batch.fingerprint(), receipt.to_string(), recorded_at);
            self.connection.prepare_cached(INSERT_COMMAND)?.execute(row)?;
        }
        Ok(receipt)
    }

    fn set_keys(&self, changes: &[KeyChange], key: impl Fn(&KeyChange) -> Option<&Key>) -> Result<()> {
        for change in changes {
            let row = (change.aggregate.get(), key(change).map(Key::as_str));
            self.connection.prepare_cached(SET_KEY)?.execute(row)?;
        }
        Ok(())
    }

    fn write_events(&mut self, batch: &Batch) -> Result<()> {
        if batch.events() == 0 {
            return Ok(());
        }
        let mut insert = self.connection.prepare_cached(INSERT_EVENT)?;
        let mut headers = HeaderText::default();
        for append in batch.appends() {
            let mut sequence = append.expected;
            for event in &append.events {
                sequence = sequence.next();
                let event_type_id = self.names.event_type(&append.aggregate_type, &event.event_type)?;
                self.head.position = self.head.position.next();
                let place = (append.aggregate, sequence, event_type_id);
                insert_event(&mut insert, self.head, place, event, headers.of(&event.metadata)?)?;
            }
        }
        Ok(())
    }

    fn keep_snapshots(&self, snapshots: &[(AggregateId, &Snapshot)]) -> Result<()> {
        for (id, snapshot) in snapshots {
            let state = snapshot.state.as_bytes();
            let row = (id.get(), snapshot.sequence.get(), snapshot.version, state);
            self.connection.prepare_cached(KEEP_SNAPSHOT)?.execute(row)?;
        }
        Ok(())
    }
}

/// Each look is a query in the open transaction.
impl Lookup for Writer<'_> {
    type Error = SqliteError;

    fn command(&mut self, id: &CommandId) -> Result<Option<KnownCommand>> {
        command(self.connection, id)
    }

    fn aggregate(&mut self, id: AggregateId) -> Result<Option<StoredAggregate>> {
        let mut statement = self.connection.prepare_cached(AGGREGATE)?;
        let row = statement.query_row([id.get()], |row| Ok((row.get(0)?, row.get::<_, Option<i64>>(1)?)));
        let Some((type_id, sequence)) = row.optional()? else { return Ok(None) };
        Ok(Some(StoredAggregate {
            aggregate_type: self.names.name_of(type_id)?,
            sequence: Sequence::new(sequence.unwrap_or(0)).map_err(damaged)?,
            mark: Some(Mark::ALWAYS),
        }))
    }

    fn holder(&mut self, aggregate_type: &AggregateType, key: &Key) -> Result<Option<AggregateId>> {
        let Some(type_id) = self.names.find(aggregate_type)? else { return Ok(None) };
        let mut statement = self.connection.prepare_cached(HOLDER)?;
        let id = statement.query_row((type_id, key.as_str()), |row| row.get(0)).optional()?;
        id.map(AggregateId::new).transpose().map_err(damaged)
    }

    /// The primary key finds an id that is in use, without a look before.
    fn exists(&mut self, _: AggregateId) -> Result<bool> {
        Ok(false)
    }
}

fn insert_event(
    insert: &mut CachedStatement<'_>,
    head: Head,
    (aggregate, sequence, event_type_id): (AggregateId, Sequence, u32),
    event: &NewEvent,
    headers: Option<&str>,
) -> Result<()> {
    insert.execute(params![
        head.position.get(),
        aggregate.get(),
        sequence.get(),
        event_type_id,
        event.time.as_micros(),
        head.recorded_at.as_micros(),
        event.payload.as_bytes(),
        event.metadata.reference(),
        event.metadata.correlation_id(),
        event.metadata.causation_id(),
        headers,
    ])?;
    Ok(())
}

/// Ids are reserved, so one that exists is a mistake of the caller's; the primary key finds it without a look before.
fn created_twice(id: AggregateId, error: rusqlite::Error) -> SqliteError {
    match error.sqlite_extended_error_code() {
        Some(ffi::SQLITE_CONSTRAINT_PRIMARYKEY | ffi::SQLITE_CONSTRAINT_ROWID) => Error::id_in_use(id).into(),
        _ => error.into(),
    }
}

/// Headers as JSON; events of one unit share their metadata, so the text is made once for all in a row.
#[derive(Default)]
struct HeaderText {
    of: Option<Arc<Metadata>>,
    text: String,
}

impl HeaderText {
    fn of(&mut self, metadata: &Arc<Metadata>) -> Result<Option<&str>> {
        if metadata.headers().is_empty() {
            return Ok(None);
        }
        if !self.of.as_ref().is_some_and(|known| Arc::ptr_eq(known, metadata)) {
            self.text = serde_json::to_string(metadata.headers()).map_err(damaged)?;
            self.of = Some(Arc::clone(metadata));
        }
        Ok(Some(&self.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A writer is held for one piece at a time.
    #[test]
    fn commands_are_forgotten_in_pieces() {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(include_str!("../../migrations/V1__event_store.sql")).unwrap();
        let many = "
            WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 2500)
            INSERT INTO commands (command_id, recorded_at) SELECT printf('command %05d', n), n FROM n";
        connection.execute_batch(many).unwrap();
        let before = Timestamp::from_micros(2_000).unwrap();
        let (mut after, mut pieces) = (String::new(), Vec::new());
        while let (count, Some(end)) = forget_commands(&connection, &after, before).unwrap() {
            pieces.push(count);
            after = end;
        }
        assert_eq!(pieces, [1_000, 999, 0]);
    }
}

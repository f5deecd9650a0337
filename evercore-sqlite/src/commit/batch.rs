//! Writes batches in an open transaction: all checks of a batch come first, and then its writes.
//!
//! A batch that fails a check has written nothing, so the other batches of the transaction continue without a
//! savepoint. If a write fails after the checks, the whole transaction is rolled back.

use std::sync::Arc;

use evercore_core::engine::{
    Batch, Checked, KeyChange, KnownCommand, Lookup, Mark, NameTable, Snapshot, StoredAggregate,
};
use evercore_core::{
    AggregateId, AggregateType, CommandId, Error, Key, Metadata, Position, Receipt, Sequence,
};
use rusqlite::{Connection, OptionalExtension, ffi, params};

use crate::commit::commands;
use crate::error::{Result, SqliteError, damaged};
use crate::log_end::LogEnd;
use crate::names::{Names, Registrar};

/// Type and sequence of an aggregate. The sequence is the last entry of a covering index.
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

/// An aggregate has one snapshot. An older one of the same version does not replace a newer one.
const KEEP_SNAPSHOT: &str = "
    INSERT INTO snapshots (aggregate_id, sequence, version, state) VALUES (?1, ?2, ?3, ?4)
    ON CONFLICT (aggregate_id) DO UPDATE
    SET sequence = excluded.sequence, version = excluded.version, state = excluded.state
    WHERE excluded.sequence >= snapshots.sequence OR excluded.version <> snapshots.version";

/// Writes batches in one transaction, one after another.
pub(crate) struct BatchWriter<'a> {
    connection: &'a Connection,
    names: Registrar<'a>,
    begin: Position,
    end: LogEnd,
}

/// The effect of a transaction, to be made known after it has committed.
pub(crate) struct Written {
    pub(crate) head: Position,
    pub(crate) has_events: bool,
    pub(crate) fresh_names: NameTable,
}

impl<'a> BatchWriter<'a> {
    pub(crate) fn new(connection: &'a Connection, names: &Names) -> Result<Self> {
        let end = LogEnd::now(connection)?;
        Ok(Self { connection, names: Registrar::new(connection, names), begin: end.position, end })
    }

    pub(crate) fn finish(self) -> Written {
        let head = self.end.position;
        Written { head, has_events: self.begin < head, fresh_names: self.names.into_fresh() }
    }

    /// After an error of the inner result the batch has written nothing. After an error of the outer one the
    /// transaction must be rolled back.
    pub(crate) fn batch(&mut self, batch: &Batch) -> Result<Result<Receipt, Error>> {
        match batch.check(self) {
            Ok(Checked::Write { snapshots }) => self.write(batch, &snapshots).map(Ok),
            Ok(Checked::Done(receipt)) => Ok(Ok(receipt)),
            Err(SqliteError::Core(refused)) => Ok(Err(refused)),
            Err(failed) => Err(failed),
        }
    }

    /// Writes a batch after the user's own SQL. The SQL does not run for a command that took effect before. After any
    /// error the transaction must be rolled back.
    pub(crate) fn batch_after(
        &mut self,
        sql: impl FnOnce(&Connection) -> Result<()>,
        batch: &Batch,
    ) -> Result<Receipt> {
        if let Some(id) = batch.command_id()
            && let Some(known) = commands::find(self.connection, id)?
        {
            return Ok(known.answer(batch)?);
        }
        sql(self.connection)?;
        self.end = LogEnd::now(self.connection)?; // the SQL took some time
        Ok(self.batch(batch)??)
    }

    fn write(&mut self, batch: &Batch, snapshots: &[(AggregateId, &Snapshot)]) -> Result<Receipt> {
        // All keys that change are freed first, because two aggregates may swap their keys.
        self.set_keys(batch.key_changes(), |_| None)?;
        for made in batch.creates() {
            let type_id = self.names.aggregate_type_id(&made.aggregate_type)?;
            let key = made.key.as_ref().map(Key::as_str);
            let inserted =
                self.connection.prepare_cached(INSERT_AGGREGATE)?.execute((made.id.get(), type_id, key));
            inserted.map_err(|error| created_twice(made.id, error))?;
        }
        self.set_keys(batch.key_changes(), |change| Some(&change.key))?;
        let receipt = Receipt::of(batch, self.end.position, self.end.recorded_at);
        self.write_events(batch)?;
        self.keep_snapshots(snapshots)?;
        if let Some(id) = batch.command_id() {
            let fingerprint = batch.fingerprint();
            commands::insert(self.connection, id, fingerprint, Some(&receipt), receipt.recorded_at)?;
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
                self.end.position = self.end.position.next();
                insert.execute(params![
                    self.end.position.get(),
                    append.aggregate.get(),
                    sequence.get(),
                    self.names.event_type_id(&append.aggregate_type, &event.event_type)?,
                    event.time.as_micros(),
                    self.end.recorded_at.as_micros(),
                    event.payload.as_bytes(),
                    event.metadata.reference(),
                    event.metadata.correlation_id(),
                    event.metadata.causation_id(),
                    headers.of(&event.metadata)?,
                ])?;
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

/// Each lookup is a query in the open transaction.
impl Lookup for BatchWriter<'_> {
    type Error = SqliteError;

    fn command(&mut self, id: &CommandId) -> Result<Option<KnownCommand>> {
        commands::find(self.connection, id)
    }

    fn aggregate(&mut self, id: AggregateId) -> Result<Option<StoredAggregate>> {
        let mut statement = self.connection.prepare_cached(AGGREGATE)?;
        let row = statement.query_row([id.get()], |row| Ok((row.get(0)?, row.get::<_, Option<i64>>(1)?)));
        let Some((type_id, sequence)) = row.optional()? else { return Ok(None) };
        Ok(Some(StoredAggregate {
            aggregate_type: self.names.aggregate_type(type_id)?,
            sequence: Sequence::new(sequence.unwrap_or(0)).map_err(damaged)?,
            mark: Some(Mark::ALWAYS),
        }))
    }

    fn holder(&mut self, aggregate_type: &AggregateType, key: &Key) -> Result<Option<AggregateId>> {
        let Some(type_id) = self.names.known_aggregate_type_id(aggregate_type)? else { return Ok(None) };
        let mut statement = self.connection.prepare_cached(HOLDER)?;
        let id = statement.query_row((type_id, key.as_str()), |row| row.get(0)).optional()?;
        id.map(AggregateId::new).transpose().map_err(damaged)
    }

    /// An id that is in use violates the primary key when it is inserted.
    fn exists(&mut self, _: AggregateId) -> Result<bool> {
        Ok(false)
    }
}

/// Ids are reserved, so an id that is in use is an error of the caller.
fn created_twice(id: AggregateId, error: rusqlite::Error) -> SqliteError {
    match error.sqlite_extended_error_code() {
        Some(ffi::SQLITE_CONSTRAINT_PRIMARYKEY | ffi::SQLITE_CONSTRAINT_ROWID) => Error::id_in_use(id).into(),
        _ => error.into(),
    }
}

/// Headers as JSON. Events of one unit share their metadata, so consecutive events share one text.
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

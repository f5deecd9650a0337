//! One batch within an open transaction: every check first, then the writes.
//!
//! A batch that fails a check has written nothing, so the batches that share its transaction go on without a
//! savepoint. A write that fails after the checks is not foreseen: it ends the whole transaction.

use std::sync::Arc;

use evercore_core::{
    AggregateId, Append, Batch, CommandId, Error, Guard, Key, KeyChange, Metadata, NewEvent, Position, Receipt,
    Sequence, Snapshot, Timestamp,
};
use rusqlite::{CachedStatement, Connection, OptionalExtension, params};

use crate::error::{Result, damaged};
use crate::names::Registrar;

const HEAD: &str = "SELECT position, recorded_at FROM events ORDER BY position DESC LIMIT 1";

const COMMAND: &str = "SELECT fingerprint, receipt FROM commands WHERE command_id = ?1";

/// Existence, type and sequence at one look; the sequence is the last entry of a covering index.
const AGGREGATE: &str = "
    SELECT aggregate_type_id, (SELECT max(sequence) FROM events WHERE aggregate_id = ?1)
    FROM aggregates WHERE id = ?1";

const HOLDER: &str = "SELECT id FROM aggregates WHERE aggregate_type_id = ?1 AND natural_key = ?2";

const INSERT_AGGREGATE: &str = "INSERT INTO aggregates (id, aggregate_type_id, natural_key) VALUES (?1, ?2, ?3)";

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

const INSERT_COMMAND: &str = "INSERT INTO commands (command_id, fingerprint, receipt) VALUES (?1, ?2, ?3)";

/// Where the log ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub(crate) position: Position,
    pub(crate) recorded_at: Timestamp,
}

impl Head {
    pub(crate) fn read(connection: &Connection) -> Result<Self> {
        let mut statement = connection.prepare_cached(HEAD)?;
        let last = statement.query_row([], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        let Some((position, recorded_at)) = last else {
            return Ok(Self { position: Position::ZERO, recorded_at: Timestamp::MIN });
        };
        let position = Position::new(position).map_err(damaged)?;
        Ok(Self { position, recorded_at: Timestamp::from_micros(recorded_at).map_err(damaged)? })
    }
}

/// What is known of a command id.
pub(crate) enum Command {
    /// Nothing.
    Unknown,
    /// It took effect, with this content.
    Committed { fingerprint: Option<i64>, receipt: Receipt },
    /// It never did and never will.
    Abandoned,
}

impl Command {
    pub(crate) fn read(connection: &Connection, id: &CommandId) -> Result<Self> {
        let mut statement = connection.prepare_cached(COMMAND)?;
        let row = statement.query_row([id.as_str()], |row| {
            Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<String>>(1)?))
        });
        match row.optional()? {
            None => Ok(Self::Unknown),
            Some((_, None)) => Ok(Self::Abandoned),
            Some((fingerprint, Some(receipt))) => Ok(Self::Committed { fingerprint, receipt: receipt.parse()? }),
        }
    }

    /// Writes that the command never took effect.
    pub(crate) fn abandon(connection: &Connection, id: &CommandId) -> Result<()> {
        let nothing = (id.as_str(), None::<i64>, None::<&str>);
        connection.prepare_cached(INSERT_COMMAND)?.execute(nothing)?;
        Ok(())
    }
}

/// Writes batches into one transaction, one after the other.
pub(crate) struct Writer<'a> {
    connection: &'a Connection,
    names: Registrar<'a>,
    head: Head,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(connection: &'a Connection, names: Registrar<'a>) -> Result<Self> {
        let mut head = Head::read(connection)?;
        head.recorded_at = head.recorded_at.max(Timestamp::now());
        Ok(Self { connection, names, head })
    }

    pub(crate) fn finish(self) -> (Head, Registrar<'a>) {
        (self.head, self.names)
    }

    /// The inner result is the batch's own, and an error there has written nothing; the outer one is the
    /// transaction's, which must then be rolled back.
    pub(crate) fn batch(&mut self, batch: &Batch) -> Result<Result<Receipt, Error>> {
        if let Some(outcome) = self.known_command(batch)? {
            return Ok(outcome);
        }
        let aggregates = match self.check(batch)? {
            Ok(aggregates) => aggregates,
            Err(refused) => return Ok(Err(refused)),
        };
        self.write(batch, &aggregates).map(Ok)
    }

    fn known_command(&self, batch: &Batch) -> Result<Option<Result<Receipt, Error>>> {
        let Some(id) = batch.command_id() else { return Ok(None) };
        Ok(match Command::read(self.connection, id)? {
            Command::Unknown => None,
            Command::Abandoned => Some(Err(Error::command_abandoned())),
            Command::Committed { fingerprint, receipt } if fingerprint == Some(batch.fingerprint()) => {
                Some(Ok(receipt))
            }
            Command::Committed { .. } => Some(Err(Error::command_reused())),
        })
    }

    /// Every reason to refuse the batch; what comes back are the sequences that the snapshots are held against.
    fn check(&mut self, batch: &Batch) -> Result<Result<Vec<Sequence>, Error>> {
        let made = Made::of(batch);
        for append in batch.appends() {
            if let Err(refused) = self.check_append(append, &made)? {
                return Ok(Err(refused));
            }
        }
        for guard in batch.guards() {
            if let Err(refused) = self.check_guard(guard, &made)? {
                return Ok(Err(refused));
            }
        }
        if let Err(refused) = self.check_keys(batch)? {
            return Ok(Err(refused));
        }
        self.snapshot_limits(batch, &made)
    }

    fn check_append(&mut self, append: &Append, made: &Made) -> Result<Result<(), Error>> {
        let (id, expected) = (append.aggregate, append.expected);
        let actual = match self.aggregate(id, made)? {
            None => return Ok(Err(Error::not_found(id))),
            Some(Found::Made) => Sequence::ZERO,
            Some(Found::Stored { type_id, sequence }) => {
                if self.names.find(&append.aggregate_type)? != Some(type_id) {
                    let actual = self.names.name_of(type_id)?;
                    return Ok(Err(Error::wrong_type(id, append.aggregate_type.clone(), actual)));
                }
                sequence
            }
        };
        // Sequences past the largest number there is are nowhere to be: a conflict too.
        let fits = expected.get().checked_add_unsigned(append.events.len() as u64).is_some();
        Ok(if actual == expected && fits { Ok(()) } else { Err(Error::conflict(id, expected, actual)) })
    }

    fn check_guard(&self, guard: &Guard, made: &Made) -> Result<Result<(), Error>> {
        let actual = match self.aggregate(guard.aggregate, made)? {
            None => return Ok(Err(Error::not_found(guard.aggregate))),
            Some(Found::Made) => Sequence::ZERO,
            Some(Found::Stored { sequence, .. }) => sequence,
        };
        let is_there = actual == guard.expected;
        Ok(if is_there { Ok(()) } else { Err(Error::conflict(guard.aggregate, guard.expected, actual)) })
    }

    fn check_keys(&mut self, batch: &Batch) -> Result<Result<(), Error>> {
        for change in batch.key_changes() {
            if let Err(refused) = self.check_change(change)? {
                return Ok(Err(refused));
            }
        }
        let made = batch.creates().iter().filter_map(|made| Some((&made.aggregate_type, made.key.as_ref()?)));
        let changed = batch.key_changes().iter().map(|change| (&change.aggregate_type, &change.key));
        for (aggregate_type, key) in made.chain(changed) {
            let Some(type_id) = self.names.find(aggregate_type)? else { continue };
            if self.holder(type_id, key)?.is_some_and(|holder| !gives_up_its_key(batch, holder)) {
                return Ok(Err(Error::key_taken(aggregate_type.clone())));
            }
        }
        Ok(Ok(()))
    }

    fn check_change(&mut self, change: &KeyChange) -> Result<Result<(), Error>> {
        let Some(Found::Stored { type_id, .. }) = self.aggregate(change.aggregate, &Made::none())? else {
            return Ok(Err(Error::not_found(change.aggregate)));
        };
        if self.names.find(&change.aggregate_type)? != Some(type_id) {
            let actual = self.names.name_of(type_id)?;
            return Ok(Err(Error::wrong_type(change.aggregate, change.aggregate_type.clone(), actual)));
        }
        Ok(Ok(()))
    }

    fn holder(&self, type_id: i64, key: &Key) -> Result<Option<i64>> {
        let mut statement = self.connection.prepare_cached(HOLDER)?;
        Ok(statement.query_row((type_id, key.as_str()), |row| row.get(0)).optional()?)
    }

    /// Where each aggregate with a snapshot will be after the batch.
    fn snapshot_limits(&self, batch: &Batch, made: &Made) -> Result<Result<Vec<Sequence>, Error>> {
        let mut limits = Vec::with_capacity(batch.snapshots().len());
        for (id, _) in batch.snapshots() {
            limits.push(match (batch.append_to(*id), self.aggregate(*id, made)?) {
                (_, None) => return Ok(Err(Error::not_found(*id))),
                (Some(append), Some(_)) => append.last(),
                (None, Some(Found::Made)) => Sequence::ZERO,
                (None, Some(Found::Stored { sequence, .. })) => sequence,
            });
        }
        Ok(Ok(limits))
    }

    fn aggregate(&self, id: AggregateId, made: &Made) -> Result<Option<Found>> {
        if made.has(id) {
            return Ok(Some(Found::Made));
        }
        let mut statement = self.connection.prepare_cached(AGGREGATE)?;
        let row = statement.query_row([id.get()], |row| Ok((row.get(0)?, row.get::<_, Option<i64>>(1)?)));
        let Some((type_id, sequence)) = row.optional()? else { return Ok(None) };
        let sequence = Sequence::new(sequence.unwrap_or(0)).map_err(damaged)?;
        Ok(Some(Found::Stored { type_id, sequence }))
    }

    fn write(&mut self, batch: &Batch, snapshot_limits: &[Sequence]) -> Result<Receipt> {
        // Keys that change are freed first, all of them: two aggregates may swap theirs.
        self.set_keys(batch.key_changes(), |_| None)?;
        for made in batch.creates() {
            let type_id = self.names.aggregate_type(&made.aggregate_type)?;
            let key = made.key.as_ref().map(Key::as_str);
            self.connection.prepare_cached(INSERT_AGGREGATE)?.execute((made.id.get(), type_id, key))?;
        }
        self.set_keys(batch.key_changes(), |change| Some(&change.key))?;
        let receipt = Receipt::of(batch, self.head.position, self.head.recorded_at);
        self.write_events(batch)?;
        for ((id, snapshot), limit) in batch.snapshots().iter().zip(snapshot_limits) {
            self.keep_snapshot(*id, snapshot, *limit)?;
        }
        if let Some(id) = batch.command_id() {
            let row = (id.as_str(), batch.fingerprint(), receipt.to_string());
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

    /// A snapshot from the future of its aggregate is not kept: it would change the answer.
    fn keep_snapshot(&self, id: AggregateId, snapshot: &Snapshot, limit: Sequence) -> Result<()> {
        if snapshot.sequence <= limit {
            let state = snapshot.state.as_bytes();
            let row = (id.get(), snapshot.sequence.get(), snapshot.version, state);
            self.connection.prepare_cached(KEEP_SNAPSHOT)?.execute(row)?;
        }
        Ok(())
    }
}

fn insert_event(
    insert: &mut CachedStatement<'_>,
    head: Head,
    (aggregate, sequence, event_type_id): (AggregateId, Sequence, i64),
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

/// A key change always gives another key: the holder's present one is free.
fn gives_up_its_key(batch: &Batch, holder: i64) -> bool {
    batch.key_changes().iter().any(|change| change.aggregate.get() == holder)
}

/// An aggregate that a batch refers to.
enum Found {
    /// Made by the batch itself.
    Made,
    /// In the store before it.
    Stored { type_id: i64, sequence: Sequence },
}

/// The aggregates that a batch makes, sorted.
struct Made(Vec<AggregateId>);

impl Made {
    fn none() -> Self {
        Self(Vec::new())
    }

    fn of(batch: &Batch) -> Self {
        let mut ids: Vec<AggregateId> = batch.creates().iter().map(|made| made.id).collect();
        ids.sort_unstable();
        Self(ids)
    }

    fn has(&self, id: AggregateId) -> bool {
        self.0.binary_search(&id).is_ok()
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

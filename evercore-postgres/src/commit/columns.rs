//! The rows that one statement writes, column by column: those of all batches of a flight, without copies of payloads.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use evercore_core::engine::{Batch, Mark, NameTable, SequenceChange, Snapshot, Witness};
use evercore_core::{AggregateId, Key, Metadata, Position, Receipt, Timestamp};
use tokio_postgres::Row;

use crate::commit::recent::Memory;
use crate::error::{PostgresError, Result, damaged};
use crate::names::sql_id;

/// The rows that one statement writes, and the batches to which they belong.
#[derive(Debug, Default)]
pub(crate) struct NewRows<'a> {
    /// The mark of the events.
    mark: i64,
    /// For a statement that checks its conditions itself; `None` if they were checked under the lock.
    assumed: Option<Assumed>,
    expected: ExpectedColumns,
    /// If this event is still there, the statement need not check the aggregates that this engine knows.
    pub(crate) witness: Option<Witness>,
    /// The ids of all event types of the first expected aggregate's type.
    event_types: Vec<i32>,
    created: CreatedColumns<'a>,
    created_at: HashMap<AggregateId, usize>,
    new_keys: HashMap<AggregateId, &'a Key>,
    events: EventColumns<'a>,
    snapshots: HashMap<AggregateId, &'a Snapshot>,
    commands: CommandColumns<'a>,
    batches: Vec<Placed<'a>>,
}

/// The state of the store that a statement assumes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Assumed {
    /// The log ends here or later.
    pub(crate) log_end: i64,
    /// The mark of the type names.
    pub(crate) names: i64,
}

/// A batch, its index in the flight, and the number of events of the flight before it.
#[derive(Debug)]
struct Placed<'a> {
    index: usize,
    batch: &'a Batch,
    place: usize,
}

#[derive(Debug, Default)]
pub(crate) struct CreatedColumns<'a> {
    pub(crate) ids: Vec<i64>,
    pub(crate) types: Vec<i32>,
    pub(crate) keys: Vec<Option<&'a str>>,
}

/// The aggregates that the statement checks before it writes, with their expected types, sequences and marks.
#[derive(Debug, Default)]
pub(crate) struct ExpectedColumns {
    pub(crate) aggregates: Vec<i64>,
    pub(crate) types: Vec<i32>,
    pub(crate) sequences: Vec<i64>,
    /// The mark of the event that was read, if it is known.
    pub(crate) marks: Vec<Option<i64>>,
}

impl ExpectedColumns {
    fn push(&mut self, aggregate: i64, type_id: i32, sequence: i64, mark: Option<i64>) {
        self.aggregates.push(aggregate);
        self.types.push(type_id);
        self.sequences.push(sequence);
        self.marks.push(mark);
    }

    /// Keeps the rows for which the function returns `true`.
    fn retain(&mut self, keeps: impl Fn(i64, i32, i64, Option<i64>) -> bool) {
        let Self { aggregates, types, sequences, marks } = std::mem::take(self);
        let expected = sequences.into_iter().zip(marks);
        for ((aggregate, type_id), (sequence, mark)) in aggregates.into_iter().zip(types).zip(expected) {
            if keeps(aggregate, type_id, sequence, mark) {
                self.push(aggregate, type_id, sequence, mark);
            }
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct EventColumns<'a> {
    pub(crate) aggregates: Vec<i64>,
    pub(crate) sequences: Vec<i64>,
    pub(crate) types: Vec<i32>,
    pub(crate) times: Vec<i64>,
    pub(crate) payloads: Vec<&'a [u8]>,
    pub(crate) references: Sparse<'a>,
    pub(crate) correlation_ids: Sparse<'a>,
    pub(crate) causation_ids: Sparse<'a>,
    pub(crate) headers: Headers<'a>,
}

#[derive(Debug, Default)]
pub(crate) struct CommandColumns<'a> {
    pub(crate) ids: Vec<&'a str>,
    pub(crate) fingerprints: Vec<Option<i64>>,
    pub(crate) places: Vec<i64>,
    pub(crate) events: Vec<i64>,
    pub(crate) aggregates: Vec<String>,
}

/// A column that often has no value at all, and is then sent as an empty array.
#[derive(Debug, Default)]
pub(crate) struct Sparse<'a>(pub(crate) Vec<Option<&'a str>>);

impl<'a> Sparse<'a> {
    fn set(&mut self, row: usize, value: Option<&'a str>) {
        if value.is_some() {
            self.0.resize(row, None);
            self.0.push(value);
        }
    }

    fn first(&self) -> Option<&'a str> {
        self.0.first().copied().flatten()
    }
}

impl EventColumns<'_> {
    pub(crate) fn has_metadata(&self) -> bool {
        let texts = [&self.references, &self.correlation_ids, &self.causation_ids];
        texts.iter().any(|column| !column.0.is_empty()) || !self.headers.rows.is_empty()
    }
}

/// Headers as JSON. The events of one unit share their metadata, so the text is made once for consecutive events.
#[derive(Debug, Default)]
pub(crate) struct Headers<'a> {
    texts: Vec<String>,
    rows: Vec<Option<usize>>,
    last: Option<&'a Arc<Metadata>>,
}

impl<'a> Headers<'a> {
    fn set(&mut self, row: usize, metadata: &'a Arc<Metadata>) -> Result<()> {
        if metadata.headers().is_empty() {
            return Ok(());
        }
        let is_shared =
            |last: &Arc<Metadata>| Arc::ptr_eq(last, metadata) || last.headers() == metadata.headers();
        if !self.last.is_some_and(is_shared) {
            self.texts.push(serde_json::to_string(metadata.headers()).map_err(damaged)?);
            self.last = Some(metadata);
        }
        self.rows.resize(row, None);
        self.rows.push(Some(self.texts.len() - 1));
        Ok(())
    }

    /// Either with the text in each row, or with the index of the text. The server counts from the first text to find
    /// one, so indexes are used only if they make the message much smaller.
    fn columns(&self) -> HeaderColumns<'_> {
        let texts = || self.rows.iter().map(|row| row.map(|text| self.texts[text].as_str()));
        let once: usize = self.texts.iter().map(String::len).sum();
        if texts().flatten().map(str::len).sum::<usize>() <= 2 * once {
            return HeaderColumns { texts: texts().collect(), ..HeaderColumns::default() };
        }
        let place = |row: &Option<usize>| row.and_then(|text| i32::try_from(text + 1).ok());
        HeaderColumns {
            texts: Vec::new(),
            shared: self.texts.iter().map(String::as_str).collect(),
            indexes: self.rows.iter().map(place).collect(),
        }
    }
}

impl<'a> NewRows<'a> {
    /// For a flight that was checked under the lock.
    pub(crate) fn new() -> Self {
        Self { mark: Mark::random().get(), ..Self::default() }
    }

    /// For a statement that checks itself that these are the names, and that the log ends here or later.
    pub(crate) fn assuming(table: &NameTable, log_end: Position) -> Self {
        let assumed = Assumed { log_end: log_end.get(), names: table.mark().get() };
        Self { assumed: Some(assumed), ..Self::new() }
    }

    /// Makes the statement check that the aggregate exists with this type and at this sequence.
    pub(crate) fn expect(
        &mut self,
        change: &SequenceChange,
        read: Option<Mark>,
        type_id: u32,
        table: &NameTable,
    ) {
        if self.expected.aggregates.is_empty() {
            self.event_types = table.event_type_ids(&change.aggregate_type).map(sql_id).collect();
        }
        let (aggregate, sequence) = (change.aggregate.get(), change.expected.get());
        self.expected.push(aggregate, sql_id(type_id), sequence, read.map(Mark::get));
    }

    /// Makes the statement check for the witness instead of the aggregates that this engine knows. A single aggregate
    /// is checked itself, because that is no slower.
    pub(crate) fn rely_on(&mut self, memory: &Memory) {
        self.witness = memory.witness().filter(|_| self.expected.aggregates.len() > 1);
        if self.witness.is_none() {
            return;
        }
        self.expected.retain(|id, type_id, sequence, mark| {
            let reached = AggregateId::new(id).ok().and_then(|id| memory.reached(id));
            let is_known = reached.is_some_and(|reached| {
                sql_id(reached.type_id) == type_id
                    && reached.sequence.get() == sequence
                    && (sequence == 0 || mark.is_none_or(|mark| mark == reached.mark.get()))
            });
            !is_known
        });
    }

    /// The batches in the order of their receipts.
    pub(crate) fn batches(&self) -> impl Iterator<Item = &'a Batch> {
        self.batches.iter().map(|placed| placed.batch)
    }

    /// Adds a batch after the others, with those of its snapshots that may be stored. After `UnknownName`, for a name
    /// that is not in `table`, these rows must not be written.
    pub(crate) fn add(
        &mut self,
        index: usize,
        batch: &'a Batch,
        table: &NameTable,
        snapshots: Vec<(AggregateId, &'a Snapshot)>,
    ) -> Result<()> {
        let place = self.events.aggregates.len();
        for made in batch.creates() {
            let type_id = table.aggregate_type_id(&made.aggregate_type).ok_or(UNREGISTERED)?;
            self.created_at.insert(made.id, self.created.ids.len());
            self.created.ids.push(made.id.get());
            self.created.types.push(sql_id(type_id));
            self.created.keys.push(made.key.as_ref().map(Key::as_str));
        }
        for change in batch.key_changes() {
            // An aggregate that the same flight creates is created with its last key.
            match self.created_at.get(&change.aggregate) {
                Some(row) => self.created.keys[*row] = Some(change.key.as_str()),
                None => drop(self.new_keys.insert(change.aggregate, &change.key)),
            }
        }
        self.add_events(batch, table)?;
        snapshots.into_iter().for_each(|(id, snapshot)| self.keep(id, snapshot));
        self.add_command(batch, place);
        self.batches.push(Placed { index, batch, place });
        Ok(())
    }

    fn add_events(&mut self, batch: &'a Batch, table: &NameTable) -> Result<()> {
        let columns = &mut self.events;
        for append in batch.appends() {
            let mut sequence = append.expected;
            for event in &append.events {
                let type_id = table.event_type_id(&append.aggregate_type, &event.event_type);
                let row = columns.aggregates.len();
                sequence = sequence.next();
                columns.aggregates.push(append.aggregate.get());
                columns.sequences.push(sequence.get());
                columns.types.push(sql_id(type_id.ok_or(UNREGISTERED)?));
                columns.times.push(event.time.as_micros());
                columns.payloads.push(event.payload.as_bytes());
                columns.references.set(row, event.metadata.reference());
                columns.correlation_ids.set(row, event.metadata.correlation_id());
                columns.causation_ids.set(row, event.metadata.causation_id());
                columns.headers.set(row, &event.metadata)?;
            }
        }
        Ok(())
    }

    /// The statement writes one snapshot per aggregate, chosen by the rule that also holds for stored snapshots.
    fn keep(&mut self, id: AggregateId, snapshot: &'a Snapshot) {
        match self.snapshots.entry(id) {
            Entry::Vacant(place) => drop(place.insert(snapshot)),
            Entry::Occupied(mut place) => {
                if snapshot.replaces(place.get()) {
                    place.insert(snapshot);
                }
            }
        }
    }

    fn add_command(&mut self, batch: &'a Batch, place: usize) {
        let Some(id) = batch.command_id() else { return };
        // The part of the receipt's text that does not depend on the end of the log.
        let text = Receipt::of(batch, Position::ZERO, Timestamp::MIN).to_string();
        let aggregates = text.find(';').map_or("", |start| &text[start..]).to_owned();
        self.commands.ids.push(id.as_str());
        self.commands.fingerprints.push(batch.fingerprint());
        self.commands.places.push(number(place));
        self.commands.events.push(number(batch.events()));
        self.commands.aggregates.push(aggregates);
    }

    /// Whether there is no batch.
    pub(crate) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// All columns as they are sent.
    pub(crate) fn columns(&self) -> Columns<'_> {
        let (rekeyed, new_keys) = self.new_keys.iter().map(|(id, key)| (id.get(), key.as_str())).unzip();
        let mut snapshots = SnapshotColumns::default();
        for (id, snapshot) in &self.snapshots {
            snapshots.aggregates.push(id.get());
            snapshots.sequences.push(snapshot.sequence.get());
            snapshots.versions.push(i64::from(snapshot.version));
            snapshots.states.push(snapshot.state.as_bytes());
        }
        let (events, headers) = (&self.events, self.events.headers.columns());
        Columns {
            count: number(events.aggregates.len()),
            mark: self.mark,
            has_conditions: self.assumed.is_some(),
            has_witness: self.witness.is_some(),
            assumed: self.assumed.unwrap_or_default(),
            witness_position: self.witness.map_or(0, |witness| witness.position.get()),
            witness_mark: self.witness.map_or(0, |witness| witness.mark.get()),
            expected: &self.expected,
            event_types: &self.event_types,
            created: &self.created,
            rekeyed,
            new_keys,
            events,
            first: FirstMetadata {
                reference: events.references.first(),
                correlation_id: events.correlation_ids.first(),
                causation_id: events.causation_ids.first(),
                headers: headers.texts.first().copied().flatten(),
            },
            headers,
            snapshots,
            commands: &self.commands,
        }
    }

    /// The outcome, from the row that the statement returned.
    pub(crate) fn written(&self, row: &Row) -> Result<Written> {
        let before = Position::new(row.try_get(0)?).map_err(damaged)?;
        let recorded_at = Timestamp::from_micros(row.try_get(1)?).map_err(damaged)?;
        let receipt = |Placed { index, batch, place }: &Placed<'_>| {
            (*index, Receipt::of(batch, before.plus(*place), recorded_at).with_mark(Mark::new(self.mark)))
        };
        let receipts = self.batches.iter().map(receipt).collect();
        Ok(Written { receipts })
    }
}

/// The outcome of the statement.
pub(crate) struct Written {
    /// The receipt of each batch, with the index of the batch.
    pub(crate) receipts: Vec<(usize, Receipt)>,
}

#[derive(Debug, Default)]
pub(crate) struct HeaderColumns<'a> {
    pub(crate) texts: Vec<Option<&'a str>>,
    /// The texts to which the indexes refer, counted from 1.
    pub(crate) shared: Vec<&'a str>,
    pub(crate) indexes: Vec<Option<i32>>,
}

#[derive(Debug, Default)]
pub(crate) struct SnapshotColumns<'a> {
    pub(crate) aggregates: Vec<i64>,
    pub(crate) sequences: Vec<i64>,
    pub(crate) versions: Vec<i64>,
    pub(crate) states: Vec<&'a [u8]>,
}

/// The metadata of the first event.
pub(crate) struct FirstMetadata<'a> {
    pub(crate) reference: Option<&'a str>,
    pub(crate) correlation_id: Option<&'a str>,
    pub(crate) causation_id: Option<&'a str>,
    pub(crate) headers: Option<&'a str>,
}

/// [`NewRows`] in the form in which they are sent.
pub(crate) struct Columns<'a> {
    /// The number of events.
    pub(crate) count: i64,
    pub(crate) mark: i64,
    pub(crate) has_conditions: bool,
    pub(crate) has_witness: bool,
    pub(crate) assumed: Assumed,
    pub(crate) witness_position: i64,
    pub(crate) witness_mark: i64,
    pub(crate) expected: &'a ExpectedColumns,
    pub(crate) event_types: &'a Vec<i32>,
    pub(crate) created: &'a CreatedColumns<'a>,
    /// The aggregates that get new keys.
    pub(crate) rekeyed: Vec<i64>,
    pub(crate) new_keys: Vec<&'a str>,
    pub(crate) events: &'a EventColumns<'a>,
    pub(crate) first: FirstMetadata<'a>,
    pub(crate) headers: HeaderColumns<'a>,
    pub(crate) snapshots: SnapshotColumns<'a>,
    pub(crate) commands: &'a CommandColumns<'a>,
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A name that has no id yet.
const UNREGISTERED: PostgresError = PostgresError::UnknownName(0);

//! What one statement writes, column by column: the values of all batches of a flight, gathered without a copy.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use evercore_core::{
    AggregateId, Batch, Key, Mark, Metadata, NameTable, Position, Receipt, SequenceChange, Snapshot,
    Timestamp, Witness,
};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::commit::recent::Book;
use crate::commit::statement::{Form, Look, Rows};
use crate::error::{PostgresError, Result, damaged};
use crate::names::sql_id as stored;

/// What one statement is to write, column by column, and which batches are in it.
#[derive(Debug, Default)]
pub(crate) struct Writing<'a> {
    /// What the events are known by.
    mark: i64,
    /// For a statement that checks its conditions itself; `None` if they were checked under the lock.
    known: Option<Known>,
    expected: ExpectedColumns,
    /// The event that stands for all aggregates that are not among these.
    witness: Option<(i64, i64)>,
    /// The numbers of all event types of the first expected aggregate's type.
    event_types: Vec<i32>,
    made: (Vec<i64>, Vec<i32>, Vec<Option<&'a str>>),
    made_at: HashMap<AggregateId, usize>,
    renamed: HashMap<AggregateId, &'a Key>,
    events: EventColumns<'a>,
    snapshots: HashMap<AggregateId, &'a Snapshot>,
    commands: CommandColumns<'a>,
    batches: Vec<(usize, &'a Batch, usize)>,
}

/// The state of the store that a statement relies on.
#[derive(Debug)]
struct Known {
    /// The log ends here or later.
    log_end: i64,
    /// The mark of the type names.
    names: i64,
}

/// The aggregates that the statement looks at before it writes, each with what it expects of it.
#[derive(Debug, Default)]
struct ExpectedColumns {
    aggregates: Vec<i64>,
    types: Vec<i32>,
    sequences: Vec<i64>,
    /// The mark of the event that was read, where it is known.
    marks: Vec<Option<i64>>,
}

impl ExpectedColumns {
    fn push(&mut self, aggregate: i64, type_number: i32, sequence: i64, mark: Option<i64>) {
        self.aggregates.push(aggregate);
        self.types.push(type_number);
        self.sequences.push(sequence);
        self.marks.push(mark);
    }

    /// Keeps the rows for which the function says so.
    fn retain(&mut self, keeps: impl Fn(i64, i32, i64, Option<i64>) -> bool) {
        let Self { aggregates, types, sequences, marks } = std::mem::take(self);
        let expected = sequences.into_iter().zip(marks);
        for ((aggregate, type_number), (sequence, mark)) in aggregates.into_iter().zip(types).zip(expected) {
            if keeps(aggregate, type_number, sequence, mark) {
                self.push(aggregate, type_number, sequence, mark);
            }
        }
    }
}

#[derive(Debug, Default)]
struct EventColumns<'a> {
    aggregates: Vec<i64>,
    sequences: Vec<i64>,
    types: Vec<i32>,
    times: Vec<i64>,
    payloads: Vec<&'a [u8]>,
    references: Sparse<'a>,
    correlation_ids: Sparse<'a>,
    causation_ids: Sparse<'a>,
    headers: Headers<'a>,
}

#[derive(Debug, Default)]
struct CommandColumns<'a> {
    ids: Vec<&'a str>,
    fingerprints: Vec<Option<i64>>,
    places: Vec<i64>,
    events: Vec<i64>,
    aggregates: Vec<String>,
}

/// A column that often holds nothing at all, and is then sent empty.
#[derive(Debug, Default)]
struct Sparse<'a>(Vec<Option<&'a str>>);

impl<'a> Sparse<'a> {
    fn set(&mut self, row: usize, value: Option<&'a str>) {
        if value.is_some() {
            self.0.resize(row, None);
            self.0.push(value);
        }
    }

    fn first(&self) -> &(dyn ToSql + Sync) {
        first(&self.0)
    }
}

impl EventColumns<'_> {
    fn has_metadata(&self) -> bool {
        let texts = [&self.references, &self.correlation_ids, &self.causation_ids];
        texts.iter().any(|column| !column.0.is_empty()) || !self.headers.rows.is_empty()
    }
}

/// Headers as JSON; events of one unit share their metadata, so the text is made once for all in a row.
#[derive(Debug, Default)]
struct Headers<'a> {
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

    /// In whichever form is smaller by far: with the text in each row, or with its number. A text is found by counting
    /// from the first, so the numbers are for where they are worth it.
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
            places: self.rows.iter().map(place).collect(),
        }
    }
}

impl<'a> Writing<'a> {
    /// Of a flight that has looked under the lock.
    pub(crate) fn new() -> Self {
        Self { mark: Mark::random().get(), ..Self::default() }
    }

    /// Of a flight whose statement checks for itself that these are the names, and that the log ends here or later.
    pub(crate) fn relying_on(table: &NameTable, log_end: Position) -> Self {
        let known = Known { log_end: log_end.get(), names: table.mark().get() };
        Self { known: Some(known), ..Self::new() }
    }

    /// Has the statement look for itself whether the aggregate is there, of this type and at this sequence.
    pub(crate) fn expect(
        &mut self,
        change: &SequenceChange,
        read: Option<Mark>,
        type_number: u32,
        table: &NameTable,
    ) {
        if self.expected.aggregates.is_empty() {
            let numbers = table.event_type_numbers(&change.aggregate_type);
            self.event_types = numbers.map(stored).collect();
        }
        let (aggregate, sequence) = (change.aggregate.get(), change.expected.get());
        self.expected.push(aggregate, stored(type_number), sequence, read.map(Mark::get));
    }

    /// Has the statement look for the witness in place of all that this engine knows by itself. A single aggregate is as
    /// soon looked up as the witness.
    pub(crate) fn rely_on(&mut self, book: &Book) {
        let witness = book.witness().filter(|_| self.expected.aggregates.len() > 1);
        self.witness = witness.map(|witness| (witness.position.get(), witness.mark.get()));
        if self.witness.is_none() {
            return;
        }
        self.expected.retain(|id, type_number, sequence, mark| {
            let reached = AggregateId::new(id).ok().and_then(|id| book.reached(id));
            let is_known = reached.is_some_and(|reached| {
                stored(reached.type_number) == type_number
                    && reached.sequence.get() == sequence
                    && (sequence == 0 || mark.is_none_or(|mark| mark == reached.mark.get()))
            });
            !is_known
        });
    }

    /// The event for which the statement looks.
    pub(crate) fn witness(&self) -> Option<Witness> {
        let (position, mark) = self.witness?;
        Some(Witness::new(Position::new(position).ok()?, Mark::new(mark)))
    }

    /// The batches that are in it, in the order of their receipts.
    pub(crate) fn batches(&self) -> impl Iterator<Item = &'a Batch> {
        self.batches.iter().map(|(_, batch, _)| *batch)
    }

    /// Adds a batch, behind those that are in it, with those of its snapshots that may be stored.
    /// `UnknownName` if a name is not in `table`; what was added by then is of no use.
    pub(crate) fn add(
        &mut self,
        index: usize,
        batch: &'a Batch,
        table: &NameTable,
        snapshots: Vec<(AggregateId, &'a Snapshot)>,
    ) -> Result<()> {
        let place = self.events.aggregates.len();
        for made in batch.creates() {
            let number = table.aggregate_type_number(&made.aggregate_type).ok_or(UNREGISTERED)?;
            self.made_at.insert(made.id, self.made.0.len());
            self.made.0.push(made.id.get());
            self.made.1.push(stored(number));
            self.made.2.push(made.key.as_ref().map(Key::as_str));
        }
        for change in batch.key_changes() {
            // Made in the same flight by another unit: it is made with the key that it ends with.
            match self.made_at.get(&change.aggregate) {
                Some(row) => self.made.2[*row] = Some(change.key.as_str()),
                None => drop(self.renamed.insert(change.aggregate, &change.key)),
            }
        }
        self.add_events(batch, table)?;
        snapshots.into_iter().for_each(|(id, snapshot)| self.keep(id, snapshot));
        self.note(batch, place);
        self.batches.push((index, batch, place));
        Ok(())
    }

    fn add_events(&mut self, batch: &'a Batch, table: &NameTable) -> Result<()> {
        let columns = &mut self.events;
        for append in batch.appends() {
            let mut sequence = append.expected;
            for event in &append.events {
                let number = table.event_type_number(&append.aggregate_type, &event.event_type);
                let row = columns.aggregates.len();
                sequence = sequence.next();
                columns.aggregates.push(append.aggregate.get());
                columns.sequences.push(sequence.get());
                columns.types.push(stored(number.ok_or(UNREGISTERED)?));
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

    /// The statement keeps one snapshot per aggregate: among those of one flight the same rule holds as in the store.
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

    fn note(&mut self, batch: &'a Batch, place: usize) {
        let Some(id) = batch.command_id() else { return };
        // Of the receipt's text, what does not depend on where the log ends.
        let text = Receipt::of(batch, Position::ZERO, Timestamp::MIN).to_string();
        let aggregates = text.find(';').map_or("", |start| &text[start..]).to_owned();
        self.commands.ids.push(id.as_str());
        self.commands.fingerprints.push(batch.fingerprint());
        self.commands.places.push(number(place));
        self.commands.events.push(number(batch.events()));
        self.commands.aggregates.push(aggregates);
    }

    /// How many events there are.
    pub(crate) fn events(&self) -> usize {
        self.events.aggregates.len()
    }

    /// Whether no batch is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    pub(crate) fn form(&self) -> Form {
        let look = match self.expected.sequences[..] {
            _ if self.witness.is_some() => Look::Witnessed,
            _ if self.known.is_none() => Look::Nothing,
            [] => Look::Names,
            [0] => Look::OneMade,
            [_] => Look::OneGrown,
            _ => Look::Many,
        };
        let rows = match self.events() {
            0 => Rows::None,
            1 => Rows::One,
            _ if self.events.has_metadata() => Rows::WithMetadata,
            _ => Rows::Plain,
        };
        Form {
            look,
            rows,
            made: !self.made.0.is_empty(),
            renamed: !self.renamed.is_empty(),
            kept: !self.snapshots.is_empty(),
            noted: !self.commands.ids.is_empty(),
        }
    }

    /// Hands the statement's values, in the order of its parts, to `run`.
    pub(crate) fn columns(&self) -> Columns<'_> {
        let (renamed, keys) = self.renamed.iter().map(|(id, key)| (id.get(), key.as_str())).unzip();
        let mut kept = SnapshotColumns::default();
        for (id, snapshot) in &self.snapshots {
            kept.aggregates.push(id.get());
            kept.sequences.push(snapshot.sequence.get());
            kept.versions.push(i64::from(snapshot.version));
            kept.states.push(snapshot.state.as_bytes());
        }
        let headers = self.events.headers.columns();
        Columns { writing: self, events: number(self.events()), renamed: (renamed, keys), kept, headers }
    }

    /// What each batch gets, by its index, from where the statement says that the log ended before it.
    pub(crate) fn receipts(&self, row: &Row) -> Result<Vec<(usize, Receipt)>> {
        let before = Self::log_end_before(row)?;
        let recorded_at = Timestamp::from_micros(row.try_get(1)?).map_err(damaged)?;
        let receipt = |(index, batch, place): &(usize, &Batch, usize)| {
            (*index, Receipt::of(batch, before.plus(*place), recorded_at).with_mark(Mark::new(self.mark)))
        };
        Ok(self.batches.iter().map(receipt).collect())
    }

    /// The end of the log after this was written, from the statement's row.
    pub(crate) fn log_end(&self, row: &Row) -> Result<Position> {
        Ok(Self::log_end_before(row)?.plus(self.events()))
    }

    fn log_end_before(row: &Row) -> Result<Position> {
        Position::new(row.try_get(0)?).map_err(damaged)
    }
}

#[derive(Debug, Default)]
struct HeaderColumns<'a> {
    texts: Vec<Option<&'a str>>,
    /// The texts that the places point to, counted from 1.
    shared: Vec<&'a str>,
    places: Vec<Option<i32>>,
}

#[derive(Debug, Default)]
struct SnapshotColumns<'a> {
    aggregates: Vec<i64>,
    sequences: Vec<i64>,
    versions: Vec<i64>,
    states: Vec<&'a [u8]>,
}

/// A [`Writing`] in the form in which it is sent.
pub(crate) struct Columns<'a> {
    writing: &'a Writing<'a>,
    events: i64,
    renamed: (Vec<i64>, Vec<&'a str>),
    kept: SnapshotColumns<'a>,
    headers: HeaderColumns<'a>,
}

impl Columns<'_> {
    pub(crate) fn values(&self) -> Vec<&(dyn ToSql + Sync)> {
        let Writing { expected, event_types, made, events, commands, .. } = self.writing;
        let form = self.writing.form();
        let mut values: Vec<&(dyn ToSql + Sync)> = Vec::with_capacity(32);
        // Without events the log ends where it did: the statement asks for the mark alone.
        match form.rows {
            Rows::None => values.push(&self.writing.mark),
            _ => values.push(&self.events),
        }
        if let Some(known) = &self.writing.known {
            values.extend([&known.log_end as &(dyn ToSql + Sync), &known.names]);
        }
        if let Some((position, mark)) = &self.writing.witness {
            values.extend([position as &(dyn ToSql + Sync), mark]);
        }
        match form.look {
            Look::Many | Look::Witnessed => {
                values.extend([&expected.aggregates as &(dyn ToSql + Sync), &expected.types]);
                values.extend([&expected.sequences as &(dyn ToSql + Sync), &expected.marks]);
            }
            Look::OneGrown => {
                values.extend([&expected.aggregates[0] as &(dyn ToSql + Sync), &expected.sequences[0]]);
                values.push(&expected.marks[0]);
                values.push(event_types);
            }
            Look::OneMade => {
                values.extend([&expected.aggregates[0] as &(dyn ToSql + Sync), &expected.types[0]]);
            }
            Look::Nothing | Look::Names => {}
        }
        if form.rows != Rows::None {
            values.extend([&self.events as &(dyn ToSql + Sync), &self.writing.mark]);
        }
        if form.made {
            values.extend([&made.0 as &(dyn ToSql + Sync), &made.1, &made.2]);
        }
        if form.renamed {
            values.extend([&self.renamed.0 as &(dyn ToSql + Sync), &self.renamed.1]);
        }
        if form.rows == Rows::WithMetadata {
            values.push(&self.headers.shared);
        }
        if matches!(form.rows, Rows::Plain | Rows::WithMetadata) {
            values.extend([&events.aggregates as &(dyn ToSql + Sync), &events.sequences, &events.types]);
            values.extend([&events.times as &(dyn ToSql + Sync), &events.payloads]);
        }
        if form.rows == Rows::WithMetadata {
            values.extend([&events.references.0 as &(dyn ToSql + Sync), &events.correlation_ids.0]);
            values.extend([&events.causation_ids.0 as &(dyn ToSql + Sync), &self.headers.texts]);
            values.push(&self.headers.places);
        }
        if form.kept {
            let kept = &self.kept;
            values.extend([&kept.aggregates as &(dyn ToSql + Sync), &kept.sequences]);
            values.extend([&kept.versions as &(dyn ToSql + Sync), &kept.states]);
        }
        if form.noted {
            values.extend([&commands.ids as &(dyn ToSql + Sync), &commands.fingerprints, &commands.places]);
            values.extend([&commands.events as &(dyn ToSql + Sync), &commands.aggregates]);
        }
        if form.rows == Rows::One {
            values.extend([
                &events.aggregates[0] as &(dyn ToSql + Sync),
                &events.sequences[0],
                &events.types[0],
            ]);
            values.extend([&events.times[0] as &(dyn ToSql + Sync), &events.payloads[0]]);
            values.extend([events.references.first(), events.correlation_ids.first()]);
            values.extend([events.causation_ids.first(), first(&self.headers.texts)]);
        }
        values
    }
}

/// The value of the first row in a column that may be empty.
fn first<'v>(column: &'v [Option<&str>]) -> &'v (dyn ToSql + Sync) {
    column.first().map_or(&NO_TEXT as &(dyn ToSql + Sync), |value| value)
}

const NO_TEXT: Option<&str> = None;

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A name that has no number yet.
const UNREGISTERED: PostgresError = PostgresError::UnknownName(0);

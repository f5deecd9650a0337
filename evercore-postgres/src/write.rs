//! The one statement that writes: events, new aggregates, keys, snapshots and commands of all batches of a flight.
//!
//! It holds the row of `log_end` from its first step until its transaction is visible, which makes the order of the log;
//! so all that write wait here and nowhere else, and cannot deadlock.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, OnceLock};

use evercore_core::{
    AggregateId, Batch, Growth, Key, Metadata, NameTable, Position, Receipt, Sequence, Snapshot, Timestamp,
};
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use crate::error::{PostgresError, Result, damaged};
use crate::names::stored;
use crate::sql::{Schema, Sql};

/// The look that an append needs: its aggregate is there, of its type, at its sequence. What the statement's snapshot
/// shows is true for ever; what it does not show may have come meanwhile, and calls for a look under the lock. Looked up
/// one by one: a plan that hashes a table that is small today would be kept when it is large.
///
/// A table of its own, of one row or none: so it is looked at once, and not again after each wait for the lock.
const IF_NONE_IS_STALE: &str = "fresh AS MATERIALIZED (SELECT 1 AS ok WHERE NOT EXISTS (
    SELECT FROM unnest(?::bigint[], ?::int[], ?::bigint[]) AS g (id, type_id, expected)
    WHERE (SELECT a.aggregate_type_id FROM @aggregates a WHERE a.id = g.id) IS DISTINCT FROM g.type_id
       OR (g.expected > 0 AND (SELECT e.sequence FROM @events e
                               WHERE e.aggregate_id = g.id AND e.sequence = g.expected) IS NULL))), ";

/// The same look for a single aggregate that has events: an event type belongs to an aggregate type, so the type of its
/// last event tells both.
const IF_GROWN: &str = "fresh AS MATERIALIZED (SELECT 1 AS ok WHERE (
    SELECT e.event_type_id FROM @events e WHERE e.aggregate_id = ?::bigint AND e.sequence = ?::bigint) = ANY (?::int[])), ";

/// The same look for a single aggregate without events.
const IF_MADE: &str = "fresh AS MATERIALIZED (SELECT 1 AS ok WHERE (
    SELECT a.aggregate_type_id FROM @aggregates a WHERE a.id = ?::bigint) = ?::int), ";

/// The table has one row.
const LOG_END: &str = "log_end AS (
    UPDATE @log_end SET position = position + ?::bigint,
        recorded_at = greatest(recorded_at, (date_part('epoch', clock_timestamp()) * 1000000)::bigint)";

const IF_FRESH: &str = " FROM fresh";

const RETURNING: &str = " RETURNING position, recorded_at, position - ?::bigint AS before)";

const MADE: &str = ", made AS (
    INSERT INTO @aggregates (id, aggregate_type_id, natural_key)
    SELECT m.id, m.type_id, m.natural_key
    FROM log_end, unnest(?::bigint[], ?::int[], ?::text[]) AS m (id, type_id, natural_key))";

/// No join, which would be planned to read all aggregates while there are none.
const RENAMED: &str = ", renamed AS (
    UPDATE @aggregates a SET natural_key = k.natural_keys[array_position(k.ids, a.id)]
    FROM log_end, (SELECT ?::bigint[] AS ids, ?::text[] AS natural_keys) AS k WHERE a.id = ANY (k.ids))";

/// Most events have no reference, ids and headers.
const WRITTEN: &str = ", written AS (
    INSERT INTO @events (position, aggregate_id, sequence, event_type_id, event_time, recorded_at, payload)
    SELECT log_end.before + e.place, e.aggregate_id, e.sequence, e.event_type_id, e.event_time, log_end.recorded_at,
           e.payload
    FROM log_end, unnest(?::bigint[], ?::bigint[], ?::int[], ?::bigint[], ?::bytea[]) WITH ORDINALITY
        AS e (aggregate_id, sequence, event_type_id, event_time, payload, place))";

const WRITTEN_WITH_METADATA: &str = ", written AS (
    INSERT INTO @events (position, aggregate_id, sequence, event_type_id, event_time, recorded_at, payload,
                         reference, correlation_id, causation_id, headers)
    SELECT log_end.before + e.place, e.aggregate_id, e.sequence, e.event_type_id, e.event_time, log_end.recorded_at,
           e.payload, e.reference, e.correlation_id, e.causation_id, e.headers
    FROM log_end, unnest(?::bigint[], ?::bigint[], ?::int[], ?::bigint[], ?::bytea[], ?::text[], ?::text[], ?::text[],
                         ?::text[]) WITH ORDINALITY
        AS e (aggregate_id, sequence, event_type_id, event_time, payload, reference, correlation_id, causation_id,
              headers, place))";

/// An aggregate has one snapshot; an older one of the same version does not take the place of a newer.
const KEPT: &str = ", kept AS (
    INSERT INTO @snapshots AS s (aggregate_id, sequence, version, state)
    SELECT k.aggregate_id, k.sequence, k.version, k.state
    FROM log_end, unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::bytea[]) AS k (aggregate_id, sequence, version, state)
    ON CONFLICT (aggregate_id) DO UPDATE
    SET sequence = excluded.sequence, version = excluded.version, state = excluded.state
    WHERE excluded.sequence >= s.sequence OR excluded.version <> s.version)";

/// The receipt is text in the form that core reads; its positions are known only here.
const NOTED: &str = ", noted AS (
    INSERT INTO @commands (command_id, fingerprint, receipt)
    SELECT c.command_id, c.fingerprint,
           concat(CASE c.events WHEN 0 THEN 0 ELSE log_end.before + c.place + 1 END, ' ',
                  CASE c.events WHEN 0 THEN 0 ELSE log_end.before + c.place + c.events END, ' ',
                  log_end.recorded_at, c.aggregates)
    FROM log_end, unnest(?::text[], ?::bigint[], ?::bigint[], ?::bigint[], ?::text[])
        AS c (command_id, fingerprint, place, events, aggregates))";

const RESULT: &str = " SELECT before, recorded_at FROM log_end";

/// A single event is written without the detour over arrays.
const WRITE_ONE: &str = " INSERT INTO @events (position, aggregate_id, sequence, event_type_id, event_time, recorded_at,
        payload, reference, correlation_id, causation_id, headers)
    SELECT log_end.position, ?::bigint, ?::bigint, ?::int, ?::bigint, log_end.recorded_at, ?::bytea, ?::text, ?::text,
           ?::text, ?::text
    FROM log_end RETURNING position - 1, recorded_at";

/// The statement in all its forms; each is made when first used.
#[derive(Debug)]
pub(crate) struct WriteSql {
    schema: Schema,
    forms: [OnceLock<Sql>; FORMS],
}

impl WriteSql {
    pub(crate) fn new(schema: &Schema) -> Self {
        Self { schema: schema.clone(), forms: [const { OnceLock::new() }; FORMS] }
    }

    pub(crate) fn form(&self, form: Form) -> &Sql {
        self.forms[form.number()].get_or_init(|| form.compose(&self.schema))
    }

    /// All forms, to look at their plans.
    #[cfg(test)]
    pub(crate) fn all(&self) -> impl Iterator<Item = &Sql> {
        (0..FORMS).map(|number| self.form(Form::of(number)))
    }
}

/// What the statement looks at before it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Nothing,
    OneGrown,
    OneMade,
    Many,
}

/// Which events the statement writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rows {
    None,
    One,
    Plain,
    WithMetadata,
}

const LOOKS: [Look; 4] = [Look::Nothing, Look::OneGrown, Look::OneMade, Look::Many];
const ROWS: [Rows; 4] = [Rows::None, Rows::One, Rows::Plain, Rows::WithMetadata];
const FORMS: usize = LOOKS.len() * ROWS.len() * 16;

/// Which parts the statement has: a part that has nothing to write is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    look: Look,
    rows: Rows,
    made: bool,
    renamed: bool,
    kept: bool,
    noted: bool,
}

impl Form {
    fn number(self) -> usize {
        let flags = [self.made, self.renamed, self.kept, self.noted];
        let flags = flags.into_iter().fold(0, |number, flag| number << 1 | usize::from(flag));
        (self.look as usize * ROWS.len() + self.rows as usize) * 16 + flags
    }

    #[cfg(test)]
    fn of(number: usize) -> Self {
        let flag = |place: usize| number >> place & 1 == 1;
        Self {
            look: LOOKS[number / 16 / ROWS.len()],
            rows: ROWS[number / 16 % ROWS.len()],
            made: flag(3),
            renamed: flag(2),
            kept: flag(1),
            noted: flag(0),
        }
    }

    fn compose(self, schema: &Schema) -> Sql {
        const N: Type = Type::INT8_ARRAY;
        const I: Type = Type::INT4_ARRAY;
        const T: Type = Type::TEXT_ARRAY;
        const B: Type = Type::BYTEA_ARRAY;
        let (look, rows) = (|look| self.look == look, |rows| self.rows == rows);
        let one = [Type::INT8, Type::INT8, Type::INT4, Type::INT8, Type::BYTEA];
        let one = [&one[..], &[Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT]].concat();
        let parts: [(bool, &str, &[Type]); 15] = [
            (true, "WITH ", &[]),
            (look(Look::Many), IF_NONE_IS_STALE, &[N, I, N]),
            (look(Look::OneGrown), IF_GROWN, &[Type::INT8, Type::INT8, I]),
            (look(Look::OneMade), IF_MADE, &[Type::INT8, Type::INT4]),
            (true, LOG_END, &[Type::INT8]),
            (!look(Look::Nothing), IF_FRESH, &[]),
            (true, RETURNING, &[Type::INT8]),
            (self.made, MADE, &[N, I, T]),
            (self.renamed, RENAMED, &[N, T]),
            (rows(Rows::Plain), WRITTEN, &[N, N, I, N, B]),
            (rows(Rows::WithMetadata), WRITTEN_WITH_METADATA, &[N, N, I, N, B, T, T, T, T]),
            (self.kept, KEPT, &[N, N, N, B]),
            (self.noted, NOTED, &[T, N, N, N, T]),
            (rows(Rows::One), WRITE_ONE, &one),
            (!rows(Rows::One), RESULT, &[]),
        ];
        let (mut text, mut types) = (String::new(), Vec::new());
        for (_, part, its_types) in parts.into_iter().filter(|part| part.0) {
            number_parameters(&mut text, part, types.len());
            types.extend_from_slice(its_types);
        }
        Sql::new(schema, &text, &types)
    }
}

/// Each `?` of a part gets the next number.
fn number_parameters(text: &mut String, part: &str, mut number: usize) {
    for letter in part.chars() {
        text.push(if letter == '?' { '$' } else { letter });
        if letter == '?' {
            number += 1;
            text.push_str(&number.to_string());
        }
    }
}

/// What one statement is to write, column by column, and which batches are in it.
#[derive(Debug, Default)]
pub(crate) struct Writing<'a> {
    growths: (Vec<i64>, Vec<i32>, Vec<i64>),
    /// The numbers of all event types of the first growth's aggregate type.
    event_types: Vec<i32>,
    made: (Vec<i64>, Vec<i32>, Vec<Option<&'a str>>),
    made_at: HashMap<AggregateId, usize>,
    renamed: HashMap<AggregateId, &'a Key>,
    events: EventColumns<'a>,
    snapshots: HashMap<AggregateId, &'a Snapshot>,
    commands: CommandColumns<'a>,
    batches: Vec<(usize, &'a Batch, usize)>,
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
    fingerprints: Vec<i64>,
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
        if !self.last.is_some_and(|last| Arc::ptr_eq(last, metadata)) {
            self.texts.push(serde_json::to_string(metadata.headers()).map_err(damaged)?);
            self.last = Some(metadata);
        }
        self.rows.resize(row, None);
        self.rows.push(Some(self.texts.len() - 1));
        Ok(())
    }

    fn column(&self) -> Vec<Option<&str>> {
        self.rows.iter().map(|row| row.map(|text| self.texts[text].as_str())).collect()
    }
}

impl<'a> Writing<'a> {
    /// Has the statement look for itself whether the aggregate is there, of this type and at this sequence.
    pub(crate) fn expect(&mut self, growth: &Growth, type_number: u32, table: &NameTable) {
        if self.growths.0.is_empty() {
            let numbers = table.event_type_numbers(&growth.aggregate_type);
            self.event_types = numbers.map(stored).collect();
        }
        self.growths.0.push(growth.aggregate.get());
        self.growths.1.push(stored(type_number));
        self.growths.2.push(growth.expected.get());
    }

    /// Adds a batch, behind those that are in it. `limit` gives the sequence that a snapshot must not be ahead of.
    /// `UnknownName` if a name is not in `table`; what was added by then is of no use.
    pub(crate) fn add(
        &mut self,
        index: usize,
        batch: &'a Batch,
        table: &NameTable,
        limit: impl Fn(AggregateId) -> Sequence,
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
        for (id, snapshot) in batch.snapshots() {
            if snapshot.sequence <= limit(*id) {
                self.keep(*id, snapshot);
            }
        }
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
                let known = place.get();
                if snapshot.sequence >= known.sequence || snapshot.version != known.version {
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
        let look = match self.growths.2[..] {
            [] => Look::Nothing,
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
        let headers = self.events.headers.column();
        Columns { writing: self, events: number(self.events()), renamed: (renamed, keys), kept, headers }
    }

    /// What each batch gets, by its index, from where the statement says that the log ended before it.
    pub(crate) fn receipts(&self, row: &Row) -> Result<Vec<(usize, Receipt)>> {
        let before = Position::new(row.try_get(0)?).map_err(damaged)?;
        let recorded_at = Timestamp::from_micros(row.try_get(1)?).map_err(damaged)?;
        let receipt = |(index, batch, place): &(usize, &Batch, usize)| {
            (*index, Receipt::of(batch, before.plus(*place), recorded_at))
        };
        Ok(self.batches.iter().map(receipt).collect())
    }
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
    headers: Vec<Option<&'a str>>,
}

impl Columns<'_> {
    pub(crate) fn values(&self) -> Vec<&(dyn ToSql + Sync)> {
        let Writing { growths, event_types, made, events, commands, .. } = self.writing;
        let form = self.writing.form();
        let mut values: Vec<&(dyn ToSql + Sync)> = Vec::with_capacity(32);
        match form.look {
            Look::Many => values.extend([&growths.0 as &(dyn ToSql + Sync), &growths.1, &growths.2]),
            Look::OneGrown => {
                values.extend([&growths.0[0] as &(dyn ToSql + Sync), &growths.2[0], event_types]);
            }
            Look::OneMade => values.extend([&growths.0[0] as &(dyn ToSql + Sync), &growths.1[0]]),
            Look::Nothing => {}
        }
        values.extend([&self.events as &(dyn ToSql + Sync), &self.events]);
        if form.made {
            values.extend([&made.0 as &(dyn ToSql + Sync), &made.1, &made.2]);
        }
        if form.renamed {
            values.extend([&self.renamed.0 as &(dyn ToSql + Sync), &self.renamed.1]);
        }
        if matches!(form.rows, Rows::Plain | Rows::WithMetadata) {
            values.extend([&events.aggregates as &(dyn ToSql + Sync), &events.sequences, &events.types]);
            values.extend([&events.times as &(dyn ToSql + Sync), &events.payloads]);
        }
        if form.rows == Rows::WithMetadata {
            values.extend([&events.references.0 as &(dyn ToSql + Sync), &events.correlation_ids.0]);
            values.extend([&events.causation_ids.0 as &(dyn ToSql + Sync), &self.headers]);
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
            values.extend([events.causation_ids.first(), first(&self.headers)]);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_has_a_type_for_each_parameter() {
        let sql = WriteSql::new(&Schema::default());
        for form in sql.all() {
            let parameters = form.text().matches('$').count();
            assert_eq!(parameters, form.types().len(), "{}", form.text());
            assert!(form.text().contains(&format!("${parameters}")) && !form.text().contains('?'));
        }
    }

    #[test]
    fn every_form_has_a_number_of_its_own() {
        for number in 0..FORMS {
            assert_eq!(Form::of(number).number(), number);
        }
    }
}

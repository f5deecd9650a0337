//! The one statement that writes: events, new aggregates, keys, snapshots and commands of all batches of a flight.
//!
//! It locks the row of `log_end` first and holds it until the transaction is visible, so commits become visible in the
//! order of the log. All writers wait for this lock and for no other, so they cannot deadlock.
//!
//! [`PARTS`] lists the parts of the statement in their order, each with the types and the values of its parameters. A
//! new column of an event is added there, to [`EventColumns`](super::columns::EventColumns), and to the page that reads
//! it.

use std::sync::OnceLock;

use tokio_postgres::types::{ToSql, Type};

use crate::commit::columns::Columns;
use crate::settings::Schema;
use crate::sql::Sql;

/// The time of the events.
macro_rules! recorded_at {
    () => {
        "greatest(recorded_at, (pg_catalog.date_part('epoch', pg_catalog.clock_timestamp())
            * 1000000::double precision)::bigint)"
    };
}

const LOG_END: &str = concat!(
    "WITH log_end AS (
    UPDATE @log_end SET position = position + ?::bigint, recorded_at = ",
    recorded_at!()
);

/// Without events the end of the log stays, and the row is only locked. A new version of the row with the same position
/// would have to be skipped in the index while any transaction has an older snapshot.
const SAME_END: &str = concat!(
    "WITH log_end AS (
    SELECT position, position AS before, ?::bigint AS mark, ",
    recorded_at!(),
    " AS recorded_at FROM @log_end"
);

/// The table has one row. Each move leaves a dead version of it, which stays while any transaction (a dump, a report, a
/// standby) has an older snapshot. So the row is found from the top of the index on its position, where the live
/// version is. `>=` also holds if another commit has moved the row while this one waited for it.
const AT_THE_TOP: &str = "
    WHERE position >= (SELECT max(l.position) FROM @log_end l WHERE l.position >= 0)";

/// The same row, found from the end of the log that this engine has seen: the versions below it are not visited,
/// and there is no second search. If the log has lost its tail, no row is found, and nothing is written.
const FROM_KNOWN_END: &str = "
    WHERE position >= ?::bigint";

const LOCKED: &str = " FOR UPDATE)";

/// The type ids belong to these names. The mark is in the locked row itself, so the server checks it again after a wait
/// for the lock.
const IF_NAMES: &str = "
    AND names = ?::bigint";

/// The other conditions are subqueries without a reference to the row. The server evaluates each once, before it takes
/// the lock, and not again after a wait for it. A condition that holds in the statement's snapshot holds for ever. If
/// it does not hold there, rows may have been written since, and the batches are checked under the lock.
///
/// If the witness is there, the aggregates that this engine has written are as it remembers them. The `ORDER BY` makes
/// the server use the index of positions: for `=`, it could choose another index that contains the position, and read
/// it from end to end.
const IF_WITNESSED: &str = "
    AND (SELECT w.mark FROM @events w WHERE w.position >= ?::bigint ORDER BY w.position LIMIT 1) = ?::bigint";

/// Each aggregate exists with its type and sequence, and still has the event that was read. They are looked up one by
/// one: a plan that hashes a small table would be kept when the table is large.
const IF_NONE_IS_STALE: &str = "
    AND NOT EXISTS (
    SELECT FROM unnest(?::bigint[], ?::int[], ?::bigint[], ?::bigint[]) AS g (id, type_id, expected, mark)
    WHERE (SELECT a.aggregate_type_id FROM @aggregates a WHERE a.id = g.id) IS DISTINCT FROM g.type_id
       OR (g.expected > 0 AND (SELECT coalesce(g.mark, e.mark) = e.mark FROM @events e
                               WHERE e.aggregate_id = g.id AND e.sequence = g.expected) IS NOT TRUE))";

/// The same for a single aggregate that has events. An event type belongs to one aggregate type, so the type of the
/// last event is enough.
const IF_GROWN: &str = "
    AND (SELECT e.event_type_id FROM @events e
         WHERE e.aggregate_id = ?::bigint AND e.sequence = ?::bigint AND coalesce(?::bigint, e.mark) = e.mark
        ) = ANY (?::int[])";

/// The same for a single aggregate without events.
const IF_MADE: &str = "
    AND (SELECT a.aggregate_type_id FROM @aggregates a WHERE a.id = ?::bigint) = ?::int";

const RETURNING: &str =
    " RETURNING position, recorded_at, position - ?::bigint AS before, ?::bigint AS mark)";

const MADE: &str = ", made AS (
    INSERT INTO @aggregates (id, aggregate_type_id, natural_key)
    SELECT m.id, m.type_id, m.natural_key
    FROM log_end, unnest(?::bigint[], ?::int[], ?::text[]) AS m (id, type_id, natural_key))";

/// Not a join: while the table is empty, a join would be planned to read all aggregates.
const RENAMED: &str = ", renamed AS (
    UPDATE @aggregates a SET natural_key = k.natural_keys[pg_catalog.array_position(k.ids, a.id)]
    FROM log_end, (SELECT ?::bigint[] AS ids, ?::text[] AS natural_keys) AS k WHERE a.id = ANY (k.ids))";

/// Most events have no reference, no ids and no headers.
const WRITTEN: &str = ", written AS (
    INSERT INTO @events (position, aggregate_id, sequence, event_type_id, event_time, recorded_at, payload, mark)
    SELECT log_end.before + e.place, e.aggregate_id, e.sequence, e.event_type_id, e.event_time, log_end.recorded_at,
           e.payload, log_end.mark
    FROM log_end, unnest(?::bigint[], ?::bigint[], ?::int[], ?::bigint[], ?::bytea[]) WITH ORDINALITY
        AS e (aggregate_id, sequence, event_type_id, event_time, payload, place))";

/// Headers that many events share are sent once.
const WRITTEN_WITH_METADATA: &str = ", written AS (
    INSERT INTO @events (position, aggregate_id, sequence, event_type_id, event_time, recorded_at, payload,
                         mark, reference, correlation_id, causation_id, headers)
    SELECT log_end.before + e.place, e.aggregate_id, e.sequence, e.event_type_id, e.event_time, log_end.recorded_at,
           e.payload, log_end.mark, e.reference, e.correlation_id, e.causation_id, coalesce(e.headers, (?::text[])[e.shared])
    FROM log_end, unnest(?::bigint[], ?::bigint[], ?::int[], ?::bigint[], ?::bytea[], ?::text[], ?::text[], ?::text[],
                         ?::text[], ?::int[]) WITH ORDINALITY
        AS e (aggregate_id, sequence, event_type_id, event_time, payload, reference, correlation_id, causation_id,
              headers, shared, place))";

/// An aggregate has one snapshot. A newer one is not replaced by an older one of the same version.
const KEPT: &str = ", kept AS (
    INSERT INTO @snapshots AS s (aggregate_id, sequence, version, state)
    SELECT k.aggregate_id, k.sequence, k.version, k.state
    FROM log_end, unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::bytea[]) AS k (aggregate_id, sequence, version, state)
    ON CONFLICT (aggregate_id) DO UPDATE
    SET sequence = excluded.sequence, version = excluded.version, state = excluded.state
    WHERE excluded.sequence >= s.sequence OR excluded.version <> s.version)";

/// The receipt is stored as text in the form that core parses. Its positions are known only here.
const NOTED: &str = ", noted AS (
    INSERT INTO @commands (command_id, fingerprint, recorded_at, receipt)
    SELECT c.command_id, c.fingerprint, log_end.recorded_at,
           pg_catalog.concat(CASE c.events WHEN 0 THEN 0 ELSE log_end.before + c.place + 1 END, ' ',
                  CASE c.events WHEN 0 THEN 0 ELSE log_end.before + c.place + c.events END, ' ',
                  log_end.recorded_at, ' ', log_end.mark, c.aggregates)
    FROM log_end, unnest(?::text[], ?::bigint[], ?::bigint[], ?::bigint[], ?::text[])
        AS c (command_id, fingerprint, place, events, aggregates))";

const RESULT: &str = " SELECT before, recorded_at FROM log_end";

/// A single event is written without arrays.
const WRITE_ONE: &str = " INSERT INTO @events (position, aggregate_id, sequence, event_type_id, event_time, recorded_at,
        mark, payload, reference, correlation_id, causation_id, headers)
    SELECT log_end.position, ?::bigint, ?::bigint, ?::int, ?::bigint, log_end.recorded_at, log_end.mark, ?::bytea,
           ?::text, ?::text, ?::text, ?::text
    FROM log_end RETURNING position - 1, recorded_at";

/// A part of the statement.
struct Part {
    text: &'static str,
    /// Which forms of the statement have this part.
    is_in: fn(Form) -> bool,
    types: &'static [Type],
    push_values: for<'v> fn(&'v Columns<'v>, &mut Vec<Value<'v>>),
}

/// A value of the statement.
type Value<'v> = &'v (dyn ToSql + Sync);

/// A part, with the type and the value of each parameter.
macro_rules! part {
    ($text:ident, $is_in:expr, $columns:ident: $($kind:ident $value:expr),*) => {
        Part {
            text: $text,
            is_in: $is_in,
            types: &[$(Type::$kind),*],
            push_values: |$columns, values| values.extend::<[Value<'_>; _]>([$(&$value),*]),
        }
    };
    ($text:ident, $is_in:expr) => {
        Part { text: $text, is_in: $is_in, types: &[], push_values: |_, _| {} }
    };
}

#[rustfmt::skip]
static PARTS: [Part; 19] = [
    part!(LOG_END, |form| form.events != Events::None, c: INT8 c.count),
    part!(SAME_END, |form| form.events == Events::None, c: INT8 c.mark),
    part!(AT_THE_TOP, |form| form.checks == Checks::Nothing),
    part!(FROM_KNOWN_END, |form| form.checks != Checks::Nothing, c: INT8 c.assumed.log_end),
    part!(IF_NAMES, |form| form.checks != Checks::Nothing, c: INT8 c.assumed.names),
    part!(IF_WITNESSED, |form| form.checks == Checks::Witness, c: INT8 c.witness_position, INT8 c.witness_mark),
    part!(IF_NONE_IS_STALE, |form| matches!(form.checks, Checks::Many | Checks::Witness), c:
        INT8_ARRAY c.expected.aggregates, INT4_ARRAY c.expected.types,
        INT8_ARRAY c.expected.sequences, INT8_ARRAY c.expected.marks),
    part!(IF_GROWN, |form| form.checks == Checks::OneWithEvents, c:
        INT8 c.expected.aggregates[0], INT8 c.expected.sequences[0], INT8 c.expected.marks[0],
        INT4_ARRAY c.event_types),
    part!(IF_MADE, |form| form.checks == Checks::OneWithoutEvents, c:
        INT8 c.expected.aggregates[0], INT4 c.expected.types[0]),
    part!(RETURNING, |form| form.events != Events::None, c: INT8 c.count, INT8 c.mark),
    part!(LOCKED, |form| form.events == Events::None),
    part!(MADE, |form| form.creates, c:
        INT8_ARRAY c.created.ids, INT4_ARRAY c.created.types, TEXT_ARRAY c.created.keys),
    part!(RENAMED, |form| form.changes_keys, c: INT8_ARRAY c.rekeyed, TEXT_ARRAY c.new_keys),
    part!(WRITTEN, |form| form.events == Events::Plain, c:
        INT8_ARRAY c.events.aggregates, INT8_ARRAY c.events.sequences, INT4_ARRAY c.events.types,
        INT8_ARRAY c.events.times, BYTEA_ARRAY c.events.payloads),
    part!(WRITTEN_WITH_METADATA, |form| form.events == Events::WithMetadata, c:
        TEXT_ARRAY c.headers.shared,
        INT8_ARRAY c.events.aggregates, INT8_ARRAY c.events.sequences, INT4_ARRAY c.events.types,
        INT8_ARRAY c.events.times, BYTEA_ARRAY c.events.payloads,
        TEXT_ARRAY c.events.references.0, TEXT_ARRAY c.events.correlation_ids.0,
        TEXT_ARRAY c.events.causation_ids.0, TEXT_ARRAY c.headers.texts, INT4_ARRAY c.headers.indexes),
    part!(KEPT, |form| form.has_snapshots, c:
        INT8_ARRAY c.snapshots.aggregates, INT8_ARRAY c.snapshots.sequences,
        INT8_ARRAY c.snapshots.versions, BYTEA_ARRAY c.snapshots.states),
    part!(NOTED, |form| form.has_commands, c:
        TEXT_ARRAY c.commands.ids, INT8_ARRAY c.commands.fingerprints, INT8_ARRAY c.commands.places,
        INT8_ARRAY c.commands.events, TEXT_ARRAY c.commands.aggregates),
    part!(WRITE_ONE, |form| form.events == Events::One, c:
        INT8 c.events.aggregates[0], INT8 c.events.sequences[0], INT4 c.events.types[0],
        INT8 c.events.times[0], BYTEA c.events.payloads[0],
        TEXT c.first.reference, TEXT c.first.correlation_id, TEXT c.first.causation_id, TEXT c.first.headers),
    part!(RESULT, |form| form.events != Events::One),
];

/// The statement in all its forms. Each form is made on first use.
#[derive(Debug)]
pub(crate) struct WriteSql {
    schema: Schema,
    forms: [OnceLock<Sql>; FORMS],
}

impl WriteSql {
    pub(crate) fn new(schema: &Schema) -> Self {
        Self { schema: schema.clone(), forms: [const { OnceLock::new() }; FORMS] }
    }

    /// The statement that writes these columns, and its values.
    pub(crate) fn of<'v>(&self, columns: &'v Columns<'v>) -> (&Sql, Vec<Value<'v>>) {
        let form = Form::of(columns);
        let mut values = Vec::with_capacity(32);
        form.parts().for_each(|part| (part.push_values)(columns, &mut values));
        (self.form(form), values)
    }

    fn form(&self, form: Form) -> &Sql {
        self.forms[form.number()].get_or_init(|| form.compose(&self.schema))
    }

    /// All forms, to check their plans.
    #[cfg(test)]
    pub(crate) fn all(&self) -> impl Iterator<Item = &Sql> {
        (0..FORMS).map(|number| self.form(Form::numbered(number)))
    }
}

/// The checks that the statement makes before it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checks {
    /// Everything was checked under the lock.
    Nothing,
    /// Only the names. All that follow check them too.
    Names,
    OneWithEvents,
    OneWithoutEvents,
    Many,
    /// The witness, and the aggregates that it does not cover.
    Witness,
}

/// Which events the statement writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Events {
    None,
    One,
    Plain,
    WithMetadata,
}

const CHECKS: [Checks; 6] = [
    Checks::Nothing,
    Checks::Names,
    Checks::OneWithEvents,
    Checks::OneWithoutEvents,
    Checks::Many,
    Checks::Witness,
];
const EVENTS: [Events; 4] = [Events::None, Events::One, Events::Plain, Events::WithMetadata];
const FORMS: usize = CHECKS.len() * EVENTS.len() * 16;

/// The form of a statement: it has only the parts that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Form {
    checks: Checks,
    events: Events,
    creates: bool,
    changes_keys: bool,
    has_snapshots: bool,
    has_commands: bool,
}

impl Form {
    fn of(columns: &Columns<'_>) -> Self {
        let checks = match columns.expected.sequences[..] {
            _ if !columns.has_conditions => Checks::Nothing,
            _ if columns.has_witness => Checks::Witness,
            [] => Checks::Names,
            [0] => Checks::OneWithoutEvents,
            [_] => Checks::OneWithEvents,
            _ => Checks::Many,
        };
        let events = match columns.count {
            0 => Events::None,
            1 => Events::One,
            _ if columns.events.has_metadata() => Events::WithMetadata,
            _ => Events::Plain,
        };
        Self {
            checks,
            events,
            creates: !columns.created.ids.is_empty(),
            changes_keys: !columns.rekeyed.is_empty(),
            has_snapshots: !columns.snapshots.aggregates.is_empty(),
            has_commands: !columns.commands.ids.is_empty(),
        }
    }

    fn number(self) -> usize {
        let flags = [self.creates, self.changes_keys, self.has_snapshots, self.has_commands];
        let flags = flags.into_iter().fold(0, |number, flag| number << 1 | usize::from(flag));
        (self.checks as usize * EVENTS.len() + self.events as usize) * 16 + flags
    }

    #[cfg(test)]
    fn numbered(number: usize) -> Self {
        let flag = |place: usize| number >> place & 1 == 1;
        Self {
            checks: CHECKS[number / 16 / EVENTS.len()],
            events: EVENTS[number / 16 % EVENTS.len()],
            creates: flag(3),
            changes_keys: flag(2),
            has_snapshots: flag(1),
            has_commands: flag(0),
        }
    }

    fn parts(self) -> impl Iterator<Item = &'static Part> {
        PARTS.iter().filter(move |part| (part.is_in)(self))
    }

    fn compose(self, schema: &Schema) -> Sql {
        let (mut text, mut types) = (String::new(), Vec::new());
        for part in self.parts() {
            number_parameters(&mut text, part.text, types.len());
            types.extend_from_slice(part.types);
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
            assert_eq!(Form::numbered(number).number(), number);
        }
    }
}

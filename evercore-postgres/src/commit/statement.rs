//! The one statement that writes: events, new aggregates, keys, snapshots and commands of all batches of a flight.
//!
//! It holds the row of `log_end` from its first step until its transaction is visible, which makes the order of the log;
//! so all that write wait here and nowhere else, and cannot deadlock.

use std::sync::OnceLock;

use tokio_postgres::types::Type;

use crate::settings::Schema;
use crate::sql::Sql;

/// The time that the next event gets.
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

/// Without events the log ends where it did, and the row is only locked. A new version with the same position would have to
/// be stepped over in the index as long as somebody holds an older snapshot.
const SAME_END: &str = concat!(
    "WITH log_end AS (
    SELECT position, position AS before, ?::bigint AS mark, ",
    recorded_at!(),
    " AS recorded_at FROM @log_end"
);

/// The table has one row. Each move leaves a dead version of it, which stays as long as somebody holds an older snapshot
/// (a dump, a report, a standby). So the row is found by the index on its position, from the top, where the live version
/// is. `>=` also holds if another commit has moved the row while this one waited for it.
const AT_THE_TOP: &str = "
    WHERE position >= (SELECT max(l.position) FROM @log_end l WHERE l.position >= 0)";

/// The same row, found from the end of the log that this engine has last seen: the versions below it are not visited, and
/// there is no second search. If the log has lost its tail, no row is found, and nothing is written.
const FROM_KNOWN_END: &str = "
    WHERE position >= ?::bigint";

const LOCKED: &str = " FOR UPDATE)";

/// The names are those whose numbers are written. The row itself tells, so this holds when the lock is given.
const IF_NAMES: &str = "
    AND names = ?::bigint";

/// The other conditions are subqueries without a reference to the row. The server answers each once, before it takes the
/// lock, and not again after a wait for it. What the statement's snapshot shows is true for ever. What it does not show may
/// have been written since, and calls for a look under the lock.
///
/// The engine knows some of the aggregates from its own writing, for which the witness stands. Asked for by order,
/// although there is no hole: an index that only has the position too would be read from end to end.
const IF_WITNESSED: &str = "
    AND (SELECT w.mark FROM @events w WHERE w.position >= ?::bigint ORDER BY w.position LIMIT 1) = ?::bigint";

/// An append's aggregate is there, of its type, at its sequence, by the event that was read. Looked up one by one: a plan
/// that hashes a table that is small today would be kept when it is large.
const IF_NONE_IS_STALE: &str = "
    AND NOT EXISTS (
    SELECT FROM unnest(?::bigint[], ?::int[], ?::bigint[], ?::bigint[]) AS g (id, type_id, expected, mark)
    WHERE (SELECT a.aggregate_type_id FROM @aggregates a WHERE a.id = g.id) IS DISTINCT FROM g.type_id
       OR (g.expected > 0 AND (SELECT coalesce(g.mark, e.mark) = e.mark FROM @events e
                               WHERE e.aggregate_id = g.id AND e.sequence = g.expected) IS NOT TRUE))";

/// The same look for a single aggregate that has events: an event type belongs to an aggregate type, so the type of its
/// last event tells both.
const IF_GROWN: &str = "
    AND (SELECT e.event_type_id FROM @events e
         WHERE e.aggregate_id = ?::bigint AND e.sequence = ?::bigint AND coalesce(?::bigint, e.mark) = e.mark
        ) = ANY (?::int[])";

/// The same look for a single aggregate without events.
const IF_MADE: &str = "
    AND (SELECT a.aggregate_type_id FROM @aggregates a WHERE a.id = ?::bigint) = ?::int";

const RETURNING: &str =
    " RETURNING position, recorded_at, position - ?::bigint AS before, ?::bigint AS mark)";

const MADE: &str = ", made AS (
    INSERT INTO @aggregates (id, aggregate_type_id, natural_key)
    SELECT m.id, m.type_id, m.natural_key
    FROM log_end, unnest(?::bigint[], ?::int[], ?::text[]) AS m (id, type_id, natural_key))";

/// No join, which would be planned to read all aggregates while there are none.
const RENAMED: &str = ", renamed AS (
    UPDATE @aggregates a SET natural_key = k.natural_keys[pg_catalog.array_position(k.ids, a.id)]
    FROM log_end, (SELECT ?::bigint[] AS ids, ?::text[] AS natural_keys) AS k WHERE a.id = ANY (k.ids))";

/// Most events have no reference, ids and headers.
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
    INSERT INTO @commands (command_id, fingerprint, recorded_at, receipt)
    SELECT c.command_id, c.fingerprint, log_end.recorded_at,
           pg_catalog.concat(CASE c.events WHEN 0 THEN 0 ELSE log_end.before + c.place + 1 END, ' ',
                  CASE c.events WHEN 0 THEN 0 ELSE log_end.before + c.place + c.events END, ' ',
                  log_end.recorded_at, ' ', log_end.mark, c.aggregates)
    FROM log_end, unnest(?::text[], ?::bigint[], ?::bigint[], ?::bigint[], ?::text[])
        AS c (command_id, fingerprint, place, events, aggregates))";

const RESULT: &str = " SELECT before, recorded_at FROM log_end";

/// A single event is written without the detour over arrays.
const WRITE_ONE: &str = " INSERT INTO @events (position, aggregate_id, sequence, event_type_id, event_time, recorded_at,
        mark, payload, reference, correlation_id, causation_id, headers)
    SELECT log_end.position, ?::bigint, ?::bigint, ?::int, ?::bigint, log_end.recorded_at, log_end.mark, ?::bytea,
           ?::text, ?::text, ?::text, ?::text
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
pub(crate) enum Look {
    /// The look was under the lock.
    Nothing,
    /// The names alone, as for all that follow.
    Names,
    OneGrown,
    OneMade,
    Many,
    /// The witness, and what it does not stand for.
    Witnessed,
}

/// Which events the statement writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    None,
    One,
    Plain,
    WithMetadata,
}

const LOOKS: [Look; 6] =
    [Look::Nothing, Look::Names, Look::OneGrown, Look::OneMade, Look::Many, Look::Witnessed];
const ROWS: [Rows; 4] = [Rows::None, Rows::One, Rows::Plain, Rows::WithMetadata];
const FORMS: usize = LOOKS.len() * ROWS.len() * 16;

/// Which parts the statement has: a part that has nothing to write is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    pub(crate) look: Look,
    pub(crate) rows: Rows,
    pub(crate) made: bool,
    pub(crate) renamed: bool,
    pub(crate) kept: bool,
    pub(crate) noted: bool,
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
        let has_look = !look(Look::Nothing);
        let parts: [(bool, &str, &[Type]); 19] = [
            (!rows(Rows::None), LOG_END, &[Type::INT8]),
            (rows(Rows::None), SAME_END, &[Type::INT8]),
            (!has_look, AT_THE_TOP, &[]),
            (has_look, FROM_KNOWN_END, &[Type::INT8]),
            (has_look, IF_NAMES, &[Type::INT8]),
            (look(Look::Witnessed), IF_WITNESSED, &[Type::INT8, Type::INT8]),
            (look(Look::Many) || look(Look::Witnessed), IF_NONE_IS_STALE, &[N, I, N, N]),
            (look(Look::OneGrown), IF_GROWN, &[Type::INT8, Type::INT8, Type::INT8, I]),
            (look(Look::OneMade), IF_MADE, &[Type::INT8, Type::INT4]),
            (!rows(Rows::None), RETURNING, &[Type::INT8, Type::INT8]),
            (rows(Rows::None), LOCKED, &[]),
            (self.made, MADE, &[N, I, T]),
            (self.renamed, RENAMED, &[N, T]),
            (rows(Rows::Plain), WRITTEN, &[N, N, I, N, B]),
            (rows(Rows::WithMetadata), WRITTEN_WITH_METADATA, &[T, N, N, I, N, B, T, T, T, T, I]),
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

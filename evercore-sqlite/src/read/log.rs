//! Reads the log of the whole store.

use std::ops::RangeInclusive;

use evercore_core::{
    AggregateId, Direction, Events, LogPage, LogQuery, PageLimit, Position, Timestamp, limits,
};
use rusqlite::{Connection, params_from_iter};

use crate::error::{Result, damaged};
use crate::log_end::LogEnd;
use crate::names::Names;
use crate::read::rows::{Page, select_events};

const ALL_FORWARD: &str = select_events!("WHERE position BETWEEN ?1 AND ?2 ORDER BY position");
const ALL_BACKWARD: &str = select_events!("WHERE position BETWEEN ?1 AND ?2 ORDER BY position DESC");

/// The sequences of an aggregate grow with its positions, so its index serves for both orders.
macro_rules! of_aggregate {
    ($order:literal) => {
        select_events!(
            "WHERE aggregate_id = ?3 AND sequence BETWEEN ?1 AND ?2 AND (?4 IS NULL OR reference = ?4) ",
            "AND (?5 IS NULL OR correlation_id = ?5) ORDER BY sequence",
            $order
        )
    };
}
const AGGREGATE_FORWARD: &str = of_aggregate!("");
const AGGREGATE_BACKWARD: &str = of_aggregate!(" DESC");

/// The events with a reference, and those with a correlation id, are a range of an index that ends with the position.
macro_rules! of_reference {
    ($order:literal) => {
        select_events!(
            "INDEXED BY events_reference WHERE reference = ?3 AND position BETWEEN ?1 AND ?2 ",
            "AND (?4 IS NULL OR correlation_id = ?4) ORDER BY position",
            $order
        )
    };
}
macro_rules! of_correlation {
    ($order:literal) => {
        select_events!(
            "INDEXED BY events_correlation_id WHERE correlation_id = ?3 AND position BETWEEN ?1 AND ?2 ",
            "ORDER BY position",
            $order
        )
    };
}
const REFERENCE_FORWARD: &str = of_reference!("");
const REFERENCE_BACKWARD: &str = of_reference!(" DESC");
const CORRELATION_FORWARD: &str = of_correlation!("");
const CORRELATION_BACKWARD: &str = of_correlation!(" DESC");

/// The events of one type are a range of an index that ends with the position.
macro_rules! of_type {
    () => {
        select_events!("INDEXED BY events_event_type WHERE event_type_id = ? AND position BETWEEN ? AND ?")
    };
}

const LAST_SEQUENCE: &str = "SELECT max(sequence) FROM events WHERE aggregate_id = ?1";
const POSITION_OF: &str = "SELECT position FROM events WHERE aggregate_id = ?1 AND sequence = ?2";
const RECORDED_AT: &str = "SELECT recorded_at FROM events WHERE position = ?1";

/// Reads a page of the log up to the head, which is read first. Events that are committed meanwhile come on the next
/// page.
pub(crate) fn read(connection: &Connection, names: &Names, query: &LogQuery) -> Result<LogPage> {
    let head = LogEnd::read(connection)?.position;
    let passing = match query.filter.is_by_type() {
        true => names.complete(connection)?.passing(&query.filter),
        false => None,
    };
    let query =
        &if query.is_by_index(passing.as_ref().map(Vec::len)) { query.clone() } else { query.bounded(head) };
    let page = matching(connection, names, query, (query.range(head)?, passing.as_deref()))?;
    let is_full = page.is_full();
    Ok(LogPage::new(query, page.finish(), is_full, head))
}

fn matching<'a>(
    connection: &'a Connection,
    names: &'a Names,
    query: &LogQuery,
    (range, passing): (RangeInclusive<i64>, Option<&[u32]>),
) -> Result<Page<'a>> {
    let mut page = Page::new(connection, names, query.limit);
    if page.is_full() || range.is_empty() {
        return Ok(page);
    }
    let (first, last) = (*range.start(), *range.end());
    let filter = &query.filter;
    let (reference, correlation) = (filter.reference(), filter.correlation_id());
    match (filter.aggregate(), passing) {
        (_, Some([])) => {}
        (Some(aggregate), passing) => {
            let sequences = sequences(connection, aggregate, range)?;
            let sql = either(query, AGGREGATE_FORWARD, AGGREGATE_BACKWARD);
            let mut statement = connection.prepare_cached(sql)?;
            let values = (sequences.start(), sequences.end(), aggregate.get(), reference, correlation);
            page.fill(statement.query(values)?, passing)?;
        }
        (None, passing) if reference.is_some() => {
            let sql = either(query, REFERENCE_FORWARD, REFERENCE_BACKWARD);
            let mut statement = connection.prepare_cached(sql)?;
            page.fill(statement.query((first, last, reference, correlation))?, passing)?;
        }
        (None, passing) if correlation.is_some() => {
            let sql = either(query, CORRELATION_FORWARD, CORRELATION_BACKWARD);
            let mut statement = connection.prepare_cached(sql)?;
            page.fill(statement.query((first, last, correlation))?, passing)?;
        }
        (None, Some(ids)) if ids.len() <= limits::INDEXED_TYPES => {
            let mut statement = connection.prepare_cached(&merged(ids.len(), query.direction))?;
            let values = ids.iter().flat_map(|id| [i64::from(*id), first, last]);
            page.fill(statement.query(params_from_iter(values))?, None)?;
        }
        (None, passing) => {
            let mut statement = connection.prepare_cached(either(query, ALL_FORWARD, ALL_BACKWARD))?;
            page.fill(statement.query((first, last))?, passing)?;
        }
    }
    Ok(page)
}

/// Reads events after the first position up to the second, as many as the limit allows.
pub(crate) fn between(
    connection: &Connection,
    names: &Names,
    after: Position,
    to: Position,
    limit: PageLimit,
) -> Result<Events> {
    let mut page = Page::new(connection, names, limit);
    page.fill(connection.prepare_cached(ALL_FORWARD)?.query((after.next().get(), to.get()))?, None)?;
    Ok(page.finish())
}

fn either<'a>(query: &LogQuery, forward: &'a str, backward: &'a str) -> &'a str {
    match query.direction {
        Direction::Forward => forward,
        Direction::Backward => backward,
    }
}

/// SQLite merges the parts while it reads them, because each index returns them in this order.
fn merged(types: usize, direction: Direction) -> String {
    let order = match direction {
        Direction::Forward => " ORDER BY position",
        Direction::Backward => " ORDER BY position DESC",
    };
    vec![of_type!(); types].join(" UNION ALL ") + order
}

/// The sequences of the aggregate's events at these positions.
fn sequences(
    connection: &Connection,
    aggregate: AggregateId,
    positions: RangeInclusive<i64>,
) -> Result<RangeInclusive<i64>> {
    let mut last_sequence = connection.prepare_cached(LAST_SEQUENCE)?;
    let count: Option<i64> = last_sequence.query_row([aggregate.get()], |row| row.get(0))?;
    let mut position_of = connection.prepare_cached(POSITION_OF)?;
    let mut up_to = |position: i64| {
        partition_point(count.unwrap_or(0), |sequence| {
            let found: i64 = position_of.query_row((aggregate.get(), sequence), |row| row.get(0))?;
            Ok(found <= position)
        })
    };
    Ok(up_to(positions.start() - 1)? + 1..=up_to(*positions.end())?)
}

/// The last position that was recorded at this time or before. `recorded_at` never decreases along the log.
pub(crate) fn position_at(connection: &Connection, time: Timestamp) -> Result<Position> {
    let head = LogEnd::read(connection)?.position;
    let mut recorded_at = connection.prepare_cached(RECORDED_AT)?;
    let last = partition_point(head.get(), |position| {
        Ok(recorded_at.query_row([position], |row| row.get::<_, i64>(0))? <= time.as_micros())
    })?;
    Position::new(last).map_err(damaged)
}

/// How many of the numbers 1 to `last` come before the first that is not `within`. Uses binary search.
fn partition_point(last: i64, mut within: impl FnMut(i64) -> Result<bool>) -> Result<i64> {
    let (mut below, mut above) = (0, last);
    while below < above {
        let middle = above - (above - below) / 2;
        if within(middle)? { below = middle } else { above = middle - 1 }
    }
    Ok(below)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The steps of SQLite's query plan.
    fn plan(sql: &str) -> Vec<String> {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(include_str!("../../migrations/V1__event_store.sql")).unwrap();
        let mut statement = connection.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        let count = statement.parameter_count();
        let rows = statement.query_map(params_from_iter(vec![1; count]), |row| row.get(3)).unwrap();
        rows.map(Result::unwrap).collect()
    }

    #[test]
    fn no_query_sorts_or_reads_more_of_the_log_than_it_must() {
        for direction in [Direction::Forward, Direction::Backward] {
            for types in [1, 2, limits::INDEXED_TYPES] {
                let plan = plan(&merged(types, direction));
                let searches = plan.iter().filter(|step| {
                    *step == "SEARCH events USING INDEX events_event_type (event_type_id=? AND rowid>? AND rowid<?)"
                });
                assert_eq!(searches.count(), types, "{plan:#?}");
                assert!(!plan.iter().any(|step| step.contains("B-TREE")), "{plan:#?}");
            }
        }
        for sql in [ALL_FORWARD, ALL_BACKWARD] {
            assert_eq!(plan(sql), ["SEARCH events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"]);
        }
        for sql in [AGGREGATE_FORWARD, AGGREGATE_BACKWARD] {
            let search = "SEARCH events USING INDEX events_aggregate_sequence \
                          (aggregate_id=? AND sequence>? AND sequence<?)";
            assert_eq!(plan(sql), [search]);
        }
        for (index, column, both) in [
            ("events_reference", "reference", [REFERENCE_FORWARD, REFERENCE_BACKWARD]),
            ("events_correlation_id", "correlation_id", [CORRELATION_FORWARD, CORRELATION_BACKWARD]),
        ] {
            for sql in both {
                let search =
                    format!("SEARCH events USING INDEX {index} ({column}=? AND rowid>? AND rowid<?)");
                assert_eq!(plan(sql), [search]);
            }
        }
        assert_eq!(
            plan(LAST_SEQUENCE),
            ["SEARCH events USING COVERING INDEX events_aggregate_sequence (aggregate_id=?)"]
        );
    }

    #[test]
    fn halving_finds_the_border_wherever_it_is() {
        for last in 0..20 {
            for border in 0..=last {
                assert_eq!(partition_point(last, |number| Ok(number <= border)).unwrap(), border);
            }
        }
    }
}

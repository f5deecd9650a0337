//! Loading one aggregate.

use evercore_core::engine::{History, LoadRequest, Mark, Payload, Snapshot, Target};
use evercore_core::{AggregateId, AggregateQuery, Direction, Events, Key, Sequence};
use rusqlite::{Connection, Row};

use crate::error::{Result, damaged};
use crate::names::Names;
use crate::read::rows::{Page, select_events};

/// Selects an aggregate with its snapshot in one statement, so that the result is consistent.
macro_rules! select_aggregate {
    ($which:literal) => {
        concat!(
            "SELECT a.id, a.aggregate_type_id, a.natural_key, ",
            "(SELECT max(sequence) FROM events WHERE aggregate_id = a.id), s.sequence, s.version, s.state ",
            "FROM aggregates a ",
            "LEFT JOIN snapshots s ON s.aggregate_id = a.id AND s.version = ?1 AND s.sequence <= ?2 ",
            "WHERE ",
            $which
        )
    };
}

const BY_ID: &str = select_aggregate!("a.id = ?3");
const BY_KEY: &str = select_aggregate!("a.aggregate_type_id = ?3 AND a.natural_key = ?4");

const FORWARD: &str =
    select_events!("WHERE aggregate_id = ?1 AND sequence > ?2 AND sequence <= ?3 ORDER BY sequence");
const BACKWARD: &str =
    select_events!("WHERE aggregate_id = ?1 AND sequence < ?2 AND sequence >= ?3 ORDER BY sequence DESC");

/// The first statement stays open until the events are read. So both see the same state of the store, and SQLite takes
/// its locks once.
pub(crate) fn load(connection: &Connection, names: &Names, request: &LoadRequest) -> Result<Option<History>> {
    let (version, up_to) = (request.snapshot, request.up_to.get());
    let (mut by_id, mut by_key);
    let mut rows = match &request.target {
        Target::Id(id) => {
            by_id = connection.prepare_cached(BY_ID)?;
            by_id.query((version, up_to, id.get()))?
        }
        Target::Key(aggregate_type, key) => {
            let Some(type_id) = names.aggregate_type_id(connection, aggregate_type)? else { return Ok(None) };
            by_key = connection.prepare_cached(BY_KEY)?;
            by_key.query((version, up_to, type_id, key.as_str()))?
        }
    };
    match rows.next()? {
        Some(row) => history(connection, names, request, AggregateRow::of(row)?).map(Some),
        None => Ok(None),
    }
}

fn history(
    connection: &Connection,
    names: &Names,
    request: &LoadRequest,
    row: AggregateRow,
) -> Result<History> {
    let AggregateRow { id, type_id, key, sequence, snapshot } = row;
    let snapshot = snapshot.filter(|snapshot| snapshot.sequence <= sequence);
    let from = snapshot.as_ref().map_or(Sequence::ZERO, |snapshot| snapshot.sequence);
    let (to, direction, limit) = (sequence.min(request.up_to), Direction::Forward, request.limit);
    let events = if from < to {
        read(connection, names, &AggregateQuery { aggregate: id, direction, from, to, limit })?
    } else {
        Events::default()
    };
    let aggregate_type = names.aggregate_type(connection, type_id)?;
    let mark = (sequence > Sequence::ZERO).then_some(Mark::ALWAYS);
    Ok(History { id, aggregate_type, key, sequence, mark, snapshot, events })
}

/// Reads a page of one aggregate's events.
pub(crate) fn read(connection: &Connection, names: &Names, query: &AggregateQuery) -> Result<Events> {
    let sql = match query.direction {
        Direction::Forward => FORWARD,
        Direction::Backward => BACKWARD,
    };
    let mut statement = connection.prepare_cached(sql)?;
    let mut page = Page::new(connection, names, query.limit);
    page.fill(statement.query((query.aggregate.get(), query.from.get(), query.to.get()))?, None)?;
    Ok(page.finish())
}

/// An aggregate without its events.
struct AggregateRow {
    id: AggregateId,
    type_id: u32,
    key: Option<Key>,
    sequence: Sequence,
    snapshot: Option<Snapshot>,
}

impl AggregateRow {
    fn of(row: &Row<'_>) -> Result<Self> {
        let key = row.get_ref(2)?.as_str_or_null().map_err(damaged)?;
        Ok(Self {
            id: AggregateId::new(row.get(0)?).map_err(damaged)?,
            type_id: row.get(1)?,
            key: key.map(Key::new).transpose().map_err(damaged)?,
            sequence: Sequence::new(row.get::<_, Option<i64>>(3)?.unwrap_or(0)).map_err(damaged)?,
            snapshot: snapshot(row)?,
        })
    }
}

fn snapshot(row: &Row<'_>) -> Result<Option<Snapshot>> {
    let Some(sequence) = row.get::<_, Option<i64>>(4)? else { return Ok(None) };
    let state = row.get_ref(6)?.as_blob().map_err(damaged)?;
    Ok(Some(Snapshot {
        sequence: Sequence::new(sequence).map_err(damaged)?,
        version: row.get(5)?,
        state: Payload::new(state).map_err(damaged)?,
    }))
}

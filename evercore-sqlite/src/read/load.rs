//! Loading one aggregate.

use evercore_core::{
    AggregateId, AggregateQuery, Direction, Events, History, Key, LoadRequest, Mark, PageLimit, Payload,
    Sequence, Snapshot, Target,
};
use rusqlite::{Connection, Row};

use crate::error::{Result, damaged};
use crate::names::Names;
use crate::read::rows::{Page, select_events};

/// What there is to know of an aggregate, as of one moment: one statement sees one state of the store.
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

/// The first statement stays open until the events are read: so both see the store as of one moment, and SQLite takes
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
        Some(row) => history(connection, names, request, Found::of(row)?).map(Some),
        None => Ok(None),
    }
}

fn history(connection: &Connection, names: &Names, request: &LoadRequest, found: Found) -> Result<History> {
    let end = found.sequence.min(request.up_to);
    let snapshot = found.snapshot.filter(|snapshot| snapshot.sequence <= found.sequence);
    let from = snapshot.as_ref().map_or(Sequence::ZERO, |snapshot| snapshot.sequence);
    let events = if from < end {
        events(connection, names, FORWARD, (found.id, from, end), request.limit)?
    } else {
        Events::default()
    };
    let aggregate_type = names.aggregate_type(connection, found.type_id)?;
    let (sequence, mark) = (found.sequence, (found.sequence > Sequence::ZERO).then_some(Mark::ALWAYS));
    Ok(History { id: found.id, aggregate_type, key: found.key, sequence, mark, snapshot, events })
}

/// A page of one aggregate's events.
pub(crate) fn read(connection: &Connection, names: &Names, query: &AggregateQuery) -> Result<Events> {
    let sql = match query.direction {
        Direction::Forward => FORWARD,
        Direction::Backward => BACKWARD,
    };
    events(connection, names, sql, (query.aggregate, query.from, query.to), query.limit)
}

fn events(
    connection: &Connection,
    names: &Names,
    sql: &str,
    (aggregate, from, to): (AggregateId, Sequence, Sequence),
    limit: PageLimit,
) -> Result<Events> {
    let mut statement = connection.prepare_cached(sql)?;
    let mut page = Page::new(connection, names, limit);
    page.fill(statement.query((aggregate.get(), from.get(), to.get()))?, None)?;
    Ok(page.finish().0)
}

/// An aggregate without its events.
struct Found {
    id: AggregateId,
    type_id: u32,
    key: Option<Key>,
    sequence: Sequence,
    snapshot: Option<Snapshot>,
}

impl Found {
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

//! The cursors of subscriptions, and their parked events.

use std::collections::HashMap;

use evercore_core::engine::{
    Backlog, Backlogs, Changed, Mark, ParkedChange, Step, StepOutcome, StoredCursor, StoredParked, Subject,
    SubscriptionChange,
};
use evercore_core::{Cursor, CursorId, Parked, Position, SubscriptionName, Timestamp};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use crate::error::{Result, damaged};
use crate::log_end::LogEnd;

macro_rules! select_cursors {
    ($rest:literal) => {
        concat!(
            "SELECT subscription, version, partition, partitions, position, epoch, owner, expires_at, ",
            "wanted_by, wanted_until, live_from, status, failed_position, failed_attempts, failed_error, ",
            "parked_changes, is_held, lost_leases FROM cursors ",
            $rest
        )
    };
}

const CURSOR: &str = select_cursors!("WHERE subscription = ?1 AND version = ?2 AND partition = ?3");
const CURSORS: &str = select_cursors!("ORDER BY subscription, version, partition");
const CURSORS_OF: &str = select_cursors!("WHERE subscription = ?1 ORDER BY version, partition");

const PUT_CURSOR: &str = "
    INSERT OR REPLACE INTO cursors (subscription, version, partition, partitions, position, epoch, owner, expires_at,
                                    wanted_by, wanted_until, live_from, status, failed_position, failed_attempts,
                                    failed_error, parked_changes, is_held, lost_leases)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)";

const REMOVE_CURSOR: &str = "DELETE FROM cursors WHERE subscription = ?1 AND version = ?2 AND partition = ?3";

const PARKED: &str = "
    SELECT position, aggregate_id, holds_back, attempts, error, parked_at, is_due FROM parked_events
    WHERE subscription = ?1 AND version = ?2 AND partition = ?3 AND position > ?4
    ORDER BY position LIMIT ?5";

const COUNT_PARKED: &str = "SELECT version, partition, count(*) FROM parked_events WHERE subscription = ?1 GROUP BY version, partition";

const KEEP_PARKED: &str = "
    INSERT OR REPLACE INTO parked_events (subscription, version, partition, position, aggregate_id, holds_back,
                                          attempts, error, parked_at, is_due)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";

const REMOVE_PARKED: &str = "
    DELETE FROM parked_events WHERE subscription = ?1 AND version = ?2 AND partition = ?3 AND position = ?4";

const REMOVE_ALL_PARKED: &str = "
    DELETE FROM parked_events WHERE subscription = ?1 AND version = ?2 AND partition = ?3";

const PARKED_IS_DUE: &str = "
    UPDATE parked_events SET is_due = 1
    WHERE subscription = ?1 AND version = ?2 AND partition = ?3 AND (?4 IS NULL OR position = ?4)";

const PARKED_COUNT: &str = "
    SELECT count(*), min(parked_at) FROM parked_events WHERE subscription = ?1 AND version = ?2 AND partition = ?3";

const NEXT_RECORDED_AT: &str = "SELECT recorded_at FROM events WHERE position = ?1";

/// Takes a step in the open transaction, and returns the cursor after it. If nothing changes, nothing is written, and
/// the commit needs no flush.
pub(crate) fn take(connection: &Connection, id: &CursorId, step: &Step) -> Result<Option<Cursor>> {
    let before = cursor(connection, id)?;
    let outcome = outcome(connection, id, step, before.clone())?;
    write(connection, id, before.as_ref(), &outcome)?;
    Ok(outcome.cursor)
}

/// Changes several cursors in the open transaction.
pub(crate) fn change(
    connection: &Connection,
    name: &SubscriptionName,
    change: &SubscriptionChange,
) -> Result<Changed> {
    let subject = Subject {
        cursors: cursors(connection, Some(name))?,
        parked: count_parked(connection, name)?,
        now: Timestamp::now(),
        head: LogEnd::read(connection)?.position,
    };
    let outcome = change.take(name, &subject)?;
    for (id, written) in &outcome.writes {
        let before = subject.cursors.iter().find(|cursor| cursor.id == *id);
        write(connection, id, before, written)?;
    }
    Ok(outcome.changed)
}

fn count_parked(connection: &Connection, name: &SubscriptionName) -> Result<HashMap<CursorId, u64>> {
    let mut statement = connection.prepare_cached(COUNT_PARKED)?;
    let mut rows = statement.query([name.as_str()])?;
    let mut counts = HashMap::new();
    while let Some(row) = rows.next()? {
        let id = CursorId { subscription: name.clone(), version: row.get(0)?, partition: row.get(1)? };
        counts.insert(id, row.get::<_, i64>(2)?.unsigned_abs());
    }
    Ok(counts)
}

/// Writes a cursor if it has changed, and its parked events.
fn write(
    connection: &Connection,
    id: &CursorId,
    before: Option<&Cursor>,
    outcome: &StepOutcome,
) -> Result<()> {
    if outcome.cursor.as_ref() != before {
        match &outcome.cursor {
            Some(cursor) => put(connection, cursor)?,
            None => drop(connection.prepare_cached(REMOVE_CURSOR)?.execute(key(id))?),
        }
    }
    for change in &outcome.parked {
        change_parked(connection, id, change)?;
    }
    Ok(())
}

/// Works out the result of a step. Changes nothing yet.
pub(crate) fn outcome(
    connection: &Connection,
    id: &CursorId,
    step: &Step,
    before: Option<Cursor>,
) -> Result<StepOutcome> {
    let looked_at = step.looks_at();
    let is_there = looked_at > Position::ZERO && looked_at <= LogEnd::read(connection)?.position;
    Ok(step.take(id, before, Timestamp::now(), is_there.then_some(Mark::ALWAYS))?)
}

fn key(id: &CursorId) -> (&str, u32, u32) {
    (id.subscription.as_str(), id.version, id.partition)
}

pub(crate) fn cursor(connection: &Connection, id: &CursorId) -> Result<Option<Cursor>> {
    let mut statement = connection.prepare_cached(CURSOR)?;
    let mut rows = statement.query(key(id))?;
    rows.next()?.map(cursor_of).transpose()
}

pub(crate) fn cursors(connection: &Connection, of: Option<&SubscriptionName>) -> Result<Vec<Cursor>> {
    let mut statement = connection.prepare_cached(if of.is_some() { CURSORS_OF } else { CURSORS })?;
    let mut rows = match of {
        Some(subscription) => statement.query([subscription.as_str()])?,
        None => statement.query([])?,
    };
    let mut cursors = Vec::new();
    while let Some(row) = rows.next()? {
        cursors.push(cursor_of(row)?);
    }
    Ok(cursors)
}

/// The cursors with their backlogs. The statements do not leave the process, so one for each cursor
/// costs little.
pub(crate) fn backlogs(connection: &Connection, of: Option<&SubscriptionName>) -> Result<Backlogs> {
    let mut parked = connection.prepare_cached(PARKED_COUNT)?;
    let mut next = connection.prepare_cached(NEXT_RECORDED_AT)?;
    let mut backlogs = Vec::new();
    for cursor in cursors(connection, of)? {
        let count = |row: &Row<'_>| Ok((row.get::<_, i64>(0)?, row.get::<_, Option<i64>>(1)?));
        let (parked, oldest) = parked.query_row(key(&cursor.id), count)?;
        let recorded_at = |row: &Row<'_>| row.get::<_, i64>(0);
        let recorded_at = next.query_row([cursor.position.next().get()], recorded_at).optional()?;
        backlogs.push(Backlog {
            next_recorded_at: recorded_at.map(time).transpose()?,
            parked: u64::try_from(parked).map_err(damaged)?,
            oldest_parked_at: oldest.map(time).transpose()?,
            cursor,
        });
    }
    // Read last: it may not be before a cursor.
    let head = LogEnd::read(connection)?.position;
    Ok(Backlogs { backlogs, head, now: Timestamp::now() })
}

fn cursor_of(row: &Row<'_>) -> Result<Cursor> {
    let stored = StoredCursor {
        subscription: text(row, 0)?.unwrap_or_default(),
        version: row.get(1)?,
        partition: row.get(2)?,
        partitions: row.get(3)?,
        position: row.get(4)?,
        epoch: row.get(5)?,
        owner: text(row, 6)?,
        expires_at: row.get(7)?,
        wanted_by: text(row, 8)?,
        wanted_until: row.get(9)?,
        live_from: row.get(10)?,
        status: row.get(11)?,
        failed_position: row.get(12)?,
        failed_attempts: row.get(13)?,
        failed_error: text(row, 14)?,
        parked_changes: row.get(15)?,
        is_held: row.get(16)?,
        lost_leases: row.get(17)?,
    };
    stored.try_into().map_err(damaged)
}

fn time(micros: i64) -> Result<Timestamp> {
    Timestamp::from_micros(micros).map_err(damaged)
}

fn text<'r>(row: &'r Row<'_>, column: usize) -> Result<Option<&'r str>> {
    row.get_ref(column)?.as_str_or_null().map_err(damaged)
}

fn put(connection: &Connection, cursor: &Cursor) -> Result<()> {
    let stored = StoredCursor::from(cursor);
    connection.prepare_cached(PUT_CURSOR)?.execute(params![
        stored.subscription,
        stored.version,
        stored.partition,
        stored.partitions,
        stored.position,
        stored.epoch,
        stored.owner,
        stored.expires_at,
        stored.wanted_by,
        stored.wanted_until,
        stored.live_from,
        stored.status,
        stored.failed_position,
        stored.failed_attempts,
        stored.failed_error,
        stored.parked_changes,
        stored.is_held,
        stored.lost_leases,
    ])?;
    Ok(())
}

fn change_parked(connection: &Connection, id: &CursorId, change: &ParkedChange) -> Result<()> {
    let (subscription, version, partition) = key(id);
    match change {
        ParkedChange::Keep(event) => {
            let stored = StoredParked::from(event);
            connection.prepare_cached(KEEP_PARKED)?.execute(params![
                subscription,
                version,
                partition,
                stored.position,
                stored.aggregate,
                stored.holds_back,
                stored.attempts,
                stored.error,
                stored.parked_at,
                stored.is_due,
            ])?;
        }
        ParkedChange::Remove(position) => {
            let one = (subscription, version, partition, position.get());
            connection.prepare_cached(REMOVE_PARKED)?.execute(one)?;
        }
        ParkedChange::Due(which) => {
            let due = (subscription, version, partition, which.map(Position::get));
            connection.prepare_cached(PARKED_IS_DUE)?.execute(due)?;
        }
        ParkedChange::RemoveAll => {
            connection.prepare_cached(REMOVE_ALL_PARKED)?.execute(key(id))?;
        }
    }
    Ok(())
}

pub(crate) fn parked(
    connection: &Connection,
    id: &CursorId,
    after: Position,
    limit: usize,
) -> Result<Vec<Parked>> {
    let (subscription, version, partition) = key(id);
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut statement = connection.prepare_cached(PARKED)?;
    let mut rows = statement.query((subscription, version, partition, after.get(), limit))?;
    let mut parked = Vec::new();
    while let Some(row) = rows.next()? {
        let stored = StoredParked {
            position: row.get(0)?,
            aggregate: row.get(1)?,
            holds_back: row.get(2)?,
            attempts: row.get(3)?,
            error: text(row, 4)?.unwrap_or_default(),
            parked_at: row.get(5)?,
            is_due: row.get(6)?,
        };
        parked.push(stored.try_into().map_err(damaged)?);
    }
    Ok(parked)
}

#[cfg(test)]
mod tests {
    use rusqlite::params_from_iter;

    use super::*;

    #[test]
    fn no_query_sorts_or_reads_other_cursors() {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(include_str!("../../migrations/V1__event_store.sql")).unwrap();
        let plan = |sql: &str| {
            let mut statement = connection.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let count = statement.parameter_count();
            let rows = statement.query_map(params_from_iter(vec![1; count]), |row| row.get(3)).unwrap();
            rows.map(Result::unwrap).collect::<Vec<String>>()
        };
        let whole = "(subscription=? AND version=? AND partition=?)";
        assert_eq!(plan(CURSOR), [format!("SEARCH cursors USING PRIMARY KEY {whole}")]);
        assert_eq!(plan(CURSORS), ["SCAN cursors"]);
        assert_eq!(plan(CURSORS_OF), ["SEARCH cursors USING PRIMARY KEY (subscription=?)"]);
        let after = "(subscription=? AND version=? AND partition=? AND position>?)";
        assert_eq!(plan(PARKED), [format!("SEARCH parked_events USING PRIMARY KEY {after}")]);
        let of_name = "SEARCH parked_events USING PRIMARY KEY (subscription=?)";
        assert_eq!(plan(COUNT_PARKED), [of_name]);
        assert_eq!(plan(NEXT_RECORDED_AT), ["SEARCH events USING INTEGER PRIMARY KEY (rowid=?)"]);
        for sql in [PARKED_IS_DUE, REMOVE_ALL_PARKED, PARKED_COUNT] {
            assert_eq!(plan(sql), [format!("SEARCH parked_events USING PRIMARY KEY {whole}")]);
        }
    }
}

//! The end of the log.

use evercore_core::{Position, Timestamp};
use rusqlite::{Connection, OptionalExtension};

use crate::error::{Result, damaged};

const LAST_EVENT: &str = "SELECT position, recorded_at FROM events ORDER BY position DESC LIMIT 1";

/// The position and the time of the last event.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogEnd {
    pub(crate) position: Position,
    pub(crate) recorded_at: Timestamp,
}

impl LogEnd {
    pub(crate) fn read(connection: &Connection) -> Result<Self> {
        let mut statement = connection.prepare_cached(LAST_EVENT)?;
        let last = statement.query_row([], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        let Some((position, recorded_at)) = last else {
            return Ok(Self { position: Position::ZERO, recorded_at: Timestamp::MIN });
        };
        let position = Position::new(position).map_err(damaged)?;
        Ok(Self { position, recorded_at: Timestamp::from_micros(recorded_at).map_err(damaged)? })
    }

    /// The same, with the time that the next event gets.
    pub(crate) fn now(connection: &Connection) -> Result<Self> {
        let end = Self::read(connection)?;
        Ok(Self { recorded_at: end.recorded_at.max(Timestamp::now()), ..end })
    }
}

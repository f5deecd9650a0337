//! The command ids in the store.

use evercore_core::engine::KnownCommand;
use evercore_core::{CommandId, Receipt, Timestamp};
use rusqlite::{Connection, OptionalExtension};

use crate::error::Result;

const COMMAND: &str = "SELECT fingerprint, receipt FROM commands WHERE command_id = ?1";

const INSERT_COMMAND: &str =
    "INSERT INTO commands (command_id, fingerprint, receipt, recorded_at) VALUES (?1, ?2, ?3, ?4)";

/// Finds the last command id of a piece. An index on the time would slow down every commit, for a call that is rare.
const END_OF_PIECE: &str = "
    SELECT max(command_id) FROM
        (SELECT command_id FROM commands WHERE command_id > ?1 ORDER BY command_id LIMIT 1000)";

const FORGET: &str = "DELETE FROM commands WHERE command_id > ?1 AND command_id <= ?2 AND recorded_at < ?3";

/// The recorded outcome of a command id.
pub(crate) fn find(connection: &Connection, id: &CommandId) -> Result<Option<KnownCommand>> {
    let mut statement = connection.prepare_cached(COMMAND)?;
    let row = statement.query_row([id.as_str()], |row| {
        Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<String>>(1)?))
    });
    let Some((fingerprint, receipt)) = row.optional()? else { return Ok(None) };
    Ok(Some(KnownCommand::stored(fingerprint, receipt.as_deref())?))
}

/// The receipt of a command. If there is none, records that there will never be one.
pub(crate) fn settle(connection: &Connection, id: &CommandId) -> Result<Option<Receipt>> {
    if let Some(known) = find(connection, id)? {
        return Ok(known.into_receipt());
    }
    insert(connection, id, None, None, Timestamp::now())?;
    Ok(None)
}

/// Records the outcome of a command id.
pub(crate) fn insert(
    connection: &Connection,
    id: &CommandId,
    fingerprint: Option<i64>,
    receipt: Option<&Receipt>,
    recorded_at: Timestamp,
) -> Result<()> {
    let row = (id.as_str(), fingerprint, receipt.map(Receipt::to_string), recorded_at.as_micros());
    connection.prepare_cached(INSERT_COMMAND)?.execute(row)?;
    Ok(())
}

/// Some commands, in the order of their ids.
pub(crate) struct Piece {
    pub(crate) forgotten: u64,
    /// The last id of the piece.
    pub(crate) end: String,
}

/// Removes old commands from the piece after an id. `None` if there are no commands after it.
pub(crate) fn forget(connection: &Connection, after: &str, before: Timestamp) -> Result<Option<Piece>> {
    let end: Option<String> =
        connection.prepare_cached(END_OF_PIECE)?.query_row([after], |row| row.get(0))?;
    let Some(end) = end else { return Ok(None) };
    let forgotten = connection.prepare_cached(FORGET)?.execute((after, &end, before.as_micros()))?;
    Ok(Some(Piece { forgotten: forgotten as u64, end }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The writer is held for one piece at a time.
    #[test]
    fn commands_are_forgotten_in_pieces() {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(include_str!("../../migrations/V1__event_store.sql")).unwrap();
        let many = "
            WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 2500)
            INSERT INTO commands (command_id, recorded_at) SELECT printf('command %05d', n), n FROM n";
        connection.execute_batch(many).unwrap();
        let before = Timestamp::from_micros(2_000).unwrap();
        let (mut after, mut pieces) = (String::new(), Vec::new());
        while let Some(piece) = forget(&connection, &after, before).unwrap() {
            pieces.push(piece.forgotten);
            after = piece.end;
        }
        assert_eq!(pieces, [1_000, 999, 0]);
    }
}

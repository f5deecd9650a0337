//! The read model: the free seats of each show. Rows and cursor change together, so each event counts once.

use std::path::Path;

use evercore_sqlite::rusqlite::{Connection, OpenFlags, OptionalExtension, Result};
use evercore_sqlite::{Projection, SqliteEngine};
use serde::Serialize;

use super::show::{Show, ShowEvent};

pub(crate) const NAME: &str = "free seats";

pub(crate) const TABLE: &str = "
    CREATE TABLE IF NOT EXISTS show_seats (
        show INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, seats INTEGER NOT NULL, free INTEGER NOT NULL
    ) STRICT";

#[derive(Serialize)]
pub(crate) struct FreeSeats {
    seats: u32,
    free: u32,
}

pub(crate) fn projection(engine: &SqliteEngine) -> Projection {
    engine.projection(|sql, delivery| {
        for event in delivery.events() {
            let show = event.aggregate().get();
            match event.decode::<Show>()? {
                ShowEvent::Announced { name, seats } => sql
                    .prepare_cached("INSERT INTO show_seats VALUES (?1, ?2, ?3, ?3)")?
                    .execute((show, name, seats))?,
                ShowEvent::Booked { seats } => sql
                    .prepare_cached("UPDATE show_seats SET free = free - ?2 WHERE show = ?1")?
                    .execute((show, seats))?,
            };
        }
        Ok(())
    })
}

/// Opens the file with a separate connection: it is an ordinary SQLite table.
pub(crate) fn read(file: &Path, name: &str) -> Result<Option<FreeSeats>> {
    let sql = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let query = "SELECT seats, free FROM show_seats WHERE name = ?1";
    sql.query_row(query, [name], |row| Ok(FreeSeats { seats: row.get(0)?, free: row.get(1)? })).optional()
}

//! The read model: the free seats of each show. Rows and cursor change together, so each event counts once.

use std::path::Path;

use evercore_sqlite::rusqlite::{Connection, OpenFlags, OptionalExtension, Result};
use evercore_sqlite::{Projection, SqliteEngine};
use serde::Serialize;

use super::show::{Show, ShowEvent};

pub(crate) const NAME: &str = "free seats";

/// Raise it with each change of the table or the handler. The new version is built beside the old one.
pub(crate) const VERSION: u32 = 1;

/// Each version has its own table.
pub(crate) fn create_table() -> String {
    format!(
        "CREATE TABLE IF NOT EXISTS show_seats_{VERSION} (
            show INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, seats INTEGER NOT NULL, free INTEGER NOT NULL
        ) STRICT"
    )
}

#[derive(Serialize)]
pub(crate) struct FreeSeats {
    seats: u32,
    free: u32,
}

pub(crate) fn projection(engine: &SqliteEngine) -> Projection {
    let announce = format!("INSERT INTO show_seats_{VERSION} VALUES (?1, ?2, ?3, ?3)");
    let book = format!("UPDATE show_seats_{VERSION} SET free = free - ?2 WHERE show = ?1");
    engine.projection(move |sql, delivery| {
        for event in delivery.events() {
            let show = event.aggregate().get();
            match event.decode::<Show>()? {
                ShowEvent::Announced { name, seats } => {
                    sql.prepare_cached(&announce)?.execute((show, name, seats))?
                }
                ShowEvent::Booked { seats } => sql.prepare_cached(&book)?.execute((show, seats))?,
            };
        }
        Ok(())
    })
}

/// Opens the file with a separate connection: it is an ordinary SQLite table. `version` is the live one. It is older than
/// [`VERSION`] while this process builds a new one.
pub(crate) fn read(file: &Path, version: u32, name: &str) -> Result<Option<FreeSeats>> {
    let sql = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let query = format!("SELECT seats, free FROM show_seats_{version} WHERE name = ?1");
    sql.query_row(&query, [name], |row| Ok(FreeSeats { seats: row.get(0)?, free: row.get(1)? })).optional()
}

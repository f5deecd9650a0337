//! Checks that the write-ahead log beside a file belongs to it.
//!
//! SQLite applies any log that it finds beside a file. If somebody has replaced a store by a copy and left the store's
//! log there, SQLite mixes pages of two moments, and the store is damaged without an error. So before a store is
//! opened, the file without its log is compared with the file with its log.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use evercore_core::Position;
use rusqlite::Connection;

use crate::connection::open::{self, Role};
use crate::connection::path;
use crate::error::Result;
use crate::log_end::LogEnd;

const STORE: &str = "SELECT store_id, is_backup FROM store";

/// Counts the events after a position whose rows, index entries and previous event are all there.
const WHOLE_EVENTS: &str = "
    SELECT count(*) FROM events e
    JOIN aggregates a  ON a.id = e.aggregate_id
    JOIN event_types t ON t.id = e.event_type_id
    JOIN events i INDEXED BY events_aggregate_sequence
      ON i.aggregate_id = e.aggregate_id AND i.sequence = e.sequence AND i.position = e.position
    WHERE e.position > ?1 AND (e.sequence = 1 OR EXISTS (
        SELECT 1 FROM events p INDEXED BY events_aggregate_sequence
        WHERE p.aggregate_id = e.aggregate_id AND p.sequence = e.sequence - 1))";

/// The write-ahead log of a database.
pub(crate) fn path_of(path: &Path) -> PathBuf {
    path::with_suffix(path, "-wal")
}

/// The length of the write-ahead log; 0 if there is none.
pub(crate) fn bytes(path: &Path) -> u64 {
    std::fs::metadata(path_of(path)).map_or(0, |wal| wal.len())
}

/// A file without its write-ahead log. While a checkpoint runs, or after it was interrupted, the file may be
/// unreadable. Then nothing is known.
#[derive(Debug, Default)]
pub(crate) struct WithoutWal {
    store_id: Option<String>,
    is_backup: bool,
    head: Option<Position>,
    has_all_pages: bool,
}

impl WithoutWal {
    pub(crate) fn read(path: &Path) -> Self {
        // If the log cannot be read, SQLite will report why.
        let has_all_pages = has_all_pages(path).unwrap_or(true);
        let Ok(file) = open::open(path, Role::Immutable, false, Duration::ZERO) else {
            return Self { has_all_pages, ..Self::default() };
        };
        let store = file.query_row(STORE, [], |row| Ok((row.get(0)?, row.get(1)?)));
        let (store_id, is_backup) = store.map_or((None, false), |(id, is_backup)| (Some(id), is_backup));
        Self { store_id, is_backup, head: LogEnd::read(&file).ok().map(|head| head.position), has_all_pages }
    }

    /// Whether this connection, which reads the file with its log, sees a later moment of the same store.
    pub(crate) fn belongs_to(&self, connection: &Connection) -> Result<bool> {
        let store_id: String = connection.query_row("SELECT store_id FROM store", [], |row| row.get(0))?;
        // A backup was made without a log, and loses its mark before it gets one.
        if self.is_backup || self.store_id.as_ref().is_some_and(|alone| *alone != store_id) {
            return Ok(false);
        }
        // This is rare, so checking the whole database is not too slow.
        if !self.has_all_pages {
            let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
            if verdict != "ok" {
                return Ok(false);
            }
        }
        let (from, head) = (self.head.unwrap_or_default().get(), LogEnd::read(connection)?.position.get());
        let whole: i64 = connection.query_row(WHOLE_EVENTS, [from], |row| row.get(0))?;
        Ok(from <= head && whole == head - from)
    }
}

/// Whether the log has every page past the end of the file. The commits in the log contain the number of pages of the
/// database.
fn has_all_pages(path: &Path) -> std::io::Result<bool> {
    const HEADER: usize = 32;
    const FRAME_HEADER: usize = 24;
    let number = |bytes: &[u8], at: usize| {
        bytes[at..at + 4].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
    };
    let mut log = BufReader::new(File::open(path_of(path))?);
    let mut header = [0; HEADER];
    log.read_exact(&mut header)?;
    let page_size = number(&header, 8);
    if !(512..=65_536).contains(&page_size) {
        return Ok(true);
    }
    let (mut pages, mut size) = (HashSet::new(), 0);
    let mut frame = vec![0; FRAME_HEADER + usize::try_from(page_size).unwrap_or(0)];
    // Frames that are left from an earlier use of the log have other salts.
    while log.read_exact(&mut frame).is_ok() && frame[8..16] == header[16..24] {
        pages.insert(number(&frame, 0));
        if number(&frame, 4) > 0 {
            size = number(&frame, 4);
        }
    }
    let in_file = std::fs::metadata(path)?.len() / page_size;
    Ok((in_file + 1..=size).all(|page| pages.contains(&page)))
}

//! An open store: its one writer, its read connections, its type names, and how it is closed.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use event_listener::Event;
use evercore_core::{Error, ErrorKind, Position, Result, StoreId};
use rusqlite::Connection;

use crate::connection::open::{self, Role};
use crate::connection::pool::Readers;
use crate::connection::transaction::{self, Failure};
use crate::connection::wal;
use crate::error::{self, SqliteError};
use crate::log_end::LogEnd;
use crate::migrate::{self, Identity, not_a_store};
use crate::names::Names;
use crate::settings::Settings;

/// A larger WAL is written back and emptied as soon as nobody reads from it.
const LARGE_WAL: u64 = 16 * 1024 * 1024;

/// How many events are written between two checks of the WAL's length.
const EVENTS_PER_WAL_CHECK: usize = 1_000;

const OPEN: u8 = 0;
const CLOSED: u8 = 1;
const FAILED: u8 = 2;

pub(crate) struct Store {
    pub(crate) path: Option<PathBuf>,
    pub(crate) settings: Settings,
    pub(crate) store_id: String,
    pub(crate) identity: StoreId,
    pub(crate) names: Names,
    /// Notified after each transaction that wrote events, and when the store is closed.
    pub(crate) committed: Event,
    /// The last position that this engine knows.
    head: AtomicI64,
    state: AtomicU8,
    /// Declared before the writer, and so dropped before it: the last connection removes the WAL, and only a writer
    /// can. `None` for a store in memory, where the writer reads.
    readers: Option<Readers>,
    /// Held by the next thread that gets the writer. A thread that locks the writer again at once, as the queue's does,
    /// then comes after a thread that has waited. A mutex alone could let it in each time.
    next: Mutex<()>,
    writer: Mutex<Option<Writer>>,
}

/// The one connection that writes. In memory it is the only connection.
pub(crate) struct Writer {
    pub(crate) connection: Connection,
    events_since_wal_check: usize,
}

impl Store {
    pub(crate) fn open(settings: Settings, path: Option<PathBuf>) -> Result<Self> {
        open::check_library()?;
        let writer = match &path {
            Some(path) => open_file(path, &settings).map_err(|error| error.at(path))?,
            None => Some(open_memory(&settings)?),
        };
        let readers = path.clone().map(|path| Readers::new(path, settings));
        let mut store = Self {
            path,
            settings,
            store_id: String::new(),
            identity: StoreId::of(""),
            names: Names::default(),
            committed: Event::new(),
            head: AtomicI64::new(0),
            state: AtomicU8::new(OPEN),
            readers,
            next: Mutex::default(),
            writer: Mutex::new(writer.map(|connection| Writer { connection, events_since_wal_check: 0 })),
        };
        store.store_id = store.read_on_writer(|connection| {
            Ok(connection.query_row("SELECT store_id FROM store", [], |row| row.get(0))?)
        })?;
        store.identity = StoreId::of(&store.store_id);
        let head = store.read_on_writer(|connection| {
            store.names.reload(connection)?;
            Ok(LogEnd::read(connection)?.position)
        })?;
        store.note_head(head);
        Ok(store)
    }

    pub(crate) fn check_open(&self) -> Result<()> {
        match self.state.load(Ordering::Acquire) {
            OPEN => Ok(()),
            FAILED => {
                let message =
                    "the engine has closed itself because the disk failed during a commit, open it again";
                Err(Error::new(ErrorKind::Closed, message))
            }
            _ => Err(Error::closed()),
        }
    }

    /// Reads on one of the read connections, or in memory on the only connection.
    pub(crate) fn read<T>(&self, work: impl FnOnce(&Connection) -> error::Result<T>) -> Result<T> {
        self.check_open()?;
        match &self.readers {
            Some(readers) => Ok(readers.read(work)?),
            None => Ok(work(&self.lock()?.get()?.connection)?),
        }
    }

    /// Reads on a separate connection. For long work.
    pub(crate) fn read_separately<T>(&self, work: impl FnOnce(&Connection) -> error::Result<T>) -> Result<T> {
        self.check_open()?;
        match &self.readers {
            Some(readers) => Ok(readers.read_separately(work)?),
            None => self.read(work),
        }
    }

    /// Reads a small thing on the writer if there is one, so that no other connection is opened for it.
    pub(crate) fn read_on_writer<T>(&self, work: impl FnOnce(&Connection) -> error::Result<T>) -> Result<T> {
        if self.settings.read_only {
            return self.read(work);
        }
        Ok(work(&self.lock()?.get()?.connection)?)
    }

    /// Reads the head, because other processes may have committed, and wakes waiters if it is new.
    pub(crate) fn refresh_head(&self) {
        if self.path.is_none() {
            return;
        }
        // Waiters read the head themselves at the end of their time, and report the error.
        let Ok(head) = self.read_on_writer(LogEnd::read) else { return };
        self.note_head(head.position);
    }

    /// Waits for the writer.
    pub(crate) fn lock(&self) -> Result<LockedWriter<'_>> {
        if self.settings.read_only {
            return Err(Error::read_only());
        }
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let writer = self.writer.lock();
        drop(next);
        let writer = match writer {
            Ok(writer) => writer,
            Err(poisoned) => {
                // A panic during a transaction. Dropping the connection rolls it back and unlocks the file.
                self.fail(&mut LockedWriter(poisoned.into_inner()));
                self.writer.clear_poison();
                return Err(Error::closed());
            }
        };
        self.check_open()?;
        Ok(LockedWriter(writer))
    }

    /// Writes in one transaction.
    pub(crate) fn write<T>(&self, work: impl FnOnce(&Connection) -> error::Result<T>) -> Result<T> {
        let mut writer = self.lock()?;
        let outcome = transaction::write(&writer.get()?.connection, work);
        outcome.map_err(|failure| self.to_error(&mut writer, failure))
    }

    /// The error for the caller whose transaction failed. Closes the engine if the disk failed.
    pub(crate) fn to_error(&self, writer: &mut LockedWriter<'_>, failure: Failure) -> Error {
        match failure {
            Failure::RolledBack(error) => error.into(),
            Failure::Unknown => {
                self.fail(writer);
                Error::outcome_unknown("the commit")
            }
        }
    }

    /// Closes the engine after a failed flush. SQLite's memory and the disk may now differ, and another flush may
    /// succeed without writing the data. Only opening the store again shows its state.
    pub(crate) fn fail(&self, writer: &mut LockedWriter<'_>) {
        self.state.store(FAILED, Ordering::Release);
        if let Some(readers) = &self.readers {
            readers.abandon();
        }
        drop(writer.0.take());
        self.committed.notify(usize::MAX);
    }

    /// Refuses new calls, waits for running ones, writes the WAL back and closes all connections. The writer is the
    /// last, because only a writer can remove the WAL.
    pub(crate) fn close(&self) -> Result<()> {
        let _ = self.state.compare_exchange(OPEN, CLOSED, Ordering::AcqRel, Ordering::Acquire);
        self.committed.notify(usize::MAX);
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(readers) = &self.readers {
            readers.close();
        }
        let Some(writer) = writer.take() else { return Ok(()) };
        // A panic may have left a transaction open, and then the WAL could not be written back.
        transaction::roll_back(&writer.connection);
        let has_written_back = match &self.path {
            Some(_) => truncate_wal(&writer.connection).map_err(SqliteError::from),
            None => Ok(true),
        };
        writer.connection.close().map_err(|(_, error)| SqliteError::from(error))?;
        if has_written_back? {
            return Ok(());
        }
        let wal = self.path.as_deref().map(wal::path_of).unwrap_or_default();
        Err(Error::new(
            ErrorKind::Unavailable,
            format!(
                "the engine is closed, but another connection uses the store, so the newest commits are still in \"{}\": \
                 keep it with the file",
                wal.display()
            ),
        ))
    }

    /// The position of the last event.
    pub(crate) fn head(&self) -> Result<Position> {
        let head = self.read(LogEnd::read)?.position;
        Ok(self.note_head(head))
    }

    /// Notes a head. Returns the furthest one that is known now.
    pub(crate) fn note_head(&self, head: Position) -> Position {
        let before = self.head.fetch_max(head.get(), Ordering::AcqRel);
        // The first thread that sees a new head wakes the waiters: to all others it is not new.
        if before < head.get() {
            self.committed.notify(usize::MAX);
        }
        Position::new(before).unwrap_or_default().max(head)
    }

    /// The head that this engine knows, without reading the file.
    pub(crate) fn known_head(&self) -> Position {
        Position::new(self.head.load(Ordering::Acquire)).unwrap_or_default()
    }

    pub(crate) fn wal_bytes(&self) -> u64 {
        self.path.as_deref().map_or(0, wal::bytes)
    }

    /// Writes a large WAL back, unless somebody reads from it. A later flight tries again.
    pub(crate) fn tidy(&self, writer: &mut LockedWriter<'_>, events: usize) -> Result<()> {
        let state = writer.get()?;
        state.events_since_wal_check += events;
        if state.events_since_wal_check < EVENTS_PER_WAL_CHECK {
            return Ok(());
        }
        state.events_since_wal_check = 0;
        if self.wal_bytes() < LARGE_WAL {
            return Ok(());
        }
        open::wait_for_locks(&state.connection, Duration::ZERO).map_err(SqliteError::from)?;
        let written_back = self.truncate_wal(writer);
        let timeout = open::wait_for_locks(&writer.get()?.connection, self.settings.busy_timeout);
        timeout.map_err(SqliteError::from)?;
        written_back.map(drop)
    }

    /// Writes the whole WAL back and empties it. Returns `false` if another connection prevented that.
    pub(crate) fn truncate_wal(&self, writer: &mut LockedWriter<'_>) -> Result<bool> {
        let outcome = truncate_wal(&writer.get()?.connection);
        if outcome.as_ref().is_err_and(error::is_io) {
            self.fail(writer);
        }
        Ok(outcome.map_err(SqliteError::from)?)
    }
}

fn truncate_wal(connection: &Connection) -> rusqlite::Result<bool> {
    match connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0)) {
        Ok(busy) => Ok(busy == 0),
        Err(error) if error::is_busy(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The writer while it is locked.
pub(crate) struct LockedWriter<'a>(MutexGuard<'a, Option<Writer>>);

impl LockedWriter<'_> {
    pub(crate) fn get(&mut self) -> Result<&mut Writer> {
        self.0.as_mut().ok_or_else(Error::closed)
    }
}

/// Opens the writer, after all checks that must come before the first write. `None` for a read-only store.
fn open_file(path: &Path, settings: &Settings) -> error::Result<Option<Connection>> {
    // Read before the length: when another process creates the store, the file has its first page before it has a log.
    let has_wal = wal::bytes(path) > 0;
    let length = match std::fs::metadata(path) {
        Ok(file) if file.is_dir() => return Err(not_a_store("the path is a folder")),
        Ok(file) => Some(file.len()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    let create = settings.create && !settings.read_only;
    // Opening waits for the open time-out, and later each connection for the busy time-out.
    let opening = Settings { busy_timeout: settings.open_timeout, ..*settings };
    let identity = match length {
        None if !create => return Err(not_a_store("there is no such file")),
        // SQLite would delete the log with its contents.
        None | Some(0) if has_wal => return Err(migrate::foreign_wal(path)),
        None if !path.parent().is_some_and(Path::is_dir) => {
            return Err(Error::new(ErrorKind::Backend, "the folder of the file does not exist").into());
        }
        Some(0) if !create => return Err(not_a_store("the file is empty")),
        None | Some(0) => Identity::Empty,
        // SQLite treats a file of one byte as empty.
        Some(..migrate::HEADER_BYTES) => {
            return Err(not_a_store("the file is shorter than the header of a SQLite database"));
        }
        Some(_) => migrate::identify(path, &opening)?,
    };
    if identity == Identity::Empty && !create {
        return Err(not_a_store("the database is empty"));
    }
    if settings.read_only {
        return Ok(None);
    }
    let mut connection = open::configured(path, Role::Writer, create, &opening)?;
    if connection.is_readonly("main")? {
        return Err(Error::new(ErrorKind::ReadOnly, "the file cannot be written").into());
    }
    let migrated = migrate::migrate(&mut connection, Some(path), settings.open_timeout);
    migrated.map_err(|error| open::explain(error, path))?;
    open::wait_for_locks(&connection, settings.busy_timeout)?;
    Ok(Some(connection))
}

fn open_memory(settings: &Settings) -> error::Result<Connection> {
    let mut connection = Connection::open_in_memory()?;
    open::configure(&connection, Role::Writer, settings.durability)?;
    migrate::migrate(&mut connection, None, settings.open_timeout)?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use super::*;

    fn open(path: &Path) -> Store {
        let settings = Settings { busy_timeout: Duration::from_millis(1_234), ..Settings::default() };
        Store::open(settings, Some(path.to_owned())).unwrap()
    }

    fn names(store: &Store) -> Result<i64> {
        store.read(|connection| {
            Ok(connection.query_row("SELECT count(*) FROM aggregate_types", [], |row| row.get(0))?)
        })
    }

    #[test]
    fn every_connection_has_its_settings() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder.path().join("store.db"));
        let ask = |connection: &Connection| {
            let pragmas = ["busy_timeout", "mmap_size", "synchronous", "foreign_keys", "query_only"];
            let found = pragmas.map(|pragma| {
                connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0)).unwrap()
            });
            Ok::<_, SqliteError>(found)
        };
        assert_eq!(store.write(ask).unwrap(), [1_234, 0, 2, 1, 0]);
        assert_eq!(store.read(ask).unwrap(), [1_234, 0, 2, 1, 1]);
    }

    #[test]
    fn a_thread_that_locks_the_writer_again_at_once_comes_after_one_that_waits() {
        const WAITS: usize = 50;
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder.path().join("store.db"));
        let (turns, done) = (AtomicUsize::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let _writer = store.lock().unwrap();
                    turns.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let wait = || {
                std::thread::sleep(Duration::from_millis(2)); // the other thread has the writer again
                let before = turns.load(Ordering::SeqCst);
                let _writer = store.lock().unwrap();
                turns.load(Ordering::SeqCst) - before
            };
            let waited: usize = (0..WAITS).map(|_| wait()).sum();
            done.store(true, Ordering::SeqCst);
            assert!(waited <= WAITS / 2, "{waited} turns of another in {WAITS} waits");
        });
    }

    /// Leaves a transaction of the writer open.
    fn panic_half_way(store: &Store) {
        let half = || {
            let mut writer = store.lock().unwrap();
            let half = "BEGIN IMMEDIATE; INSERT INTO aggregate_types (name) VALUES ('half')";
            writer.get().unwrap().connection.execute_batch(half).unwrap();
            std::panic::resume_unwind(Box::new("with the writer in hand"));
        };
        std::thread::scope(|scope| scope.spawn(half).join()).unwrap_err();
    }

    #[test]
    fn closing_after_a_panic_with_the_writer_in_hand_writes_the_log_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = open(&path);
        let whole = "INSERT INTO aggregate_types (name) VALUES ('whole')";
        store.write(|connection| Ok(connection.execute_batch(whole)?)).unwrap();
        panic_half_way(&store);
        store.close().unwrap();
        assert_eq!(wal::bytes(&path), 0);
        assert_eq!(names(&open(&path)).unwrap(), 1);
    }

    #[test]
    fn a_panic_with_the_writer_in_hand_closes_the_engine_and_leaves_nothing_half_done() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = open(&path);
        panic_half_way(&store);
        // The next call that needs the writer finds the panic and closes the engine.
        assert_eq!(names(&store).unwrap(), 0, "reading does not need it");
        for _ in 0..2 {
            assert_eq!(store.write(|_| Ok(())).unwrap_err().kind(), &ErrorKind::Closed);
            assert_eq!(names(&store).unwrap_err().kind(), &ErrorKind::Closed);
        }
        // The file is unlocked although the failed engine still exists, and has nothing of the open transaction.
        let again = open(&path);
        let whole = "INSERT INTO aggregate_types (name) VALUES ('whole')";
        again.write(|connection| Ok(connection.execute_batch(whole)?)).unwrap();
        assert_eq!(names(&again).unwrap(), 1);
        store.close().unwrap();
    }
}

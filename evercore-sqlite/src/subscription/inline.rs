//! Inline projections: tables that change in the transaction of each commit, so they never lag behind the log.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use evercore_core::engine::Step;
use evercore_core::{BoxError, CursorId, Event, PageLimit, Position, Result};
use rusqlite::{Connection, OptionalExtension};

use crate::connection::user_sql;
use crate::error::{self, damaged};
use crate::log_end::LogEnd;
use crate::names::Names;
use crate::read::log;
use crate::store::Store;
use crate::subscription::subscriptions;

/// How many events a handler gets at once.
const PAGE: usize = 1_000;

/// How long pages are written one after another before other processes get the file.
const SHIFT: Duration = Duration::from_millis(100);

/// Longer than the longest interval at which SQLite tries to get a lock, 100 ms. So each process that waits gets in.
const REST: Duration = Duration::from_millis(120);

/// Finds only active cursors. One that was removed, paused or retired by hand is left alone.
const CURSOR: &str = "
    SELECT position FROM cursors WHERE subscription = ?1 AND version = ?2 AND partition = 0 AND status = 0";

const MOVE: &str = "
    UPDATE cursors SET position = ?3 WHERE subscription = ?1 AND version = ?2 AND partition = 0";

type Handle = dyn Fn(&Connection, &[Event]) -> Result<(), BoxError> + Send + Sync;

/// A projection that every commit updates.
#[derive(Clone)]
pub(crate) struct InlineProjection {
    name: String,
    version: u32,
    /// Names it in errors.
    title: String,
    handle: Arc<Handle>,
}

impl InlineProjection {
    pub(crate) fn new(
        name: &str,
        version: u32,
        handle: impl Fn(&Connection, &[Event]) -> Result<(), BoxError> + Send + Sync + 'static,
    ) -> Self {
        let title = format!("the inline projection \"{name}\"");
        Self { name: name.to_owned(), version, title, handle: Arc::new(handle) }
    }

    /// Refuses projections with a wrong name or version, and one that is there twice.
    pub(crate) fn check(projections: &[Self]) -> Result<()> {
        let mut ids: Vec<CursorId> = Vec::with_capacity(projections.len());
        for projection in projections {
            let id = CursorId::of_inline(&projection.name, projection.version, &ids)?;
            ids.push(id);
        }
        Ok(())
    }

    /// Gives the handler the next events up to the head and moves the cursor, in the open transaction. Returns whether
    /// there are more. `names` must be a copy, because they learn names that are not committed yet.
    fn page(
        &self,
        connection: &Connection,
        store: &Store,
        names: &Names,
        head: Position,
    ) -> error::Result<bool> {
        let Some(at) = self.position(connection)?.filter(|at| *at < head) else { return Ok(false) };
        let events = log::between(connection, names, at, head, PageLimit::events(PAGE)?)?;
        let events: Vec<Event> = events.iter().collect();
        let Some(last) = events.last().map(Event::position) else {
            return Err(damaged("the log has a gap"));
        };
        let sql = |connection: &Connection| (self.handle)(connection, &events);
        user_sql::run(connection, store.settings.sql_timeout, &self.title, sql)?;
        let (subscription, version) = self.key();
        connection.prepare_cached(MOVE)?.execute((subscription, version, last.get()))?;
        Ok(last < head)
    }

    /// The same, in a transaction that does nothing else.
    fn next_page(&self, connection: &Connection, store: &Store) -> error::Result<bool> {
        self.page(connection, store, &store.names.copy(), LogEnd::read(connection)?.position)
    }

    /// How far it has come; `None` if its cursor is not active.
    fn position(&self, connection: &Connection) -> error::Result<Option<Position>> {
        let at = connection.prepare_cached(CURSOR)?.query_row(self.key(), |row| row.get(0)).optional()?;
        at.map(Position::new).transpose().map_err(damaged)
    }

    /// Whether it lags by more than a page.
    fn is_far(&self, connection: &Connection, head: Position) -> error::Result<bool> {
        let page = i64::try_from(PAGE).unwrap_or(i64::MAX);
        Ok(self.position(connection)?.is_some_and(|at| head.get().saturating_sub(at.get()) > page))
    }

    fn key(&self) -> (&str, u32) {
        (&self.name, self.version)
    }

    fn id(&self) -> Result<CursorId> {
        CursorId::of_inline(&self.name, self.version, [])
    }
}

impl fmt::Debug for InlineProjection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlineProjection")
            .field("name", &self.name)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// Before a commit: handles events that other processes have committed without the projections. At most a page is left
/// for the commit itself. `between` runs between two pages.
pub(crate) fn catch_up_before_commit(
    store: &Store,
    inline: &[InlineProjection],
    between: impl Fn(),
) -> Result<()> {
    if inline.is_empty() {
        return Ok(());
    }
    // Read once, so that other writers cannot keep this going endlessly.
    let head = store.read_on_writer(LogEnd::read)?.position;
    let mut shift = Shift::begin(store);
    for projection in inline {
        while store.read_on_writer(|connection| projection.is_far(connection, head))? {
            store.write(|connection| projection.next_page(connection, store))?;
            between();
            shift.rest();
        }
    }
    Ok(())
}

/// Lets other processes get the file. Transactions that follow one another at once leave no gap that is long enough.
struct Shift {
    began: Instant,
    has_others: bool,
}

impl Shift {
    fn begin(store: &Store) -> Self {
        Self { began: Instant::now(), has_others: store.path.is_some() }
    }

    /// Pauses if the shift was long.
    fn rest(&mut self) {
        if self.has_others && self.began.elapsed() >= SHIFT {
            thread::sleep(REST);
            self.began = Instant::now();
        }
    }
}

/// In the transaction of a commit: handles all events up to the new head.
pub(crate) fn handle_new_events(
    connection: &Connection,
    store: &Store,
    inline: &[InlineProjection],
    head: Position,
) -> error::Result<()> {
    if inline.is_empty() {
        return Ok(());
    }
    let names = store.names.copy();
    for projection in inline {
        while projection.page(connection, store, &names, head)? {}
    }
    Ok(())
}

/// When a store is opened: handles all events, a page per transaction.
pub(crate) fn catch_up_at_open(store: &Store, inline: &[InlineProjection]) -> Result<()> {
    for projection in inline {
        let (id, declare) = (projection.id()?, Step::declare(1, Position::ZERO, Some(Position::ZERO)));
        store.write(|connection| subscriptions::take(connection, &id, &declare))?;
        let mut shift = Shift::begin(store);
        while store.write(|connection| projection.next_page(connection, store))? {
            shift.rest();
        }
    }
    Ok(())
}

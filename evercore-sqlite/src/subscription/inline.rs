//! Inline projections: tables that change in the transaction of each commit, and so are never behind the log.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use evercore_core::{BoxError, CursorId, Error, Event, PageLimit, Position, Result, Step, SubscriptionName};
use rusqlite::{Connection, OptionalExtension};

use crate::builder::Builder;
use crate::connection::guard;
use crate::error::{self, damaged};
use crate::log_end::LogEnd;
use crate::names::Names;
use crate::read::log;
use crate::store::Store;
use crate::subscription::subscriptions;

/// How many events a handler is given at once.
const PAGE: usize = 1_000;

/// For how long pages are written one after the other before others get the file.
const SHIFT: Duration = Duration::from_millis(100);

/// Longer than the longest step in which SQLite looks for a lock, which is 100 ms: so everybody who waits gets in.
const REST: Duration = Duration::from_millis(120);

/// A cursor that was removed, paused or retired by hand is left alone.
const CURSOR: &str = "
    SELECT position FROM cursors WHERE subscription = ?1 AND version = ?2 AND partition = 0 AND status = 0";

const MOVE: &str = "
    UPDATE cursors SET position = ?3 WHERE subscription = ?1 AND version = ?2 AND partition = 0";

type Handle = dyn Fn(&Connection, &[Event]) -> Result<(), BoxError> + Send + Sync;

impl Builder {
    /// Has tables of your own kept up to date in the transaction of each commit: who reads them finds every event that
    /// was acknowledged, and no other. The handler is given the new events, in the order of the log.
    ///
    /// ```
    /// # use evercore_sqlite::{Result, SqliteEngine};
    /// # fn main() -> Result<()> { futures_lite::future::block_on(async {
    /// let table = "CREATE TABLE IF NOT EXISTS shop_totals (aggregate INTEGER PRIMARY KEY, events INTEGER NOT NULL) STRICT";
    /// let builder = SqliteEngine::builder().inline_projection("totals", 1, move |sql, events| {
    ///     sql.execute_batch(table)?;
    ///     let mut count = sql.prepare_cached(
    ///         "INSERT INTO shop_totals VALUES (?1, 1) ON CONFLICT DO UPDATE SET events = events + 1",
    ///     )?;
    ///     for event in events {
    ///         count.execute([event.aggregate().get()])?;
    ///     }
    ///     Ok(())
    /// });
    /// let engine = builder.open_in_memory().await?;
    /// # let _ = engine;
    /// # Ok(()) }) }
    /// ```
    ///
    /// Its place in the log is a cursor of this name and version, partition 0 of 1, which is listed with those of
    /// subscriptions and is not to be run as one. A new name or version begins at the beginning of the log: all there is
    /// is handled while the store is opened, 1,000 events to a transaction. What another process commits without the
    /// projection is handled by the next commit here: before it begins, 1,000 events to a transaction and with pauses in
    /// which others can write, until 1,000 events at most are left for its own transaction. While its cursor is paused,
    /// retired or removed, it does nothing.
    ///
    /// To fill the tables anew, pause its cursor, reset it, empty the tables and resume it: what was committed between any
    /// two of these is then neither missing nor there twice. The next commit that has events does the rest, in the same way,
    /// and waits for it; for a long log a new version with tables of its own is better, which is filled while the store is
    /// opened.
    /// The cursor of a version that no program has any more stays where it is until it is
    /// [removed](evercore_core::EventStore::remove_subscription).
    ///
    /// Every commit waits for it, so it should be quick. It is held to what SQL in
    /// [`commit_with`](crate::SqliteEngine::commit_with) is held to; the [`sql_timeout`](Self::sql_timeout) is for up to
    /// 1,000 events. It may be given the same events again, after all of its writes were rolled back.
    ///
    /// If it fails, nothing of the unit of work is written, and the commit is
    /// [`Rejected`](crate::ErrorKind::Rejected) with the handler's own error as its source; others that were
    /// committed together with it are not affected. A panic goes on in who committed. The same is true of opening. What
    /// it cannot handle of that which others committed without it stands in the way of every commit here.
    pub fn inline_projection<F>(mut self, name: impl AsRef<str>, version: u32, handle: F) -> Self
    where
        F: Fn(&Connection, &[Event]) -> Result<(), BoxError> + Send + Sync + 'static,
    {
        let name = name.as_ref().to_owned();
        self.inline.push(InlineProjection { name, version, handle: Arc::new(handle) });
        self
    }
}

/// A projection as it was asked for.
#[derive(Clone)]
pub(crate) struct InlineProjection {
    name: String,
    version: u32,
    handle: Arc<Handle>,
}

impl fmt::Debug for InlineProjection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlineProjection")
            .field("name", &self.name)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// A projection that an engine runs.
pub(crate) struct Inline {
    id: CursorId,
    what: String,
    handle: Arc<Handle>,
}

impl Inline {
    /// Takes those whose names and versions can be; each cursor once.
    pub(crate) fn checked(projections: Vec<InlineProjection>) -> Result<Vec<Self>> {
        let mut checked: Vec<Self> = Vec::new();
        for InlineProjection { name, version, handle } in projections {
            let what = format!("the inline projection \"{name}\"");
            if version == 0 {
                return Err(Error::invalid(format!("{what} has version 0, the first is 1")));
            }
            let id = CursorId { subscription: SubscriptionName::new(name)?, version, partition: 0 };
            if checked.iter().any(|other| other.id == id) {
                return Err(Error::invalid(format!("{what} is there twice")));
            }
            checked.push(Self { id, what, handle });
        }
        Ok(checked)
    }

    /// Hands over the next events up to the head and moves the cursor, in the open transaction; whether there are more.
    /// `names` may learn what has not committed: they are this transaction's own.
    fn page(
        &self,
        connection: &Connection,
        store: &Store,
        names: &Names,
        head: Position,
    ) -> error::Result<bool> {
        let Some(at) = self.position(connection)?.filter(|at| *at < head) else { return Ok(false) };
        let events = log::between(connection, names, (at, head), PageLimit::events(PAGE)?)?;
        let events: Vec<Event> = events.iter().collect();
        let Some(last) = events.last().map(Event::position) else {
            return Err(damaged("the log has a gap"));
        };
        let sql = |connection: &Connection| (self.handle)(connection, &events);
        guard::run(connection, store.settings.sql_timeout, &self.what, sql)?;
        let (subscription, version) = self.key();
        connection.prepare_cached(MOVE)?.execute((subscription, version, last.get()))?;
        Ok(last < head)
    }

    /// A page in a transaction that does nothing else.
    fn next_page(&self, connection: &Connection, store: &Store) -> error::Result<bool> {
        self.page(connection, store, &store.names.copy(), LogEnd::read(connection)?.position)
    }

    /// How far it has come; `None` if it is not to move.
    fn position(&self, connection: &Connection) -> error::Result<Option<Position>> {
        let at = connection.prepare_cached(CURSOR)?.query_row(self.key(), |row| row.get(0)).optional()?;
        at.map(Position::new).transpose().map_err(damaged)
    }

    /// Whether more than a page is between it and this head.
    fn is_far(&self, connection: &Connection, head: Position) -> error::Result<bool> {
        let page = i64::try_from(PAGE).unwrap_or(i64::MAX);
        Ok(self.position(connection)?.is_some_and(|at| head.get().saturating_sub(at.get()) > page))
    }

    fn key(&self) -> (&str, u32) {
        (self.id.subscription.as_str(), self.id.version)
    }
}

/// Before a commit: all events that others have committed without a projection, up to a page at most, which is left for
/// the commit. `between` runs between two pages.
pub(crate) fn draw_near(store: &Store, between: impl Fn()) -> Result<()> {
    if store.inline.is_empty() {
        return Ok(());
    }
    // As of now: who commits meanwhile cannot keep this going.
    let head = store.ask(LogEnd::read)?.position;
    let mut shift = Shift::begin(store);
    for projection in &store.inline {
        while store.ask(|connection| projection.is_far(connection, head))? {
            store.write(|connection| projection.next_page(connection, store))?;
            between();
            shift.rest();
        }
    }
    Ok(())
}

/// Pages in transactions of their own follow one another so fast that others who wait for the file miss the gap.
struct Shift {
    began: Instant,
    has_others: bool,
}

impl Shift {
    fn begin(store: &Store) -> Self {
        Self { began: Instant::now(), has_others: store.path.is_some() }
    }

    /// Leaves the file to others if it was worked on for long.
    fn rest(&mut self) {
        if self.has_others && self.began.elapsed() >= SHIFT {
            thread::sleep(REST);
            self.began = Instant::now();
        }
    }
}

/// In the transaction of a commit: all events up to the new head.
pub(crate) fn follow(connection: &Connection, store: &Store, head: Position) -> error::Result<()> {
    if store.inline.is_empty() {
        return Ok(());
    }
    let names = store.names.copy();
    for projection in &store.inline {
        while projection.page(connection, store, &names, head)? {}
    }
    Ok(())
}

/// When a store is opened: all events there are, a page to a transaction.
pub(crate) fn catch_up(store: &Store) -> Result<()> {
    for projection in &store.inline {
        let declare = Step::declare(1, Position::ZERO, Some(Position::ZERO));
        store.write(|connection| subscriptions::take(connection, &projection.id, &declare))?;
        let mut shift = Shift::begin(store);
        while store.write(|connection| projection.next_page(connection, store))? {
            shift.rest();
        }
    }
    Ok(())
}

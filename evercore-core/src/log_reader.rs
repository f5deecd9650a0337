//! Reading the log from one end to the other, some pages ahead of whoever reads.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use crate::ahead::Ahead;
use crate::engine::{BoxFuture, Direction, Filter, LogPage, LogQuery, StorageEngine};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::mark::Witness;

/// How many pages are read at a time: the next one, and the one behind it where it is known where that begins.
const AHEAD: usize = 2;

/// Gives the log page by page; while one page is worked on, the next are already being read.
///
/// No event is skipped and none comes twice. Made by [`EventStore::log_reader`](crate::EventStore::log_reader).
///
/// ```
/// # use evercore_core::{EventStore, LogQuery, Position, Result};
/// async fn print(store: &EventStore) -> Result<()> {
///     let mut log = store.log_reader(LogQuery::after(Position::ZERO));
///     while let Some(page) = log.next().await? {
///         for event in &page.events {
///             println!("{} {}", event.position(), event.event_type());
///         }
///     }
///     Ok(())
/// }
/// ```
pub struct LogReader {
    engine: Arc<dyn StorageEngine>,
    /// Begins where the pages that were handed out end.
    query: LogQuery,
    /// The pages behind it that are on their way, in order.
    reading: VecDeque<Reading>,
    /// An engine that reads in the caller's time is asked for a page when that page is wanted, and not before.
    reads_ahead: bool,
    /// Whether pages are as long as they may be, so that the one behind the next can be asked for.
    are_full: bool,
    is_at_end: bool,
    /// The event where the pages end that were handed out.
    read: Option<Witness>,
}

/// A page on its way.
struct Reading {
    from: Position,
    page: Ahead<'static, Result<LogPage>>,
}

impl LogReader {
    pub(crate) fn new(engine: Arc<dyn StorageEngine>, query: LogQuery) -> Self {
        Self {
            engine,
            query,
            reading: VecDeque::new(),
            reads_ahead: true,
            are_full: true,
            is_at_end: false,
            read: None,
        }
    }

    /// The same, behind an event that was read before.
    pub(crate) fn behind(self, read: Option<Witness>) -> Self {
        Self { read: read.filter(|read| read.position == self.query.from), ..self }
    }

    /// The event where the pages end that were handed out.
    pub(crate) fn witness(&self) -> Option<Witness> {
        self.read
    }

    /// The next page; `None` at the end of what there was when the page before was read. After that it looks again:
    /// a reader may go on for ever, with [`EventStore::wait`](crate::EventStore::wait) in between.
    ///
    /// A page without events is one in which nothing passed the filter. The future may be dropped and `next` called
    /// again: nothing is lost by that. After an error the same page is asked for again.
    ///
    /// # Errors
    /// As [`EventStore::read_log`](crate::EventStore::read_log), each in the place of the page that it is about;
    /// [`TailLost`](ErrorKind::TailLost) if the log has lost what was handed out last: make a new reader, from where you
    /// are sure of.
    pub async fn next(&mut self) -> Result<Option<LogPage>> {
        if std::mem::take(&mut self.is_at_end) {
            return Ok(None);
        }
        let page = self.page().await.map_err(|error| self.explained(error))?;
        self.check(&page)?;
        if page.scanned == std::mem::replace(&mut self.query.from, page.scanned) {
            return Ok(None);
        }
        self.is_at_end = match self.query.direction {
            Direction::Forward => page.scanned >= page.head.min(self.query.to),
            Direction::Backward => page.scanned <= self.query.to,
        };
        if !self.is_at_end {
            self.read_ahead(page.head).await;
        }
        Ok(Some(page))
    }

    /// A page goes on where the last one ended, by the same event.
    fn check(&mut self, page: &LogPage) -> Result<()> {
        if self.query.direction == Direction::Backward {
            return Ok(());
        }
        if let Some(read) = self.read.filter(|read| !read.stands(page.began)) {
            self.reading.clear();
            return Err(Error::tail_lost(read.position));
        }
        self.read = page.witness();
        Ok(())
    }

    /// A reader is ahead of the log that has read to there because the log has lost its tail.
    fn explained(&self, error: Error) -> Error {
        match (error.kind(), self.read) {
            (ErrorKind::CursorAhead { .. }, Some(read)) => Error::tail_lost(read.position).with_source(error),
            _ => error,
        }
    }

    /// Begins to read what comes next, unless the engine reads in the caller's time.
    async fn read_ahead(&mut self, head: Position) {
        self.drop_what_does_not_follow();
        while self.reads_ahead && self.reading.len() < AHEAD {
            let Some(from) = self.behind_what_is_read(head) else { return };
            let page = Ahead::new(self.read(from)).begun().await;
            self.reads_ahead = !page.is_done();
            self.reading.push_back(Reading { from, page });
        }
    }

    /// A page that ended early, at its limit of bytes or at the end of the log, has another beginning behind it.
    fn drop_what_does_not_follow(&mut self) {
        if self.reading.front().is_some_and(|next| next.from != self.query.from) {
            self.reading.clear();
            self.are_full = false;
        }
    }

    /// Where to begin behind all that is being read. Positions have no holes, so going forward through all of the log a
    /// full page ends where it began and the number of its events further; for other pages that cannot be known.
    fn behind_what_is_read(&self, head: Position) -> Option<Position> {
        let Some(last) = self.reading.back() else { return Some(self.query.from) };
        let is_known = self.are_full
            && self.query.direction == Direction::Forward
            && self.query.filter == Filter::all()
            && self.query.limit.max_events() > 0;
        let behind = last.from.plus(self.query.limit.max_events());
        (is_known && behind < head.min(self.query.to)).then_some(behind)
    }

    /// What is being read stays here until it is there: whoever drops this future can come back for it.
    async fn page(&mut self) -> Result<LogPage> {
        self.drop_what_does_not_follow();
        if self.reading.is_empty() {
            let from = self.query.from;
            self.reading.push_back(Reading { from, page: Ahead::new(self.read(from)) });
        }
        let page = match self.reading.front_mut() {
            Some(reading) => (&mut reading.page).await,
            None => self.read(self.query.from).await,
        };
        self.reading.pop_front();
        page
    }

    fn read(&self, from: Position) -> BoxFuture<'static, Result<LogPage>> {
        let (engine, query) = (Arc::clone(&self.engine), LogQuery { from, ..self.query.clone() });
        Box::pin(async move { engine.read_log(&query).await })
    }

    /// How far the pages that were handed out go: the cursor to go on from later.
    pub fn position(&self) -> Position {
        self.query.from
    }
}

impl fmt::Debug for LogReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogReader").field("query", &self.query).finish_non_exhaustive()
    }
}

//! Reads the log from one end to the other, some pages ahead of the caller.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::ahead::Ahead;
use crate::contract::{Direction, Filter, LogPage, LogQuery, StorageEngine};
use crate::error::{Error, ErrorKind, Result};
use crate::future::BoxFuture;
use crate::ids::Position;
use crate::mark::Witness;

/// How many pages are read at a time: the next one, and the one after it if its start is known.
const AHEAD: usize = 2;

/// Returns the log page by page. While the caller works on one page, the next ones are being read.
///
/// It skips no event and returns none twice. Made by [`EventStore::log_reader`](crate::EventStore::log_reader).
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
    /// Begins after the last page that was returned.
    query: LogQuery,
    /// The next pages that are being read, in order.
    reading: VecDeque<Reading>,
    /// Whether to read ahead. It gains nothing with an engine that reads on the caller's thread.
    reads_ahead: bool,
    /// Whether the last page was full. Then the start of the page after the next is known.
    are_full: bool,
    is_at_end: bool,
    /// The last event of the pages that were returned.
    read: Option<Witness>,
}

/// A page that is being read.
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

    /// The same reader, after an event that was read before.
    pub(crate) fn behind(self, read: Option<Witness>) -> Self {
        Self { read: read.filter(|read| read.position == self.query.from), ..self }
    }

    /// The last event of the pages that were returned.
    pub(crate) fn witness(&self) -> Option<Witness> {
        self.read
    }

    /// The next page; `None` at the end of the log, as it was when the page before was read. The next call queries the log
    /// again, so a reader can go on without end, with [`EventStore::wait`](crate::EventStore::wait) in between.
    ///
    /// A page may be empty, if no event in it passed the filter. The future may be dropped: the next call returns the same
    /// page. So does the next call after an error.
    ///
    /// # Errors
    /// As [`EventStore::read_log`](crate::EventStore::read_log), in place of the page that failed;
    /// [`TailLost`](ErrorKind::TailLost) if the log has lost the last events that were returned: make a new reader, from a
    /// position that you trust.
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

    /// One poll of [`next`](Self::next).
    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<LogPage>>> {
        pin!(self.next()).poll(context)
    }

    /// A page must continue from the event at which the last one ended.
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

    /// If the reader is past the end of the log and has read up to there, then the log has lost its tail.
    fn explained(&self, error: Error) -> Error {
        match (error.kind(), self.read) {
            (ErrorKind::CursorAhead { .. }, Some(read)) => Error::tail_lost(read.position).with_source(error),
            _ => error,
        }
    }

    /// Starts reading the next pages, unless the engine reads on the caller's thread.
    async fn read_ahead(&mut self, head: Position) {
        self.drop_what_does_not_follow();
        while self.reads_ahead && self.reading.len() < AHEAD {
            let Some(from) = self.behind_what_is_read(head) else { return };
            let page = Ahead::new(self.read(from)).begun().await;
            self.reads_ahead = !page.is_done();
            self.reading.push_back(Reading { from, page });
        }
    }

    /// If a page ended early, at its limit of bytes or at the end of the log, the next page starts elsewhere than assumed.
    fn drop_what_does_not_follow(&mut self) {
        if self.reading.front().is_some_and(|next| next.from != self.query.from) {
            self.reading.clear();
            self.are_full = false;
        }
    }

    /// The start of the page after all that are being read. Positions have no gaps, so a full page that reads the whole log
    /// forward ends as many positions later as it has events. The end of any other page is not known before it is read.
    fn behind_what_is_read(&self, head: Position) -> Option<Position> {
        let Some(last) = self.reading.back() else { return Some(self.query.from) };
        let is_known = self.are_full
            && self.query.direction == Direction::Forward
            && self.query.filter == Filter::all()
            && self.query.limit.max_events() > 0;
        let behind = last.from.plus(self.query.limit.max_events());
        (is_known && behind < head.min(self.query.to)).then_some(behind)
    }

    /// The page stays here until it is read, so this future may be dropped.
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

    /// The end of the pages that were returned: the position to continue from later.
    pub fn position(&self) -> Position {
        self.query.from
    }
}

impl fmt::Debug for LogReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogReader").field("query", &self.query).finish_non_exhaustive()
    }
}

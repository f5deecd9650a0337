//! Reading the log from one end to the other, a page ahead of whoever reads.

use std::fmt;
use std::sync::Arc;

use crate::ahead::Ahead;
use crate::engine::{BoxFuture, Direction, LogPage, LogQuery, StorageEngine};
use crate::error::Result;
use crate::ids::Position;

/// Gives the log page by page; while one page is worked on, the next is already being read.
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
    reading: Option<Ahead<'static, Result<LogPage>>>,
    /// An engine that reads in the caller's time is asked for a page when that page is wanted, and not before.
    reads_ahead: bool,
    is_at_end: bool,
}

impl LogReader {
    pub(crate) fn new(engine: Arc<dyn StorageEngine>, query: LogQuery) -> Self {
        Self { engine, query, reading: None, reads_ahead: true, is_at_end: false }
    }

    /// The next page; `None` at the end of what there was when the page before was read. After that it looks again:
    /// a reader may go on for ever, with [`EventStore::wait`](crate::EventStore::wait) in between.
    ///
    /// A page without events is one in which nothing passed the filter. The future may be dropped and `next` called
    /// again: nothing is lost by that. After an error the same page is asked for again.
    ///
    /// # Errors
    /// As [`EventStore::read_log`](crate::EventStore::read_log), each in the place of the page that it is about.
    pub async fn next(&mut self) -> Result<Option<LogPage>> {
        if std::mem::take(&mut self.is_at_end) {
            return Ok(None);
        }
        let page = self.page().await?;
        if page.scanned == std::mem::replace(&mut self.query.from, page.scanned) {
            return Ok(None);
        }
        self.is_at_end = match self.query.direction {
            Direction::Forward => page.scanned >= page.head.min(self.query.to),
            Direction::Backward => page.scanned <= self.query.to,
        };
        if self.reads_ahead && !self.is_at_end {
            let reading = Ahead::new(self.read()).begun().await;
            self.reads_ahead = !reading.is_done();
            self.reading = Some(reading);
        }
        Ok(Some(page))
    }

    /// What is being read stays here until it is there: whoever drops this future can come back for it.
    async fn page(&mut self) -> Result<LogPage> {
        let reading = match self.reading.take() {
            Some(reading) => reading,
            None => Ahead::new(self.read()),
        };
        let page = self.reading.insert(reading).await;
        self.reading = None;
        page
    }

    fn read(&self) -> BoxFuture<'static, Result<LogPage>> {
        let (engine, query) = (Arc::clone(&self.engine), self.query.clone());
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

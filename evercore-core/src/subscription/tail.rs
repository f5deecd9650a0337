//! The log as it grows, page by page.

use std::sync::Arc;
use std::time::Duration;

use crate::contract::{LogPage, LogQuery, StorageEngine};
use crate::error::Result;
use crate::ids::Position;
use crate::log_reader::LogReader;
use crate::mark::Witness;
use crate::race::{First, race};

/// Reads to the end of the log and waits there for more.
#[derive(Debug)]
pub(crate) struct Tail {
    engine: Arc<dyn StorageEngine>,
    reader: LogReader,
    /// Where to end, if not at the end of all time.
    bound: Position,
}

impl Tail {
    /// `read`: the event at which the query begins, if that was read before.
    pub(crate) fn new(engine: &Arc<dyn StorageEngine>, query: LogQuery, read: Option<Witness>) -> Self {
        let bound = query.to;
        let reader = LogReader::new(Arc::clone(engine), query).behind(read);
        Self { engine: Arc::clone(engine), reader, bound }
    }

    /// The event where the pages end that were handed out.
    pub(crate) fn witness(&self) -> Option<Witness> {
        self.reader.witness()
    }

    /// The next page; without events if nothing passed the filter. `None` if no page came in that time, or the bound is
    /// reached. The next call then goes on with the same read. Dropped, it loses nothing.
    pub(crate) async fn next(&mut self, at_most: Duration) -> Result<Option<LogPage>> {
        let engine = Arc::clone(&self.engine);
        let time_is_up = async move { engine.pause(at_most).await };
        match race(self.page(at_most), time_is_up).await {
            First::Left(page) => page,
            First::Right(()) => Ok(None),
        }
    }

    async fn page(&mut self, at_most: Duration) -> Result<Option<LogPage>> {
        if let Some(page) = self.reader.next().await? {
            return Ok(Some(page));
        }
        let position = self.reader.position();
        if position >= self.bound || self.engine.wait(position, at_most).await? <= position {
            return Ok(None);
        }
        self.reader.next().await
    }

    /// Whether it will find nothing more, however long it waits.
    pub(crate) fn is_at_bound(&self) -> bool {
        self.reader.position() >= self.bound
    }

    /// Where it ends.
    pub(crate) fn bound(&self) -> Position {
        self.bound
    }

    /// Up to where the pages go that were handed out.
    pub(crate) fn position(&self) -> Position {
        self.reader.position()
    }
}

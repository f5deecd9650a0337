//! Ephemeral subscriptions: they live as long as their process and store nothing.

use std::time::Duration;

use super::settings::Start;
use super::tail::{Tail, TailPage};
use crate::contract::{Filter, LogPage, LogQuery};
use crate::error::Result;
use crate::event::Events;
use crate::ids::Position;
use crate::page_limit::PageLimit;
use crate::store::EventStore;

/// The longest single wait for the log. Another one follows it.
const WAIT: Duration = Duration::from_secs(60);

impl EventStore {
    /// Follows the log from `start` on, as long as the returned value lives. No cursor is stored. Use it for caches, live
    /// views, and anything else that a process builds again when it starts.
    ///
    /// ```
    /// # use evercore_core::{EventStore, Filter, Result, Start};
    /// # async fn follow(store: &EventStore) -> Result<()> {
    /// let mut news = store.subscribe(Filter::all(), Start::End).await?;
    /// loop {
    ///     for event in &news.next().await? {
    ///         println!("{} {}", event.position(), event.event_type());
    ///     }
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`CursorAhead`](crate::ErrorKind::CursorAhead) if the start is past the end of the log; those of the engine.
    pub async fn subscribe(&self, filter: Filter, start: Start) -> Result<EphemeralSubscription> {
        let from = start.resolve(self, self.head().await?).await?;
        let query = LogQuery::after(from).with_filter(filter);
        Ok(EphemeralSubscription { store: self.clone(), tail: Tail::new(self, query.clone(), None), query })
    }
}

/// Events as they are committed, in the order of the log, none missing, none twice. Made by [`EventStore::subscribe`].
#[derive(Debug)]
pub struct EphemeralSubscription {
    store: EventStore,
    query: LogQuery,
    tail: Tail,
}

impl EphemeralSubscription {
    /// Limits the events and bytes of one batch; 0 events count as 1. Call it before the first [`next`](Self::next).
    #[must_use]
    pub fn with_batch(mut self, limit: PageLimit) -> Self {
        self.query = self.query.with_limit(limit.at_least_one());
        self.query.from = self.tail.position();
        self.tail = Tail::new(&self.store, self.query.clone(), self.tail.witness());
        self
    }

    /// Waits for the next events and returns at least one. The future may be dropped: the next call returns the same events.
    /// So does the next call after an error.
    ///
    /// # Errors
    /// [`TailLost`](crate::ErrorKind::TailLost) if the log has lost the last events that were returned: subscribe again,
    /// from a position that you trust. Those of the engine.
    pub async fn next(&mut self) -> Result<Events> {
        loop {
            let events = self.next_page().await?.events;
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }

    /// Waits for the log to grow and returns the next page. A page may be empty, if no event in it passed the filter. With
    /// it the caller can follow its [`position`](Self::position).
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub async fn next_page(&mut self) -> Result<LogPage> {
        loop {
            if let Some(TailPage { page, .. }) = self.tail.next(WAIT).await? {
                return Ok(page);
            }
        }
    }

    /// Every event up to here was returned or did not pass the filter.
    pub fn position(&self) -> Position {
        self.tail.position()
    }
}

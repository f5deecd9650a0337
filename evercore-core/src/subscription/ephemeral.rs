//! Subscriptions of a process, for as long as it lives: nothing is written.

use std::time::Duration;

use super::settings::Start;
use super::tail::Tail;
use crate::engine::{Filter, LogPage, LogQuery, PageLimit};
use crate::error::Result;
use crate::event::Events;
use crate::ids::Position;
use crate::store::EventStore;

/// How long one wait for the log lasts at most; then comes the next.
const WAIT: Duration = Duration::from_secs(60);

impl EventStore {
    /// Follows the log from `start` on, for as long as the subscription is held; no row is written. For caches, live
    /// views, anything that begins anew with its process.
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
    /// [`CursorAhead`](crate::ErrorKind::CursorAhead) if the start lies behind the end of the log; what the engine says
    /// when it is out of reach.
    pub async fn subscribe(&self, filter: Filter, start: Start) -> Result<EphemeralSubscription> {
        let from = start.resolve(self).await?;
        let query = LogQuery::after(from).with_filter(filter);
        Ok(EphemeralSubscription {
            store: self.clone(),
            tail: Tail::new(self.engine(), query.clone(), None),
            query,
        })
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
    /// The same with at most so much at once; to be said before the first [`next`](Self::next). 0 events count as 1.
    #[must_use]
    pub fn with_batch(mut self, limit: PageLimit) -> Self {
        self.query = self.query.with_limit(limit.at_least_one());
        self.query.from = self.tail.position();
        self.tail = Tail::new(self.store.engine(), self.query.clone(), self.tail.witness());
        self
    }

    /// The next events, one at least, as soon as there are some. The future may be dropped and `next` called again:
    /// nothing is lost by that. After an error the same events are asked for again.
    ///
    /// # Errors
    /// [`TailLost`](crate::ErrorKind::TailLost) if the log has lost what was handed out last: subscribe anew, from where
    /// you are sure of. What the engine says when it is out of reach.
    pub async fn next(&mut self) -> Result<Events> {
        loop {
            let events = self.next_page().await?.events;
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }

    /// The next page of the log, as soon as it has grown: also one without events, in which nothing passed the filter. For
    /// those who want to know how far they are.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub async fn next_page(&mut self) -> Result<LogPage> {
        loop {
            if let Some(page) = self.tail.next(WAIT).await? {
                return Ok(page);
            }
        }
    }

    /// Everything up to here was handed out or did not pass the filter.
    pub fn position(&self) -> Position {
        self.tail.position()
    }
}

//! How large a page may become.

use crate::error::{Error, Result};
use crate::limits;

/// The most events and bytes of a page. A page ends at the limit that it meets first, but has at least one event (unless
/// `events` is 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLimit {
    events: usize,
    bytes: usize,
}

impl PageLimit {
    /// The limit for replaying a history. Such small pages stay in the processor's caches: on SQLite, with histories of
    /// 10,000 events, pages of 10,000 were slower by a third.
    pub(crate) const FOLD: Self = Self { events: 1_000, bytes: 512 * 1024 };

    /// At most this many events, and the default number of bytes.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) over [`limits::PAGE_EVENTS`].
    pub fn events(events: usize) -> Result<Self> {
        check_page("events", events, limits::PAGE_EVENTS)?;
        Ok(Self { events, ..Self::default() })
    }

    /// The same limit with at most this many bytes: payloads, references, correlation and causation ids, and headers.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) over [`limits::PAGE_BYTES`].
    pub fn and_bytes(self, bytes: usize) -> Result<Self> {
        check_page("bytes", bytes, limits::PAGE_BYTES)?;
        Ok(Self { bytes, ..self })
    }

    /// The most events.
    pub const fn max_events(self) -> usize {
        self.events
    }

    /// The most bytes, as [`and_bytes`](Self::and_bytes) counts them.
    pub const fn max_bytes(self) -> usize {
        self.bytes
    }

    /// The same limit with at least one event, so that a reader always makes progress.
    pub(crate) fn at_least_one(self) -> Self {
        Self { events: self.events.max(1), ..self }
    }

    /// The same limit for this many readers of one page, each of which gets its part of the events.
    pub(crate) fn times(self, readers: u32) -> Self {
        let events = self.events.saturating_mul(readers as usize).min(limits::PAGE_EVENTS.max(self.events));
        let bytes =
            self.bytes.saturating_mul(readers as usize).min(limits::DEFAULT_PAGE_BYTES.max(self.bytes));
        Self { events, bytes }
    }

    /// A limit that has room for the pages of both.
    pub(crate) fn or_more(self, other: Self) -> Self {
        Self { events: self.events.max(other.events), bytes: self.bytes.max(other.bytes) }
    }

    /// Whether a page that holds `events` events and `bytes` bytes has room for one event of `next` bytes.
    pub(crate) const fn has_room(self, events: usize, bytes: usize, next: usize) -> bool {
        events < self.events && (events == 0 || bytes + next <= self.bytes)
    }
}

impl Default for PageLimit {
    fn default() -> Self {
        Self { events: limits::DEFAULT_PAGE_EVENTS, bytes: limits::DEFAULT_PAGE_BYTES }
    }
}

fn check_page(what: &str, count: usize, limit: usize) -> Result<()> {
    if count > limit {
        return Err(Error::invalid(format!("a page of {count} {what}, the limit is {limit}")));
    }
    Ok(())
}

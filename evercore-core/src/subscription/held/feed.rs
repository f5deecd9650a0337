//! The events after a cursor: they are read ahead, grouped into deliveries, and read again if they are put back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Held;
use crate::contract::LogQuery;
use crate::error::Result;
use crate::event::Event;
use crate::ids::Position;
use crate::race::{First, race};
use crate::subscription::delivery::Delivery;
use crate::subscription::tail::{Tail, TailPage};

impl Held {
    pub(super) fn read_from(&mut self, bound: Position) {
        let settings = &self.subscription.settings;
        let query = LogQuery::after(self.taken_to)
            .up_to(bound)
            .with_filter(settings.read_filter())
            .with_limit(settings.batch.times(settings.partitions));
        self.tail = Tail::new(&self.subscription.store, query, self.read);
    }

    /// Whether all returned events are acknowledged, so that the cursor may move past events that are not for this
    /// subscription.
    pub(crate) fn has_nothing_out(&self) -> bool {
        self.handed_out <= self.cursor.position
    }

    /// The next delivery; `None` if no event came in that time. An event is returned once, unless it is
    /// [put back](Self::put_back).
    pub(crate) async fn next(&mut self, at_most: Duration) -> Result<Option<Delivery>> {
        if let Some(delivery) = self.take_pending() {
            return Ok(Some(delivery));
        }
        let at_most = self.passes_by_in().map_or(at_most, |time| at_most.min(time));
        // A page may take longer than the lease lasts. The next call goes on with the same read.
        let at_most = at_most.min(self.next_renewal.saturating_duration_since(Instant::now()));
        let came = self.awaited.came.after(self.waits_seen);
        let page = match race(self.tail.next(at_most), came).await {
            First::Left(page) => page?,
            // The cursor may have to move for a caller that waits.
            First::Right(()) => {
                self.waits_seen = self.awaited.came.count();
                None
            }
        };
        let Some(page) = page else {
            if self.tail.has_caught_up() {
                (self.is_idle, self.has_read) = (true, true);
            }
            return Ok(None);
        };
        self.has_read = true;
        self.add(&page);
        Ok(self.take_pending())
    }

    pub(super) fn add(&mut self, TailPage { page, read }: &TailPage) {
        let (settings, partition) = (&self.subscription.settings, self.context.id.partition);
        for event in page.events.iter().filter(|event| settings.is_wanted(event)) {
            self.moves_soon = true;
            if settings.partition_of(&event) == partition {
                self.pending.push_back(event);
            }
        }
        self.pending_end = page.scanned;
        self.read = *read;
        self.head = page.head;
    }

    /// Events go out together that are all live or all replay, and to the end of what was read or one by one.
    pub(super) fn take_pending(&mut self) -> Option<Delivery> {
        let batch = self.subscription.settings.batch;
        let (mut events, mut bytes) = (Vec::new(), 0);
        let mut is_replay = false;
        while let Some(next) = self.pending.front() {
            if self.held_back.contains(&next.aggregate()) {
                self.taken_to = next.position();
                self.pending.pop_front();
                continue;
            }
            let is_next_replay = self.is_replay(next.position());
            let has_failed = self.failed.is_some_and(|(failed, _)| failed == next.position());
            let is_unknown = self.subscription.settings.is_unknown(next.event_type());
            let goes_alone = next.position() <= self.alone_to || has_failed || is_unknown;
            let size = next.as_row().bytes();
            let is_full = events.len() >= self.size || !batch.has_room(events.len(), bytes, size);
            if !events.is_empty() && (goes_alone || is_full || is_next_replay != is_replay) {
                break;
            }
            bytes += size;
            is_replay = is_next_replay;
            self.taken_to = next.position();
            events.extend(self.pending.pop_front());
            if goes_alone {
                break;
            }
        }
        if self.pending.is_empty() {
            self.taken_to = self.taken_to.max(self.pending_end);
        }
        let tried = events.first().map_or(0, |first: &Event| self.tries_of(first.position()));
        self.handed_out = events.last().map_or(self.handed_out, |last: &Event| last.position());
        self.is_idle &= events.is_empty();
        (!events.is_empty()).then(|| Delivery {
            events: events.into(),
            context: Arc::clone(&self.context),
            attempt: tried.saturating_add(1),
            is_replay,
            end: self.taken_to,
        })
    }

    /// How often the next event was tried before, alone or with others, and by other owners.
    fn tries_of(&self, position: Position) -> u32 {
        let lost = if self.has_nothing_out() { self.cursor.lost_leases } else { 0 };
        let failed = match self.failed {
            Some((failed, tries)) if failed == position => tries,
            _ => u32::from(position <= self.alone_to),
        };
        failed.saturating_add(lost)
    }

    /// Returns the events after the first ones again, without reading them again. If events of some aggregates wait for
    /// a parked one, the log is read again: such events were passed over, and the cursor is before them now.
    pub(crate) fn return_rest(&mut self, delivery: &Delivery, handled: usize) {
        if !self.held_back.is_empty() {
            return self.put_back();
        }
        for event in delivery.events().iter().skip(handled).rev() {
            self.pending.push_front(event.clone());
        }
        self.taken_to = self.cursor.position;
        self.handed_out = self.cursor.position;
    }

    pub(super) fn is_replay(&self, position: Position) -> bool {
        self.cursor.live_from.is_none_or(|from| position <= from)
    }

    /// Returns unhandled events again, the next `alone` of them one by one, because one of those fails.
    pub(crate) fn put_back_alone(&mut self, delivery: &Delivery, handled: usize, alone: usize) {
        let mut tried = delivery.events().iter().skip(handled).take(alone);
        if let Some(last) = tried.next_back() {
            self.alone_to = last.position();
        }
        self.put_back();
    }

    /// Reads again from the cursor on, since events that were passed over may be for this subscription now.
    pub(crate) fn put_back(&mut self) {
        self.pending.clear();
        self.taken_to = self.cursor.position;
        self.handed_out = self.cursor.position;
        self.pending_end = self.cursor.position;
        self.read = None;
        self.read_from(self.tail.bound());
    }
}

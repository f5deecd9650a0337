//! The parked events of a cursor: which aggregates wait for them, and which of them are tried again.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Held;
use crate::contract::LogQuery;
use crate::error::Result;
use crate::event::Event;
use crate::ids::Position;
use crate::limits;
use crate::page_limit::PageLimit;
use crate::subscription::cursor::{Parked, ParkedChange};
use crate::subscription::delivery::Delivery;
use crate::time::Timestamp;

/// How many parked events are read at once.
const PARKED_PAGE: usize = 1_000;

impl Held {
    /// Reads the parked events again if an operator has changed them, or if some may be due by time.
    pub(crate) async fn look_at_parked(&mut self) -> Result<()> {
        let is_time = self.parked_again_at.is_some_and(|time| Instant::now() >= time);
        if !self.parked_were_changed() && !is_time {
            return Ok(());
        }
        let (again, now) = (self.subscription.settings.retry_parked, Timestamp::now());
        let left = |parked: &Parked| again.map(|again| again.saturating_sub(now.since(parked.parked_at)));
        let mut next: Option<Duration> = None;
        let mut is_due = |parked: &Parked| {
            let left = left(parked);
            if parked.is_due || left == Some(Duration::ZERO) {
                return true;
            }
            next = next.into_iter().chain(left).min();
            false
        };
        let (changes, engine) = (self.cursor.parked_changes, Arc::clone(self.subscription.store.engine()));
        let (mut held_back, mut due, mut after) = (HashSet::new(), Vec::new(), Position::ZERO);
        let mut count = 0;
        loop {
            let page = engine.parked(&self.context.id, after, PARKED_PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.position;
            count += page.len();
            held_back.extend(page.iter().filter(|parked| parked.holds_back).map(|parked| parked.aggregate));
            due.extend(page.into_iter().filter(&mut is_due));
        }
        due.reverse(); // taken from the end
        (self.held_back, self.due, self.parked_seen) = (held_back, due, Some(changes));
        self.parked_count = count;
        self.parked_again_at = next.and_then(|next| Instant::now().checked_add(next));
        crate::observe::held_back(&self.context.id, self.held_back.len());
        Ok(())
    }

    /// Whether operators have changed parked events since they were read.
    pub(crate) fn parked_were_changed(&self) -> bool {
        self.parked_seen != Some(self.cursor.parked_changes)
    }

    /// Reads the parked events again, and takes this one if it was not dropped.
    pub(crate) async fn take_due(&mut self, parked: &Parked) -> Result<bool> {
        self.look_at_parked().await?;
        let place = self.due.iter().position(|due| due.position == parked.position);
        Ok(place.map(|place| self.due.remove(place)).is_some())
    }

    /// The next parked event to try again, and the change of its row if it is handled.
    pub(crate) async fn next_due(&mut self) -> Result<Option<(Parked, Delivery, Vec<ParkedChange>)>> {
        let Some(parked) = self.due.pop() else { return Ok(None) };
        let before = Position::new(parked.position.get() - 1)?;
        let limit = PageLimit::events(2)?.and_bytes(limits::PAGE_BYTES)?;
        let settings = &self.subscription.settings;
        let filter = settings.read_filter().with_aggregate(parked.aggregate);
        let mut query = LogQuery::after(before).with_limit(limit).with_filter(filter);
        if settings.filter.aggregate().is_some_and(|only| only != parked.aggregate) {
            query = query.up_to(before);
        } else if parked.holds_back {
            // It, and the next of its aggregate that had to wait.
            query = query.up_to(self.taken_to);
        } else {
            query = query.up_to(parked.position);
        }
        let partition = self.context.id.partition;
        let is_own = |event: &Event| settings.partition_of(event) == partition && settings.is_wanted(event);
        let (mut event, mut next) = (None, None);
        while next.is_none() && query.from < query.to {
            let page = self.subscription.store.read_log(&query).await?;
            for found in page.events.iter().filter(&is_own) {
                let place = if found.position() == parked.position { &mut event } else { &mut next };
                place.get_or_insert(found);
            }
            if page.scanned <= query.from {
                break;
            }
            query.from = page.scanned;
        }
        let mut changes = vec![ParkedChange::Remove(parked.position)];
        if let Some(next) = next {
            let waiting = Parked {
                position: next.position(),
                attempts: 0,
                error: String::new(),
                is_due: true,
                ..parked.clone()
            };
            changes.push(ParkedChange::Keep(waiting));
        }
        // One that the filter does not let through any more is done.
        let events: Vec<Event> = event.into_iter().collect();
        let delivery = Delivery {
            is_replay: self.is_replay(parked.position),
            events: events.into(),
            context: Arc::clone(&self.context),
            attempt: parked.attempts.saturating_add(1),
            end: self.taken_to,
        };
        Ok(Some((parked, delivery, changes)))
    }

    /// Whether no more events may be parked.
    pub(crate) fn parked_are_too_many(&self) -> bool {
        self.parked_count >= self.subscription.settings.most_parked
    }

    /// This time, or less if parked events will be tried again earlier.
    pub(crate) fn until_parked_again(&self, time: Duration) -> Duration {
        match self.parked_again_at {
            Some(again) => time.min(again.saturating_duration_since(Instant::now())),
            None => time,
        }
    }

    /// Reads the parked events again after this time, or earlier.
    pub(crate) fn look_at_parked_after(&mut self, time: Duration) {
        let time = Instant::now().checked_add(time);
        self.parked_again_at = self.parked_again_at.into_iter().chain(time).min();
    }

    /// Whether there are parked events to try again.
    pub(crate) fn has_due(&self) -> bool {
        !self.due.is_empty()
    }

    /// The present rows of parked events. `was_parked`: whether this one was parked before.
    pub(crate) fn note_parked(&mut self, changes: &[ParkedChange], of: &Parked, was_parked: bool) {
        let mut holds_back = false;
        self.parked_count = self.parked_count.saturating_sub(usize::from(was_parked));
        for change in changes {
            if let ParkedChange::Keep(kept) = change {
                self.parked_count += 1;
                if let Some(again) = self.subscription.settings.retry_parked {
                    self.look_at_parked_after(again);
                }
                holds_back |= kept.holds_back;
                if kept.is_due {
                    self.due.push(kept.clone());
                }
            }
        }
        if of.holds_back && !holds_back {
            self.held_back.remove(&of.aggregate);
        } else if holds_back {
            self.held_back.insert(of.aggregate);
        }
        crate::observe::held_back(&self.context.id, self.held_back.len());
    }
}

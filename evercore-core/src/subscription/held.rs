//! A cursor in hand: its lease kept, the log read on from it, what is to be delivered next.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::cursor::{Cursor, CursorStatus, Lease, Parked, ParkedChange};
use super::delivery::{Context, Delivery};
use super::settings::Subscription;
use super::step::{Advance, Step};
use super::tail::Tail;
use crate::engine::{LogPage, LogQuery};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::ids::{AggregateId, Position};
use crate::limits;
use crate::mark::Witness;
use crate::name::OwnerId;
use crate::race::{First, race};

/// How long the cursor may stand behind what was passed over, before it is moved for that alone.
const PASS_BY: Duration = Duration::from_millis(50);

/// How many parked events are read at once.
const PARKED_PAGE: usize = 1_000;

/// How often a lease is renewed again whose renewal the engine did not answer.
const RENEW_AGAIN: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) subscription: Subscription,
    /// As it was when it was last stepped on.
    pub(crate) cursor: Cursor,
    pub(crate) context: Arc<Context>,
    /// Before the lease was asked for or renewed the last time, by a clock that does not jump.
    renewed_at: Instant,
    next_renewal: Instant,
    moved_at: Instant,
    began_at: Position,
    tail: Tail,
    /// Where the log ended when it was last read.
    head: Position,
    /// What was read and is not yet taken, and where the cursor stands when it is done.
    pending: VecDeque<Event>,
    pending_end: Position,
    /// The event at which the last page ended.
    read: Option<Witness>,
    /// Everything up to here was handed out or passed over.
    taken_to: Position,
    /// The last event that was handed out.
    handed_out: Position,
    /// Deliver one by one up to here, because one of them fails.
    alone_to: Position,
    /// How often operators had changed something by then.
    heard: u64,
    parked_seen: Option<i64>,
    held_back: HashSet<AggregateId>,
    due: Vec<Parked>,
}

impl Held {
    /// Gets the lease of a partition.
    pub(crate) async fn claim(
        subscription: &Subscription,
        partition: u32,
        owner: &OwnerId,
        is_stopping: Arc<AtomicBool>,
    ) -> Result<Self> {
        let (id, engine) = (subscription.cursor_id(partition), subscription.store.engine());
        let (asked_at, heard) = (Instant::now(), subscription.store.operator_calls().count());
        let claim = Step::claim(owner.clone(), subscription.settings.lease);
        let cursor = engine.step(&id, &claim).await?.ok_or_else(|| gone(subscription))?;
        let lease = Lease { owner: owner.clone(), epoch: cursor.epoch };
        let mut held = Self {
            tail: Tail::new(engine, LogQuery::after(cursor.position), None),
            context: Arc::new(Context { id, lease, is_stopping }),
            renewed_at: asked_at,
            next_renewal: asked_at + subscription.settings.lease / 3,
            moved_at: asked_at,
            began_at: cursor.position,
            head: cursor.position,
            pending: VecDeque::new(),
            pending_end: cursor.position,
            read: None,
            taken_to: cursor.position,
            handed_out: cursor.position,
            alone_to: cursor.position,
            heard,
            parked_seen: None,
            held_back: HashSet::new(),
            due: Vec::new(),
            subscription: subscription.clone(),
            cursor,
        };
        // A version that is being built has to see first how far the one before has come.
        held.read_from(held.cursor.live_from.map_or(held.taken_to, |_| Position::MAX));
        crate::observe::lease_changed(&held.context.id, "claimed");
        Ok(held)
    }

    fn read_from(&mut self, bound: Position) {
        let settings = &self.subscription.settings;
        let query = LogQuery::after(self.taken_to)
            .up_to(bound)
            .with_filter(settings.filter.clone())
            .with_limit(settings.batch);
        self.tail = Tail::new(self.subscription.store.engine(), query, self.read);
    }

    /// The lease lasts until here, by our own clock; a little less, for the way.
    fn valid_until(&self) -> Instant {
        let time = self.subscription.settings.lease;
        self.renewed_at + (time - time / 10)
    }

    pub(crate) fn check_time(&self) -> Result<()> {
        if Instant::now() < self.valid_until() {
            return Ok(());
        }
        let message =
            format!("the lease on subscription \"{}\" was not renewed in time", self.subscription.name);
        Err(Error::new(ErrorKind::LeaseLost, message))
    }

    /// Runs work and keeps the lease meanwhile; work whose lease is lost is dropped.
    pub(crate) async fn keeping<T>(&mut self, work: impl Future<Output = T> + Send) -> Result<T> {
        let (mut work, engine) = (std::pin::pin!(work), Arc::clone(self.subscription.store.engine()));
        let until = |time: Instant| engine.pause(time.saturating_duration_since(Instant::now()));
        loop {
            self.check_time()?;
            if let First::Left(done) = race(work.as_mut(), until(self.next_renewal)).await {
                return Ok(done);
            }
            self.check_time()?;
            // An answer that does not come is no renewal.
            let too_late = until(self.valid_until());
            match race(work.as_mut(), race(self.renew(), too_late)).await {
                First::Left(done) => return Ok(done),
                First::Right(First::Left(renewed)) => renewed?,
                First::Right(First::Right(())) => {}
            }
        }
    }

    /// Renews the lease if it is time to. That the engine is out of reach is no harm before the lease ends.
    pub(crate) async fn renew_if_due(&mut self) -> Result<()> {
        self.check_time()?;
        if Instant::now() < self.next_renewal { Ok(()) } else { self.renew().await }
    }

    /// How often operators had changed something when we last looked.
    pub(crate) fn heard(&self) -> u64 {
        self.heard
    }

    /// Looks at the cursor, whatever the time.
    pub(crate) async fn look(&mut self) -> Result<()> {
        self.heard = self.subscription.store.operator_calls().count();
        self.renew().await
    }

    async fn renew(&mut self) -> Result<()> {
        let asked_at = Instant::now();
        let time = self.subscription.settings.lease;
        let renew = Step::renew(self.context.lease.clone(), time);
        match self.step(&renew).await {
            Ok(()) => {
                self.renewed_at = asked_at;
                self.next_renewal = asked_at + time / 3;
                Ok(())
            }
            Err(error) if is_passing(&error) => {
                self.next_renewal = Instant::now() + RENEW_AGAIN.min(time / 10);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn step(&mut self, step: &Step) -> Result<()> {
        let stepped = self.subscription.store.engine().step(&self.context.id, step).await?;
        let stepped = stepped.ok_or_else(|| gone(&self.subscription))?;
        // Under our lease nobody moves it back: it was lost, with the end of the log.
        if stepped.position < self.cursor.position {
            return Err(Error::tail_lost(self.cursor.position));
        }
        self.cursor = stepped;
        Ok(())
    }

    /// Whether somebody who has fewer cursors asks for this one. The engine's time is that of the last step.
    pub(crate) fn is_wanted(&self) -> bool {
        let time = self.subscription.settings.lease;
        self.cursor.wanted_by.is_some() && self.cursor.wanted_until.plus(time) > self.cursor.expires_at
    }

    /// Whether everything that was handed out is acknowledged, so that the cursor may move past what concerns nobody.
    pub(crate) fn has_nothing_out(&self) -> bool {
        self.handed_out <= self.cursor.position
    }

    /// Whether the cursor has moved under this lease.
    pub(crate) fn has_moved(&self) -> bool {
        self.cursor.position > self.began_at
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.cursor.status == CursorStatus::Paused
    }

    /// What moves the cursor to there, from where it stands.
    pub(crate) fn advance_to(&self, to: Position, parked: Vec<ParkedChange>) -> Advance {
        let time = self.subscription.settings.lease;
        let from = self.cursor.position;
        let (lease, to) = (self.context.lease.clone(), to.max(from));
        let read = self.read.filter(|read| read.position >= to);
        Advance { lease, from, to, time, parked, parked_seen: None, read }
    }

    /// The same for a parked event that is tried again: what an operator says meanwhile goes before it.
    pub(crate) fn change_parked(&self, to: Position, parked: Vec<ParkedChange>) -> Advance {
        Advance { parked_seen: self.parked_seen, ..self.advance_to(to, parked) }
    }

    /// Moves the cursor. An answer may have been lost, and a step that was given up may still have taken effect: while the
    /// lease holds, nobody else can have moved it, so where it stands is of our own doing.
    pub(crate) async fn advance(&mut self, advance: Advance) -> Result<()> {
        let asked_at = Instant::now();
        let (from, to) = (advance.from, advance.to);
        match self.step(&Step::Advance(advance.clone())).await {
            Ok(()) => {}
            Err(error) if is_passing(&error) => {
                self.hold().await?;
                if from == to || self.cursor.position < to {
                    return Err(error);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::LeaseLost) => {
                self.hold().await?;
                let from = self.cursor.position;
                self.step(&Step::Advance(Advance { from, to: to.max(from), ..advance })).await?;
            }
            Err(error) => return Err(error),
        }
        self.moved(asked_at);
        Ok(())
    }

    /// Renews the lease whatever the time, or finds that it is lost; the cursor is as it stands now.
    async fn hold(&mut self) -> Result<()> {
        self.step(&Step::renew(self.context.lease.clone(), self.subscription.settings.lease)).await
    }

    /// A sink has moved it, and nobody could have it meanwhile: where that took long, the lease may be over by now and
    /// still be ours.
    pub(crate) async fn was_moved(&mut self, asked_at: Instant, cursor: Cursor) -> Result<()> {
        self.cursor = cursor;
        self.moved(asked_at);
        if Instant::now() < self.next_renewal { Ok(()) } else { self.look().await }
    }

    fn moved(&mut self, asked_at: Instant) {
        self.renewed_at = asked_at;
        self.moved_at = Instant::now();
        self.next_renewal = asked_at + self.subscription.settings.lease / 3;
        self.subscription.store.cursor_moves().send();
        crate::observe::moved(&self.cursor, self.head);
    }

    /// Moves the cursor past what concerns nobody, if it stands behind it for long enough.
    pub(crate) async fn pass_by(&mut self) -> Result<()> {
        if self.taken_to > self.cursor.position && self.moved_at.elapsed() >= PASS_BY {
            self.advance(self.advance_to(self.taken_to, Vec::new())).await?;
        }
        Ok(())
    }

    pub(crate) async fn release(&mut self) -> Result<()> {
        let release = Step::release(self.context.lease.clone());
        let released = self.subscription.store.engine().step(&self.context.id, &release).await;
        self.subscription.store.cursor_moves().send();
        released.map(drop)
    }

    pub(crate) async fn fail(&mut self, failure: super::Failure) -> Result<()> {
        let rest = self.subscription.settings.failure.longest_pause;
        self.step(&Step::Fail { lease: self.context.lease.clone(), failure, rest }).await
    }

    /// What is to be delivered next; `None` if nothing came in that time. What is handed out is not handed out again,
    /// unless it is [put back](Self::put_back).
    pub(crate) async fn next(&mut self, at_most: Duration) -> Result<Option<Delivery>> {
        if let Some(delivery) = self.take_pending() {
            return Ok(Some(delivery));
        }
        // Not for long while the cursor is to be moved past something.
        let at_most = if self.has_nothing_out() && self.taken_to > self.cursor.position {
            at_most.min(PASS_BY)
        } else {
            at_most
        };
        let Some(page) = self.tail.next(at_most).await? else { return Ok(None) };
        self.add(&page);
        Ok(self.take_pending())
    }

    fn add(&mut self, page: &LogPage) {
        let (partition, partitions) = (self.context.id.partition, self.subscription.settings.partitions);
        self.pending.extend(
            page.events.iter().filter(|event| partition_of(event.aggregate(), partitions) == partition),
        );
        self.pending_end = page.scanned;
        self.read = page.witness();
        self.head = page.head;
    }

    /// Events go out together that are all live or all replay, and to the end of what was read or one by one.
    fn take_pending(&mut self) -> Option<Delivery> {
        let mut events = Vec::new();
        let mut is_replay = false;
        while let Some(next) = self.pending.front() {
            if self.held_back.contains(&next.aggregate()) {
                self.taken_to = next.position();
                self.pending.pop_front();
                continue;
            }
            let is_next_replay = self.is_replay(next.position());
            let goes_alone = next.position() <= self.alone_to;
            if !events.is_empty() && (goes_alone || is_next_replay != is_replay) {
                break;
            }
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
        self.handed_out = events.last().map_or(self.handed_out, |last: &Event| last.position());
        let attempt =
            if events.first().is_some_and(|first| first.position() <= self.alone_to) { 2 } else { 1 };
        (!events.is_empty()).then(|| Delivery {
            events: events.into(),
            context: Arc::clone(&self.context),
            attempt,
            is_replay,
            end: self.taken_to,
        })
    }

    fn is_replay(&self, position: Position) -> bool {
        self.cursor.live_from.is_none_or(|from| position <= from)
    }

    /// Hands out again what was not handled, the next `alone` of it one by one, because one of those fails.
    pub(crate) fn put_back_alone(&mut self, delivery: &Delivery, handled: usize, alone: usize) {
        let mut tried = delivery.events().iter().skip(handled).take(alone);
        if let Some(last) = tried.next_back() {
            self.alone_to = last.position();
        }
        self.put_back();
    }

    /// Hands out again what is behind the cursor: read anew, since what was passed over in between may concern somebody now.
    pub(crate) fn put_back(&mut self) {
        self.pending.clear();
        self.taken_to = self.cursor.position;
        self.handed_out = self.cursor.position;
        self.pending_end = self.cursor.position;
        self.read = None;
        self.read_from(self.tail.bound());
    }

    /// Looks at the parked events, if somebody has changed something about them.
    pub(crate) async fn look_at_parked(&mut self) -> Result<()> {
        if !self.parked_were_changed() {
            return Ok(());
        }
        let (changes, engine) = (self.cursor.parked_changes, Arc::clone(self.subscription.store.engine()));
        let (mut held_back, mut due, mut after) = (HashSet::new(), Vec::new(), Position::ZERO);
        loop {
            let page = engine.parked(&self.context.id, after, PARKED_PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.position;
            held_back.extend(page.iter().filter(|parked| parked.holds_back).map(|parked| parked.aggregate));
            due.extend(page.into_iter().filter(|parked| parked.is_due));
        }
        due.reverse(); // taken from the end
        (self.held_back, self.due, self.parked_seen) = (held_back, due, Some(changes));
        crate::observe::held_back(&self.context.id, self.held_back.len());
        Ok(())
    }

    /// Whether operators have changed something about parked events since we looked at them.
    pub(crate) fn parked_were_changed(&self) -> bool {
        self.parked_seen != Some(self.cursor.parked_changes)
    }

    /// Looks at the parked events again, and takes this one, if nobody has dropped it.
    pub(crate) async fn take_due(&mut self, parked: &Parked) -> Result<bool> {
        self.look_at_parked().await?;
        let place = self.due.iter().position(|due| due.position == parked.position);
        Ok(place.map(|place| self.due.remove(place)).is_some())
    }

    /// The next parked event that is to be tried again, and what becomes of its row when it is handled.
    pub(crate) async fn next_due(&mut self) -> Result<Option<(Parked, Delivery, Vec<ParkedChange>)>> {
        let Some(parked) = self.due.pop() else { return Ok(None) };
        let before = Position::new(parked.position.get() - 1)?;
        let limit = crate::engine::PageLimit::events(2)?.and_bytes(limits::PAGE_BYTES)?;
        let settings = &self.subscription.settings;
        let filter = settings.filter.clone().with_aggregate(parked.aggregate);
        let mut query = LogQuery::after(before).with_limit(limit).with_filter(filter);
        if settings.filter.aggregate().is_some_and(|only| only != parked.aggregate) {
            query = query.up_to(before);
        } else if parked.holds_back {
            // It, and the next of its aggregate that had to wait.
            query = query.up_to(self.taken_to);
        } else {
            query = query.up_to(parked.position);
        }
        let (mut event, mut next) = (None, None);
        while next.is_none() && query.from < query.to {
            let page = self.subscription.store.read_log(&query).await?;
            for found in &page.events {
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
            let waiting =
                Parked { position: next.position(), attempts: 0, error: String::new(), ..parked.clone() };
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

    /// Whether there are parked events that are to be tried again.
    pub(crate) fn has_due(&self) -> bool {
        !self.due.is_empty()
    }

    /// What the rows of parked events are by now.
    pub(crate) fn note_parked(&mut self, changes: &[ParkedChange], of: &Parked) {
        let mut holds_back = false;
        for change in changes {
            if let ParkedChange::Keep(kept) = change {
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

    /// While this version is being built beside an older one: reads as far as that one has come, and takes over when it
    /// is as far.
    pub(crate) async fn build(&mut self) -> Result<()> {
        if self.cursor.live_from.is_some() || !self.pending.is_empty() || !self.tail.is_at_bound() {
            return Ok(());
        }
        let (own, store) = (self.context.id.clone(), self.subscription.store.clone());
        let all = store.engine().cursors(Some(&own.subscription)).await?.cursors;
        let older: Vec<_> = all
            .into_iter()
            .filter(|other| other.id.partition == own.partition && other.id.version < own.version)
            .collect();
        let target = older.iter().map(|other| other.position).max().unwrap_or(self.cursor.position);
        let distance = target.get() - self.taken_to.get();
        if distance > i64::try_from(self.subscription.settings.batch.max_events()).unwrap_or(i64::MAX) {
            self.read_from(target);
            return Ok(());
        }
        if older.iter().any(|other| other.status == CursorStatus::Paused) {
            // Whoever paused it did not mean this one either.
            store.engine().pause(PASS_BY).await;
            return Ok(());
        }
        // From here on the older ones stand still, and what they have done is a replay for this one.
        let mut from = self.cursor.position;
        for other in older {
            let retired = store.engine().step(&other.id, &Step::Retire).await?;
            let stands = retired.unwrap_or(other);
            // One that was reset had come further before.
            from = from.max(stands.position).max(stands.live_from.unwrap_or_default());
        }
        let lease = self.context.lease.clone();
        self.step(&Step::GoLive { lease, from }).await?;
        self.read_from(Position::MAX);
        // Owners of the older ones may be waiting for events: they are to see that they are over.
        store.operator_calls().send();
        crate::observe::lease_changed(&own, "took over");
        Ok(())
    }
}

/// An error after which the same call may succeed.
pub(crate) fn is_passing(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::OutcomeUnknown)
}

fn gone(subscription: &Subscription) -> Error {
    Error::new(
        ErrorKind::LeaseLost,
        format!("the cursor of subscription \"{}\" was removed", subscription.name),
    )
}

/// Which partition the events of an aggregate belong to.
pub(crate) fn partition_of(aggregate: AggregateId, partitions: u32) -> u32 {
    // Ids are given out one after the other, so the remainder spreads them evenly.
    u32::try_from(aggregate.get() % i64::from(partitions)).unwrap_or(0)
}

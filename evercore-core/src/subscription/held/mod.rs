//! A cursor with its lease: claiming it and moving it. The other files of the folder keep the lease, read the log, handle
//! parked events, and take over from an older version.

mod feed;
mod lease;
mod parked;
mod takeover;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use takeover::Approach;

use super::cursor::{Cursor, Lease, Parked, ParkedChange};
use super::delivery::Context;
use super::settings::Subscription;
use super::step::{Advance, Step};
use super::tail::Tail;
use crate::awaited::Awaited;
use crate::contract::LogQuery;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::ids::{AggregateId, Position};
use crate::mark::Witness;
use crate::name::OwnerId;

/// How long after its last move a cursor moves past events that its filter lets through, but that belong to other
/// partitions.
const PASS_BY: Duration = Duration::from_millis(50);

/// How long after its last move a cursor moves past events that its filter leaves out, if nobody waits for it.
const PASS_BY_LEFT_OUT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) subscription: Subscription,
    /// The cursor after the last step.
    pub(crate) cursor: Cursor,
    pub(crate) context: Arc<Context>,
    /// Before the lease was asked for or renewed the last time, by a clock that does not jump.
    renewed_at: Instant,
    next_renewal: Instant,
    moved_at: Option<Instant>,
    /// Whether an event passed the filter since the last move, so that the cursor moves soon.
    moves_soon: bool,
    /// The callers that wait for this subscription, and their count at the last look.
    awaited: Arc<Awaited>,
    waits_seen: u64,
    began_at: Position,
    tail: Tail,
    /// The end of the log at the last read.
    head: Position,
    /// Events that were read and not yet delivered, each with the position of the cursor after it.
    pending: VecDeque<Event>,
    pending_end: Position,
    /// The event at which the last page ended.
    read: Option<Witness>,
    /// Every event up to here was delivered or passed over.
    taken_to: Position,
    /// The last event that was delivered.
    handed_out: Position,
    /// Deliver one by one up to here, because one of them fails.
    alone_to: Position,
    /// The count of operators' changes at the last query.
    heard: u64,
    /// The event at which the handler failed the last time, and how often it was tried.
    pub(super) failed: Option<(Position, u32)>,
    /// The most events in one delivery.
    pub(super) size: usize,
    /// Whether no event came in the last wait.
    is_idle: bool,
    /// Whether the log was read under this lease.
    pub(crate) has_read: bool,
    parked_seen: Option<i64>,
    /// How many events are parked.
    pub(super) parked_count: usize,
    /// When to look for parked events that are tried again by time.
    parked_again_at: Option<Instant>,
    held_back: HashSet<AggregateId>,
    due: Vec<Parked>,
    approach: Approach,
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
        if cursor.partitions != subscription.settings.partitions {
            engine.step(&id, &Step::release(lease)).await?;
            return Err(subscription.other_partitions(cursor.partitions));
        }
        let mut held = Self {
            tail: Tail::new(&subscription.store, LogQuery::after(cursor.position), None),
            context: Arc::new(Context { id, lease, is_stopping, gives_up: AtomicBool::new(false) }),
            renewed_at: asked_at,
            next_renewal: asked_at + subscription.settings.lease / 3,
            moved_at: None,
            moves_soon: false,
            awaited: subscription.store.waits().of(&subscription.name),
            waits_seen: 0,
            began_at: cursor.position,
            head: cursor.position,
            pending: VecDeque::new(),
            pending_end: cursor.position,
            read: None,
            taken_to: cursor.position,
            handed_out: cursor.position,
            alone_to: cursor.position,
            heard,
            failed: cursor.failure.as_ref().map(|failure| (failure.position, failure.attempts)),
            size: usize::MAX,
            is_idle: false,
            has_read: false,
            parked_seen: None,
            parked_count: 0,
            parked_again_at: None,
            held_back: HashSet::new(),
            due: Vec::new(),
            approach: Approach::new(),
            subscription: subscription.clone(),
            cursor,
        };
        // A version that is not live has to see first how far the live one has come.
        held.read_from(held.cursor.live_from.map_or(held.taken_to, |_| Position::MAX));
        crate::observe::lease_changed(&held.context.id, "claimed");
        Ok(held)
    }

    async fn step(&mut self, step: &Step) -> Result<()> {
        let stepped = self.subscription.store.engine().step(&self.context.id, step).await;
        let stepped = stepped.inspect_err(|error| {
            if matches!(error.kind(), ErrorKind::TailLost { .. }) {
                // Pages that others share with this one may have lost events too.
                self.subscription.store.shared_log().forget();
            }
        })?;
        let stepped = stepped.ok_or_else(|| gone(&self.subscription))?;
        // Under our lease nobody moves it back: it was lost, with the end of the log.
        if stepped.position < self.cursor.position {
            return Err(Error::tail_lost(self.cursor.position));
        }
        self.cursor = stepped;
        Ok(())
    }

    /// Whether the cursor has moved under this lease.
    pub(crate) fn has_moved(&self) -> bool {
        self.cursor.position > self.began_at
    }

    /// The move of the cursor to this position.
    pub(crate) fn advance_to(&self, to: Position, parked: Vec<ParkedChange>) -> Advance {
        let time = self.subscription.settings.lease;
        let from = self.cursor.position;
        let (lease, to) = (self.context.lease.clone(), to.max(from));
        let read = self.read.filter(|read| read.position >= to);
        Advance { lease, from, to, time, parked, parked_seen: None, read }
    }

    /// The same for a parked event that is tried again. An operator's change of it meanwhile takes precedence.
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

    /// After lost leases, one event at a time at first, until the one at fault is known.
    pub(crate) fn begin_small_after_losses(&mut self) {
        self.size = if self.cursor.lost_leases > 0 { 1 } else { self.most() };
    }

    fn most(&self) -> usize {
        self.subscription.settings.batch.max_events()
    }

    /// This many events took too long.
    pub(crate) fn give_fewer(&mut self, events: usize, took: Duration) {
        self.size = (events / 2).max(1);
        crate::observe::resized(&self.context.id, self.size, took);
    }

    /// One event at a time, until one succeeds.
    pub(crate) fn give_one(&mut self) {
        self.size = 1;
    }

    /// After a success: fewer events if these took more than half of the limit, more if they took less than a quarter.
    pub(crate) fn resize(&mut self, events: usize, took: Duration, limit: Option<Duration>) {
        match limit {
            Some(limit) if took > limit / 2 && events > 1 => self.give_fewer(events, took),
            Some(limit) if took > limit / 4 => {}
            _ if self.size < self.most() && events >= self.size => {
                self.size = self.size.saturating_mul(2).min(self.most());
            }
            _ => {}
        }
    }

    /// A failed try of an event.
    pub(crate) fn note_failed(&mut self, position: Position, tries: u32) {
        self.failed = Some((position, tries));
    }

    /// A sink has moved it, and nobody could have it meanwhile: where that took long, the lease may be over by now and
    /// still be ours.
    pub(crate) async fn was_moved(&mut self, asked_at: Instant, cursor: Cursor) -> Result<()> {
        self.cursor = cursor;
        self.moved(asked_at);
        if Instant::now() < self.next_renewal { Ok(()) } else { self.refresh().await }
    }

    fn moved(&mut self, asked_at: Instant) {
        self.failed = self.failed.filter(|(position, _)| *position > self.cursor.position);
        self.renewed_at = asked_at;
        self.moved_at = Some(Instant::now());
        self.moves_soon = false;
        self.next_renewal = asked_at + self.subscription.settings.lease / 3;
        self.subscription.store.cursor_moves().send();
        self.awaited.moved_to(self.cursor.position);
        crate::observe::moved(&self.cursor, self.head);
    }

    /// Moves the cursor past events that are not for this subscription, if it is time.
    pub(crate) async fn pass_by(&mut self) -> Result<()> {
        self.waits_seen = self.awaited.came.count();
        if self.passes_by_in().is_some_and(|time| time.is_zero()) {
            self.advance(self.advance_to(self.taken_to, Vec::new())).await?;
        }
        Ok(())
    }

    /// How long until the cursor moves past events that are not for this subscription; `None` if there are none. It moves
    /// at once if a caller waits for that. Otherwise each commit would cost a write for each subscription whose filter
    /// leaves it out.
    pub(super) fn passes_by_in(&self) -> Option<Duration> {
        if self.taken_to <= self.cursor.position || !self.has_nothing_out() {
            return None;
        }
        if self.awaited.is_between(self.cursor.position, self.taken_to) {
            return Some(Duration::ZERO);
        }
        // A version that is being built takes over by its stored position.
        let is_soon = self.moves_soon || self.cursor.live_from.is_none();
        let time = if is_soon { PASS_BY } else { PASS_BY_LEFT_OUT };
        Some(self.moved_at.map_or(Duration::ZERO, |moved_at| time.saturating_sub(moved_at.elapsed())))
    }
}

/// An error after which the same call may succeed.
pub(crate) fn is_passing(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::OutcomeUnknown)
}

/// An error of the store that a run waits out: the store may answer otherwise later.
pub(crate) fn is_waited_out(error: &Error) -> bool {
    !matches!(
        error.kind(),
        ErrorKind::NotFound
            | ErrorKind::LeaseLost
            | ErrorKind::AlreadyOwned
            | ErrorKind::Paused
            | ErrorKind::Superseded
            | ErrorKind::TailLost { .. }
            | ErrorKind::Closed
    )
}

fn gone(subscription: &Subscription) -> Error {
    Error::new(
        ErrorKind::LeaseLost,
        format!("the cursor of subscription \"{}\" was removed", subscription.name),
    )
}

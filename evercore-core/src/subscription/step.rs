//! The rule of a cursor: every change of it, as one pure function that all engines call inside a transaction.

use std::time::Duration;

use super::cursor::{Cursor, CursorId, CursorStatus, Failure, Lease, ParkedChange};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::mark::{Mark, Witness};
use crate::name::OwnerId;
use crate::time::Timestamp;

/// One change of one cursor. An engine reads the cursor, [takes](Self::take) the step, and writes the result, all in one
/// transaction and by its own clock.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Step {
    /// Makes the cursor if there is none. An existing cursor stays as it is.
    #[non_exhaustive]
    Declare {
        /// How many partitions the subscription has.
        partitions: u32,
        /// Where to begin.
        position: Position,
        /// Events after this position are live; `None` if the version is built while an older one goes on.
        live_from: Option<Position>,
    },
    /// Takes the lease if no other owner holds it. The epoch grows, also for the same owner.
    #[non_exhaustive]
    Claim {
        /// The new owner.
        owner: OwnerId,
        /// How long the lease lasts.
        time: Duration,
    },
    /// Prolongs the lease.
    #[non_exhaustive]
    Renew {
        /// The lease.
        lease: Lease,
        /// How long the lease lasts from now.
        time: Duration,
        /// Whether the owner has nothing to handle. Then leases that were [lost](Cursor::lost_leases) before are forgotten.
        is_idle: bool,
    },
    /// Moves the cursor, and renews the lease.
    Advance(Advance),
    /// Stores why the owner stops, and ends the lease.
    #[non_exhaustive]
    Fail {
        /// The lease.
        lease: Lease,
        /// The reason.
        failure: Failure,
        /// How long the cursor cannot be claimed, so that a poison event is not tried at full speed.
        rest: Duration,
    },
    /// Stores why an event is not handled yet, for operators and for the next owner. The lease stays.
    #[non_exhaustive]
    Report {
        /// The lease.
        lease: Lease,
        /// The reason.
        failure: Failure,
    },
    /// Ends the lease, so that another owner can begin at once. It is no error if the lease is lost already.
    #[non_exhaustive]
    Release {
        /// The lease.
        lease: Lease,
    },
    /// Asks the owner to release the cursor, because the asking owner has fewer cursors.
    #[non_exhaustive]
    Want {
        /// The owner that asks.
        owner: OwnerId,
        /// How long the request stands.
        time: Duration,
    },
    /// Makes events after this position live.
    #[non_exhaustive]
    GoLive {
        /// The lease.
        lease: Lease,
        /// The position.
        from: Position,
    },
    /// Forbids further claims. The owner finishes the delivery at hand and stops.
    Pause,
    /// Ends a pause.
    Resume,
    /// Moves the cursor to another position, ends the lease of its owner, and removes parked events.
    #[non_exhaustive]
    Reset {
        /// The new position.
        position: Position,
    },
    /// Moves the cursor past the event at which its handler fails, and ends the lease of its owner.
    #[non_exhaustive]
    Skip {
        /// The event.
        position: Position,
    },
    /// Ends the lease of the cursor's owner, because another version is live. A promotion brings the cursor back.
    Retire,
    /// Marks parked events to be tried again.
    #[non_exhaustive]
    ResumeParked {
        /// The position of the parked event; `None` for all.
        position: Option<Position>,
    },
    /// Removes parked events.
    #[non_exhaustive]
    DropParked {
        /// The position of the parked event; `None` for all.
        position: Option<Position>,
    },
    /// Removes the cursor and its parked events. Its owner has lost the lease.
    Remove,
}

/// A move of a cursor, by the owner of its lease.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Advance {
    /// The lease.
    pub lease: Lease,
    /// The position of the cursor before the move.
    pub from: Position,
    /// The position after it.
    pub to: Position,
    /// How long the renewed lease lasts.
    pub time: Duration,
    /// Changes of parked events.
    pub parked: Vec<ParkedChange>,
    /// The [`parked_changes`](Cursor::parked_changes) of the cursor when the parked events were read. The move is refused
    /// if operators have changed some since. `None` skips this check.
    pub parked_seen: Option<i64>,
    /// An event, at `to` or after it, that was read together with the handled events. If the log has lost it since, the move
    /// is refused, because other events may have taken the place of the handled ones. With `None`, any event at `to` will
    /// do.
    pub read: Option<Witness>,
}

impl Advance {
    /// A move from one position to another, which renews the lease for this time.
    pub const fn new(lease: Lease, from: Position, to: Position, time: Duration) -> Self {
        Self { lease, from, to, time, parked: Vec::new(), parked_seen: None, read: None }
    }

    /// The same move, refused if this event is no longer in the log.
    #[must_use]
    pub fn having_read(mut self, read: Witness) -> Self {
        self.read = Some(read);
        self
    }

    /// Checks that the handled events are still in the log. `found` is the mark of the event that proves it.
    fn check_read(&self, found: Option<Mark>) -> Result<()> {
        let Some(read) = self.read else {
            let is_there = self.to == Position::ZERO || found.is_some();
            return if is_there { Ok(()) } else { Err(Error::tail_lost(self.to)) };
        };
        if read.position < self.to {
            let message = format!("a move to {} cannot be proved by the event at {}", self.to, read.position);
            return Err(Error::invalid(message));
        }
        if read.stands(found) { Ok(()) } else { Err(Error::tail_lost(read.position)) }
    }

    /// The same move with these changes of parked events.
    #[must_use]
    pub fn with_parked(mut self, parked: Vec<ParkedChange>) -> Self {
        self.parked = parked;
        self
    }

    /// The same move, refused if operators have changed parked events since.
    #[must_use]
    pub fn with_parked_seen(mut self, changes: i64) -> Self {
        self.parked_seen = Some(changes);
        self
    }
}

/// The result of a step, which the engine writes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepOutcome {
    /// The cursor after the step; `None` if it is removed.
    pub cursor: Option<Cursor>,
    /// The changes of its parked events, in this order.
    pub parked: Vec<ParkedChange>,
}

impl StepOutcome {
    /// The cursor is removed, with its parked events.
    pub(crate) fn removed() -> Self {
        Self { cursor: None, parked: vec![ParkedChange::RemoveAll] }
    }
}

impl Step {
    /// The step that makes a cursor unless there is one.
    pub const fn declare(partitions: u32, position: Position, live_from: Option<Position>) -> Self {
        Self::Declare { partitions, position, live_from }
    }

    /// The step that takes the lease.
    pub const fn claim(owner: OwnerId, time: Duration) -> Self {
        Self::Claim { owner, time }
    }

    /// The step that prolongs the lease.
    pub const fn renew(lease: Lease, time: Duration) -> Self {
        Self::Renew { lease, time, is_idle: false }
    }

    /// The step that prolongs the lease of an owner that has nothing to handle.
    pub const fn renew_idle(lease: Lease, time: Duration) -> Self {
        Self::Renew { lease, time, is_idle: true }
    }

    /// The step that ends the lease.
    pub const fn release(lease: Lease) -> Self {
        Self::Release { lease }
    }

    /// The step that stores why the owner stops.
    pub const fn fail(lease: Lease, failure: Failure, rest: Duration) -> Self {
        Self::Fail { lease, failure, rest }
    }

    /// The step that stores why an event is not handled yet.
    pub const fn report(lease: Lease, failure: Failure) -> Self {
        Self::Report { lease, failure }
    }

    /// The step that asks the owner to release the cursor.
    pub const fn want(owner: OwnerId, time: Duration) -> Self {
        Self::Want { owner, time }
    }

    /// The step that makes events after this position live.
    pub const fn go_live(lease: Lease, from: Position) -> Self {
        Self::GoLive { lease, from }
    }

    /// The step that marks parked events to be tried again; `None` for all.
    pub const fn resume_parked(position: Option<Position>) -> Self {
        Self::ResumeParked { position }
    }

    /// The step that removes parked events; `None` for all.
    pub const fn drop_parked(position: Option<Position>) -> Self {
        Self::DropParked { position }
    }

    /// The step that moves the cursor to another position.
    pub const fn reset(position: Position) -> Self {
        Self::Reset { position }
    }

    /// The step that moves the cursor past the event at which its handler fails.
    pub const fn skip(position: Position) -> Self {
        Self::Skip { position }
    }

    /// The position of the event on which this step depends; zero if there is none. [`take`](Self::take) needs its mark.
    pub fn looks_at(&self) -> Position {
        match self {
            Self::Advance(advance) => advance.read.map_or(advance.to, |read| read.position),
            Self::Skip { position } => *position,
            _ => Position::ZERO,
        }
    }

    /// Applies this step to a cursor, which may be missing, at this time of the engine's clock. `found` is the mark of the
    /// event at the position that the step [looks at](Self::looks_at); `None` if there is no such event.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost), [`AlreadyOwned`](ErrorKind::AlreadyOwned), [`Paused`](ErrorKind::Paused),
    /// [`Superseded`](ErrorKind::Superseded); [`NotFound`](ErrorKind::NotFound) if there is no such cursor;
    /// [`TailLost`](ErrorKind::TailLost) for a move past the end of the log, or if another event has taken the place of the
    /// last one that was read: the log has lost its tail since;
    /// [`Invalid`](ErrorKind::Invalid) if the subscription has another number of partitions. After an error nothing is
    /// written.
    pub fn take(
        &self,
        id: &CursorId,
        cursor: Option<Cursor>,
        now: Timestamp,
        found: Option<Mark>,
    ) -> Result<StepOutcome> {
        if let Self::Declare { partitions, position, live_from } = self {
            return declare(id, cursor, (*partitions, *position, *live_from));
        }
        let mut cursor = cursor.ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("there is no cursor of subscription \"{}\"", id.subscription),
            )
        })?;
        let mut parked = Vec::new();
        match self {
            Self::Declare { .. } => {}
            Self::Claim { owner, time } => cursor.claim(owner, *time, now)?,
            Self::Renew { lease, time, is_idle } => {
                cursor.check(lease)?;
                cursor.expires_at = now.plus(*time);
                if *is_idle {
                    cursor.lost_leases = 0;
                }
            }
            Self::Advance(advance) => {
                cursor.advance(advance, now, found)?;
                parked.clone_from(&advance.parked);
            }
            Self::Fail { lease, failure, rest } => {
                cursor.check(lease)?;
                cursor.end_lease(now.plus(*rest));
                cursor.failure = Some(failure.clone());
                cursor.lost_leases = 0;
            }
            Self::Report { lease, failure } => {
                cursor.check(lease)?;
                cursor.failure = Some(failure.clone());
            }
            Self::Release { lease } => {
                if cursor.check(lease).is_ok() {
                    cursor.end_lease(Timestamp::MIN);
                }
            }
            Self::Want { owner, time } => {
                cursor.wanted_by = Some(owner.clone());
                cursor.wanted_until = now.plus(*time);
            }
            Self::GoLive { lease, from } => {
                cursor.check(lease)?;
                cursor.live_from = Some(*from);
            }
            Self::Pause => cursor.pause()?,
            Self::Resume => cursor.resume()?,
            Self::Reset { position } => {
                cursor.reset(*position)?;
                parked.push(ParkedChange::RemoveAll);
            }
            Self::Skip { position } => {
                if found.is_none() {
                    return Err(Error::tail_lost(*position));
                }
                cursor.skip(*position)?;
            }
            Self::Retire => cursor.retire(),
            Self::ResumeParked { .. } if cursor.status == CursorStatus::Retired => {
                return Err(cursor.is_superseded());
            }
            Self::ResumeParked { position } => {
                cursor.parked_changes += 1;
                cursor.lost_leases = 0;
                parked.push(ParkedChange::Due(*position));
            }
            Self::DropParked { position } => {
                cursor.parked_changes += 1;
                cursor.lost_leases = 0;
                parked.push(position.map_or(ParkedChange::RemoveAll, ParkedChange::Remove));
            }
            Self::Remove => return Ok(StepOutcome::removed()),
        }
        Ok(StepOutcome { cursor: Some(cursor), parked })
    }

    /// Whether this is a step of an operator, which needs no lease and may be taken on several cursors at once.
    pub const fn is_of_operator(&self) -> bool {
        matches!(
            self,
            Self::Pause
                | Self::Resume
                | Self::Reset { .. }
                | Self::ResumeParked { .. }
                | Self::DropParked { .. }
        )
    }

    /// Whether this is a claim. A claim need not wait for another transaction that holds the cursor: it counts as owned.
    pub const fn is_claim(&self) -> bool {
        matches!(self, Self::Claim { .. })
    }
}

fn declare(
    id: &CursorId,
    known: Option<Cursor>,
    (partitions, position, live_from): (u32, Position, Option<Position>),
) -> Result<StepOutcome> {
    if let Some(known) = known {
        if known.partitions != partitions {
            return Err(Error::invalid(format!(
                "subscription \"{}\" has {} partitions, not {partitions}",
                id.subscription, known.partitions
            )));
        }
        return Ok(StepOutcome { cursor: Some(known), parked: Vec::new() });
    }
    let cursor = Cursor {
        id: id.clone(),
        partitions,
        position,
        epoch: 0,
        owner: None,
        // Not now: a clock may go back.
        expires_at: Timestamp::MIN,
        wanted_by: None,
        wanted_until: Timestamp::MIN,
        live_from,
        is_held: false,
        status: CursorStatus::Active,
        failure: None,
        parked_changes: 0,
        lost_leases: 0,
    };
    Ok(StepOutcome { cursor: Some(cursor), parked: Vec::new() })
}

impl Cursor {
    /// Whether an owner holds the lease at this time of the engine's clock.
    pub fn is_owned(&self, now: Timestamp) -> bool {
        self.owner.is_some() && self.expires_at > now
    }

    fn claim(&mut self, owner: &OwnerId, time: Duration, now: Timestamp) -> Result<()> {
        match self.status {
            CursorStatus::Active => {}
            CursorStatus::Paused => return Err(self.is_paused()),
            CursorStatus::Retired => return Err(self.is_superseded()),
        }
        let is_own = self.owner.as_ref() == Some(owner);
        if self.expires_at > now && !is_own {
            return Err(self.is_not_free());
        }
        let is_wanted =
            self.wanted_until > now && self.wanted_by.as_ref().is_some_and(|wanted| wanted != owner);
        if is_wanted && self.owner.is_none() {
            return Err(Error::already_owned(&self.id));
        }
        if self.owner.is_some() && !is_own {
            self.lost_leases = self.lost_leases.saturating_add(1);
        }
        self.owner = Some(owner.clone());
        self.epoch += 1;
        self.expires_at = now.plus(time);
        self.wanted_by = None;
        Ok(())
    }

    /// Checks that this is still the lease: the cursor was not claimed, reset or retired since.
    pub(super) fn check(&self, lease: &Lease) -> Result<()> {
        if self.status == CursorStatus::Retired {
            return Err(self.is_superseded());
        }
        if self.owner.as_ref() != Some(&lease.owner) || self.epoch != lease.epoch {
            let message = format!("the lease on subscription \"{}\" is lost", self.id.subscription);
            return Err(Error::new(ErrorKind::LeaseLost, message));
        }
        Ok(())
    }

    fn advance(&mut self, advance: &Advance, now: Timestamp, found: Option<Mark>) -> Result<()> {
        self.check(&advance.lease)?;
        advance.check_read(found)?;
        if self.position != advance.from || advance.to < advance.from {
            let message =
                format!("another call has moved the cursor of subscription \"{}\"", self.id.subscription);
            return Err(Error::new(ErrorKind::LeaseLost, message));
        }
        if advance.parked_seen.is_some_and(|seen| seen != self.parked_changes) {
            let message =
                format!("an operator has changed parked events of subscription \"{}\"", self.id.subscription);
            return Err(Error::new(ErrorKind::LeaseLost, message));
        }
        self.position = advance.to;
        self.expires_at = now.plus(advance.time);
        self.lost_leases = 0;
        if self.failure.as_ref().is_some_and(|failure| failure.position <= advance.to) {
            self.failure = None;
        }
        Ok(())
    }

    fn end_lease(&mut self, free_from: Timestamp) {
        self.owner = None;
        self.expires_at = free_from;
    }

    /// The old owner loses the lease: its epoch is old now.
    pub(super) fn take_lease(&mut self) {
        self.end_lease(Timestamp::MIN);
        self.epoch += 1;
    }

    pub(super) fn retire(&mut self) {
        if self.status != CursorStatus::Retired {
            self.take_lease();
            self.status = CursorStatus::Retired;
        }
    }

    fn pause(&mut self) -> Result<()> {
        if self.status == CursorStatus::Retired {
            return Err(self.is_superseded());
        }
        self.status = CursorStatus::Paused;
        Ok(())
    }

    /// Also ends the rest after a failure.
    fn resume(&mut self) -> Result<()> {
        self.pause()?;
        self.status = CursorStatus::Active;
        self.lost_leases = 0;
        if self.owner.is_none() {
            self.end_lease(Timestamp::MIN);
        }
        Ok(())
    }

    /// Events that were live are replay when they come again.
    fn reset(&mut self, position: Position) -> Result<()> {
        if self.status == CursorStatus::Retired {
            return Err(self.is_superseded());
        }
        self.live_from = self.live_from.map(|from| from.max(self.position));
        self.take_lease();
        self.position = position;
        self.failure = None;
        self.lost_leases = 0;
        self.parked_changes += 1;
        Ok(())
    }

    /// Everything before the event was handled: a handler gets it only then.
    fn skip(&mut self, position: Position) -> Result<()> {
        if self.status == CursorStatus::Retired {
            return Err(self.is_superseded());
        }
        let fails_at = self.failure.as_ref().map(|failure| failure.position);
        if fails_at != Some(position) {
            let CursorId { subscription, version, partition } = &self.id;
            let fails_at = fails_at.map_or_else(|| "nowhere".to_owned(), |at| format!("at position {at}"));
            return Err(Error::invalid(format!(
                "version {version} partition {partition} of subscription \"{subscription}\" fails {fails_at}, \
                 so the event at position {position} cannot be skipped"
            )));
        }
        self.take_lease();
        self.position = position;
        self.failure = None;
        self.lost_leases = 0;
        Ok(())
    }

    /// Because another owner has it, or because the last one has stopped at an event a moment ago.
    fn is_not_free(&self) -> Error {
        match &self.failure {
            Some(failure) if self.owner.is_none() => {
                let message = format!(
                    "subscription \"{}\" rests after it failed at position {}; resuming it ends the rest",
                    self.id.subscription, failure.position
                );
                Error::new(ErrorKind::AlreadyOwned, message)
            }
            _ => Error::already_owned(&self.id),
        }
    }

    fn is_paused(&self) -> Error {
        Error::new(ErrorKind::Paused, format!("subscription \"{}\" is paused", self.id.subscription))
    }

    fn is_superseded(&self) -> Error {
        let message = format!(
            "version {} of subscription \"{}\" was superseded by a newer one",
            self.id.version, self.id.subscription
        );
        Error::new(ErrorKind::Superseded, message)
    }
}

//! Every way in which a cursor changes, as one pure function that all engines run in a transaction of theirs.

use std::time::Duration;

use super::cursor::{Cursor, CursorId, CursorStatus, Failure, Lease, ParkedChange};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::mark::{Mark, Witness};
use crate::name::OwnerId;
use crate::time::Timestamp;

/// One change of one cursor. An engine reads the cursor, [takes](Self::take) the step, and writes what came of it, all
/// in one transaction, by its own clock.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Step {
    /// Makes the cursor if there is none; one that is there stays as it is.
    #[non_exhaustive]
    Declare {
        /// How many partitions the subscription has.
        partitions: u32,
        /// Where to begin.
        position: Position,
        /// From where on events are live; `None`: the version is to be built beside an older one.
        live_from: Option<Position>,
    },
    /// Gets the lease if nobody else has it; the epoch grows, also for the same owner.
    #[non_exhaustive]
    Claim {
        /// Who wants it.
        owner: OwnerId,
        /// For how long.
        time: Duration,
    },
    /// Keeps the lease for longer.
    #[non_exhaustive]
    Renew {
        /// The lease.
        lease: Lease,
        /// For how long from now.
        time: Duration,
    },
    /// Moves the cursor, and renews the lease.
    Advance(Advance),
    /// Notes why the owner stops, and ends the lease.
    #[non_exhaustive]
    Fail {
        /// The lease.
        lease: Lease,
        /// Why.
        failure: Failure,
        /// How long nobody may claim the cursor, so that a poison event is not tried at full speed.
        rest: Duration,
    },
    /// Ends the lease, so that another can begin at once. One that is lost already is no error.
    #[non_exhaustive]
    Release {
        /// The lease.
        lease: Lease,
    },
    /// Asks the owner, who has more cursors than this one, to let go.
    #[non_exhaustive]
    Want {
        /// Who asks.
        owner: OwnerId,
        /// For how long the wish holds.
        time: Duration,
    },
    /// Events behind this position are live from now on.
    #[non_exhaustive]
    GoLive {
        /// The lease.
        lease: Lease,
        /// The position.
        from: Position,
    },
    /// Lets nobody claim the cursor; the owner ends what it is about and stops.
    Pause,
    /// The opposite of `Pause`.
    Resume,
    /// Puts the cursor elsewhere and takes the lease from whoever has it. Parked events are forgotten.
    #[non_exhaustive]
    Reset {
        /// Where.
        position: Position,
    },
    /// Ends it for good and takes the lease from whoever has it: a newer version has taken over.
    Retire,
    /// Has the parked event at this position, or all of them, tried again.
    #[non_exhaustive]
    ResumeParked {
        /// Which; `None`: all.
        position: Option<Position>,
    },
    /// Forgets the parked event at this position, or all of them.
    #[non_exhaustive]
    DropParked {
        /// Which; `None`: all.
        position: Option<Position>,
    },
    /// Forgets the cursor and its parked events. Whoever holds the lease has lost it.
    Remove,
}

/// A move of a cursor, by the owner of its lease.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Advance {
    /// The lease.
    pub lease: Lease,
    /// Where the cursor stands.
    pub from: Position,
    /// Where it goes.
    pub to: Position,
    /// For how long the lease is renewed.
    pub time: Duration,
    /// What becomes of parked events.
    pub parked: Vec<ParkedChange>,
    /// The [`parked_changes`](Cursor::parked_changes) of the cursor when those were looked at: if operators have changed
    /// something since, the move is refused. `None`: that is no matter.
    pub parked_seen: Option<i64>,
    /// The event that proves what was read: at `to` or after it. If the log has lost it since, the move is refused: other
    /// events may have come in the place of those that were handled. `None`: that there is an event at `to` will do.
    pub read: Option<Witness>,
}

impl Advance {
    /// A move from one position to another, which renews the lease for this time.
    pub const fn new(lease: Lease, from: Position, to: Position, time: Duration) -> Self {
        Self { lease, from, to, time, parked: Vec::new(), parked_seen: None, read: None }
    }

    /// The same, refused if this event is not in the log any more.
    #[must_use]
    pub fn having_read(mut self, read: Witness) -> Self {
        self.read = Some(read);
        self
    }

    /// Whether what was handled is in the log; `found` is the mark of the event that was to be looked at.
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

    /// The same, with what becomes of parked events.
    #[must_use]
    pub fn with_parked(mut self, parked: Vec<ParkedChange>) -> Self {
        self.parked = parked;
        self
    }

    /// The same, refused if operators have changed something about parked events since then.
    #[must_use]
    pub fn with_parked_seen(mut self, changes: i64) -> Self {
        self.parked_seen = Some(changes);
        self
    }
}

/// What an engine writes after a step.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Taken {
    /// The cursor as it is now; `None`: there is none any more.
    pub cursor: Option<Cursor>,
    /// What becomes of its parked events, in this order.
    pub parked: Vec<ParkedChange>,
}

impl Step {
    /// To make a cursor, unless there is one.
    pub const fn declare(partitions: u32, position: Position, live_from: Option<Position>) -> Self {
        Self::Declare { partitions, position, live_from }
    }

    /// To get the lease.
    pub const fn claim(owner: OwnerId, time: Duration) -> Self {
        Self::Claim { owner, time }
    }

    /// To keep the lease.
    pub const fn renew(lease: Lease, time: Duration) -> Self {
        Self::Renew { lease, time }
    }

    /// To end the lease.
    pub const fn release(lease: Lease) -> Self {
        Self::Release { lease }
    }

    /// To note why the owner stops.
    pub const fn fail(lease: Lease, failure: Failure, rest: Duration) -> Self {
        Self::Fail { lease, failure, rest }
    }

    /// To ask the owner to let go.
    pub const fn want(owner: OwnerId, time: Duration) -> Self {
        Self::Want { owner, time }
    }

    /// To have what comes behind this position be live.
    pub const fn go_live(lease: Lease, from: Position) -> Self {
        Self::GoLive { lease, from }
    }

    /// To have parked events tried again.
    pub const fn resume_parked(position: Option<Position>) -> Self {
        Self::ResumeParked { position }
    }

    /// To forget parked events.
    pub const fn drop_parked(position: Option<Position>) -> Self {
        Self::DropParked { position }
    }

    /// To put the cursor elsewhere.
    pub const fn reset(position: Position) -> Self {
        Self::Reset { position }
    }

    /// The position of the event on which this step depends, whose mark [`take`](Self::take) is to be told; zero if there is
    /// none.
    pub fn looks_at(&self) -> Position {
        match self {
            Self::Advance(advance) => advance.read.map_or(advance.to, |read| read.position),
            _ => Position::ZERO,
        }
    }

    /// What comes of this step on a cursor that is as given, or is not there, at this time of the engine's clock. `found` is
    /// the mark of the event at the position that the step [looks at](Self::looks_at); `None` if there is none.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost), [`AlreadyOwned`](ErrorKind::AlreadyOwned), [`Paused`](ErrorKind::Paused),
    /// [`Superseded`](ErrorKind::Superseded); [`NotFound`](ErrorKind::NotFound) if there is no such cursor;
    /// [`TailLost`](ErrorKind::TailLost) for a move past the end of the log, or if another event is where the last one was
    /// read: the log has lost its tail since;
    /// [`Invalid`](ErrorKind::Invalid) if it has another number of partitions. Then nothing is written.
    pub fn take(
        &self,
        id: &CursorId,
        cursor: Option<Cursor>,
        now: Timestamp,
        found: Option<Mark>,
    ) -> Result<Taken> {
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
            Self::Renew { lease, time } => {
                cursor.check(lease)?;
                cursor.expires_at = now.plus(*time);
            }
            Self::Advance(advance) => {
                cursor.advance(advance, now, found)?;
                parked.clone_from(&advance.parked);
            }
            Self::Fail { lease, failure, rest } => {
                cursor.check(lease)?;
                cursor.end_lease(now.plus(*rest));
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
            Self::Retire => {
                if cursor.status != CursorStatus::Retired {
                    cursor.take_lease();
                    cursor.status = CursorStatus::Retired;
                }
            }
            Self::ResumeParked { .. } if cursor.status == CursorStatus::Retired => {
                return Err(cursor.is_superseded());
            }
            Self::ResumeParked { position } => {
                cursor.parked_changes += 1;
                parked.push(ParkedChange::Due(*position));
            }
            Self::DropParked { position } => {
                cursor.parked_changes += 1;
                parked.push(position.map_or(ParkedChange::RemoveAll, ParkedChange::Remove));
            }
            Self::Remove => return Ok(Taken { cursor: None, parked: vec![ParkedChange::RemoveAll] }),
        }
        Ok(Taken { cursor: Some(cursor), parked })
    }

    /// Whether it is no harm to pass the cursor by while another transaction holds it: a claim then finds it owned.
    pub const fn is_claim(&self) -> bool {
        matches!(self, Self::Claim { .. })
    }
}

fn declare(
    id: &CursorId,
    known: Option<Cursor>,
    (partitions, position, live_from): (u32, Position, Option<Position>),
) -> Result<Taken> {
    if let Some(known) = known {
        if known.partitions != partitions {
            return Err(Error::invalid(format!(
                "subscription \"{}\" has {} partitions, not {partitions}",
                id.subscription, known.partitions
            )));
        }
        return Ok(Taken { cursor: Some(known), parked: Vec::new() });
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
        status: CursorStatus::Active,
        failure: None,
        parked_changes: 0,
    };
    Ok(Taken { cursor: Some(cursor), parked: Vec::new() })
}

impl Cursor {
    /// Whether somebody holds the lease at this time of the engine's clock.
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
        self.owner = Some(owner.clone());
        self.epoch += 1;
        self.expires_at = now.plus(time);
        self.wanted_by = None;
        Ok(())
    }

    /// Whether this lease still is the one: nobody has claimed, reset or retired the cursor since.
    fn check(&self, lease: &Lease) -> Result<()> {
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
            let message = format!("the cursor of subscription \"{}\" stands elsewhere", self.id.subscription);
            return Err(Error::new(ErrorKind::LeaseLost, message));
        }
        if advance.parked_seen.is_some_and(|seen| seen != self.parked_changes) {
            let message =
                format!("parked events of subscription \"{}\" were changed by hand", self.id.subscription);
            return Err(Error::new(ErrorKind::LeaseLost, message));
        }
        self.position = advance.to;
        self.expires_at = now.plus(advance.time);
        if self.failure.as_ref().is_some_and(|failure| failure.position <= advance.to) {
            self.failure = None;
        }
        Ok(())
    }

    fn end_lease(&mut self, free_from: Timestamp) {
        self.owner = None;
        self.expires_at = free_from;
    }

    /// From whoever has it: the epoch that it names is old now.
    fn take_lease(&mut self) {
        self.end_lease(Timestamp::MIN);
        self.epoch += 1;
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
        if self.owner.is_none() {
            self.end_lease(Timestamp::MIN);
        }
        Ok(())
    }

    /// What was live once is a replay when it comes again.
    fn reset(&mut self, position: Position) -> Result<()> {
        if self.status == CursorStatus::Retired {
            return Err(self.is_superseded());
        }
        self.live_from = self.live_from.map(|from| from.max(self.position));
        self.take_lease();
        self.position = position;
        self.failure = None;
        self.parked_changes += 1;
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

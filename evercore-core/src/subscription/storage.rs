//! The part of an engine that subscriptions need: its calls on cursors.

use super::change::{Changed, SubscriptionChange};
use super::cursor::{Cursor, CursorId, Parked};
use super::step::Step;
use crate::error::Result;
use crate::future::BoxFuture;
use crate::ids::Position;
use crate::name::SubscriptionName;
use crate::time::Timestamp;

/// The part of a [`StorageEngine`](crate::StorageEngine) that keeps the cursors of durable subscriptions.
///
/// [`Step::take`] is the rule of a step, and [`SubscriptionChange::take`] that of a change of several cursors. The engine
/// only makes sure that steps on one cursor, and changes of it, run one after the other.
pub trait SubscriptionStorage {
    /// Takes a step on a cursor and returns the cursor after it; `None` if it was removed.
    ///
    /// * the cursor is read, [the step taken](Step::take) and its result written, or nothing is written, in one transaction
    ///   that no other step on the same cursor crosses;
    /// * the time is that of the engine's clock, never the caller's;
    /// * no cursor moves past the end of the log, or past events that are not the ones that were read;
    /// * a lease is not lost when the clock goes back;
    /// * an acknowledged step is durable, as a commit is;
    /// * a claim does not wait for a handler that works on the cursor: it is
    ///   [`AlreadyOwned`](crate::ErrorKind::AlreadyOwned), unless the engine has one writer for all, so that every call waits;
    /// * after `Unavailable` nothing was written, after `OutcomeUnknown` perhaps.
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, Result<Option<Cursor>>>;

    /// Changes any cursors of one subscription together, and returns the subscription after it.
    ///
    /// * all cursors of the subscription are read and held, [the change taken](SubscriptionChange::take) and all of its result
    ///   written, or nothing is written, in one transaction that no step on one of the cursors and no other change of the
    ///   subscription crosses, also if that one makes or removes cursors;
    /// * the cursors are held in order of their ids, so two changes do not wait for each other;
    /// * a change [waits](SubscriptionChange::waits) for a handler that works on one of the cursors in a transaction, as
    ///   a step does, at most as long as the engine waits for a lock: then it is `Unavailable`, and nothing was written;
    /// * a take-over that asks nobody to stand still does not wait for such a handler: it is [`AlreadyOwned`](crate::ErrorKind::AlreadyOwned), unless the
    ///   engine has one writer for all, so that every call waits;
    /// * otherwise the promises of [`step`](Self::step) hold: the engine's clock, durability, `OutcomeUnknown`.
    fn change<'a>(
        &'a self,
        name: &'a SubscriptionName,
        change: &'a SubscriptionChange,
    ) -> BoxFuture<'a, Result<Changed>>;

    /// The cursors of one subscription, or of all, ordered by id, and the engine's time.
    ///
    /// * cursors are listed by the whole name.
    fn cursors<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Cursors>>;

    /// The same cursors, each with what it has still to do, the end of the log, and the engine's time.
    ///
    /// * it takes as many statements for a thousand cursors as for one;
    /// * it counts the parked events of each cursor, also while there are very many.
    fn backlogs<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Backlogs>>;

    /// Parked events of a cursor after a position, in order, at most `limit`.
    ///
    /// * each cursor has its own parked events; one that is removed takes them along.
    fn parked<'a>(
        &'a self,
        id: &'a CursorId,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Parked>>>;
}

/// A cursor, and what it has still to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// The cursor.
    pub cursor: Cursor,
    /// When the first event after the cursor was recorded, whether or not its filter lets it through; `None` if there is
    /// no event after it.
    pub next_recorded_at: Option<Timestamp>,
    /// How many parked events it has.
    pub parked: u64,
    /// The earliest time at which one of these was parked.
    pub oldest_parked_at: Option<Timestamp>,
}

/// Cursors and their backlogs.
#[derive(Clone, Debug)]
pub struct Backlogs {
    /// A backlog for each cursor, ordered by id.
    pub backlogs: Vec<Backlog>,
    /// The end of the log.
    pub head: Position,
    /// The time of the engine's clock.
    pub now: Timestamp,
}

/// Cursors as of one moment.
#[derive(Clone, Debug)]
pub struct Cursors {
    /// The cursors.
    pub cursors: Vec<Cursor>,
    /// The time of the engine's clock.
    pub now: Timestamp,
}

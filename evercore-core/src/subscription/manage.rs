//! The calls of operators and readers: how far a subscription is, pause, resume, reset, remove, wait, parked events.

use std::time::{Duration, Instant};

use super::change::{Changed, SubscriptionChange, live_version};
use super::cursor::{Cursor, CursorId, CursorStatus, Parked, Selection};
use super::settings::Start;
use super::step::Step;
use super::storage::{Backlog, Backlogs};
use crate::batch::Receipt;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::name::SubscriptionName;
use crate::race::{First, race};
use crate::store::EventStore;
use crate::time::Timestamp;

/// How often to query cursors that other processes move. Clones of this store announce their own moves.
const POLL: Duration = Duration::from_millis(20);

/// How many parked events are read at once.
const PARKED_PAGE: usize = 1_000;

/// A cursor, and how far it is from the end of the log.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CursorState {
    /// The cursor.
    pub cursor: Cursor,
    /// Whether an owner holds its lease at the moment.
    pub is_owned: bool,
    /// Whether the cursor is past the end of the log. Then the log has lost its tail, or it is another log.
    pub is_ahead: bool,
    /// How many events of the log come after the cursor, also those that its filter leaves out. It grows without end if the
    /// cursor never moves again: if a newer version has taken over ([`Retired`](CursorStatus::Retired)), or if no program
    /// has that inline projection any more. [`EventStore::remove_version`] removes such cursors.
    pub lag_events: u64,
    /// How long ago the oldest of those was recorded, by the engine's clock; zero if there is none.
    pub lag_time: Duration,
    /// How long until the cursor can be claimed again, if its handler has just failed; zero otherwise.
    /// [`EventStore::resume_subscription`] ends this rest.
    pub rest: Duration,
    /// How many parked events it has.
    pub parked: u64,
    /// How long ago the first of these was parked; zero if there is none.
    pub parked_time: Duration,
}

impl CursorState {
    fn new(backlog: Backlog, head: Position, now: Timestamp) -> Self {
        let Backlog { cursor, next_recorded_at, parked, oldest_parked_at } = backlog;
        let age = |time: Option<Timestamp>| time.map_or(Duration::ZERO, |time| now.since(time));
        let is_resting = cursor.failure.is_some() && cursor.owner.is_none();
        Self {
            is_owned: cursor.is_owned(now),
            is_ahead: cursor.position > head,
            lag_events: u64::try_from(head.get() - cursor.position.get()).unwrap_or(0),
            lag_time: age(next_recorded_at),
            rest: if is_resting { cursor.expires_at.since(now) } else { Duration::ZERO },
            parked,
            parked_time: age(oldest_parked_at),
            cursor,
        }
    }
}

impl EventStore {
    /// All durable subscriptions: a state for each of their cursors, in order of name, version and partition. Inline
    /// projections are among them; their cursors have no owner.
    ///
    /// # Errors
    /// Those of the engine, such as [`Unavailable`](ErrorKind::Unavailable).
    pub async fn subscriptions(&self) -> Result<Vec<CursorState>> {
        self.states(None).await
    }

    pub(super) async fn states(&self, of: Option<&SubscriptionName>) -> Result<Vec<CursorState>> {
        let Backlogs { backlogs, head, now } = self.engine().backlogs(of).await?;
        Ok(backlogs.into_iter().map(|backlog| CursorState::new(backlog, head, now)).collect())
    }

    /// The states of one subscription's cursors, of all its versions.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such subscription; [`InvalidName`](ErrorKind::InvalidName); those
    /// of the engine.
    pub async fn subscription_states(&self, name: impl AsRef<str>) -> Result<Vec<CursorState>> {
        let name = SubscriptionName::new(name)?;
        let states = self.states(Some(&name)).await?;
        if states.is_empty() { Err(Error::no_subscription(&name)) } else { Ok(states) }
    }

    /// The version of a projection that readers should use: the one that was live first, until a newer one has taken over
    /// or another one was [promoted](Self::promote_version).
    ///
    /// # Errors
    /// As [`subscription_states`](Self::subscription_states).
    pub async fn live_version(&self, name: impl AsRef<str>) -> Result<u32> {
        let name = SubscriptionName::new(name)?;
        Ok(live(&name, &self.known(&name).await?)?.0)
    }

    async fn known(&self, name: &SubscriptionName) -> Result<Vec<Cursor>> {
        let cursors = self.engine().cursors(Some(name)).await?.cursors;
        if cursors.is_empty() { Err(Error::no_subscription(name)) } else { Ok(cursors) }
    }

    /// Waits until a projection has handled the events of a commit, so that a writer can read its own write there. Returns
    /// at once for a commit without events. The [live version](Self::live_version) counts. A move of the cursor is noticed
    /// at once if it is made through a clone of this store, and within 20 ms otherwise.
    ///
    /// An event that was parked or skipped counts as handled. With several partitions, all of them must come that far. A
    /// cursor that only has to pass events for which it has no handler does so at once if its runner uses a clone of this
    /// store. A runner elsewhere does not know who waits: its cursor passes events of other partitions within 50 ms, but
    /// events that the filter leaves out within 5 s. Any number of callers costs as much as one: they share their queries.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use evercore_core::{EventStore, Receipt, Result};
    /// # async fn answer(store: &EventStore, receipt: Receipt) -> Result<()> {
    /// store.wait_for(&receipt, "orders", Duration::from_secs(2)).await?;
    /// // The table of orders has it.
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if the cursor is not there in time; [`NotFound`](ErrorKind::NotFound) if
    /// there is no such subscription yet (see [`declare`](super::Subscription::declare));
    /// [`InvalidName`](ErrorKind::InvalidName); those of the engine.
    pub async fn wait_for(&self, receipt: &Receipt, name: impl AsRef<str>, at_most: Duration) -> Result<()> {
        self.wait_for_position(receipt.last, name, at_most).await
    }

    /// Like [`wait_for`](Self::wait_for) for a position, for instance one that came with a request.
    ///
    /// # Errors
    /// As [`wait_for`](Self::wait_for).
    pub async fn wait_for_position(
        &self,
        position: Position,
        name: impl AsRef<str>,
        at_most: Duration,
    ) -> Result<()> {
        let (name, began) = (SubscriptionName::new(name)?, Instant::now());
        let awaited = self.waits().of(&name);
        let _target = awaited.wait_for(position);
        let mut seen = awaited.reached.count();
        let mut found = self.list(&name, None).await?;
        loop {
            let cursors: Vec<_> =
                found.cursors.iter().filter(|it| it.id.subscription == name).cloned().collect();
            if cursors.is_empty() {
                return Err(Error::no_subscription(&name));
            }
            if live(&name, &cursors)?.1 >= position {
                return Ok(());
            }
            let left = at_most.saturating_sub(began.elapsed());
            if left.is_zero() {
                let message = format!("subscription \"{name}\" has not reached position {position} in time");
                return Err(Error::new(ErrorKind::Unavailable, message));
            }
            let before = awaited.reached.count();
            let polled = self.list(&name, Some(POLL.min(left)));
            found = match race(awaited.reached.after(seen), polled).await {
                First::Left(()) => {
                    seen = awaited.reached.count();
                    self.list(&name, None).await?
                }
                First::Right(polled) => {
                    seen = before;
                    polled?
                }
            };
        }
    }

    /// Pauses a subscription. Its owners finish the delivery at hand, which may have many events, and stop. It cannot be
    /// claimed until it is resumed.
    /// Callers of [`run`](super::Subscription::run) wait and then go on.
    ///
    /// An owner that works through a clone of this store learns of it at once. Other owners learn of it with their next
    /// step, at the latest after a third of the lease. This holds for all calls here. The call does not wait for the
    /// owners: one may still write after it has returned.
    ///
    /// # Errors
    /// [`Superseded`](ErrorKind::Superseded) if all versions are retired; otherwise as
    /// [`subscription_states`](Self::subscription_states).
    pub async fn pause_subscription(&self, name: impl AsRef<str>) -> Result<()> {
        self.pause_cursors(name, Selection::all()).await
    }

    /// As [`pause_subscription`](Self::pause_subscription), only some cursors: one version or one partition.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such cursor; [`Superseded`](ErrorKind::Superseded) if all of them
    /// are retired; those of the engine.
    pub async fn pause_cursors(&self, name: impl AsRef<str>, which: Selection) -> Result<()> {
        self.take_on_each(name, which, Step::Pause).await
    }

    /// The opposite of [`pause_subscription`](Self::pause_subscription); also ends the rest after a failure.
    ///
    /// # Errors
    /// As [`pause_subscription`](Self::pause_subscription).
    pub async fn resume_subscription(&self, name: impl AsRef<str>) -> Result<()> {
        self.resume_cursors(name, Selection::all()).await
    }

    /// As [`resume_subscription`](Self::resume_subscription), only some cursors.
    ///
    /// # Errors
    /// As [`pause_cursors`](Self::pause_cursors).
    pub async fn resume_cursors(&self, name: impl AsRef<str>, which: Selection) -> Result<()> {
        self.take_on_each(name, which, Step::Resume).await
    }

    /// Moves a subscription to another place of the log. Its owners lose their leases. Events up to the old position are
    /// delivered as [replay](super::Delivery::is_replay). Parked events were not handled, so resume or drop them first.
    ///
    /// The handler's earlier effects stay. To fill the tables of a projection again: pause, reset, empty the tables, resume,
    /// in this order. Before the reset an owner may still write, and during the pause no new owner comes; in another order
    /// a row may be written twice or be missing. With a new [version](super::Subscription::with_version) readers need not
    /// do without the tables meanwhile.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if there are parked events; [`CursorAhead`](ErrorKind::CursorAhead) past the end of
    /// the log; otherwise as [`subscription_states`](Self::subscription_states).
    pub async fn reset_subscription(&self, name: impl AsRef<str>, to: Start) -> Result<()> {
        self.reset_cursors(name, Selection::all(), to).await
    }

    /// As [`reset_subscription`](Self::reset_subscription), only some cursors. No other cursor moves or loses its lease.
    ///
    /// ```
    /// # use evercore_core::{EventStore, Position, Result, Selection, Start};
    /// # async fn repeat(store: &EventStore) -> Result<()> {
    /// // Partition 3 of version 2 handles the events after position 4711 again.
    /// let which = Selection::of_version(2).and_partition(3);
    /// store.reset_cursors("mails", which, Start::After(Position::new(4711)?)).await
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if one of them has parked events; [`CursorAhead`](ErrorKind::CursorAhead) past the
    /// end of the log; otherwise as [`pause_cursors`](Self::pause_cursors). After an error no cursor has moved.
    pub async fn reset_cursors(&self, name: impl AsRef<str>, which: Selection, to: Start) -> Result<()> {
        let position = to.resolve(self, self.head().await?).await?;
        self.take_on_each(name, which, Step::reset(position)).await
    }

    /// The same step on each of these cursors that is not retired, in one transaction.
    async fn take_on_each(&self, name: impl AsRef<str>, which: Selection, step: Step) -> Result<()> {
        let change = SubscriptionChange::each(which, step);
        self.change_subscription(&SubscriptionName::new(name)?, change).await.map(drop)
    }

    /// Skips the event at which the handler of one cursor fails, for good. No other cursor moves, and no other event is
    /// left out. The owner of the cursor, if there is one, loses the lease, and the next one begins with the next event.
    ///
    /// [`Failure::position`](super::Failure::position) of the cursor tells the position. It is named here so that two
    /// operators do not skip two events. To keep the event for later, let the policy
    /// [park](super::FailureAction::Park) it.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if the handler does not fail at this position any more;
    /// [`NotFound`](ErrorKind::NotFound) if there is no such cursor; [`Superseded`](ErrorKind::Superseded) if its version is
    /// retired; [`TailLost`](ErrorKind::TailLost) if the log has lost the event; those of the engine.
    pub async fn skip_event(&self, cursor: &CursorId, position: Position) -> Result<()> {
        self.engine().step(cursor, &Step::skip(position)).await?;
        self.operator_calls().send();
        self.cursor_moves().send();
        Ok(())
    }

    /// Removes one version of a subscription with its cursors and parked events. Its runners lose their leases. The
    /// handler's effects stay.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such version; [`Invalid`](ErrorKind::Invalid) if it is the live one
    /// and there are others: promote another one first, or [remove all](Self::remove_subscription); those of the engine.
    pub async fn remove_version(&self, name: impl AsRef<str>, version: u32) -> Result<()> {
        let name = SubscriptionName::new(name)?;
        self.change_subscription(&name, SubscriptionChange::remove(Some(version))).await.map(drop)
    }

    /// Removes a subscription with all its versions, their cursors and parked events. Its runners lose their leases. The
    /// handlers' effects stay. If it is run again, it begins from its start, with all events that are in the log then as
    /// [replay](super::Delivery::is_replay).
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such subscription; those of the engine.
    pub async fn remove_subscription(&self, name: impl AsRef<str>) -> Result<()> {
        let name = SubscriptionName::new(name)?;
        self.change_subscription(&name, SubscriptionChange::remove(None)).await.map(drop)
    }

    /// Makes any version live, also one that is held, and an older one that is retired. The version that was live is held
    /// if it is newer, and retired if it is older. All of this is one step.
    ///
    /// The owners of the other version lose their leases. The call does not wait for them: a delivery at hand may still come to
    /// its end, and its events are live for the promoted version too, unless a projection of an engine handles them.
    ///
    /// Events that the version before has handled are [replay](super::Delivery::is_replay) for the promoted one, so no event
    /// is live twice and none is left out, if both have the same number of partitions. Events that the other version has parked stay listed with it:
    /// [`Promotion::left_parked`] counts them.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such version; [`Invalid`](ErrorKind::Invalid) if it is live already;
    /// those of the engine.
    pub async fn promote_version(&self, name: impl AsRef<str>, version: u32) -> Result<Promotion> {
        self.promote(&SubscriptionName::new(name)?, Some(version)).await
    }

    /// [Promotes](Self::promote_version) the version before: the newest one that is retired and older than the live one.
    /// The version that was live is held. A later version of it, when it is deployed, takes over from the older one.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if there is no such version, for instance because it was removed; otherwise as
    /// [`promote_version`](Self::promote_version).
    pub async fn roll_back(&self, name: impl AsRef<str>) -> Result<Promotion> {
        self.promote(&SubscriptionName::new(name)?, None).await
    }

    async fn promote(&self, name: &SubscriptionName, version: Option<u32>) -> Result<Promotion> {
        let changed = self.change_subscription(name, SubscriptionChange::promote(version)).await?;
        let (live, _) = live(name, &changed.cursors)?;
        let own = changed.cursors.iter().filter(|cursor| cursor.id.version == live);
        let behind = own.map(|cursor| {
            let to_replay = cursor.live_from.unwrap_or_default().get() - cursor.position.get();
            u64::try_from(to_replay).unwrap_or(0)
        });
        let (former, left_parked) = (changed.former.last().copied(), changed.left_parked);
        Ok(Promotion { version: live, former, behind: behind.max().unwrap_or(0), left_parked })
    }

    /// Lets a version that is being built wait for its [promotion](Self::promote_version), as
    /// [`held`](super::Subscription::held) does from the start.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such version; [`Invalid`](ErrorKind::Invalid) if it is held already,
    /// live or retired; those of the engine.
    pub async fn hold_version(&self, name: impl AsRef<str>, version: u32) -> Result<()> {
        let name = SubscriptionName::new(name)?;
        self.change_subscription(&name, SubscriptionChange::hold(version, true)).await.map(drop)
    }

    /// The opposite of [`hold_version`](Self::hold_version): the version takes over by itself when it has caught up.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such version; [`Invalid`](ErrorKind::Invalid) if it is not held; those
    /// of the engine.
    pub async fn release_version(&self, name: impl AsRef<str>, version: u32) -> Result<()> {
        let name = SubscriptionName::new(name)?;
        self.change_subscription(&name, SubscriptionChange::hold(version, false)).await.map(drop)
    }

    /// Changes several cursors together, and tells owners and waiters of this store.
    pub(crate) async fn change_subscription(
        &self,
        name: &SubscriptionName,
        change: SubscriptionChange,
    ) -> Result<Changed> {
        let changed = self.engine().change(name, &change).await?;
        self.operator_calls().send();
        self.cursor_moves().send();
        Ok(changed)
    }

    /// The parked events of a subscription, of all its versions and partitions, with the cursor to which each belongs.
    ///
    /// # Errors
    /// As [`subscription_states`](Self::subscription_states).
    pub async fn parked(&self, name: impl AsRef<str>) -> Result<Vec<(CursorId, Parked)>> {
        let name = SubscriptionName::new(name)?;
        let mut all = Vec::new();
        for cursor in self.known(&name).await? {
            let mut after = Position::ZERO;
            loop {
                let page = self.engine().parked(&cursor.id, after, PARKED_PAGE).await?;
                let Some(last) = page.last() else { break };
                after = last.position;
                all.extend(page.into_iter().map(|parked| (cursor.id.clone(), parked)));
            }
        }
        Ok(all)
    }

    /// Marks a parked event to be tried once more by the [runner](super::Subscription::run) of the subscription; `None` marks
    /// all of them. Events that waited for it follow in order. If it fails, it is parked as before, with the new error. It
    /// is no error if no event is parked at this position.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such cursor; [`Superseded`](ErrorKind::Superseded) if a newer version
    /// has taken over, so that this one has no runner any more; those of the engine.
    pub async fn resume_parked(&self, cursor: &CursorId, position: Option<Position>) -> Result<()> {
        self.engine().step(cursor, &Step::ResumeParked { position }).await?;
        self.operator_calls().send();
        Ok(())
    }

    /// Drops a parked event; `None` drops all of them. Events of its aggregate that have waited for it are dropped with it.
    /// Later ones are delivered.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such cursor; those of the engine.
    pub async fn drop_parked(&self, cursor: &CursorId, position: Option<Position>) -> Result<()> {
        self.engine().step(cursor, &Step::DropParked { position }).await?;
        self.operator_calls().send();
        Ok(())
    }
}

/// The result of a [promotion](EventStore::promote_version).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Promotion {
    /// The version that is live now.
    pub version: u32,
    /// The version that was live before; `None` if there was none.
    pub former: Option<u32>,
    /// How many events of the log the live version has still to handle as replay before it is as far as the former one
    /// was. Its tables lack them until then. With several partitions it is the largest number.
    pub behind: u64,
    /// How many events the former version has parked. They stay listed with it, and the live version gets them as replay.
    pub left_parked: u64,
}

/// The live version, and the position that all its partitions have reached. If no version is live, it is the oldest that
/// is not retired, or else the newest.
pub(super) fn live(name: &SubscriptionName, cursors: &[Cursor]) -> Result<(u32, Position)> {
    let going = || cursors.iter().filter(|cursor| cursor.status != CursorStatus::Retired);
    let version = live_version(cursors)
        .or_else(|| going().map(|cursor| cursor.id.version).min())
        .or_else(|| cursors.iter().map(|cursor| cursor.id.version).max());
    let Some(version) = version else { return Err(Error::no_subscription(name)) };
    let own = cursors.iter().filter(|cursor| cursor.id.version == version);
    Ok((version, own.map(|cursor| cursor.position).min().unwrap_or_default()))
}

//! What operators and readers ask of subscriptions: how far they are, to pause, to begin again, to wait for them.

use std::time::{Duration, Instant};

use super::cursor::{Cursor, CursorId, CursorStatus, Parked};
use super::settings::Start;
use super::step::Step;
use crate::batch::Receipt;
use crate::engine::{LogQuery, PageLimit};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::name::SubscriptionName;
use crate::race::race;
use crate::store::EventStore;

/// How often to look for cursors that others move; those moved through clones of this store ring a bell.
const LOOK: Duration = Duration::from_millis(20);

/// How many parked events are read at once.
const PARKED_PAGE: usize = 1_000;

/// A cursor, and how far it is behind.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CursorState {
    /// The cursor.
    pub cursor: Cursor,
    /// Whether somebody holds its lease at the moment.
    pub is_owned: bool,
    /// Whether it stands behind the end of the log, which then has lost its tail, or is another one.
    pub is_ahead: bool,
    /// How many events of the log lie behind it, whether they concern it or not. It grows for ever where nobody moves the
    /// cursor any more: where a newer version has taken over ([`Retired`](CursorStatus::Retired)), or no program has that
    /// inline projection. [`EventStore::remove_subscription`] removes those.
    pub lag_events: u64,
    /// How long ago the oldest of those was recorded, by the engine's clock; zero if there is none.
    pub lag_time: Duration,
    /// For how long nobody may claim it yet, because it has failed a moment ago; zero otherwise.
    /// [`EventStore::resume_subscription`] ends it.
    pub rest: Duration,
}

impl EventStore {
    /// All durable subscriptions: a state for each of their cursors, in order of name, version and partition. Inline
    /// projections are among them; nobody owns their cursors.
    ///
    /// # Errors
    /// What the engine says when it is out of reach.
    pub async fn subscriptions(&self) -> Result<Vec<CursorState>> {
        self.states(None).await
    }

    async fn states(&self, of: Option<&SubscriptionName>) -> Result<Vec<CursorState>> {
        let found = self.engine().cursors(of).await?;
        let head = self.head().await?;
        let mut states = Vec::new();
        for cursor in found.cursors {
            let lag_events = u64::try_from(head.get() - cursor.position.get()).unwrap_or(0);
            let lag_time = match lag_events {
                0 => Duration::ZERO,
                _ => {
                    let next = LogQuery::after(cursor.position).with_limit(PageLimit::events(1)?);
                    let oldest = self.read_log(&next).await?.events.first();
                    oldest.map_or(Duration::ZERO, |event| found.now.since(event.recorded_at()))
                }
            };
            let (is_owned, is_ahead) = (cursor.is_owned(found.now), cursor.position > head);
            let rest = match cursor.failure.is_some() && cursor.owner.is_none() {
                true => cursor.expires_at.since(found.now),
                false => Duration::ZERO,
            };
            states.push(CursorState { is_owned, is_ahead, lag_events, lag_time, rest, cursor });
        }
        Ok(states)
    }

    /// The states of one subscription's cursors, of all its versions.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is none; [`InvalidName`](ErrorKind::InvalidName); what the engine says
    /// when it is out of reach.
    pub async fn subscription_states(&self, name: impl AsRef<str>) -> Result<Vec<CursorState>> {
        let name = SubscriptionName::new(name)?;
        let states = self.states(Some(&name)).await?;
        if states.is_empty() { Err(no_subscription(&name)) } else { Ok(states) }
    }

    /// The version of a projection that readers should use: the newest that is built and has taken over; the oldest that
    /// is not over if there is none.
    ///
    /// # Errors
    /// As [`subscription_states`](Self::subscription_states).
    pub async fn live_version(&self, name: impl AsRef<str>) -> Result<u32> {
        let name = SubscriptionName::new(name)?;
        Ok(live(self.known(&name).await?)?.0)
    }

    async fn known(&self, name: &SubscriptionName) -> Result<Vec<Cursor>> {
        let cursors = self.engine().cursors(Some(name)).await?.cursors;
        if cursors.is_empty() { Err(no_subscription(name)) } else { Ok(cursors) }
    }

    /// Waits until a projection has seen what a commit wrote, so that who wrote it can read it there. At once for a commit
    /// that wrote no event. It is the live version that counts. A cursor that is moved through a clone of this store is
    /// noticed at once, others within 20 ms.
    ///
    /// An event that was parked or skipped counts as seen. Where a cursor has only to pass events that its filter leaves
    /// out, or that belong to other partitions, it does so up to 50 ms after its last move; with several partitions all of
    /// them have to come that far.
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
    /// [`Unavailable`](ErrorKind::Unavailable) if it has not come that far in time; [`NotFound`](ErrorKind::NotFound) if
    /// there is no such subscription (yet: see [`declare`](super::Subscription::declare));
    /// [`InvalidName`](ErrorKind::InvalidName); what the engine says.
    pub async fn wait_for(&self, receipt: &Receipt, name: impl AsRef<str>, at_most: Duration) -> Result<()> {
        self.wait_for_position(receipt.last, name, at_most).await
    }

    /// The same for a position, such as one that came with a request.
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
        loop {
            let rung = self.rings().times();
            if live(self.known(&name).await?)?.1 >= position {
                return Ok(());
            }
            let left = at_most.saturating_sub(began.elapsed());
            if left.is_zero() {
                let message = format!("subscription \"{name}\" has not reached position {position} in time");
                return Err(Error::new(ErrorKind::Unavailable, message));
            }
            race(self.rings().rings_after(rung), self.engine().pause(LOOK.min(left))).await;
        }
    }

    /// Has all owners of a subscription end what they are about and stop; nobody can claim it until it is resumed. Those
    /// who [run](super::Subscription::run) it wait, and go on then.
    ///
    /// An owner that works through a clone of this store learns of it at once, others with their next step, at the latest
    /// when a third of the lease is over. So it is with all calls here. This does not wait for it: an owner may still write
    /// when it has returned.
    ///
    /// # Errors
    /// As [`subscription_states`](Self::subscription_states).
    pub async fn pause_subscription(&self, name: impl AsRef<str>) -> Result<()> {
        self.step_on_all(name, &Step::Pause).await
    }

    /// The opposite of [`pause_subscription`](Self::pause_subscription); also ends the rest after a failure.
    ///
    /// # Errors
    /// As [`subscription_states`](Self::subscription_states).
    pub async fn resume_subscription(&self, name: impl AsRef<str>) -> Result<()> {
        self.step_on_all(name, &Step::Resume).await
    }

    /// Has a subscription begin elsewhere. Its owners lose their leases. What lies before the old cursor comes as
    /// [replay](super::Delivery::is_replay); so parked events, which were not handled, have to be resumed or dropped first.
    ///
    /// What the handler wrote stays. To fill the tables of a projection anew in their place: pause, reset, empty them,
    /// resume. In another order something may be written in between that then is there twice or missing: until it is reset
    /// an owner may still write, and while it is paused no other comes. A new
    /// [version](super::Subscription::with_version) spares readers the time without a table.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if there are parked events; [`CursorAhead`](ErrorKind::CursorAhead) past the end of
    /// the log; otherwise as [`subscription_states`](Self::subscription_states).
    pub async fn reset_subscription(&self, name: impl AsRef<str>, to: Start) -> Result<()> {
        let name = SubscriptionName::new(name)?;
        let position = to.resolve(self).await?;
        let active = self.known(&name).await?.into_iter().filter(|it| it.status != CursorStatus::Retired);
        for cursor in active {
            if !self.engine().parked(&cursor.id, Position::ZERO, 1).await?.is_empty() {
                let message = format!("subscription \"{name}\" has parked events: resume or drop them first");
                return Err(Error::invalid(message));
            }
        }
        self.step_on_all(name, &Step::reset(position)).await
    }

    /// Forgets one version of a subscription, its cursors and parked events. A runner of it loses its lease. What the
    /// handler wrote stays. Run again, it begins anew, and unless an older version is there, all of it is live.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is none; [`Invalid`](ErrorKind::Invalid) while a newer one is being built,
    /// which would take what this one has handled for live: remove that one first, or let it take over; what the engine says.
    pub async fn remove_subscription(&self, name: impl AsRef<str>, version: u32) -> Result<()> {
        let name = SubscriptionName::new(name)?;
        let known = self.known(&name).await?;
        let is_built_upon = |newer: &Cursor| newer.id.version > version && newer.live_from.is_none();
        if let Some(newer) = known.iter().find(|cursor| is_built_upon(cursor)) {
            let message = format!(
                "version {} of subscription \"{name}\" is being built beside version {version}",
                newer.id.version
            );
            return Err(Error::invalid(message));
        }
        let cursors = known.into_iter().filter(|cursor| cursor.id.version == version);
        let ids: Vec<CursorId> = cursors.map(|cursor| cursor.id).collect();
        if ids.is_empty() {
            return Err(no_subscription(&name));
        }
        for id in ids {
            self.engine().step(&id, &Step::Remove).await?;
        }
        self.operated().ring();
        Ok(())
    }

    /// On all cursors that are not retired.
    async fn step_on_all(&self, name: impl AsRef<str>, step: &Step) -> Result<()> {
        let name = SubscriptionName::new(name)?;
        for cursor in self.known(&name).await? {
            if cursor.status != CursorStatus::Retired {
                self.engine().step(&cursor.id, step).await?;
            }
        }
        self.operated().ring();
        self.rings().ring();
        Ok(())
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

    /// Has a parked event tried again, once, by whoever [runs](super::Subscription::run) the subscription; `None`: all of
    /// them. Events that waited behind it follow in order. If it fails, it is parked as before, with the new error. That
    /// nothing is parked at this position is no error.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such cursor; [`Superseded`](ErrorKind::Superseded) if nobody will
    /// do so any more, since a newer version has taken over; what the engine says.
    pub async fn resume_parked(&self, cursor: &CursorId, position: Option<Position>) -> Result<()> {
        self.engine().step(cursor, &Step::ResumeParked { position }).await?;
        self.operated().ring();
        Ok(())
    }

    /// Forgets a parked event, `None`: all of them. Events of its aggregate that have waited behind it until now are
    /// passed over with it; those that come later are delivered again.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such cursor; what the engine says.
    pub async fn drop_parked(&self, cursor: &CursorId, position: Option<Position>) -> Result<()> {
        self.engine().step(cursor, &Step::DropParked { position }).await?;
        self.operated().ring();
        Ok(())
    }
}

/// The version that counts, and how far all its partitions have come.
fn live(mut cursors: Vec<Cursor>) -> Result<(u32, Position)> {
    let is_over = |cursor: &Cursor| cursor.status == CursorStatus::Retired;
    let going: Vec<u32> = cursors.iter().filter(|it| !is_over(it)).map(|it| it.id.version).collect();
    if !going.is_empty() {
        cursors.retain(|cursor| going.contains(&cursor.id.version));
    }
    let mut versions: Vec<(u32, bool, Position)> = Vec::new();
    for cursor in cursors {
        let is_built = cursor.live_from.is_some_and(|from| cursor.position >= from);
        match versions.last_mut() {
            Some((version, all_built, least)) if *version == cursor.id.version => {
                *all_built &= is_built;
                *least = cursor.position.min(*least);
            }
            _ => versions.push((cursor.id.version, is_built, cursor.position)),
        }
    }
    // A version that was reset is behind its beginning for a while: better that than one not yet built.
    let newest_built = versions.iter().rev().find(|(_, is_built, _)| *is_built);
    let found = newest_built.or(versions.first());
    found
        .map(|(version, _, position)| (*version, *position))
        .ok_or_else(|| Error::new(ErrorKind::NotFound, "there is no such subscription"))
}

fn no_subscription(name: &SubscriptionName) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no subscription \"{name}\""))
}

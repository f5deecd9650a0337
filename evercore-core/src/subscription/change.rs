//! The rule of a subscription as a whole: every change of several of its cursors, as one pure function that all engines
//! call inside one transaction.

use std::collections::HashMap;
use std::time::Duration;

use super::cursor::{Cursor, CursorId, CursorStatus, Lease, Selection};
use super::step::{Step, StepOutcome};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::name::SubscriptionName;
use crate::time::Timestamp;

/// One change of any cursors of one subscription. An engine locks and reads all cursors of the subscription,
/// [takes](Self::take) the change, and writes the whole result or nothing, in one transaction and by its own clock.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SubscriptionChange {
    /// Makes all cursors of a version, unless they exist.
    #[non_exhaustive]
    Declare {
        /// The version.
        version: u32,
        /// How many partitions it has.
        partitions: u32,
        /// Where the version begins, by its own settings.
        start: Position,
        /// Events up to here are replay for the first version of a subscription.
        past: Position,
        /// Whether the version waits for [`Promote`](Self::Promote) after it has caught up. It does not count for the
        /// first version of a subscription.
        is_held: bool,
    },
    /// Takes the same step on each selected cursor that is not retired. It is a step of an operator, which needs no lease.
    #[non_exhaustive]
    Each {
        /// Which cursors.
        which: Selection,
        /// The step.
        step: Step,
    },
    /// Removes a version, or the whole subscription.
    #[non_exhaustive]
    Remove {
        /// The version; `None` for all.
        version: Option<u32>,
    },
    /// Makes a version live that has reached the live one with all its partitions, and retires all older versions.
    /// Changes nothing if it is not time yet.
    #[non_exhaustive]
    TakeOver {
        /// A cursor of the version that takes over.
        by: CursorId,
        /// The lease of that cursor.
        lease: Lease,
        /// If it is not time yet only because the live version keeps moving: ask its owners to stand still for this long.
        wait: Duration,
    },
    /// Makes any version live, at the wish of an operator.
    #[non_exhaustive]
    Promote {
        /// The version; `None` for the newest retired one that is older than the live one.
        version: Option<u32>,
    },
    /// Lets a version that is not live wait for a [`Promote`](Self::Promote), or lets it take over by itself again.
    #[non_exhaustive]
    Hold {
        /// The version.
        version: u32,
        /// Whether it waits.
        is_held: bool,
    },
}

/// All that an engine reads for a [`SubscriptionChange`].
#[derive(Clone, Debug)]
pub struct Subject {
    /// All cursors of the subscription, ordered by id.
    pub cursors: Vec<Cursor>,
    /// How many parked events each cursor has. Those without any may be missing.
    pub parked: HashMap<CursorId, u64>,
    /// The time of the engine's clock.
    pub now: Timestamp,
    /// The end of the log.
    pub head: Position,
}

/// The result of a change, which the engine writes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ChangeOutcome {
    /// Only the cursors that change, in order of their ids.
    pub writes: Vec<(CursorId, StepOutcome)>,
    /// The answer to the caller of the change.
    pub changed: Changed,
}

/// A subscription after a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// All its cursors, ordered by id.
    pub cursors: Vec<Cursor>,
    /// The versions that were live before and are not any more.
    pub former: Vec<u32>,
    /// How many parked events those versions have. They stay listed.
    pub left_parked: u64,
}

impl SubscriptionChange {
    /// Makes all cursors of a version, unless they exist.
    pub const fn declare(version: u32, partitions: u32, start: Position, is_held: bool) -> Self {
        Self::Declare { version, partitions, start, past: start, is_held }
    }

    /// The same declaration, with events up to here as replay if it is the first version of the subscription.
    #[must_use]
    pub fn with_past(mut self, to: Position) -> Self {
        if let Self::Declare { past, .. } = &mut self {
            *past = to;
        }
        self
    }

    /// Takes the same step of an operator on each selected cursor that is not retired.
    pub const fn each(which: Selection, step: Step) -> Self {
        Self::Each { which, step }
    }

    /// Removes a version, or the whole subscription with `None`.
    pub const fn remove(version: Option<u32>) -> Self {
        Self::Remove { version }
    }

    /// Makes the version of this cursor live if it has reached the live one.
    pub const fn take_over(by: CursorId, lease: Lease, wait: Duration) -> Self {
        Self::TakeOver { by, lease, wait }
    }

    /// Makes a version live; with `None` the newest retired one before the live one.
    pub const fn promote(version: Option<u32>) -> Self {
        Self::Promote { version }
    }

    /// Lets a version wait for its promotion, or not any more.
    pub const fn hold(version: u32, is_held: bool) -> Self {
        Self::Hold { version, is_held }
    }

    /// Whether this waits for transactions that hold one of the cursors, such as handlers at work. A take-over does not:
    /// it comes by itself and is tried again. But if it asks the live version to stand still, it waits: with handlers at
    /// work in several partitions there may be no moment at which none of the cursors is held.
    pub const fn waits(&self) -> bool {
        match self {
            Self::TakeOver { wait, .. } => !wait.is_zero(),
            _ => true,
        }
    }

    /// Applies this change to all cursors of a subscription.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such subscription, version or partition;
    /// [`Superseded`](ErrorKind::Superseded) if all selected cursors are retired, or a newer version than a declared one
    /// exists; [`Invalid`](ErrorKind::Invalid) if the subscription does not allow the change now;
    /// [`LeaseLost`](ErrorKind::LeaseLost) if the lease of a take-over is lost. After an error nothing is written.
    pub fn take(&self, name: &SubscriptionName, subject: &Subject) -> Result<ChangeOutcome> {
        let mut change = Change::new(name, subject);
        if !matches!(self, Self::Declare { .. }) && subject.cursors.is_empty() {
            return Err(Error::no_subscription(name));
        }
        match self {
            Self::Declare { version, partitions, start, past, is_held } => {
                change.declare(*version, *partitions, (*start, *past), *is_held)?;
            }
            Self::Each { which, step } => change.each(*which, step)?,
            Self::Remove { version } => change.remove(*version)?,
            Self::TakeOver { by, lease, wait } => change.take_over(by, lease, *wait)?,
            Self::Promote { version } => change.promote(*version)?,
            Self::Hold { version, is_held } => change.hold(*version, *is_held)?,
        }
        Ok(change.finish())
    }
}

/// A change that is being worked out.
struct Change<'a> {
    name: &'a SubscriptionName,
    before: &'a Subject,
    /// The cursors after the change so far, also those that are made.
    after: Vec<(Cursor, Option<StepOutcome>)>,
    removed: Vec<CursorId>,
}

impl<'a> Change<'a> {
    fn new(name: &'a SubscriptionName, before: &'a Subject) -> Self {
        let after = before.cursors.iter().map(|cursor| (cursor.clone(), None)).collect();
        Self { name, before, after, removed: Vec::new() }
    }

    fn finish(self) -> ChangeOutcome {
        let cursors: Vec<Cursor> = self.after.iter().map(|(cursor, _)| cursor.clone()).collect();
        let is_live = |version: &u32| live_versions(&cursors).any(|live| live == *version);
        let mut former: Vec<u32> = live_versions(&self.before.cursors).filter(|it| !is_live(it)).collect();
        former.dedup();
        let of_former = cursors.iter().filter(|cursor| former.contains(&cursor.id.version));
        let left_parked = of_former.map(|cursor| self.before.parked_of(&cursor.id)).sum();
        let mut writes = Vec::new();
        for (cursor, outcome) in self.after {
            let known = self.before.cursors.iter().find(|known| known.id == cursor.id);
            let parked = outcome.map(|outcome| outcome.parked).unwrap_or_default();
            if known != Some(&cursor) || !parked.is_empty() {
                let id = cursor.id.clone();
                writes.push((id, StepOutcome { cursor: Some(cursor), parked }));
            }
        }
        let gone = |id: CursorId| (id, StepOutcome::removed());
        writes.extend(self.removed.into_iter().map(gone));
        writes.sort_by(|(one, _), (other, _)| one.cmp(other));
        ChangeOutcome { writes, changed: Changed { cursors, former, left_parked } }
    }

    fn declare(
        &mut self,
        version: u32,
        partitions: u32,
        (start, past): (Position, Position),
        is_held: bool,
    ) -> Result<()> {
        let known = &self.before.cursors;
        let own: Vec<&Cursor> = known.iter().filter(|cursor| cursor.id.version == version).collect();
        if let Some(other) = own.iter().find(|cursor| cursor.partitions != partitions) {
            return Err(Error::invalid(format!(
                "version {version} of subscription \"{}\" has {} partitions, not {partitions}: raise the version to \
                 change their number",
                self.name, other.partitions
            )));
        }
        let newer = known.iter().map(|cursor| cursor.id.version).max().filter(|newest| *newest > version);
        if let (true, Some(newer)) = (own.is_empty(), newer) {
            let message = format!(
                "version {version} of subscription \"{}\" is older than version {newer}, which exists: \
                 raise the version, or remove the newer one first",
                self.name
            );
            return Err(Error::new(ErrorKind::Superseded, message));
        }
        // Events that an older version has not handled yet belong to this version, even if its own start is later.
        let others = known.iter().filter(|it| it.id.version < version && it.status != CursorStatus::Retired);
        let least = others.map(|older| older.position).fold(start, Position::min);
        let is_first = known.iter().all(|cursor| cursor.id.version >= version);
        let (position, live_from, is_held) = match own.first() {
            Some(begun) => (begun.position, begun.live_from, begun.is_held),
            None => (least, is_first.then_some(start.max(past)), is_held && !is_first),
        };
        for partition in 0..partitions {
            let id = CursorId { subscription: self.name.clone(), version, partition };
            if own.iter().all(|cursor| cursor.id != id) {
                let declare = Step::declare(partitions, position, live_from);
                if let Some(made) = declare.take(&id, None, self.before.now, None)?.cursor {
                    self.after.push((Cursor { is_held, ..made }, None));
                }
            }
        }
        self.after.sort_by(|(one, _), (other, _)| one.id.cmp(&other.id));
        Ok(())
    }

    fn each(&mut self, which: Selection, step: &Step) -> Result<()> {
        if !step.is_of_operator() {
            return Err(Error::invalid("this step needs a lease, so it is taken on one cursor"));
        }
        let is_selected = |cursor: &Cursor| which.has(&cursor.id);
        self.check_selection(which)?;
        let (before, now) = (self.before, self.before.now);
        for (cursor, outcome) in &mut self.after {
            if !is_selected(cursor) || cursor.status == CursorStatus::Retired {
                continue;
            }
            if matches!(step, Step::Reset { .. }) && before.parked_of(&cursor.id) > 0 {
                let message = format!(
                    "partition {} of version {} of subscription \"{}\" has parked events: resume or drop them first",
                    cursor.id.partition, cursor.id.version, self.name
                );
                return Err(Error::invalid(message));
            }
            let taken = step.take(&cursor.id, Some(cursor.clone()), now, None)?;
            if let Some(changed) = &taken.cursor {
                *cursor = changed.clone();
            }
            *outcome = Some(taken);
        }
        Ok(())
    }

    /// Whether there is a cursor to change.
    fn check_selection(&self, which: Selection) -> Result<()> {
        let mut selected = self.before.cursors.iter().filter(|cursor| which.has(&cursor.id)).peekable();
        if selected.peek().is_none() {
            return Err(Error::nothing_selected(self.name, which));
        }
        if selected.all(|cursor| cursor.status == CursorStatus::Retired) {
            let message = match which.version() {
                Some(version) => format!(
                    "version {version} of subscription \"{}\" is retired: promote it, or roll back to it",
                    self.name
                ),
                None => {
                    format!("all versions of subscription \"{}\" are retired: promote one of them", self.name)
                }
            };
            return Err(Error::new(ErrorKind::Superseded, message));
        }
        Ok(())
    }

    fn remove(&mut self, version: Option<u32>) -> Result<()> {
        let which = version.map_or(Selection::all(), Selection::of_version);
        if self.before.cursors.iter().all(|cursor| !which.has(&cursor.id)) {
            return Err(Error::nothing_selected(self.name, which));
        }
        let others = self.before.cursors.iter().any(|cursor| !which.has(&cursor.id));
        if let Some(version) =
            version.filter(|version| others && live_version(&self.before.cursors) == Some(*version))
        {
            return Err(Error::invalid(format!(
                "version {version} of subscription \"{}\" is the live one: promote another version first, or remove \
                 the whole subscription",
                self.name
            )));
        }
        self.removed =
            self.before.cursors.iter().map(|it| &it.id).filter(|id| which.has(id)).cloned().collect();
        self.after.retain(|(cursor, _)| !which.has(&cursor.id));
        Ok(())
    }

    fn take_over(&mut self, by: &CursorId, lease: &Lease, wait: Duration) -> Result<()> {
        let own = self.before.cursors.iter().find(|cursor| cursor.id == *by);
        own.ok_or_else(|| Error::nothing_selected(self.name, Selection::of_version(by.version)))?
            .check(lease)?;
        match self.before.obstacle(by.version) {
            None => self.make_live(by.version),
            Some(Obstacle::Behind) if !wait.is_zero() => {
                let live = live_version(&self.before.cursors);
                let until = self.before.now.plus(wait);
                let live = self.after.iter_mut().filter(|(cursor, _)| Some(cursor.id.version) == live);
                for (cursor, _) in live {
                    cursor.wanted_by = Some(lease.owner.clone());
                    cursor.wanted_until = until;
                }
            }
            Some(_) => {}
        }
        Ok(())
    }

    fn promote(&mut self, version: Option<u32>) -> Result<()> {
        let known = &self.before.cursors;
        let live = live_version(known);
        let version = match version {
            Some(version) => version,
            None => self.version_before(live)?,
        };
        if known.iter().all(|cursor| cursor.id.version != version) {
            return Err(Error::nothing_selected(self.name, Selection::of_version(version)));
        }
        if live == Some(version) {
            let message = format!("version {version} of subscription \"{}\" is live already", self.name);
            return Err(Error::invalid(message));
        }
        self.make_live(version);
        // Its owners, if there are any, have read it as a version that is not live.
        for (cursor, _) in self.after.iter_mut().filter(|(cursor, _)| cursor.id.version == version) {
            cursor.take_lease();
        }
        Ok(())
    }

    /// The newest retired version before the live one.
    fn version_before(&self, live: Option<u32>) -> Result<u32> {
        // One that never was live has no position from which events are live, and neither has one that was demoted.
        let is_retired =
            |cursor: &&Cursor| cursor.status == CursorStatus::Retired && cursor.live_from.is_some();
        let retired = self.before.cursors.iter().filter(is_retired).map(|cursor| cursor.id.version);
        retired.filter(|version| live.is_none_or(|live| *version < live)).max().ok_or_else(|| {
            let message = format!(
                "subscription \"{}\" has no older version to roll back to; promote_version takes any",
                self.name
            );
            Error::invalid(message)
        })
    }

    fn hold(&mut self, version: u32, is_held: bool) -> Result<()> {
        let of_version = self.before.cursors.iter().filter(|cursor| cursor.id.version == version);
        let states: Vec<VersionState> = of_version.map(Cursor::version_state).collect();
        let wrong = match states.first() {
            None => return Err(Error::nothing_selected(self.name, Selection::of_version(version))),
            Some(VersionState::Live) => "is live: promote another version instead",
            Some(VersionState::Retired) => "is retired: promote it, or roll back to it",
            Some(VersionState::Held) if is_held => "is held already",
            Some(VersionState::Building) if !is_held => "is not held",
            Some(VersionState::Held | VersionState::Building) => {
                let own = self.after.iter_mut().filter(|(cursor, _)| cursor.id.version == version);
                own.for_each(|(cursor, _)| cursor.is_held = is_held);
                return Ok(());
            }
        };
        Err(Error::invalid(format!("version {version} of subscription \"{}\" {wrong}", self.name)))
    }

    /// Makes a version live. Events that the former live version has handled are replay for it. The former one is held if
    /// it is newer, and retired if it is older, as all versions older than the live one are.
    fn make_live(&mut self, version: u32) {
        let before = self.before;
        for (cursor, _) in &mut self.after {
            if cursor.id.version == version {
                let from = before.target(version, cursor.id.partition).unwrap_or_default();
                let from = from.max(cursor.position).max(cursor.live_from.unwrap_or_default());
                cursor.live_from = Some(from);
                cursor.is_held = false;
                if cursor.status == CursorStatus::Retired {
                    cursor.status = CursorStatus::Active;
                }
            } else if cursor.id.version < version {
                cursor.retire();
            } else if cursor.version_state() == VersionState::Live {
                cursor.take_lease();
                cursor.live_from = None;
                cursor.is_held = true;
            }
        }
    }
}

/// The present state of a version of a subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VersionState {
    /// Readers use it, and its new events are not replay.
    Live,
    /// It follows the live version and takes over when it has reached it.
    Building,
    /// It follows the live version and does not take over before it is promoted.
    Held,
    /// A newer version has taken over. It stands still until it is promoted.
    Retired,
}

/// Why a version does not take over yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// It is live or retired, or waits for its promotion.
    NotBuilding,
    /// The live version is paused.
    Paused,
    /// The live version has parked events.
    Parked,
    /// A partition has not reached the live version.
    Behind,
}

impl Cursor {
    /// The present state of this cursor's version.
    pub fn version_state(&self) -> VersionState {
        match (self.status, self.live_from) {
            (CursorStatus::Retired, _) => VersionState::Retired,
            (_, Some(_)) => VersionState::Live,
            (_, None) if self.is_held => VersionState::Held,
            (_, None) => VersionState::Building,
        }
    }

    /// How far the subscription has handled the log in this partition: here, or by a version before this one, or before
    /// a reset.
    fn handled(&self, head: Position) -> Position {
        self.position.max(self.live_from.unwrap_or_default().min(head))
    }
}

impl Subject {
    fn parked_of(&self, id: &CursorId) -> u64 {
        self.parked.get(id).copied().unwrap_or(0)
    }

    /// The cursors that a version has to reach before it takes over: those of the live version, or of all older ones if
    /// none is live.
    fn before(&self, version: u32) -> impl Iterator<Item = &Cursor> {
        before(&self.cursors, version)
    }

    /// How far a partition of this version has to come.
    fn target(&self, version: u32, partition: u32) -> Option<Position> {
        bound(&self.cursors, version, partition, self.head)
    }

    fn obstacle(&self, version: u32) -> Option<Obstacle> {
        let mut own = self.cursors.iter().filter(|cursor| cursor.id.version == version);
        if own.clone().any(|cursor| cursor.version_state() != VersionState::Building) {
            return Some(Obstacle::NotBuilding);
        }
        if self.before(version).any(|cursor| cursor.status == CursorStatus::Paused) {
            return Some(Obstacle::Paused);
        }
        if self.before(version).any(|cursor| self.parked_of(&cursor.id) > 0) {
            return Some(Obstacle::Parked);
        }
        let is_behind = own.any(|cursor| {
            self.target(version, cursor.id.partition).is_some_and(|target| cursor.position < target)
        });
        is_behind.then_some(Obstacle::Behind)
    }
}

fn before(cursors: &[Cursor], version: u32) -> impl Iterator<Item = &Cursor> {
    let live = live_versions(cursors).filter(|live| *live != version).max();
    cursors.iter().filter(move |cursor| match live {
        Some(live) => cursor.id.version == live,
        None => cursor.id.version < version,
    })
}

/// How far a partition of a version may read that is not live: as far as the live version has handled the log.
pub(crate) fn bound_of(cursors: &[Cursor], own: &CursorId, head: Position) -> Option<Position> {
    bound(cursors, own.version, own.partition, head)
}

/// How far a partition of a version has to come. If the versions before it have another number of partitions, its events
/// may be in any of them, so that is as far as all of these have come.
fn bound(cursors: &[Cursor], version: u32, partition: u32, head: Position) -> Option<Position> {
    let own = cursors.iter().find(|cursor| cursor.id.version == version).map(|cursor| cursor.partitions);
    let is_divided_alike = before(cursors, version).all(|cursor| Some(cursor.partitions) == own);
    let handled = |cursor: &Cursor| cursor.handled(head);
    if is_divided_alike {
        before(cursors, version).filter(|cursor| cursor.id.partition == partition).map(handled).max()
    } else {
        before(cursors, version).map(handled).min()
    }
}

/// How many events of the log the partition of a version that has the longest way still has to go.
pub(crate) fn distance(cursors: &[Cursor], version: u32, head: Position) -> i64 {
    let own = cursors.iter().filter(|cursor| cursor.id.version == version);
    let to_go = own.map(|own| {
        let bound = bound_of(cursors, &own.id, head).unwrap_or(own.position);
        bound.get().saturating_sub(own.position.get())
    });
    to_go.max().unwrap_or(0)
}

/// Versions whose new events are not replay. There is one, except that each version of an inline projection is live.
fn live_versions(cursors: &[Cursor]) -> impl Iterator<Item = u32> {
    let live = cursors.iter().filter(|cursor| cursor.version_state() == VersionState::Live);
    live.map(|cursor| cursor.id.version)
}

/// The version that readers should use.
pub(crate) fn live_version(cursors: &[Cursor]) -> Option<u32> {
    live_versions(cursors).max()
}

impl Error {
    pub(crate) fn no_subscription(name: &SubscriptionName) -> Self {
        Self::new(ErrorKind::NotFound, format!("there is no subscription \"{name}\""))
    }

    fn nothing_selected(name: &SubscriptionName, which: Selection) -> Self {
        let message = match (which.version(), which.partition()) {
            (Some(version), Some(partition)) => {
                format!("subscription \"{name}\" has no partition {partition} of version {version}")
            }
            (Some(version), None) => format!("subscription \"{name}\" has no version {version}"),
            (None, Some(partition)) => format!("subscription \"{name}\" has no partition {partition}"),
            (None, None) => return Self::no_subscription(name),
        };
        Self::new(ErrorKind::NotFound, message)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_version_with_other_partitions_comes_as_far_as_the_slowest_before_it() {
        let name = SubscriptionName::new("mails").unwrap();
        let cursor = |version, partition, partitions, position| {
            let id = CursorId { subscription: name.clone(), version, partition };
            let position = Position::new(position).unwrap();
            let live_from = (version == 1).then_some(Position::ZERO);
            let made = Step::declare(partitions, position, live_from).take(&id, None, Timestamp::MIN, None);
            made.unwrap().cursor.unwrap()
        };
        let head = Position::new(120).unwrap();
        let bounds = |partitions: u32| {
            let own = (0..partitions).map(|partition| cursor(2, partition, partitions, 0));
            let all: Vec<_> = [cursor(1, 0, 2, 90), cursor(1, 1, 2, 100)].into_iter().chain(own).collect();
            let bound = |partition| bound(&all, 2, partition, head).unwrap().get();
            (0..partitions).map(bound).collect::<Vec<_>>()
        };
        assert_eq!(bounds(2), [90, 100]);
        assert_eq!(bounds(3), [90, 90, 90]);
        assert_eq!(bounds(1), [90]);
    }
}

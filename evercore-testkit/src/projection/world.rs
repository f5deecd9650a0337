//! The state that all processes of a seed share: the store, the dice, the faults so far.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use evercore_core::engine::{Outcome, Sink, Step};
use evercore_core::{
    Cursor, CursorId, Delivery, Event, EventStore, FailureAction, FailurePolicy, Filter, Lease, LogQuery,
    Position, Subscription,
};

use super::ProjectionUnderTest;
use super::dice::Dice;
use super::fault::Fault;
use super::handlers::may_crash_here;
use crate::tools;

/// The time-out of a wait; no result depends on it.
const LOOK: Duration = Duration::from_millis(20);

/// How often to look for another try, once a millisecond.
const PATIENCE: usize = 30;

pub(crate) struct World {
    pub(crate) store: EventStore,
    filter: Filter,
    state: Mutex<State>,
}

pub(crate) struct State {
    /// The dice for faults.
    pub(crate) dice: Dice,
    /// The dice for commits.
    writer: Dice,
    /// How many commits are left.
    left: usize,
    /// How many faults are left.
    budget: usize,
    /// Whether there may be damage that no comparison has looked for yet.
    is_unchecked: bool,
    without: Vec<Fault>,
    pub(crate) story: Vec<String>,
    pub(crate) faults: BTreeMap<Fault, usize>,
    pub(crate) has_crashed: bool,
    pub(crate) must_stop: bool,
    /// How many handlers are running.
    in_hand: usize,
    /// Whether a failed delivery will be repeated after a moment.
    owes_another_try: bool,
    /// The error of another process that stopped.
    pub(crate) stopped: Option<String>,
    /// A crash runs no destructor. So the memory of a dead process is kept here until the end.
    graves: Vec<Arc<dyn Sink>>,
}

/// Counts a handler as running until this is dropped.
pub(crate) struct InHand<'a>(&'a World);

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        self.0.state().in_hand -= 1;
    }
}

impl World {
    pub(crate) fn new(store: EventStore, filter: Filter, seed: u64, left: usize, without: &[Fault]) -> Self {
        let mut dice = Dice::new(seed);
        let state = State {
            writer: dice.fork(),
            dice,
            left,
            budget: 0,
            is_unchecked: false,
            without: without.to_vec(),
            story: Vec::new(),
            faults: BTreeMap::new(),
            has_crashed: false,
            must_stop: false,
            in_hand: 0,
            owes_another_try: false,
            stopped: None,
            graves: Vec::new(),
        };
        Self { store, filter, state: Mutex::new(state) }
    }

    /// Locked for a moment, never across an await.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tell(&self, line: impl Into<String>) {
        self.state().story.push(line.into());
    }

    pub(crate) fn below(&self, bound: usize) -> usize {
        self.state().dice.below(bound)
    }

    pub(crate) fn one_in(&self, bound: usize) -> bool {
        self.state().dice.one_in(bound)
    }

    /// Allows this many more faults. Earlier damage has been looked for.
    pub(crate) fn allow(&self, faults: usize) {
        let mut state = self.state();
        (state.budget, state.is_unchecked) = (faults, false);
    }

    /// Whether this fault happens now. The caller adds it to the story.
    pub(crate) fn draws(&self, fault: Fault, one_in: usize) -> bool {
        let mut state = self.state();
        let is_drawn = state.may_have(fault) && state.dice.one_in(one_in);
        if is_drawn {
            state.count(fault);
        }
        is_drawn
    }

    /// The fault of this delivery, if any.
    pub(crate) fn draw(&self, delivery: &Delivery, is_borne: impl Fn(Fault) -> bool) -> Option<Fault> {
        let mut state = self.state();
        if state.dice.one_in(2) {
            return None;
        }
        let fits = |fault: &Fault| {
            fault.is_of_delivery()
                && state.may_have(*fault)
                && is_borne(*fault)
                && (*fault != Fault::Arrival || state.left > 0)
        };
        let faults: Vec<Fault> = Fault::ALL.iter().copied().filter(fits).collect();
        if faults.is_empty() {
            return None;
        }
        let fault = faults[state.dice.below(faults.len())];
        state.count(fault);
        state.story.push(format!("{fault:?} at {}", shown(delivery)));
        Some(fault)
    }

    pub(crate) fn take_in_hand(&self) -> InHand<'_> {
        let mut state = self.state();
        state.in_hand += 1;
        state.owes_another_try = false;
        InHand(self)
    }

    pub(crate) fn note(&self, outcome: &Outcome) {
        self.state().owes_another_try = matches!(outcome, Outcome::Failed { .. });
    }

    /// Called before a process starts.
    pub(crate) fn forget_the_last_process(&self) {
        let mut state = self.state();
        (state.has_crashed, state.must_stop, state.owes_another_try) = (false, false, false);
    }

    pub(crate) fn bury(&self, handler: Arc<dyn Sink>) {
        self.state().graves.push(handler);
    }

    pub(crate) fn has_more(&self) -> bool {
        self.state().left > 0
    }

    /// Commits once, if commits are left.
    pub(crate) async fn happen<P: ProjectionUnderTest>(&self) {
        let mut dice = {
            let mut state = self.state();
            if state.left == 0 {
                return;
            }
            state.left -= 1;
            state.writer.fork()
        };
        P::happen(&self.store, &mut dice).await;
        let head = self.store.head().await.unwrap();
        self.tell(format!("something happened: the log ends at {head}"));
    }

    /// A subscription without pauses, whose lease does not end by itself.
    pub(crate) fn subscription(&self, id: &CursorId, batch: usize) -> Subscription {
        let policy = FailurePolicy::new(FailureAction::Stop)
            .with_attempts(10)
            .with_pauses(Duration::ZERO, Duration::ZERO);
        let named = self.store.subscription(&id.subscription).unwrap().with_version(id.version);
        named.with_filter(self.filter.clone()).with_batch(tools::events_per_page(batch)).on_failure(policy)
    }

    /// A batch size from one event to more events than there are.
    pub(crate) fn any_batch(&self) -> usize {
        [1, 1, 2, 3, 5, 8, 10_000][self.below(7)]
    }

    /// The events of the projection up to a position.
    pub(crate) async fn events(&self, to: Position) -> Vec<Event> {
        let query = LogQuery::after(Position::ZERO).up_to(to).with_filter(self.filter.clone());
        tools::read_all(self.store.engine(), query).await
    }

    /// The position of a cursor that has caught up.
    pub(crate) async fn target(&self) -> Position {
        let last = LogQuery::before(Position::MAX)
            .with_filter(self.filter.clone())
            .with_limit(tools::events_per_page(1));
        let page = self.store.read_log(&last).await.unwrap();
        page.events.first().map_or(Position::ZERO, |event| event.position())
    }

    pub(crate) async fn cursor(&self, id: &CursorId) -> Option<Cursor> {
        let cursors = self.store.engine().cursors(Some(&id.subscription)).await.unwrap().cursors;
        cursors.into_iter().find(|cursor| cursor.id == *id)
    }

    /// Lets the lease expire: its holder has lost it and does not know.
    pub(crate) async fn end_lease(&self, id: &CursorId) {
        let Some(cursor) = self.cursor(id).await else { return };
        if let Some(owner) = cursor.owner {
            let release = Step::release(Lease { owner, epoch: cursor.epoch });
            self.store.engine().step(id, &release).await.unwrap();
        }
    }

    /// Whether the cursor has passed all events of the projection.
    pub(crate) async fn has_caught_up(&self, id: &CursorId) -> bool {
        let (target, cursor) = (self.target().await, self.cursor(id).await);
        cursor.is_some_and(|cursor| cursor.live_from.is_some() && cursor.position >= target)
    }

    /// Waits for another try, however long the pause before it is, because no result may depend on it. A process that
    /// lost its lease meanwhile does not try again.
    fn is_idle(&self, in_hand: usize, looks: usize) -> bool {
        let state = self.state();
        state.in_hand <= in_hand && (!state.owes_another_try || looks > PATIENCE)
    }

    /// Waits until the cursor has passed all events of the projection. `in_hand` is how many handlers are stopped
    /// meanwhile.
    pub(crate) async fn caught_up(&self, id: &CursorId, in_hand: usize) {
        for looks in 0_usize.. {
            // Wakes when a cursor moves. It may belong to an older version, or there may be no cursor yet.
            let _ = self.store.wait_for_position(self.target().await, &id.subscription, LOOK).await;
            if self.is_idle(in_hand, looks) && self.has_caught_up(id).await {
                return;
            }
            if looks < 4 {
                may_crash_here().await;
            } else {
                self.store.engine().pause(Duration::from_millis(1)).await;
            }
        }
    }
}

impl State {
    fn may_have(&self, fault: Fault) -> bool {
        let hides_damage = fault.builds_again() && self.is_unchecked;
        self.budget > 0 && !hides_damage && !self.without.contains(&fault)
    }

    fn count(&mut self, fault: Fault) {
        self.budget -= 1;
        self.is_unchecked |= !fault.builds_again();
        *self.faults.entry(fault).or_default() += 1;
    }
}

fn shown(delivery: &Delivery) -> String {
    let events = delivery.events();
    let (first, last) = (events.first(), events.last());
    let [first, last] = [first, last].map(|event| event.map_or(Position::ZERO, |event| event.position()));
    let replay = if delivery.is_replay() { ", replay" } else { "" };
    format!("positions {first} to {last}, attempt {}{replay}", delivery.attempt())
}

/// Gives the result of the future that ends first.
pub(crate) async fn either<T>(one: impl Future<Output = T>, other: impl Future<Output = T>) -> T {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|context| {
        if let Poll::Ready(done) = one.as_mut().poll(context) {
            return Poll::Ready(done);
        }
        other.as_mut().poll(context)
    })
    .await
}

/// Waits until this is true. It is checked whenever the task is polled.
pub(crate) async fn until(is_so: impl Fn() -> bool) {
    poll_fn(|_| if is_so() { Poll::Ready(()) } else { Poll::Pending }).await;
}

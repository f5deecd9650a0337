//! What all processes of one seed share: the store, the dice, what was done so far.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use evercore_core::{
    Cursor, CursorId, Delivery, Event, EventStore, FailureAction, FailurePolicy, Filter, Lease, LogQuery,
    Outcome, Position, Sink, Step, Subscription,
};

use super::ProjectionUnderTest;
use super::dice::Dice;
use super::fault::Fault;
use super::handlers::may_crash_here;
use crate::tools;

/// How long a wait lasts that nobody ends; nothing depends on it.
const LOOK: Duration = Duration::from_millis(20);

/// How many looks, a millisecond apart, another try may take to come.
const PATIENCE: usize = 30;

pub(crate) struct World {
    pub(crate) store: EventStore,
    filter: Filter,
    state: Mutex<State>,
}

pub(crate) struct State {
    /// For what is done to the projection.
    pub(crate) dice: Dice,
    /// For what happens in the log.
    writer: Dice,
    /// How often something may still happen in the log.
    left: usize,
    /// How many faults may still be.
    budget: usize,
    /// Whether there is damage perhaps that nobody has looked for yet.
    is_unchecked: bool,
    without: Vec<Fault>,
    pub(crate) story: Vec<String>,
    pub(crate) faults: BTreeMap<Fault, usize>,
    pub(crate) has_crashed: bool,
    pub(crate) must_stop: bool,
    /// How many handlers are at work.
    in_hand: usize,
    /// Whether a delivery has failed that will come again by itself, a moment later.
    owes_another_try: bool,
    /// Why another process stopped, if one did.
    pub(crate) stopped: Option<String>,
    /// A crash runs no destructor: what a process had in memory stays there, unseen, until all is over.
    graves: Vec<Arc<dyn Sink>>,
}

/// A handler is at work as long as this lives.
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

    /// Held for a moment, never across an await.
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

    /// From now on so many faults; what was before has been looked at.
    pub(crate) fn allow(&self, faults: usize) {
        let mut state = self.state();
        (state.budget, state.is_unchecked) = (faults, false);
    }

    /// Whether this fault is to be now; its place in the story is the caller's to tell.
    pub(crate) fn draws(&self, fault: Fault, one_in: usize) -> bool {
        let mut state = self.state();
        let is_drawn = state.may_have(fault) && state.dice.one_in(one_in);
        if is_drawn {
            state.count(fault);
        }
        is_drawn
    }

    /// What is to be done to this delivery, if anything.
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

    /// Before a process starts.
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

    /// Has something happen, if there is something left.
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

    /// A subscription that stands still nowhere: no pause takes time, no lease ends by itself.
    pub(crate) fn subscription(&self, id: &CursorId, batch: usize) -> Subscription {
        let policy = FailurePolicy::new(FailureAction::Stop)
            .with_attempts(10)
            .with_pauses(Duration::ZERO, Duration::ZERO);
        let named = self.store.subscription(&id.subscription).unwrap().with_version(id.version);
        named.with_filter(self.filter.clone()).with_batch(tools::events_per_page(batch)).on_failure(policy)
    }

    /// From one event to more than there are.
    pub(crate) fn any_batch(&self) -> usize {
        [1, 1, 2, 3, 5, 8, 10_000][self.below(7)]
    }

    /// All events that concern the projection, up to a position.
    pub(crate) async fn events(&self, to: Position) -> Vec<Event> {
        let query = LogQuery::after(Position::ZERO).up_to(to).with_filter(self.filter.clone());
        tools::read_all(self.store.engine(), query).await
    }

    /// Where a cursor stands when all is done that concerns the projection.
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

    /// As if its time were over: whoever holds the lease has it no more, and does not know.
    pub(crate) async fn end_lease(&self, id: &CursorId) {
        let Some(cursor) = self.cursor(id).await else { return };
        if let Some(owner) = cursor.owner {
            let release = Step::release(Lease { owner, epoch: cursor.epoch });
            self.store.engine().step(id, &release).await.unwrap();
        }
    }

    /// Whether the cursor is behind all that concerns the projection.
    pub(crate) async fn has_caught_up(&self, id: &CursorId) -> bool {
        let (target, cursor) = (self.target().await, self.cursor(id).await);
        cursor.is_some_and(|cursor| cursor.live_from.is_some() && cursor.position >= target)
    }

    /// However long the pause before another try takes: what is done must not depend on it. Who has lost the lease
    /// meanwhile owes none.
    fn is_idle(&self, in_hand: usize, looks: usize) -> bool {
        let state = self.state();
        state.in_hand <= in_hand && (!state.owes_another_try || looks > PATIENCE)
    }

    /// Until the cursor is behind all that concerns the projection. `in_hand` is how many handlers stand still meanwhile.
    pub(crate) async fn caught_up(&self, id: &CursorId, in_hand: usize) {
        for looks in 0_usize.. {
            // Woken when a cursor moves. Of an older version perhaps, or there is no cursor yet.
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

/// Whichever is done first.
pub(crate) async fn either(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|context| {
        if one.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        other.as_mut().poll(context)
    })
    .await;
}

/// Until it is so; looked at whenever the task is polled.
pub(crate) async fn until(is_so: impl Fn() -> bool) {
    poll_fn(|_| if is_so() { Poll::Ready(()) } else { Poll::Pending }).await;
}

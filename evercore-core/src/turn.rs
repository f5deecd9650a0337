//! Queues in which the writers of one aggregate take turns within a store, instead of racing for the commit.
//!
//! A turn is not a lock: the engine checks every commit as if there were no queues. So a waiter may pass a holder that does
//! not go on, because it is asleep, was forgotten, or waits for this very waiter.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use crate::target::Target;
/// A queue for each aggregate that is being written. Empty queues are not kept.
#[derive(Default)]
pub(crate) struct TurnQueues {
    queues: Mutex<Queues>,
    hasher: RandomState,
}

#[derive(Default)]
struct Queues {
    by_aggregate: HashMap<u64, VecDeque<Place>>,
    tickets: u64,
}

/// Places of a queue are in the order of their tickets.
struct Place {
    ticket: u64,
    waker: Option<Waker>,
}

impl TurnQueues {
    /// The queue for this aggregate. Two aggregates that share a queue by chance only wait for each other.
    pub(crate) fn queue_of(&self, target: &Target) -> u64 {
        match target {
            Target::Id(id) => self.hasher.hash_one(id),
            Target::Key(aggregate_type, key) => self.hasher.hash_one((aggregate_type, key)),
        }
    }

    /// A place at the end of the queue.
    pub(crate) fn enter(&self, queue: u64) -> Turn<'_> {
        let mut queues = self.queues();
        queues.tickets += 1;
        let ticket = queues.tickets;
        queues.by_aggregate.entry(queue).or_default().push_back(Place { ticket, waker: None });
        Turn { turns: self, queue, ticket }
    }

    /// Takes a place away and wakes the writer that is first now.
    fn leave(&self, queue: u64, ticket: u64) {
        let mut queues = self.queues();
        let Some(places) = queues.by_aggregate.get_mut(&queue) else { return };
        let Some(ahead) = ahead_of(places, ticket) else { return };
        let gone = places.remove(ahead);
        let next = if ahead == 0 { places.front_mut().and_then(|first| first.waker.take()) } else { None };
        if places.is_empty() {
            queues.by_aggregate.remove(&queue);
        }
        drop(queues); // wakers run code of an executor, so no lock is held
        drop(gone);
        if let Some(next) = next {
            next.wake();
        }
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many places are ahead of this ticket's; `None` if it has none.
fn ahead_of(places: &VecDeque<Place>, ticket: u64) -> Option<usize> {
    places.binary_search_by_key(&ticket, |place| place.ticket).ok()
}

/// A place in a queue. A drop gives the turn to the next place.
pub(crate) struct Turn<'a> {
    turns: &'a TurnQueues,
    queue: u64,
    ticket: u64,
}

impl Turn<'_> {
    /// The ticket of the writer whose turn it is, unless it is this one's turn. A place that was passed does not wait.
    pub(crate) fn holder(&self) -> Option<u64> {
        let queues = self.turns.queues();
        let places = queues.by_aggregate.get(&self.queue)?;
        ahead_of(places, self.ticket).filter(|ahead| *ahead > 0)?;
        places.front().map(|first| first.ticket)
    }

    /// Waits for the turn.
    pub(crate) async fn comes(&self) {
        poll_fn(|context| {
            let mut queues = self.turns.queues();
            let Some(places) = queues.by_aggregate.get_mut(&self.queue) else { return Poll::Ready(()) };
            match ahead_of(places, self.ticket) {
                None | Some(0) => Poll::Ready(()),
                Some(ahead) => {
                    let before = places[ahead].waker.replace(context.waker().clone());
                    drop(queues);
                    drop(before);
                    Poll::Pending
                }
            }
        })
        .await;
    }

    /// Takes the turn from this holder, if it still has it. The next in the queue gets it.
    pub(crate) fn pass(&self, holder: u64) {
        let holds = {
            let queues = self.turns.queues();
            let first = queues.by_aggregate.get(&self.queue).and_then(VecDeque::front);
            first.is_some_and(|first| first.ticket == holder)
        };
        if holds {
            self.turns.leave(self.queue, holder);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.leave(self.queue, self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake};

    use super::*;

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Wakes {
        fn count(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    /// Whether it is this place's turn; if not, the waker is kept.
    fn comes(turn: &Turn<'_>, wakes: &Arc<Wakes>) -> bool {
        let waker = Waker::from(Arc::clone(wakes));
        pin!(turn.comes()).poll(&mut Context::from_waker(&waker)).is_ready()
    }

    #[test]
    fn turns_come_in_order_and_wake_the_next_alone() {
        let turns = TurnQueues::default();
        let (second_wakes, third_wakes) = (Arc::default(), Arc::default());
        let (first, second, third) = (turns.enter(1), turns.enter(1), turns.enter(1));
        let other = turns.enter(2);
        assert!(first.holder().is_none() && other.holder().is_none());
        assert_eq!([&second, &third].map(Turn::holder), [Some(first.ticket); 2]);
        assert!(!comes(&second, &second_wakes) && !comes(&third, &third_wakes));
        drop(first); // the holder is gone, done or dropped
        assert_eq!([second_wakes.count(), third_wakes.count()], [1, 0]);
        assert!(comes(&second, &second_wakes) && !comes(&third, &third_wakes));
        drop(second);
        assert_eq!(third_wakes.count(), 1);
        assert!(comes(&third, &third_wakes));
        drop((third, other));
        assert!(turns.queues().by_aggregate.is_empty());
    }

    #[test]
    fn a_waiter_that_is_dropped_leaves_the_queue_and_passes_its_wake_on() {
        let turns = TurnQueues::default();
        let (second_wakes, third_wakes, fourth_wakes) = (Arc::default(), Arc::default(), Arc::default());
        let (first, second, third, fourth) = (turns.enter(1), turns.enter(1), turns.enter(1), turns.enter(1));
        assert!(
            !comes(&second, &second_wakes) && !comes(&third, &third_wakes) && !comes(&fourth, &fourth_wakes)
        );
        drop(second); // while it waits
        assert_eq!(third_wakes.count(), 0);
        drop(first);
        assert_eq!([third_wakes.count(), fourth_wakes.count()], [1, 0]);
        drop(third); // after it was woken, before it was polled
        assert_eq!(fourth_wakes.count(), 1);
        assert!(comes(&fourth, &fourth_wakes));
        drop(fourth);
        assert!(turns.queues().by_aggregate.is_empty());
    }

    #[test]
    fn a_holder_that_does_not_move_is_passed_and_harms_nobody_later() {
        let turns = TurnQueues::default();
        let wakes = Arc::default();
        let (first, second, third) = (turns.enter(1), turns.enter(1), turns.enter(1));
        assert!(!comes(&second, &wakes));
        third.pass(first.ticket);
        third.pass(first.ticket); // two waiters lose patience at once: only one place goes
        assert_eq!(wakes.count(), 1);
        assert!(comes(&second, &wakes));
        assert_eq!(third.holder(), Some(second.ticket));
        assert!(comes(&first, &wakes), "it waits for nobody");
        drop(first);
        assert_eq!(third.holder(), Some(second.ticket));
        drop((second, third));
        assert!(turns.queues().by_aggregate.is_empty());
    }
}

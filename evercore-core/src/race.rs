//! Futures that run concurrently in one task, without a runtime.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// The result of the future that finished first.
pub(crate) enum First<A, B> {
    Left(A),
    Right(B),
}

/// Runs both futures until one is done, and drops the other. If both are done, the left one counts.
pub(crate) async fn race<A, B>(left: impl Future<Output = A>, right: impl Future<Output = B>) -> First<A, B> {
    let (mut left, mut right) = (pin!(left), pin!(right));
    poll_fn(|context| first_of(left.as_mut(), right.as_mut(), context)).await
}

fn first_of<A, B>(
    left: Pin<&mut impl Future<Output = A>>,
    right: Pin<&mut impl Future<Output = B>>,
    context: &mut Context<'_>,
) -> Poll<First<A, B>> {
    if let Poll::Ready(outcome) = left.poll(context) {
        return Poll::Ready(First::Left(outcome));
    }
    right.poll(context).map(First::Right)
}

/// Yields once to other futures of this task and thread.
pub(crate) async fn others_first() {
    let mut was_their_turn = false;
    poll_fn(|context| {
        if std::mem::replace(&mut was_their_turn, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A signal that wakes all listeners, and counts how often it was sent.
#[derive(Debug, Default)]
pub(crate) struct Signal(Mutex<Sent>);

#[derive(Debug, Default)]
struct Sent {
    count: u64,
    listeners: BTreeMap<u64, Waker>,
    next_listener: u64,
}

impl Signal {
    pub(crate) fn send(&self) {
        let listeners = {
            let mut sent = self.sent();
            sent.count += 1;
            std::mem::take(&mut sent.listeners)
        };
        listeners.into_values().for_each(Waker::wake);
    }

    /// How often it was sent. Pass this to [`after`](Self::after).
    pub(crate) fn count(&self) -> u64 {
        self.sent().count
    }

    /// Waits until it was sent more often than this.
    pub(crate) fn after(&self, count: u64) -> Listening<'_> {
        let mut sent = self.sent();
        sent.next_listener += 1;
        Listening { signal: self, count, number: sent.next_listener }
    }

    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A listener. A drop removes it.
#[derive(Debug)]
pub(crate) struct Listening<'a> {
    signal: &'a Signal,
    count: u64,
    number: u64,
}

impl Future for Listening<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut sent = self.signal.sent();
        if sent.count > self.count {
            return Poll::Ready(());
        }
        sent.listeners.insert(self.number, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.signal.sent().listeners.remove(&self.number);
    }
}

/// The wakers of several tasks that drive one future. Its waker wakes all of them, so that any task that is polled goes on.
#[derive(Debug, Default)]
pub(crate) struct Wakers(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    wakers: BTreeMap<u64, Waker>,
    has_rung: bool,
}

impl Wakers {
    pub(crate) fn add(&self, task: u64, waker: &Waker) {
        lock(&self.0).wakers.insert(task, waker.clone());
    }

    pub(crate) fn remove(&self, task: u64) {
        lock(&self.0).wakers.remove(&task);
    }

    /// Begins to note whether they are woken.
    pub(crate) fn listen(&self) {
        lock(&self.0).has_rung = false;
    }

    /// Whether they were woken since.
    pub(crate) fn has_rung(&self) -> bool {
        lock(&self.0).has_rung
    }

    pub(crate) fn wake_all(&self) {
        let wakers = {
            let mut waiting = lock(&self.0);
            waiting.has_rung = true;
            std::mem::take(&mut waiting.wakers)
        };
        wakers.into_values().for_each(Waker::wake);
    }
}

impl Wake for Wakers {
    fn wake(self: Arc<Self>) {
        self.wake_all();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_all();
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_listener_leaves_nothing() {
        let signal = Signal::default();
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..3 {
            assert!(pin!(signal.after(signal.count())).poll(&mut context).is_pending());
        }
        assert!(signal.sent().listeners.is_empty());
        let mut waiting = pin!(signal.after(0));
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        signal.send();
        assert!(waiting.as_mut().poll(&mut context).is_ready());
        assert!(pin!(signal.after(0)).poll(&mut context).is_ready());
    }
}

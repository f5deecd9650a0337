//! Futures that run concurrently in one task, without a runtime.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

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

/// Wakes all listeners when it rings.
#[derive(Debug, Default)]
pub(crate) struct Bell(Mutex<Rung>);

#[derive(Debug, Default)]
struct Rung {
    times: u64,
    listeners: BTreeMap<u64, Waker>,
    next_listener: u64,
}

impl Bell {
    pub(crate) fn ring(&self) {
        let listeners = {
            let mut rung = self.rung();
            rung.times += 1;
            std::mem::take(&mut rung.listeners)
        };
        listeners.into_values().for_each(Waker::wake);
    }

    /// How often it has rung. Pass this to `rings_after`.
    pub(crate) fn times(&self) -> u64 {
        self.rung().times
    }

    /// Waits until it has rung more often than this.
    pub(crate) fn rings_after(&self, times: u64) -> Listening<'_> {
        let mut rung = self.rung();
        rung.next_listener += 1;
        Listening { bell: self, times, number: rung.next_listener }
    }

    fn rung(&self) -> MutexGuard<'_, Rung> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A listener. A drop removes it.
#[derive(Debug)]
pub(crate) struct Listening<'a> {
    bell: &'a Bell,
    times: u64,
    number: u64,
}

impl Future for Listening<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut rung = self.bell.rung();
        if rung.times > self.times {
            return Poll::Ready(());
        }
        rung.listeners.insert(self.number, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.bell.rung().listeners.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_of_who_listened_and_went() {
        let bell = Bell::default();
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..3 {
            assert!(pin!(bell.rings_after(bell.times())).poll(&mut context).is_pending());
        }
        assert!(bell.rung().listeners.is_empty());
        let mut waiting = pin!(bell.rings_after(0));
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        bell.ring();
        assert!(waiting.as_mut().poll(&mut context).is_ready());
        assert!(pin!(bell.rings_after(0)).poll(&mut context).is_ready());
    }
}

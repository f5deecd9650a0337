//! Futures that run beside each other in one task, without a runtime.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// Which of two came first.
pub(crate) enum First<A, B> {
    Left(A),
    Right(B),
}

/// Whichever is done first; the other is dropped. Where both are, the left one.
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

/// Rings for all who listen.
#[derive(Debug, Default)]
pub(crate) struct Bell(Mutex<Rung>);

#[derive(Debug, Default)]
struct Rung {
    times: u64,
    listeners: Vec<Waker>,
}

impl Bell {
    pub(crate) fn ring(&self) {
        let listeners = {
            let mut rung = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            rung.times += 1;
            std::mem::take(&mut rung.listeners)
        };
        listeners.into_iter().for_each(Waker::wake);
    }

    /// How often it has rung: listen for what comes after that.
    pub(crate) fn times(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).times
    }

    /// Until it has rung more often than that.
    pub(crate) async fn rings_after(&self, times: u64) {
        poll_fn(|context| {
            let mut rung = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if rung.times > times {
                return Poll::Ready(());
            }
            if !rung.listeners.iter().any(|waker| waker.will_wake(context.waker())) {
                rung.listeners.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

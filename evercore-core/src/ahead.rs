//! A future that is begun before its outcome is needed, so that two can be at work at once without a runtime.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::engine::BoxFuture;

/// A future on its way; dropping it is as harmless as dropping the future.
pub(crate) struct Ahead<'a, T> {
    future: BoxFuture<'a, T>,
    outcome: Option<T>,
}

impl<'a, T> Ahead<'a, T> {
    /// Not begun yet.
    pub(crate) fn new(future: BoxFuture<'a, T>) -> Self {
        Self { future, outcome: None }
    }

    /// The same, begun: polled once, which never waits.
    pub(crate) async fn begun(mut self) -> Self {
        let first = poll_fn(|context| match self.future.as_mut().poll(context) {
            Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
            Poll::Pending => Poll::Ready(None),
        });
        self.outcome = first.await;
        self
    }

    /// Whether the outcome is there already: right after the beginning it tells that all the work was done in the
    /// caller's time, so that nothing is won by beginning early.
    pub(crate) fn is_done(&self) -> bool {
        self.outcome.is_some()
    }
}

impl<T: Unpin> Future for Ahead<'_, T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        match self.outcome.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => self.future.as_mut().poll(context),
        }
    }
}

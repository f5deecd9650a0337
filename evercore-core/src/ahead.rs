//! A future that starts before its result is needed, so that two can work at the same time without a runtime.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::future::BoxFuture;
/// A future that may have started. Dropping it drops the future.
pub(crate) struct Ahead<'a, T> {
    future: BoxFuture<'a, T>,
    outcome: Option<T>,
}

impl<'a, T> Ahead<'a, T> {
    /// A future that has not started.
    pub(crate) fn new(future: BoxFuture<'a, T>) -> Self {
        Self { future, outcome: None }
    }

    /// Starts it by polling it once, which does not wait.
    pub(crate) async fn begun(mut self) -> Self {
        let first = poll_fn(|context| match self.future.as_mut().poll(context) {
            Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
            Poll::Pending => Poll::Ready(None),
        });
        self.outcome = first.await;
        self
    }

    /// Whether the result is there. If it is there right after the start, the future did all its work on the caller's
    /// thread, and starting it early gains nothing.
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

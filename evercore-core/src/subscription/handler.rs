//! Handlers that are plain functions. The cursor moves after them, so they see each event at least once. A panic of any
//! handler becomes an error here.

use std::any::Any;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use super::delivery::{Delivered, Delivery, Outcome, Sink};
use super::step::Advance;
use crate::contract::StorageEngine;
use crate::error::BoxError;
use crate::future::BoxFuture;
use crate::race::{First, race};

/// How long a handler may take.
pub(crate) struct HandlerTime {
    pub(crate) engine: Arc<dyn StorageEngine>,
    pub(crate) at_most: Option<Duration>,
}

impl HandlerTime {
    /// Drops work that takes longer, which is then a failure.
    async fn within(&self, work: impl Future<Output = Result<(), BoxError>>) -> Result<(), BoxError> {
        let Some(at_most) = self.at_most else { return work.await };
        match race(work, self.engine.pause(at_most)).await {
            First::Left(done) => done,
            First::Right(()) => Err(format!("the handler took longer than {at_most:?}").into()),
        }
    }
}

/// When a handler of single events has its events acknowledged before the end of the batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AckEvery {
    pub(crate) events: usize,
    pub(crate) time: Duration,
}

/// Calls a handler for each event.
pub(crate) struct Each<F> {
    pub(crate) handle: F,
    pub(crate) time: HandlerTime,
    pub(crate) ack: AckEvery,
}

impl<F, H> Sink for Each<F>
where
    F: Fn(Delivered) -> H + Send + Sync,
    H: Future<Output = Result<(), BoxError>> + Send,
{
    fn deliver<'a>(&'a self, delivery: &'a Delivery, _: &'a Advance) -> BoxFuture<'a, Outcome> {
        Box::pin(async move {
            let began = Instant::now();
            for (handled, event) in delivery.iter().enumerate() {
                let is_time = handled >= self.ack.events || began.elapsed() >= self.ack.time;
                if handled > 0 && (is_time || delivery.is_stopping()) {
                    return Outcome::Handled(handled);
                }
                let work = self.time.within(async { (self.handle)(event).await });
                if let Err(error) = caught(work).await.flatten() {
                    return Outcome::Failed { handled, error };
                }
            }
            Outcome::Handled(delivery.events().len())
        })
    }

    fn tells_which(&self) -> bool {
        true
    }

    fn holds_cursor(&self) -> bool {
        false
    }
}

/// Calls a handler for all events of a delivery.
pub(crate) struct Batches<F> {
    pub(crate) handle: F,
    pub(crate) time: HandlerTime,
}

impl<F, H> Sink for Batches<F>
where
    F: Fn(Delivery) -> H + Send + Sync,
    H: Future<Output = Result<(), BoxError>> + Send,
{
    fn deliver<'a>(&'a self, delivery: &'a Delivery, _: &'a Advance) -> BoxFuture<'a, Outcome> {
        Box::pin(async move {
            match self.time.within(async { (self.handle)(delivery.clone()).await }).await {
                Ok(()) => Outcome::Handled(delivery.events().len()),
                Err(error) => Outcome::Failed { handled: 0, error },
            }
        })
    }

    fn tells_which(&self) -> bool {
        false
    }

    fn holds_cursor(&self) -> bool {
        false
    }
}

/// Runs the work and turns a panic into an error, so that a handler which panics at one event does not stop all others for
/// good.
pub(super) async fn caught<T>(work: impl Future<Output = T>) -> Result<T, BoxError> {
    let mut work = pin!(work);
    poll_fn(|context| {
        // The state that a handler shares is as safe after its panic as it would be in a task of a runtime.
        match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
            Ok(polled) => polled.map(Ok),
            Err(panic) => Poll::Ready(Err(panicked(&*panic).into())),
        }
    })
    .await
}

fn panicked(panic: &(dyn Any + Send)) -> String {
    let said = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    said.map_or_else(|| "the handler panicked".to_owned(), |said| format!("the handler panicked: {said}"))
}

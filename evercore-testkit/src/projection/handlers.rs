//! Turns handlers of production into sinks, as `Subscription::run` and `run_batches` do, with an additional await
//! between two events.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use evercore_core::engine::{Advance, Outcome, Sink};
use evercore_core::{BoxError, BoxFuture, Delivered, Delivery};

/// The sink of a handler that [`Subscription::run`](evercore_core::Subscription::run) takes.
pub fn each<F, H>(handler: F) -> impl Sink + use<F, H>
where
    F: Fn(Delivered) -> H + Send + Sync + 'static,
    H: Future<Output = Result<(), BoxError>> + Send + 'static,
{
    Each(handler)
}

/// The sink of a handler that [`Subscription::run_batches`](evercore_core::Subscription::run_batches) takes.
pub fn whole<F, H>(handler: F) -> impl Sink + use<F, H>
where
    F: Fn(Delivery) -> H + Send + Sync + 'static,
    H: Future<Output = Result<(), BoxError>> + Send + 'static,
{
    Whole(handler)
}

/// An await at which the process may die or stop; a storage in memory has none. It is ready at the second poll.
pub async fn may_crash_here() {
    let mut was_here = false;
    poll_fn(|context| {
        if std::mem::replace(&mut was_here, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

struct Each<F>(F);

impl<F, H> Sink for Each<F>
where
    F: Fn(Delivered) -> H + Send + Sync,
    H: Future<Output = Result<(), BoxError>> + Send,
{
    fn deliver<'a>(&'a self, delivery: &'a Delivery, _: &'a Advance) -> BoxFuture<'a, Outcome> {
        Box::pin(async move {
            for (handled, event) in delivery.iter().enumerate() {
                if handled > 0 {
                    may_crash_here().await;
                    if delivery.is_stopping() {
                        return Outcome::Handled(handled);
                    }
                }
                if let Err(error) = pin!((self.0)(event)).await {
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

struct Whole<F>(F);

impl<F, H> Sink for Whole<F>
where
    F: Fn(Delivery) -> H + Send + Sync,
    H: Future<Output = Result<(), BoxError>> + Send,
{
    fn deliver<'a>(&'a self, delivery: &'a Delivery, _: &'a Advance) -> BoxFuture<'a, Outcome> {
        Box::pin(async move {
            match (self.0)(delivery.clone()).await {
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

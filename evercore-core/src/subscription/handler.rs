//! Handlers that are plain functions: the cursor is moved after them, so they see each event at least once.

use std::future::Future;
use std::pin::pin;

use super::delivery::{Delivered, Delivery, Outcome, Sink};
use super::step::Advance;
use crate::engine::BoxFuture;
use crate::error::BoxError;

/// Calls a handler for each event.
pub(crate) struct Each<F>(pub(crate) F);

impl<F, H> Sink for Each<F>
where
    F: Fn(Delivered) -> H + Send + Sync,
    H: Future<Output = Result<(), BoxError>> + Send,
{
    fn deliver<'a>(&'a self, delivery: &'a Delivery, _: &'a Advance) -> BoxFuture<'a, Outcome> {
        Box::pin(async move {
            for (handled, event) in delivery.iter().enumerate() {
                if handled > 0 && delivery.is_stopping() {
                    return Outcome::Handled(handled);
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

/// Calls a handler for all events of a delivery.
pub(crate) struct Batches<F>(pub(crate) F);

impl<F, H> Sink for Batches<F>
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

    fn holds_cursor(&self) -> bool {
        false
    }
}

//! A durable subscription from which the caller pulls batches and acknowledges them.

use std::future::Future;
use std::time::Duration;

use super::cursor::{Cursor, Lease};
use super::delivery::Delivery;
use super::held::{Held, is_passing};
use super::settings::Subscription;
use super::worker::before_next_claim;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::race::{First, race};

impl Subscription {
    /// Claims the first partition that is free, to read from its cursor on. Waits while another owner holds it, while it is
    /// paused, and while it rests after a failure; [`without_standby`](Self::without_standby) it does not wait. The failure
    /// policy applies to [`run`](Self::run) only. Here the caller decides about an event that cannot be handled.
    ///
    /// ```
    /// # use evercore_core::{EventStore, Result};
    /// # async fn print(store: EventStore) -> Result<()> {
    /// let mut printer = store.subscription("printer")?.claim().await?;
    /// loop {
    ///     let delivery = printer.next().await?;
    ///     for event in delivery.events() {
    ///         println!("{}: {}", event.position(), event.event_type());
    ///     }
    ///     printer.ack(&delivery).await?;
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`AlreadyOwned`](ErrorKind::AlreadyOwned) and [`Paused`](ErrorKind::Paused) without standby;
    /// [`Superseded`](ErrorKind::Superseded) if a newer version has taken over; otherwise as [`run`](Self::run).
    pub async fn claim(&self) -> Result<OwnedSubscription> {
        self.declare().await?;
        let owner = self.new_owner()?;
        loop {
            let (seen, mut refused) = (self.store.cursor_moves().count(), None);
            for partition in 0..self.settings.partitions {
                match Held::claim(self, partition, &owner, std::sync::Arc::default()).await {
                    Ok(held) => return Ok(OwnedSubscription { held }),
                    Err(error) => drop(refused.insert(error)),
                }
            }
            let Some(error) = refused else { continue };
            let may_wait = self.settings.is_standby || is_passing(&error);
            let is_busy = matches!(error.kind(), ErrorKind::AlreadyOwned | ErrorKind::Paused);
            if !may_wait || !(is_busy || is_passing(&error)) {
                return Err(error);
            }
            before_next_claim(self, seen).await;
        }
    }
}

/// A claimed cursor. Made by [`Subscription::claim`].
///
/// [`next`](Self::next) and [`ack`](Self::ack) renew the lease. Use [`keep`](Self::keep) while something takes long. A drop
/// acknowledges nothing, and the lease expires; [`release`](Self::release) ends it at once.
#[derive(Debug)]
pub struct OwnedSubscription {
    held: Held,
}

impl OwnedSubscription {
    /// Waits for the next events and returns at least one. A new version that is being built gets the events that the live
    /// version has handled. It takes over, and gets later ones, only after all of them are acknowledged: acknowledge the last
    /// delivery before you wait for another.
    /// Each event comes once under this lease, acknowledged or not. After
    /// the next claim, all events that were not acknowledged come again. The future may be dropped: the next call returns
    /// the same events.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost) if another owner has claimed the cursor, or it was reset;
    /// [`Paused`](ErrorKind::Paused) if the subscription was paused; [`Superseded`](ErrorKind::Superseded) if a newer
    /// version has taken over; [`TailLost`](ErrorKind::TailLost) if the log has lost the last events that were returned:
    /// claim the cursor again; [`Rejected`](ErrorKind::Rejected) at an event of a type that is not
    /// [known](Subscription::with_known_types); those of the engine.
    pub async fn next(&mut self) -> Result<Delivery> {
        loop {
            self.held.renew_if_due().await?;
            if self.held.is_paused() {
                // It may have been resumed meanwhile.
                self.held.refresh().await?;
            }
            if self.held.is_paused() {
                let message = format!("subscription \"{}\" is paused", self.held.subscription.name());
                return Err(Error::new(ErrorKind::Paused, message));
            }
            self.held.look_at_parked().await?;
            self.held.build().await?;
            let time: Duration = self.held.subscription.settings.lease / 3;
            let (store, heard) = (self.held.subscription.store.clone(), self.held.heard());
            match race(self.held.next(time), store.operator_calls().after(heard)).await {
                First::Left(next) => {
                    if let Some(delivery) = next? {
                        let of = &self.held.subscription;
                        if let Some(refused) = of.settings.refuse_unknown(&of.name, &delivery) {
                            self.held.put_back();
                            return Err(refused);
                        }
                        return Ok(delivery);
                    }
                }
                First::Right(()) => self.held.refresh().await?,
            }
            if self.held.has_nothing_out() {
                self.held.pass_by().await?;
            }
        }
    }

    /// Acknowledges a delivery and all before it: the cursor moves past them. It is no error to acknowledge a delivery
    /// that the cursor has passed already.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost) if another owner has claimed the cursor, or it was reset: the cursor did not move,
    /// and that owner gets the events again. [`TailLost`](ErrorKind::TailLost) if the log has lost its tail since the events
    /// were read: other events have taken their place and must be handled, so claim the cursor again.
    /// [`Superseded`](ErrorKind::Superseded); those of the engine.
    pub async fn ack(&mut self, delivery: &Delivery) -> Result<()> {
        if delivery.context.lease != self.held.context.lease || delivery.cursor() != &self.held.context.id {
            return Err(Error::new(
                ErrorKind::LeaseLost,
                "the delivery belongs to another lease; acknowledge it by the subscription that returned it",
            ));
        }
        if delivery.end() <= self.held.cursor.position {
            return Ok(());
        }
        self.held.advance(self.held.advance_to(delivery.end(), Vec::new())).await
    }

    /// Runs this work and renews the lease meanwhile.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost) if the lease was lost; the work is then dropped.
    pub async fn keep<T>(&mut self, work: impl Future<Output = T> + Send) -> Result<T> {
        self.held.keeping(work).await
    }

    /// Ends the lease, so that other owners need not wait until it expires.
    ///
    /// # Errors
    /// Those of the engine; the lease then expires by itself.
    pub async fn release(mut self) -> Result<()> {
        self.held.release().await
    }

    /// The lease: its epoch is a fencing token.
    pub fn lease(&self) -> &Lease {
        &self.held.context.lease
    }

    /// The cursor after the last call.
    pub fn cursor(&self) -> &Cursor {
        &self.held.cursor
    }

    /// Every event up to here is acknowledged.
    pub fn position(&self) -> Position {
        self.held.cursor.position
    }
}

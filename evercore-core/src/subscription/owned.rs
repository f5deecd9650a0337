//! A subscription whose events are asked for, batch by batch.

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
    /// Claims the first partition that is free and reads from its cursor on. Waits while another owner has it, it is
    /// paused, or rests after a failure, unless it is [not to](Self::without_standby). The failure policy is for those who
    /// [run](Self::run) the subscription; here an event that cannot be handled is yours to deal with.
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
    /// [`AlreadyOwned`](ErrorKind::AlreadyOwned) and [`Paused`](ErrorKind::Paused) if it is not to wait;
    /// [`Superseded`](ErrorKind::Superseded) if a newer version has taken over; otherwise as [`run`](Self::run).
    pub async fn claim(&self) -> Result<OwnedSubscription> {
        self.declare().await?;
        let owner = self.new_owner()?;
        loop {
            let (rung, mut refused) = (self.store.rings().times(), None);
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
            before_next_claim(self, rung).await;
        }
    }
}

/// A cursor whose lease is held. Made by [`Subscription::claim`].
///
/// The lease is renewed by [`next`](Self::next) and [`ack`](Self::ack), and by [`keep`](Self::keep) while something takes
/// long. Dropped, it acknowledges nothing, and the lease ends by itself; [`release`](Self::release) ends it at once.
#[derive(Debug)]
pub struct OwnedSubscription {
    held: Held,
}

impl OwnedSubscription {
    /// The next events, one at least, as soon as there are some. Each comes once, acknowledged or not, until somebody
    /// claims the cursor again: then all come again that were not acknowledged. The future may be dropped and `next`
    /// called again: nothing is lost by that.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost) if another has claimed the cursor, or it was reset;
    /// [`Paused`](ErrorKind::Paused) if the subscription was paused; [`Superseded`](ErrorKind::Superseded) if a newer
    /// version has taken over; [`TailLost`](ErrorKind::TailLost) if the log has lost what was handed out last: claim the
    /// cursor again; what the engine says.
    pub async fn next(&mut self) -> Result<Delivery> {
        loop {
            self.held.renew_if_due().await?;
            if self.held.is_paused() {
                // It may have been resumed meanwhile.
                self.held.look().await?;
            }
            if self.held.is_paused() {
                let message = format!("subscription \"{}\" is paused", self.held.subscription.name());
                return Err(Error::new(ErrorKind::Paused, message));
            }
            self.held.look_at_parked().await?;
            self.held.build().await?;
            let time: Duration = self.held.subscription.settings.lease / 3;
            let (store, heard) = (self.held.subscription.store.clone(), self.held.heard());
            match race(self.held.next(time), store.operated().rings_after(heard)).await {
                First::Left(next) => {
                    if let Some(delivery) = next? {
                        return Ok(delivery);
                    }
                }
                First::Right(()) => self.held.look().await?,
            }
            if self.held.has_nothing_out() {
                self.held.pass_by().await?;
            }
        }
    }

    /// Acknowledges a delivery and all that came before it: the cursor moves behind it. One from before the cursor is
    /// acknowledged already, and that is no error.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost) if another has claimed the cursor, or it was reset: then nothing has moved, and
    /// the events come again, to that owner. [`TailLost`](ErrorKind::TailLost) if the log has lost its tail since they were
    /// read, and the events that came in their place are still to be handled: claim the cursor again. [`Superseded`](ErrorKind::Superseded); what the engine says.
    pub async fn ack(&mut self, delivery: &Delivery) -> Result<()> {
        if delivery.context.lease != self.held.context.lease || delivery.cursor() != &self.held.context.id {
            return Err(Error::new(ErrorKind::LeaseLost, "the delivery is of another lease"));
        }
        if delivery.end() <= self.held.cursor.position {
            return Ok(());
        }
        self.held.advance(self.held.advance_to(delivery.end(), Vec::new())).await
    }

    /// Runs something and renews the lease meanwhile.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost) if the lease was lost; then the work was dropped.
    pub async fn keep<T>(&mut self, work: impl Future<Output = T> + Send) -> Result<T> {
        self.held.keeping(work).await
    }

    /// Ends the lease, so that others need not wait for its end.
    ///
    /// # Errors
    /// What the engine says; the lease then ends by itself.
    pub async fn release(mut self) -> Result<()> {
        self.held.release().await
    }

    /// The lease: its epoch is a fencing token.
    pub fn lease(&self) -> &Lease {
        &self.held.context.lease
    }

    /// The cursor, as it was at the last call.
    pub fn cursor(&self) -> &Cursor {
        &self.held.cursor
    }

    /// Everything up to here is acknowledged.
    pub fn position(&self) -> Position {
        self.held.cursor.position
    }
}

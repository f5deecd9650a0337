//! Runs one cursor from its claim to the end of its lease: delivers, moves the cursor, retries, skips, parks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cursor::{Failure, Parked, ParkedChange, stored_error};
use super::delivery::{Delivery, Outcome, Sink};
use super::failure::FailureAction;
use super::handler::caught;
use super::held::{Held, is_passing};
use super::stop::Stop;
use crate::backoff::backoff;
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::ids::Position;
use crate::observe;
use crate::race::{First, others_first, race};
use crate::time::Timestamp;

/// Why a runner stopped.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It was told to stop.
    Stopped,
    /// The subscription is paused, or a worker with fewer cursors gets this one.
    GivenUp,
    /// A newer version has taken over.
    Superseded,
    /// The lease is lost or the engine out of reach: claim again.
    Lost {
        /// Whether the cursor has moved before.
        has_moved: bool,
    },
    /// For good.
    Failed(Error),
}

/// Runs until it ends, and gives the lease back if it still has it.
pub(crate) async fn run(mut held: Held, sink: Arc<dyn Sink>, stop: Arc<Stop>) -> Ended {
    let mut runner = Runner { held: &mut held, sink: sink.as_ref(), stop: &stop };
    let ended = match runner.work().await {
        Ok(ended) => ended,
        Err(error) => match error.kind() {
            ErrorKind::Superseded => Ended::Superseded,
            ErrorKind::LeaseLost | ErrorKind::NotFound => {
                observe::lease_changed(&held.context.id, "lost");
                Ended::Lost { has_moved: held.has_moved() }
            }
            ErrorKind::TailLost { position } => {
                observe::tail_lost(&held.context.id, *position);
                Ended::Lost { has_moved: held.has_moved() }
            }
            _ if is_passing(&error) => Ended::Lost { has_moved: held.has_moved() },
            _ => Ended::Failed(error),
        },
    };
    // If it cannot be given back, it ends by itself.
    if held.release().await.is_ok() && matches!(ended, Ended::Stopped | Ended::GivenUp) {
        observe::lease_changed(&held.context.id, "released");
    }
    ended
}

struct Runner<'a> {
    held: &'a mut Held,
    sink: &'a dyn Sink,
    stop: &'a Stop,
}

impl Runner<'_> {
    async fn work(&mut self) -> Result<Ended> {
        loop {
            if self.stop.is_set() {
                return Ok(Ended::Stopped);
            }
            if self.is_to_give_up() {
                return Ok(Ended::GivenUp);
            }
            self.held.renew_if_due().await?;
            self.held.look_at_parked().await?;
            self.held.build().await?;
            self.retry_parked().await?;
            self.held.pass_by().await?;
            let time = self.held.subscription.settings.lease / 3;
            let time = if self.held.has_due() { Duration::ZERO } else { time };
            let (store, heard) = (self.held.subscription.store.clone(), self.held.heard());
            let interrupted = race(self.stop.set(), store.operator_calls().after(heard));
            match race(self.held.next(time), interrupted).await {
                First::Left(next) => {
                    if let Some(delivery) = next? {
                        self.handle(delivery).await?;
                        // With an engine that works in the caller's time, nothing before this has to wait.
                        others_first().await;
                    }
                }
                First::Right(First::Left(())) => {}
                First::Right(First::Right(())) => self.held.refresh().await?,
            }
        }
    }

    fn is_to_give_up(&self) -> bool {
        self.held.is_paused() || (self.held.is_wanted() && self.stop.may_give_up())
    }

    /// Has a delivery handled, whatever it takes.
    async fn handle(&mut self, mut delivery: Delivery) -> Result<()> {
        loop {
            let advance = self.held.advance_to(delivery.end(), Vec::new());
            let asked_at = Instant::now();
            let Some(outcome) = self.deliver(&delivery, &advance).await? else { return Ok(()) };
            match outcome {
                Outcome::Handled(count) if count >= delivery.events().len() => {
                    return self.held.advance(advance).await;
                }
                Outcome::Handled(count) => {
                    self.move_past(&delivery, count).await?;
                    self.held.put_back();
                    return Ok(());
                }
                Outcome::Advanced(cursor) => {
                    self.held.was_moved(asked_at, cursor).await?;
                    return Ok(());
                }
                Outcome::Refused(error) => return Err(self.refused(error).await?),
                // A handler may end early when it is to stop, and that is nobody's fault.
                Outcome::Failed { handled, .. } if self.stop.is_set() => {
                    return self.move_past(&delivery, handled).await;
                }
                Outcome::Failed { handled, error } if delivery.events().len() > 1 => {
                    return self.take_apart(&delivery, handled, error).await;
                }
                Outcome::Failed { error, .. } => {
                    if delivery.attempt() >= self.held.subscription.settings.failure.attempts {
                        return self.give_up(&delivery, error).await;
                    }
                    observe::retried(delivery.cursor());
                    if !self.pause(delivery.attempt()).await? {
                        self.held.put_back();
                        return Ok(());
                    }
                    delivery.attempt += 1;
                }
            }
        }
    }

    /// A sink that does not find the cursor, which is there, looks in another store; otherwise the error says it all.
    async fn refused(&mut self, error: Error) -> Result<Error> {
        if !matches!(error.kind(), ErrorKind::NotFound) {
            return Ok(error);
        }
        self.held.refresh().await?;
        let message = format!(
            "the projection belongs to another store than subscription \"{}\"",
            self.held.context.id.subscription
        );
        Ok(Error::invalid(message).with_source(error))
    }

    /// Several events were tried together, and one of them fails.
    async fn take_apart(&mut self, delivery: &Delivery, handled: usize, error: BoxError) -> Result<()> {
        self.move_past(delivery, handled).await?;
        let is_known = self.sink.tells_which();
        if is_known
            && self.held.subscription.settings.failure.attempts <= 1
            && let Some(failed) = delivery.only(handled)
        {
            self.give_up(&failed, error).await?;
            self.held.put_back();
            return Ok(());
        }
        observe::retried(delivery.cursor());
        if self.pause(delivery.attempt()).await? {
            let tried = if is_known { 1 } else { delivery.events().len() };
            self.held.put_back_alone(delivery, handled, tried);
        } else {
            self.held.put_back();
        }
        Ok(())
    }

    /// `None`: the shutdown came, and the handler did not end in time.
    async fn deliver(&mut self, delivery: &Delivery, advance: &super::Advance) -> Result<Option<Outcome>> {
        let began = Instant::now();
        let (stop, grace) = (self.stop, self.held.subscription.settings.grace);
        let engine = Arc::clone(self.held.subscription.store.engine());
        let too_late = async move {
            stop.set().await;
            engine.pause(grace).await;
        };
        let delivered = caught(async { self.sink.deliver(delivery, advance).await });
        let delivered = observe::within(delivery, delivered);
        let work = race(delivered, too_late);
        let first = if self.sink.holds_cursor() { work.await } else { self.held.keeping(work).await? };
        Ok(match first {
            First::Left(outcome) => {
                let outcome = outcome.unwrap_or_else(|error| Outcome::Failed { handled: 0, error });
                if self.sink.holds_cursor() && matches!(outcome, Outcome::Failed { .. }) {
                    // Nobody has renewed it meanwhile; if nobody has claimed it either, it is still ours.
                    self.held.refresh().await?;
                }
                let outcome = if let Outcome::Handled(0) = outcome { nothing_handled() } else { outcome };
                observe::delivered(delivery, &outcome, began.elapsed());
                Some(outcome)
            }
            First::Right(()) => None,
        })
    }

    async fn move_past(&mut self, delivery: &Delivery, handled: usize) -> Result<()> {
        match handled.checked_sub(1).and_then(|last| delivery.events().get(last)) {
            Some(last) => self.held.advance(self.held.advance_to(last.position(), Vec::new())).await,
            None => Ok(()),
        }
    }

    /// Pauses before the next attempt; false if a shutdown or an operator ends the attempts.
    async fn pause(&mut self, attempts: u32) -> Result<bool> {
        let policy = self.held.subscription.settings.failure;
        let pause = backoff(attempts, policy.first_pause, policy.longest_pause);
        let store = self.held.subscription.store.clone();
        let mut paused = store.engine().pause(pause);
        loop {
            let interrupted = race(self.stop.set(), store.operator_calls().after(self.held.heard()));
            match self.held.keeping(race(paused.as_mut(), interrupted)).await? {
                First::Left(()) => return Ok(!self.is_to_give_up()),
                First::Right(First::Left(())) => return Ok(false),
                First::Right(First::Right(())) => self.held.refresh().await?,
            }
            if self.is_to_give_up() {
                return Ok(false);
            }
        }
    }

    /// One event that was tried often enough.
    async fn give_up(&mut self, delivery: &Delivery, error: BoxError) -> Result<()> {
        let Some(event) = delivery.events().first() else { return Ok(()) };
        let (position, attempts, text) = (event.position(), delivery.attempt(), stored_error(&*error));
        let parked = |holds_back| Parked {
            position,
            aggregate: event.aggregate(),
            holds_back,
            attempts,
            error: text.clone(),
            parked_at: Timestamp::now(),
            is_due: false,
        };
        let kept = match self.held.subscription.settings.failure.action {
            FailureAction::Stop => return Err(self.stop_at(position, attempts, error).await?),
            FailureAction::Skip => {
                observe::skipped(delivery.cursor(), position);
                return self.held.advance(self.held.advance_to(delivery.end(), Vec::new())).await;
            }
            FailureAction::Park => parked(true),
            FailureAction::ParkAlone => parked(false),
        };
        let changes = vec![ParkedChange::Keep(kept.clone())];
        self.held.advance(self.held.advance_to(delivery.end(), changes.clone())).await?;
        self.held.note_parked(&changes, &kept);
        observe::parked_one(delivery.cursor(), position);
        Ok(())
    }

    async fn stop_at(&mut self, position: Position, attempts: u32, error: BoxError) -> Result<Error> {
        let id = &self.held.context.id;
        let message = format!(
            "the handler of subscription \"{}\" failed at position {position} after {attempts} attempts",
            id.subscription
        );
        observe::stopped(id, position);
        self.held.fail(Failure { position, attempts, error: stored_error(&*error) }).await?;
        Ok(Error::new(ErrorKind::Rejected, message).with_source(error))
    }

    /// Tries a parked event once more, because an operator has asked for it.
    async fn retry_parked(&mut self) -> Result<()> {
        if let Some((parked, delivery, changes)) = self.held.next_due().await? {
            let advance = self.held.change_parked(delivery.end(), changes.clone());
            if delivery.events().is_empty() {
                return self.change_parked(&parked, delivery.end(), changes).await.map(drop);
            }
            let asked_at = Instant::now();
            let Some(outcome) = self.deliver(&delivery, &advance).await? else { return Ok(()) };
            match outcome {
                Outcome::Advanced(cursor) => {
                    self.held.was_moved(asked_at, cursor).await?;
                    self.held.note_parked(&changes, &parked);
                }
                Outcome::Handled(_) => {
                    while !self.change_parked(&parked, delivery.end(), changes.clone()).await? {
                        if !self.held.take_due(&parked).await? {
                            return Ok(());
                        }
                    }
                }
                Outcome::Refused(error) if matches!(error.kind(), ErrorKind::LeaseLost) => {
                    self.held.refresh().await?;
                    if !self.held.parked_were_changed() {
                        return Err(error);
                    }
                }
                Outcome::Refused(error) => return Err(self.refused(error).await?),
                Outcome::Failed { .. } if self.stop.is_set() => {}
                Outcome::Failed { error, .. } => {
                    observe::retried(delivery.cursor());
                    let again = Parked {
                        attempts: delivery.attempt(),
                        error: stored_error(&*error),
                        is_due: false,
                        ..parked.clone()
                    };
                    let (stays, changes) = (self.held.cursor.position, vec![ParkedChange::Keep(again)]);
                    self.change_parked(&parked, stays, changes).await?;
                }
            }
        }
        Ok(())
    }

    /// Writes the result of a parked event. False, and nothing is written, if an operator has changed parked events meanwhile.
    async fn change_parked(
        &mut self,
        parked: &Parked,
        to: Position,
        changes: Vec<ParkedChange>,
    ) -> Result<bool> {
        let advance = self.held.change_parked(to, changes.clone());
        match self.held.advance(advance).await {
            Err(error) if matches!(error.kind(), ErrorKind::LeaseLost) && self.held.parked_were_changed() => {
                Ok(false)
            }
            moved => {
                moved?;
                self.held.note_parked(&changes, parked);
                Ok(true)
            }
        }
    }
}

/// A sink without progress counts as failed; otherwise it would be called again without a pause.
fn nothing_handled() -> Outcome {
    Outcome::Failed { handled: 0, error: "the sink has handled nothing".into() }
}

/// The pause before a claim, after this many leases in a row that were lost without progress.
pub(crate) fn after_losses(losses: u32, lease: Duration) -> Duration {
    let pause = Duration::from_millis(10).saturating_mul(1 << losses.saturating_sub(1).min(10));
    if losses == 0 { Duration::ZERO } else { pause.min(between_claims(lease)) }
}

/// How long to wait before the next try to claim.
pub(crate) fn between_claims(lease: Duration) -> Duration {
    (lease / 4).clamp(Duration::from_millis(5), Duration::from_secs(1))
}

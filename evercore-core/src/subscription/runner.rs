//! Runs one cursor from its claim to the end of its lease: delivers, moves the cursor, retries, skips, parks.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::cursor::{Failure, Parked, ParkedChange, stored_error};
use super::delivery::{Delivery, Outcome, Sink};
use super::failure::{Failed, FailedEvent, FailureAction, is_lost_too_often};
use super::handler::caught;
use super::held::{Held, is_waited_out};
use super::step::Advance;
use super::stop::Stop;
use crate::backoff::backoff;
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::future::BoxFuture;
use crate::ids::Position;
use crate::observe;
use crate::race::{First, others_first, race};
use crate::time::Timestamp;

/// The pauses before a move of the cursor is tried again.
const ADVANCE_AGAIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Why a runner stopped.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It was told to stop.
    Stopped,
    /// The subscription is paused, or a worker with fewer cursors gets this one.
    GivenUp,
    /// The handler failed at an event. The cursor rests for a while.
    Rests,
    /// A newer version has taken over.
    Superseded,
    /// The lease is lost or the engine does not work: claim again.
    Lost {
        /// Whether the cursor has moved before.
        has_moved: bool,
        /// Whether the log was read before.
        has_read: bool,
        /// The engine's error, if there is one.
        error: Option<Error>,
    },
    /// For good.
    Failed(Error),
}

/// Runs until it ends, and gives the lease back if it still has it.
pub(crate) async fn run(mut held: Held, sink: Arc<dyn Sink>, stop: Arc<Stop>) -> Ended {
    let mut runner = Runner { held: &mut held, sink: &sink, stop: &stop, probes: 0, ended: None };
    let ended = match runner.work().await {
        Ok(ended) => ended,
        Err(error) => {
            let (has_moved, has_read) = (held.has_moved(), held.has_read);
            match error.kind() {
                ErrorKind::Superseded => Ended::Superseded,
                ErrorKind::LeaseLost | ErrorKind::NotFound => {
                    observe::lease_changed(&held.context.id, "lost");
                    Ended::Lost { has_moved, has_read, error: None }
                }
                ErrorKind::TailLost { position } => {
                    observe::tail_lost(&held.context.id, *position);
                    Ended::Lost { has_moved, has_read, error: None }
                }
                // This engine never answers again.
                ErrorKind::Closed => Ended::Failed(error),
                _ => Ended::Lost { has_moved, has_read, error: Some(error) },
            }
        }
    };
    // If it cannot be given back, it ends by itself.
    if held.release().await.is_ok() && matches!(ended, Ended::Stopped | Ended::GivenUp) {
        observe::lease_changed(&held.context.id, "released");
    }
    ended
}

struct Runner<'a> {
    held: &'a mut Held,
    sink: &'a Arc<dyn Sink>,
    stop: &'a Stop,
    /// How often in a row an event was tried while something that the handler needs was down.
    probes: u32,
    /// Why it ends, if it is decided.
    ended: Option<Ended>,
}

impl Runner<'_> {
    async fn work(&mut self) -> Result<Ended> {
        self.held.begin_small_after_losses();
        loop {
            if let Some(ended) = self.ended.take() {
                return Ok(ended);
            }
            if self.stop.is_set() {
                return Ok(Ended::Stopped);
            }
            let gives_up = self.is_to_give_up();
            self.held.context.gives_up.store(gives_up, Ordering::Release);
            if gives_up {
                return Ok(Ended::GivenUp);
            }
            self.held.renew_if_due().await?;
            self.held.look_at_parked().await?;
            self.held.build().await?;
            self.retry_parked().await?;
            self.held.pass_by().await?;
            let time = self.held.until_parked_again(self.held.subscription.settings.lease / 3);
            // An operator's change may have been heard while a handler was at work.
            let is_due = self.held.has_due() || self.held.parked_were_changed();
            let time = if is_due { Duration::ZERO } else { time };
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
        is_to_give_up(self.held)
    }

    /// Moves the cursor. While the engine fails, this tries again until the lease ends: the handled events would come again
    /// otherwise.
    async fn advance(&mut self, advance: Advance) -> Result<()> {
        let engine = Arc::clone(self.held.subscription.store.engine());
        let (began, grace) = (Instant::now(), self.held.subscription.settings.grace);
        let mut failures = 0;
        loop {
            let error = match self.held.advance(advance.clone()).await {
                Err(error) if is_waited_out(&error) => error,
                outcome => return outcome,
            };
            failures += 1;
            observe::store_failed(&self.held.context.id, &error, failures);
            let is_over = self.stop.is_set() && began.elapsed() >= grace;
            if is_over || self.held.check_time().is_err() {
                return Err(error);
            }
            engine.pause(backoff(failures, ADVANCE_AGAIN.0, ADVANCE_AGAIN.1)).await;
        }
    }

    /// Has a delivery handled, whatever it takes.
    async fn handle(&mut self, mut delivery: Delivery) -> Result<()> {
        if is_lost_too_often(self.held.cursor.lost_leases, &self.held.subscription.settings.failure) {
            return self.give_up_unseen(&delivery).await;
        }
        loop {
            let advance = self.held.advance_to(delivery.end(), Vec::new());
            let asked_at = Instant::now();
            let Some(outcome) = self.deliver(&delivery, &advance).await? else { return Ok(()) };
            let (events, took) = (delivery.events().len(), asked_at.elapsed());
            match outcome {
                Outcome::Handled(count) if count >= events => {
                    self.succeeded(events, took);
                    return self.advance(advance).await;
                }
                Outcome::Handled(count) => {
                    self.succeeded(count, took);
                    self.move_past(&delivery, count).await?;
                    self.held.return_rest(&delivery, count);
                    return Ok(());
                }
                Outcome::Advanced(cursor) => {
                    self.succeeded(events, took);
                    return self.held.was_moved(asked_at, cursor).await;
                }
                Outcome::Refused(error) => return self.refused(error).await,
                // A handler may end early when it is to stop, and that is nobody's fault.
                Outcome::Failed { handled, .. } if delivery.is_stopping() => {
                    self.move_past(&delivery, handled).await?;
                    self.held.return_rest(&delivery, handled);
                    return Ok(());
                }
                Outcome::Hindered { is_too_slow: true, .. } if events > 1 => {
                    self.held.give_fewer(events, took);
                    self.held.return_rest(&delivery, 0);
                    return Ok(());
                }
                Outcome::Hindered { error, .. } => return self.probe(&delivery, 0, error).await,
                Outcome::Failed { handled, error } if events > 1 => {
                    return self.take_apart(&delivery, handled, error).await;
                }
                Outcome::Failed { error, .. } => {
                    let pause = match self.action(&delivery, 0, &error) {
                        FailureAction::DependencyDown => return self.probe(&delivery, 0, error).await,
                        FailureAction::RetryAfter(pause) => pause,
                        action => return self.give_up(&delivery, action, error).await,
                    };
                    observe::retried(delivery.cursor(), &delivery, pause);
                    self.note_try(&delivery, 0, delivery.attempt(), &error).await?;
                    if !self.pause(pause).await? {
                        self.held.put_back();
                        return Ok(());
                    }
                    delivery.attempt = delivery.attempt.saturating_add(1);
                }
            }
        }
    }

    /// Handled events: whatever was down is there again.
    fn succeeded(&mut self, events: usize, took: Duration) {
        if self.probes > 0 {
            observe::works_again(&self.held.context.id);
        }
        self.probes = 0;
        self.held.resize(events, took, self.sink.time_limit());
    }

    /// What to do about a failure at this event of a delivery.
    fn action(&self, delivery: &Delivery, index: usize, error: &BoxError) -> FailureAction {
        let settings = &self.held.subscription.settings;
        let Some(event) = delivery.events().get(index) else { return FailureAction::Rest };
        let failed = FailedEvent {
            error: &**error,
            event,
            attempt: attempt_at(delivery, index),
            is_replay: delivery.is_replay(),
            cursor: delivery.cursor(),
            policy: settings.failure,
        };
        settings.decide.as_ref().map_or_else(|| failed.usual(), |decide| (decide.0)(&failed))
    }

    /// Stores a failed try with the cursor, so that it counts for the next owner too.
    async fn note_try(
        &mut self,
        delivery: &Delivery,
        index: usize,
        tries: u32,
        error: &BoxError,
    ) -> Result<()> {
        let Some(event) = delivery.events().get(index) else { return Ok(()) };
        // Lost leases are stored apart. They count for the first event of a delivery.
        let lost = if index == 0 { self.held.cursor.lost_leases } else { 0 };
        let tries = tries.saturating_sub(lost);
        let failure = Failure { position: event.position(), attempts: tries, error: stored_error(&**error) };
        self.held.note_failed(failure.position, tries);
        self.held.report(failure).await
    }

    /// Something that the handler needs is down, or the read model is locked. One event is tried after a pause, and no try
    /// counts.
    async fn probe(&mut self, delivery: &Delivery, handled: usize, error: BoxError) -> Result<()> {
        self.move_past(delivery, handled).await?;
        self.probes = self.probes.saturating_add(1);
        let pause = self.held.subscription.settings.failure.pause(self.probes);
        observe::waits(delivery.cursor(), delivery.events().get(handled), self.probes);
        let tries = if handled == 0 { delivery.attempt().saturating_sub(1) } else { 0 };
        self.note_try(delivery, handled, tries, &error).await?;
        self.held.give_one();
        self.pause(pause).await?;
        self.held.put_back();
        Ok(())
    }

    /// A sink that does not find the cursor, which is there, looks in another store; otherwise the error says it all.
    async fn refused(&mut self, error: Error) -> Result<()> {
        if !matches!(error.kind(), ErrorKind::NotFound) {
            return Err(error);
        }
        self.held.refresh().await?;
        let message = format!(
            "the projection belongs to another store than subscription \"{}\"",
            self.held.context.id.subscription
        );
        self.ended = Some(Ended::Failed(Error::invalid(message).with_source(error)));
        Ok(())
    }

    /// Several events were tried together, and one of them fails.
    async fn take_apart(&mut self, delivery: &Delivery, handled: usize, error: BoxError) -> Result<()> {
        let is_known = self.sink.tells_which();
        let action = self.action(delivery, handled, &error);
        let pause = match action {
            FailureAction::DependencyDown => return self.probe(delivery, handled, error).await,
            FailureAction::RetryAfter(pause) => pause,
            // The one at fault is not known yet.
            _ if !is_known => self.held.subscription.settings.failure.pause(delivery.attempt()),
            action => {
                self.move_past(delivery, handled).await?;
                if let Some(failed) = delivery.only(handled) {
                    self.give_up(&failed, action, error).await?;
                }
                self.held.put_back();
                return Ok(());
            }
        };
        self.move_past(delivery, handled).await?;
        observe::retried(delivery.cursor(), delivery, pause);
        if is_known {
            self.note_try(delivery, handled, attempt_at(delivery, handled), &error).await?;
        }
        if self.pause(pause).await? {
            let tried = if is_known { 1 } else { delivery.events().len() };
            self.held.put_back_alone(delivery, handled, tried);
        } else {
            self.held.put_back();
        }
        Ok(())
    }

    /// `None`: the shutdown came, and the handler did not end in time.
    async fn deliver(&mut self, delivery: &Delivery, advance: &Advance) -> Result<Option<Outcome>> {
        if self.sink.holds_cursor()
            && let Some(limit) = self.sink.time_limit()
            && self.held.ends_within(limit)
        {
            // Nobody renews the lease while the sink holds the cursor.
            self.held.refresh().await?;
        }
        let began = Instant::now();
        let (stop, settings) = (self.stop, &self.held.subscription.settings);
        let (store, grace) = (self.held.subscription.store.clone(), settings.grace);
        let too_late = async {
            stop.set().await;
            store.engine().pause(grace).await;
        };
        let delivered: BoxFuture<'_, Outcome> = match &settings.spawner {
            None => Box::pin(handled(&**self.sink, delivery, advance)),
            Some(spawner) => {
                let (sink, delivery, advance) = (Arc::clone(self.sink), delivery.clone(), advance.clone());
                let task = spawner.spawn(async move { handled(&*sink, &delivery, &advance).await });
                Box::pin(async { task.await.unwrap_or_else(no_task) })
            }
        };
        let mut work = std::pin::pin!(race(delivered, too_late));
        let first = if self.sink.holds_cursor() {
            work.await
        } else {
            loop {
                let context = Arc::clone(&self.held.context);
                let tell = move |held: &Held| {
                    context.gives_up.store(is_to_give_up(held), Ordering::Release);
                };
                let heard = store.operator_calls().after(self.held.heard());
                match self.held.keeping_and(race(work.as_mut(), heard), &tell).await? {
                    First::Left(first) => break first,
                    First::Right(()) => {
                        self.held.refresh().await?;
                        tell(self.held);
                    }
                }
            }
        };
        Ok(match first {
            First::Left(outcome) => {
                if self.sink.holds_cursor()
                    && matches!(outcome, Outcome::Failed { .. } | Outcome::Hindered { .. })
                {
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
            Some(last) => self.advance(self.held.advance_to(last.position(), Vec::new())).await,
            None => Ok(()),
        }
    }

    /// Pauses before the next attempt; false if a shutdown or an operator ends the attempts.
    async fn pause(&mut self, pause: Duration) -> Result<bool> {
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

    /// An event at which lease after lease was lost. It is not tried any more, as it would cost this lease too.
    async fn give_up_unseen(&mut self, delivery: &Delivery) -> Result<()> {
        let lost = self.held.cursor.lost_leases;
        let error = lost_at_it(lost);
        let action = match self.held.subscription.settings.failure.action {
            FailureAction::RetryAfter(_) | FailureAction::DependencyDown => FailureAction::Rest,
            action => action,
        };
        if let Some(mut first) = delivery.only(0) {
            first.attempt = lost;
            self.give_up(&first, action, error.into()).await?;
            self.held.put_back();
        }
        Ok(())
    }

    /// One event that is not tried any more now.
    async fn give_up(&mut self, delivery: &Delivery, action: FailureAction, error: BoxError) -> Result<()> {
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
        let parks = matches!(action, FailureAction::Park | FailureAction::ParkAlone);
        let kept = match action {
            _ if parks && self.held.parked_are_too_many() => {
                observe::too_many_parked(delivery.cursor(), position);
                return self.rest_at(position, attempts, text).await;
            }
            FailureAction::Park => parked(true),
            FailureAction::ParkAlone => parked(false),
            FailureAction::Skip => {
                observe::skipped(delivery.cursor(), position, attempts);
                return self.advance(self.held.advance_to(delivery.end(), Vec::new())).await;
            }
            FailureAction::Stop => {
                self.rest_at(position, attempts, text).await?;
                let error = match error.downcast::<Failed>() {
                    Ok(failed) => failed.into_source(),
                    Err(error) => error,
                };
                let message = format!(
                    "the handler of subscription \"{}\" failed at position {position} after {attempts} attempts",
                    self.held.context.id.subscription
                );
                self.ended = Some(Ended::Failed(Error::new(ErrorKind::Rejected, message).with_source(error)));
                return Ok(());
            }
            _ => return self.rest_at(position, attempts, text).await,
        };
        let changes = vec![ParkedChange::Keep(kept.clone())];
        self.advance(self.held.advance_to(delivery.end(), changes.clone())).await?;
        self.held.note_parked(&changes, &kept, false);
        observe::parked_one(delivery.cursor(), position, attempts);
        Ok(())
    }

    /// Stops before an event. If the engine does not take the failure, the lease ends by itself.
    async fn rest_at(&mut self, position: Position, attempts: u32, error: String) -> Result<()> {
        observe::stopped(&self.held.context.id, position, attempts);
        self.held.fail(Failure { position, attempts, error }).await?;
        self.ended = Some(Ended::Rests);
        Ok(())
    }

    /// Tries a parked event once more, because an operator has asked for it or its time has come.
    async fn retry_parked(&mut self) -> Result<()> {
        if let Some((parked, delivery, changes)) = self.held.next_due().await? {
            let advance = self.held.change_parked(delivery.end(), changes.clone());
            if delivery.events().is_empty() {
                return self.change_parked(&parked, delivery.end(), changes).await.map(drop);
            }
            let (lost, policy) = (self.held.cursor.lost_leases, self.held.subscription.settings.failure);
            if is_lost_too_often(lost, &policy) {
                let error = lost_at_it(lost);
                let again = Parked { error, parked_at: Timestamp::now(), is_due: false, ..parked.clone() };
                let (stays, changes) = (self.held.cursor.position, vec![ParkedChange::Keep(again)]);
                return self.change_parked(&parked, stays, changes).await.map(drop);
            }
            let asked_at = Instant::now();
            let Some(outcome) = self.deliver(&delivery, &advance).await? else { return Ok(()) };
            match outcome {
                Outcome::Advanced(cursor) => {
                    self.held.was_moved(asked_at, cursor).await?;
                    self.held.note_parked(&changes, &parked, true);
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
                Outcome::Refused(error) => return self.refused(error).await,
                Outcome::Failed { .. } | Outcome::Hindered { .. } if delivery.is_stopping() => {}
                // The read model is locked: no try counts, and the event stays due. One that is too slow by itself does
                // count, since it would hold up all others without end.
                Outcome::Hindered { is_too_slow: false, .. } => {
                    self.retry_parked_later(&delivery);
                }
                Outcome::Failed { error, .. }
                    if self.action(&delivery, 0, &error) == FailureAction::DependencyDown =>
                {
                    self.retry_parked_later(&delivery);
                }
                Outcome::Failed { error, .. } | Outcome::Hindered { error, .. } => {
                    observe::retried(delivery.cursor(), &delivery, Duration::ZERO);
                    let again = Parked {
                        attempts: delivery.attempt(),
                        error: stored_error(&*error),
                        parked_at: Timestamp::now(),
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

    /// Tries a parked event after a pause. Others go on meanwhile. Nothing was written, so the event is due still.
    fn retry_parked_later(&mut self, delivery: &Delivery) {
        self.probes = self.probes.saturating_add(1);
        observe::waits(delivery.cursor(), delivery.events().first(), self.probes);
        self.held.look_at_parked_after(self.held.subscription.settings.failure.pause(self.probes));
    }

    /// Writes the result of a parked event. False, and nothing is written, if an operator has changed parked events meanwhile.
    async fn change_parked(
        &mut self,
        parked: &Parked,
        to: Position,
        changes: Vec<ParkedChange>,
    ) -> Result<bool> {
        let advance = self.held.change_parked(to, changes.clone());
        match self.advance(advance).await {
            Err(error) if matches!(error.kind(), ErrorKind::LeaseLost) && self.held.parked_were_changed() => {
                Ok(false)
            }
            moved => {
                moved?;
                self.held.note_parked(&changes, parked, true);
                Ok(true)
            }
        }
    }
}

fn lost_at_it(lost: u32) -> String {
    format!(
        "the lease was lost {lost} times at this event: its handler blocks its thread, or ends the process"
    )
}

/// The number of this try of an event. The attempt of a delivery is that of its first event.
fn attempt_at(delivery: &Delivery, index: usize) -> u32 {
    if index == 0 { delivery.attempt() } else { 1 }
}

/// Calls the sink. A panic becomes a failure.
async fn handled(sink: &dyn Sink, delivery: &Delivery, advance: &Advance) -> Outcome {
    let delivered = caught(async { sink.deliver(delivery, advance).await });
    let outcome = observe::within(delivery, delivered).await;
    outcome.unwrap_or_else(|error| Outcome::Failed { handled: 0, error })
}

/// The task of a handler did not end by itself.
fn no_task() -> Outcome {
    let message = "the spawner has dropped the handler's task: the runtime may be shutting down";
    Outcome::Refused(Error::new(ErrorKind::Unavailable, message))
}

/// Nobody asks for the last cursor of a worker but a newer version that is about to take over.
fn is_to_give_up(held: &Held) -> bool {
    held.is_paused() || held.is_wanted()
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

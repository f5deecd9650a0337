//! The lease of a cursor: it is renewed in time, watched while work runs, and given back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Held, is_waited_out};
use crate::error::{Error, ErrorKind, Result};
use crate::race::{First, race};
use crate::subscription::Failure;
use crate::subscription::cursor::CursorStatus;
use crate::subscription::step::Step;

/// How often a renewal is repeated that the engine did not answer.
const RENEW_AGAIN: Duration = Duration::from_millis(100);

impl Held {
    /// When the lease expires, by this process's clock, less a little time for the answer's way.
    pub(super) fn valid_until(&self) -> Instant {
        let time = self.subscription.settings.lease;
        self.renewed_at + (time - time / 10)
    }

    /// Whether the lease may end within this time.
    pub(crate) fn ends_within(&self, time: Duration) -> bool {
        Instant::now() + time >= self.valid_until()
    }

    pub(crate) fn check_time(&self) -> Result<()> {
        if Instant::now() < self.valid_until() {
            return Ok(());
        }
        let message =
            format!("the lease on subscription \"{}\" was not renewed in time", self.subscription.name);
        Err(Error::new(ErrorKind::LeaseLost, message))
    }

    /// Runs work and keeps the lease meanwhile; work whose lease is lost is dropped.
    pub(crate) async fn keeping<T>(&mut self, work: impl Future<Output = T> + Send) -> Result<T> {
        self.keeping_and(work, |_| {}).await
    }

    /// The same. Each renewal tells this function what the cursor is like then.
    pub(crate) async fn keeping_and<T>(
        &mut self,
        work: impl Future<Output = T> + Send,
        after_renewal: impl Fn(&Self) + Send,
    ) -> Result<T> {
        let (mut work, engine) = (std::pin::pin!(work), Arc::clone(self.subscription.store.engine()));
        let until = |time: Instant| engine.pause(time.saturating_duration_since(Instant::now()));
        loop {
            self.check_time()?;
            if let First::Left(done) = race(work.as_mut(), until(self.next_renewal)).await {
                return Ok(done);
            }
            self.check_time()?;
            // Without an answer the lease does not count as renewed.
            let too_late = until(self.valid_until());
            match race(work.as_mut(), race(self.renew(), too_late)).await {
                First::Left(done) => return Ok(done),
                First::Right(First::Left(renewed)) => {
                    renewed?;
                    after_renewal(self);
                }
                First::Right(First::Right(())) => {}
            }
        }
    }

    /// Renews the lease if it is time. An unavailable engine does no harm before the lease expires.
    pub(crate) async fn renew_if_due(&mut self) -> Result<()> {
        self.check_time()?;
        if Instant::now() < self.next_renewal { Ok(()) } else { self.renew().await }
    }

    /// The count of operators' changes at the last query.
    pub(crate) fn heard(&self) -> u64 {
        self.heard
    }

    /// Queries the cursor now.
    pub(crate) async fn refresh(&mut self) -> Result<()> {
        self.heard = self.subscription.store.operator_calls().count();
        self.renew().await
    }

    pub(super) async fn renew(&mut self) -> Result<()> {
        let asked_at = Instant::now();
        let time = self.subscription.settings.lease;
        let lease = self.context.lease.clone();
        let is_idle = self.is_idle && self.cursor.lost_leases > 0;
        let renew = if is_idle { Step::renew_idle(lease, time) } else { Step::renew(lease, time) };
        match self.step(&renew).await {
            Ok(()) => {
                self.renewed_at = asked_at;
                self.next_renewal = asked_at + time / 3;
                Ok(())
            }
            Err(error) if is_waited_out(&error) => {
                self.next_renewal = Instant::now() + RENEW_AGAIN.min(time / 10);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Renews the lease now, or finds that it is lost. The cursor is then up to date.
    pub(super) async fn hold(&mut self) -> Result<()> {
        self.step(&Step::renew(self.context.lease.clone(), self.subscription.settings.lease)).await
    }

    /// Whether a worker with fewer cursors asks for this one, by the engine's time of the last step.
    pub(crate) fn is_wanted(&self) -> bool {
        let time = self.subscription.settings.lease;
        self.cursor.wanted_by.is_some() && self.cursor.wanted_until.plus(time) > self.cursor.expires_at
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.cursor.status == CursorStatus::Paused
    }

    pub(crate) async fn release(&mut self) -> Result<()> {
        let is_held = self.cursor.owner.as_ref() == Some(&self.context.lease.owner);
        if is_held && self.passes_by_in().is_some() && self.check_time().is_ok() {
            // The next owner would read it all again. If it cannot be stored, it does.
            let _ = self.advance(self.advance_to(self.taken_to, Vec::new())).await;
        }
        let release = Step::release(self.context.lease.clone());
        let released = self.subscription.store.engine().step(&self.context.id, &release).await;
        self.subscription.store.cursor_moves().send();
        released.map(drop)
    }

    /// Stores a failure of an event that is tried again, for operators and for the next owner. Without an answer of the
    /// engine nothing is lost but that.
    pub(crate) async fn report(&mut self, failure: Failure) -> Result<()> {
        match self.step(&Step::report(self.context.lease.clone(), failure)).await {
            Err(error) if is_waited_out(&error) => Ok(()),
            outcome => outcome,
        }
    }

    pub(crate) async fn fail(&mut self, failure: Failure) -> Result<()> {
        let rest = self.subscription.settings.failure.longest_pause;
        self.step(&Step::Fail { lease: self.context.lease.clone(), failure, rest }).await
    }
}

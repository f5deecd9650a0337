//! Running work again: how often, and after which pauses.

use std::future::Future;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use crate::error::Result;
use crate::store::EventStore;

/// How often, and after which pauses, work is run again after a conflict or when the engine is unavailable.
///
/// Pauses double from `first_pause` to `longest_pause`; each is a random part of that (full jitter), so that those who
/// met do not meet again.
///
/// ```
/// # use evercore_core::RetryPolicy;
/// let policy = RetryPolicy::new().with_attempts(100);
/// assert_eq!(policy.attempts, 100);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RetryPolicy {
    /// How often the work is run at most, the first time included; 0 counts as 1.
    pub attempts: u32,
    /// The upper bound of the first pause.
    pub first_pause: Duration,
    /// The upper bound of all pauses.
    pub longest_pause: Duration,
}

impl RetryPolicy {
    /// 20 attempts, pauses up to 1 ms at first and 100 ms at last. With 16 writers on one aggregate 1 to 3 commits in a
    /// hundred need more than that (measured on PostgreSQL, on a busy machine); raise it where that is the rule.
    pub const fn new() -> Self {
        Self {
            attempts: 20,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(100),
        }
    }

    /// The same with other attempts.
    #[must_use]
    pub const fn with_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// The same with other pauses.
    #[must_use]
    pub const fn with_pauses(mut self, first: Duration, longest: Duration) -> Self {
        self.first_pause = first;
        self.longest_pause = longest;
        self
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl EventStore {
    /// Runs the work, and again while it meets conflicts or an engine that is unavailable, as the policy says.
    ///
    /// ```
    /// # use evercore_core::{Aggregate, EventStore, Json, Result};
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Clone, Default, Serialize, Deserialize)] struct Doctor { on_call: bool }
    /// # #[derive(Serialize, Deserialize)] enum DoctorEvent { WentHome }
    /// # impl Aggregate for Doctor {
    /// #     const TYPE: &'static str = "doctor"; type Event = DoctorEvent; type Codec = Json;
    /// #     fn apply(&mut self, _: DoctorEvent) { self.on_call = false }
    /// # }
    /// async fn go_home(store: &EventStore) -> Result<()> {
    ///     store.retry(async || {
    ///         let mut work = store.begin();
    ///         let mut alice = work.load::<Doctor>("alice").await?;
    ///         let bob = work.load::<Doctor>("bob").await?;
    ///         if bob.on_call {
    ///             work.guard(&bob);
    ///             work.record(&mut alice, DoctorEvent::WentHome)?;
    ///         }
    ///         work.commit().await?;
    ///         Ok(())
    ///     }).await
    /// }
    /// ```
    ///
    /// Where the future must be `Send` in a generic place (`tokio::spawn`), write `|| async { … }` or
    /// `|| { let store = store.clone(); async move { … } }`.
    ///
    /// # Errors
    /// The work's own error, if it is not [retryable](crate::Error::is_retryable) or the last attempt had it. The
    /// user's own refusals, made with [`Error::rejected`](crate::Error::rejected), are not tried again.
    pub async fn retry<R, F, W>(&self, mut work: F) -> Result<R>
    where
        F: FnMut() -> W,
        W: Future<Output = Result<R>>,
    {
        let mut attempts = Attempts::new(self.retry_policy());
        loop {
            match work().await {
                Err(error) if error.is_retryable() => {
                    if !attempts.pause(self).await {
                        return Err(error);
                    }
                }
                result => return result,
            }
        }
    }
}

/// Counts attempts and pauses between them.
pub(crate) struct Attempts {
    policy: RetryPolicy,
    made: u32,
}

impl Attempts {
    pub(crate) fn new(policy: RetryPolicy) -> Self {
        Self { policy, made: 1 }
    }

    /// Pauses before the next attempt; false if there is none.
    pub(crate) async fn pause(&mut self, store: &EventStore) -> bool {
        if self.made >= self.policy.attempts {
            return false;
        }
        let pause = backoff(self.made, self.policy.first_pause, self.policy.longest_pause);
        self.made += 1;
        crate::observe::run_again();
        if !pause.is_zero() {
            store.engine().pause(pause).await;
        }
        true
    }
}

/// The pause after so many attempts: a random part of a bound that doubles.
pub(crate) fn backoff(attempts: u32, first: Duration, longest: Duration) -> Duration {
    let doubled = first.saturating_mul(1 << attempts.saturating_sub(1).min(20));
    doubled.min(longest).mul_f64(random_fraction())
}

/// From 0 to 1. The standard library seeds every `RandomState` anew, which is random enough to part two writers.
fn random_fraction() -> f64 {
    let bits = random_bits() >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

/// Other bits each time.
pub(crate) fn random_bits() -> u64 {
    RandomState::new().build_hasher().finish()
}

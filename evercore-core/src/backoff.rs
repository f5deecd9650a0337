//! Pauses between attempts, and the policy that bounds them.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// How often work is run again after a conflict or while the engine is unavailable, and the pauses between the attempts.
///
/// The bound of the pauses doubles from `first_pause` to `longest_pause`. Each pause is a random part of its bound (full
/// jitter), so that two writers that have met do not meet again.
///
/// ```
/// # use evercore_core::RetryPolicy;
/// let policy = RetryPolicy::new().with_attempts(100);
/// assert_eq!(policy.attempts, 100);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RetryPolicy {
    /// The most attempts, the first included; 0 counts as 1.
    pub attempts: u32,
    /// The upper bound of the first pause.
    pub first_pause: Duration,
    /// The upper bound of all pauses.
    pub longest_pause: Duration,
}

impl RetryPolicy {
    /// 20 attempts, with pauses of up to 1 ms at first and up to 100 ms in the end. If 16 writers race for one aggregate, 1 to
    /// 3 of a hundred commits need more (measured on PostgreSQL, on a busy machine). Raise it if your writers often race.
    pub const fn new() -> Self {
        Self {
            attempts: 20,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(100),
        }
    }

    /// The same policy with this number of attempts.
    #[must_use]
    pub const fn with_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// The same policy with these pauses.
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

/// The pause after this many attempts: a random part of a bound that doubles.
pub(crate) fn backoff(attempts: u32, first: Duration, longest: Duration) -> Duration {
    let doubled = first.saturating_mul(1 << attempts.saturating_sub(1).min(20));
    doubled.min(longest).mul_f64(random_fraction())
}

/// A number from 0 to 1. The standard library gives every `RandomState` another seed, which is random enough here.
fn random_fraction() -> f64 {
    let bits = random_bits() >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

/// Random bits, different at each call.
pub(crate) fn random_bits() -> u64 {
    RandomState::new().build_hasher().finish()
}

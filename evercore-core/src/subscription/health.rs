//! The health of all subscriptions: for people, for metrics and for a readiness probe.

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use super::cursor::{CursorId, CursorStatus};
use super::manage::{CursorState, live};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::name::SubscriptionName;
use crate::observe;
use crate::race::{First, race};
use crate::store::EventStore;

/// The health of subscriptions at one moment. Made by [`EventStore::health`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Health {
    /// Each subscription, in order of name.
    pub subscriptions: Vec<SubscriptionHealth>,
}

/// The health of one subscription.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SubscriptionHealth {
    /// The name.
    pub name: SubscriptionName,
    /// The version that readers should use, as [`EventStore::live_version`] tells it.
    pub live_version: u32,
    /// A state for each cursor of each version, in order of version and partition.
    pub cursors: Vec<CursorState>,
}

/// A cursor of a live version that is not well. `Display` tells it in one line, without the handler's error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// The cursor.
    pub cursor: CursorId,
    /// The problem.
    pub trouble: Trouble,
}

/// A problem of a cursor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Trouble {
    /// An operator has paused it.
    Paused,
    /// Its handler fails at an event, or has stopped there.
    #[non_exhaustive]
    Failing {
        /// The event.
        position: Position,
        /// How often it was tried.
        attempts: u32,
    },
    /// The cursor is past the end of the log. The log has lost its tail, or it is another log.
    #[non_exhaustive]
    Ahead {
        /// The position of the cursor.
        position: Position,
    },
    /// Events have waited for longer than the limit.
    #[non_exhaustive]
    Behind {
        /// The first event that was not handled comes after this position.
        position: Position,
        /// How many events of the log come after the cursor.
        events: u64,
        /// How long ago the oldest of them was recorded.
        time: Duration,
    },
}

impl EventStore {
    /// The health of all durable subscriptions. It costs two small queries, however many subscriptions there are, and sets
    /// the gauges of the feature `metrics`.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use evercore_core::{EventStore, Result};
    /// # async fn probe(store: &EventStore) -> Result<u16> {
    /// // The answer of a readiness probe.
    /// let health = store.health().await?;
    /// for problem in health.problems(Duration::from_secs(30)) {
    ///     eprintln!("{problem}");
    /// }
    /// Ok(if health.is_ready(Duration::from_secs(30)) { 200 } else { 503 })
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of the engine, such as [`Unavailable`](ErrorKind::Unavailable).
    pub async fn health(&self) -> Result<Health> {
        let mut subscriptions: Vec<SubscriptionHealth> = Vec::new();
        for state in self.states(None).await? {
            match subscriptions.last_mut() {
                Some(last) if last.name == state.cursor.id.subscription => last.cursors.push(state),
                _ => subscriptions.push(SubscriptionHealth::new(state)),
            }
        }
        for subscription in &mut subscriptions {
            subscription.live_version = subscription.live()?;
            subscription.cursors.iter().for_each(observe::sampled);
        }
        Ok(Health { subscriptions })
    }

    /// The health of one subscription; otherwise as [`health`](Self::health).
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such subscription; [`InvalidName`](ErrorKind::InvalidName); those
    /// of the engine.
    pub async fn subscription_health(&self, name: impl AsRef<str>) -> Result<SubscriptionHealth> {
        let mut states = self.subscription_states(name).await?.into_iter();
        let first =
            states.next().ok_or_else(|| Error::new(ErrorKind::NotFound, "there is no subscription"))?;
        let mut health = SubscriptionHealth::new(first);
        health.cursors.extend(states);
        health.live_version = health.live()?;
        health.cursors.iter().for_each(observe::sampled);
        Ok(health)
    }

    /// Asks for the [health](Self::health) again and again until the shutdown is ready, so that the gauges of the feature
    /// `metrics` are set also while no cursor moves. `every` is the time between two queries, at least 100 ms. One process
    /// is enough. If a query fails, the next one comes after the same time.
    pub async fn sample_health(&self, every: Duration, shutdown: impl Future<Output = ()> + Send) {
        let mut shutdown = pin!(shutdown);
        loop {
            if let Err(error) = self.health().await {
                observe::not_sampled(&error);
            }
            let pause = self.engine().pause(every.max(Duration::from_millis(100)));
            if matches!(race(shutdown.as_mut(), pause).await, First::Left(())) {
                return;
            }
        }
    }
}

impl Health {
    /// The problems of live versions: cursors that are paused, failing, past the end of the log, or further behind than
    /// this. A version that is being built, one that is retired, and parked events are no problem; look for them in the
    /// fields.
    ///
    /// A runner moves its cursor past events that are not for it only every few seconds, so allow some seconds.
    pub fn problems(&self, max_lag: Duration) -> Vec<Problem> {
        self.subscriptions.iter().flat_map(|subscription| subscription.problems(max_lag)).collect()
    }

    /// Whether there are no [problems](Self::problems).
    pub fn is_ready(&self, max_lag: Duration) -> bool {
        self.problems(max_lag).is_empty()
    }
}

impl SubscriptionHealth {
    fn new(first: CursorState) -> Self {
        Self { name: first.cursor.id.subscription.clone(), live_version: 0, cursors: vec![first] }
    }

    fn live(&self) -> Result<u32> {
        let cursors: Vec<_> = self.cursors.iter().map(|state| state.cursor.clone()).collect();
        Ok(live(&self.name, &cursors)?.0)
    }

    /// As [`Health::problems`], of this subscription.
    pub fn problems(&self, max_lag: Duration) -> Vec<Problem> {
        let of_live = self.cursors.iter().filter(|state| state.cursor.id.version == self.live_version);
        of_live
            .filter_map(|state| {
                Some(Problem { cursor: state.cursor.id.clone(), trouble: state.trouble(max_lag)? })
            })
            .collect()
    }

    /// As [`Health::is_ready`], of this subscription.
    pub fn is_ready(&self, max_lag: Duration) -> bool {
        self.problems(max_lag).is_empty()
    }
}

impl CursorState {
    /// The first thing that is wrong, the most urgent first.
    fn trouble(&self, max_lag: Duration) -> Option<Trouble> {
        let position = self.cursor.position;
        if self.is_ahead {
            return Some(Trouble::Ahead { position });
        }
        if let Some(failure) = &self.cursor.failure {
            return Some(Trouble::Failing { position: failure.position, attempts: failure.attempts });
        }
        if self.cursor.status == CursorStatus::Paused {
            return Some(Trouble::Paused);
        }
        (self.lag_time > max_lag).then_some(Trouble::Behind {
            position,
            events: self.lag_events,
            time: self.lag_time,
        })
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CursorId { subscription, version, partition } = &self.cursor;
        write!(f, "subscription \"{subscription}\" version {version} partition {partition} ")?;
        match &self.trouble {
            Trouble::Paused => f.write_str("is paused"),
            Trouble::Failing { position, attempts } => {
                write!(f, "fails at position {position}, tried {attempts} times")
            }
            Trouble::Ahead { position } => {
                write!(f, "is at position {position}, past the end of the log")
            }
            Trouble::Behind { position, events, time } => {
                let seconds = time.as_secs();
                write!(f, "is at position {position}, {events} events and {seconds} seconds behind")
            }
        }
    }
}

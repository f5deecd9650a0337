//! The description of a durable subscription, before it is claimed.

use std::sync::Arc;
use std::time::Duration;

use super::cursor::{Cursor, CursorId, CursorStatus};
use super::failure::FailurePolicy;
use super::step::Step;
use crate::backoff::random_bits;
use crate::contract::Filter;
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::limits;
use crate::name::{OwnerId, SubscriptionName};
use crate::page_limit::PageLimit;
use crate::store::EventStore;
use crate::time::Timestamp;

/// Where a subscription begins. It is resolved once, when the cursor is made. From then on the cursor counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Start {
    /// With the first event of the log.
    #[default]
    Beginning,
    /// With the next event that is committed.
    End,
    /// With the event after this position. A position past the end of the log is
    /// [`CursorAhead`](crate::ErrorKind::CursorAhead) when the subscription is declared, run or claimed for the first time.
    After(Position),
    /// With the first event that was recorded at this time or later. That is the time of the engine's clock, not the
    /// event time that the writer gave. A time in the future means the end of the log.
    At(Timestamp),
}

impl Start {
    /// The subscription begins after this position.
    pub(crate) async fn resolve(self, store: &EventStore) -> Result<Position> {
        match self {
            Self::Beginning => Ok(Position::ZERO),
            Self::End => store.head().await,
            Self::After(position) => {
                let head = store.head().await?;
                if position > head {
                    return Err(Error::cursor_ahead(position, head));
                }
                Ok(position)
            }
            Self::At(time) => store.position_before(time).await,
        }
    }
}

/// A durable subscription: a name under which the store keeps its cursor, and settings for running it. Made by
/// [`EventStore::subscription`].
///
/// A runner needs the lease of the cursor, so one owner runs it at a time. Others wait and take over. Events come in the
/// order of the log, each at least once; together with an engine's projection, exactly once.
///
/// ```
/// # use evercore_core::{EventStore, Filter, Result, Start, AggregateType};
/// # async fn mail(store: &EventStore, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
/// store
///     .subscription("mails")?
///     .with_filter(Filter::all().with_aggregate_type(AggregateType::new("order")?))
///     .starting(Start::End)
///     .run(shutdown, |event| async move {
///         if !event.is_replay() {
///             println!("a mail about {}", event.event_type());
///         }
///         Ok(())
///     })
///     .await?;
/// # Ok(()) }
/// ```
///
/// The filter, the batch, the lease and the policy are not stored. Each runner brings its own, so a change takes effect
/// with the next claim.
#[derive(Clone, Debug)]
pub struct Subscription {
    pub(crate) store: EventStore,
    pub(crate) name: SubscriptionName,
    pub(crate) settings: Settings,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) version: u32,
    pub(crate) partitions: u32,
    pub(crate) filter: Filter,
    pub(crate) start: Start,
    pub(crate) batch: PageLimit,
    pub(crate) lease: Duration,
    pub(crate) grace: Duration,
    pub(crate) failure: FailurePolicy,
    pub(crate) is_standby: bool,
    pub(crate) label: Option<Arc<str>>,
}

impl EventStore {
    /// A durable subscription of this name. Nothing is written before it is run or claimed.
    ///
    /// # Errors
    /// [`InvalidName`](crate::ErrorKind::InvalidName) if the name breaks a rule.
    pub fn subscription(&self, name: impl AsRef<str>) -> Result<Subscription> {
        Ok(Subscription {
            store: self.clone(),
            name: SubscriptionName::new(name)?,
            settings: Settings {
                version: 1,
                partitions: 1,
                filter: Filter::all(),
                start: Start::default(),
                batch: PageLimit::default(),
                lease: Duration::from_secs(30),
                grace: Duration::from_secs(30),
                failure: FailurePolicy::default(),
                is_standby: true,
                label: None,
            },
        })
    }
}

impl Subscription {
    /// Delivers only events that pass this filter. The default is all events. The cursor moves past the others: a wider
    /// filter later does not bring them back.
    #[must_use]
    pub fn with_filter(mut self, filter: Filter) -> Self {
        self.settings.filter = filter;
        self
    }

    /// Where to begin if there is no cursor yet. The default is the first event.
    #[must_use]
    pub fn starting(mut self, start: Start) -> Self {
        self.settings.start = start;
        self
    }

    /// The most events and bytes in one batch; 0 events count as 1.
    #[must_use]
    pub fn with_batch(mut self, limit: PageLimit) -> Self {
        self.settings.batch = limit.at_least_one();
        self
    }

    /// How long a lease lasts without a renewal, from 10 ms to a day. The default is 30 s. It is renewed after a third of
    /// that time, also while a handler works. If the owner dies, others wait up to this long.
    #[must_use]
    pub fn with_lease(mut self, time: Duration) -> Self {
        self.settings.lease = time.clamp(Duration::from_millis(10), Duration::from_secs(86_400));
        self
    }

    /// How long a handler may go on after the shutdown before it is dropped. The default is 30 s.
    #[must_use]
    pub fn with_grace(mut self, time: Duration) -> Self {
        self.settings.grace = time;
        self
    }

    /// What happens when an event cannot be handled.
    #[must_use]
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        self.settings.failure = policy;
        self
    }

    /// The version of the projection. The default is 1. A new version has its own cursor. It is built from its start
    /// while the old version continues, takes over when it has caught up, and gets all events before that as
    /// [replay](super::Delivery::is_replay). It should write to another place than the old version. Events that the old
    /// version has parked are replay for the new one too, so resume or drop them first. A new version does not take over
    /// from a paused one. The old cursors stay, retired, until they are [removed](EventStore::remove_subscription).
    #[must_use]
    pub fn with_version(mut self, version: u32) -> Self {
        self.settings.version = version;
        self
    }

    /// Divides the work among this many cursors, each with its own lease. The running processes share them about
    /// equally. All events of one aggregate belong to one partition and stay in order. The number is fixed once the
    /// cursors are made, for later versions too.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        self.settings.partitions = partitions;
        self
    }

    /// Does not wait for a lease that another owner holds: running or claiming then fails with
    /// [`AlreadyOwned`](crate::ErrorKind::AlreadyOwned), or with [`Paused`](crate::ErrorKind::Paused).
    #[must_use]
    pub fn without_standby(mut self) -> Self {
        self.settings.is_standby = false;
        self
    }

    /// A word that names the owner in a list of cursors, such as the host's name.
    #[must_use]
    pub fn labelled(mut self, label: &str) -> Self {
        self.settings.label = Some(Arc::from(label));
        self
    }

    /// The name.
    pub fn name(&self) -> &SubscriptionName {
        &self.name
    }

    pub(crate) fn cursor_id(&self, partition: u32) -> CursorId {
        CursorId { subscription: self.name.clone(), version: self.settings.version, partition }
    }

    /// A new owner at each call.
    pub(crate) fn new_owner(&self) -> Result<OwnerId> {
        let label = self.settings.label.as_deref().unwrap_or("runner");
        OwnerId::new(format!("{label} {} {:016x}{:016x}", std::process::id(), random_bits(), random_bits()))
    }

    /// Makes the cursors if there are none, and resolves the start. Running or claiming the subscription does this too.
    /// Call it early if a caller may [wait for the subscription](EventStore::wait_for) before the first run.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the version is 0, or the number of partitions is another than before;
    /// [`Superseded`](crate::ErrorKind::Superseded) if it has no cursors and a newer version has;
    /// [`CursorAhead`](crate::ErrorKind::CursorAhead) if the start is past the end of the log; and the engine's errors.
    pub async fn declare(&self) -> Result<()> {
        let Settings { version, partitions, start, .. } = self.settings;
        if version == 0 {
            return Err(Error::invalid("the version of a subscription must be at least 1"));
        }
        if !(1..=limits::PARTITIONS).contains(&partitions) {
            let most = limits::PARTITIONS;
            return Err(Error::invalid(format!("{partitions} partitions are not between 1 and {most}")));
        }
        let engine = self.store.engine();
        let known = engine.cursors(Some(&self.name)).await?.cursors;
        let other = known.iter().find(|cursor| cursor.partitions != partitions);
        if let Some(Cursor { partitions: others, .. }) = other {
            return Err(Error::invalid(format!(
                "subscription \"{}\" has {others} partitions, not {partitions}",
                self.name
            )));
        }
        let own: Vec<_> = known.iter().filter(|cursor| cursor.id.version == version).collect();
        if u32::try_from(own.len()).is_ok_and(|own| own == partitions) {
            return Ok(());
        }
        if own.is_empty() && known.iter().any(|cursor| cursor.id.version > version) {
            let message =
                format!("version {version} of subscription \"{}\" comes after a newer one", self.name);
            return Err(Error::new(ErrorKind::Superseded, message));
        }
        // An earlier call that was cut short has resolved the start already.
        let start = match own.first().and_then(|begun| begun.live_from) {
            Some(resolved) => resolved,
            None => start.resolve(&self.store).await?,
        };
        // Events that an older version has not handled yet belong to this version, even if its own start is later.
        let others = known.iter().filter(|it| it.id.version < version && it.status != CursorStatus::Retired);
        let position = others.map(|older| older.position).fold(start, Position::min);
        let is_first = known.iter().all(|cursor| cursor.id.version >= version);
        let live_from = is_first.then_some(start);
        for partition in 0..partitions {
            let declare = Step::Declare { partitions, position, live_from };
            engine.step(&self.cursor_id(partition), &declare).await?;
        }
        Ok(())
    }
}

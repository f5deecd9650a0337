//! A durable subscription as it is described, before anybody claims it.

use std::sync::Arc;
use std::time::Duration;

use super::cursor::{Cursor, CursorId, CursorStatus};
use super::failure::FailurePolicy;
use super::step::Step;
use crate::engine::{Filter, PageLimit};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::limits;
use crate::name::{OwnerId, SubscriptionName};
use crate::retry::random_bits;
use crate::store::EventStore;
use crate::time::Timestamp;

/// Where a subscription begins. Resolved once, when its cursor is made; after that the cursor counts.
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
    /// With the first event that was recorded at this time or later, by the engine's clock, not by the time that the event's
    /// writer gave it. A time to come is the end of the log.
    At(Timestamp),
}

impl Start {
    /// The position behind which it begins.
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

/// A durable subscription: a name, under which its cursor lies in the store, and how it is to be run. Made by
/// [`EventStore::subscription`].
///
/// Whoever runs it needs the lease of its cursor, so one owner has it at a time; others wait and take over. Events come
/// in the order of the log, each at least once; together with an engine's projection, exactly once.
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
/// The filter, the batch, the lease and the policy are those of whoever runs it: a changed one takes effect, whole, with
/// the next claim.
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
    /// Only what passes this filter; all events unless said otherwise. The cursor moves past the rest, which does not come
    /// again when the filter is widened.
    #[must_use]
    pub fn with_filter(mut self, filter: Filter) -> Self {
        self.settings.filter = filter;
        self
    }

    /// Where to begin if there is no cursor yet; with the first event unless said otherwise.
    #[must_use]
    pub fn starting(mut self, start: Start) -> Self {
        self.settings.start = start;
        self
    }

    /// At most so many events and bytes at once; 0 events count as 1.
    #[must_use]
    pub fn with_batch(mut self, limit: PageLimit) -> Self {
        self.settings.batch = limit.at_least_one();
        self
    }

    /// How long a lease lasts unless it is renewed, which happens when a third of it is over, also while a handler is at
    /// work; 30 s unless said otherwise, from 10 ms to a day. So long others wait for an owner that died.
    #[must_use]
    pub fn with_lease(mut self, time: Duration) -> Self {
        self.settings.lease = time.clamp(Duration::from_millis(10), Duration::from_secs(86_400));
        self
    }

    /// How long a handler may go on after the shutdown; then it is dropped. 30 s unless said otherwise.
    #[must_use]
    pub fn with_grace(mut self, time: Duration) -> Self {
        self.settings.grace = time;
        self
    }

    /// What becomes of events that cannot be handled.
    #[must_use]
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        self.settings.failure = policy;
        self
    }

    /// The version of the projection; 1 unless said otherwise. A new version has a cursor of its own: it is built from
    /// its start beside the version before, all of it [replay](super::Delivery::is_replay), and takes over when it has
    /// caught up. It should write elsewhere than the old one. What the old one has parked is replay too: resume or drop it
    /// before. It does not take over from one that is paused. The cursors of the old one stay, retired, until they are
    /// [removed](EventStore::remove_subscription).
    #[must_use]
    pub fn with_version(mut self, version: u32) -> Self {
        self.settings.version = version;
        self
    }

    /// Shares the work among this many cursors, each with a lease of its own: those who run the subscription get
    /// about as many each. All events of one aggregate belong to one partition, and stay in order. The number is
    /// fixed once the cursors are made, for later versions too.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        self.settings.partitions = partitions;
        self
    }

    /// Refuses to wait for a lease that another has: running or claiming is then
    /// [`AlreadyOwned`](crate::ErrorKind::AlreadyOwned), or [`Paused`](crate::ErrorKind::Paused).
    #[must_use]
    pub fn without_standby(mut self) -> Self {
        self.settings.is_standby = false;
        self
    }

    /// A word by which people recognise the owner in a list of cursors, such as the name of the host.
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

    /// Another one at each call.
    pub(crate) fn new_owner(&self) -> Result<OwnerId> {
        let label = self.settings.label.as_deref().unwrap_or("runner");
        OwnerId::new(format!("{label} {} {:016x}{:016x}", std::process::id(), random_bits(), random_bits()))
    }

    /// Makes the cursors if there are none, and resolves the start then; whoever runs or claims the subscription does so
    /// too. Done before, nobody who [waits for it](EventStore::wait_for) can come too early.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the version is 0, or the number of partitions is another than before;
    /// [`Superseded`](crate::ErrorKind::Superseded) if it has no cursors and a newer version has;
    /// [`CursorAhead`](crate::ErrorKind::CursorAhead) if the start lies behind the end of the log; what the engine says.
    pub async fn declare(&self) -> Result<()> {
        let Settings { version, partitions, start, .. } = self.settings;
        if version == 0 {
            return Err(Error::invalid("the version of a subscription is 1 at least"));
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
        // Whoever began to make them and got no further has resolved the start already.
        let start = match own.first().and_then(|begun| begun.live_from) {
            Some(resolved) => resolved,
            None => start.resolve(&self.store).await?,
        };
        // What an older version has still before it is for this one, wherever this one would begin by itself.
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

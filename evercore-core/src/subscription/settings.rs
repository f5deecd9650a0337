//! The description of a durable subscription, before it is claimed.

use std::sync::Arc;
use std::time::Duration;

use super::change::SubscriptionChange;
use super::cursor::CursorId;
use super::failure::{Decide, FailedEvent, FailureAction, FailurePolicy};
use super::handler::AckEvery;
use super::partition::PartitionKey;
use super::spawn::Spawner;
use crate::backoff::random_bits;
use crate::contract::Filter;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::future::BoxFuture;
use crate::ids::Position;
use crate::limits;
use crate::name::{EventType, OwnerId, SubscriptionName};
use crate::page_limit::PageLimit;
use crate::store::EventStore;
use crate::time::Timestamp;

/// Where a subscription begins. It is resolved once, when the cursor is made. From then on the cursor counts.
///
/// The events that are in the log at that moment are the past of the subscription. They are delivered as
/// [replay](super::Delivery::is_replay), so a handler that sends mails only for live events sends none about the past.
/// [`Subscription::with_live_past`] delivers them as live.
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
    /// The subscription begins after this position. `head` is the end of the log.
    pub(crate) async fn resolve(self, store: &EventStore, head: Position) -> Result<Position> {
        match self {
            Self::Beginning => Ok(Position::ZERO),
            Self::End => Ok(head),
            Self::After(position) => {
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
    pub(crate) partition_key: Option<PartitionKey>,
    pub(crate) filter: Filter,
    /// The known types besides those of the filter; `None` if unknown types are not noticed.
    pub(crate) known_types: Option<Arc<[EventType]>>,
    pub(crate) start: Start,
    pub(crate) has_live_past: bool,
    pub(crate) batch: PageLimit,
    pub(crate) lease: Duration,
    pub(crate) grace: Duration,
    pub(crate) failure: FailurePolicy,
    pub(crate) is_held: bool,
    pub(crate) decide: Option<Decide>,
    pub(crate) handler_time: Option<Duration>,
    pub(crate) ack: AckEvery,
    pub(crate) most_parked: usize,
    pub(crate) retry_parked: Option<Duration>,
    pub(crate) spawner: Option<Spawner>,
    pub(crate) is_standby: bool,
    pub(crate) label: Option<Arc<str>>,
}

impl Settings {
    /// The partition of this event.
    pub(crate) fn partition_of(&self, event: &Event) -> u32 {
        PartitionKey::partition_of(self.partition_key.as_ref(), event, self.partitions)
    }
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
                partition_key: None,
                filter: Filter::all(),
                known_types: None,
                start: Start::default(),
                has_live_past: false,
                batch: PageLimit::default(),
                lease: Duration::from_secs(30),
                grace: Duration::from_secs(30),
                failure: FailurePolicy::default(),
                is_held: false,
                decide: None,
                handler_time: None,
                ack: AckEvery { events: usize::MAX, time: Duration::from_secs(1) },
                most_parked: 10_000,
                retry_parked: None,
                spawner: None,
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

    /// The event types that this program knows, besides those of the filter. A filter by event types passes over a new type
    /// of the same aggregate in silence; with this call the subscription notices it. It reads all events of the filter's
    /// aggregate types. An event of a known type that the filter leaves out is passed over, and one of an unknown type is a
    /// failure: the handler does not get it, and the [policy](Self::on_failure) decides, so by default the subscription
    /// stops there and says so. A program that knows the type goes on from there. An [`OwnedSubscription`] returns
    /// [`Rejected`](crate::ErrorKind::Rejected).
    ///
    /// The price is that more events are read. Call it with an empty list if the filter names all types that there are.
    ///
    /// ```
    /// # use evercore_core::{AggregateType, EventStore, EventType, Filter, Result};
    /// # fn shipping(store: &EventStore) -> Result<()> {
    /// let paid = Filter::all()
    ///     .with_aggregate_type(AggregateType::new("order")?)
    ///     .with_event_type(EventType::new("Paid")?);
    /// let shipping = store
    ///     .subscription("shipping")?
    ///     .with_filter(paid)
    ///     .with_known_types([EventType::new("Placed")?, EventType::new("Renamed")?]);
    /// // A later `PaidInParts` stops it, until a program runs that says what to do with it.
    /// # let _ = shipping;
    /// # Ok(()) }
    /// ```
    ///
    /// [`OwnedSubscription`]: super::OwnedSubscription
    #[must_use]
    pub fn with_known_types(mut self, types: impl IntoIterator<Item = EventType>) -> Self {
        self.settings.known_types = Some(types.into_iter().collect());
        self
    }

    /// Where to begin if there is no cursor yet. The default is the first event. Events that are in the log when the
    /// cursor is made are delivered as [replay](super::Delivery::is_replay).
    #[must_use]
    pub fn starting(mut self, start: Start) -> Self {
        self.settings.start = start;
        self
    }

    /// Delivers the events that are in the log when the cursor is made as live, not as
    /// [replay](super::Delivery::is_replay). It counts for the first version only, and has no effect on a cursor that is
    /// there already.
    #[must_use]
    pub fn with_live_past(mut self) -> Self {
        self.settings.has_live_past = true;
        self
    }

    /// The most events and bytes in one batch; 0 events count as 1.
    #[must_use]
    pub fn with_batch(mut self, limit: PageLimit) -> Self {
        self.settings.batch = limit.at_least_one();
        self
    }

    /// How long a lease lasts without a renewal, from 10 ms to a day. The default is 30 s. It is renewed after a third of
    /// that time, also while a handler works. If the owner dies, others wait up to this long. While an engine's projection
    /// writes, its lease is not renewed: use a lease that is longer than the engine's `sql_timeout`.
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

    /// What happens when an event cannot be handled: the same for every error. The default is to try five times and then to
    /// let the partition [rest](FailureAction::Rest), while others go on.
    #[must_use]
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        self.settings.failure = policy;
        self
    }

    /// A function that decides about each failure, by the error, the event and the attempt. It is asked after each failed try,
    /// but not after another failed try of a parked event, which stays parked.
    /// [`FailedEvent::usual`] is what happens without it. Pauses of [`on_failure`](Self::on_failure) apply where the answer
    /// has none.
    ///
    /// ```
    /// # use evercore_core::{EventStore, FailureAction, Result, Subscription};
    /// # fn mails(store: &EventStore) -> Result<Subscription> {
    /// let mails = store.subscription("mails")?.decide_on_failure(|failed| {
    ///     match failed.error.downcast_ref::<std::io::Error>() {
    ///         // The mail server is down. No event is at fault.
    ///         Some(_) => FailureAction::DependencyDown,
    ///         None if failed.attempt >= 3 => FailureAction::Park,
    ///         None => failed.usual(),
    ///     }
    /// });
    /// # Ok(mails) }
    /// ```
    #[must_use]
    pub fn decide_on_failure(
        mut self,
        decide: impl Fn(&FailedEvent<'_>) -> FailureAction + Send + Sync + 'static,
    ) -> Self {
        self.settings.decide = Some(Decide(Arc::new(decide)));
        self
    }

    /// How long a handler may take: for one event with [`run`](Self::run), for one delivery with
    /// [`run_batches`](Self::run_batches). A handler that takes longer is dropped at its await, and has failed. There is no
    /// limit by default. A handler that blocks its thread cannot be dropped. A projection has the engine's time-out for the
    /// user's SQL instead.
    #[must_use]
    pub fn with_handler_timeout(mut self, time: Duration) -> Self {
        self.settings.handler_time = Some(time);
        self
    }

    /// [`run`](Self::run) moves the cursor after this many events or this time, whichever comes first, and at the end of each
    /// batch. After a crash at most that much is handled again. The default is each second. 0 events count as 1.
    #[must_use]
    pub fn with_ack_every(mut self, events: usize, time: Duration) -> Self {
        self.settings.ack = AckEvery { events: events.max(1), time };
        self
    }

    /// The most events that one partition parks; the default is 10,000. With that many parked events it
    /// [rests](FailureAction::Rest) instead of parking more, since then the handler is broken and not the events.
    #[must_use]
    pub fn with_most_parked(mut self, events: usize) -> Self {
        self.settings.most_parked = events;
        self
    }

    /// Tries parked events again after this time, and after the same time again if that fails. By default they wait for
    /// [`resume_parked`](EventStore::resume_parked).
    #[must_use]
    pub fn retrying_parked(mut self, after: Duration) -> Self {
        self.settings.retry_parked = Some(after);
        self
    }

    /// Runs handlers in tasks of the application's runtime: each partition has one task at a time. Then partitions use several
    /// CPUs, and a handler that blocks its thread costs neither its own lease nor the leases of others. Without this, all
    /// partitions of a run share the task that awaits it.
    ///
    /// The runtime must have another thread for a handler that blocks.
    ///
    /// ```
    /// # use evercore_core::{BoxFuture, EventStore, Result, Subscription};
    /// # mod tokio { pub fn spawn(_: evercore_core::BoxFuture<'static, ()>) {} }
    /// # fn images(store: &EventStore) -> Result<Subscription> {
    /// let images = store.subscription("images")?.with_partitions(4).with_spawner(|task| {
    ///     tokio::spawn(task);
    /// });
    /// # Ok(images) }
    /// ```
    #[must_use]
    pub fn with_spawner(mut self, spawn: impl Fn(BoxFuture<'static, ()>) + Send + Sync + 'static) -> Self {
        self.settings.spawner = Some(Spawner(Arc::new(spawn)));
        self
    }

    /// The version of the projection. The default is 1. A new version has its own cursors. It is built from its start
    /// while the old version continues, and gets all events that the old one has handled as
    /// [replay](super::Delivery::is_replay). It should write to another place than the old version.
    ///
    /// It takes over when the stored positions of all its partitions have reached those of the live version. That is one
    /// step: the version is live, and all older versions are retired. Until then the old version is live. The take-over
    /// waits while the live version is paused or has parked events: resume or drop them, or
    /// [promote](EventStore::promote_version) the new version. The old cursors stay, so that
    /// [`roll_back`](EventStore::roll_back) can return to them, until they are [removed](EventStore::remove_version).
    #[must_use]
    pub fn with_version(mut self, version: u32) -> Self {
        self.settings.version = version;
        self
    }

    /// Builds a new version and lets it follow the live one, but not take over before it is
    /// [promoted](EventStore::promote_version). This is stored when the cursors of the version are made, so it does not
    /// change a version that exists: see [`hold_version`](EventStore::hold_version). The first version of a subscription is
    /// live at once.
    #[must_use]
    pub fn held(mut self) -> Self {
        self.settings.is_held = true;
        self
    }

    /// Divides the work among this many cursors, each with its own lease. The running processes share them about
    /// equally. All events of one aggregate belong to one partition and stay in order. The number is fixed once the
    /// cursors of the version are made.
    ///
    /// A new [version](Self::with_version) may have another number. It takes over when it has come as far as the slowest
    /// partition of the live version. Events after that position that a faster partition has handled are then live a second
    /// time. Pausing is no way around this, since nothing takes over from a paused version: let it catch up instead.
    #[must_use]
    pub fn with_partitions(mut self, partitions: u32) -> Self {
        self.settings.partitions = partitions;
        self
    }

    /// Divides events among the partitions by this key instead of by their aggregate: events with equal keys belong to one
    /// partition and stay in order. Use it for a process that concerns several aggregates, such as a saga.
    ///
    /// Events of one aggregate can then belong to several partitions. A parked event holds back only the later events of its
    /// aggregate that are in its partition.
    ///
    /// The key must depend on nothing but the event, and be the same in all processes that run the version. Otherwise
    /// events are handled twice or not at all. To change it, or the number of partitions, run a new
    /// [version](Self::with_version). The partition is the 64-bit FNV-1a hash of the key's length and bytes, modulo the
    /// number of partitions. This never changes between releases.
    ///
    /// ```
    /// # use evercore_core::{EventStore, Result};
    /// # fn sagas(store: &EventStore) -> Result<()> {
    /// // All events of a case, whichever aggregate they belong to.
    /// let cases = store
    ///     .subscription("cases")?
    ///     .with_partitions(4)
    ///     .partition_by(|event| event.reference().unwrap_or_default().to_owned());
    /// # let _ = cases;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn partition_by<K: AsRef<[u8]>>(mut self, key: impl Fn(&Event) -> K + Send + Sync + 'static) -> Self {
        self.settings.partition_key = Some(PartitionKey::new(key));
        self
    }

    /// Does not wait for a lease that another owner holds: running or claiming then fails with
    /// [`AlreadyOwned`](crate::ErrorKind::AlreadyOwned), or with [`Paused`](crate::ErrorKind::Paused). A run whose version
    /// is retired ends with [`Superseded`](super::RunEnd::Superseded), instead of waiting for a roll back.
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

    /// The error for cursors with another number of partitions than this.
    pub(crate) fn other_partitions(&self, others: u32) -> Error {
        let (version, own) = (self.settings.version, self.settings.partitions);
        Error::invalid(format!(
            "version {version} of subscription \"{}\" has {others} partitions, not {own}",
            self.name
        ))
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
    /// [`Superseded`](crate::ErrorKind::Superseded) if this version has no cursors and a newer version has;
    /// [`CursorAhead`](crate::ErrorKind::CursorAhead) if the start is past the end of the log; and the engine's errors.
    pub async fn declare(&self) -> Result<()> {
        let Settings { version, partitions, start, has_live_past, is_held, .. } = self.settings;
        if version == 0 {
            return Err(Error::invalid("the version of a subscription must be at least 1"));
        }
        if !(1..=limits::PARTITIONS).contains(&partitions) {
            let most = limits::PARTITIONS;
            return Err(Error::invalid(format!("{partitions} partitions are not between 1 and {most}")));
        }
        let known = self.store.engine().cursors(Some(&self.name)).await?.cursors;
        let own = known.iter().filter(|it| it.id.version == version && it.partitions == partitions);
        if u32::try_from(own.count()).is_ok_and(|own| own == partitions) {
            return Ok(());
        }
        let head = self.store.head().await?;
        let start = start.resolve(&self.store, head).await?;
        let past = if has_live_past { start } else { head };
        let declare = SubscriptionChange::declare(version, partitions, start, is_held).with_past(past);
        self.store.engine().change(&self.name, &declare).await.map(drop)
    }
}

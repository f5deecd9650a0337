//! The store: the calls of an application that load and read.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::aggregate::{Aggregate, EventCodec, aggregate_type};
use crate::awaited::Waits;
use crate::backoff::RetryPolicy;
use crate::batch::Receipt;
use crate::command::KnownCommand;
use crate::contract::{AggregateQuery, Filter, KnownType, LoadRequest, LogPage, LogQuery, StorageEngine};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Events;
use crate::future::BoxFuture;
use crate::ids::{AggregateId, IdBlock, Position, Sequence};
use crate::loaded::Loaded;
use crate::log_reader::LogReader;
use crate::metadata::Metadata;
use crate::name::{CommandId, EventType, Key, SubscriptionName};
use crate::page_limit::PageLimit;
use crate::race::Signal;
use crate::shared_log::SharedLog;
use crate::store_id::StoreId;
use crate::subscription::Cursors;
use crate::target::{IntoTarget, Target};
use crate::time::Timestamp;
use crate::together::{Ask, Together};
use crate::turn::TurnQueues;

/// How many ids are reserved at once.
const ID_BLOCK: u32 = 256;

/// A store of events. Cheap to clone; all clones share one engine.
///
/// Reading needs no unit of work. Writing goes through [`begin`](Self::begin), or through [`update`](Self::update)
/// for the common case of one aggregate and one decision.
#[derive(Clone)]
pub struct EventStore {
    engine: Arc<dyn StorageEngine>,
    shared: Arc<Shared>,
    retry: RetryPolicy,
    metadata: Arc<Metadata>,
}

#[derive(Default)]
struct Shared {
    ids: Mutex<IdBlock>,
    snapshots_ignored: AtomicU64,
    snapshots_skipped: AtomicU64,
    /// Sent when a cursor moves or becomes free.
    cursor_moves: Signal,
    /// Sent when an operator has changed a subscription.
    operator_calls: Signal,
    turns: TurnQueues,
    log: SharedLog,
    waits: Waits,
    lists: Together<SubscriptionName, Arc<Cursors>>,
}

/// Lists cursors for several callers at once.
struct List {
    engine: Arc<dyn StorageEngine>,
    within: Option<Duration>,
}

impl Ask<SubscriptionName, Arc<Cursors>> for List {
    fn gather(&self) -> Option<BoxFuture<'static, ()>> {
        let (engine, within) = (Arc::clone(&self.engine), self.within?);
        Some(Box::pin(async move { engine.pause(within).await }))
    }

    fn ask(&self, names: Vec<SubscriptionName>) -> BoxFuture<'static, Vec<Result<Arc<Cursors>>>> {
        let engine = Arc::clone(&self.engine);
        Box::pin(async move {
            let only = names.first().filter(|first| names.iter().all(|name| name == *first));
            match engine.cursors(only).await {
                Ok(found) => {
                    let found = Arc::new(found);
                    names.iter().map(|_| Ok(Arc::clone(&found))).collect()
                }
                Err(error) => {
                    let again: Vec<_> = names.iter().skip(1).map(|_| Err(error.again())).collect();
                    std::iter::once(Err(error)).chain(again).take(names.len()).collect()
                }
            }
        })
    }
}

impl EventStore {
    /// A store on this engine.
    pub fn new(engine: impl StorageEngine) -> Self {
        Self::shared(Arc::new(engine))
    }

    /// A store on an engine that other code uses too.
    ///
    /// With the feature `metrics` it describes its metrics to the recorder, so install the recorder before.
    pub fn shared(engine: Arc<dyn StorageEngine>) -> Self {
        crate::observe::describe();
        Self { engine, shared: Arc::default(), retry: RetryPolicy::default(), metadata: Arc::default() }
    }

    /// The same store with another policy for [`update`](Self::update) and [`retry`](Self::retry).
    #[must_use]
    pub fn with_retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// The same store with this metadata for all its units of work, also those of [`update`](Self::update),
    /// [`update_once`](Self::update_once) and the other calls that decide and commit.
    ///
    /// ```
    /// # use evercore_core::{Event, EventStore, Metadata, Result};
    /// fn of_request(store: &EventStore, request: &str, cause: &Event) -> Result<EventStore> {
    ///     let metadata = Metadata::new().with_reference(request)?.caused_by(cause);
    ///     Ok(store.with_metadata(metadata)) // cheap: the engine is shared
    /// }
    /// ```
    #[must_use]
    pub fn with_metadata(&self, metadata: Metadata) -> Self {
        Self { metadata: Arc::new(metadata), ..self.clone() }
    }

    pub(crate) fn metadata(&self) -> &Arc<Metadata> {
        &self.metadata
    }

    /// The engine.
    pub fn engine(&self) -> &Arc<dyn StorageEngine> {
        &self.engine
    }

    /// The identity of the store.
    pub(crate) fn identity(&self) -> StoreId {
        self.engine.identity()
    }

    /// Loads an aggregate by natural key or id.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound); [`WrongType`](ErrorKind::WrongType) if the id belongs to another type;
    /// [`InvalidName`](ErrorKind::InvalidName) if the key breaks a rule; [`Codec`](ErrorKind::Codec) if an event cannot
    /// be decoded; those of the engine, such as [`Unavailable`](ErrorKind::Unavailable).
    pub async fn load<T: Aggregate>(&self, target: impl IntoTarget) -> Result<Loaded<T>> {
        let target = target.into_target(&aggregate_type::<T>()?)?;
        let missing = target.not_found();
        self.fold(target, Sequence::MAX).await?.ok_or(missing)
    }

    /// The id of the aggregate with this natural key, if there is one.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) if the key breaks a rule; those of the engine.
    pub async fn find<T: Aggregate>(&self, key: impl AsRef<str>) -> Result<Option<AggregateId>> {
        let target = Target::Key(aggregate_type::<T>()?, Key::new(key)?);
        let request = LoadRequest { target, snapshot: None, up_to: Sequence::ZERO, limit: PageLimit::FOLD };
        Ok(self.engine.load(request).await?.map(|history| history.id))
    }

    /// A filter on the events of the aggregate that has this natural key now. The key is looked up once. If the key
    /// changes later, the filter still means that aggregate.
    ///
    /// ```
    /// # use evercore_core::{Aggregate, EventStore, LogQuery, Position, Result};
    /// # async fn page<Order: Aggregate>(store: &EventStore) -> Result<()> {
    /// let filter = store.filter_by_key::<Order>("4711").await?;
    /// let page = store.read_log(&LogQuery::after(Position::ZERO).with_filter(filter)).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) if there is no such aggregate; otherwise as [`find`](Self::find).
    pub async fn filter_by_key<T: Aggregate>(&self, key: impl AsRef<str>) -> Result<Filter> {
        let aggregate_type = aggregate_type::<T>()?;
        let id = self.find::<T>(key).await?.ok_or_else(|| Error::key_not_found(&aggregate_type))?;
        Ok(Filter::all().with_aggregate(id))
    }

    /// Loads the aggregate with this natural key. If there is none, makes it at once, without an event. If several callers
    /// do this at the same time, one aggregate is made and all get it; [`Loaded::is_new`] is true for the call that made it.
    ///
    /// # Errors
    /// As [`load`](Self::load), but never [`NotFound`](ErrorKind::NotFound), and as [`UnitOfWork::commit`](crate::UnitOfWork::commit).
    pub async fn load_or_create<T: Aggregate>(&self, key: impl AsRef<str>) -> Result<Loaded<T>> {
        let key = Key::new(key)?;
        self.retry(async || {
            let mut work = self.begin();
            let aggregate = work.load_or_create::<T>(&key).await?;
            work.commit().await?;
            Ok(aggregate)
        })
        .await
    }

    /// A page of one aggregate's events, forward or backward.
    ///
    /// # Errors
    /// Those of the engine.
    pub async fn read_aggregate(&self, query: AggregateQuery) -> Result<Events> {
        self.engine.read_aggregate(query).await
    }

    /// A page of the log. The next page begins at the `scanned` of this one. [`log_reader`](Self::log_reader) reads all
    /// pages.
    ///
    /// # Errors
    /// [`CursorAhead`](ErrorKind::CursorAhead) when reading forward from past the end; those of the engine.
    pub async fn read_log(&self, query: &LogQuery) -> Result<LogPage> {
        self.engine.read_log(query).await
    }

    /// Reads the log page by page, and reads the next page while the caller works on one.
    pub fn log_reader(&self, query: LogQuery) -> LogReader {
        LogReader::new(Arc::clone(&self.engine), query)
    }

    /// The position of the last event.
    ///
    /// # Errors
    /// Those of the engine.
    pub async fn head(&self) -> Result<Position> {
        self.engine.head().await
    }

    /// The position of the last event recorded at this time or before; [`Position::ZERO`] if there is none.
    ///
    /// This uses [`Event::recorded_at`](crate::Event::recorded_at), the time of the engine's clock, which never decreases
    /// along the log. [`Event::time`](crate::Event::time) is set by writers and has no order, so it cannot be searched.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub async fn position_at(&self, time: Timestamp) -> Result<Position> {
        self.engine.position_at(time).await
    }

    /// The position of the first event recorded at this time or later, if there is one; by the same clock as
    /// [`position_at`](Self::position_at).
    ///
    /// ```
    /// # use evercore_core::{EventStore, Result, Timestamp};
    /// # async fn since(store: &EventStore, midnight: Timestamp) -> Result<()> {
    /// match store.position_from(midnight).await? {
    ///     Some(first) => println!("the day begins with event {first}"),
    ///     None => println!("nothing has happened today"),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub async fn position_from(&self, time: Timestamp) -> Result<Option<Position>> {
        // The head first: if the time is in the future, events after the head may be recorded before it.
        let head = self.head().await?;
        let before = self.position_before(time).await?;
        Ok((before < head).then(|| before.next()))
    }

    /// The position of the last event recorded before this time.
    pub(crate) async fn position_before(&self, time: Timestamp) -> Result<Position> {
        match Timestamp::from_micros(time.as_micros() - 1) {
            Ok(before) => self.engine.position_at(before).await,
            Err(_) => Ok(Position::ZERO),
        }
    }

    /// Waits until there is an event after this position, at most this long, and returns the position of the last event.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub async fn wait(&self, after: Position, at_most: Duration) -> Result<Position> {
        self.engine.wait(after, at_most).await
    }

    /// Registers the names of this aggregate type and of its event types, and keeps them in memory for later calls. A name
    /// that the codec does not list, such as that of a variant with an alias, is registered by the first commit that uses
    /// it.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) if a name breaks a rule; those of the engine.
    pub async fn warmup<T: Aggregate>(&self) -> Result<()> {
        let names = T::Codec::event_types().into_iter().map(EventType::from_static);
        let known =
            KnownType { aggregate_type: aggregate_type::<T>()?, event_types: names.collect::<Result<_>>()? };
        self.engine.warmup(&[known]).await
    }

    /// All types of aggregates and events that the store knows, ordered by name.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub async fn types(&self) -> Result<Vec<KnownType>> {
        self.engine.types().await
    }

    /// The receipt of the command with this id, if it took effect and was not forgotten since.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub async fn receipt(&self, command: &CommandId) -> Result<Option<Receipt>> {
        Ok(self.engine.command(command).await?.and_then(KnownCommand::into_receipt))
    }

    /// Settles whether the command with this id took effect: its receipt, or `None` for "never, and never will". After
    /// `None`, a commit with that id that arrives late is refused.
    ///
    /// # Errors
    /// As [`UnitOfWork::commit`](crate::UnitOfWork::commit).
    pub async fn settle(&self, command: &CommandId) -> Result<Option<Receipt>> {
        self.engine.settle(command).await
    }

    /// Closes the engine for all that share it, after the running commits have ended. Later calls are
    /// [`Closed`](ErrorKind::Closed), and running subscriptions end with that error. Closing again is harmless.
    ///
    /// A store in memory is lost when it is closed.
    ///
    /// # Errors
    /// Those of the engine, if it cannot close in order.
    pub async fn close(&self) -> Result<()> {
        self.engine.close().await
    }

    /// Removes the commands that took effect, or were settled, before this time, by the engine's clock, and returns how
    /// many. Nothing else removes a command, so a store that runs for years needs this now and then.
    ///
    /// The price: a forgotten command takes effect again if it is sent again, and a command that was settled as "never" may
    /// still land. So keep commands for longer than any sender retries, and longer than a message can be delayed.
    ///
    /// ```
    /// # use evercore_core::{EventStore, Result, Timestamp};
    /// # use std::time::Duration;
    /// async fn forget(store: &EventStore) -> Result<u64> {
    ///     store.forget_commands(Timestamp::now().minus(Duration::from_secs(90 * 24 * 60 * 60))).await
    /// }
    /// ```
    ///
    /// # Errors
    /// [`ReadOnly`](ErrorKind::ReadOnly) if this store may not remove rows; those of the engine.
    pub async fn forget_commands(&self, before: Timestamp) -> Result<u64> {
        self.engine.forget_commands(before).await
    }

    /// How many snapshots could not be decoded and were ignored, by this store and its clones. It should be 0: each of them
    /// costs a replay from the first event.
    pub fn snapshots_ignored(&self) -> u64 {
        self.shared.snapshots_ignored.load(Ordering::Relaxed)
    }

    /// How many snapshots were not written by this store and its clones, because the state could not be encoded, was over
    /// [`limits::PAYLOAD_BYTES`](crate::limits::PAYLOAD_BYTES), or did not survive encoding and decoding. The events are
    /// recorded all the same. It should be 0: such an aggregate is replayed from an older snapshot or from its first event.
    pub fn snapshots_skipped(&self) -> u64 {
        self.shared.snapshots_skipped.load(Ordering::Relaxed)
    }

    pub(crate) fn cursor_moves(&self) -> &Signal {
        &self.shared.cursor_moves
    }

    pub(crate) fn operator_calls(&self) -> &Signal {
        &self.shared.operator_calls
    }

    /// The pages of the log that subscriptions share.
    pub(crate) fn shared_log(&self) -> &SharedLog {
        &self.shared.log
    }

    /// The callers that wait for subscriptions.
    pub(crate) fn waits(&self) -> &Waits {
        &self.shared.waits
    }

    /// The cursors of a subscription, and perhaps others, as of a moment after this call. Callers at the same time share
    /// one call of the engine, which may be made as late as `within` says.
    pub(crate) async fn list(
        &self,
        name: &SubscriptionName,
        within: Option<Duration>,
    ) -> Result<Arc<Cursors>> {
        self.shared.lists.ask(name.clone(), List { engine: Arc::clone(&self.engine), within }).await
    }

    pub(crate) fn turns(&self) -> &TurnQueues {
        &self.shared.turns
    }

    pub(crate) fn retry_policy(&self) -> RetryPolicy {
        self.retry
    }

    pub(crate) fn note_ignored_snapshot(&self) {
        crate::observe::ignored_snapshot();
        self.shared.snapshots_ignored.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_skipped_snapshot(&self, aggregate_type: &'static str) {
        crate::observe::skipped_snapshot(aggregate_type);
        self.shared.snapshots_skipped.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) async fn next_id(&self) -> Result<AggregateId> {
        if let Some(id) = self.ids().next() {
            return Ok(id);
        }
        let mut block = self.engine.reserve(ID_BLOCK).await?;
        let first =
            block.next().ok_or_else(|| Error::new(ErrorKind::Backend, "the engine reserved no id"))?;
        *self.ids() = block; // ids left by another caller are lost, which is harmless
        Ok(first)
    }

    fn ids(&self) -> MutexGuard<'_, IdBlock> {
        self.shared.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for EventStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStore").field("engine", &self.engine).finish_non_exhaustive()
    }
}

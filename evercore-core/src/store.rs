//! The store, as an application sees it: load, decide, commit, read.

use std::fmt;
use std::future::Future;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::aggregate::{Aggregate, EventCodec, StateCodec};
use crate::batch::Receipt;
use crate::engine::{
    AggregateQuery, Direction, History, KnownType, LoadRequest, LogPage, LogQuery, PageLimit, StorageEngine,
    Target,
};
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::event::{Event, Events};
use crate::ids::{AggregateId, IdBlock, Position, Sequence};
use crate::name::{AggregateType, CommandId, EventType, Key};
use crate::time::Timestamp;
use crate::unit_of_work::UnitOfWork;

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
}

#[derive(Default)]
struct Shared {
    ids: Mutex<IdBlock>,
    snapshots_ignored: AtomicU64,
}

/// How often, and after which pauses, work is run again after a conflict or when the engine is unavailable.
///
/// Pauses double from `first_pause` to `longest_pause`; each is a random part of that (full jitter), so that those who
/// met do not meet again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// How often the work is run at most, the first time included; 0 counts as 1.
    pub attempts: u32,
    /// The upper bound of the first pause.
    pub first_pause: Duration,
    /// The upper bound of all pauses.
    pub longest_pause: Duration,
}

impl Default for RetryPolicy {
    /// 20 attempts, pauses up to 1 ms at first and 100 ms at last: enough for 16 writers on one aggregate.
    fn default() -> Self {
        Self {
            attempts: 20,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(100),
        }
    }
}

/// A moment in the life of an aggregate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsOf {
    /// After the event with this sequence.
    Sequence(Sequence),
    /// When the log ended at this position.
    Position(Position),
    /// Before the first event that happened later than this, by event time. Event times are the writer's and need
    /// not grow; history is cut at the first that is later, so that what comes back is a state that was.
    Time(Timestamp),
    /// When nothing later than this was recorded, by the engine's clock.
    Recorded(Timestamp),
}

impl AsOf {
    fn includes(self, event: &Event) -> bool {
        match self {
            Self::Sequence(sequence) => event.sequence() <= sequence,
            Self::Position(position) => event.position() <= position,
            Self::Time(time) => event.time() <= time,
            Self::Recorded(time) => event.recorded_at() <= time,
        }
    }
}

/// What names an aggregate: its id, or its natural key as text or [`Key`].
pub trait IntoTarget: Send {
    /// The target, for an aggregate of this type.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) if a text is no natural key.
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target>;
}

impl IntoTarget for AggregateId {
    fn into_target(self, _: &AggregateType) -> Result<Target> {
        Ok(Target::Id(self))
    }
}

impl IntoTarget for Key {
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target> {
        Ok(Target::Key(aggregate_type.clone(), self))
    }
}

impl IntoTarget for &Key {
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target> {
        self.clone().into_target(aggregate_type)
    }
}

impl IntoTarget for &str {
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target> {
        Key::new(self)?.into_target(aggregate_type)
    }
}

impl IntoTarget for &String {
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target> {
        self.as_str().into_target(aggregate_type)
    }
}

impl IntoTarget for String {
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target> {
        self.as_str().into_target(aggregate_type)
    }
}

/// What a decision may return: no event, one or several, or a refusal.
///
/// Implemented for `Vec`, arrays and `Option` of events, and for a `Result` of these with an error of the user's.
pub trait Decision<E> {
    /// The events, in order.
    ///
    /// # Errors
    /// The user's refusal; it comes back as the source of [`Rejected`](ErrorKind::Rejected).
    fn into_events(self) -> Result<Vec<E>, BoxError>;
}

impl<E> Decision<E> for Vec<E> {
    fn into_events(self) -> Result<Self, BoxError> {
        Ok(self)
    }
}

impl<E, const N: usize> Decision<E> for [E; N] {
    fn into_events(self) -> Result<Vec<E>, BoxError> {
        Ok(self.into())
    }
}

impl<E> Decision<E> for Option<E> {
    fn into_events(self) -> Result<Vec<E>, BoxError> {
        Ok(self.into_iter().collect())
    }
}

impl<E, D: Decision<E>, R: Into<BoxError>> Decision<E> for Result<D, R> {
    fn into_events(self) -> Result<Vec<E>, BoxError> {
        self.map_err(Into::into)?.into_events()
    }
}

/// An aggregate with what the store knows of it: id, natural key, sequence. Reads like the state itself.
pub struct Loaded<T> {
    id: AggregateId,
    key: Option<Key>,
    sequence: Sequence,
    state: T,
    /// Set if the state has events of a unit of work in it; true once that unit has committed.
    staged_in: Option<Arc<AtomicBool>>,
}

impl<T> Loaded<T> {
    pub(crate) fn new(id: AggregateId, key: Option<Key>, sequence: Sequence, state: T) -> Self {
        Self { id, key, sequence, state, staged_in: None }
    }

    pub(crate) fn staged_in(mut self, unit: &Arc<AtomicBool>) -> Self {
        self.staged_in = Some(Arc::clone(unit));
        self
    }

    /// Whether the state has events in it that belong to another unit and are not committed.
    pub(crate) fn is_stale(&self, unit: &Arc<AtomicBool>) -> bool {
        self.staged_in
            .as_ref()
            .is_some_and(|other| !Arc::ptr_eq(other, unit) && !other.load(Ordering::Acquire))
    }

    pub(crate) fn set_key(&mut self, key: Key) {
        self.key = Some(key);
    }

    /// The aggregate's id.
    pub fn id(&self) -> AggregateId {
        self.id
    }

    /// Its natural key, if it has one.
    pub fn key(&self) -> Option<&Key> {
        self.key.as_ref()
    }

    /// The sequence of the last event in the state, those staged in a unit of work included.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }

    /// The state.
    pub fn state(&self) -> &T {
        &self.state
    }

    /// The state alone.
    pub fn into_state(self) -> T {
        self.state
    }
}

impl<T: Aggregate> Loaded<T> {
    pub(crate) fn advance(&mut self, event: T::Event) -> Result<(), BoxError> {
        self.state.try_apply(event)?;
        self.sequence = self.sequence.next();
        Ok(())
    }
}

impl<T> Deref for Loaded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.state
    }
}

impl<T: Clone> Clone for Loaded<T> {
    fn clone(&self) -> Self {
        Self {
            id: self.id,
            key: self.key.clone(),
            sequence: self.sequence,
            state: self.state.clone(),
            staged_in: self.staged_in.clone(),
        }
    }
}

/// Shows id and sequence, not the state.
impl<T> fmt::Debug for Loaded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded")
            .field("id", &self.id)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

impl EventStore {
    /// A store on this engine.
    pub fn new(engine: impl StorageEngine) -> Self {
        Self::shared(Arc::new(engine))
    }

    /// A store on an engine that is used elsewhere too.
    pub fn shared(engine: Arc<dyn StorageEngine>) -> Self {
        Self { engine, shared: Arc::default(), retry: RetryPolicy::default() }
    }

    /// The same store with another policy for [`update`](Self::update) and [`retry`](Self::retry).
    #[must_use]
    pub fn with_retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// The engine.
    pub fn engine(&self) -> &Arc<dyn StorageEngine> {
        &self.engine
    }

    /// Begins a unit of work. Nothing is written before its commit, and dropping it writes nothing.
    pub fn begin(&self) -> UnitOfWork {
        UnitOfWork::new(self.clone())
    }

    /// Loads an aggregate by natural key or id.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound); [`WrongType`](ErrorKind::WrongType) if the id belongs to another type;
    /// [`InvalidName`](ErrorKind::InvalidName) if the key breaks a rule; [`Codec`](ErrorKind::Codec) if an event does
    /// not decode; what the engine says when it is out of reach.
    pub async fn load<T: Aggregate>(&self, target: impl IntoTarget) -> Result<Loaded<T>> {
        let target = target.into_target(&aggregate_type::<T>()?)?;
        let missing = Error::missing(&target);
        self.fold(target, Sequence::MAX).await?.ok_or(missing)
    }

    /// Loads an aggregate as it was. Before its first event, that is the default state.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub async fn load_as_of<T: Aggregate>(&self, target: impl IntoTarget, as_of: AsOf) -> Result<Loaded<T>> {
        let target = target.into_target(&aggregate_type::<T>()?)?;
        let missing = Error::missing(&target);
        if let AsOf::Sequence(sequence) = as_of {
            return self.fold(target, sequence).await?.ok_or(missing);
        }
        let request = LoadRequest { target, snapshot: None, up_to: Sequence::MAX, limit: PageLimit::FOLD };
        let history = self.engine.load(request).await?.ok_or(missing)?;
        self.replay(begin::<T>(&history)?, history, Sequence::MAX, |event| as_of.includes(event)).await
    }

    /// The id of the aggregate with this natural key, if there is one.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) if the key breaks a rule; what the engine says when it is out of reach.
    pub async fn find<T: Aggregate>(&self, key: impl AsRef<str>) -> Result<Option<AggregateId>> {
        let target = Target::Key(aggregate_type::<T>()?, Key::new(key)?);
        let request = LoadRequest { target, snapshot: None, up_to: Sequence::ZERO, limit: PageLimit::FOLD };
        Ok(self.engine.load(request).await?.map(|history| history.id))
    }

    /// Loads the aggregate with this natural key; if there is none, makes it, without an event, at once. However many
    /// do so at the same time, one aggregate is made, and all get it.
    ///
    /// # Errors
    /// As [`load`](Self::load), but never [`NotFound`](ErrorKind::NotFound), and as [`UnitOfWork::commit`].
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

    /// Loads, decides, commits; and again on fresh state if somebody was faster.
    ///
    /// The decision sees the state and returns what is to happen: events, none, or an error of its own. It must have
    /// no effects, since it may run several times.
    ///
    /// # Errors
    /// [`Rejected`](ErrorKind::Rejected) with the decision's own error as its source, not tried again; otherwise as
    /// [`load`](Self::load), [`UnitOfWork::record`] and [`UnitOfWork::commit`], the conflict only after the last
    /// attempt.
    pub async fn update<T, F, D>(&self, target: impl IntoTarget, decide: F) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let target = target.into_target(&aggregate_type::<T>()?)?;
        self.decide(target, false, None, decide).await
    }

    /// As [`update`](Self::update), for an aggregate that is made if there is none with this natural key.
    ///
    /// # Errors
    /// As [`update`](Self::update), but never [`NotFound`](ErrorKind::NotFound).
    pub async fn update_or_create<T, F, D>(&self, key: impl AsRef<str>, decide: F) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let target = Target::Key(aggregate_type::<T>()?, Key::new(key)?);
        self.decide(target, true, None, decide).await
    }

    /// As [`update`](Self::update), once per command id: if the command took effect before, its first receipt comes
    /// back and nothing is decided.
    ///
    /// # Errors
    /// As [`update`](Self::update), and [`CommandAbandoned`](ErrorKind::CommandAbandoned). After
    /// [`OutcomeUnknown`](ErrorKind::OutcomeUnknown), call it again with the same id.
    pub async fn update_once<T, F, D>(
        &self,
        command: CommandId,
        target: impl IntoTarget,
        decide: F,
    ) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let target = target.into_target(&aggregate_type::<T>()?)?;
        self.decide(target, false, Some(command), decide).await
    }

    async fn decide<T, F, D>(
        &self,
        target: Target,
        create: bool,
        command: Option<CommandId>,
        mut decide: F,
    ) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let mut attempts = Attempts::new(self.retry);
        loop {
            let result = self.decide_once(&target, create, command.as_ref(), &mut decide).await;
            let Err(error) = result else { return result };
            let was_first = command.is_some() && matches!(error.kind(), ErrorKind::CommandReused);
            if !(was_first || error.is_retryable()) || !attempts.pause(self).await {
                return Err(error);
            }
        }
    }

    async fn decide_once<T, F, D>(
        &self,
        target: &Target,
        create: bool,
        command: Option<&CommandId>,
        decide: &mut F,
    ) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let mut work = self.begin();
        if let Some(command) = command {
            if let Some(first) = self.receipt(command).await? {
                return Ok(first);
            }
            work.set_command_id(command.clone());
        }
        let mut aggregate = match target {
            Target::Key(_, key) if create => work.load_or_create::<T>(key).await?,
            Target::Key(_, key) => work.load::<T>(key).await?,
            Target::Id(id) => work.load::<T>(*id).await?,
        };
        let events = decide(&aggregate).into_events().map_err(Error::rejected)?;
        work.record_all(&mut aggregate, events)?;
        work.commit().await
    }

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
    /// The work's own error, if it is not [retryable](Error::is_retryable) or the last attempt had it. The user's own
    /// refusals, made with [`Error::rejected`], are not tried again.
    pub async fn retry<R, F, W>(&self, mut work: F) -> Result<R>
    where
        F: FnMut() -> W,
        W: Future<Output = Result<R>>,
    {
        let mut attempts = Attempts::new(self.retry);
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

    /// A page of one aggregate's events, forward or backward.
    ///
    /// # Errors
    /// What the engine says when it is out of reach.
    pub async fn read_aggregate(&self, query: AggregateQuery) -> Result<Events> {
        self.engine.read_aggregate(query).await
    }

    /// A page of the log. The next page begins at the `scanned` of this one.
    ///
    /// # Errors
    /// [`CursorAhead`](ErrorKind::CursorAhead) when reading forward from past the end; what the engine says when it is
    /// out of reach.
    pub async fn read_log(&self, query: &LogQuery) -> Result<LogPage> {
        self.engine.read_log(query).await
    }

    /// The position of the last event.
    ///
    /// # Errors
    /// What the engine says when it is out of reach.
    pub async fn head(&self) -> Result<Position> {
        self.engine.head().await
    }

    /// The position of the last event recorded at this time or before, by the engine's clock.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub async fn position_at(&self, time: Timestamp) -> Result<Position> {
        self.engine.position_at(time).await
    }

    /// Waits until there is an event past `after`, at most this long; tells the position of the last event.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub async fn wait(&self, after: Position, at_most: Duration) -> Result<Position> {
        self.engine.wait(after, at_most).await
    }

    /// Registers the names of this aggregate and of its events, and has them at hand for what follows.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) if one is no name; what the engine says when it is out of reach.
    pub async fn warmup<T: Aggregate>(&self) -> Result<()> {
        let names = T::Codec::event_types().iter().map(|name| EventType::from_static(name));
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

    /// The receipt of the command with this id, if it took effect.
    ///
    /// # Errors
    /// As [`head`](Self::head).
    pub async fn receipt(&self, command: &CommandId) -> Result<Option<Receipt>> {
        self.engine.receipt(command).await
    }

    /// Settles whether the command with this id took effect: its receipt, or `None` for "never, and never will": a
    /// commit with that id that is still on its way is refused.
    ///
    /// # Errors
    /// As [`UnitOfWork::commit`].
    pub async fn settle(&self, command: &CommandId) -> Result<Option<Receipt>> {
        self.engine.settle(command).await
    }

    /// How many snapshots did not decode and were passed over, by this store and its clones. Should be 0; each costs
    /// a replay from the first event.
    pub fn snapshots_ignored(&self) -> u64 {
        self.shared.snapshots_ignored.load(Ordering::Relaxed)
    }

    pub(crate) async fn next_id(&self) -> Result<AggregateId> {
        if let Some(id) = self.ids().next() {
            return Ok(id);
        }
        let mut block = self.engine.reserve(ID_BLOCK).await?;
        let first =
            block.next().ok_or_else(|| Error::new(ErrorKind::Backend, "the engine reserved no id"))?;
        *self.ids() = block; // what others left of a block is lost, and that is harmless
        Ok(first)
    }

    fn ids(&self) -> std::sync::MutexGuard<'_, IdBlock> {
        self.shared.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The aggregate with all events up to this sequence, from the newest snapshot that can be used.
    pub(crate) async fn fold<T: Aggregate>(
        &self,
        target: Target,
        up_to: Sequence,
    ) -> Result<Option<Loaded<T>>> {
        let snapshot = (T::SNAPSHOT_EVERY > 0).then_some(T::SNAPSHOT_VERSION);
        let request = LoadRequest { target, snapshot, up_to, limit: PageLimit::FOLD };
        let Some(mut history) = self.engine.load(request.clone()).await? else { return Ok(None) };
        let mut start = begin::<T>(&history)?;
        if let Some(snapshot) = &history.snapshot {
            match T::Codec::decode_state(snapshot.state.as_bytes()) {
                Ok(state) => (start.state, start.sequence) = (state, snapshot.sequence),
                Err(_) => {
                    self.shared.snapshots_ignored.fetch_add(1, Ordering::Relaxed);
                    let request = LoadRequest { snapshot: None, target: Target::Id(history.id), ..request };
                    let again = self.engine.load(request).await?;
                    history = again.ok_or_else(|| Error::not_found(start.id))?;
                }
            }
        }
        self.replay(start, history, up_to, |_| true).await.map(Some)
    }

    /// Applies the history's events, and the pages behind them, up to `up_to` or the first event not wanted.
    async fn replay<T: Aggregate>(
        &self,
        mut aggregate: Loaded<T>,
        history: History,
        up_to: Sequence,
        wanted: impl Fn(&Event) -> bool + Send,
    ) -> Result<Loaded<T>> {
        let end = up_to.min(history.sequence);
        let mut page = history.events;
        loop {
            for event in &page {
                if !wanted(&event) {
                    return Ok(aggregate);
                }
                apply(&mut aggregate, &event)?;
            }
            if aggregate.sequence >= end {
                return Ok(aggregate);
            }
            let query = AggregateQuery {
                aggregate: aggregate.id,
                direction: Direction::Forward,
                from: aggregate.sequence,
                to: end,
                limit: PageLimit::FOLD,
            };
            page = self.engine.read_aggregate(query).await?;
            if page.is_empty() {
                return Err(hole(&aggregate));
            }
        }
    }
}

impl fmt::Debug for EventStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStore").field("engine", &self.engine).finish_non_exhaustive()
    }
}

/// The name of this type, checked.
pub(crate) fn aggregate_type<T: Aggregate>() -> Result<AggregateType> {
    AggregateType::from_static(T::TYPE)
}

fn begin<T: Aggregate>(history: &History) -> Result<Loaded<T>> {
    let wanted = aggregate_type::<T>()?;
    if history.aggregate_type != wanted {
        return Err(Error::wrong_type(history.id, wanted, history.aggregate_type.clone()));
    }
    Ok(Loaded::new(history.id, history.key.clone(), Sequence::ZERO, T::default()))
}

fn apply<T: Aggregate>(aggregate: &mut Loaded<T>, event: &Event) -> Result<()> {
    if event.sequence() != aggregate.sequence.next() {
        return Err(hole(aggregate));
    }
    let codec = |source| Error::codec(Some(event.event_type().clone()), Some(event.position()), source);
    let decoded = T::Codec::decode(event.event_type().as_str(), event.payload()).map_err(codec)?;
    aggregate.advance(decoded).map_err(codec)
}

/// A history with a hole was not written by evercore; better no state than a wrong one.
fn hole<T>(aggregate: &Loaded<T>) -> Error {
    let next = aggregate.sequence.next();
    Error::new(ErrorKind::NotAStore, format!("event {next} of aggregate {} is missing", aggregate.id))
}

impl Event {
    /// What happened, as an event of `T`.
    ///
    /// # Errors
    /// [`WrongType`](ErrorKind::WrongType) if it belongs to another type of aggregate;
    /// [`Codec`](ErrorKind::Codec) if it does not decode.
    pub fn decode<T: Aggregate>(&self) -> Result<T::Event> {
        let wanted = aggregate_type::<T>()?;
        if *self.aggregate_type() != wanted {
            return Err(Error::wrong_type(self.aggregate(), wanted, self.aggregate_type().clone()));
        }
        T::Codec::decode(self.event_type().as_str(), self.payload())
            .map_err(|source| Error::codec(Some(self.event_type().clone()), Some(self.position()), source))
    }
}

/// Counts attempts and pauses between them.
struct Attempts {
    policy: RetryPolicy,
    made: u32,
}

impl Attempts {
    fn new(policy: RetryPolicy) -> Self {
        Self { policy, made: 1 }
    }

    /// Pauses before the next attempt; false if there is none.
    async fn pause(&mut self, store: &EventStore) -> bool {
        if self.made >= self.policy.attempts {
            return false;
        }
        let doubled = self.policy.first_pause.saturating_mul(1 << (self.made - 1).min(20));
        self.made += 1;
        let pause = doubled.min(self.policy.longest_pause).mul_f64(random_fraction());
        if !pause.is_zero() {
            store.engine.pause(pause).await;
        }
        true
    }
}

/// From 0 to 1. The standard library seeds every `RandomState` anew, which is random enough to part two writers.
fn random_fraction() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

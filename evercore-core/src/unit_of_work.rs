//! The unit of work: it collects changes until one commit writes all of them or none.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;

use crate::aggregate::{Aggregate, EventCodec, StateCodec, aggregate_type};
use crate::batch::{Append, Batch, Guard, KeyChange, NewAggregate, Receipt, Snapshot, check_events};
use crate::command::{Command, CommandTarget};
use crate::context::EventContext;
use crate::contract::{LoadRequest, StorageEngine};
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::event::{NewEvent, Payload};
use crate::ids::{AggregateId, Sequence};
use crate::loaded::{Fate, Loaded};
use crate::metadata::Metadata;
use crate::name::{AggregateType, EventType, Key};
use crate::observe;
use crate::page_limit::PageLimit;
use crate::store::EventStore;
use crate::target::{IntoTarget, Target};
use crate::time::Timestamp;

/// Collects new aggregates, events, keys, guards and snapshots, and commits them together.
///
/// Nothing is written, locked or held before [`commit`](Self::commit). A drop writes nothing. In the log the unit's events
/// are contiguous, in the order in which they were recorded.
///
/// ```
/// # use evercore_core::{Aggregate, EventStore, Json, Result};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Clone, Default, Serialize, Deserialize)] struct Account { cents: i64 }
/// # #[derive(Serialize, Deserialize)] enum AccountEvent { Moved { cents: i64 } }
/// # impl Aggregate for Account {
/// #     const TYPE: &'static str = "account"; type Event = AccountEvent; type Codec = Json;
/// #     fn apply(&mut self, AccountEvent::Moved { cents }: AccountEvent) { self.cents += cents }
/// # }
/// async fn transfer(store: &EventStore, cents: i64) -> Result<()> {
///     let mut work = store.begin();
///     let mut from = work.load::<Account>("alice").await?;
///     let mut to = work.load::<Account>("bob").await?;
///     work.record(&mut from, AccountEvent::Moved { cents: -cents })?;
///     work.record(&mut to, AccountEvent::Moved { cents })?;
///     work.commit().await?;
///     Ok(())
/// }
/// ```
#[must_use = "dropping a unit of work writes nothing; commit it"]
pub struct UnitOfWork {
    store: EventStore,
    batch: Batch,
    staged: Vec<Staged>,
    /// The bytes of all staged payloads.
    staged_bytes: usize,
    /// The sequence of each aggregate before the unit, and with the events that are staged here.
    reached: HashMap<AggregateId, Reach>,
    /// The key by which this unit found an aggregate.
    found_by: HashMap<AggregateId, Key>,
    command: Option<Command>,
    metadata: Arc<Metadata>,
    /// The time of events that set none. It is fixed when the first event is recorded.
    time: Option<Timestamp>,
    /// Shared with every handle that carries events of this unit.
    committed: Arc<Fate>,
    /// Aggregates that were made because their key was not found. If the key is taken at the commit, another unit was
    /// faster.
    raced: Vec<(AggregateId, Target)>,
}

struct Staged {
    aggregate: AggregateId,
    aggregate_type: AggregateType,
    expected: Sequence,
    event_type: EventType,
    payload: Payload,
    time: Timestamp,
    metadata: Arc<Metadata>,
}

impl Staged {
    /// The context of the event; `sequence` is the event's sequence.
    fn context(&self, sequence: Sequence) -> EventContext<'_> {
        EventContext::new(sequence, self.time, &self.metadata)
    }
}

/// The sequence of an aggregate before this unit, and with the staged events.
#[derive(Clone, Copy)]
struct Reach {
    base: Sequence,
    staged: Sequence,
}

impl EventStore {
    /// Begins a unit of work. Nothing is written before its commit. A drop writes nothing.
    pub fn begin(&self) -> UnitOfWork {
        UnitOfWork::new(self.clone())
    }
}

impl UnitOfWork {
    fn new(store: EventStore) -> Self {
        Self {
            metadata: Arc::clone(store.metadata()),
            store,
            batch: Batch::new(),
            staged: Vec::new(),
            staged_bytes: 0,
            reached: HashMap::new(),
            found_by: HashMap::new(),
            command: None,
            time: None,
            committed: Arc::default(),
            raced: Vec::new(),
        }
    }

    /// Makes a new aggregate without a natural key. Other events may name its id at once.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) if `T::TYPE` is not a name; [`Invalid`](ErrorKind::Invalid) if the unit
    /// creates [`limits::UNIT_AGGREGATES`](crate::limits::UNIT_AGGREGATES) others; the engine's error if it cannot
    /// reserve ids.
    pub async fn create<T: Aggregate>(&mut self) -> Result<Loaded<T>> {
        self.create_aggregate(None).await
    }

    /// Makes a new aggregate with a natural key. The commit checks that the key is free.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) if the key breaks a rule, [`KeyTaken`](ErrorKind::KeyTaken) if this
    /// unit already gives it to another aggregate; otherwise as [`create`](Self::create).
    pub async fn create_with_key<T: Aggregate>(&mut self, key: impl AsRef<str>) -> Result<Loaded<T>> {
        let key = Key::new(key)?;
        self.create_aggregate(Some(key)).await
    }

    async fn create_aggregate<T: Aggregate>(&mut self, key: Option<Key>) -> Result<Loaded<T>> {
        let aggregate_type = aggregate_type::<T>()?;
        let id = self.store.next_id().await?;
        self.batch.create(NewAggregate { id, aggregate_type, key: key.clone() })?;
        let head = Reach { base: Sequence::ZERO, staged: Sequence::ZERO };
        self.reached.insert(id, head);
        Ok(Loaded::new(self.store.identity(), id, key, T::default()).created().staged_in(&self.committed))
    }

    /// Loads an aggregate by key or id, with the events that are already staged in this unit.
    ///
    /// # Errors
    /// As [`EventStore::load`].
    pub async fn load<T: Aggregate>(&mut self, target: impl IntoTarget) -> Result<Loaded<T>> {
        let aggregate_type = aggregate_type::<T>()?;
        let target = target.into_target(&aggregate_type)?;
        let missing = target.not_found();
        self.load_target(target).await?.ok_or(missing)
    }

    /// Loads the aggregate with this key, or makes it. If another unit makes it before this unit commits, the commit is a
    /// [conflict](Error::is_conflict): run the unit again, for instance with [`EventStore::retry`].
    /// [`Loaded::is_new`] tells whether this call made it.
    ///
    /// # Errors
    /// As [`load`](Self::load) and [`create_with_key`](Self::create_with_key), but never
    /// [`NotFound`](ErrorKind::NotFound).
    pub async fn load_or_create<T: Aggregate>(&mut self, key: impl AsRef<str>) -> Result<Loaded<T>> {
        let key = Key::new(key)?;
        if let Some(known) = self.load_target(Target::Key(aggregate_type::<T>()?, key.clone())).await? {
            return Ok(known);
        }
        let target = Target::Key(aggregate_type::<T>()?, key.clone());
        let created = self.create_aggregate::<T>(Some(key)).await?;
        self.raced.push((created.id(), target));
        Ok(created)
    }

    async fn load_target<T: Aggregate>(&mut self, target: Target) -> Result<Option<Loaded<T>>> {
        let target = self.resolve(target);
        let found = self.look_for::<T>(target.clone()).await?;
        if let (Some(found), Target::Key(_, key)) = (&found, target) {
            self.found_by.insert(found.id(), key);
        }
        Ok(found)
    }

    async fn look_for<T: Aggregate>(&self, target: Target) -> Result<Option<Loaded<T>>> {
        if let Target::Id(id) = target
            && let Some(created) = self.batch.created(id)
        {
            let wanted = aggregate_type::<T>()?;
            if created.aggregate_type != wanted {
                return Err(Error::wrong_type(id, wanted, created.aggregate_type.clone()));
            }
            let created = Loaded::new(self.store.identity(), id, created.key.clone(), T::default());
            return self.replay_staged(created).map(Some);
        }
        let up_to = match &target {
            Target::Id(id) => self.reached.get(id).map(|head| head.base),
            Target::Key(..) => None,
        };
        let Some(loaded) = self.store.fold::<T>(target.clone(), up_to.unwrap_or(Sequence::MAX)).await? else {
            return Ok(None);
        };
        self.with_staged(target, loaded).await
    }

    /// A key that this unit gives leads to the aggregate that gets it.
    fn resolve(&self, target: Target) -> Target {
        let Target::Key(wanted, key) = &target else { return target };
        self.batch.holder_of(wanted, key).map_or(target, Target::Id)
    }

    async fn with_staged<T: Aggregate>(
        &self,
        target: Target,
        mut loaded: Loaded<T>,
    ) -> Result<Option<Loaded<T>>> {
        let change = self.batch.key_changes().iter().find(|change| change.aggregate == loaded.id());
        match (change, &target) {
            (Some(_), Target::Key(..)) => return Ok(None), // found by the key that this unit takes away
            (Some(change), Target::Id(_)) => loaded.set_key(change.key.clone()),
            (None, _) => {}
        }
        let Some(head) = self.reached.get(&loaded.id()) else { return Ok(Some(loaded)) };
        if loaded.sequence() != head.base {
            // It was found by its key, and has new events since this unit read it: go back to the state that the unit saw.
            let key = loaded.key().cloned();
            let again = self.store.fold::<T>(Target::Id(loaded.id()), head.base).await?;
            loaded = again.ok_or_else(|| Error::not_found(loaded.id()))?;
            if let Some(key) = key {
                loaded.set_key(key);
            }
        }
        self.replay_staged(loaded).map(Some)
    }

    fn replay_staged<T: Aggregate>(&self, mut loaded: Loaded<T>) -> Result<Loaded<T>> {
        let id = loaded.id();
        for event in self.staged.iter().filter(|event| event.aggregate == id) {
            let decoded = T::Codec::decode(event.event_type.as_str(), event.payload.as_bytes())
                .map_err(|source| Error::not_decoded(&event.event_type, None, source))?;
            advance(&mut loaded, decoded, event)?;
        }
        Ok(if self.reached.contains_key(&id) { loaded.staged_in(&self.committed) } else { loaded })
    }

    /// Gives the aggregate another natural key, or its first one. The commit checks that the key is free.
    ///
    /// A key is not an event: if two units change the key of one aggregate, both succeed and the later one counts, unless
    /// they also record events or set a guard.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) if the key breaks a rule; [`KeyTaken`](ErrorKind::KeyTaken) if this
    /// unit gives it to another aggregate; [`Invalid`](ErrorKind::Invalid) if the handle carries events of another unit that
    /// did not commit, comes from another store, or if the unit changes the keys of
    /// [`limits::UNIT_AGGREGATES`](crate::limits::UNIT_AGGREGATES) other aggregates.
    pub fn change_key<T: Aggregate>(
        &mut self,
        aggregate: &mut Loaded<T>,
        key: impl AsRef<str>,
    ) -> Result<()> {
        let key = Key::new(key)?;
        self.check(aggregate)?;
        let aggregate_type = aggregate_type::<T>()?;
        self.batch.change_key(KeyChange { aggregate: aggregate.id(), aggregate_type, key: key.clone() })?;
        self.raced.retain(|(raced, _)| *raced != aggregate.id());
        aggregate.set_key(key);
        Ok(())
    }

    /// Records an event: encodes it, decodes it again, applies the decoded event, validates the new state, and stages the
    /// event. So the state of the handle is the state that a later load finds; see
    /// [`TRUSTS_CODEC`](Aggregate::TRUSTS_CODEC).
    ///
    /// # Errors
    /// [`InvalidState`](ErrorKind::InvalidState) if `validate` refuses the new state; [`Codec`](ErrorKind::Codec) if the
    /// event cannot be encoded, does not survive encoding and decoding, or does not fit the state;
    /// [`Conflict`](ErrorKind::Conflict) if the handle lacks events that another handle to the same aggregate recorded;
    /// [`Invalid`](ErrorKind::Invalid) if the handle carries events of another unit that did not commit, if it comes from
    /// another store, or if the unit would pass [`limits::UNIT_EVENTS`](crate::limits::UNIT_EVENTS) or
    /// [`limits::UNIT_BYTES`](crate::limits::UNIT_BYTES). After an error the event is not staged, and the aggregate is as
    /// before.
    pub fn record<T: Aggregate>(&mut self, aggregate: &mut Loaded<T>, event: T::Event) -> Result<()> {
        self.stage(aggregate, [event], None)
    }

    /// Records several events. After an error none of them is recorded.
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn record_all<T: Aggregate>(
        &mut self,
        aggregate: &mut Loaded<T>,
        events: impl IntoIterator<Item = T::Event>,
    ) -> Result<()> {
        self.stage(aggregate, events, None)
    }

    /// Records an event with its own metadata, which takes precedence over that of the unit.
    ///
    /// # Errors
    /// As [`record`](Self::record), and [`Invalid`](ErrorKind::Invalid) if its headers and those of the unit together are
    /// over [`limits::HEADERS_BYTES`](crate::limits::HEADERS_BYTES).
    pub fn record_with<T: Aggregate>(
        &mut self,
        aggregate: &mut Loaded<T>,
        event: T::Event,
        metadata: &Metadata,
    ) -> Result<()> {
        self.stage(aggregate, [event], Some(metadata))
    }

    fn stage<T: Aggregate>(
        &mut self,
        aggregate: &mut Loaded<T>,
        events: impl IntoIterator<Item = T::Event>,
        metadata: Option<&Metadata>,
    ) -> Result<()> {
        let head = self.head_for(aggregate)?;
        let aggregate_type = aggregate_type::<T>()?;
        let (time, metadata) = self.beside(metadata)?;
        // The events are applied to a copy, so that a refused event, or a panic, leaves aggregate and unit as they were.
        let (mut next, mut staged, mut bytes) = (aggregate.clone(), Vec::new(), self.staged_bytes);
        for event in events {
            let (event_type, payload, event) = write::<T>(&aggregate_type, event)?;
            let written = Staged {
                aggregate: next.id(),
                aggregate_type: aggregate_type.clone(),
                expected: next.sequence(),
                event_type,
                payload,
                time,
                metadata: Arc::clone(&metadata),
            };
            bytes += written.payload.as_bytes().len();
            check_events(self.staged.len() + staged.len() + 1, bytes)?;
            advance(&mut next, event, &written)?;
            let refused = |source| Error::invalid_state(next.id(), &written.event_type, source);
            next.state().validate().map_err(refused)?;
            staged.push(written);
        }
        if staged.is_empty() {
            return Ok(());
        }
        self.note_read(aggregate)?;
        self.snapshot(aggregate.sequence(), &next);
        self.staged.append(&mut staged);
        self.staged_bytes = bytes;
        *aggregate = next.staged_in(&self.committed);
        self.reached.insert(aggregate.id(), Reach { staged: aggregate.sequence(), ..head });
        Ok(())
    }

    /// The time and the metadata of an event that is recorded with `own`.
    fn beside(&mut self, own: Option<&Metadata>) -> Result<(Timestamp, Arc<Metadata>)> {
        let time = *self.time.get_or_insert_with(|| self.metadata.time().unwrap_or_else(Timestamp::now));
        Ok(match own {
            None => (time, Arc::clone(&self.metadata)),
            Some(own) => (own.time().unwrap_or(time), Arc::new(own.clone().over(&self.metadata)?)),
        })
    }

    /// Tells the batch the last event of the handle, unless that event belongs to this unit.
    fn note_read<T>(&mut self, aggregate: &Loaded<T>) -> Result<()> {
        match aggregate.mark() {
            Some(mark) => self.batch.has_read(aggregate.id(), aggregate.sequence(), mark),
            None => Ok(()),
        }
    }

    /// Checks that the handle comes from this store, and that its events are committed or belong to this unit.
    fn check<T>(&self, aggregate: &Loaded<T>) -> Result<()> {
        if aggregate.store() != self.store.identity() {
            return Err(stranger(aggregate.id()));
        }
        if aggregate.is_stale(&self.committed) {
            return Err(stale(aggregate.id()));
        }
        Ok(())
    }

    /// The sequences of this handle's aggregate in this unit. An error if the handle has another sequence.
    fn head_for<T: Aggregate>(&self, aggregate: &Loaded<T>) -> Result<Reach> {
        self.check(aggregate)?;
        let id = aggregate.id();
        match self.reached.get(&id) {
            Some(head) if head.staged != aggregate.sequence() => {
                Err(Error::conflict(id, aggregate.sequence(), head.staged))
            }
            Some(head) => Ok(*head),
            None => Ok(Reach { base: aggregate.sequence(), staged: aggregate.sequence() }),
        }
    }

    /// Stages a snapshot if the new events passed a multiple of `SNAPSHOT_EVERY`. If the state cannot be encoded, the events
    /// are recorded all the same, and a load replays them.
    fn snapshot<T: Aggregate>(&mut self, before: Sequence, after: &Loaded<T>) {
        const {
            assert!(
                T::SNAPSHOT_EVERY == 0 || <T::Codec as StateCodec<T>>::KEEPS_STATES,
                "an aggregate with `SNAPSHOT_EVERY` needs a codec for its state, which `EventsOnly` is not"
            );
        }
        let every = i64::from(T::SNAPSHOT_EVERY);
        if every == 0 || before.get() / every == after.sequence().get() / every {
            return;
        }
        match kept::<T>(after.state()) {
            Ok(state) => {
                let snapshot = Snapshot { sequence: after.sequence(), version: T::SNAPSHOT_VERSION, state };
                self.batch.snapshot(after.id(), snapshot);
            }
            Err(_) => self.store.note_skipped_snapshot(T::TYPE),
        }
    }

    /// Requires that this aggregate, which the unit only reads, has not changed when the unit commits.
    ///
    /// Without a guard, two units that each read what the other one writes can both commit (write skew). After an error
    /// the unit has no such guard.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if the handle comes from another store, if it carries events of another unit that
    /// did not commit, or if the unit already has [`limits::UNIT_AGGREGATES`](crate::limits::UNIT_AGGREGATES) guards;
    /// [`Conflict`](ErrorKind::Conflict) if the unit has read another event at this sequence, because the log has lost its
    /// tail.
    pub fn guard<T: Aggregate>(&mut self, aggregate: &Loaded<T>) -> Result<()> {
        self.check(aggregate)?;
        self.note_read(aggregate)?;
        let read = aggregate.sequence();
        let expected = match self.reached.get(&aggregate.id()) {
            Some(head) if (head.base..=head.staged).contains(&read) => head.base,
            _ => read,
        };
        self.batch.guard(Guard { aggregate: aggregate.id(), expected })
    }

    /// Sets the metadata of all events of this unit, in place of earlier metadata. Set it before the first event is
    /// recorded, since an aggregate [may use it](Aggregate::apply_with). [`record_with`](Self::record_with) gives one
    /// event its own metadata.
    ///
    /// If the metadata has no time, the time of all events is the moment at which the first of them is recorded.
    ///
    /// # Errors
    /// [`Invalid`](ErrorKind::Invalid) if the unit has recorded events under other metadata. They keep it.
    pub fn set_metadata(&mut self, metadata: Metadata) -> Result<()> {
        if self.staged.is_empty() {
            self.metadata = Arc::new(metadata);
            self.time = None;
        } else if *self.metadata != metadata {
            return Err(Error::invalid(
                "the metadata of a unit of work was set after events were recorded; set it before them",
            ));
        }
        Ok(())
    }

    /// Names the command that this unit carries out, so that the command takes effect once: if its id took effect before,
    /// the commit writes nothing and returns the first receipt ([`Receipt::is_repeated`]). Handles with events of such a
    /// unit cannot be used in another unit: load the aggregates again.
    ///
    /// The fingerprint of the [command](Command) covers its word, and the aggregates that the unit makes, adds events to or
    /// gives a key to. A unit that runs again may see its own effect and refuse: ask for the
    /// [receipt](EventStore::receipt) first, or use [`EventStore::once`], which does both.
    pub fn set_command(&mut self, command: impl Into<Command>) {
        self.command = Some(command.into());
    }

    /// The same with a fingerprint that is known already.
    pub(crate) fn set_command_as(&mut self, command: &Command, fingerprint: Option<i64>) {
        self.batch.set_command(command.id().clone(), fingerprint);
    }

    /// Writes the whole unit or nothing. An empty unit is allowed and writes nothing.
    ///
    /// After a drop of the future it is unknown whether the unit was written. With a [command](Self::set_command) the
    /// caller can ask: [`EventStore::settle`].
    ///
    /// # Errors
    /// [`Conflict`](ErrorKind::Conflict) if an aggregate of the unit or of a guard has changed;
    /// [`KeyTaken`](ErrorKind::KeyTaken); [`NotFound`](ErrorKind::NotFound) if an aggregate was created by a unit that
    /// did not commit; [`CommandReused`](ErrorKind::CommandReused),
    /// [`CommandAbandoned`](ErrorKind::CommandAbandoned);
    /// [`OutcomeUnknown`](ErrorKind::OutcomeUnknown), after which the unit may be written or not; [`Rejected`](ErrorKind::Rejected) by an
    /// inline projection; those of the engine, such as [`Unavailable`](ErrorKind::Unavailable), [`Full`](ErrorKind::Full),
    /// [`ReadOnly`](ErrorKind::ReadOnly) and [`Closed`](ErrorKind::Closed). After every error but `OutcomeUnknown` nothing is written.
    pub async fn commit(self) -> Result<Receipt> {
        let engine = Arc::clone(self.store.engine());
        self.commit_by(|batch| engine.commit(batch)).await
    }

    /// As [`commit`](Self::commit), but gives the batch to this function instead of [`StorageEngine::commit`]. The function
    /// must keep the same promises.
    ///
    /// This is for engines with another way to commit, for instance with the user's SQL in the same transaction. Users call
    /// the method of such an engine. The engine must first check that [`engine`](Self::engine) is itself.
    ///
    /// # Errors
    /// As [`commit`](Self::commit), and those of the function.
    pub async fn commit_by<F, C>(mut self, commit: F) -> Result<Receipt>
    where
        F: FnOnce(Batch) -> C + Send,
        C: Future<Output = Result<Receipt>> + Send,
    {
        self.fill_batch()?;
        let raced = std::mem::take(&mut self.raced);
        let batch = std::mem::take(&mut self.batch);
        match observe::commit(batch.events(), commit(batch)).await {
            Ok(receipt) => {
                // The first receipt of a repeated command is about the events of another unit. Its aggregates may have
                // the same sequences by other events.
                let is_ours =
                    |(id, head): (&AggregateId, &Reach)| receipt.sequence_of(*id) == Some(head.staged);
                if !receipt.is_repeated() && self.reached.iter().all(is_ours) {
                    self.committed.get_or_init(|| receipt.mark);
                }
                Ok(receipt)
            }
            Err(error) if matches!(error.kind(), ErrorKind::KeyTaken { .. }) => {
                Err(self.raced_or(raced, error).await)
            }
            Err(error) => Err(error),
        }
    }

    /// A conflict if another unit took the key of an aggregate that this unit found missing. If another key is taken, a
    /// retry does not help, and the error stays.
    async fn raced_or(&self, raced: Vec<(AggregateId, Target)>, error: Error) -> Error {
        for (id, target) in raced {
            let request =
                LoadRequest { target, snapshot: None, up_to: Sequence::ZERO, limit: PageLimit::FOLD };
            if matches!(self.store.engine().load(request).await, Ok(Some(_))) {
                return Error::raced(id).with_source(error);
            }
        }
        error
    }

    /// The engine of this unit. An engine recognises itself by [`Any`](std::any::Any):
    ///
    /// ```
    /// # use evercore_core::{StorageEngine, UnitOfWork};
    /// fn own<E: StorageEngine>(work: &UnitOfWork) -> Option<&E> {
    ///     let engine: &dyn std::any::Any = work.engine();
    ///     engine.downcast_ref()
    /// }
    /// ```
    pub fn engine(&self) -> &dyn StorageEngine {
        self.store.engine().as_ref()
    }

    fn fill_batch(&mut self) -> Result<()> {
        for staged in self.staged.drain(..) {
            self.batch.append(Append {
                aggregate: staged.aggregate,
                aggregate_type: staged.aggregate_type,
                expected: staged.expected,
                events: vec![NewEvent {
                    event_type: staged.event_type,
                    payload: staged.payload,
                    time: staged.time,
                    metadata: staged.metadata,
                }],
            })?;
        }
        if let Some(command) = self.command.take() {
            let fingerprint = command.fingerprint(self.targets());
            self.batch.set_command(command.id().clone(), fingerprint);
        }
        Ok(())
    }

    /// The aggregates that this unit writes, as it came by them.
    fn targets(&self) -> impl Iterator<Item = CommandTarget<'_>> {
        let made = self.batch.creates().iter().map(|made| match &made.key {
            Some(key) => CommandTarget::Key(&made.aggregate_type, key),
            None => CommandTarget::New(&made.aggregate_type),
        });
        let grown =
            self.batch.sequence_changes().iter().map(|change| (change.aggregate, &change.aggregate_type));
        let grown = grown.filter(|(id, _)| self.batch.created(*id).is_none());
        let renamed =
            self.batch.key_changes().iter().map(|change| (change.aggregate, &change.aggregate_type));
        let renamed = renamed.filter(|(id, _)| self.batch.sequence_change_of(*id).is_none());
        made.chain(grown.chain(renamed).map(|(id, aggregate_type)| match self.found_by.get(&id) {
            Some(key) => CommandTarget::Key(aggregate_type, key),
            None => CommandTarget::Id(aggregate_type, id.get()),
        }))
    }
}

/// The event's name and content as they are stored, and the event as it will be read.
fn write<T: Aggregate>(
    aggregate_type: &AggregateType,
    event: T::Event,
) -> Result<(EventType, Payload, T::Event)> {
    let encoded = T::Codec::encode(&event).map_err(|source| Error::not_encoded(aggregate_type, source))?;
    let event_type = match &encoded.event_type {
        Cow::Borrowed(name) => EventType::from_static(name)?,
        Cow::Owned(name) => EventType::new(name)?,
    };
    let event = if T::TRUSTS_CODEC {
        event
    } else {
        T::Codec::read_back(&encoded).map_err(|source| Error::not_read_back(event_type.clone(), source))?
    };
    Ok((event_type, Payload::new(encoded.payload)?, event))
}

/// The state as the content of a snapshot.
fn kept<T: Aggregate>(state: &T) -> Result<Payload, BoxError> {
    let bytes = T::Codec::encode_state(state)?;
    if !T::TRUSTS_CODEC {
        T::Codec::read_back_state(&bytes)?;
    }
    Ok(Payload::new(bytes)?)
}

fn stranger(id: AggregateId) -> Error {
    Error::invalid(format!(
        "the handle of aggregate {id} comes from another store; load the aggregate from the store of this unit of work"
    ))
}

fn stale(id: AggregateId) -> Error {
    Error::invalid(format!(
        "aggregate {id} carries events of a unit of work that did not commit, or whose command had taken effect before; load it again"
    ))
}

/// Applies an event that this unit has staged, or is about to.
fn advance<T: Aggregate>(aggregate: &mut Loaded<T>, event: T::Event, staged: &Staged) -> Result<()> {
    let context = staged.context(aggregate.sequence().next());
    aggregate.advance(event, &context).map_err(|source| Error::misfit(&staged.event_type, None, source))
}

impl fmt::Debug for UnitOfWork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnitOfWork")
            .field("creates", &self.batch.creates().len())
            .field("events", &self.staged.len())
            .finish_non_exhaustive()
    }
}

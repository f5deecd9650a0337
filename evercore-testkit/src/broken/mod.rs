//! Engines that are broken on purpose, with one fault each. The suite must catch each of them.

mod fault;
mod layer;

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use evercore_core::engine::{
    Append, Backlogs, Batch, Changed, Cursors, EventRow, EventsBuilder, History, IdBlock, KeyChange,
    KnownCommand, LoadRequest, NewAggregate, NewEvent, Step, SubscriptionChange, SubscriptionStorage, Target,
};
use evercore_core::{
    AggregateId, AggregateQuery, BoxFuture, CommandId, Cursor, CursorId, CursorStatus, Direction, Error,
    ErrorKind, Event, EventType, Events, Filter, Key, KnownType, Lease, LogPage, LogQuery, Metadata,
    PageLimit, Parked, Position, Receipt, Result, Selection, Sequence, StorageEngine, StoreId,
    SubscriptionName, Timestamp, limits,
};

pub use fault::Fault;
use layer::Layer;

use crate::fixture::{Doors, Fixture, LocalFuture, Opened};

/// An engine that passes all calls on to another one, with one fault.
pub struct Broken {
    inner: Arc<Layer>,
    fault: Fault,
    notes: Mutex<Notes>,
}

#[derive(Default)]
struct Notes {
    first_id: Option<i64>,
    lost_names: BTreeSet<KnownType>,
    keys: Vec<String>,
    seen: HashSet<Position>,
}

impl Broken {
    /// Breaks an engine.
    pub fn new(inner: Arc<dyn StorageEngine>, fault: Fault) -> Self {
        let inner = Layer { inner, fault, disk: None, is_reopened: false, shared: Arc::default() };
        Self { inner: Arc::new(inner), fault, notes: Mutex::default() }
    }

    /// A fixture on such an engine. `disk` is an empty engine that gets the same writes; it stands for the disk after
    /// a crash. The clocks of both should stand still and show the same time.
    pub fn fixture(
        inner: Arc<dyn StorageEngine>,
        disk: Option<Arc<dyn StorageEngine>>,
        fault: Fault,
    ) -> Fixture {
        let inner = Layer { inner, fault, disk, is_reopened: false, shared: Arc::default() };
        Self::fixture_of(Arc::new(Self { inner: Arc::new(inner), fault, notes: Mutex::default() }))
    }

    /// A fixture on this engine.
    pub fn fixture_of(engine: Arc<Self>) -> Fixture {
        Fixture::with_doors(Arc::clone(&engine) as _, Box::new(BrokenDoors(engine)))
    }

    /// The same storage, opened again.
    fn reopened(&self) -> Self {
        let Layer { inner, fault, disk, shared, .. } = &*self.inner;
        let (inner, disk, shared) = (Arc::clone(inner), disk.clone(), Arc::clone(shared));
        let inner = Layer { inner, fault: *fault, disk, is_reopened: true, shared };
        Self { inner: Arc::new(inner), fault: *fault, notes: Mutex::default() }
    }

    /// Whether this is the fault. Called where the engine then does wrong.
    fn has(&self, fault: Fault) -> bool {
        let strikes = self.fault == fault;
        self.inner.shared.strikes.fetch_add(usize::from(strikes), Ordering::Relaxed);
        strikes
    }

    /// How often the engine did wrong. If it is 0, a case that passed proves nothing.
    pub fn strikes(&self) -> usize {
        self.inner.shared.strikes.load(Ordering::Relaxed)
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn known(&self, id: &CursorId) -> Result<Option<Cursor>> {
        let known = self.inner.cursors(Some(&id.subscription)).await?.cursors;
        Ok(known.into_iter().find(|cursor| cursor.id == *id))
    }

    async fn step_badly(&self, id: &CursorId, mut step: Step) -> Result<Option<Cursor>> {
        let known = self.known(id).await?;
        let holder = known
            .as_ref()
            .and_then(|cursor| Some(Lease { owner: cursor.owner.clone()?, epoch: cursor.epoch }));
        match (&mut step, known) {
            (Step::Advance(advance), Some(known)) => {
                if let (true, Some(holder)) = (self.has(Fault::IgnoresLeases), holder) {
                    advance.lease = holder;
                }
                if self.has(Fault::MovesPastTheEnd) && advance.to > self.inner.head().await? {
                    return Ok(Some(Cursor { position: advance.to, ..known }));
                }
                if self.has(Fault::MovesFromAnywhere) {
                    advance.from = known.position;
                    advance.to = advance.to.max(known.position);
                }
                if self.has(Fault::LosesParkedEvents) {
                    advance.parked.clear();
                }
                if self.has(Fault::OverlooksOperators) {
                    advance.parked_seen = None;
                }
            }
            (Step::Claim { .. }, _) if self.has(Fault::GivesLeasesTwice) => {
                if let Some(holder) = holder {
                    self.inner.step(id, &Step::release(holder)).await?;
                }
            }
            (Step::Renew { .. }, known) if self.has(Fault::ForgetsRenewals) => return Ok(known),
            (Step::Pause, known) if self.has(Fault::ForgetsPauses) => return Ok(known),
            (Step::Declare { .. }, Some(_)) if self.has(Fault::DeclaresAgain) => {
                self.inner.step(id, &Step::Remove).await?;
            }
            (Step::Reset { position, .. }, Some(known)) if self.has(Fault::ResetsSoftly) => {
                let position = *position;
                if let Some(holder) = holder {
                    self.inner.step(id, &Step::Remove).await?;
                    let declare = Step::declare(known.partitions, position, known.live_from);
                    self.inner.step(id, &declare).await?;
                    let mut epoch = 0;
                    while epoch < holder.epoch {
                        let claim = Step::claim(holder.owner.clone(), Duration::from_secs(600));
                        epoch = self.inner.step(id, &claim).await?.map_or(epoch, |cursor| cursor.epoch);
                    }
                    return self.known(id).await;
                }
            }
            _ => {}
        }
        self.inner.step(id, &step).await
    }

    async fn change_badly(&self, name: &SubscriptionName, change: &SubscriptionChange) -> Result<Changed> {
        if let SubscriptionChange::Each { which, step, .. } = change {
            let is_lost = matches!(step, Step::Pause) && self.has(Fault::ForgetsPauses);
            let cursors = self.inner.cursors(Some(name)).await?.cursors;
            let selected = cursors.iter().filter(|cursor| which.has(&cursor.id));
            if !is_lost && self.has(Fault::ChangesOneByOne) {
                for cursor in selected.filter(|cursor| cursor.status != CursorStatus::Retired) {
                    let of_one = Selection::of_version(cursor.id.version).and_partition(cursor.id.partition);
                    self.inner.change(name, &SubscriptionChange::each(of_one, step.clone())).await?;
                }
            }
            if is_lost || self.fault == Fault::ChangesOneByOne {
                let cursors = self.inner.cursors(Some(name)).await?.cursors;
                return Ok(Changed { cursors, former: Vec::new(), left_parked: 0 });
            }
        }
        self.inner.change(name, change).await
    }

    /// The batch as this engine understands it.
    fn misread(&self, batch: &Batch) -> Result<Batch> {
        let is_half = self.has(Fault::CommitsHalf) && batch.appends().len() > 1;
        let left = batch.appends().len() - usize::from(is_half);
        let mut read = Batch::new();
        for new in batch.creates() {
            read.create(NewAggregate { key: new.key.as_ref().map(|key| self.fold(key)), ..new.clone() })?;
        }
        for change in batch.key_changes().iter().filter(|_| !self.has(Fault::ForgetsKeyChanges)) {
            read.change_key(KeyChange { key: self.fold(&change.key), ..change.clone() })?;
        }
        let mut appends: Vec<Append> = batch.appends()[..left].to_vec();
        if self.has(Fault::MixesUpAppends) {
            appends.sort_by_key(|append| append.aggregate);
        }
        for append in appends {
            let events = append.events.iter().map(|event| self.damage(event)).collect();
            read.append(Append { events, ..append })?;
        }
        if !self.has(Fault::ForgetsGuards) {
            batch.guards().iter().try_for_each(|guard| read.guard(*guard))?;
        }
        if !self.has(Fault::LosesSnapshots) {
            batch.snapshots().iter().for_each(|(id, snapshot)| read.snapshot(*id, snapshot.clone()));
        }
        if let Some(id) = batch.command_id().filter(|_| !self.has(Fault::ForgetsCommands)) {
            let fingerprint = batch.fingerprint().filter(|_| !self.has(Fault::ForgetsFingerprints));
            read.set_command(id.clone(), fingerprint);
        }
        for (aggregate, sequence, mark) in batch.reads() {
            read.has_read(aggregate, sequence, mark)?;
        }
        Ok(read)
    }

    fn fold(&self, key: &Key) -> Key {
        let folded = key.as_str().trim().to_lowercase();
        let folded = Key::new(folded).ok().filter(|_| self.has(Fault::FoldsKeys));
        folded.unwrap_or_else(|| key.clone())
    }

    fn damage(&self, event: &NewEvent) -> NewEvent {
        let mut event = event.clone();
        if self.has(Fault::CutsTimes) {
            let micros = event.time.as_micros().div_euclid(1_000) * 1_000;
            event.time = Timestamp::from_micros(micros).unwrap_or(event.time);
        }
        if self.has(Fault::CutsPayloads) {
            let text = event.payload.as_bytes().split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
            event.payload = evercore_core::engine::Payload::new(text).unwrap_or_default();
        }
        if self.has(Fault::LosesEmptyTexts) && event.metadata.reference() == Some("") {
            event.metadata = Arc::new(Metadata::new());
        }
        event
    }

    async fn commit_badly(&self, batch: Batch) -> Result<Receipt> {
        self.note_keys(&batch)?;
        if self.has(Fault::CommitsInPieces) && batch.appends().len() > 1 {
            return self.commit_in_pieces(&batch).await;
        }
        let result = self.inner.commit(self.misread(&batch)?).await;
        let Err(error) = result else { return result };
        match error.kind() {
            ErrorKind::Conflict { aggregate, actual, .. } if self.has(Fault::ForgetsConflicts) => {
                let moved = rebased(&batch, *aggregate, *actual)?;
                self.inner.commit(moved).await
            }
            ErrorKind::KeyTaken { .. } if self.has(Fault::LosesTakenKeys) => {
                self.inner.commit(without_keys(&batch)?).await
            }
            _ => {
                let names = batch.appends().iter().map(|append| KnownType {
                    aggregate_type: append.aggregate_type.clone(),
                    event_types: append.events.iter().map(|event| event.event_type.clone()).collect(),
                });
                self.notes().lost_names.extend(names);
                Err(error)
            }
        }
    }

    fn note_keys(&self, batch: &Batch) -> Result<()> {
        let mut notes = self.notes();
        for new in batch.creates() {
            let Some(key) = &new.key else { continue };
            if self.has(Fault::SharesKeysAmongTypes) && notes.keys.iter().any(|known| known == key.as_str()) {
                return Err(Error::key_taken(new.aggregate_type.clone()));
            }
            notes.keys.push(key.as_str().to_owned());
        }
        Ok(())
    }

    async fn commit_in_pieces(&self, batch: &Batch) -> Result<Receipt> {
        let mut first = Batch::new();
        for new in batch.creates() {
            first.create(new.clone())?;
        }
        self.inner.commit(first).await?;
        let (last, rest) = batch.appends().split_last().unwrap_or_else(|| unreachable!("there are several"));
        for append in rest {
            let mut piece = Batch::new();
            piece.append(append.clone())?;
            self.inner.commit(piece).await?;
            self.inner.pause(Duration::from_micros(100)).await;
        }
        let mut piece = Batch::new();
        piece.append(last.clone())?;
        if let Some(id) = batch.command_id() {
            piece.set_command(id.clone(), batch.fingerprint());
        }
        self.inner.commit(piece).await
    }

    async fn load_badly(&self, mut request: LoadRequest) -> Result<Option<History>> {
        if let Target::Key(aggregate_type, key) = &request.target {
            request.target = Target::Key(aggregate_type.clone(), self.fold(key));
        }
        if self.has(Fault::LoadsTooMuch) {
            request.up_to = Sequence::MAX;
        }
        request.limit = self.stretch(request.limit);
        let versions = if self.has(Fault::IgnoresSnapshotVersions) { vec![1, 2] } else { Vec::new() };
        let mut found = self.inner.load(request.clone()).await?;
        for version in versions {
            let is_bare = found.as_ref().is_some_and(|history| history.snapshot.is_none());
            if is_bare && request.snapshot.is_some() {
                found = self.inner.load(LoadRequest { snapshot: Some(version), ..request.clone() }).await?;
            }
        }
        if let Some(history) = &mut found {
            let skipped = usize::from(self.has(Fault::SkipsBehindSnapshots) && history.snapshot.is_some());
            history.events = self.rewrite(history.events.iter().skip(skipped), true);
        }
        Ok(found)
    }

    fn stretch(&self, limit: PageLimit) -> PageLimit {
        let more = usize::from(self.has(Fault::OverfillsPages));
        let bytes = if self.has(Fault::IgnoresByteLimits) { limits::PAGE_BYTES } else { limit.max_bytes() };
        PageLimit::events(limit.max_events() + more).and_then(|it| it.and_bytes(bytes)).unwrap_or(limit)
    }

    async fn read_log_badly(&self, query: &LogQuery) -> Result<LogPage> {
        let mut wider = query.clone();
        wider.limit = self.stretch(query.limit);
        wider.filter = self.widen(&query.filter).await?;
        let result = self.inner.read_log(&wider).await;
        let mut page = match result {
            Err(error) if self.has(Fault::IgnoresCursorsAhead) => {
                let ErrorKind::CursorAhead { cursor, head, .. } = error.kind() else { return Err(error) };
                let (scanned, head) = (*cursor, *head);
                let page = LogPage::new(query, Events::default(), false, head);
                return Ok(LogPage { scanned, ..page });
            }
            result => result?,
        };
        let began = page.began;
        while self.has(Fault::SearchesWithoutEnd)
            && page.events.is_empty()
            && query.direction == Direction::Forward
            && page.scanned < page.head.min(query.to)
        {
            let from = page.scanned;
            page = self.inner.read_log(&LogQuery { from, ..wider.clone() }).await?;
        }
        page.began = began;
        self.move_cursor(query, &mut page);
        page.events =
            self.rewrite(page.events.iter().filter(|event| !self.is_missed(event, page.head)), false);
        Ok(page)
    }

    /// The same filter without some of its parts, or with more event types.
    async fn widen(&self, filter: &Filter) -> Result<Filter> {
        let mut wider = Filter::all();
        let aggregate_types = filter.aggregate_types();
        let kept = match self.fault {
            Fault::ForgetsTheTypeFilter if self.has(Fault::ForgetsTheTypeFilter) => &[],
            Fault::KnowsOneTypeOfFilter if self.has(Fault::KnowsOneTypeOfFilter) => {
                &aggregate_types[aggregate_types.len().saturating_sub(1)..]
            }
            _ => aggregate_types,
        };
        wider = kept.iter().cloned().fold(wider, Filter::with_aggregate_type);
        wider = filter.event_types().iter().cloned().fold(wider, Filter::with_event_type);
        if self.has(Fault::FoldsEventTypes) && !filter.event_types().is_empty() {
            let fold = |name: &EventType| name.as_str().to_lowercase();
            let asked: Vec<String> = filter.event_types().iter().map(fold).collect();
            let known = self.inner.types().await?.into_iter().flat_map(|known| known.event_types);
            wider = known.filter(|name| asked.contains(&fold(name))).fold(wider, Filter::with_event_type);
        }
        if let Some(aggregate) = filter.aggregate() {
            wider = wider.with_aggregate(aggregate);
        }
        if let Some(text) = filter.reference().filter(|_| !self.has(Fault::ForgetsTheReferenceFilter)) {
            wider = wider.with_reference(text)?;
        }
        if let Some(text) = filter.correlation_id().filter(|_| !self.has(Fault::ForgetsTheCorrelationFilter))
        {
            wider = wider.with_correlation_id(text)?;
        }
        Ok(wider)
    }

    fn move_cursor(&self, query: &LogQuery, page: &mut LogPage) {
        let is_forward = query.direction == Direction::Forward;
        let is_full = page.events.len() >= query.limit.max_events() && !page.events.is_empty();
        if is_forward && is_full && self.has(Fault::SkipsBetweenPages) && page.scanned < page.head {
            page.scanned = page.scanned.next();
        }
        if is_forward && page.events.len() > 1 && is_full && self.has(Fault::RepeatsBetweenPages) {
            page.scanned = Position::new(page.scanned.get() - 1).unwrap_or_default();
        }
        if self.has(Fault::ForgetsWhatWasSearched) {
            page.scanned = page.events.last().map_or(query.from, |event| event.position());
        }
    }

    /// The first look for the event after the head does not find it, as if its commit were slow.
    fn is_missed(&self, event: &Event, head: Position) -> bool {
        let is_young = event.position().next() == head && event.position().get() % 3 == 0;
        self.has(Fault::SkipsSlowCommits) && is_young && self.notes().seen.insert(event.position())
    }

    /// Copies events. `of_aggregate` turns on the faults of reads of one aggregate.
    fn rewrite(&self, events: impl Iterator<Item = Event>, of_aggregate: bool) -> Events {
        let mut page = EventsBuilder::new();
        for event in events {
            let loses = |fault| of_aggregate && self.has(fault);
            let row = event.as_row();
            page.push(EventRow {
                recorded_at: if self.has(Fault::BelievesWriters) { row.time } else { row.recorded_at },
                reference: row.reference.filter(|_| !loses(Fault::LosesReferences)),
                headers: row.headers.filter(|_| !loses(Fault::LosesHeaders)),
                ..row
            });
        }
        page.finish()
    }
}

/// The same batch, with the appends to one aggregate moved after the events that are there.
fn rebased(batch: &Batch, aggregate: AggregateId, actual: Sequence) -> Result<Batch> {
    let mut moved = Batch::new();
    let mut next = actual;
    for new in batch.creates() {
        moved.create(new.clone())?;
    }
    for append in batch.appends() {
        let is_stale = append.aggregate == aggregate;
        let expected = if is_stale { next } else { append.expected };
        if is_stale {
            next = expected.plus(append.events.len());
        }
        moved.append(Append { expected, ..append.clone() })?;
    }
    Ok(moved)
}

fn without_keys(batch: &Batch) -> Result<Batch> {
    let mut bare = Batch::new();
    for new in batch.creates() {
        bare.create(NewAggregate { key: None, ..new.clone() })?;
    }
    for append in batch.appends() {
        bare.append(append.clone())?;
    }
    Ok(bare)
}

impl StorageEngine for Broken {
    fn identity(&self) -> StoreId {
        self.inner.identity()
    }

    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>> {
        Box::pin(async move {
            let block = self.inner.reserve(count).await?;
            if !self.has(Fault::RepeatsIds) {
                return Ok(block);
            }
            let mut block = block;
            let first = block.next().map_or(1, AggregateId::get);
            let again = *self.notes().first_id.get_or_insert(first);
            IdBlock::new(again.max(first - 1), count)
        })
    }

    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>> {
        Box::pin(self.commit_badly(batch))
    }

    fn command<'a>(&'a self, id: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>> {
        self.inner.command(id)
    }

    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>> {
        match self.fault {
            Fault::KeepsCommands if self.has(Fault::KeepsCommands) => Box::pin(async { Ok(1) }),
            Fault::ForgetsYoungCommands if self.has(Fault::ForgetsYoungCommands) => {
                self.inner.forget_commands(Timestamp::MAX)
            }
            _ => self.inner.forget_commands(before),
        }
    }

    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>> {
        if self.has(Fault::ForgetsToSettle) {
            Box::pin(
                async move { Ok(self.inner.command(command).await?.and_then(KnownCommand::into_receipt)) },
            )
        } else {
            self.inner.settle(command)
        }
    }

    fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<Option<History>>> {
        Box::pin(self.load_badly(request))
    }

    fn read_aggregate(&self, query: AggregateQuery) -> BoxFuture<'_, Result<Events>> {
        Box::pin(async move {
            let limit = self.stretch(query.limit);
            let events = self.inner.read_aggregate(AggregateQuery { limit, ..query }).await?;
            Ok(self.rewrite(events.iter(), true))
        })
    }

    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>> {
        Box::pin(self.read_log_badly(query))
    }

    fn head(&self) -> BoxFuture<'_, Result<Position>> {
        self.inner.head()
    }

    fn position_at(&self, time: Timestamp) -> BoxFuture<'_, Result<Position>> {
        self.inner.position_at(time)
    }

    fn wait(&self, after: Position, at_most: Duration) -> BoxFuture<'_, Result<Position>> {
        if !self.has(Fault::WakesNobody) {
            return self.inner.wait(after, at_most);
        }
        Box::pin(async move {
            let head = self.inner.head().await?;
            if head > after {
                return Ok(head);
            }
            self.inner.pause(at_most.min(Duration::from_secs(11))).await;
            self.inner.head().await
        })
    }

    fn pause(&self, time: Duration) -> BoxFuture<'_, ()> {
        self.inner.pause(time)
    }

    fn warmup<'a>(&'a self, types: &'a [KnownType]) -> BoxFuture<'a, Result<()>> {
        self.inner.warmup(types)
    }

    fn types(&self) -> BoxFuture<'_, Result<Vec<KnownType>>> {
        Box::pin(async move {
            let mut types = self.inner.types().await?;
            if self.has(Fault::RemembersLostNames) {
                types.extend(self.notes().lost_names.iter().cloned());
            }
            Ok(types)
        })
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        if self.has(Fault::ForgetsToClose) {
            return Box::pin(async { Ok(()) });
        }
        self.inner.close()
    }
}

impl SubscriptionStorage for Broken {
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, Result<Option<Cursor>>> {
        Box::pin(self.step_badly(id, step.clone()))
    }

    fn change<'a>(
        &'a self,
        name: &'a SubscriptionName,
        change: &'a SubscriptionChange,
    ) -> BoxFuture<'a, Result<Changed>> {
        Box::pin(self.change_badly(name, change))
    }

    fn cursors<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Cursors>> {
        self.inner.cursors(of)
    }

    fn backlogs<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Backlogs>> {
        self.inner.backlogs(of)
    }

    fn parked<'a>(
        &'a self,
        id: &'a CursorId,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Parked>>> {
        self.inner.parked(id, after, limit)
    }
}

impl fmt::Debug for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Broken");
        shown.field("fault", &self.fault);
        if self.has(Fault::ShowsKeys) {
            shown.field("keys", &self.notes().keys);
        }
        shown.finish_non_exhaustive()
    }
}

struct BrokenDoors(Arc<Broken>);

impl Doors for BrokenDoors {
    fn further(&self) -> LocalFuture<'_, Option<Opened>> {
        Box::pin(async { Some((None, Arc::clone(&self.0) as _)) })
    }

    fn reopen(&self) -> LocalFuture<'_, Option<Opened>> {
        Box::pin(async { Some((None, Arc::new(self.0.reopened()) as _)) })
    }

    fn crash_image(&self) -> LocalFuture<'_, Option<Opened>> {
        Box::pin(async { Some((None, Arc::clone(self.0.inner.disk.as_ref()?))) })
    }

    fn turn_clock_back(&self, by: Duration) -> LocalFuture<'_, bool> {
        self.0.inner.turn_clock_back(by);
        Box::pin(async { true })
    }
}

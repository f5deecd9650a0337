//! More faults: each engine passes all calls on and does one thing wrong.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use evercore_core::engine::{
    Append, Backlogs, Batch, Changed, Cursors, EventRow, EventsBuilder, History, IdBlock, KeyChange,
    KnownCommand, LoadRequest, NewAggregate, NewEvent, ParkedChange, Step, SubscriptionChange,
    SubscriptionStorage, Target,
};
use evercore_core::{
    AggregateId, AggregateQuery, BoxFuture, CommandId, Cursor, CursorId, Direction, Error, ErrorKind, Event,
    EventType, Events, Filter, Key, KnownType, Lease, LogPage, LogQuery, PageLimit, Parked, Position,
    Receipt, Result, StorageEngine, StoreId, SubscriptionName, Timestamp, limits,
};

use super::Fault;

pub(super) struct Layer {
    pub(super) inner: Arc<dyn StorageEngine>,
    pub(super) fault: Fault,
    /// The disk after a crash.
    pub(super) disk: Option<Arc<dyn StorageEngine>>,
    pub(super) is_reopened: bool,
    pub(super) shared: Arc<Shared>,
}

/// The state shared by all engines on one storage.
#[derive(Default)]
pub(super) struct Shared {
    notes: Mutex<Notes>,
    /// The number of running commits.
    under_way: AtomicUsize,
    /// The number of pages that were begun and have not ended.
    begun: AtomicUsize,
    /// How often the fault has struck.
    pub(super) strikes: AtomicUsize,
}

#[derive(Default)]
struct Notes {
    unheard: HashSet<Position>,
    eventless: usize,
    old_head: Option<Position>,
    lost_keys: HashMap<(String, Key), AggregateId>,
    parked: Vec<(CursorId, Position)>,
    left: HashMap<CursorId, Vec<Parked>>,
    behind: Duration,
    recorded: BTreeMap<Position, Timestamp>,
    late: Vec<Write>,
}

/// A write that has not reached the disk.
enum Write {
    Batch(Box<Batch>),
    Step(CursorId, Step),
    Change(SubscriptionName, SubscriptionChange),
    Settled(CommandId),
    Reserved(u32),
    Names(Vec<KnownType>),
}

struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Layer {
    /// Whether this is the fault and it strikes now.
    fn strikes(&self, fault: Fault, is_so: bool) -> bool {
        let strikes = self.fault == fault && is_so;
        self.shared.strikes.fetch_add(usize::from(strikes), Ordering::Relaxed);
        strikes
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.shared.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn turn_clock_back(&self, by: Duration) {
        self.notes().behind += by;
    }

    /// Writes to the disk: at once, later or never.
    async fn save(&self, write: Write) -> Result<()> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let is_commit = matches!(write, Write::Batch(_));
        let is_late = match &write {
            Write::Settled(_) if self.strikes(Fault::LosesSettling, true) => return Ok(()),
            Write::Step(..) | Write::Change(..) => {
                self.strikes(Fault::LosesSteps, true) || self.strikes(Fault::LosesTheLast, true)
            }
            _ => self.strikes(Fault::LosesTheLast, true),
        };
        let flushes_first = self.fault == Fault::LosesTheLast || is_commit;
        let mut ready = if flushes_first { std::mem::take(&mut self.notes().late) } else { Vec::new() };
        if is_late {
            self.notes().late.push(write);
        } else {
            ready.push(write);
        }
        for write in ready {
            match write {
                Write::Batch(batch) => drop(disk.commit(*batch).await),
                Write::Step(id, step) => drop(disk.step(&id, &step).await),
                Write::Change(name, change) => drop(disk.change(&name, &change).await),
                Write::Settled(id) => drop(disk.settle(&id).await),
                Write::Reserved(count) => drop(disk.reserve(count).await),
                Write::Names(types) => drop(disk.warmup(&types).await),
            }
        }
        Ok(())
    }

    fn cut(&self, key: &Key) -> Key {
        let (text, last) = (key.as_str(), key.as_str().len() - 1);
        let is_long = text.len() >= 255 && text.is_char_boundary(last);
        if self.strikes(Fault::CutsLongKeys, is_long) {
            return Key::new(&text[..last]).unwrap_or_else(|_| key.clone());
        }
        key.clone()
    }

    /// The batch as this engine understands it.
    async fn misread(&self, batch: &Batch) -> Result<Batch> {
        let mut read = Batch::new();
        for new in batch.creates() {
            let is_used = self.fault == Fault::TakesIdsInUse && self.is_there(new.id).await?;
            if !self.strikes(Fault::TakesIdsInUse, is_used) {
                read.create(NewAggregate { key: new.key.as_ref().map(|key| self.cut(key)), ..new.clone() })?;
            }
        }
        for change in batch.key_changes() {
            read.change_key(KeyChange { key: self.cut(&change.key), ..change.clone() })?;
        }
        for append in batch.appends() {
            let mut events = append.events.clone();
            self.damage(&mut events)?;
            read.append(Append { events, ..append.clone() })?;
        }
        for (place, guard) in batch.guards().iter().enumerate() {
            if !self.strikes(Fault::ChecksFewGuards, place >= 3) {
                read.guard(*guard)?;
            }
        }
        for (place, (id, snapshot)) in batch.snapshots().iter().enumerate() {
            if !self.strikes(Fault::KeepsOneSnapshot, place + 1 < batch.snapshots().len()) {
                read.snapshot(*id, snapshot.clone());
            }
        }
        if let Some(id) = batch.command_id() {
            read.set_command(id.clone(), batch.fingerprint());
        }
        for (aggregate, sequence, mark) in batch.reads() {
            read.has_read(aggregate, sequence, mark)?;
        }
        Ok(read)
    }

    async fn is_there(&self, id: AggregateId) -> Result<bool> {
        let limit = PageLimit::events(0)?;
        let (target, up_to) = (Target::Id(id), evercore_core::Sequence::MAX);
        Ok(self.inner.load(LoadRequest { target, snapshot: None, up_to, limit }).await?.is_some())
    }

    fn damage(&self, events: &mut [NewEvent]) -> Result<()> {
        for event in &mut *events {
            let composed = event.event_type.as_str().replace("e\u{301}", "\u{e9}");
            if self.strikes(Fault::ComposesNames, composed != event.event_type.as_str()) {
                event.event_type = EventType::new(composed)?;
            }
        }
        for place in 1..events.len() {
            let names = |place: usize| events[place].metadata.headers().keys();
            let are_same = names(0).len() > 0 && names(0).eq(names(place));
            if self.strikes(Fault::SharesHeaders, are_same) {
                events[place].metadata = Arc::clone(&events[0].metadata);
            }
        }
        Ok(())
    }

    async fn commit_badly(&self, batch: Batch) -> Result<Receipt> {
        let others = self.shared.under_way.load(Ordering::SeqCst) > 0;
        let under_way = Counted::new(&self.shared.under_way);
        if self.fault == Fault::LosesWakeUps {
            self.inner.pause(Duration::from_micros(200)).await;
        }
        // Not for ever: a caller that reads ahead and writes meanwhile would hang without a message.
        let began = Instant::now();
        let is_held =
            || self.shared.begun.load(Ordering::SeqCst) > 0 && began.elapsed() < Duration::from_secs(6);
        while self.strikes(Fault::HoldsWriters, is_held()) {
            self.inner.pause(Duration::from_millis(1)).await;
        }
        let wants = |new: &NewAggregate| Some((new.aggregate_type.as_str().to_owned(), new.key.clone()?));
        for new in batch.creates() {
            let Some(wanted) = wants(new) else { continue };
            let is_lost = self.notes().lost_keys.get(&wanted).is_some_and(|lost| *lost != new.id);
            if self.strikes(Fault::KeepsKeysOfFailures, is_lost) {
                return Err(Error::key_taken(new.aggregate_type.clone()));
            }
        }
        let read = self.misread(&batch).await?;
        let is_large = batch.events() > 1_000 && batch.appends().len() > 1;
        let result = if self.strikes(Fault::CommitsLargeUnitsInPieces, is_large) {
            self.commit_in_pieces(&read).await
        } else {
            self.inner.commit(read.clone()).await
        };
        let receipt = match result {
            Ok(receipt) => receipt,
            Err(error) if matches!(error.kind(), ErrorKind::CommandReused) => {
                let id =
                    batch.command_id().filter(|_| self.strikes(Fault::ForgetsContents, self.is_reopened));
                let Some(id) = id else { return Err(error) };
                return self.inner.command(id).await?.and_then(KnownCommand::into_receipt).ok_or(error);
            }
            Err(error) => {
                let lost = batch.creates().iter().filter_map(|new| Some((wants(new)?, new.id)));
                let is_failure = matches!(error.kind(), ErrorKind::Conflict { .. });
                self.notes().lost_keys.extend(lost.filter(|_| is_failure));
                return Err(error);
            }
        };
        drop(under_way);
        self.save(Write::Batch(Box::new(read))).await?;
        self.note(&batch, receipt, others)
    }

    fn note(&self, batch: &Batch, mut receipt: Receipt, others: bool) -> Result<Receipt> {
        let mut notes = self.notes();
        if batch.events() == 0 {
            notes.eventless += 1;
            return Ok(receipt);
        }
        if self.strikes(Fault::LosesWakeUps, others) {
            notes.unheard.insert(receipt.last);
        }
        notes.old_head = Position::new(receipt.first.get() - 1).ok();
        if self.strikes(Fault::BelievesTheClock, !notes.behind.is_zero()) {
            let behind = i64::try_from(notes.behind.as_micros()).unwrap_or_default();
            let recorded_at = Timestamp::from_micros(receipt.recorded_at.as_micros() - behind)?;
            receipt.recorded_at = recorded_at;
            for place in 0..batch.events() {
                notes.recorded.insert(receipt.first.plus(place), recorded_at);
            }
        }
        Ok(receipt)
    }

    async fn commit_in_pieces(&self, batch: &Batch) -> Result<Receipt> {
        let (last, rest) = batch.appends().split_last().unwrap_or_else(|| unreachable!("there are several"));
        for append in rest {
            let mut piece = Batch::new();
            piece.append(append.clone())?;
            self.inner.commit(piece).await?;
            self.inner.pause(Duration::from_millis(2)).await;
        }
        let mut piece = Batch::new();
        piece.append(last.clone())?;
        batch.key_changes().iter().try_for_each(|change| piece.change_key(change.clone()))?;
        self.inner.commit(piece).await
    }

    fn sorted(&self, mut receipt: Receipt) -> Receipt {
        if self.strikes(Fault::SortsReceipts, !receipt.aggregates.is_sorted()) {
            receipt.aggregates.sort_unstable();
        }
        receipt
    }

    async fn wait_badly(&self, after: Position, at_most: Duration) -> Result<Position> {
        let began = Instant::now();
        let (eventless, mut left) = (self.notes().eventless, at_most);
        let later = self.fault == Fault::WakesNobodyLater && self.is_reopened;
        if later && self.inner.head().await? <= after {
            self.strikes(Fault::WakesNobodyLater, true);
            self.inner.pause(at_most.min(Duration::from_secs(7))).await;
            return self.inner.head().await;
        }
        if self.fault == Fault::RestartsWaits {
            loop {
                let head = self.inner.head().await?;
                if head > after {
                    return Ok(head);
                }
                let seen = self.inner.wait(head, at_most).await?;
                if seen > after || seen == head {
                    return Ok(seen);
                }
                self.strikes(Fault::RestartsWaits, true);
            }
        }
        loop {
            let slice =
                if self.fault == Fault::EndsWaitsEarly { left.min(Duration::from_millis(3)) } else { left };
            let head = self.inner.wait(after, slice).await?;
            left = at_most.saturating_sub(began.elapsed());
            let is_ended = self.notes().eventless != eventless;
            if self.strikes(Fault::EndsWaitsEarly, is_ended && head <= after) || left.is_zero() {
                return Ok(head);
            }
            let is_unheard = self.notes().unheard.contains(&head);
            if head <= after {
                continue;
            }
            if !self.strikes(Fault::LosesWakeUps, is_unheard) {
                return Ok(head);
            }
            // Not visible until the next commit.
            let next = self.inner.wait(head, left).await?;
            return Ok(next);
        }
    }

    async fn read_log_badly(&self, query: &LogQuery) -> Result<LogPage> {
        let mut asked = query.clone();
        if self.fault == Fault::HoldsWriters {
            let _begun = Counted::new(&self.shared.begun);
            self.inner.pause(Duration::from_micros(100)).await;
            return self.inner.read_log(query).await;
        }
        if self.strikes(Fault::LooksAtFewTypes, query.filter.event_types().len() > 16) {
            let (types, few) = (query.filter.aggregate_types(), &query.filter.event_types()[..16]);
            let filter = types.iter().cloned().fold(Filter::all(), Filter::with_aggregate_type);
            asked.filter = few.iter().cloned().fold(filter, Filter::with_event_type);
        }
        let is_filtered = query.filter != Filter::all();
        let is_backward = query.direction == Direction::Backward;
        if self.strikes(Fault::StopsShortBackward, is_filtered && is_backward) {
            asked.to = asked.to.next();
        }
        let mut page = self.inner.read_log(&asked).await?;
        let ended_by_bytes = is_filtered
            && !is_backward
            && page.events.len() < query.limit.max_events()
            && page.scanned < page.head.min(query.to);
        if self.fault == Fault::SkipsWhatDoesNotFit && ended_by_bytes {
            let next = LogQuery { from: page.scanned, limit: PageLimit::events(1)?, ..asked };
            let next = self.inner.read_log(&next).await?.events;
            if let Some(next) = next.first() {
                self.strikes(Fault::SkipsWhatDoesNotFit, true);
                page.scanned = next.position();
            }
        }
        page.events = self.rewrite(page.events);
        Ok(page)
    }

    fn rewrite(&self, events: Events) -> Events {
        if !matches!(self.fault, Fault::LosesEmptyIds | Fault::BelievesTheClock) {
            return events;
        }
        let mut page = EventsBuilder::new();
        for event in &events {
            let keep = |text: &Option<&str>| !self.strikes(Fault::LosesEmptyIds, *text == Some(""));
            page.push(EventRow {
                position: event.position(),
                aggregate: event.aggregate(),
                aggregate_type: event.aggregate_type(),
                sequence: event.sequence(),
                event_type: event.event_type(),
                time: event.time(),
                recorded_at: self.recorded_at(&event),
                payload: event.payload(),
                reference: event.reference(),
                correlation_id: event.correlation_id().filter(|text| keep(&Some(text))),
                causation_id: event.causation_id().filter(|text| keep(&Some(text))),
                headers: Some(event.headers()).filter(|headers| !headers.is_empty()),
            });
        }
        page.finish()
    }

    fn recorded_at(&self, event: &Event) -> Timestamp {
        self.notes().recorded.get(&event.position()).copied().unwrap_or_else(|| event.recorded_at())
    }

    async fn known(&self, id: &CursorId) -> Result<Option<Cursor>> {
        let known = self.inner.cursors(Some(&id.subscription)).await?.cursors;
        Ok(known.into_iter().find(|cursor| cursor.id == *id))
    }

    async fn let_go(&self, id: &CursorId) -> Result<()> {
        if let Some(Cursor { owner: Some(owner), epoch, .. }) = self.known(id).await? {
            self.inner.step(id, &Step::release(Lease { owner, epoch })).await?;
        }
        Ok(())
    }

    async fn step_badly(&self, id: &CursorId, step: &Step) -> Result<Option<Cursor>> {
        if let (Step::Claim { .. }, Fault::RacesForClaims) = (step, self.fault) {
            let was_free = self.known(id).await?.is_some_and(|cursor| cursor.owner.is_none());
            self.inner.pause(Duration::from_micros(200)).await;
            if was_free {
                self.strikes(Fault::RacesForClaims, true);
                self.let_go(id).await?;
            }
        }
        let is_behind = !self.notes().behind.is_zero();
        if self.strikes(Fault::EndsLeasesEarly, step.is_claim() && is_behind) {
            self.let_go(id).await?;
        }
        if let (Step::Remove, Fault::LeavesParked) = (step, self.fault) {
            let parked = self.inner.parked(id, Position::ZERO, 1_000).await?;
            self.strikes(Fault::LeavesParked, !parked.is_empty());
            self.notes().left.insert(id.clone(), parked);
        }
        let cursor = self.inner.step(id, step).await?;
        if let Step::Advance(advance) = step {
            let kept = advance.parked.iter().filter_map(|change| match change {
                ParkedChange::Keep(parked) => Some((id.clone(), parked.position)),
                _ => None,
            });
            self.notes().parked.extend(kept);
        }
        self.save(Write::Step(id.clone(), step.clone())).await?;
        Ok(cursor)
    }

    async fn change_badly(&self, name: &SubscriptionName, change: &SubscriptionChange) -> Result<Changed> {
        if let (SubscriptionChange::Remove { .. }, Fault::LeavesParked) = (change, self.fault) {
            for cursor in self.inner.cursors(Some(name)).await?.cursors {
                let parked = self.inner.parked(&cursor.id, Position::ZERO, 1_000).await?;
                self.strikes(Fault::LeavesParked, !parked.is_empty());
                self.notes().left.insert(cursor.id, parked);
            }
        }
        let changed = self.inner.change(name, change).await?;
        self.save(Write::Change(name.clone(), change.clone())).await?;
        Ok(changed)
    }

    async fn cursors_badly(&self, of: Option<&SubscriptionName>) -> Result<Cursors> {
        let mut found = self.inner.cursors(of).await?;
        if let (Fault::ListsByPrefix, Some(of)) = (self.fault, of) {
            let exact = found.cursors.len();
            found = self.inner.cursors(None).await?;
            found.cursors.retain(|cursor| cursor.id.subscription.as_str().starts_with(of.as_str()));
            self.strikes(Fault::ListsByPrefix, found.cursors.len() > exact);
        }
        if self.is_reopened {
            found.cursors.retain(|cursor| !self.strikes(Fault::LosesReleasedCursors, cursor.owner.is_none()));
            for cursor in &mut found.cursors {
                if self.strikes(Fault::ForgetsFailures, cursor.failure.is_some()) {
                    cursor.failure = None;
                }
            }
        }
        Ok(found)
    }

    async fn backlogs_badly(&self, of: Option<&SubscriptionName>) -> Result<Backlogs> {
        let mut found = self.inner.backlogs(of).await?;
        let honest = found.backlogs.clone();
        for backlog in &mut found.backlogs {
            let id = &backlog.cursor.id;
            if self.strikes(Fault::SharesParked, id.version > 1) {
                let first = CursorId { version: 1, ..id.clone() };
                let of_first = honest.iter().find(|other| other.cursor.id == first);
                backlog.parked = of_first.map_or(0, |first| first.parked);
            }
        }
        Ok(found)
    }

    async fn parked_badly(&self, id: &CursorId, after: Position, limit: usize) -> Result<Vec<Parked>> {
        let mut asked = id.clone();
        if self.strikes(Fault::SharesParked, id.version > 1) {
            asked.version = 1;
        }
        let mut found = self.inner.parked(&asked, after, 1_000).await?;
        if self.fault == Fault::LeavesParked {
            let left = self.notes().left.get(id).cloned().unwrap_or_default();
            found.extend(left.into_iter().filter(|parked| parked.position > after));
        }
        if self.fault == Fault::ListsParkedAnyhow {
            let notes = self.notes();
            let place = |parked: &Parked| {
                let is_it = |(of, position): &(CursorId, Position)| of == id && *position == parked.position;
                notes.parked.iter().position(is_it)
            };
            self.strikes(Fault::ListsParkedAnyhow, !found.is_sorted_by_key(place));
            found.sort_by_key(place);
        }
        for parked in &mut found {
            if self.strikes(Fault::ForgetsWhatIsDue, self.is_reopened && parked.is_due) {
                parked.is_due = false;
            }
        }
        found.truncate(limit);
        Ok(found)
    }
}

impl StorageEngine for Layer {
    fn identity(&self) -> StoreId {
        self.inner.identity()
    }

    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>> {
        Box::pin(async move {
            let block = self.inner.reserve(count).await?;
            self.save(Write::Reserved(count)).await?;
            Ok(block)
        })
    }

    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>> {
        Box::pin(self.commit_badly(batch))
    }

    fn command<'a>(&'a self, id: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>> {
        Box::pin(async move {
            Ok(self.inner.command(id).await?.map(|known| match known {
                KnownCommand::Committed { fingerprint, receipt } => {
                    KnownCommand::Committed { fingerprint, receipt: self.sorted(receipt) }
                }
                KnownCommand::Abandoned => KnownCommand::Abandoned,
            }))
        })
    }

    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>> {
        self.inner.forget_commands(before)
    }

    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>> {
        Box::pin(async move {
            let receipt = self.inner.settle(command).await?;
            self.save(Write::Settled(command.clone())).await?;
            Ok(receipt.map(|receipt| self.sorted(receipt)))
        })
    }

    fn load(&self, mut request: LoadRequest) -> BoxFuture<'_, Result<Option<History>>> {
        Box::pin(async move {
            if let Target::Key(aggregate_type, key) = &request.target {
                request.target = Target::Key(aggregate_type.clone(), self.cut(key));
            }
            let found = self.inner.load(request).await?;
            Ok(found.map(|history| History { events: self.rewrite(history.events.clone()), ..history }))
        })
    }

    fn read_aggregate(&self, mut query: AggregateQuery) -> BoxFuture<'_, Result<Events>> {
        Box::pin(async move {
            let is_backward = query.direction == Direction::Backward;
            if self.strikes(Fault::IgnoresBytesBackward, is_backward) {
                query.limit = query.limit.and_bytes(limits::PAGE_BYTES)?;
            }
            Ok(self.rewrite(self.inner.read_aggregate(query).await?))
        })
    }

    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>> {
        Box::pin(self.read_log_badly(query))
    }

    fn head(&self) -> BoxFuture<'_, Result<Position>> {
        Box::pin(async move {
            let old = if self.fault == Fault::TellsOldHeads { self.notes().old_head.take() } else { None };
            self.strikes(Fault::TellsOldHeads, old.is_some());
            old.map_or_else(|| self.inner.head(), |old| Box::pin(async move { Ok(old) })).await
        })
    }

    fn position_at(&self, time: Timestamp) -> BoxFuture<'_, Result<Position>> {
        self.inner.position_at(time)
    }

    fn wait(&self, after: Position, at_most: Duration) -> BoxFuture<'_, Result<Position>> {
        Box::pin(self.wait_badly(after, at_most))
    }

    fn pause(&self, time: Duration) -> BoxFuture<'_, ()> {
        self.inner.pause(time)
    }

    fn warmup<'a>(&'a self, types: &'a [KnownType]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let is_lost =
                |known: &KnownType| self.strikes(Fault::ForgetsBareTypes, known.event_types.is_empty());
            let kept: Vec<KnownType> = types.iter().filter(|known| !is_lost(known)).cloned().collect();
            self.inner.warmup(&kept).await?;
            self.save(Write::Names(kept)).await
        })
    }

    fn types(&self) -> BoxFuture<'_, Result<Vec<KnownType>>> {
        self.inner.types()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        self.inner.close()
    }
}

impl SubscriptionStorage for Layer {
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, Result<Option<Cursor>>> {
        Box::pin(self.step_badly(id, step))
    }

    fn change<'a>(
        &'a self,
        name: &'a SubscriptionName,
        change: &'a SubscriptionChange,
    ) -> BoxFuture<'a, Result<Changed>> {
        Box::pin(self.change_badly(name, change))
    }

    fn cursors<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Cursors>> {
        Box::pin(self.cursors_badly(of))
    }

    fn backlogs<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Backlogs>> {
        Box::pin(self.backlogs_badly(of))
    }

    fn parked<'a>(
        &'a self,
        id: &'a CursorId,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Parked>>> {
        Box::pin(self.parked_badly(id, after, limit))
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layer").field("fault", &self.fault).finish_non_exhaustive()
    }
}

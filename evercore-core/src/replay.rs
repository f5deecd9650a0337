//! Replays a history into a state: the snapshot, and then the events after it up to a moment.

use crate::aggregate::{Aggregate, EventCodec, StateCodec, aggregate_type};
use crate::ahead::Ahead;
use crate::context::EventContext;
use crate::contract::{AggregateQuery, Direction, History, LoadRequest};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Events};
use crate::future::BoxFuture;
use crate::ids::{AggregateId, Position, Sequence};
use crate::loaded::Loaded;
use crate::observe;
use crate::page_limit::PageLimit;
use crate::store::EventStore;
use crate::store_id::StoreId;
use crate::target::{IntoTarget, Target};
use crate::time::Timestamp;

/// A moment in the life of an aggregate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsOf {
    /// After the event with this sequence.
    Sequence(Sequence),
    /// At the time when the log ended at this position.
    Position(Position),
    /// Before the first event that happened later than this, by event time. Writers choose event times, so these
    /// may go backwards. The history ends before the first later one, so the result is a state that really existed.
    Time(Timestamp),
    /// After the last event that was recorded at this time or before, by the engine's clock.
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

impl EventStore {
    /// Loads an aggregate as it was at a moment. Before its first event that is the default state.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub async fn load_as_of<T: Aggregate>(&self, target: impl IntoTarget, as_of: AsOf) -> Result<Loaded<T>> {
        let target = target.into_target(&aggregate_type::<T>()?)?;
        let missing = target.not_found();
        if let AsOf::Sequence(sequence) = as_of {
            return self.fold(target, sequence).await?.ok_or(missing);
        }
        let work = async {
            let request =
                LoadRequest { target, snapshot: None, up_to: Sequence::MAX, limit: PageLimit::FOLD };
            let history = self.engine().load(request).await?.ok_or(missing)?;
            self.replay(begin::<T>(self.identity(), &history)?, history, Sequence::MAX, |event| {
                as_of.includes(event)
            })
            .await
        };
        observe::load(T::TYPE, work).await
    }

    /// The aggregate after all events up to this sequence, replayed from the newest usable snapshot.
    pub(crate) async fn fold<T: Aggregate>(
        &self,
        target: Target,
        up_to: Sequence,
    ) -> Result<Option<Loaded<T>>> {
        observe::load(T::TYPE, self.fold_history(target, up_to)).await
    }

    async fn fold_history<T: Aggregate>(&self, target: Target, up_to: Sequence) -> Result<Option<Loaded<T>>> {
        let snapshot = (T::SNAPSHOT_EVERY > 0).then_some(T::SNAPSHOT_VERSION);
        let request = LoadRequest { target, snapshot, up_to, limit: PageLimit::FOLD };
        let Some(mut history) = self.engine().load(request.clone()).await? else { return Ok(None) };
        let mut start = begin::<T>(self.identity(), &history)?;
        if let Some(snapshot) = &history.snapshot {
            match T::Codec::decode_state(snapshot.state.as_bytes()) {
                Ok(state) => start = start.at(snapshot.sequence, state),
                Err(_) => {
                    self.note_ignored_snapshot();
                    let request = LoadRequest { snapshot: None, target: Target::Id(history.id), ..request };
                    let again = self.engine().load(request).await?;
                    history = again.ok_or_else(|| Error::not_found(start.id()))?;
                }
            }
        }
        self.replay(start, history, up_to, |_| true).await.map(Some)
    }

    /// Applies the history's events and the pages after them, up to `up_to` or the first unwanted event.
    async fn replay<T: Aggregate>(
        &self,
        mut aggregate: Loaded<T>,
        history: History,
        up_to: Sequence,
        wanted: impl Fn(&Event) -> bool + Send,
    ) -> Result<Loaded<T>> {
        let end = up_to.min(history.sequence);
        let (mut page, mut reads_ahead) = (history.events, true);
        loop {
            let reached = page.last().map_or(aggregate.sequence(), |event| event.sequence());
            if reached >= end {
                apply_all(&mut aggregate, &page, &wanted)?;
                let is_last = aggregate.sequence() == history.sequence;
                return Ok(aggregate.marked(history.mark.filter(|_| is_last)));
            }
            let mut next = Ahead::new(self.events_of(aggregate.id(), reached, end));
            if reads_ahead {
                // Reads the next page while this one is applied. If the first poll already returns the page, the engine
                // reads on this thread, and reading ahead gains nothing.
                next = next.begun().await;
                reads_ahead = !next.is_done();
            }
            if !apply_all(&mut aggregate, &page, &wanted)? {
                return Ok(aggregate);
            }
            page = next.await?;
            if page.is_empty() {
                return Err(hole(&aggregate));
            }
        }
    }

    /// A page of an aggregate's events between two sequences.
    fn events_of(
        &self,
        aggregate: AggregateId,
        from: Sequence,
        to: Sequence,
    ) -> BoxFuture<'_, Result<Events>> {
        let (direction, limit) = (Direction::Forward, PageLimit::FOLD);
        self.engine().read_aggregate(AggregateQuery { aggregate, direction, from, to, limit })
    }
}

fn begin<T: Aggregate>(store: StoreId, history: &History) -> Result<Loaded<T>> {
    let wanted = aggregate_type::<T>()?;
    if history.aggregate_type != wanted {
        return Err(Error::wrong_type(history.id, wanted, history.aggregate_type.clone()));
    }
    Ok(Loaded::new(store, history.id, history.key.clone(), T::default()))
}

/// Applies the events up to the first unwanted one. Returns `false` if there was one.
fn apply_all<T: Aggregate>(
    aggregate: &mut Loaded<T>,
    events: &Events,
    wanted: impl Fn(&Event) -> bool,
) -> Result<bool> {
    for event in events {
        if !wanted(&event) {
            return Ok(false);
        }
        apply(aggregate, &event)?;
    }
    Ok(true)
}

fn apply<T: Aggregate>(aggregate: &mut Loaded<T>, event: &Event) -> Result<()> {
    if event.sequence() != aggregate.sequence().next() {
        return Err(hole(aggregate));
    }
    let decoded = decode::<T>(event)?;
    aggregate
        .advance(decoded, &EventContext::of(event))
        .map_err(|source| Error::misfit(event.event_type(), Some(event.position()), source))
}

fn decode<T: Aggregate>(event: &Event) -> Result<T::Event> {
    T::Codec::decode(event.event_type().as_str(), event.payload())
        .map_err(|source| Error::not_decoded(event.event_type(), Some(event.position()), source))
}

/// evercore does not write a history with a gap. No state is better than a wrong one.
fn hole<T>(aggregate: &Loaded<T>) -> Error {
    let next = aggregate.sequence().next();
    Error::new(ErrorKind::NotAStore, format!("event {next} of aggregate {} is missing", aggregate.id()))
}

impl Event {
    /// Decodes the event as an event of `T`.
    ///
    /// # Errors
    /// [`WrongType`](ErrorKind::WrongType) if it belongs to another type of aggregate;
    /// [`Codec`](ErrorKind::Codec) if it does not decode.
    pub fn decode<T: Aggregate>(&self) -> Result<T::Event> {
        let wanted = aggregate_type::<T>()?;
        if *self.aggregate_type() != wanted {
            return Err(Error::wrong_type(self.aggregate(), wanted, self.aggregate_type().clone()));
        }
        decode::<T>(self)
    }
}

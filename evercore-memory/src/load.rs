//! Reading one aggregate.

use evercore_core::engine::{History, LoadRequest, Mark, Target};
use evercore_core::{AggregateId, AggregateQuery, Direction, Events, Position, Sequence};

use crate::state::State;

impl State {
    pub(crate) fn load(&self, request: LoadRequest) -> Option<History> {
        let id = match request.target {
            Target::Id(id) => id,
            Target::Key(aggregate_type, key) => *self.keys.get(&(aggregate_type, key))?,
        };
        let known = self.aggregates.get(&id)?;
        let end = known.sequence().min(request.up_to);
        let usable =
            known.snapshot.as_ref().filter(|it| Some(it.version) == request.snapshot && it.sequence <= end);
        let from = usable.map_or(Sequence::ZERO, |snapshot| snapshot.sequence);
        let (events, _) = self.page(self.positions(id, from, end), request.limit);
        Some(History {
            id,
            aggregate_type: known.aggregate_type.clone(),
            key: known.key.clone(),
            sequence: known.sequence(),
            mark: (known.sequence() > Sequence::ZERO).then_some(Mark::ALWAYS),
            snapshot: usable.cloned(),
            events,
        })
    }

    pub(crate) fn read_aggregate(&self, query: AggregateQuery) -> Events {
        let AggregateQuery { aggregate, direction, from, to, limit } = query;
        let (events, _) = match direction {
            Direction::Forward => self.page(self.positions(aggregate, from, to), limit),
            Direction::Backward => self.page(self.positions(aggregate, to.prev(), from.prev()).rev(), limit),
        };
        events
    }

    /// The log positions of the aggregate's events with `after` < sequence <= `last`.
    fn positions(
        &self,
        id: AggregateId,
        after: Sequence,
        last: Sequence,
    ) -> impl DoubleEndedIterator<Item = Position> + '_ {
        let all = self.aggregates.get(&id).map_or(&[][..], |known| &known.positions);
        let index =
            |sequence: Sequence| usize::try_from(sequence.get()).map_or(all.len(), |it| it.min(all.len()));
        all.get(index(after)..index(last)).unwrap_or_default().iter().copied()
    }
}

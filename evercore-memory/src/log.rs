//! Reads the log of the whole store.

use evercore_core::{Direction, Error, LogPage, LogQuery, Position, Result, Timestamp};

use crate::state::State;

impl State {
    pub(crate) fn read_log(&self, query: &LogQuery) -> Result<LogPage> {
        let head = self.head();
        let (events, is_full) = match query.direction {
            Direction::Forward if query.from > head => return Err(Error::cursor_ahead(query.from, head)),
            Direction::Forward => {
                let last = query.to.min(head);
                self.page(self.matching(query, query.from.next(), last), query.limit)
            }
            Direction::Backward => {
                let last = Position::new(query.from.get() - 1).unwrap_or_default().min(head);
                self.page(self.matching(query, query.to.max(Position::ZERO.next()), last).rev(), query.limit)
            }
        };
        Ok(LogPage::new(query, events, is_full, head))
    }

    /// The positions from `first` to `last` whose events pass the filter.
    fn matching<'a>(
        &'a self,
        query: &'a LogQuery,
        first: Position,
        last: Position,
    ) -> impl DoubleEndedIterator<Item = Position> + 'a {
        let positions = (first.get()..=last.get()).filter_map(|position| Position::new(position).ok());
        positions.filter(|position| {
            self.at(*position).is_some_and(|event| query.filter.matches_row(&event.row(*position)))
        })
    }

    /// Finds the last event up to a time by binary search: `recorded_at` never decreases along the log.
    pub(crate) fn position_at(&self, time: Timestamp) -> Position {
        Position::ZERO.plus(self.log.partition_point(|event| event.recorded_at <= time))
    }
}

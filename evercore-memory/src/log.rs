//! Reads the log of the whole store.

use std::ops::RangeInclusive;

use evercore_core::{Direction, LogPage, LogQuery, Position, Result, Timestamp};

use crate::state::State;

impl State {
    pub(crate) fn read_log(&self, query: &LogQuery) -> Result<LogPage> {
        let head = self.head();
        let query = &query.bounded(head);
        let found = self.matching(query, query.range(head)?);
        let (events, is_full) = match query.direction {
            Direction::Forward => self.page(found, query.limit),
            Direction::Backward => self.page(found.rev(), query.limit),
        };
        Ok(LogPage::new(query, events, is_full, head))
    }

    /// The positions in this range whose events pass the filter.
    fn matching<'a>(
        &'a self,
        query: &'a LogQuery,
        range: RangeInclusive<i64>,
    ) -> impl DoubleEndedIterator<Item = Position> + 'a {
        let positions = range.filter_map(|position| Position::new(position).ok());
        positions.filter(|position| {
            self.at(*position).is_some_and(|event| query.filter.matches_row(&event.row(*position)))
        })
    }

    /// Finds the last event up to a time by binary search: `recorded_at` never decreases along the log.
    pub(crate) fn position_at(&self, time: Timestamp) -> Position {
        Position::ZERO.plus(self.log.partition_point(|event| event.recorded_at <= time))
    }
}

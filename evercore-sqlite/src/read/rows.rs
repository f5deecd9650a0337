//! Turns rows of the log into a page of events, without an intermediate copy.

use std::sync::Arc;

use evercore_core::engine::{EventRow, EventsBuilder, NameTable};
use evercore_core::{AggregateId, Events, Headers, PageLimit, Position, Sequence, Timestamp};
use rusqlite::types::{FromSqlError, ValueRef};
use rusqlite::{Connection, Row, Rows};

use crate::error::{Result, damaged};
use crate::names::Names;

/// The columns of an event, in the order that a page expects. Most events have none of the last four, and one test for
/// all of them is cheaper than four.
macro_rules! select_events {
    ($($rest:expr),+) => {
        concat!(
            "SELECT position, aggregate_id, sequence, event_type_id, event_time, recorded_at, payload, ",
            "coalesce(reference, correlation_id, causation_id, headers) IS NOT NULL, ",
            "reference, correlation_id, causation_id, headers FROM events ",
            $($rest),+
        )
    };
}
pub(crate) use select_events;

const EVENT_TYPE: usize = 3;

/// A page that is being filled.
pub(crate) struct Page<'a> {
    names: &'a Names,
    table: Arc<NameTable>,
    connection: &'a Connection,
    limit: PageLimit,
    events: EventsBuilder,
    is_full: bool,
}

impl<'a> Page<'a> {
    pub(crate) fn new(connection: &'a Connection, names: &'a Names, limit: PageLimit) -> Self {
        let is_full = limit.max_events() == 0;
        Self { names, table: names.table(), connection, limit, events: EventsBuilder::new(), is_full }
    }

    /// Takes rows until the page is full; SQLite reads no further rows. `passing` are the event types to take, sorted.
    pub(crate) fn fill(&mut self, mut rows: Rows<'_>, passing: Option<&[u32]>) -> Result<()> {
        while !self.is_full {
            let Some(row) = rows.next()? else { break };
            if passing
                .is_some_and(|ids| !row.get(EVENT_TYPE).is_ok_and(|id: u32| ids.binary_search(&id).is_ok()))
            {
                continue;
            }
            self.take(row)?;
        }
        Ok(())
    }

    fn take(&mut self, row: &Row<'_>) -> Result<()> {
        let payload = row.get_ref(6)?.as_blob().map_err(damaged)?;
        let event_type_id: u32 = row.get(EVENT_TYPE)?;
        if self.table.event_type(event_type_id).is_none() {
            // Another process has registered a name meanwhile.
            self.table = self.names.reload(self.connection)?;
        }
        let (aggregate_type, event_type) = self
            .table
            .event_type(event_type_id)
            .ok_or_else(|| damaged(format!("an event has the unknown type id {event_type_id}")))?;
        let has_more = row.get(7)?;
        let more = |column| if has_more { text(row.get_ref(column)?) } else { Ok(None) };
        let headers: Option<Headers> =
            more(11)?.map(|json| serde_json::from_str(json).map_err(damaged)).transpose()?;
        let event = EventRow {
            position: Position::new(row.get(0)?).map_err(damaged)?,
            aggregate: AggregateId::new(row.get(1)?).map_err(damaged)?,
            aggregate_type,
            sequence: Sequence::new(row.get(2)?).map_err(damaged)?,
            event_type,
            time: Timestamp::from_micros(row.get(4)?).map_err(damaged)?,
            recorded_at: Timestamp::from_micros(row.get(5)?).map_err(damaged)?,
            payload,
            reference: more(8)?,
            correlation_id: more(9)?,
            causation_id: more(10)?,
            headers: headers.as_ref(),
        };
        self.is_full =
            !self.events.push_within(self.limit, event) || self.events.len() == self.limit.max_events();
        Ok(())
    }

    /// Whether the limit has ended the page.
    pub(crate) fn is_full(&self) -> bool {
        self.is_full
    }

    pub(crate) fn finish(self) -> Events {
        self.events.finish()
    }
}

fn text(value: ValueRef<'_>) -> Result<Option<&str>> {
    value.as_str_or_null().map_err(|error: FromSqlError| damaged(error))
}

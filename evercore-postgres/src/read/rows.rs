//! Turns rows of the log into a page of events, in bounded memory and without an intermediate copy.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use evercore_core::engine::{EventRow, EventsBuilder, Mark, NameTable};
use evercore_core::{AggregateId, Events, Headers, PageLimit, Position, Sequence, Timestamp};
use futures_lite::StreamExt;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Row, RowStream};

use crate::connection::pool::Checkout;
use crate::error::{PostgresError, Result, damaged};
use crate::names::type_id;
use crate::sql::{Sender, Sql};

/// The columns of an event, in the order that a page expects.
pub(crate) const EVENT_COLUMNS: &str = "position, aggregate_id, sequence, event_type_id, event_time, recorded_at, payload, \
     reference, correlation_id, causation_id, headers";

/// The same with the mark, for pages of the log.
pub(crate) const MARKED_EVENT_COLUMNS: &str = "position, aggregate_id, sequence, event_type_id, event_time, recorded_at, payload, \
     reference, correlation_id, causation_id, headers, mark";

/// The index of the mark.
const MARK: usize = 11;

/// The average size of the last page's events in bytes. From it follows how many rows to ask for, so that a page with a
/// limit in bytes fills and the server sends little more.
#[derive(Debug, Default)]
pub(crate) struct UsualSize(AtomicUsize);

impl UsualSize {
    fn learn(&self, events: usize, bytes: usize) {
        if let Some(usual) = bytes.checked_div(events) {
            self.0.store(usual, Ordering::Relaxed);
        }
    }

    fn rows_for(&self, bytes: usize) -> usize {
        match self.0.load(Ordering::Relaxed) {
            0 => usize::MAX,
            usual => bytes / usual + bytes / usual / 4 + 8,
        }
    }
}

/// The source of a page's rows.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Checkout(&'a Checkout),
    /// An open transaction. The caller takes care of its connection.
    Transaction(Sender<'a>),
}

/// The last row that was received, zero before the first.
#[derive(Debug, Default)]
struct LastRow {
    position: i64,
    sequence: i64,
    mark: Option<Mark>,
}

/// A page that is being filled.
pub(crate) struct Page<'a> {
    usual_size: &'a UsualSize,
    from: Source<'a>,
    table: Arc<NameTable>,
    limit: PageLimit,
    events: EventsBuilder,
    last: LastRow,
    /// The end of the log when the page was begun. Later events belong to another page.
    head: Position,
    /// The mark of the last event taken, if the rows have marks.
    pub(crate) mark: Option<Mark>,
    /// Whether the limit was met.
    pub(crate) is_full: bool,
}

/// The column by which a range of events is ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Position,
    Sequence,
}

/// Which events to read. The first three parameters of the statement are the start (exclusive), the end (inclusive) and
/// the number of rows.
pub(crate) struct Range {
    pub(crate) sql: Arc<Sql>,
    pub(crate) order: Order,
    pub(crate) from: i64,
    pub(crate) to: i64,
    pub(crate) rest: Rest,
}

/// The parameters after the third.
pub(crate) type Rest = Vec<Box<dyn ToSql + Sync + Send>>;

impl Range {
    pub(crate) fn values<'v>(&'v self, asked: &'v i64) -> Vec<&'v (dyn ToSql + Sync)> {
        let mut values: Vec<&(dyn ToSql + Sync)> = vec![&self.from, &self.to, asked];
        values.extend(self.rest.iter().map(|value| &**value as &(dyn ToSql + Sync)));
        values
    }
}

impl<'a> Page<'a> {
    pub(crate) fn new(
        usual_size: &'a UsualSize,
        from: Source<'a>,
        table: Arc<NameTable>,
        limit: PageLimit,
    ) -> Self {
        let (events, is_full) = (EventsBuilder::new(), limit.max_events() == 0);
        Self {
            usual_size,
            from,
            table,
            limit,
            events,
            last: LastRow::default(),
            head: Position::MAX,
            mark: None,
            is_full,
        }
    }

    /// How many rows to ask for next.
    pub(crate) fn ask(&self) -> i64 {
        let events = self.limit.max_events() - self.events.len();
        let bytes = self.limit.max_bytes().saturating_sub(self.events.bytes());
        let rows = events.min(self.usual_size.rows_for(bytes)).max(1);
        i64::try_from(rows).unwrap_or(i64::MAX)
    }

    /// Reads the range until it ends or the page is full.
    pub(crate) async fn fill(&mut self, range: Range) -> Result<()> {
        if self.is_full {
            return Ok(());
        }
        let asked = self.ask();
        let count = self.take_next(&range, asked).await?;
        self.go_on(range, asked, count).await
    }

    /// Continues after the first rows of the range. If fewer rows came than were asked for, there are no more.
    pub(crate) async fn go_on(&mut self, mut range: Range, mut asked: i64, mut count: i64) -> Result<()> {
        while !self.is_full && count == asked {
            range.from = match range.order {
                // When reading backward, skip all rows past the head at once.
                Order::Position => self.last.position.min(self.head.get().saturating_add(1)),
                Order::Sequence => self.last.sequence,
            };
            asked = self.ask();
            count = self.take_next(&range, asked).await?;
        }
        Ok(())
    }

    async fn take_next(&mut self, range: &Range, asked: i64) -> Result<i64> {
        let sender = match self.from {
            Source::Checkout(checkout) => checkout.sender()?,
            Source::Transaction(sender) => sender,
        };
        let ready = sender.ready(&range.sql).await?;
        let rows = ready.stream(&range.values(&asked)).await?;
        self.take_all(rows, asked).await
    }

    /// Skips rows past the end of the log as of the start of the page.
    pub(crate) fn end_at(&mut self, head: Position) {
        self.head = head;
    }

    /// Takes rows until the page is full. Returns how many rows came.
    pub(crate) async fn take_all(&mut self, mut rows: Pin<Box<RowStream>>, asked: i64) -> Result<i64> {
        let mut count = 0;
        while !self.is_full {
            let Some(row) = rows.try_next().await? else { break };
            count += 1;
            let mark = if row.len() > MARK { Some(Mark::new(row.try_get(MARK)?)) } else { None };
            self.last = LastRow { position: row.try_get(0)?, sequence: row.try_get(2)?, mark };
            if self.last.position <= self.head.get() {
                self.take(&row)?;
            }
        }
        self.discard_if_much_is_left(asked - count);
        self.usual_size.learn(self.events.len(), self.events.bytes());
        Ok(count)
    }

    /// The rest of an answer must be read and discarded before the next statement. If that would take longer than a new
    /// connection, the connection is closed instead.
    fn discard_if_much_is_left(&self, rows: i64) {
        let Source::Checkout(checkout) = self.from else { return };
        if !self.is_full {
            return;
        }
        let usual = self.events.bytes() / self.events.len().max(1);
        if usize::try_from(rows).unwrap_or(0).saturating_mul(usual) > self.limit.max_bytes() {
            checkout.discard();
        }
    }

    fn take(&mut self, row: &Row) -> Result<()> {
        let payload: &[u8] = row.try_get(6)?;
        let type_id = type_id(row.try_get(3)?)?;
        let (aggregate_type, event_type) =
            self.table.event_type(type_id).ok_or(PostgresError::UnknownName(type_id))?;
        let headers: Option<Headers> = row
            .try_get::<_, Option<&str>>(10)?
            .map(|json| serde_json::from_str(json).map_err(damaged))
            .transpose()?;
        let event = EventRow {
            position: Position::new(self.last.position).map_err(damaged)?,
            aggregate: AggregateId::new(row.try_get(1)?).map_err(damaged)?,
            aggregate_type,
            sequence: Sequence::new(self.last.sequence).map_err(damaged)?,
            event_type,
            time: Timestamp::from_micros(row.try_get(4)?).map_err(damaged)?,
            recorded_at: Timestamp::from_micros(row.try_get(5)?).map_err(damaged)?,
            payload,
            reference: row.try_get(7)?,
            correlation_id: row.try_get(8)?,
            causation_id: row.try_get(9)?,
            headers: headers.as_ref(),
        };
        if !self.events.push_within(self.limit, event) {
            self.is_full = true;
            return Ok(());
        }
        self.mark = self.last.mark;
        self.is_full = self.events.len() == self.limit.max_events();
        Ok(())
    }

    /// The events, and whether the limit ended them.
    pub(crate) fn finish(self) -> (Events, bool) {
        (self.events.finish(), self.is_full)
    }
}

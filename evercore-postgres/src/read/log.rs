//! Reading the log of the whole store.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use evercore_core::engine::{Mark, NameTable};
use evercore_core::{
    Direction, Error, ErrorKind, Events, LogPage, LogQuery, PageLimit, Position, Timestamp, limits,
};
use futures_lite::future::zip;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use crate::connection::pool::{Checkout, Pools};
use crate::error::{PostgresError, Result, damaged};
use crate::names::{Names, sql_id};
use crate::read::head::SeenHead;
use crate::read::rows::{MARKED_EVENT_COLUMNS, Order, Page, Range, Rest, Source, UsualSize};
use crate::settings::Schema;
use crate::sql::{Sender, Sql};

/// The end of the log, and the mark of the names. A table of names with this mark has every name in the log up to that
/// end.
const HEAD: &str = "SELECT l.position, l.names
    FROM @log_end l WHERE l.position >= 0 ORDER BY l.position DESC LIMIT 1";

const IS_STANDBY: &str = "SELECT pg_catalog.pg_is_in_recovery()";

/// The same, with the marks of the events at which a page begins and may end. The log has no gaps, so the next event at
/// or after a position is the event at that position.
const HEAD_OF_PAGE: &str = "SELECT l.position, l.names,
        (SELECT e.mark FROM @events e WHERE e.position >= l.position ORDER BY e.position LIMIT 1),
        (SELECT e.mark FROM @events e WHERE e.position >= $1 ORDER BY e.position LIMIT 1),
        (SELECT e.mark FROM @events e WHERE e.position >= $2 ORDER BY e.position LIMIT 1)
    FROM @log_end l WHERE l.position >= 0 ORDER BY l.position DESC LIMIT 1";

/// The range of a page, forward and backward.
const RANGES: [&str; 2] = [
    "position > $1 AND position <= $2 ORDER BY position LIMIT $3",
    "position < $1 AND position >= $2 ORDER BY position DESC LIMIT $3",
];

const ALL: &str = "SELECT {event_columns} FROM @events WHERE {range}";

/// With many event types the log itself is read. The sum keeps the server from using the index of the types: it would
/// read and sort all events of these types for each page.
const TYPES: &str = "SELECT {event_columns} FROM @events WHERE event_type_id + 0 = ANY ($4) AND {range}";

/// An aggregate's sequences grow as its positions do, so its index gives both orders. The place to begin in it is found
/// by bisection, in as many steps as the number of its events has bits.
const AGGREGATE: &str = "
    WITH RECURSIVE halving (border, position, below, above) AS (
        SELECT border, p, 0::bigint,
               coalesce((SELECT max(e.sequence) FROM @events e WHERE e.aggregate_id = $4), 0)
        FROM (VALUES (1, $1 - {shift}::bigint), (2, $2 - {shift}::bigint)) AS v (border, p)
        UNION ALL
        SELECT h.border, h.position, CASE WHEN w.within THEN m.middle ELSE h.below END,
               CASE WHEN w.within THEN h.above ELSE m.middle - 1 END
        FROM halving h
        CROSS JOIN LATERAL (SELECT h.above - (h.above - h.below) / 2 AS middle) AS m
        CROSS JOIN LATERAL (SELECT e.position <= h.position AS within FROM @events e
                            WHERE e.aggregate_id = $4 AND e.sequence = m.middle LIMIT 1) AS w
        WHERE h.below < h.above
    ), up_to AS MATERIALIZED (SELECT border, max(below) AS sequence FROM halving GROUP BY border)
    SELECT {event_columns}
    FROM @events WHERE aggregate_id = $4 AND ($5::int[] IS NULL OR event_type_id = ANY ($5))
      AND ($6::text IS NULL OR reference = $6) AND ($7::text IS NULL OR correlation_id = $7) AND {range} LIMIT $3";

/// Backward, the event at the first border is left out and the one at the second is included, so each border is one
/// position lower.
const SHIFTS: [&str; 2] = ["0", "1"];

const AGGREGATE_RANGES: [&str; 2] = [
    "sequence > (SELECT u.sequence FROM up_to u WHERE u.border = 1)
     AND sequence <= (SELECT u.sequence FROM up_to u WHERE u.border = 2) ORDER BY sequence",
    "sequence <= (SELECT u.sequence FROM up_to u WHERE u.border = 1)
     AND sequence > (SELECT u.sequence FROM up_to u WHERE u.border = 2) ORDER BY sequence DESC",
];

/// The events of a reference, and those of a correlation id, are a range of an index whose last column is the position.
const REFERENCE: &str = "SELECT {event_columns} FROM @events WHERE reference = $4
    AND ($5::int[] IS NULL OR event_type_id = ANY ($5)) AND ($6::text IS NULL OR correlation_id = $6) AND {range}";

const CORRELATION: &str = "SELECT {event_columns} FROM @events WHERE correlation_id = $4
    AND ($5::int[] IS NULL OR event_type_id = ANY ($5)) AND {range}";

/// The last position that was recorded at this time or before. `recorded_at` never decreases along the log. The `ORDER
/// BY` makes the server use the index of positions: for `=`, it could choose another index that contains the position,
/// and read it from end to end.
const POSITION_AT: &str = "
    WITH RECURSIVE halving (below, above) AS (
        SELECT 0::bigint, max(l.position) FROM @log_end l WHERE l.position >= 0
        UNION ALL
        SELECT CASE WHEN w.within THEN m.middle ELSE h.below END, CASE WHEN w.within THEN h.above ELSE m.middle - 1 END
        FROM halving h
        CROSS JOIN LATERAL (SELECT h.above - (h.above - h.below) / 2 AS middle) AS m
        CROSS JOIN LATERAL (SELECT e.recorded_at <= $1 AS within FROM @events e
                            WHERE e.position >= m.middle ORDER BY e.position LIMIT 1) AS w
        WHERE h.below < h.above
    )
    SELECT max(below) FROM halving";

/// The statements of this module. Of two, the first goes forward and the second backward.
#[derive(Debug)]
struct LogSql {
    schema: Schema,
    head: Sql,
    head_of_page: Sql,
    position_at: Sql,
    all: [Arc<Sql>; 2],
    types: [Arc<Sql>; 2],
    aggregate: [Arc<Sql>; 2],
    reference: [Arc<Sql>; 2],
    correlation: [Arc<Sql>; 2],
    /// By direction and number of types; made on first use.
    merged: RwLock<HashMap<(usize, usize), Arc<Sql>>>,
}

const NUMBERS: [Type; 3] = [Type::INT8, Type::INT8, Type::INT8];

impl LogSql {
    fn new(schema: &Schema) -> Self {
        let directed = |text: &str, ranges: [&str; 2], more: &[Type]| {
            [0, 1].map(|direction| {
                let text = text
                    .replace("{event_columns}", MARKED_EVENT_COLUMNS)
                    .replace("{shift}", SHIFTS[direction]);
                let types = [&NUMBERS, more].concat();
                Arc::new(Sql::new(schema, &text.replace("{range}", ranges[direction]), &types))
            })
        };
        let of_aggregate = [Type::INT8, Type::INT4_ARRAY, Type::TEXT, Type::TEXT];
        Self {
            schema: schema.clone(),
            head: Sql::new(schema, HEAD, &[]),
            head_of_page: Sql::new(schema, HEAD_OF_PAGE, &NUMBERS[..2]),
            position_at: Sql::new(schema, POSITION_AT, &[Type::INT8]),
            all: directed(ALL, RANGES, &[]),
            types: directed(TYPES, RANGES, &[Type::INT4_ARRAY]),
            aggregate: directed(AGGREGATE, AGGREGATE_RANGES, &of_aggregate),
            reference: directed(REFERENCE, RANGES, &[Type::TEXT, Type::INT4_ARRAY, Type::TEXT]),
            correlation: directed(CORRELATION, RANGES, &[Type::TEXT, Type::INT4_ARRAY]),
            merged: RwLock::default(),
        }
    }

    /// The statement for a query. `passing` are the ids of the event types that pass the filter, if they are known.
    fn range(&self, query: &LogQuery, passing: Option<Vec<i32>>) -> Range {
        let direction = usize::from(query.direction == Direction::Backward);
        let text = |text: &str| -> Box<dyn ToSql + Sync + Send> { Box::new(text.to_owned()) };
        let perhaps =
            |text: Option<&str>| -> Box<dyn ToSql + Sync + Send> { Box::new(text.map(str::to_owned)) };
        let filter = &query.filter;
        let (sql, rest): (_, Rest) = match (filter.aggregate(), filter.reference(), filter.correlation_id()) {
            (Some(id), reference, correlation) => (
                Arc::clone(&self.aggregate[direction]),
                vec![Box::new(id.get()), Box::new(passing), perhaps(reference), perhaps(correlation)],
            ),
            (None, Some(reference), correlation) => (
                Arc::clone(&self.reference[direction]),
                vec![text(reference), Box::new(passing), perhaps(correlation)],
            ),
            (None, None, Some(correlation)) => {
                (Arc::clone(&self.correlation[direction]), vec![text(correlation), Box::new(passing)])
            }
            (None, None, None) => self.of_types(direction, passing),
        };
        Range { sql, order: Order::Position, from: query.from.get(), to: query.to.get(), rest }
    }

    /// The events of these types, or of all.
    fn of_types(&self, direction: usize, passing: Option<Vec<i32>>) -> (Arc<Sql>, Rest) {
        match passing {
            None => (Arc::clone(&self.all[direction]), Vec::new()),
            Some(ids) if ids.len() <= limits::INDEXED_TYPES => {
                let sql = self.merged(direction, ids.len());
                (sql, ids.into_iter().map(|id| Box::new(id) as _).collect())
            }
            Some(ids) => (Arc::clone(&self.types[direction]), vec![Box::new(ids)]),
        }
    }

    fn merged(&self, direction: usize, types: usize) -> Arc<Sql> {
        let known = self.merged.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(sql) = known.get(&(direction, types)) {
            return Arc::clone(sql);
        }
        drop(known);
        let made = Arc::new(merged(&self.schema, direction, types));
        let mut known = self.merged.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(known.entry((direction, types)).or_insert(made))
    }
}

/// The events of one type are a range of an index whose last column is the position. The server merges these ranges
/// while it reads them.
fn merged(schema: &Schema, direction: usize, types: usize) -> Sql {
    let order = ["ORDER BY position LIMIT $3", "ORDER BY position DESC LIMIT $3"][direction];
    let part = |number: usize| {
        let range = RANGES[direction];
        format!("(SELECT {MARKED_EVENT_COLUMNS} FROM @events WHERE event_type_id = ${number} AND {range})")
    };
    let parts: Vec<String> = (4..4 + types).map(part).collect();
    let text = match &parts[..] {
        [one] => one.clone(),
        several => format!("{} {order}", several.join(" UNION ALL ")),
    };
    Sql::new(schema, &text, &[&NUMBERS[..], &vec![Type::INT4; types]].concat())
}

/// The end of the log in the store.
struct LogEnd {
    position: Position,
    names: Mark,
}

impl LogEnd {
    fn of(rows: &[Row]) -> Result<Self> {
        let row = rows.first().ok_or_else(|| damaged("the end of the log is missing"))?;
        let position = Position::new(row.try_get(0)?).map_err(damaged)?;
        Ok(Self { position, names: Mark::new(row.try_get(1)?) })
    }

    /// Checks that the query can be answered, and with the names in the table.
    fn check(&self, query: &LogQuery, table: &NameTable) -> Result<()> {
        query.range(self.position)?;
        if table.mark() == self.names { Ok(()) } else { Err(PostgresError::OtherNames) }
    }
}

/// The marks of the events at the ends of a page.
struct Marks {
    head: Option<Mark>,
    from: Option<Mark>,
    to: Option<Mark>,
}

impl Marks {
    fn of(rows: &[Row], query: &LogQuery) -> Result<Self> {
        let row = rows.first().ok_or_else(|| damaged("the end of the log is missing"))?;
        let mark =
            |column| -> Result<Option<Mark>> { Ok(row.try_get::<_, Option<i64>>(column)?.map(Mark::new)) };
        let from = if query.from > Position::ZERO { mark(3)? } else { None };
        Ok(Self { head: mark(2)?, from, to: mark(4)? })
    }
}

/// Reads the log of a store.
#[derive(Debug)]
pub(crate) struct Log {
    pools: Arc<Pools>,
    names: Arc<Names>,
    sql: LogSql,
    usual_size: UsualSize,
    /// The end of the log that this engine has seen.
    pub(crate) seen: Arc<SeenHead>,
}

impl Log {
    pub(crate) fn new(pools: Arc<Pools>, names: Arc<Names>) -> Self {
        let sql = LogSql::new(&pools.settings.schema);
        Self { pools, names, sql, usual_size: UsualSize::default(), seen: Arc::default() }
    }

    /// Makes the statements that are otherwise made on first use, to check their plans.
    #[cfg(test)]
    pub(crate) fn make_all(&self) {
        for types in 1..=limits::INDEXED_TYPES {
            self.sql.merged(0, types);
            self.sql.merged(1, types);
        }
    }

    /// A page of the log up to the head that is read first. Later commits belong to the next page.
    pub(crate) async fn read(&self, query: &LogQuery) -> Result<LogPage> {
        let read = |checkout: Arc<Checkout>| async move {
            let page = self.names.retry(&checkout, |table| self.read_on(&checkout, query, table)).await;
            match page {
                Err(PostgresError::Core(error)) if matches!(error.kind(), ErrorKind::CursorAhead { .. }) => {
                    Err(ahead(checkout.sender()?, error).await?.into())
                }
                page => page,
            }
        };
        self.pools.read(read).await
    }

    /// The head and the first rows are requested together.
    async fn read_on(&self, checkout: &Checkout, query: &LogQuery, table: Arc<NameTable>) -> Result<LogPage> {
        let known = self.seen.get();
        let check = |rows: &[Row]| -> Result<(LogEnd, Marks)> {
            let head = LogEnd::of(rows)?;
            self.seen.found(known, head.position);
            head.check(query, &table)?;
            Ok((head, Marks::of(rows, query)?))
        };
        let passing = if query.filter.is_by_type() { table.passing(&query.filter) } else { None };
        let passing: Option<Vec<i32>> = passing.map(|ids| ids.into_iter().map(sql_id).collect());
        let query = &self.bounded(checkout, query, passing.as_deref()).await?;
        let mut page =
            Page::new(&self.usual_size, Source::Checkout(checkout), Arc::clone(&table), query.limit);
        let head = checkout.sender()?.ready(&self.sql.head_of_page).await?;
        let ends = [query.from.get(), query.to.get()];
        let ends: [&(dyn ToSql + Sync); 2] = [&ends[0], &ends[1]];
        let (head, marks) = if passing.as_ref().is_some_and(Vec::is_empty) || query.limit.max_events() == 0 {
            check(&head.rows(&ends).await?)?
        } else {
            let mut range = self.sql.range(query, passing);
            let asked = page.ask();
            let ready = checkout.sender()?.ready(&range.sql).await?;
            let values = range.values(&asked);
            let (head, rows) = zip(head.rows(&ends), ready.stream(&values)).await;
            drop(values);
            let (head, marks) = check(&head?)?;
            page.end_at(head.position);
            let count = page.take_all(rows?, asked).await?;
            if query.direction == Direction::Forward {
                range.to = range.to.min(head.position.get());
            }
            page.go_on(range, asked, count).await?;
            (head, marks)
        };
        let last = page.mark;
        let (events, is_full) = page.finish();
        let page = LogPage::new(query, events, is_full, head.position);
        let ended = match page.scanned {
            Position::ZERO => Some(Mark::ALWAYS),
            _ if is_full && !page.events.is_empty() => last,
            scanned if scanned == query.from => marks.from,
            scanned if scanned == head.position => marks.head,
            _ => marks.to,
        };
        Ok(LogPage { began: marks.from, ended, ..page })
    }

    /// The part of the query that one page searches: all of it if an index gives the matching events and no others.
    async fn bounded(
        &self,
        checkout: &Checkout,
        query: &LogQuery,
        passing: Option<&[i32]>,
    ) -> Result<LogQuery> {
        if query.is_by_index(passing.map(<[i32]>::len)) {
            return Ok(query.clone());
        }
        // Forward, the bound does not depend on the head.
        let is_past = query.direction == Direction::Backward && query.from > self.seen.get();
        let head = if is_past { self.head_within(checkout.sender()?).await? } else { self.seen.get() };
        Ok(query.bounded(head))
    }

    /// A page of all events after one position and up to another, in an open transaction. `table` also contains the
    /// names that were registered in it.
    pub(crate) async fn page_within(
        &self,
        sender: Sender<'_>,
        table: Arc<NameTable>,
        (after, to): (Position, Position),
    ) -> Result<Events> {
        let mut page = Page::new(&self.usual_size, Source::Transaction(sender), table, PageLimit::default());
        let (sql, from, to) = (Arc::clone(&self.sql.all[0]), after.get(), to.get());
        page.fill(Range { sql, order: Order::Position, from, to, rest: Vec::new() }).await?;
        Ok(page.finish().0)
    }

    /// Reads the end of the log, and tells the waiters.
    pub(crate) async fn head(&self) -> Result<Position> {
        let known = self.seen.get();
        let head =
            self.pools.read(|checkout| async move { self.head_within(checkout.sender()?).await }).await?;
        self.seen.found(known, head);
        Ok(head)
    }

    pub(crate) async fn head_within(&self, sender: Sender<'_>) -> Result<Position> {
        Ok(LogEnd::of(&sender.rows(&self.sql.head, &[]).await?)?.position)
    }

    /// The last position that was recorded at this time or before.
    pub(crate) async fn position_at(&self, time: Timestamp) -> Result<Position> {
        let read = |checkout: Arc<Checkout>| async move {
            let row = checkout.sender()?.row(&self.sql.position_at, &[&time.as_micros()]).await?;
            let row = row.ok_or_else(|| damaged("the end of the log is missing"))?;
            Position::new(row.try_get(0)?).map_err(damaged)
        };
        self.pools.read(read).await
    }
}

/// A standby may not have this event yet, which passes by itself.
async fn ahead(sender: Sender<'_>, error: Error) -> Result<Error> {
    let rows = sender.client.query_typed(IS_STANDBY, &[]).await?;
    let is_standby = rows.first().map(|row| row.try_get(0)).transpose()?.unwrap_or(false);
    if !is_standby {
        return Ok(error);
    }
    let message = format!("the standby lags, or the log has lost its end: {error}");
    Ok(Error::new(ErrorKind::Unavailable, message))
}

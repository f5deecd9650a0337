//! Reading the log of the whole store.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use evercore_core::{Direction, Error, ErrorKind, LogPage, LogQuery, Mark, NameTable, Position, Timestamp};
use futures_lite::future::zip;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use crate::connection::pool::Lent;
use crate::error::{PostgresError, Result, damaged};
use crate::names::stored;
use crate::read::rows::{Order, Page, Range, Rest, event_columns};
use crate::sql::{Schema, Sender, Sql};
use crate::store::Store;

/// Where the log ends, and the mark of the names: who knows the names of that mark knows all that are in the log up to
/// there.
const HEAD: &str = "SELECT l.position, l.names
    FROM @log_end l WHERE l.position >= 0 ORDER BY l.position DESC LIMIT 1";

const IS_STANDBY: &str = "SELECT pg_catalog.pg_is_in_recovery()";

/// The same, with the marks of the events at which a page begins and may end; there are no holes.
const HEAD_OF_PAGE: &str = "SELECT l.position, l.names,
        (SELECT e.mark FROM @events e WHERE e.position >= l.position ORDER BY e.position LIMIT 1),
        (SELECT e.mark FROM @events e WHERE e.position >= $1 ORDER BY e.position LIMIT 1),
        (SELECT e.mark FROM @events e WHERE e.position >= $2 ORDER BY e.position LIMIT 1)
    FROM @log_end l WHERE l.position >= 0 ORDER BY l.position DESC LIMIT 1";

/// The columns of an event, filtered and in the order of a direction.
macro_rules! select_log {
    (forward $with:literal, $where:literal) => {
        select_log!($with, $where, "position > $1 AND position <= $2 ORDER BY position")
    };
    (backward $with:literal, $where:literal) => {
        select_log!($with, $where, "position < $1 AND position >= $2 ORDER BY position DESC")
    };
    ($with:literal, $where:literal, $range:literal) => {
        concat!($with, "SELECT ", event_columns!(), " FROM @events WHERE ", $where, $range, " LIMIT $3")
    };
}

const ALL_FORWARD: &str = select_log!(forward "", "");
const ALL_BACKWARD: &str = select_log!(backward "", "");

/// With many event types the log itself is read. The sum hides the index of the types, of which all would be read and
/// sorted for each page.
const TYPES_FORWARD: &str = select_log!(forward "", "event_type_id + 0 = ANY ($4) AND ");
const TYPES_BACKWARD: &str = select_log!(backward "", "event_type_id + 0 = ANY ($4) AND ");

/// Up to this many event types are read from their index each and merged.
const MERGED_TYPES: usize = 24;

/// An aggregate's sequences grow as its positions do, so its index gives both orders; where to begin in it is found by
/// halving, in as many steps as the number of its events has bits.
macro_rules! select_aggregate {
    ($read:literal, $range:literal) => {
        concat!(
            "WITH RECURSIVE halving (border, position, below, above) AS (
                SELECT border, p, 0::bigint,
                       coalesce((SELECT max(e.sequence) FROM @events e WHERE e.aggregate_id = $4), 0)
                FROM (VALUES (1, $1 - ",
            $read,
            "), (2, $2 - ",
            $read,
            ")) AS v (border, p)
                UNION ALL
                SELECT h.border, h.position, CASE WHEN w.within THEN m.middle ELSE h.below END,
                       CASE WHEN w.within THEN h.above ELSE m.middle - 1 END
                FROM halving h
                CROSS JOIN LATERAL (SELECT h.above - (h.above - h.below) / 2 AS middle) AS m
                CROSS JOIN LATERAL (SELECT e.position <= h.position AS within FROM @events e
                                    WHERE e.aggregate_id = $4 AND e.sequence = m.middle LIMIT 1) AS w
                WHERE h.below < h.above
            ), up_to AS MATERIALIZED (SELECT border, max(below) AS sequence FROM halving GROUP BY border)
            SELECT ",
            event_columns!(),
            " FROM @events WHERE aggregate_id = $4 AND ($5::int[] IS NULL OR event_type_id = ANY ($5))
              AND ($6::text IS NULL OR reference = $6) AND ($7::text IS NULL OR correlation_id = $7) AND ",
            $range,
            " LIMIT $3"
        )
    };
}

const AGGREGATE_FORWARD: &str = select_aggregate!(
    "0::bigint",
    "sequence > (SELECT u.sequence FROM up_to u WHERE u.border = 1)
     AND sequence <= (SELECT u.sequence FROM up_to u WHERE u.border = 2) ORDER BY sequence"
);

/// Going backward the first border is not read and the second is: each lies one position lower.
const AGGREGATE_BACKWARD: &str = select_aggregate!(
    "1::bigint",
    "sequence <= (SELECT u.sequence FROM up_to u WHERE u.border = 1)
     AND sequence > (SELECT u.sequence FROM up_to u WHERE u.border = 2) ORDER BY sequence DESC"
);

/// A reference's part of the log, and a correlation id's, is a range of an index that ends with the position.
macro_rules! select_reference {
    ($direction:ident) => {
        select_log!($direction "", "reference = $4 AND ($5::int[] IS NULL OR event_type_id = ANY ($5))
            AND ($6::text IS NULL OR correlation_id = $6) AND ")
    };
}
macro_rules! select_correlation {
    ($direction:ident) => {
        select_log!($direction "", "correlation_id = $4 AND ($5::int[] IS NULL OR event_type_id = ANY ($5)) AND ")
    };
}
const REFERENCE_FORWARD: &str = select_reference!(forward);
const REFERENCE_BACKWARD: &str = select_reference!(backward);
const CORRELATION_FORWARD: &str = select_correlation!(forward);
const CORRELATION_BACKWARD: &str = select_correlation!(backward);

/// How many positions come before the first that was recorded later. `recorded_at` never goes back along the log. Asked
/// for by order, although there is no hole: an index that only has the position too would be read from end to end.
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

/// The statements of this room; of two, the first goes forward and the second backward.
#[derive(Debug)]
pub(crate) struct LogSql {
    schema: Schema,
    head: Sql,
    head_of_page: Sql,
    position_at: Sql,
    all: [Arc<Sql>; 2],
    types: [Arc<Sql>; 2],
    aggregate: [Arc<Sql>; 2],
    reference: [Arc<Sql>; 2],
    correlation: [Arc<Sql>; 2],
    /// By direction and number of types; made when first asked for.
    merged: RwLock<HashMap<(usize, usize), Arc<Sql>>>,
}

const NUMBERS: [Type; 3] = [Type::INT8, Type::INT8, Type::INT8];

impl LogSql {
    pub(crate) fn new(schema: &Schema) -> Self {
        let sql = |text: &str, more: &[Type]| Arc::new(Sql::new(schema, text, &[&NUMBERS, more].concat()));
        let of_aggregate = [Type::INT8, Type::INT4_ARRAY, Type::TEXT, Type::TEXT];
        let of_reference = [Type::TEXT, Type::INT4_ARRAY, Type::TEXT];
        let of_correlation = [Type::TEXT, Type::INT4_ARRAY];
        Self {
            schema: schema.clone(),
            head: Sql::new(schema, HEAD, &[]),
            head_of_page: Sql::new(schema, HEAD_OF_PAGE, &NUMBERS[..2]),
            position_at: Sql::new(schema, POSITION_AT, &[Type::INT8]),
            all: [sql(ALL_FORWARD, &[]), sql(ALL_BACKWARD, &[])],
            types: [sql(TYPES_FORWARD, &[Type::INT4_ARRAY]), sql(TYPES_BACKWARD, &[Type::INT4_ARRAY])],
            aggregate: [sql(AGGREGATE_FORWARD, &of_aggregate), sql(AGGREGATE_BACKWARD, &of_aggregate)],
            reference: [sql(REFERENCE_FORWARD, &of_reference), sql(REFERENCE_BACKWARD, &of_reference)],
            correlation: [
                sql(CORRELATION_FORWARD, &of_correlation),
                sql(CORRELATION_BACKWARD, &of_correlation),
            ],
            merged: RwLock::default(),
        }
    }

    pub(crate) async fn head(&self, sender: Sender<'_>) -> Result<Position> {
        Ok(Head::of(&sender.rows(&self.head, &[]).await?)?.position)
    }

    /// All events behind one position, up to another.
    pub(crate) fn all_between(&self, after: Position, to: Position) -> Range {
        let sql = Arc::clone(&self.all[0]);
        Range { sql, order: Order::Position, from: after.get(), to: to.get(), rest: Vec::new() }
    }

    /// What to read for a query, of which only events of the types `passing` pass, if that is known.
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
            Some(numbers) if numbers.len() <= MERGED_TYPES => {
                let sql = self.merged(direction, numbers.len());
                (sql, numbers.into_iter().map(|number| Box::new(number) as _).collect())
            }
            Some(numbers) => (Arc::clone(&self.types[direction]), vec![Box::new(numbers)]),
        }
    }

    /// Makes all that are made when first asked for, to look at their plans.
    #[cfg(test)]
    pub(crate) fn make_all(&self) {
        for types in 1..=MERGED_TYPES {
            self.merged(0, types);
            self.merged(1, types);
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

/// One event type's part of the log is a range of an index that ends with the position; the server merges the parts as
/// it goes.
fn merged(schema: &Schema, direction: usize, types: usize) -> Sql {
    let (range, order) = [
        ("position > $1 AND position <= $2", "ORDER BY position LIMIT $3"),
        ("position < $1 AND position >= $2", "ORDER BY position DESC LIMIT $3"),
    ][direction];
    let part = |number: usize| {
        let columns = event_columns!();
        format!("(SELECT {columns} FROM @events WHERE event_type_id = ${number} AND {range} {order})")
    };
    let parts: Vec<String> = (4..4 + types).map(part).collect();
    let text = match &parts[..] {
        [one] => one.clone(),
        several => format!("{} {order}", several.join(" UNION ALL ")),
    };
    Sql::new(schema, &text, &[&NUMBERS[..], &vec![Type::INT4; types]].concat())
}

/// What the log is up to.
struct Head {
    position: Position,
    names: Mark,
}

impl Head {
    fn of(rows: &[Row]) -> Result<Self> {
        let row = rows.first().ok_or_else(|| damaged("the end of the log is missing"))?;
        let position = Position::new(row.try_get(0)?).map_err(damaged)?;
        Ok(Self { position, names: Mark::new(row.try_get(1)?) })
    }

    /// Whether the query can be answered, with the names that are in the table.
    fn check(&self, query: &LogQuery, table: &NameTable) -> Result<()> {
        if query.direction == Direction::Forward && query.from > self.position {
            return Err(Error::cursor_ahead(query.from, self.position).into());
        }
        if table.mark() == self.names { Ok(()) } else { Err(PostgresError::OtherNames) }
    }
}

/// The marks of the events between which a page lies.
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

/// A page of the log, as of the head that is read first: what commits meanwhile is for the next page.
pub(crate) async fn read(store: &Store, query: &LogQuery) -> Result<LogPage> {
    store
        .read(|lent| async move {
            let page = store.names.retry(&lent, |table| read_on(store, &lent, query, table)).await;
            match page {
                Err(PostgresError::Core(error)) if matches!(error.kind(), ErrorKind::CursorAhead { .. }) => {
                    Err(ahead(&lent, error).await?.into())
                }
                page => page,
            }
        })
        .await
}

/// A standby may not have come so far yet, which passes by itself.
async fn ahead(lent: &Lent, error: Error) -> Result<Error> {
    let rows = lent.sender()?.client.query_typed(IS_STANDBY, &[]).await?;
    let is_standby = rows.first().map(|row| row.try_get(0)).transpose()?.unwrap_or(false);
    if !is_standby {
        return Ok(error);
    }
    let message = format!("the standby lags, or the log has lost its end: {error}");
    Ok(Error::new(ErrorKind::Unavailable, message))
}

/// The head and the first rows go over the wire together.
async fn read_on(store: &Store, lent: &Lent, query: &LogQuery, table: Arc<NameTable>) -> Result<LogPage> {
    let known = store.watch.seen();
    let check = |rows: &[Row]| -> Result<(Head, Marks)> {
        let head = Head::of(rows)?;
        store.watch.found(known, head.position);
        head.check(query, &table)?;
        Ok((head, Marks::of(rows, query)?))
    };
    let mut page = Page::new(store, lent, Arc::clone(&table), query.limit);
    let passing = if query.filter.is_by_type() { table.passing(&query.filter) } else { None };
    let passing: Option<Vec<i32>> = passing.map(|numbers| numbers.into_iter().map(stored).collect());
    let head = lent.sender()?.ready(&store.sql.log.head_of_page).await?;
    let ends = [query.from.get(), query.to.get()];
    let ends: [&(dyn ToSql + Sync); 2] = [&ends[0], &ends[1]];
    let (head, marks) = if passing.as_ref().is_some_and(Vec::is_empty) || query.limit.max_events() == 0 {
        check(&head.rows(&ends).await?)?
    } else {
        let mut range = store.sql.log.range(query, passing);
        let asked = page.ask();
        let ready = lent.sender()?.ready(&range.sql).await?;
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
    let last = page.last_mark();
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

/// Where the log ends, told to those who wait for it too.
pub(crate) async fn head(store: &Store) -> Result<Position> {
    let known = store.watch.seen();
    let head = store.read(|lent| async move { store.sql.log.head(lent.sender()?).await }).await?;
    store.watch.found(known, head);
    Ok(head)
}

/// The last position recorded at this time or before.
pub(crate) async fn position_at(store: &Store, time: Timestamp) -> Result<Position> {
    store.read(|lent| async move { position_at_on(store, &lent, time).await }).await
}

async fn position_at_on(store: &Store, lent: &Lent, time: Timestamp) -> Result<Position> {
    let row = lent.sender()?.row(&store.sql.log.position_at, &[&time.as_micros()]).await?;
    let row = row.ok_or_else(|| damaged("the end of the log is missing"))?;
    Position::new(row.try_get(0)?).map_err(damaged)
}

//! Loading one aggregate.

use std::pin::Pin;
use std::sync::Arc;

use evercore_core::engine::{History, LoadRequest, Mark, NameTable, Payload, Snapshot, Target};
use evercore_core::{AggregateId, AggregateQuery, Direction, Events, Key, Position, Sequence};
use futures_lite::StreamExt;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Row, RowStream};

use crate::connection::pool::{Checkout, Pools};
use crate::error::{PostgresError, Result, damaged};
use crate::names::{Names, type_id};
use crate::read::head::SeenHead;
use crate::read::rows::{EVENT_COLUMNS, Order, Page, Range, Rest, Source, UsualSize};
use crate::settings::Schema;
use crate::sql::{Sender, Sql};

/// Reads an aggregate, its newest usable snapshot and the events after it in one statement, so that they are
/// consistent. The first row is the aggregate, with the snapshot in the columns of times and payload. The other rows
/// are its events. In the columns of the causation id and the headers, the first row has the mark of the last event and
/// the mark of the names: columns of their own would be empty in every other row.
const FROM_SNAPSHOT: &str = "
    WITH a AS MATERIALIZED (
        SELECT a.id, a.aggregate_type_id, a.natural_key, coalesce(e.sequence, 0) AS sequence, e.mark,
               s.sequence AS snapshot_sequence, s.version, s.state
        FROM @aggregates a
        LEFT JOIN LATERAL (SELECT e.sequence, e.mark FROM @events e WHERE e.aggregate_id = a.id
                           ORDER BY e.sequence DESC LIMIT 1) e ON true
        LEFT JOIN LATERAL (SELECT s.sequence, s.version, s.state FROM @snapshots s
                           WHERE s.aggregate_id = a.id AND s.version = $1 AND s.sequence <= $2 LIMIT 1) s ON true
        WHERE {which}
    ), usable AS MATERIALIZED (
        SELECT coalesce(max(snapshot_sequence), 0) AS sequence FROM a WHERE snapshot_sequence <= sequence
    )
    SELECT l.position, id, sequence, aggregate_type_id, snapshot_sequence, version, state,
           natural_key, NULL, mark::text, l.names::text
    FROM a CROSS JOIN (SELECT l.position, l.names FROM @log_end l
                       WHERE l.position >= 0 ORDER BY l.position DESC LIMIT 1) AS l
    UNION ALL
    (SELECT {event_columns} FROM @events
     WHERE aggregate_id = (SELECT id FROM a) AND sequence > (SELECT sequence FROM usable) AND sequence <= $2
     ORDER BY sequence LIMIT $3)";

/// The same for callers that want all events, without snapshots.
const FROM_FIRST: &str = "
    SELECT l.position, a.id, coalesce(e.sequence, 0), a.aggregate_type_id, NULL::bigint, NULL::bigint, NULL::bytea,
           a.natural_key, NULL, e.mark::text, l.names::text
    FROM @aggregates a CROSS JOIN (SELECT l.position, l.names FROM @log_end l
                                   WHERE l.position >= 0 ORDER BY l.position DESC LIMIT 1) AS l
    LEFT JOIN LATERAL (SELECT e.sequence, e.mark FROM @events e WHERE e.aggregate_id = a.id
                       ORDER BY e.sequence DESC LIMIT 1) e ON true
    WHERE {which}
    UNION ALL
    (SELECT {event_columns} FROM @events
     WHERE aggregate_id = (SELECT a.id FROM @aggregates a WHERE {which}) ORDER BY sequence LIMIT $1)";

/// Before the events, a row with the mark of the names, in the column of the headers.
const NAMES_FIRST: &str = "
    SELECT 0::bigint, 0::bigint, 0::bigint, 0, 0::bigint, 0::bigint, NULL::bytea, NULL, NULL, NULL, l.names::text
    FROM (SELECT l.names FROM @log_end l WHERE l.position >= 0 ORDER BY l.position DESC LIMIT 1) AS l
    UNION ALL (";

const FORWARD: &str = "SELECT {event_columns} FROM @events
    WHERE aggregate_id = $4 AND sequence > $1 AND sequence <= $2 ORDER BY sequence LIMIT $3";

const BACKWARD: &str = "SELECT {event_columns} FROM @events
    WHERE aggregate_id = $4 AND sequence < $1 AND sequence >= $2 ORDER BY sequence DESC LIMIT $3";

/// A statement that finds the aggregate by its id, which is the last parameter, or by its type and key, the last two.
#[derive(Debug)]
struct ByTarget {
    by_id: Sql,
    by_key: Sql,
}

impl ByTarget {
    fn new(schema: &Schema, text: &str, first: &[Type]) -> Self {
        let text = text.replace("{event_columns}", EVENT_COLUMNS);
        let sql = |which: String, last: &[Type]| {
            Sql::new(schema, &text.replace("{which}", &which), &[first, last].concat())
        };
        let (next, after) = (first.len() + 1, first.len() + 2);
        let type_id = format!("(SELECT t.id FROM @aggregate_types t WHERE t.name = ${next})");
        let by_key = format!("a.aggregate_type_id = {type_id} AND a.natural_key = ${after}");
        Self {
            by_id: sql(format!("a.id = ${next}"), &[Type::INT8]),
            by_key: sql(by_key, &[Type::TEXT, Type::TEXT]),
        }
    }
}

/// Reads events of an aggregate in one direction.
#[derive(Debug)]
struct Directed {
    /// [`NAMES_FIRST`], for the first rows of a page.
    with_names: Sql,
    /// For more rows of a page.
    events: Arc<Sql>,
}

/// Reads single aggregates of a store.
#[derive(Debug)]
pub(crate) struct Loader {
    pools: Arc<Pools>,
    names: Arc<Names>,
    /// Each load also reads the end of the log.
    seen: Arc<SeenHead>,
    usual_size: UsualSize,
    from_snapshot: ByTarget,
    from_first: ByTarget,
    forward: Directed,
    backward: Directed,
}

impl Loader {
    pub(crate) fn new(pools: Arc<Pools>, names: Arc<Names>, seen: Arc<SeenHead>) -> Self {
        const NUMBERS: [Type; 4] = [Type::INT8, Type::INT8, Type::INT8, Type::INT8];
        let schema = &pools.settings.schema;
        let events = |text: &str| {
            let text = text.replace("{event_columns}", EVENT_COLUMNS);
            let with_names = Sql::new(schema, &format!("{NAMES_FIRST}{text})"), &NUMBERS);
            Directed { with_names, events: Arc::new(Sql::new(schema, &text, &NUMBERS)) }
        };
        Self {
            from_snapshot: ByTarget::new(schema, FROM_SNAPSHOT, &NUMBERS[..3]),
            from_first: ByTarget::new(schema, FROM_FIRST, &NUMBERS[..1]),
            forward: events(FORWARD),
            backward: events(BACKWARD),
            usual_size: UsualSize::default(),
            pools,
            names,
            seen,
        }
    }

    /// An aggregate, read consistently.
    pub(crate) async fn load(&self, request: &LoadRequest) -> Result<Option<History>> {
        let read = |checkout: Arc<Checkout>| async move {
            self.names.retry(&checkout, |table| self.load_on(&checkout, request, table)).await
        };
        self.pools.read(read).await
    }

    async fn load_on(
        &self,
        checkout: &Checkout,
        request: &LoadRequest,
        table: Arc<NameTable>,
    ) -> Result<Option<History>> {
        let mut page =
            Page::new(&self.usual_size, Source::Checkout(checkout), Arc::clone(&table), request.limit);
        let (asked, known) = (page.ask(), self.seen.get());
        let mut rows = self.send(checkout.sender()?, request, asked).await?;
        let Some(row) = rows.try_next().await? else { return Ok(None) };
        let first = FirstRow::of(&row)?;
        self.seen.found(known, first.log_end);
        if first.names != table.mark() {
            return Err(PostgresError::OtherNames);
        }
        let count = page.take_all(rows, asked).await?;
        let (sequence, mark) = (first.sequence, first.mark);
        let end = sequence.min(request.up_to);
        let rest = range(&self.forward, first.id, (Sequence::ZERO, end));
        page.go_on(rest, asked, count).await?;
        let (events, _) = page.finish();
        let aggregate_type = table.aggregate_type(type_id(first.type_id)?).cloned();
        let unknown = || damaged(format!("an aggregate has the unknown type {}", first.type_id));
        let aggregate_type = aggregate_type.ok_or_else(unknown)?;
        let snapshot = first.snapshot.filter(|snapshot| snapshot.sequence <= sequence);
        Ok(Some(History { id: first.id, aggregate_type, key: first.key, sequence, mark, snapshot, events }))
    }

    async fn send(
        &self,
        sender: Sender<'_>,
        request: &LoadRequest,
        asked: i64,
    ) -> Result<Pin<Box<RowStream>>> {
        let (version, up_to) = (request.snapshot.map_or(-1, i64::from), request.up_to.get());
        let is_all =
            request.snapshot.is_none() && request.up_to == Sequence::MAX && request.limit.max_events() > 0;
        let (sql, mut values) = match is_all {
            true => (&self.from_first, vec![&asked as &(dyn ToSql + Sync)]),
            // No snapshot wanted: a version number that no snapshot has.
            false => (&self.from_snapshot, vec![&version as &(dyn ToSql + Sync), &up_to, &asked]),
        };
        match &request.target {
            Target::Id(id) => {
                let id = id.get();
                values.push(&id);
                sender.ready(&sql.by_id).await?.stream(&values).await
            }
            Target::Key(aggregate_type, key) => {
                let (name, key) = (aggregate_type.as_str(), key.as_str());
                values.extend([&name as &(dyn ToSql + Sync), &key]);
                sender.ready(&sql.by_key).await?.stream(&values).await
            }
        }
    }

    /// A page of one aggregate's events.
    pub(crate) async fn read(&self, query: &AggregateQuery) -> Result<Events> {
        let read = |checkout: Arc<Checkout>| async move {
            self.names.retry(&checkout, |table| self.read_on(&checkout, query, table)).await
        };
        self.pools.read(read).await
    }

    async fn read_on(
        &self,
        checkout: &Checkout,
        query: &AggregateQuery,
        table: Arc<NameTable>,
    ) -> Result<Events> {
        let mut page =
            Page::new(&self.usual_size, Source::Checkout(checkout), Arc::clone(&table), query.limit);
        let directed = match query.direction {
            Direction::Forward => &self.forward,
            Direction::Backward => &self.backward,
        };
        let range = range(directed, query.aggregate, (query.from, query.to));
        let (ready, asked) = (checkout.sender()?.ready(&directed.with_names).await?, page.ask());
        let mut rows = ready.stream(&range.values(&asked)).await?;
        let Some(row) = rows.try_next().await? else { return Err(damaged("log_end has no row")) };
        if names_mark(&row)? != table.mark() {
            return Err(PostgresError::OtherNames);
        }
        let count = page.take_all(rows, asked).await?;
        page.go_on(range, asked, count).await?;
        Ok(page.finish().0)
    }
}

/// The first row of a history: the aggregate without its events.
struct FirstRow {
    id: AggregateId,
    type_id: i32,
    key: Option<Key>,
    /// The sequence of its last event, zero if it has none.
    sequence: Sequence,
    /// The mark of its last event.
    mark: Option<Mark>,
    snapshot: Option<Snapshot>,
    /// The mark of the names.
    names: Mark,
    log_end: Position,
}

impl FirstRow {
    fn of(row: &Row) -> Result<Self> {
        let names = names_mark(row)?;
        Ok(Self {
            id: AggregateId::new(row.try_get(1)?).map_err(damaged)?,
            type_id: row.try_get(3)?,
            key: row.try_get::<_, Option<&str>>(7)?.map(Key::new).transpose().map_err(damaged)?,
            sequence: Sequence::new(row.try_get(2)?).map_err(damaged)?,
            mark: mark(row, 9)?,
            snapshot: snapshot(row)?,
            names,
            log_end: Position::new(row.try_get(0)?).map_err(damaged)?,
        })
    }
}

fn range(directed: &Directed, id: AggregateId, (from, to): (Sequence, Sequence)) -> Range {
    let (sql, rest): (_, Rest) = (Arc::clone(&directed.events), vec![Box::new(id.get())]);
    Range { sql, order: Order::Sequence, from: from.get(), to: to.get(), rest }
}

/// The mark of the names in a first row. Headers of events are no numbers.
fn names_mark(row: &Row) -> Result<Mark> {
    let first = || damaged("the server sent the events of an aggregate before the first row");
    mark(row, 10).ok().flatten().ok_or_else(first)
}

fn mark(row: &Row, column: usize) -> Result<Option<Mark>> {
    let text = row.try_get::<_, Option<&str>>(column)?;
    text.map(|text| text.parse().map(Mark::new).map_err(damaged)).transpose()
}

fn snapshot(row: &Row) -> Result<Option<Snapshot>> {
    let Some(sequence) = row.try_get::<_, Option<i64>>(4)? else { return Ok(None) };
    Ok(Some(Snapshot {
        sequence: Sequence::new(sequence).map_err(damaged)?,
        version: u32::try_from(row.try_get::<_, i64>(5)?).map_err(damaged)?,
        state: Payload::new(row.try_get::<_, &[u8]>(6)?).map_err(damaged)?,
    }))
}

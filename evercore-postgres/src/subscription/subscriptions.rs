//! The cursors of subscriptions, and the events that were parked: each step is one transaction, by the server's clock.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use evercore_core::{
    Advance, AggregateId, BoxFuture, Cursor, CursorId, CursorStatus, Cursors, Error, ErrorKind, Failure,
    Mark, OwnerId, Parked, ParkedChange, Position, Result as CoreResult, Step, SubscriptionName,
    SubscriptionStorage, Taken, Timestamp,
};
use futures_lite::future::{poll_fn, zip};
use tokio::time::{Instant, sleep};
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use crate::connection::pool::Lent;
use crate::connection::task::in_task;
use crate::engine::PostgresEngine;
use crate::error::{Because, Result, damaged, is_rolled_back};
use crate::read::rows::Rest;
use crate::sql::{LOCK_LOG_END, Ready, Schema, Sender, Sql, begin};
use crate::store::Store;

/// How often to look again when another has made the same cursor first, or has removed it again.
const ATTEMPTS: usize = 3;

/// How long a claim looks again at a cursor that somebody has in hand: a step is over by then, a handler is at work.
const STEP_OF_ANOTHER: Duration = Duration::from_millis(100);

macro_rules! cursor_columns {
    () => {
        "subscription, version, partition, partitions, position, epoch, owner, expires_at, wanted_by, wanted_until, \
         live_from, status, failed_position, failed_attempts, failed_error, parked_changes"
    };
}

macro_rules! parked_columns {
    () => {
        "position, aggregate_id, holds_back, attempts, error, parked_at, is_due"
    };
}

macro_rules! of_cursor {
    () => {
        " WHERE subscription = $1 AND version = $2 AND partition = $3"
    };
}

/// Each move leaves a dead version of the row, which stays as long as somebody holds an older snapshot. Its revision grows
/// with each move and comes first in the index, so the live version is found without a look at the dead ones. `>=` also
/// holds if another step has moved the cursor while this one waited for it.
macro_rules! this_cursor {
    () => {
        concat!(
            of_cursor!(),
            " AND revision >= (SELECT max(c.revision) FROM @cursors c
                WHERE c.subscription = $1 AND c.version = $2 AND c.partition = $3)"
        )
    };
}

macro_rules! server_time {
    () => {
        "(extract(epoch FROM pg_catalog.clock_timestamp())::numeric * 1000000::numeric)::bigint"
    };
}

const BEHIND: &str = concat!(
    "SELECT (SELECT max(l.position) FROM @log_end l WHERE l.position >= 0) - position FROM @cursors",
    this_cursor!(),
    " AND status = 0"
);

const HOLD: &str = concat!("SELECT ", cursor_columns!(), " FROM @cursors", this_cursor!(), " FOR UPDATE");

/// Does not wait for whoever has the cursor in hand.
const HOLD_IF_FREE: &str =
    concat!("SELECT ", cursor_columns!(), " FROM @cursors", this_cursor!(), " FOR UPDATE SKIP LOCKED");

/// A statement behind the lock: within one, the clock may be read before the wait.
const LOOK: &str = concat!(
    "SELECT ",
    server_time!(),
    ", (SELECT max(revision) FROM @cursors",
    of_cursor!(),
    ") IS NOT NULL, (SELECT e.mark FROM @events e WHERE e.position >= $4 ORDER BY e.position LIMIT 1)"
);

/// Leaves alone what another has made meanwhile.
const MAKE: &str = concat!(
    "INSERT INTO @cursors (",
    cursor_columns!(),
    ", revision) SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, 0 \
     WHERE (SELECT max(revision) FROM @cursors",
    of_cursor!(),
    ") IS NULL RETURNING position"
);

const MOVE: &str = concat!(
    "UPDATE @cursors SET partitions = $4, position = $5, epoch = $6, owner = $7, expires_at = $8, wanted_by = $9, \
         wanted_until = $10, live_from = $11, status = $12, failed_position = $13, failed_attempts = $14, \
         failed_error = $15, parked_changes = $16, revision = revision + 1",
    this_cursor!(),
    " RETURNING position"
);

/// What most steps are, in one statement: [`Step::take`] of a move that changes no parked event. It finds nothing where
/// that would be refused, and the long way tells why.
const ADVANCE: &str = concat!(
    "UPDATE @cursors SET revision = revision + 1, position = $7, expires_at = least(",
    server_time!(),
    " + $8, $9),
         failed_position = CASE WHEN failed_position > $7 THEN failed_position END,
         failed_attempts = CASE WHEN failed_position > $7 THEN failed_attempts END,
         failed_error = CASE WHEN failed_position > $7 THEN failed_error END",
    this_cursor!(),
    " AND owner = $4 AND epoch = $5 AND status <> 2 AND position = $6 AND $7 >= $6
         AND (SELECT coalesce($11, e.mark) = e.mark FROM @events e WHERE e.position >= $10 ORDER BY e.position LIMIT 1) RETURNING ",
    cursor_columns!()
);

const REMOVE: &str = concat!("DELETE FROM @cursors", this_cursor!(), " RETURNING position");

const KEEP: &str = concat!(
    "INSERT INTO @parked_events (subscription, version, partition, ",
    parked_columns!(),
    ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
     ON CONFLICT (subscription, version, partition, position) DO UPDATE
     SET aggregate_id = excluded.aggregate_id, holds_back = excluded.holds_back, attempts = excluded.attempts,
         error = excluded.error, parked_at = excluded.parked_at, is_due = excluded.is_due"
);

const FORGET: &str =
    concat!("DELETE FROM @parked_events", of_cursor!(), " AND ($4::bigint IS NULL OR position = $4)");

const DUE: &str = concat!(
    "UPDATE @parked_events SET is_due = true",
    of_cursor!(),
    " AND ($4::bigint IS NULL OR position = $4)"
);

const PARKED: &str = concat!(
    "SELECT ",
    parked_columns!(),
    " FROM @parked_events",
    of_cursor!(),
    " AND position > $4 ORDER BY position LIMIT $5"
);

/// From one cursor to the next along the index, which has the live version of each first: the dead ones are stepped over.
/// No name is empty: said so that the index is gone along.
const ALL: &str = concat!(
    "WITH RECURSIVE newest AS ((SELECT ",
    cursor_columns!(),
    " FROM @cursors WHERE subscription > '' ORDER BY subscription, version, partition, revision DESC LIMIT 1)
     UNION ALL SELECT n.* FROM newest p CROSS JOIN LATERAL (SELECT ",
    cursor_columns!(),
    " FROM @cursors WHERE (subscription, version, partition) > (p.subscription, p.version, p.partition)
       ORDER BY subscription, version, partition, revision DESC LIMIT 1) AS n)
     SELECT * FROM newest"
);

const OF_ONE: &str = concat!(
    "WITH RECURSIVE newest AS ((SELECT ",
    cursor_columns!(),
    " FROM @cursors WHERE subscription = $1 ORDER BY version, partition, revision DESC LIMIT 1)
     UNION ALL SELECT n.* FROM newest p CROSS JOIN LATERAL (SELECT ",
    cursor_columns!(),
    " FROM @cursors WHERE subscription = $1 AND (version, partition) > (p.version, p.partition)
       ORDER BY version, partition, revision DESC LIMIT 1) AS n)
     SELECT * FROM newest"
);

/// The statements of this room.
#[derive(Debug)]
pub(crate) struct SubscriptionSql {
    hold: Sql,
    behind: Sql,
    hold_if_free: Sql,
    look: Sql,
    /// Cursors are made one after the other, under the lock of the log's end. The next statement sees what was made meanwhile.
    before_make: Sql,
    make: Sql,
    /// Moves the cursor.
    put: Sql,
    advance: Sql,
    remove: Sql,
    keep: Sql,
    forget: Sql,
    due: Sql,
    parked: Sql,
    all: Sql,
    of_one: Sql,
    now: Sql,
}

impl SubscriptionSql {
    pub(crate) fn new(schema: &Schema) -> Self {
        const N: Type = Type::INT8;
        const T: Type = Type::TEXT;
        const B: Type = Type::BOOL;
        const ID: [Type; 3] = [T, N, N];
        const CURSOR: [Type; 16] = [T, N, N, N, N, N, T, N, T, N, N, Type::INT4, N, N, T, N];
        const EVENT: [Type; 10] = [T, N, N, N, N, B, N, T, N, B];
        let sql = |text: &str, types: &[Type]| Sql::new(schema, text, types);
        Self {
            hold: sql(HOLD, &ID),
            behind: sql(BEHIND, &ID),
            hold_if_free: sql(HOLD_IF_FREE, &ID),
            look: sql(LOOK, &[T, N, N, N]),
            before_make: sql(LOCK_LOG_END, &[]),
            make: sql(MAKE, &CURSOR),
            put: sql(MOVE, &CURSOR),
            advance: sql(ADVANCE, &[T, N, N, T, N, N, N, N, N, N, N]),
            remove: sql(REMOVE, &ID),
            keep: sql(KEEP, &EVENT),
            forget: sql(FORGET, &[T, N, N, N]),
            due: sql(DUE, &[T, N, N, N]),
            parked: sql(PARKED, &[T, N, N, N, N]),
            all: sql(ALL, &[]),
            of_one: sql(OF_ONE, &[T]),
            now: sql(concat!("SELECT ", server_time!()), &[]),
        }
    }
}

/// All of it in tasks: whoever asks and is then not polled keeps no connection from others.
impl SubscriptionStorage for PostgresEngine {
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, CoreResult<Option<Cursor>>> {
        Box::pin(async move {
            self.store().check_writable()?;
            let (store, id, step) = (Arc::clone(self.store()), id.clone(), step.clone());
            Ok(in_task(async move { self::step(&store, &id, &step).await }).await??)
        })
    }

    fn cursors<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, CoreResult<Cursors>> {
        Box::pin(async move {
            let (store, of) = (Arc::clone(self.store()), of.cloned());
            Ok(in_task(async move { self::cursors(&store, of.as_ref()).await }).await??)
        })
    }

    fn parked<'a>(
        &'a self,
        id: &'a CursorId,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, CoreResult<Vec<Parked>>> {
        Box::pin(async move {
            let (store, id) = (Arc::clone(self.store()), id.clone());
            Ok(in_task(async move { self::parked(&store, &id, after, limit).await }).await??)
        })
    }
}

async fn cursors(store: &Store, of: Option<&SubscriptionName>) -> Result<Cursors> {
    store.read(|lent| async move { cursors_on(store, &lent, of).await }).await
}

async fn cursors_on(store: &Store, lent: &Lent, of: Option<&SubscriptionName>) -> Result<Cursors> {
    let (sender, sql) = (lent.sender()?, &store.sql.subscriptions);
    let now = sender.ready(&sql.now).await?;
    let list = sender.ready(if of.is_some() { &sql.of_one } else { &sql.all }).await?;
    let name = of.map(SubscriptionName::as_str);
    let values: &[&(dyn ToSql + Sync)] = if of.is_some() { &[&name] } else { &[] };
    let (rows, now) = zip(list.rows(values), now.rows(&[])).await;
    let mut cursors: Vec<Cursor> = rows?.iter().map(read_cursor).collect::<Result<_>>()?;
    cursors.sort_unstable_by(|one, other| one.id.cmp(&other.id));
    Ok(Cursors { cursors, now: time_of(&now?)? })
}

async fn parked(store: &Store, id: &CursorId, after: Position, limit: usize) -> Result<Vec<Parked>> {
    store.read(|lent| async move { parked_on(store, &lent, id, after, limit).await }).await
}

async fn parked_on(
    store: &Store,
    lent: &Lent,
    id: &CursorId,
    after: Position,
    limit: usize,
) -> Result<Vec<Parked>> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut values = values_of(id);
    values.extend([Box::new(after.get()) as Value, Box::new(limit)]);
    let rows = lent.sender()?.rows(&store.sql.subscriptions.parked, &borrowed(&values)).await?;
    rows.iter().map(read_parked).collect()
}

/// Takes a step in a transaction of its own.
pub(crate) async fn step(store: &Store, id: &CursorId, step: &Step) -> Result<Option<Cursor>> {
    let looks_at = step.looks_at();
    if let Step::Advance(advance) = step
        && looks_at >= advance.to
        && advance.parked.is_empty()
        && advance.parked_seen.is_none()
        && let Some(cursor) = store.again_if_stale(|| advance_alone(store, id, advance, looks_at)).await?
    {
        return Ok(Some(cursor));
    }
    let until = Instant::now() + STEP_OF_ANOTHER;
    let mut met = 0;
    while met < ATTEMPTS {
        match store.again_if_stale(|| step_once(store, id, step)).await? {
            Stepped::To(cursor) => return Ok(cursor),
            Stepped::Met => met += 1,
            Stepped::Held if Instant::now() < until => sleep(STEP_OF_ANOTHER / 10).await,
            Stepped::Held => return Err(Error::already_owned(id).into()),
        }
    }
    let message = "the step met others again and again, and nothing was written";
    Err(Error::new(ErrorKind::Unavailable, message).into())
}

/// A move in one statement; `None` if it is to be refused.
async fn advance_alone(
    store: &Store,
    id: &CursorId,
    advance: &Advance,
    looks_at: Position,
) -> Result<Option<Cursor>> {
    let lent = Lent::to_write(store).await?;
    let ready = store.in_time(lent.sender()?.ready(&store.sql.subscriptions.advance)).await?;
    let time = i64::try_from(advance.time.as_micros()).unwrap_or(i64::MAX / 4).min(i64::MAX / 4);
    let mut values = values_of(id);
    values.extend([
        Box::new(advance.lease.owner.as_str().to_owned()) as Value,
        Box::new(advance.lease.epoch),
        Box::new(advance.from.get()),
        Box::new(advance.to.get()),
        Box::new(time),
        Box::new(Timestamp::MAX.as_micros()),
        Box::new(looks_at.get()),
        Box::new(advance.read.map(|read| read.mark.get())),
    ]);
    let values = borrowed(&values);
    let doubt = store.heard.before_commit();
    match tokio::time::timeout(store.patience(), ready.write(&store.settings, &values))
        .await
        .map(|rows| doubt.settle_rows(rows))
    {
        Ok(Ok(rows)) => {
            let cursor = rows.first().map(read_cursor).transpose()?;
            lent.put_back();
            Ok(cursor)
        }
        Ok(Err(error)) if is_rolled_back(&error) => Err(error),
        Ok(Err(error)) => Err(unknown().because(error).into()),
        Err(_) => Err(unknown().into()),
    }
}

/// What came of a try.
enum Stepped {
    /// The cursor is like this now.
    To(Option<Cursor>),
    /// Another has made the cursor meanwhile; nothing was written.
    Met,
    /// Another has the cursor in hand, and a claim does not wait for that.
    Held,
}

async fn step_once(store: &Store, id: &CursorId, step: &Step) -> Result<Stepped> {
    let lent = Lent::to_write(store).await?;
    let sender = lent.sender()?;
    let begin = begin(&store.settings);
    let held =
        store.in_time(hold(store, sender, id, (step.is_claim(), step.looks_at()), Some(&begin))).await?;
    if held.is_held_by_another(step) {
        return roll_back(store, lent, Ok(Stepped::Held)).await;
    }
    let writes = step
        .take(id, held.cursor.clone(), held.now, held.found)
        .map(|taken| (Writes::of(store, id, &held, &taken), taken));
    let (writes, taken) = match writes {
        Ok((writes, taken)) if !writes.statements.is_empty() => (writes, taken),
        nothing => {
            let outcome = nothing.map(|(_, taken)| Stepped::To(taken.cursor));
            return roll_back(store, lent, outcome.map_err(Into::into)).await;
        }
    };
    // Until here nothing was sent that writes.
    let stepped = writes.commit(store, sender).await?;
    lent.put_back();
    Ok(if stepped { Stepped::To(taken.cursor) } else { Stepped::Met })
}

/// Ends a transaction that wrote nothing.
async fn roll_back(store: &Store, lent: Lent, outcome: Result<Stepped>) -> Result<Stepped> {
    let ended = store.in_time(async { Ok(lent.sender()?.client.batch_execute("ROLLBACK").await?) }).await;
    if ended.is_ok() {
        lent.put_back();
    }
    outcome
}

/// Takes a step within a transaction that is open; its outcome lasts if that is committed.
pub(crate) async fn step_within(
    store: &Store,
    sender: Sender<'_>,
    id: &CursorId,
    step: &Step,
) -> Result<Option<Cursor>> {
    let held = hold(store, sender, id, (step.is_claim(), step.looks_at()), None).await?;
    if held.is_held_by_another(step) {
        return Err(Error::already_owned(id).into());
    }
    let taken = step.take(id, held.cursor.clone(), held.now, held.found)?;
    Writes::of(store, id, &held, &taken).send(sender).await?;
    Ok(taken.cursor)
}

/// A cursor that nobody else can change until the transaction ends.
pub(crate) struct Held {
    pub(crate) cursor: Option<Cursor>,
    /// Whether there is one, be it in other hands.
    is_there: bool,
    now: Timestamp,
    /// The mark of the event that was to be looked at.
    found: Option<Mark>,
}

impl Held {
    fn is_held_by_another(&self, step: &Step) -> bool {
        step.is_claim() && self.cursor.is_none() && self.is_there
    }
}

/// How many events come after an active cursor; 0 if there is none.
pub(crate) async fn behind(store: &Store, lent: &Lent, id: &CursorId) -> Result<i64> {
    let row = lent.sender()?.row(&store.sql.subscriptions.behind, &borrowed(&values_of(id))).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?.unwrap_or(0))
}

/// Locks and reads a cursor, and then the server's clock, in one round trip.
pub(crate) async fn hold(
    store: &Store,
    sender: Sender<'_>,
    id: &CursorId,
    (is_claim, looks_at): (bool, Position),
    begin: Option<&str>,
) -> Result<Held> {
    let sql = &store.sql.subscriptions;
    let hold = sender.ready(if is_claim { &sql.hold_if_free } else { &sql.hold }).await?;
    let look = sender.ready(&sql.look).await?;
    let looks_at = looks_at.get();
    let values = values_of(id);
    let values = borrowed(&values);
    let looking: Vec<&(dyn ToSql + Sync)> =
        values.iter().copied().chain([&looks_at as &(dyn ToSql + Sync)]).collect();
    let begun = async {
        match begin {
            Some(begin) => sender.client.batch_execute(begin).await,
            None => Ok(()),
        }
    };
    let (begun, (rows, looked)) = zip(begun, zip(hold.rows(&values), look.rows(&looking))).await;
    begun?;
    let cursor = rows?.first().map(read_cursor).transpose()?;
    let looked = looked?;
    let looked = looked.first().ok_or_else(|| damaged("the server's clock is missing"))?;
    let found: Option<i64> = looked.try_get(2)?;
    Ok(Held { cursor, is_there: looked.try_get(1)?, now: time(looked, 0)?, found: found.map(Mark::new) })
}

/// What a step writes: statements with their values.
pub(crate) struct Writes<'a> {
    statements: Vec<(&'a Sql, Rest)>,
    /// Which of them writes the cursor.
    of_cursor: usize,
}

impl<'a> Writes<'a> {
    fn of(store: &'a Store, id: &CursorId, held: &Held, taken: &Taken) -> Self {
        let sql = &store.sql.subscriptions;
        let mut writes = Vec::new();
        match (&held.cursor, &taken.cursor) {
            (None, Some(cursor)) => {
                writes.extend([(&sql.before_make, Rest::new()), (&sql.make, cursor_values(cursor))]);
            }
            (Some(known), Some(cursor)) if known != cursor || !taken.parked.is_empty() => {
                writes.push((&sql.put, cursor_values(cursor)));
            }
            (Some(_), None) => writes.push((&sql.remove, values_of(id))),
            _ => {}
        }
        let of_cursor = writes.len().saturating_sub(1);
        writes.extend(taken.parked.iter().map(|change| parked_write(sql, id, change)));
        Self { statements: writes, of_cursor }
    }

    /// The cursor as it is to be.
    pub(crate) fn put(store: &'a Store, cursor: &Cursor) -> Self {
        Self { statements: vec![(&store.sql.subscriptions.put, cursor_values(cursor))], of_cursor: 0 }
    }

    /// Sends all of it together.
    pub(crate) async fn send(self, sender: Sender<'_>) -> Result<()> {
        match self.rows(&self.ready(sender).await?).await?.get(self.of_cursor) {
            Some(rows) if rows.is_empty() => Err(damaged("a cursor that is held is not there")),
            _ => Ok(()),
        }
    }

    /// Sends all of it together with the COMMIT; `false` if there is a cursor already that was to be made.
    async fn commit(self, store: &Store, sender: Sender<'_>) -> Result<bool> {
        let ready = store.in_time(self.ready(sender)).await?;
        let doubt = store.heard.before_commit();
        let sent = zip(self.rows(&ready), sender.client.batch_execute("COMMIT"));
        let Ok((rows, committed)) = tokio::time::timeout(store.patience(), sent).await else {
            return Err(unknown().into());
        };
        // COMMIT after an error is a rollback, and answers as if all were well.
        let rows = rows.and_then(|rows| committed.map(|()| rows).map_err(Into::into));
        if rows.as_ref().is_ok_and(|rows| rows.get(self.of_cursor).is_some_and(Vec::is_empty)) {
            return Ok(false);
        }
        match doubt.settle(rows) {
            Ok(_) => Ok(true),
            Err(error) if is_rolled_back(&error) => Err(error),
            Err(error) => Err(unknown().because(error).into()),
        }
    }

    async fn ready<'s>(&'s self, sender: Sender<'s>) -> Result<Vec<Ready<'s>>> {
        let mut ready = Vec::with_capacity(self.statements.len());
        for (sql, _) in &self.statements {
            ready.push(sender.ready(sql).await?);
        }
        Ok(ready)
    }

    /// The rows of each, or the first error.
    async fn rows(&self, ready: &[Ready<'_>]) -> Result<Vec<Vec<Row>>> {
        let values: Vec<_> = self.statements.iter().map(|(_, values)| borrowed(values)).collect();
        let rows = ready.iter().zip(&values).map(|(ready, values)| Box::pin(ready.rows(values)) as _);
        in_order(rows.collect()).await.into_iter().collect()
    }
}

fn unknown() -> Error {
    Error::new(ErrorKind::OutcomeUnknown, "whether the step took effect is not known")
}

fn parked_write<'a>(sql: &'a SubscriptionSql, id: &CursorId, change: &ParkedChange) -> (&'a Sql, Rest) {
    let mut values = values_of(id);
    let which = |position: Option<Position>| Box::new(position.map(Position::get)) as Value;
    let sql = match change {
        ParkedChange::Keep(event) => {
            values.extend([
                Box::new(event.position.get()) as Value,
                Box::new(event.aggregate.get()),
                Box::new(event.holds_back),
                Box::new(i64::from(event.attempts)),
                Box::new(event.error.clone()),
                Box::new(event.parked_at.as_micros()),
                Box::new(event.is_due),
            ]);
            &sql.keep
        }
        ParkedChange::Due(position) => {
            values.push(which(*position));
            &sql.due
        }
        ParkedChange::Remove(position) => {
            values.push(which(Some(*position)));
            &sql.forget
        }
        _ => {
            values.push(which(None));
            &sql.forget
        }
    };
    (sql, values)
}

/// Begins all in this order, so that they are sent in it, and only then waits for the first answer.
async fn in_order<T>(work: Vec<BoxFuture<'_, T>>) -> Vec<T> {
    let mut work: Vec<_> = work.into_iter().map(|future| (future, None)).collect();
    poll_fn(|context| {
        let mut is_done = true;
        for (future, outcome) in work.iter_mut().filter(|(_, outcome)| outcome.is_none()) {
            match future.as_mut().poll(context) {
                Poll::Ready(value) => *outcome = Some(value),
                Poll::Pending => is_done = false,
            }
        }
        if is_done { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    work.into_iter().filter_map(|(_, outcome)| outcome).collect()
}

type Value = Box<dyn ToSql + Sync + Send>;

fn borrowed(values: &Rest) -> Vec<&(dyn ToSql + Sync)> {
    values.iter().map(|value| &**value as &(dyn ToSql + Sync)).collect()
}

fn values_of(id: &CursorId) -> Rest {
    vec![
        Box::new(id.subscription.as_str().to_owned()),
        Box::new(i64::from(id.version)),
        Box::new(i64::from(id.partition)),
    ]
}

/// In the order of the columns.
fn cursor_values(cursor: &Cursor) -> Rest {
    let owner = |owner: &Option<OwnerId>| Box::new(owner.as_ref().map(|owner| owner.as_str().to_owned()));
    let failure = cursor.failure.as_ref();
    let mut values = values_of(&cursor.id);
    values.extend([
        Box::new(i64::from(cursor.partitions)) as Value,
        Box::new(cursor.position.get()),
        Box::new(cursor.epoch),
        owner(&cursor.owner),
        Box::new(cursor.expires_at.as_micros()),
        owner(&cursor.wanted_by),
        Box::new(cursor.wanted_until.as_micros()),
        Box::new(cursor.live_from.map(Position::get)),
        Box::new(cursor.status.code()),
        Box::new(failure.map(|failure| failure.position.get())),
        Box::new(failure.map(|failure| i64::from(failure.attempts))),
        Box::new(failure.map(|failure| failure.error.clone())),
        Box::new(cursor.parked_changes),
    ]);
    values
}

fn read_cursor(row: &Row) -> Result<Cursor> {
    let owner = |column| -> Result<Option<OwnerId>> {
        let name: Option<&str> = row.try_get(column)?;
        name.map(OwnerId::new).transpose().map_err(damaged)
    };
    let failed: Option<i64> = row.try_get(12)?;
    let failure = failed.map(|position| read_failure(row, position)).transpose()?;
    let live_from: Option<i64> = row.try_get(10)?;
    Ok(Cursor {
        id: CursorId {
            subscription: SubscriptionName::new(row.try_get::<_, &str>(0)?).map_err(damaged)?,
            version: small(row, 1)?,
            partition: small(row, 2)?,
        },
        partitions: small(row, 3)?,
        position: Position::new(row.try_get(4)?).map_err(damaged)?,
        epoch: row.try_get(5)?,
        owner: owner(6)?,
        expires_at: time(row, 7)?,
        wanted_by: owner(8)?,
        wanted_until: time(row, 9)?,
        live_from: live_from.map(Position::new).transpose().map_err(damaged)?,
        status: CursorStatus::from_code(row.try_get(11)?).map_err(damaged)?,
        failure,
        parked_changes: row.try_get(15)?,
    })
}

fn read_failure(row: &Row, position: i64) -> Result<Failure> {
    Ok(Failure {
        position: Position::new(position).map_err(damaged)?,
        attempts: small(row, 13)?,
        error: row.try_get(14)?,
    })
}

fn read_parked(row: &Row) -> Result<Parked> {
    Ok(Parked {
        position: Position::new(row.try_get(0)?).map_err(damaged)?,
        aggregate: AggregateId::new(row.try_get(1)?).map_err(damaged)?,
        holds_back: row.try_get(2)?,
        attempts: small(row, 3)?,
        error: row.try_get(4)?,
        parked_at: time(row, 5)?,
        is_due: row.try_get(6)?,
    })
}

fn small(row: &Row, column: usize) -> Result<u32> {
    u32::try_from(row.try_get::<_, i64>(column)?).map_err(damaged)
}

fn time(row: &Row, column: usize) -> Result<Timestamp> {
    Timestamp::from_micros(row.try_get(column)?).map_err(damaged)
}

fn time_of(rows: &[Row]) -> Result<Timestamp> {
    time(rows.first().ok_or_else(|| damaged("the server's clock is missing"))?, 0)
}

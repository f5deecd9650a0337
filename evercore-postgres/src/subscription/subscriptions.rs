//! The cursors of subscriptions and the parked events. Each step is one transaction, and uses the server's clock.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use evercore_core::engine::{
    Advance, Backlog, Backlogs, Changed, Cursors, Mark, ParkedChange, Step, StepOutcome, StoredCursor,
    StoredParked, Subject, SubscriptionChange,
};
use evercore_core::{
    BoxFuture, Cursor, CursorId, Error, ErrorKind, Parked, Position, SubscriptionName, Timestamp,
};
use futures_lite::future::{poll_fn, zip};
use tokio::time::{Instant, sleep};
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use crate::connection::pool::{Checkout, Pools};
use crate::error::{Because, PostgresError, Result, damaged, is_rolled_back, passes};
use crate::read::rows::Rest;
use crate::settings::Schema;
use crate::sql::{LOCK_LOG_END, Ready, Sender, Sql};

/// How often to try a step or a change if others have made or removed cursors meanwhile. One of them succeeds each time,
/// and six processes that start a new version together may each be in the way of each.
const ATTEMPTS: usize = 16;

/// How long a claim keeps trying for a cursor that another transaction holds. A step ends in that time; a longer hold
/// means that a handler is running.
const STEP_OF_ANOTHER: Duration = Duration::from_millis(100);

const CURSOR_COLUMNS: &str = "subscription, version, partition, partitions, position, epoch, owner, expires_at, \
     wanted_by, wanted_until, live_from, status, failed_position, failed_attempts, failed_error, parked_changes, is_held, \
     lost_leases";

const PARKED_COLUMNS: &str = "position, aggregate_id, holds_back, attempts, error, parked_at, is_due";

const OF_CURSOR: &str = " WHERE subscription = $1 AND version = $2 AND partition = $3";

/// Each move leaves a dead version of the row, which stays while any transaction has an older snapshot. The revision
/// grows with each move, and the index has the largest one first, so the server finds the live version without reading
/// the dead ones. `>=` still matches if another step has moved the cursor while this one waited for it.
const THIS_CURSOR: &str = "{of_cursor} AND revision >= (SELECT max(c.revision) FROM @cursors c
    WHERE c.subscription = $1 AND c.version = $2 AND c.partition = $3)";

const SERVER_TIME: &str =
    "(extract(epoch FROM pg_catalog.clock_timestamp())::numeric * 1000000::numeric)::bigint";

/// Fills in the parts that several statements share.
fn sql(schema: &Schema, text: &str, types: &[Type]) -> Sql {
    let text = text.replace("{this_cursor}", THIS_CURSOR).replace("{of_cursor}", OF_CURSOR);
    let text = text.replace("{keys}", KEYS);
    let text = text.replace("{cursor_columns}", CURSOR_COLUMNS).replace("{parked_columns}", PARKED_COLUMNS);
    Sql::new(schema, &text.replace("{server_time}", SERVER_TIME), types)
}

const BEHIND: &str = "SELECT (SELECT max(l.position) FROM @log_end l WHERE l.position >= 0) - position FROM @cursors{this_cursor} AND status = 0";

const HOLD: &str = "SELECT {cursor_columns} FROM @cursors{this_cursor} FOR UPDATE";

/// Does not wait for a transaction that holds the cursor.
const HOLD_IF_FREE: &str = "SELECT {cursor_columns} FROM @cursors{this_cursor} FOR UPDATE SKIP LOCKED";

/// Sent after the lock, as a separate statement: the locking statement could read the clock before it waits.
const CLOCK_AND_MARK: &str = "SELECT {server_time}, (SELECT max(revision) FROM @cursors{of_cursor}) IS NOT NULL, (SELECT e.mark FROM @events e WHERE e.position >= $4 ORDER BY e.position LIMIT 1)";

/// Does nothing if another caller has made the cursor meanwhile.
const MAKE: &str = "INSERT INTO @cursors ({cursor_columns}, revision) SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, 0 \
     WHERE (SELECT max(revision) FROM @cursors{of_cursor}) IS NULL RETURNING position";

const MOVE: &str = "UPDATE @cursors SET partitions = $4, position = $5, epoch = $6, owner = $7, expires_at = $8, wanted_by = $9, \
         wanted_until = $10, live_from = $11, status = $12, failed_position = $13, failed_attempts = $14, \
         failed_error = $15, parked_changes = $16, is_held = $17, lost_leases = $18, revision = revision + 1{this_cursor} RETURNING position";

/// The most frequent step in one statement: [`Step::take`] of an advance that changes no parked event. It updates no
/// row if the step would be refused. The step is then taken the long way, which finds the reason.
const ADVANCE: &str = "UPDATE @cursors SET revision = revision + 1, position = $7, expires_at = least({server_time} + $8, $9), lost_leases = 0,
         failed_position = CASE WHEN failed_position > $7 THEN failed_position END,
         failed_attempts = CASE WHEN failed_position > $7 THEN failed_attempts END,
         failed_error = CASE WHEN failed_position > $7 THEN failed_error END{this_cursor} AND owner = $4 AND epoch = $5 AND status <> 2 AND position = $6 AND $7 >= $6
         AND (SELECT coalesce($11, e.mark) = e.mark FROM @events e WHERE e.position >= $10 ORDER BY e.position LIMIT 1) RETURNING {cursor_columns}";

const REMOVE: &str = "DELETE FROM @cursors{this_cursor} RETURNING position";

const KEEP: &str = "INSERT INTO @parked_events (subscription, version, partition, {parked_columns}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
     ON CONFLICT (subscription, version, partition, position) DO UPDATE
     SET aggregate_id = excluded.aggregate_id, holds_back = excluded.holds_back, attempts = excluded.attempts,
         error = excluded.error, parked_at = excluded.parked_at, is_due = excluded.is_due";

const FORGET: &str = "DELETE FROM @parked_events{of_cursor} AND ($4::bigint IS NULL OR position = $4)";

const DUE: &str =
    "UPDATE @parked_events SET is_due = true{of_cursor} AND ($4::bigint IS NULL OR position = $4)";

const PARKED: &str =
    "SELECT {parked_columns} FROM @parked_events{of_cursor} AND position > $4 ORDER BY position LIMIT $5";

/// Goes from one cursor to the next along the index, which has the live version of each cursor first, so it skips the
/// dead ones. The condition that no name is empty makes the server use the index.
const ALL: &str = "WITH RECURSIVE newest AS ((SELECT {cursor_columns} FROM @cursors WHERE subscription > '' ORDER BY subscription, version, partition, revision DESC LIMIT 1)
     UNION ALL SELECT n.* FROM newest p CROSS JOIN LATERAL (SELECT {cursor_columns} FROM @cursors WHERE (subscription, version, partition) > (p.subscription, p.version, p.partition)
       ORDER BY subscription, version, partition, revision DESC LIMIT 1) AS n)";

const OF_ONE: &str = "WITH RECURSIVE newest AS ((SELECT {cursor_columns} FROM @cursors WHERE subscription = $1 ORDER BY version, partition, revision DESC LIMIT 1)
     UNION ALL SELECT n.* FROM newest p CROSS JOIN LATERAL (SELECT {cursor_columns} FROM @cursors WHERE subscription = $1 AND (version, partition) > (p.version, p.partition)
       ORDER BY version, partition, revision DESC LIMIT 1) AS n)";

/// The cursors that [`ALL`] or [`OF_ONE`] finds.
const NEWEST: &str = " SELECT * FROM newest";

/// The same cursors, with their backlogs.
const BACKLOGS: &str = " SELECT n.*, (SELECT e.recorded_at FROM @events e WHERE e.position > n.position ORDER BY e.position LIMIT 1)
         AS next_recorded_at, p.parked, p.oldest_parked_at
     FROM newest n CROSS JOIN LATERAL (
       SELECT pg_catalog.count(*) AS parked, pg_catalog.min(p.parked_at) AS oldest_parked_at FROM @parked_events p
       WHERE p.subscription = n.subscription AND p.version = n.version AND p.partition = n.partition) AS p";

const HEAD_AND_CLOCK: &str =
    "SELECT {server_time}, coalesce((SELECT max(l.position) FROM @log_end l WHERE l.position >= 0), 0)";

/// The newest live row of each cursor of a subscription.
const KEYS: &str = "WITH RECURSIVE newest AS ((SELECT version, partition, revision FROM @cursors WHERE subscription = $1 ORDER BY version, partition, revision DESC LIMIT 1)
     UNION ALL SELECT n.* FROM newest p CROSS JOIN LATERAL (SELECT version, partition, revision FROM @cursors WHERE subscription = $1 AND (version, partition) > (p.version, p.partition)
       ORDER BY version, partition, revision DESC LIMIT 1) AS n)";

/// Locks all cursors of a subscription, one after the other in order of their ids. `>=` as in [`THIS_CURSOR`].
const HOLD_ALL: &str = "{keys}
     SELECT c.* FROM newest n CROSS JOIN LATERAL (SELECT {cursor_columns} FROM @cursors WHERE subscription = $1
       AND version = n.version AND partition = n.partition AND revision >= n.revision FOR UPDATE{skip}) AS c";

/// Sent after the locks, as a separate statement: it sees the cursors that others have made or removed before.
const CLOCK_AND_COUNT: &str = "{keys} SELECT {server_time}, (SELECT pg_catalog.count(*) FROM newest), (SELECT max(l.position) FROM @log_end l WHERE l.position >= 0)";

const COUNT: &str = "{keys} SELECT pg_catalog.count(*) FROM newest";

const COUNT_PARKED: &str =
    "{keys} SELECT n.version, n.partition, (SELECT pg_catalog.count(*) FROM @parked_events p
     WHERE p.subscription = $1 AND p.version = n.version AND p.partition = n.partition) FROM newest n";

/// The statements of this module.
#[derive(Debug)]
struct SubscriptionSql {
    hold: Sql,
    behind: Sql,
    hold_if_free: Sql,
    clock_and_mark: Sql,
    /// Locks the log's end, so that cursors are made one at a time. The next statement sees those made meanwhile.
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
    backlogs: Sql,
    backlogs_of_one: Sql,
    now: Sql,
    hold_all: Sql,
    hold_all_if_free: Sql,
    clock_and_count: Sql,
    count: Sql,
    count_parked: Sql,
    head_and_clock: Sql,
}

impl SubscriptionSql {
    fn new(schema: &Schema) -> Self {
        const N: Type = Type::INT8;
        const T: Type = Type::TEXT;
        const B: Type = Type::BOOL;
        const ID: [Type; 3] = [T, N, N];
        const CURSOR: [Type; 18] = [T, N, N, N, N, N, T, N, T, N, N, Type::INT4, N, N, T, N, B, N];
        const EVENT: [Type; 10] = [T, N, N, N, N, B, N, T, N, B];
        let sql = |text: &str, types: &[Type]| sql(schema, text, types);
        Self {
            hold: sql(HOLD, &ID),
            behind: sql(BEHIND, &ID),
            hold_if_free: sql(HOLD_IF_FREE, &ID),
            clock_and_mark: sql(CLOCK_AND_MARK, &[T, N, N, N]),
            before_make: sql(LOCK_LOG_END, &[]),
            make: sql(MAKE, &CURSOR),
            put: sql(MOVE, &CURSOR),
            advance: sql(ADVANCE, &[T, N, N, T, N, N, N, N, N, N, N]),
            remove: sql(REMOVE, &ID),
            keep: sql(KEEP, &EVENT),
            forget: sql(FORGET, &[T, N, N, N]),
            due: sql(DUE, &[T, N, N, N]),
            parked: sql(PARKED, &[T, N, N, N, N]),
            all: sql(&[ALL, NEWEST].concat(), &[]),
            of_one: sql(&[OF_ONE, NEWEST].concat(), &[T]),
            backlogs: sql(&[ALL, BACKLOGS].concat(), &[]),
            backlogs_of_one: sql(&[OF_ONE, BACKLOGS].concat(), &[T]),
            now: sql("SELECT {server_time}", &[]),
            hold_all: sql(&HOLD_ALL.replace("{skip}", ""), &[T]),
            hold_all_if_free: sql(&HOLD_ALL.replace("{skip}", " SKIP LOCKED"), &[T]),
            clock_and_count: sql(CLOCK_AND_COUNT, &[T]),
            count: sql(COUNT, &[T]),
            count_parked: sql(COUNT_PARKED, &[T]),
            head_and_clock: sql(HEAD_AND_CLOCK, &[]),
        }
    }
}

/// The cursors of a store.
#[derive(Debug)]
pub(crate) struct CursorStore {
    pools: Arc<Pools>,
    sql: SubscriptionSql,
}

impl CursorStore {
    pub(crate) fn new(pools: Arc<Pools>) -> Self {
        let sql = SubscriptionSql::new(&pools.settings.schema);
        Self { pools, sql }
    }

    /// All cursors, or those of one subscription, with the server's time.
    pub(crate) async fn list(&self, of: Option<&SubscriptionName>) -> Result<Cursors> {
        let read = |checkout: Arc<Checkout>| async move {
            let sender = checkout.sender()?;
            let now = sender.ready(&self.sql.now).await?;
            let list = sender.ready(if of.is_some() { &self.sql.of_one } else { &self.sql.all }).await?;
            let name = of.map(SubscriptionName::as_str);
            let values: &[&(dyn ToSql + Sync)] = if of.is_some() { &[&name] } else { &[] };
            let (rows, now) = zip(list.rows(values), now.rows(&[])).await;
            let mut cursors: Vec<Cursor> = rows?.iter().map(read_cursor).collect::<Result<_>>()?;
            cursors.sort_unstable_by(|one, other| one.id.cmp(&other.id));
            Ok(Cursors { cursors, now: time_of(&now?)? })
        };
        self.pools.read(read).await
    }

    /// The same with their backlogs, and the end of the log. It is read last, so that no cursor seems to be past it.
    pub(crate) async fn backlogs(&self, of: Option<&SubscriptionName>) -> Result<Backlogs> {
        let read = |checkout: Arc<Checkout>| async move {
            let sender = checkout.sender()?;
            let end = sender.ready(&self.sql.head_and_clock).await?;
            let list = sender
                .ready(if of.is_some() { &self.sql.backlogs_of_one } else { &self.sql.backlogs })
                .await?;
            let name = of.map(SubscriptionName::as_str);
            let values: &[&(dyn ToSql + Sync)] = if of.is_some() { &[&name] } else { &[] };
            let (rows, end) = zip(list.rows(values), end.rows(&[])).await;
            let mut backlogs: Vec<Backlog> = rows?.iter().map(read_backlog).collect::<Result<_>>()?;
            backlogs.sort_unstable_by(|one, other| one.cursor.id.cmp(&other.cursor.id));
            let end = end?;
            let row = end.first().ok_or_else(|| damaged("the end of the log is missing"))?;
            let head = Position::new(row.try_get(1)?).map_err(damaged)?;
            Ok(Backlogs { backlogs, head, now: time(row, 0)? })
        };
        self.pools.read(read).await
    }

    /// The parked events of a cursor after a position.
    pub(crate) async fn parked(&self, id: &CursorId, after: Position, limit: usize) -> Result<Vec<Parked>> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut values = values_of(id);
        values.extend([Box::new(after.get()) as Value, Box::new(limit)]);
        let values = &borrowed(&values);
        let read = |checkout: Arc<Checkout>| async move {
            checkout.sender()?.rows(&self.sql.parked, values).await?.iter().map(read_parked).collect()
        };
        self.pools.read(read).await
    }

    /// The number of events after an active cursor; 0 if there is no such cursor.
    pub(crate) async fn behind(&self, id: &CursorId) -> Result<i64> {
        let values = values_of(id);
        let values = &borrowed(&values);
        let read = |checkout: Arc<Checkout>| async move {
            let row = checkout.sender()?.row(&self.sql.behind, values).await?;
            Ok(row.map(|row| row.try_get(0)).transpose()?.unwrap_or(0))
        };
        self.pools.read_for_commit(read).await
    }

    /// Takes a step in its own transaction.
    pub(crate) async fn step(&self, id: &CursorId, step: &Step) -> Result<Option<Cursor>> {
        let looks_at = step.looks_at();
        if let Step::Advance(advance) = step
            && looks_at >= advance.to
            && advance.parked.is_empty()
            && advance.parked_seen.is_none()
            && let Some(cursor) =
                self.pools.again_if_stale(|| self.advance_alone(id, advance, looks_at)).await?
        {
            return Ok(Some(cursor));
        }
        let until = Instant::now() + STEP_OF_ANOTHER;
        let mut conflicts = 0;
        while conflicts < ATTEMPTS {
            match self.pools.again_if_stale(|| self.step_once(id, step)).await? {
                Stepped::To(cursor) => return Ok(cursor),
                Stepped::Conflict => conflicts += 1,
                Stepped::Held if Instant::now() < until => sleep(STEP_OF_ANOTHER / 10).await,
                Stepped::Held => return Err(Error::already_owned(id).into()),
            }
        }
        let message = "others kept making or removing the same cursor, and nothing was written: try again";
        Err(Error::new(ErrorKind::Unavailable, message).into())
    }

    /// Advances a cursor in one statement; `None` if the step would be refused.
    async fn advance_alone(
        &self,
        id: &CursorId,
        advance: &Advance,
        looks_at: Position,
    ) -> Result<Option<Cursor>> {
        let pools = &self.pools;
        let checkout = pools.to_write().await?;
        let ready = pools.in_time(checkout.sender()?.ready(&self.sql.advance)).await?;
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
        let written = pools.notices.write(pools.in_time(ready.write(&pools.settings, &values)));
        let rows = written.await.map_err(unless_rolled_back)?;
        let cursor = rows.first().map(read_cursor).transpose()?;
        checkout.put_back();
        Ok(cursor)
    }

    async fn step_once(&self, id: &CursorId, step: &Step) -> Result<Stepped<Option<Cursor>>> {
        let pools = &self.pools;
        let checkout = pools.to_write().await?;
        let sender = checkout.sender()?;
        let begin = pools.settings.begin();
        let held = pools.in_time(self.hold_for(sender, id, step, Some(&begin))).await?;
        let stepped = if held.is_held_by_another(step) {
            Ok(Stepped::Held)
        } else {
            match step.take(id, held.cursor.clone(), held.now, held.found) {
                Ok(taken) => {
                    let writes = Writes::of(&self.sql, id, &held, &taken);
                    if !writes.is_empty() {
                        // No statement that writes was sent before this one.
                        let is_written = writes.commit(pools, sender).await?;
                        checkout.put_back();
                        return Ok(if is_written { Stepped::To(taken.cursor) } else { Stepped::Conflict });
                    }
                    Ok(Stepped::To(taken.cursor))
                }
                Err(refused) => Err(refused.into()),
            }
        };
        if pools.in_time(sender.execute("ROLLBACK")).await.is_ok() {
            checkout.put_back();
        }
        stepped
    }

    /// Changes several cursors of a subscription in one transaction.
    pub(crate) async fn change(
        &self,
        name: &SubscriptionName,
        change: &SubscriptionChange,
    ) -> Result<Changed> {
        let until = Instant::now() + STEP_OF_ANOTHER;
        let mut conflicts = 0;
        while conflicts < ATTEMPTS {
            match self.pools.again_if_stale(|| self.change_once(name, change)).await {
                Ok(Stepped::To(changed)) => return Ok(changed),
                Ok(Stepped::Conflict) => conflicts += 1,
                Ok(Stepped::Held) if Instant::now() < until => sleep(STEP_OF_ANOTHER / 10).await,
                Ok(Stepped::Held) => return Err(held_by_a_handler(name).into()),
                // A commit that has locked the log's end waits for an inline cursor which this change holds.
                Err(error) if passes(&error) && conflicts + 1 < ATTEMPTS => conflicts += 1,
                Err(error) => return Err(error),
            }
        }
        let message = "others kept making or removing cursors of the same subscription, and nothing was written: try again";
        Err(Error::new(ErrorKind::Unavailable, message).into())
    }

    /// Two round trips. Three if it makes cursors, because the transaction ends only after they were made.
    async fn change_once(
        &self,
        name: &SubscriptionName,
        change: &SubscriptionChange,
    ) -> Result<Stepped<Changed>> {
        let pools = &self.pools;
        let checkout = pools.to_write().await?;
        let sender = checkout.sender()?;
        let stepped = match pools.in_time(self.hold_all(sender, name, change.waits())).await? {
            Some(subject) => match change.take(name, &subject) {
                Ok(outcome) if outcome.writes.is_empty() => Ok(Stepped::To(outcome.changed)),
                Ok(outcome) => {
                    let is_new = |(id, _): &(CursorId, StepOutcome)| {
                        subject.cursors.iter().all(|cursor| cursor.id != *id)
                    };
                    let makes = outcome.writes.iter().any(is_new);
                    let writes = Writes::of_all(&self.sql, name, &subject, &outcome.writes, makes);
                    let count = i64::try_from(subject.cursors.len()).map_err(damaged)?;
                    if makes && !pools.in_time(writes.make(sender, count)).await? {
                        Ok(Stepped::Conflict)
                    } else {
                        let commit = if makes { Writes::none() } else { writes };
                        if !commit.commit(pools, sender).await? {
                            return Err(damaged("a cursor that is held does not exist"));
                        }
                        checkout.put_back();
                        return Ok(Stepped::To(outcome.changed));
                    }
                }
                Err(refused) => Err(refused.into()),
            },
            None if change.waits() => Ok(Stepped::Conflict),
            None => Ok(Stepped::Held),
        };
        if pools.in_time(sender.execute("ROLLBACK")).await.is_ok() {
            checkout.put_back();
        }
        stepped
    }

    /// Begins a transaction, and locks and reads all cursors of a subscription. `None` if others have made or removed one
    /// meanwhile, or hold one and this does not wait.
    async fn hold_all(
        &self,
        sender: Sender<'_>,
        name: &SubscriptionName,
        waits: bool,
    ) -> Result<Option<Subject>> {
        let sql = &self.sql;
        let hold = sender.ready(if waits { &sql.hold_all } else { &sql.hold_all_if_free }).await?;
        let (clock, parked) =
            (sender.ready(&sql.clock_and_count).await?, sender.ready(&sql.count_parked).await?);
        let begin = self.pools.settings.begin();
        let name = name.as_str();
        let values: &[&(dyn ToSql + Sync)] = &[&name];
        let rest = zip(clock.rows(values), parked.rows(values));
        let (begun, (rows, (clock, parked))) =
            zip(sender.begin(Some(&begin)), zip(hold.rows(values), rest)).await;
        begun?;
        let cursors: Vec<Cursor> = rows?.iter().map(read_cursor).collect::<Result<_>>()?;
        let clock = clock?;
        let clock = clock.first().ok_or_else(|| damaged("the server's clock is missing"))?;
        if i64::try_from(cursors.len()).ok() != Some(clock.try_get(1)?) {
            return Ok(None);
        }
        let head: Option<i64> = clock.try_get(2)?;
        let parked = parked?.iter().map(|row| read_count(name, row)).collect::<Result<_>>()?;
        let head = Position::new(head.unwrap_or(0)).map_err(damaged)?;
        Ok(Some(Subject { cursors, parked, now: time(clock, 0)?, head }))
    }

    /// Takes a step within an open transaction.
    pub(crate) async fn step_within(
        &self,
        sender: Sender<'_>,
        id: &CursorId,
        step: &Step,
    ) -> Result<Option<Cursor>> {
        let held = self.hold_for(sender, id, step, None).await?;
        if held.is_held_by_another(step) {
            return Err(Error::already_owned(id).into());
        }
        let taken = step.take(id, held.cursor.clone(), held.now, held.found)?;
        Writes::of(&self.sql, id, &held, &taken).send(sender).await?;
        Ok(taken.cursor)
    }

    /// Locks and reads a cursor within an open transaction.
    pub(crate) async fn hold(&self, sender: Sender<'_>, id: &CursorId) -> Result<Option<Cursor>> {
        Ok(self.lock(sender, id, (&self.sql.hold, Position::ZERO), None).await?.cursor)
    }

    /// Writes a cursor that is held.
    pub(crate) async fn put(&self, sender: Sender<'_>, cursor: &Cursor) -> Result<()> {
        Writes { statements: vec![(&self.sql.put, cursor_values(cursor))], of_cursors: vec![0] }
            .send(sender)
            .await
    }

    async fn hold_for(
        &self,
        sender: Sender<'_>,
        id: &CursorId,
        step: &Step,
        begin: Option<&str>,
    ) -> Result<Held> {
        let hold = if step.is_claim() { &self.sql.hold_if_free } else { &self.sql.hold };
        self.lock(sender, id, (hold, step.looks_at()), begin).await
    }

    /// Locks and reads a cursor, and then the server's clock, in one round trip.
    async fn lock(
        &self,
        sender: Sender<'_>,
        id: &CursorId,
        (hold, looks_at): (&Sql, Position),
        begin: Option<&str>,
    ) -> Result<Held> {
        let (hold, clock) = (sender.ready(hold).await?, sender.ready(&self.sql.clock_and_mark).await?);
        let looks_at = looks_at.get();
        let values = values_of(id);
        let values = borrowed(&values);
        let with_event: Vec<&(dyn ToSql + Sync)> =
            values.iter().copied().chain([&looks_at as &(dyn ToSql + Sync)]).collect();
        let answers = zip(hold.rows(&values), clock.rows(&with_event));
        let (begun, (rows, clock)) = zip(sender.begin(begin), answers).await;
        begun?;
        let cursor = rows?.first().map(read_cursor).transpose()?;
        let clock = clock?;
        let clock = clock.first().ok_or_else(|| damaged("the server's clock is missing"))?;
        let found: Option<i64> = clock.try_get(2)?;
        Ok(Held { cursor, exists: clock.try_get(1)?, now: time(clock, 0)?, found: found.map(Mark::new) })
    }
}

fn held_by_a_handler(name: &SubscriptionName) -> Error {
    let message = format!("a handler works on a cursor of subscription \"{name}\": try again");
    Error::new(ErrorKind::AlreadyOwned, message)
}

/// The outcome of one attempt at a step.
enum Stepped<T> {
    /// The cursor after the step, or the subscription after the change.
    To(T),
    /// Another caller has made the cursor meanwhile. Nothing was written.
    Conflict,
    /// Another caller holds the cursor, and a claim or a take-over does not wait for it.
    Held,
}

/// A cursor that no other transaction can change until this one ends.
struct Held {
    cursor: Option<Cursor>,
    /// Whether the cursor exists, also if another transaction holds it.
    exists: bool,
    now: Timestamp,
    /// The mark of the event at which the step looks.
    found: Option<Mark>,
}

impl Held {
    fn is_held_by_another(&self, step: &Step) -> bool {
        step.is_claim() && self.cursor.is_none() && self.exists
    }
}

/// The statements of a step, with their values.
struct Writes<'a> {
    statements: Vec<(&'a Sql, Rest)>,
    /// The indexes of the statements that write the cursors. Each returns a row if it has written.
    of_cursors: Vec<usize>,
}

impl<'a> Writes<'a> {
    fn of(sql: &'a SubscriptionSql, id: &CursorId, held: &Held, taken: &StepOutcome) -> Self {
        let mut writes = Self::none();
        if held.cursor.is_none() {
            writes.statements.push((&sql.before_make, Rest::new()));
        }
        writes.add(sql, id, held.cursor.as_ref(), taken);
        writes
    }

    /// The statements of a change of several cursors. If it makes some, they come after the lock and the count.
    fn of_all(
        sql: &'a SubscriptionSql,
        name: &SubscriptionName,
        before: &Subject,
        changes: &[(CursorId, StepOutcome)],
        makes: bool,
    ) -> Self {
        let mut writes = Self::none();
        if makes {
            let name: Value = Box::new(name.as_str().to_owned());
            writes.statements.extend([(&sql.before_make, Rest::new()), (&sql.count, vec![name])]);
        }
        for (id, taken) in changes {
            let known = before.cursors.iter().find(|cursor| cursor.id == *id);
            writes.add(sql, id, known, taken);
        }
        writes
    }

    fn none() -> Self {
        Self { statements: Vec::new(), of_cursors: Vec::new() }
    }

    fn add(&mut self, sql: &'a SubscriptionSql, id: &CursorId, known: Option<&Cursor>, taken: &StepOutcome) {
        let write = match (known, &taken.cursor) {
            (None, Some(cursor)) => Some((&sql.make, cursor_values(cursor))),
            (Some(known), Some(cursor)) if known != cursor || !taken.parked.is_empty() => {
                Some((&sql.put, cursor_values(cursor)))
            }
            (Some(_), None) => Some((&sql.remove, values_of(id))),
            _ => None,
        };
        if let Some(write) = write {
            self.of_cursors.push(self.statements.len());
            self.statements.push(write);
        }
        self.statements.extend(taken.parked.iter().map(|change| parked_write(sql, id, change)));
    }

    fn is_empty(&self) -> bool {
        self.statements.is_empty()
    }

    /// Sends all statements together.
    async fn send(self, sender: Sender<'_>) -> Result<()> {
        let rows = self.rows(&self.ready(sender).await?).await?;
        if self.are_written(&rows) { Ok(()) } else { Err(damaged("a cursor that is held does not exist")) }
    }

    /// Sends all statements of a change that makes cursors; `false` if others have made or removed cursors of this
    /// subscription, so that there are not this many.
    async fn make(&self, sender: Sender<'_>, count: i64) -> Result<bool> {
        let rows = self.rows(&self.ready(sender).await?).await?;
        let counted = rows.get(1).and_then(|rows| rows.first());
        let found: i64 = counted.ok_or_else(|| damaged("the count is missing"))?.try_get(0)?;
        Ok(found == count && self.are_written(&rows))
    }

    fn are_written(&self, rows: &[Vec<Row>]) -> bool {
        self.of_cursors.iter().all(|index| rows.get(*index).is_some_and(|rows| !rows.is_empty()))
    }

    /// Sends all statements together with the COMMIT; `false` if the cursor was to be made and exists already.
    async fn commit(self, pools: &Pools, sender: Sender<'_>) -> Result<bool> {
        let ready = pools.in_time(self.ready(sender)).await?;
        let sent = async {
            let (rows, committed) = zip(self.rows(&ready), sender.execute("COMMIT")).await;
            // After an error, COMMIT rolls back without reporting one.
            let rows = rows?;
            let is_written = self.are_written(&rows);
            committed.map(|()| is_written)
        };
        pools.notices.watch(pools.in_time(sent), |is_written| *is_written).await.map_err(unless_rolled_back)
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

/// The error for a step whose COMMIT was sent: its outcome is unknown, unless the server says that it rolled back.
fn unless_rolled_back(error: PostgresError) -> PostgresError {
    if is_rolled_back(&error) {
        return error;
    }
    Error::outcome_unknown("the step").because(error).into()
}

fn parked_write<'a>(sql: &'a SubscriptionSql, id: &CursorId, change: &ParkedChange) -> (&'a Sql, Rest) {
    let mut values = values_of(id);
    let which = |position: Option<Position>| Box::new(position.map(Position::get)) as Value;
    let sql = match change {
        ParkedChange::Keep(event) => {
            let stored = StoredParked::from(event);
            values.extend([
                Box::new(stored.position) as Value,
                Box::new(stored.aggregate),
                Box::new(stored.holds_back),
                Box::new(stored.attempts),
                Box::new(stored.error.to_owned()),
                Box::new(stored.parked_at),
                Box::new(stored.is_due),
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
        ParkedChange::RemoveAll => {
            values.push(which(None));
            &sql.forget
        }
    };
    (sql, values)
}

/// Starts all futures in this order, so that their statements are sent in this order, and then waits for the answers.
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

/// The values of a cursor, in the order of its columns.
fn cursor_values(cursor: &Cursor) -> Rest {
    let text = |text: Option<&str>| Box::new(text.map(str::to_owned));
    let stored = StoredCursor::from(cursor);
    vec![
        Box::new(stored.subscription.to_owned()) as Value,
        Box::new(stored.version),
        Box::new(stored.partition),
        Box::new(stored.partitions),
        Box::new(stored.position),
        Box::new(stored.epoch),
        text(stored.owner),
        Box::new(stored.expires_at),
        text(stored.wanted_by),
        Box::new(stored.wanted_until),
        Box::new(stored.live_from),
        Box::new(stored.status),
        Box::new(stored.failed_position),
        Box::new(stored.failed_attempts),
        text(stored.failed_error),
        Box::new(stored.parked_changes),
        Box::new(stored.is_held),
        Box::new(stored.lost_leases),
    ]
}

fn read_cursor(row: &Row) -> Result<Cursor> {
    let stored = StoredCursor {
        subscription: row.try_get(0)?,
        version: row.try_get(1)?,
        partition: row.try_get(2)?,
        partitions: row.try_get(3)?,
        position: row.try_get(4)?,
        epoch: row.try_get(5)?,
        owner: row.try_get(6)?,
        expires_at: row.try_get(7)?,
        wanted_by: row.try_get(8)?,
        wanted_until: row.try_get(9)?,
        live_from: row.try_get(10)?,
        status: row.try_get(11)?,
        failed_position: row.try_get(12)?,
        failed_attempts: row.try_get(13)?,
        failed_error: row.try_get(14)?,
        parked_changes: row.try_get(15)?,
        is_held: row.try_get(16)?,
        lost_leases: row.try_get(17)?,
    };
    stored.try_into().map_err(damaged)
}

/// How many parked events a cursor has.
fn read_count(name: &str, row: &Row) -> Result<(CursorId, u64)> {
    let subscription = SubscriptionName::new(name).map_err(damaged)?;
    let id = CursorId { subscription, version: small(row, 0)?, partition: small(row, 1)? };
    Ok((id, row.try_get::<_, i64>(2)?.unsigned_abs()))
}

fn read_backlog(row: &Row) -> Result<Backlog> {
    let perhaps = |column| -> Result<Option<Timestamp>> {
        row.try_get::<_, Option<i64>>(column)?.map(Timestamp::from_micros).transpose().map_err(damaged)
    };
    Ok(Backlog {
        cursor: read_cursor(row)?,
        next_recorded_at: perhaps("next_recorded_at")?,
        parked: u64::try_from(row.try_get::<_, i64>("parked")?).map_err(damaged)?,
        oldest_parked_at: perhaps("oldest_parked_at")?,
    })
}

fn read_parked(row: &Row) -> Result<Parked> {
    let stored = StoredParked {
        position: row.try_get(0)?,
        aggregate: row.try_get(1)?,
        holds_back: row.try_get(2)?,
        attempts: row.try_get(3)?,
        error: row.try_get(4)?,
        parked_at: row.try_get(5)?,
        is_due: row.try_get(6)?,
    };
    stored.try_into().map_err(damaged)
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

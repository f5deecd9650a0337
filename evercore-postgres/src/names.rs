//! Type names and their numbers in the store. The cache contains only names that are committed.
//!
//! Names are registered under the lock of the single row in `log_end`, and each registration changes the names' mark in
//! that row. A table of names is used only together with a query that finds the mark with which the table was read:
//! others may have registered names meanwhile, or a failover may have lost names and their numbers now belong to other
//! names.

use std::sync::{Arc, PoisonError, RwLock};

use evercore_core::{AggregateType, Batch, EventType, KnownType, Mark, NameTable};
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use crate::connection::pool::Lent;
use crate::error::{PostgresError, Result, damaged};
use crate::sql::{LOCK_LOG_END, Ready, Schema, Sender, Sql, begin};
use crate::store::Store;

/// Reads everything in one statement, so that it is consistent.
const ALL: &str = "SELECT a.id, a.name, e.id, e.name, n.names
    FROM (SELECT l.names FROM @log_end l WHERE l.position >= 0 ORDER BY l.position DESC LIMIT 1) n
    LEFT JOIN @aggregate_types a ON true
    LEFT JOIN @event_types e ON e.aggregate_type_id = a.id";

const MARK: &str = "SELECT l.names FROM @log_end l WHERE l.position >= 0 ORDER BY l.position DESC LIMIT 1";

const SET_MARK: &str = "UPDATE @log_end SET names = $1
    WHERE position >= (SELECT max(l.position) FROM @log_end l WHERE l.position >= 0)";

/// How often to read the names again while others register names: new ones may be added during each round trip.
const ATTEMPTS: usize = 64;

const INSERT_AGGREGATE_TYPES: &str =
    "INSERT INTO @aggregate_types (id, name) SELECT * FROM unnest($1::int[], $2::text[])";

const INSERT_EVENT_TYPES: &str = "INSERT INTO @event_types (id, aggregate_type_id, name)
    SELECT * FROM unnest($1::int[], $2::int[], $3::text[])";

/// The largest number a name can have. A larger one means a damaged store, and must not fill the memory.
const MOST_NAMES: u32 = 1 << 24;

/// The names known now. A reader takes a copy of the table's pointer and keeps it while it reads.
#[derive(Debug)]
pub(crate) struct Names {
    table: RwLock<Arc<NameTable>>,
    all: Sql,
    mark: Sql,
    lock: Sql,
    set_mark: Sql,
    insert_aggregate_types: Sql,
    insert_event_types: Sql,
}

impl Names {
    pub(crate) fn new(schema: &Schema) -> Self {
        Self {
            table: RwLock::default(),
            all: Sql::new(schema, ALL, &[]),
            mark: Sql::new(schema, MARK, &[]),
            lock: Sql::new(schema, LOCK_LOG_END, &[]),
            set_mark: Sql::new(schema, SET_MARK, &[Type::INT8]),
            insert_aggregate_types: Sql::new(
                schema,
                INSERT_AGGREGATE_TYPES,
                &[Type::INT4_ARRAY, Type::TEXT_ARRAY],
            ),
            insert_event_types: Sql::new(
                schema,
                INSERT_EVENT_TYPES,
                &[Type::INT4_ARRAY, Type::INT4_ARRAY, Type::TEXT_ARRAY],
            ),
        }
    }

    pub(crate) fn table(&self) -> Arc<NameTable> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads all names. Do not call it inside a transaction that registers names.
    pub(crate) async fn reload(&self, sender: Sender<'_>) -> Result<Arc<NameTable>> {
        let fresh = read(&sender.rows(&self.all, &[]).await?)?;
        Ok(self.learn(fresh))
    }

    /// Runs a read, and runs it again with newly read names if it finds that the names have changed. A number without a
    /// name is damage only if it is also missing from the newly read table.
    pub(crate) async fn retry<T, W: Future<Output = Result<T>>>(
        &self,
        lent: &Lent,
        read: impl Fn(Arc<NameTable>) -> W,
    ) -> Result<T> {
        let mut table = self.table();
        for _ in 1..ATTEMPTS {
            let outcome = read(Arc::clone(&table)).await;
            if !matches!(outcome, Err(PostgresError::OtherNames | PostgresError::UnknownName(_))) {
                return outcome;
            }
            table = self.reload(lent.sender()?).await?;
        }
        read(table).await
    }

    /// Replaces the known names with the committed ones, which drops names that were lost.
    pub(crate) fn learn(&self, mut fresh: NameTable) -> Arc<NameTable> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        fresh.share_with(&table);
        *table = Arc::new(fresh);
        Arc::clone(&table)
    }

    /// The mark of the names in the store.
    pub(crate) async fn mark<'a>(&'a self, sender: Sender<'a>) -> Result<Ready<'a>> {
        sender.ready(&self.mark).await
    }
}

/// Checks the mark that [`Names::mark`] has found: an error if the names differ from those of the table.
pub(crate) fn check_mark(rows: &[Row], table: &NameTable) -> Result<()> {
    let row = rows.first().ok_or_else(|| damaged("the table of names is empty"))?;
    if table.mark() == Mark::new(row.try_get(0)?) { Ok(()) } else { Err(PostgresError::OtherNames) }
}

fn read(rows: &[Row]) -> Result<NameTable> {
    let mut table = NameTable::new();
    for row in rows {
        let Some(of) = row.try_get::<_, Option<i32>>(0)? else { continue };
        let of = checked(of)?;
        if table.aggregate_type(of).is_none() {
            table.set_aggregate_type(of, &AggregateType::new(row.try_get::<_, &str>(1)?).map_err(damaged)?);
        }
        let Some(number) = row.try_get::<_, Option<i32>>(2)? else { continue };
        let name = EventType::new(row.try_get::<_, &str>(3)?).map_err(damaged)?;
        let Some(aggregate_type) = table.aggregate_type(of).cloned() else { continue };
        table.set_event_type(checked(number)?, &aggregate_type, &name);
    }
    table.mark_complete();
    let row = rows.first().ok_or_else(|| damaged("the table of names is empty"))?;
    table.set_mark(Mark::new(row.try_get(4)?));
    Ok(table)
}

/// A number that the store gave to a name.
pub(crate) fn checked(number: i32) -> Result<u32> {
    u32::try_from(number)
        .ok()
        .filter(|number| (1..MOST_NAMES).contains(number))
        .ok_or_else(|| damaged(format!("a name has the number {number}")))
}

/// A number as it goes to the server.
pub(crate) fn stored(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// The names in these batches that are not known yet.
pub(crate) fn unknown<'a>(table: &NameTable, batches: impl Iterator<Item = &'a Batch>) -> Vec<KnownType> {
    let mut unknown = NameList::default();
    for batch in batches {
        for made in batch.creates() {
            if table.aggregate_type_number(&made.aggregate_type).is_none() {
                unknown.add(&made.aggregate_type, None);
            }
        }
        for append in batch.appends() {
            for event in &append.events {
                if table.event_type_number(&append.aggregate_type, &event.event_type).is_none() {
                    unknown.add(&append.aggregate_type, Some(&event.event_type));
                }
            }
        }
    }
    unknown.0
}

#[derive(Default)]
struct NameList(Vec<KnownType>);

impl NameList {
    fn add(&mut self, aggregate_type: &AggregateType, event_type: Option<&EventType>) {
        let found = self.0.iter().position(|known| known.aggregate_type == *aggregate_type);
        let place = found.unwrap_or_else(|| {
            self.0.push(KnownType { aggregate_type: aggregate_type.clone(), event_types: Vec::new() });
            self.0.len() - 1
        });
        let event_types = &mut self.0[place].event_types;
        if let Some(name) = event_type
            && !event_types.contains(name)
        {
            event_types.push(name.clone());
        }
    }
}

/// Registers missing names in its own transaction, and reads all names.
///
/// Looks first whether there is anything to do: the lock makes all commits wait, and a program that starts again has
/// nothing new.
pub(crate) async fn register(store: &Store, types: &[KnownType]) -> Result<()> {
    let known = store.read(|lent| async move { store.names.reload(lent.sender()?).await }).await?;
    if types.iter().all(|it| is_known(&known, it)) {
        return Ok(());
    }
    let table = store.write(|lent| async move { register_on(store, lent.sender()?, types).await }).await?;
    store.names.learn(table);
    Ok(())
}

fn is_known(table: &NameTable, types: &KnownType) -> bool {
    let of = &types.aggregate_type;
    table.aggregate_type_number(of).is_some()
        && types.event_types.iter().all(|it| table.event_type_number(of, it).is_some())
}

async fn register_on(store: &Store, sender: Sender<'_>, types: &[KnownType]) -> Result<NameTable> {
    sender.client.batch_execute(&begin(&store.settings)).await?;
    let mut table = store.names.lock(sender).await?;
    let before = table.mark();
    store.names.insert(sender, &mut table, types).await?;
    // All names exist already: nothing to commit, and no standby to wait for.
    if table.mark() == before {
        sender.client.batch_execute("ROLLBACK").await?;
        return Ok(table);
    }
    let doubt = store.heard.before_commit();
    doubt.settle(sender.client.batch_execute("COMMIT").await.map_err(Into::into))?;
    Ok(table)
}

impl Names {
    /// Blocks all other registrations until the transaction ends, and returns all names.
    pub(crate) async fn lock(&self, sender: Sender<'_>) -> Result<NameTable> {
        sender.rows(&self.lock, &[]).await?;
        read(&sender.rows(&self.all, &[]).await?)
    }

    /// Registers the names that `table` lacks, under the lock. Learn them only after the transaction has committed.
    pub(crate) async fn insert(
        &self,
        sender: Sender<'_>,
        table: &mut NameTable,
        types: &[KnownType],
    ) -> Result<()> {
        let new = Numbered::of(table, types);
        if !new.aggregate_types.0.is_empty() {
            let (numbers, texts) = &new.aggregate_types;
            sender.rows(&self.insert_aggregate_types, &[numbers, texts]).await?;
        }
        if !new.event_types.0.is_empty() {
            let (numbers, of, texts) = &new.event_types;
            sender.rows(&self.insert_event_types, &[numbers, of, texts]).await?;
        }
        if !new.aggregate_types.0.is_empty() || !new.event_types.0.is_empty() {
            table.set_mark(Mark::random());
            sender.rows(&self.set_mark, &[&table.mark().get()]).await?;
        }
        Ok(())
    }
}

/// Numbers names as if they were registered, to check batches that contain them.
pub(crate) fn suppose(table: &NameTable, types: &[KnownType]) -> NameTable {
    let mut table = table.clone();
    Numbered::of(&mut table, types);
    table
}

/// Names with their new numbers.
#[derive(Default)]
struct Numbered<'a> {
    aggregate_types: (Vec<i32>, Vec<&'a str>),
    event_types: (Vec<i32>, Vec<i32>, Vec<&'a str>),
}

impl<'a> Numbered<'a> {
    /// Numbers the names that `table` lacks, after its last numbers.
    fn of(table: &mut NameTable, types: &'a [KnownType]) -> Self {
        let mut new = Self::default();
        for known in types {
            let of = table.aggregate_type_number(&known.aggregate_type).unwrap_or_else(|| {
                let number = table.next_aggregate_type();
                table.set_aggregate_type(number, &known.aggregate_type);
                new.aggregate_types.0.push(stored(number));
                new.aggregate_types.1.push(known.aggregate_type.as_str());
                number
            });
            for name in &known.event_types {
                if table.event_type_number(&known.aggregate_type, name).is_none() {
                    let number = table.next_event_type();
                    table.set_event_type(number, &known.aggregate_type, name);
                    new.event_types.0.push(stored(number));
                    new.event_types.1.push(stored(of));
                    new.event_types.2.push(name.as_str());
                }
            }
        }
        new
    }
}

//! Type names and their ids in the store. The cache contains only names that are committed.
//!
//! Names are registered under the lock of the single row in `log_end`, and each registration changes the names' mark in
//! that row. A table of names is used only together with a query that finds the mark with which the table was read:
//! others may have registered names meanwhile, or a failover may have lost names and their ids now belong to other
//! names.

use std::sync::Arc;

use evercore_core::engine::{Batch, Mark, NameCache, NameTable};
use evercore_core::{AggregateType, EventType, KnownType};
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use crate::connection::pool::{Checkout, Pools};
use crate::error::{PostgresError, Result, damaged};
use crate::settings::Schema;
use crate::sql::{LOCK_LOG_END, Ready, Sender, Sql, Values};

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

/// The names known now.
#[derive(Debug)]
pub(crate) struct Names {
    known: NameCache,
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
            known: NameCache::default(),
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
        self.known.table()
    }

    /// Reads all names. Do not call it inside a transaction that registers names.
    pub(crate) async fn reload(&self, sender: Sender<'_>) -> Result<Arc<NameTable>> {
        let fresh = read(&sender.rows(&self.all, &[]).await?)?;
        Ok(self.learn(fresh))
    }

    /// Runs a read, and runs it again with newly read names if it finds that the names have changed. An id without a
    /// name is damage only if it is also missing from the newly read table.
    pub(crate) async fn retry<T, W: Future<Output = Result<T>>>(
        &self,
        checkout: &Checkout,
        read: impl Fn(Arc<NameTable>) -> W,
    ) -> Result<T> {
        let mut table = self.table();
        for _ in 1..ATTEMPTS {
            let outcome = read(Arc::clone(&table)).await;
            if !matches!(outcome, Err(PostgresError::OtherNames | PostgresError::UnknownName(_))) {
                return outcome;
            }
            table = self.reload(checkout.sender()?).await?;
        }
        read(table).await
    }

    /// Replaces the known names with the committed ones, which drops names that were lost.
    pub(crate) fn learn(&self, fresh: NameTable) -> Arc<NameTable> {
        self.known.replace(fresh)
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
        let event_type = row.try_get::<_, Option<i32>>(2)?.map(i64::from).zip(row.try_get(3)?);
        table.add_stored((i64::from(of), row.try_get(1)?), event_type).map_err(damaged)?;
    }
    table.mark_complete();
    let row = rows.first().ok_or_else(|| damaged("the table of names is empty"))?;
    table.set_mark(Mark::new(row.try_get(4)?));
    Ok(table)
}

/// A type id in the store.
pub(crate) fn type_id(stored: i32) -> Result<u32> {
    NameTable::type_id(i64::from(stored)).map_err(damaged)
}

/// A type id as it is sent to the server.
pub(crate) fn sql_id(type_id: u32) -> i32 {
    i32::try_from(type_id).unwrap_or(i32::MAX)
}

/// The names in these batches that are not known yet.
pub(crate) fn unknown<'a>(table: &NameTable, batches: impl Iterator<Item = &'a Batch>) -> Vec<KnownType> {
    let mut unknown = NameList::default();
    for batch in batches {
        for made in batch.creates() {
            if table.aggregate_type_id(&made.aggregate_type).is_none() {
                unknown.add(&made.aggregate_type, None);
            }
        }
        for append in batch.appends() {
            for event in &append.events {
                if table.event_type_id(&append.aggregate_type, &event.event_type).is_none() {
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

fn is_known(table: &NameTable, types: &KnownType) -> bool {
    let of = &types.aggregate_type;
    table.aggregate_type_id(of).is_some()
        && types.event_types.iter().all(|it| table.event_type_id(of, it).is_some())
}

impl Names {
    /// Registers missing names in its own transaction, and reads all names.
    ///
    /// Looks first whether any name is missing: the lock makes all commits wait, and a program that starts again has
    /// nothing new.
    pub(crate) async fn register(&self, pools: &Pools, types: &[KnownType]) -> Result<()> {
        let known = pools.read(|checkout| async move { self.reload(checkout.sender()?).await }).await?;
        if types.iter().all(|it| is_known(&known, it)) {
            return Ok(());
        }
        let table =
            pools.write(|checkout| async move { self.register_on(pools, checkout.sender()?, types).await });
        self.learn(table.await?);
        Ok(())
    }

    async fn register_on(&self, pools: &Pools, sender: Sender<'_>, types: &[KnownType]) -> Result<NameTable> {
        sender.execute(&pools.settings.begin()).await?;
        let mut table = self.lock(sender).await?;
        let before = table.mark();
        self.insert(sender, &mut table, types).await?;
        // All names exist already: nothing to commit, and no standby to wait for.
        if table.mark() == before {
            sender.execute("ROLLBACK").await?;
        } else {
            pools.notices.commit(sender.execute("COMMIT")).await?;
        }
        Ok(table)
    }

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
        let new = NewNames::of(table, types);
        if !new.aggregate_types.is_empty() {
            let values: &Values<'_> = &[&new.aggregate_type_ids, &new.aggregate_types];
            sender.rows(&self.insert_aggregate_types, values).await?;
        }
        if !new.event_types.is_empty() {
            let values: &Values<'_> = &[&new.event_type_ids, &new.event_aggregate_type_ids, &new.event_types];
            sender.rows(&self.insert_event_types, values).await?;
        }
        if !new.aggregate_types.is_empty() || !new.event_types.is_empty() {
            table.set_mark(Mark::random());
            sender.rows(&self.set_mark, &[&table.mark().get()]).await?;
        }
        Ok(())
    }
}

/// Gives ids to names as if they were registered, to check batches that contain them.
pub(crate) fn suppose(table: &NameTable, types: &[KnownType]) -> NameTable {
    let mut table = table.clone();
    NewNames::of(&mut table, types);
    table
}

/// New names with their ids, column by column.
#[derive(Default)]
struct NewNames<'a> {
    aggregate_type_ids: Vec<i32>,
    aggregate_types: Vec<&'a str>,
    event_type_ids: Vec<i32>,
    /// The id of each event type's aggregate type.
    event_aggregate_type_ids: Vec<i32>,
    event_types: Vec<&'a str>,
}

impl<'a> NewNames<'a> {
    /// Gives ids to the names that `table` lacks, after its last ids.
    fn of(table: &mut NameTable, types: &'a [KnownType]) -> Self {
        let mut new = Self::default();
        for known in types {
            let of = table.aggregate_type_id(&known.aggregate_type).unwrap_or_else(|| {
                let id = table.next_aggregate_type();
                table.set_aggregate_type(id, &known.aggregate_type);
                new.aggregate_type_ids.push(sql_id(id));
                new.aggregate_types.push(known.aggregate_type.as_str());
                id
            });
            for name in &known.event_types {
                if table.event_type_id(&known.aggregate_type, name).is_none() {
                    let id = table.next_event_type();
                    table.set_event_type(id, &known.aggregate_type, name);
                    new.event_type_ids.push(sql_id(id));
                    new.event_aggregate_type_ids.push(sql_id(of));
                    new.event_types.push(name.as_str());
                }
            }
        }
        new
    }
}

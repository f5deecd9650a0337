//! Type names and their ids in the file. The cache contains only names that are committed.

use std::sync::Arc;

use evercore_core::engine::{NameCache, NameTable};
use evercore_core::{AggregateType, EventType, KnownType};
use rusqlite::{Connection, OptionalExtension};

use crate::error::{Result, damaged};

const AGGREGATE_TYPE_BY_NAME: &str = "SELECT id FROM aggregate_types WHERE name = ?1";
const AGGREGATE_TYPE_BY_ID: &str = "SELECT name FROM aggregate_types WHERE id = ?1";
const EVENT_TYPE_BY_NAME: &str = "SELECT id FROM event_types WHERE aggregate_type_id = ?1 AND name = ?2";
const INSERT_AGGREGATE_TYPE: &str = "INSERT INTO aggregate_types (name) VALUES (?1)";
const INSERT_EVENT_TYPE: &str = "INSERT INTO event_types (aggregate_type_id, name) VALUES (?1, ?2)";
/// Reads everything in one statement, so that it is consistent: if the table has an id, it has all smaller ones too.
const ALL_NAMES: &str = "SELECT a.id, a.name, e.id, e.name
    FROM aggregate_types a LEFT JOIN event_types e ON e.aggregate_type_id = a.id";
const LAST_EVENT_TYPE: &str = "SELECT coalesce(max(id), 0) FROM event_types";

/// The names known now.
#[derive(Debug, Default)]
pub(crate) struct Names(NameCache);

impl Names {
    pub(crate) fn table(&self) -> Arc<NameTable> {
        self.0.table()
    }

    /// A copy for a transaction, which may learn names that are not committed yet.
    pub(crate) fn copy(&self) -> Self {
        Self(NameCache::new(self.table()))
    }

    /// Adds the names that a transaction found or registered. Call it after the transaction has committed.
    pub(crate) fn learn(&self, committed: NameTable) {
        self.0.add(committed);
    }

    /// Reads all names. Do not call it inside a transaction that writes.
    pub(crate) fn reload(&self, connection: &Connection) -> Result<Arc<NameTable>> {
        Ok(self.0.replace(read(connection)?))
    }

    /// A table with all names that are committed.
    pub(crate) fn complete(&self, connection: &Connection) -> Result<Arc<NameTable>> {
        let table = self.table();
        let last: u32 = connection.prepare_cached(LAST_EVENT_TYPE)?.query_row([], |row| row.get(0))?;
        if table.complete_to() == last { Ok(table) } else { self.reload(connection) }
    }

    /// The id of this aggregate type, if it is registered.
    pub(crate) fn aggregate_type_id(
        &self,
        connection: &Connection,
        name: &AggregateType,
    ) -> Result<Option<u32>> {
        match self.table().aggregate_type_id(name) {
            Some(id) => Ok(Some(id)),
            None => find_aggregate_type(connection, name),
        }
    }

    /// The aggregate type with this id in the file.
    pub(crate) fn aggregate_type(&self, connection: &Connection, id: u32) -> Result<AggregateType> {
        if let Some(name) = self.table().aggregate_type(id) {
            return Ok(name.clone());
        }
        let table = self.reload(connection)?;
        table
            .aggregate_type(id)
            .cloned()
            .ok_or_else(|| damaged(format!("an aggregate has the unknown type id {id}")))
    }

    /// All names in order.
    pub(crate) fn list(&self, connection: &Connection) -> Result<Vec<KnownType>> {
        Ok(self.reload(connection)?.list())
    }
}

/// Reads all names.
fn read(connection: &Connection) -> Result<NameTable> {
    let mut table = NameTable::new();
    let mut statement = connection.prepare_cached(ALL_NAMES)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let aggregate_type = (row.get(0)?, row.get_ref(1)?.as_str().map_err(damaged)?);
        let event_type = row.get_ref(3)?.as_str_or_null().map_err(damaged)?;
        let event_type = row.get::<_, Option<i64>>(2)?.zip(event_type);
        table.add_stored(aggregate_type, event_type).map_err(damaged)?;
    }
    table.mark_complete();
    Ok(table)
}

/// Checks an id from the file.
fn type_id(stored: i64) -> Result<u32> {
    NameTable::type_id(stored).map_err(damaged)
}

/// The names that a transaction looks up and registers. If it is rolled back, they are dropped.
#[derive(Debug)]
pub(crate) struct Registrar<'a> {
    connection: &'a Connection,
    known: Arc<NameTable>,
    /// Found or registered in this transaction, and not in `known`.
    fresh: NameTable,
}

impl<'a> Registrar<'a> {
    pub(crate) fn new(connection: &'a Connection, names: &Names) -> Self {
        Self { connection, known: names.table(), fresh: NameTable::new() }
    }

    /// The names to [learn](Names::learn) after the transaction has committed.
    pub(crate) fn into_fresh(self) -> NameTable {
        self.fresh
    }

    /// The id of this aggregate type, if it is registered.
    pub(crate) fn known_aggregate_type_id(&mut self, name: &AggregateType) -> Result<Option<u32>> {
        if let Some(id) = self.known.aggregate_type_id(name).or_else(|| self.fresh.aggregate_type_id(name)) {
            return Ok(Some(id));
        }
        let found = find_aggregate_type(self.connection, name)?;
        found.into_iter().for_each(|id| self.fresh.set_aggregate_type(id, name));
        Ok(found)
    }

    pub(crate) fn aggregate_type(&mut self, id: u32) -> Result<AggregateType> {
        if let Some(name) = self.known.aggregate_type(id).or_else(|| self.fresh.aggregate_type(id)) {
            return Ok(name.clone());
        }
        let mut statement = self.connection.prepare_cached(AGGREGATE_TYPE_BY_ID)?;
        let name: String = statement.query_row([id], |row| row.get(0))?;
        let name = AggregateType::new(name).map_err(damaged)?;
        self.fresh.set_aggregate_type(type_id(i64::from(id))?, &name);
        Ok(name)
    }

    /// The id of this aggregate type, which is registered if it is new.
    pub(crate) fn aggregate_type_id(&mut self, name: &AggregateType) -> Result<u32> {
        if let Some(id) = self.known_aggregate_type_id(name)? {
            return Ok(id);
        }
        let id = type_id(self.connection.prepare_cached(INSERT_AGGREGATE_TYPE)?.insert([name.as_str()])?)?;
        self.fresh.set_aggregate_type(id, name);
        Ok(id)
    }

    /// Registers all of these names.
    pub(crate) fn all(&mut self, types: &[KnownType]) -> Result<()> {
        for known in types {
            self.aggregate_type_id(&known.aggregate_type)?;
            for event_type in &known.event_types {
                self.event_type_id(&known.aggregate_type, event_type)?;
            }
        }
        Ok(())
    }

    /// The id of this event type, which is registered if it is new.
    pub(crate) fn event_type_id(&mut self, aggregate_type: &AggregateType, name: &EventType) -> Result<u32> {
        let known = self.known.event_type_id(aggregate_type, name);
        if let Some(id) = known.or_else(|| self.fresh.event_type_id(aggregate_type, name)) {
            return Ok(id);
        }
        let aggregate_type_id = self.aggregate_type_id(aggregate_type)?;
        // An event type can be added only to a table that has its aggregate type.
        self.fresh.set_aggregate_type(aggregate_type_id, aggregate_type);
        let key = (aggregate_type_id, name.as_str());
        let found = self.connection.prepare_cached(EVENT_TYPE_BY_NAME)?.query_row(key, |row| row.get(0));
        let id = match found.optional()? {
            Some(id) => id,
            None => type_id(self.connection.prepare_cached(INSERT_EVENT_TYPE)?.insert(key)?)?,
        };
        self.fresh.set_event_type(id, aggregate_type, name);
        Ok(id)
    }
}

fn find_aggregate_type(connection: &Connection, name: &AggregateType) -> Result<Option<u32>> {
    let mut statement = connection.prepare_cached(AGGREGATE_TYPE_BY_NAME)?;
    Ok(statement.query_row([name.as_str()], |row| row.get(0)).optional()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path) -> Connection {
        let connection = Connection::open(path).unwrap();
        connection.pragma_update(None, "journal_mode", "wal").unwrap();
        connection.pragma_update(None, "synchronous", "off").unwrap();
        connection
    }

    /// Ids are given one after another, so a consistent table has as many event types as its last id says.
    #[test]
    fn a_table_that_is_read_while_names_are_registered_is_consistent() {
        for _ in 0..10 {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("store.db");
            let writer = open(&path);
            writer.execute_batch(include_str!("../migrations/V1__event_store.sql")).unwrap();
            let reader = open(&path);
            std::thread::scope(|scope| {
                scope.spawn(move || (1..=100).for_each(|n| add_names(&writer, n)));
                let mut last = 0;
                while last < 200 {
                    let table = read(&reader).unwrap();
                    let event_types: usize = table.list().iter().map(|known| known.event_types.len()).sum();
                    assert_eq!(u32::try_from(event_types).unwrap(), table.complete_to());
                    assert!(table.complete_to() >= last);
                    last = table.complete_to();
                }
            });
        }
    }

    /// Adds an aggregate type with an event type, and then another event type to the first aggregate type.
    fn add_names(connection: &Connection, n: i64) {
        let names = format!(
            "BEGIN; INSERT INTO aggregate_types (name) VALUES ('a{n}');
             INSERT INTO event_types (aggregate_type_id, name) VALUES ({n}, 'b'), (1, 'b{n}'); COMMIT"
        );
        connection.execute_batch(&names).unwrap();
    }
}

//! The tables of the live run, in the store's own file.

use std::collections::BTreeMap;

use evercore_sqlite::rusqlite::{Connection, OptionalExtension};
use evercore_sqlite::{BoxError, EventStore, Projection, SqliteEngine};

use crate::live::{Changes, Tables};

pub(crate) type Engine = SqliteEngine;

const TABLES: &str = "
    -- In which state each application is, and since when.
    CREATE TABLE loan_states (application INTEGER PRIMARY KEY, day INTEGER NOT NULL, state TEXT NOT NULL) STRICT;
    -- How many there are in each.
    CREATE TABLE loan_counts (
        day INTEGER, state TEXT, applications INTEGER NOT NULL, PRIMARY KEY (day, state)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE loan_work (resource TEXT PRIMARY KEY, in_progress INTEGER NOT NULL) STRICT, WITHOUT ROWID;";

pub(crate) async fn make_tables(engine: &Engine) -> Result<(), BoxError> {
    let store = EventStore::new(engine.clone());
    engine.commit_with(store.begin(), |sql| Ok(sql.execute_batch(TABLES)?)).await?;
    Ok(())
}

/// Counts every event, because no event comes twice.
pub(crate) fn projection(engine: &Engine) -> Projection {
    engine.projection(|sql, delivery| {
        let changes = Changes::of(delivery.events())?;
        let mut find = sql.prepare_cached("SELECT day, state FROM loan_states WHERE application = ?1")?;
        let mut put = sql.prepare_cached("INSERT OR REPLACE INTO loan_states VALUES (?1, ?2, ?3)")?;
        let mut before = BTreeMap::new();
        for (application, (day, state)) in &changes.states {
            let found = find.query_row([application], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
            before.extend(found.map(|found| (*application, found)));
            put.execute((application, day, state))?;
        }
        let mut count = sql.prepare_cached(
            "INSERT INTO loan_counts VALUES (?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET applications = applications + excluded.applications",
        )?;
        for ((day, state), applications) in changes.moves(&before) {
            count.execute((day, state, applications))?;
        }
        let mut work = sql.prepare_cached(
            "INSERT INTO loan_work VALUES (?1, ?2)
             ON CONFLICT DO UPDATE SET in_progress = in_progress + excluded.in_progress",
        )?;
        for (resource, growth) in &changes.work {
            work.execute((resource, growth))?;
        }
        Ok(())
    })
}

pub(crate) async fn read(engine: &Engine) -> Result<Tables, BoxError> {
    let (send, receive) = futures_channel::oneshot::channel();
    let store = EventStore::new(engine.clone());
    let ask = move |sql: &Connection| send.send(tables(sql)?).map_err(|_| "nobody listens".into());
    engine.commit_with(store.begin(), ask).await?;
    Ok(receive.await?)
}

fn tables(sql: &Connection) -> Result<Tables, BoxError> {
    let mut tables = Tables::default();
    let mut counts =
        sql.prepare("SELECT day, state, applications FROM loan_counts WHERE applications <> 0")?;
    let rows = counts.query_map([], |row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?)))?;
    tables.applications = rows.collect::<Result<_, _>>()?;
    let mut work = sql.prepare("SELECT resource, in_progress FROM loan_work")?;
    tables.work = work.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
    Ok(tables)
}

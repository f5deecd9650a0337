//! A read model, exactly once: orders per customer and day, in a table next to the log.
//!
//! Run it, kill it with -9 at any moment, run it again: the table always agrees with the log. Version 2 also has the turnover.
//! It is built from the first event while version 1 goes on, and takes over when it has caught up.
//!
//!     projection                          both versions, one after the other, in orders.db
//!     projection FILE ORDERS VERSION      ORDERS new orders, with the table of that version

use std::collections::BTreeMap;
use std::time::Duration;

use evercore_sqlite::rusqlite::{Connection, OpenFlags};
use evercore_sqlite::{
    Aggregate, BoxError, Error, EventStore, Json, LogQuery, Position, Result, RunEnd, SqliteEngine,
    Subscription,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

const NAME: &str = "orders per day";

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS shop_days_1 (
        customer TEXT, day TEXT, orders INTEGER NOT NULL, PRIMARY KEY (customer, day)
    ) STRICT;
    CREATE TABLE IF NOT EXISTS shop_days_2 (
        customer TEXT, day TEXT, orders INTEGER NOT NULL, cents INTEGER NOT NULL, PRIMARY KEY (customer, day)
    ) STRICT;";

const COUNT_1: &str = "
    INSERT INTO shop_days_1 VALUES (?1, ?2, 1)
    ON CONFLICT DO UPDATE SET orders = orders + 1";

const COUNT_2: &str = "
    INSERT INTO shop_days_2 VALUES (?1, ?2, 1, ?3)
    ON CONFLICT DO UPDATE SET orders = orders + 1, cents = cents + excluded.cents";

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Order {
    is_placed: bool,
}

#[derive(Debug, Serialize, Deserialize)]
enum OrderEvent {
    Placed { customer: String, day: String, cents: i64 },
}

impl Aggregate for Order {
    const TYPE: &'static str = "order";
    type Event = OrderEvent;
    type Codec = Json;

    fn apply(&mut self, OrderEvent::Placed { .. }: OrderEvent) {
        self.is_placed = true;
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), BoxError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [file, orders, version] => run(file, orders.parse()?, version.parse()?).await?,
        _ => {
            run("orders.db", 1_000, 1).await?;
            run("orders.db", 1_000, 2).await?;
        }
    }
    Ok(())
}

/// One run of the program of that version: it writes orders, and projects the events of the log.
pub(crate) async fn run(file: &str, orders: i64, version: u32) -> Result<()> {
    let engine = SqliteEngine::open(file).await?;
    let store = EventStore::new(engine.clone());
    engine.commit_with(store.begin(), |sql| Ok(sql.execute_batch(TABLES)?)).await?;
    subscription(&store, version)?.declare().await?; // so that `wait_for` works
    if store.live_version(NAME).await? > version {
        println!("version {version} is of the past, a newer one has taken over");
        return engine.close().await;
    }

    // While a new version is being built, the old one goes on, and readers use its table.
    let (stop, stopped) = watch::channel(false);
    let spawn = |version| tokio::spawn(project(engine.clone(), store.clone(), version, stopped.clone()));
    let projectors: Vec<_> = (1..=version).map(spawn).collect();

    write(&store, orders).await?;
    store.wait_for_position(store.head().await?, NAME, Duration::from_secs(30)).await?;
    let has_ended = |version: u32| projectors[version as usize - 1].is_finished();
    while store.live_version(NAME).await? < version && !has_ended(version) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    stop.send_replace(true);
    for (projector, version) in projectors.into_iter().zip(1..) {
        let end = projector.await.map_err(Error::rejected)??;
        println!("the projector of version {version} ended: {end:?}");
    }
    report(file, &store).await?;
    engine.close().await
}

fn subscription(store: &EventStore, version: u32) -> Result<Subscription> {
    // After a kill -9 the next process waits for the end of the lease. This one is short, so you need not wait long.
    Ok(store.subscription(NAME)?.with_version(version).with_lease(Duration::from_millis(300)))
}

/// The projector: the rows and the cursor change in one transaction, or neither does.
async fn project(
    engine: SqliteEngine,
    store: EventStore,
    version: u32,
    mut stopped: watch::Receiver<bool>,
) -> Result<RunEnd> {
    let table = engine.projection(move |sql, delivery| {
        for event in delivery.events() {
            let OrderEvent::Placed { customer, day, cents } = event.decode::<Order>()?;
            match version {
                1 => sql.prepare_cached(COUNT_1)?.execute((customer, day))?,
                _ => sql.prepare_cached(COUNT_2)?.execute((customer, day, cents))?,
            };
        }
        Ok(())
    });
    let shutdown = async move { drop(stopped.wait_for(|stop| *stop).await) };
    subscription(&store, version)?.run_sink(shutdown, table).await
}

/// The writer: orders, four to a unit of work.
async fn write(store: &EventStore, orders: i64) -> Result<()> {
    let first = store.head().await?.get();
    for unit in (first..first + orders).collect::<Vec<_>>().chunks(4) {
        let mut work = store.begin();
        for n in unit {
            let customer = ["ada", "bob", "cleo", "dan", "eve"][*n as usize % 5].to_owned();
            let day = format!("2026-{:02}-{:02}", n / 1_000 % 12 + 1, n / 40 % 25 + 1);
            let mut order = work.create::<Order>().await?;
            work.record(&mut order, OrderEvent::Placed { customer, day, cents: 100 + n % 900 })?;
        }
        work.commit().await?;
    }
    Ok(())
}

/// By customer and day: how many orders, for how many cents.
type Days = BTreeMap<(String, String), (i64, i64)>;

/// Prints the live table, and checks that it agrees with the log.
async fn report(file: &str, store: &EventStore) -> Result<()> {
    let version = store.live_version(NAME).await?;
    let table = read_table(file, version).map_err(Error::rejected)?;
    assert_eq!(table, fold(store, version).await?, "the table is not what the log says");
    for ((customer, day), (orders, cents)) in table.iter().rev().take(3) {
        println!("  {customer} on {day}: {orders} orders, {cents} cents");
    }
    let orders: i64 = table.values().map(|(orders, _)| orders).sum();
    println!("version {version} is live: {orders} orders in {} rows, just what the log says", table.len());
    Ok(())
}

/// Readers open the file with their own connection: these are ordinary SQLite tables.
fn read_table(file: &str, version: u32) -> Result<Days, BoxError> {
    let sql = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let cents = if version == 1 { "0" } else { "cents" };
    let mut query =
        sql.prepare(&format!("SELECT customer, day, orders, {cents} FROM shop_days_{version}"))?;
    let rows = query.query_map((), |row| Ok(((row.get(0)?, row.get(1)?), (row.get(2)?, row.get(3)?))))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The same without a read model: all events, from the first on.
async fn fold(store: &EventStore, version: u32) -> Result<Days> {
    let mut days = Days::new();
    let mut log = store.log_reader(LogQuery::after(Position::ZERO));
    while let Some(page) = log.next().await? {
        for event in &page.events {
            let OrderEvent::Placed { customer, day, cents } = event.decode::<Order>()?;
            let counts = days.entry((customer, day)).or_default();
            *counts = (counts.0 + 1, counts.1 + if version == 1 { 0 } else { cents });
        }
    }
    Ok(days)
}

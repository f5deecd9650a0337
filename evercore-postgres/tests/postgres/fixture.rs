//! Helpers of the tests of cursors and projections.

use std::time::Duration;

use evercore_core::engine::{Advance, Outcome, Sink, Step, SubscriptionStorage};
use evercore_postgres::deadpool_postgres::{Manager, Pool};
use evercore_postgres::tokio_postgres::{self, Client, NoTls, Transaction};
use evercore_postgres::{
    AggregateId, BoxError, BoxFuture, Builder, Cursor, CursorId, Delivery, ErrorKind, Event, EventStore,
    Lease, LogQuery, OwnerId, PageLimit, Parked, Position, PostgresEngine, Projection, Result, StorageEngine,
    SubscriptionName, Timestamp,
};

use crate::common::Place;
use crate::orders::{NotToday, Order, noted};

pub(crate) const TIME: Duration = Duration::from_secs(30);

pub(crate) fn id(name: &str) -> CursorId {
    CursorId { subscription: SubscriptionName::new(name).unwrap(), version: 1, partition: 0 }
}

pub(crate) fn owner(name: &str) -> OwnerId {
    OwnerId::new(name).unwrap()
}

pub(crate) fn at(position: i64) -> Position {
    Position::new(position).unwrap()
}

pub(crate) fn lease_of(cursor: &Cursor) -> Lease {
    Lease { owner: cursor.owner.clone().unwrap(), epoch: cursor.epoch }
}

pub(crate) fn parked(position: i64, attempts: u32) -> Parked {
    Parked {
        position: at(position),
        aggregate: AggregateId::new(7).unwrap(),
        holds_back: true,
        attempts,
        error: "no\u{fffd}, \"never\"".to_owned(),
        parked_at: Timestamp::from_micros(5).unwrap(),
        is_due: false,
    }
}

pub(crate) async fn declare(engine: &PostgresEngine, id: &CursorId) -> Cursor {
    engine.step(id, &Step::declare(1, Position::ZERO, Some(Position::ZERO))).await.unwrap().unwrap()
}

pub(crate) async fn claim(engine: &PostgresEngine, id: &CursorId, name: &str) -> Cursor {
    engine.step(id, &Step::claim(owner(name), TIME)).await.unwrap().unwrap()
}

/// Declares and claims a cursor with this name.
pub(crate) async fn begin(engine: &PostgresEngine, name: &str) -> (CursorId, Cursor) {
    let id = id(name);
    declare(engine, &id).await;
    let cursor = claim(engine, &id, "me").await;
    (id, cursor)
}

pub(crate) async fn find(engine: &PostgresEngine, id: &CursorId) -> Cursor {
    let cursors = engine.cursors(Some(&id.subscription)).await.unwrap().cursors;
    cursors.into_iter().find(|cursor| cursor.id == *id).unwrap()
}

pub(crate) async fn parked_of(engine: &PostgresEngine, id: &CursorId) -> Vec<i64> {
    let parked = engine.parked(id, Position::ZERO, 99).await.unwrap();
    parked.iter().map(|event| event.position.get()).collect()
}

/// One engine for each kind of connection.
pub(crate) async fn all(set: impl Fn(Builder) -> Builder) -> Vec<(Place, PostgresEngine)> {
    let mut engines = Vec::new();
    for way in 0..3 {
        let Some(place) = Place::fresh() else { return Vec::new() };
        let builder = set(place.builder());
        let engine = match way {
            0 => builder.connect(&place.url).await,
            1 => builder.pooler(true).connect(&place.url).await,
            _ => {
                let manager = Manager::new(place.url.parse().unwrap(), NoTls);
                builder.with_pool(Pool::builder(manager).max_size(4).build().unwrap()).await
            }
        };
        engines.push((place, engine.unwrap()));
    }
    engines
}

pub(crate) async fn client(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Writes this many events.
pub(crate) async fn fill(engine: &PostgresEngine, events: usize) {
    let store = EventStore::new(engine.clone());
    for start in (0..events).step_by(500) {
        let count = 500.min(events - start);
        let many = move |_: &Order| (0..count).map(|n| noted(format!("{n}"))).collect::<Vec<_>>();
        store.update_or_create::<Order, _, _>("filled", many).await.unwrap();
    }
}

/// The table in which the projections of these tests store the positions of their events.
pub(crate) fn table(place: &Place) -> String {
    place.psql("CREATE TABLE @seen (position BIGINT NOT NULL)");
    format!("{}.seen", place.schema)
}

pub(crate) fn seen(place: &Place) -> Vec<i64> {
    let text =
        place.psql("SELECT coalesce(string_agg(position::text, ' ' ORDER BY position), '') FROM @seen");
    text.split_whitespace().map(|position| position.parse().unwrap()).collect()
}

pub(crate) async fn note(sql: &Transaction<'_>, table: &str, events: &[Event]) -> Result<(), BoxError> {
    let positions: Vec<i64> = events.iter().map(|event| event.position().get()).collect();
    sql.execute(&format!("INSERT INTO {table} SELECT unnest($1::bigint[])"), &[&positions]).await?;
    Ok(())
}

/// Gives the closure the lifetimes that the compiler cannot infer.
pub(crate) fn handler<F>(handle: F) -> F
where
    F: for<'t> Fn(&'t Transaction<'t>, &'t [Event]) -> BoxFuture<'t, Result<(), BoxError>>
        + Send
        + Sync
        + 'static,
{
    handle
}

/// Stores the positions of the events, and then sleeps.
pub(crate) fn noting(
    table: &str,
    pause: Duration,
) -> impl for<'t> Fn(&'t Transaction<'t>, &'t [Event]) -> BoxFuture<'t, Result<(), BoxError>>
+ Clone
+ Send
+ Sync
+ 'static {
    let table = table.to_owned();
    handler(move |sql, events| {
        let table = table.clone();
        Box::pin(async move {
            note(sql, &table, events).await?;
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            Ok(())
        })
    })
}

/// Stores the positions of the events and then runs this SQL. "fail" and "panic" are done instead of run.
pub(crate) fn projection(engine: &PostgresEngine, table: &str, then: &'static str) -> Projection {
    let table = table.to_owned();
    engine.projection(move |sql, delivery| {
        let table = table.clone();
        Box::pin(async move {
            note(sql, &table, delivery.events()).await?;
            match then {
                "fail" => return Err(NotToday.into()),
                "panic" => panic!("as asked"),
                "keeps an error" => drop(sql.batch_execute("SELECT 1 / 0").await),
                then => sql.batch_execute(then).await?,
            }
            Ok(())
        })
    })
}

/// The next delivery after the cursor, and the move past it.
pub(crate) async fn next(
    engine: &PostgresEngine,
    cursor: &Cursor,
    events: usize,
) -> Option<(Delivery, Advance)> {
    let query = LogQuery::after(cursor.position).with_limit(PageLimit::events(events).unwrap());
    let page = engine.read_log(&query).await.unwrap();
    let delivery = Delivery::new(cursor.id.clone(), lease_of(cursor), page.events.iter().collect());
    let advance = Advance::new(lease_of(cursor), cursor.position, page.scanned, TIME);
    (!page.events.is_empty()).then_some((delivery, advance))
}

pub(crate) fn failed(outcome: Outcome) -> BoxError {
    match outcome {
        Outcome::Failed { handled: 0, error } | Outcome::Hindered { error, .. } => error,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn refused(outcome: Outcome) -> ErrorKind {
    match outcome {
        Outcome::Refused(error) => error.kind().clone(),
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn deliver(sink: &Projection, next: &(Delivery, Advance)) -> Outcome {
    sink.deliver(&next.0, &next.1).await
}

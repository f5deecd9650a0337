//! A failover loses the tail of the log while engines and runners stay up that remember it: names, ids, witnesses,
//! handles, cursors. There is one primary, one standby, one failover, and a store for each scenario.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use evercore_postgres::tokio_postgres::{self, NoTls};
use evercore_postgres::{
    Aggregate, ErrorKind, EventStore, Json, Loaded, LogQuery, Position, PostgresEngine, Receipt, Result,
    StorageEngine,
};
use evercore_testkit::postgres::Server;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::common::{Place, block_on};
use crate::orders::{Order, OrderEvent, place, positions, skipped, soon, up_to};

/// Another release of the application, with other events of the same aggregate.
macro_rules! release {
    ($name:ident, $event:ident) => {
        mod $name {
            use super::*;

            #[derive(Clone, Debug, Default, Serialize, Deserialize)]
            pub(super) struct Order {
                pub(super) events: i64,
            }

            #[derive(Debug, Serialize, Deserialize)]
            pub(super) enum OrderEvent {
                Placed,
                $event,
            }

            impl Aggregate for Order {
                const TYPE: &'static str = "order";
                type Event = OrderEvent;
                type Codec = Json;

                fn apply(&mut self, _: OrderEvent) {
                    self.events += 1;
                }
            }
        }
    };
}
release!(shipping, Shipped);
release!(cancelling, Cancelled);

/// A primary and a standby that follows it.
struct Pair {
    primary: Server,
    standby: Server,
}

impl Pair {
    fn start() -> Option<Self> {
        let primary = Server::builder().start_or_skip()?;
        match primary.standby() {
            // `pg_basebackup` is missing, or older than the server.
            Err(error)
                if error.contains("could not be run") || error.contains("incompatible server version") =>
            {
                skipped(&format!("standby: {error}"));
                None
            }
            standby => Some(Self { primary, standby: standby.unwrap() }),
        }
    }

    fn url(&self) -> String {
        let (primary, standby) = (self.primary.port(), self.standby.port());
        format!("postgres://evercore@127.0.0.1:{primary},127.0.0.1:{standby}/postgres")
    }

    /// The standby gets everything up to now, and nothing more.
    async fn cut(&self) {
        let at = self.primary.psql("postgres", "SELECT pg_current_wal_insert_lsn()").unwrap();
        let has_all = format!("SELECT pg_last_wal_replay_lsn() >= '{at}'");
        soon("the standby has it all", async || self.standby.psql("postgres", &has_all).unwrap() == "t")
            .await;
        let deaf = "ALTER SYSTEM SET primary_conninfo = ''; SELECT pg_reload_conf()";
        self.standby.psql("postgres", deaf).unwrap();
        let following = "SELECT count(*) FROM pg_stat_replication";
        soon("the standby is cut off", async || self.primary.psql("postgres", following).unwrap() == "0")
            .await;
    }

    fn fail_over(&self) {
        self.primary.kill();
        self.standby.promote().unwrap();
    }
}

/// A store, the engine that lives through the failover, and the URL for others.
struct Shop {
    at: Place,
    standby: Place,
    engine: PostgresEngine,
    store: EventStore,
}

impl Shop {
    async fn open(pair: &Pair) -> Self {
        let at = Place::on(pair.primary.url());
        let engine = at.builder().connect(&pair.url()).await.unwrap();
        let standby = Place { url: pair.standby.url(), schema: at.schema.clone() };
        Self { at, standby, store: EventStore::new(engine.clone()), engine }
    }

    /// Opens the store as a new process.
    async fn elsewhere(&self) -> (PostgresEngine, EventStore) {
        let engine = self.standby.engine().await;
        (engine.clone(), EventStore::new(engine))
    }

    /// Waits until the engine has found the new server.
    async fn back(&self) {
        soon("there is a server again", async || self.store.head().await.is_ok()).await;
    }

    async fn load(&self, key: &str) -> Loaded<Order> {
        self.store.load::<Order>(key).await.unwrap()
    }

    /// Writes one more event of each. The first commit is held up until the others wait after it, so they are one
    /// flight.
    async fn together(&self, url: &str, orders: &mut [Loaded<Order>]) -> Vec<Result<Receipt>> {
        let (mut side, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
        tokio::spawn(connection);
        let lock = side.transaction().await.unwrap();
        let log_end = format!("SELECT position FROM {}.log_end FOR UPDATE", self.at.schema);
        lock.batch_execute(&log_end).await.unwrap();
        let mut commits = Vec::new();
        for order in orders {
            let mut work = self.store.begin();
            work.record(order, OrderEvent::Placed).unwrap();
            commits.push(tokio::spawn(work.commit()));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        lock.rollback().await.unwrap();
        let mut outcomes = Vec::new();
        for commit in commits {
            outcomes.push(commit.await.unwrap());
        }
        outcomes
    }
}

/// The log, as position, aggregate and event type.
async fn events(engine: &PostgresEngine, after: i64) -> Vec<(i64, i64, String)> {
    let page = engine.read_log(&LogQuery::after(Position::new(after).unwrap())).await.unwrap();
    let event = page.events.iter();
    event
        .map(|event| (event.position().get(), event.aggregate().get(), event.event_type().to_string()))
        .collect()
}

/// A name whose registration was lost is registered again.
async fn name_again(shop: &Shop) {
    use shipping::{Order, OrderEvent};
    shop.back().await;
    shop.store.update::<Order, _, _>("one", |_| [OrderEvent::Shipped]).await.unwrap();
    let (engine, store) = shop.elsewhere().await;
    let (here, there) = (events(&shop.engine, 0).await, events(&engine, 0).await);
    assert_eq!(here, there);
    assert_eq!(there.last().unwrap().2, "Shipped");
    assert_eq!(shop.store.types().await.unwrap(), store.types().await.unwrap());
    assert_eq!(store.load::<Order>("one").await.unwrap().events, 2);
}

/// The number of a lost name now belongs to another name, both for engines that read first and for engines that write
/// first.
async fn name_of_another(shop: &Shop, reads_first: bool) {
    let (engine, store) = shop.elsewhere().await;
    let cancel = |_: &cancelling::Order| [cancelling::OrderEvent::Placed, cancelling::OrderEvent::Cancelled];
    store.update_or_create::<cancelling::Order, _, _>("two", cancel).await.unwrap();
    shop.back().await;
    if reads_first {
        assert_eq!(events(&shop.engine, 0).await, events(&engine, 0).await);
        assert_eq!(shop.store.load::<cancelling::Order>("two").await.unwrap().events, 2);
    }
    let ship = |_: &shipping::Order| [shipping::OrderEvent::Shipped];
    shop.store.update::<shipping::Order, _, _>("one", ship).await.unwrap();
    let names: Vec<String> = events(&shop.engine, 0).await.into_iter().map(|event| event.2).collect();
    assert_eq!(names, ["Placed", "Placed", "Cancelled", "Shipped"]);
    assert_eq!(events(&shop.engine, 0).await, events(&engine, 0).await);
}

/// Three orders that are written together, by a clock that was an hour fast once.
async fn fill_by_a_wrong_clock(shop: &Shop) -> Vec<Loaded<Order>> {
    shop.at.psql("UPDATE @log_end SET recorded_at = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint + 3600000000");
    let mut orders = Vec::new();
    for key in ["f", "x", "y"] {
        place(&shop.store, key).await.unwrap();
        orders.push(shop.load(key).await);
    }
    let url = shop.at.url.clone();
    shop.together(&url, &mut orders).await.into_iter().for_each(|outcome| drop(outcome.unwrap()));
    orders
}

/// Now other events have the same positions, sequences and times.
async fn witness_by_a_wrong_clock(shop: &Shop, mut orders: Vec<Loaded<Order>>) {
    shop.back().await;
    let (engine, store) = shop.elsewhere().await;
    for key in ["f", "f", "y"] {
        store.update::<Order, _, _>(key, |_| [OrderEvent::Placed]).await.unwrap();
    }
    let url = shop.standby.url.clone();
    for outcome in shop.together(&url, &mut orders).await {
        assert!(outcome.unwrap_err().is_conflict());
    }
    assert_eq!(positions(&engine).await, up_to(9));
    assert_eq!(store.load::<Order>("x").await.unwrap().events, 2);
}

/// A handle whose last event was lost, and a handle whose aggregate was lost.
async fn handles(shop: &Shop, mut known: Loaded<Order>, mut alice: Loaded<Order>) {
    shop.back().await;
    let (_, store) = shop.elsewhere().await;
    // As far as the handle, with other events.
    place(&store, "known").await.unwrap();
    let bob = store.load_or_create::<Order>("bob").await.unwrap();
    place(&store, "bob").await.unwrap();
    for guarded in [false, true] {
        let mut work = shop.store.begin();
        if guarded {
            work.guard(&known).unwrap();
            let mut other = work.create::<Order>().await.unwrap();
            work.record(&mut other, OrderEvent::Placed).unwrap();
        } else {
            work.record(&mut known.clone(), OrderEvent::Placed).unwrap();
        }
        assert!(work.commit().await.unwrap_err().is_conflict(), "guarded: {guarded}");
    }
    let mut work = shop.store.begin();
    work.record(&mut alice, OrderEvent::Placed).unwrap();
    assert_eq!(*work.commit().await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.load::<Order>("bob").await.unwrap().sequence().get(), 1);
    assert_ne!(bob.id(), alice.id());
    for n in 0..3 {
        place(&store, &format!("theirs {n}")).await.unwrap();
        place(&shop.store, &format!("ours {n}")).await.unwrap();
    }
    known = shop.load("known").await;
    let mut work = shop.store.begin();
    work.record(&mut known, OrderEvent::Placed).unwrap();
    work.commit().await.unwrap();
}

/// The events of a handler, and where it stops for a while.
#[derive(Clone, Default)]
struct Seen {
    events: Arc<Mutex<Vec<(i64, i64)>>>,
    stops_at: Option<i64>,
    gate: Arc<Notify>,
}

impl Seen {
    fn run(&self, store: &EventStore) -> JoinHandle<()> {
        let (subscription, seen) = (store.subscription("mails").unwrap(), self.clone());
        tokio::spawn(async move {
            let handler = move |event: evercore_postgres::Delivered| {
                let seen = seen.clone();
                async move {
                    let position = event.event().position().get();
                    let is_first = !seen.events.lock().unwrap().iter().any(|known| known.0 == position);
                    seen.events.lock().unwrap().push((position, event.event().aggregate().get()));
                    if seen.stops_at == Some(position) && is_first {
                        seen.gate.notified().await;
                    }
                    Ok(())
                }
            };
            subscription.run(std::future::pending(), handler).await.unwrap();
        })
    }

    fn last(&self) -> i64 {
        self.events.lock().unwrap().last().map_or(0, |seen| seen.0)
    }
}

fn cursor(at: &Place) -> i64 {
    at.psql("SELECT coalesce(max(position), 0) FROM @cursors").parse().unwrap()
}

/// Ten orders that were handled.
async fn ten_handled(shop: &Shop) {
    for n in 0..10 {
        place(&shop.store, &format!("old {n}")).await.unwrap();
    }
    soon("ten are handled", async || cursor(&shop.at) == 10).await;
}

/// Five events of one unit, which are one page.
async fn five_more(store: &EventStore, name: &str) {
    let mut work = store.begin();
    for n in 0..5 {
        let mut order = work.create_with_key::<Order>(format!("{name} {n}")).await.unwrap();
        work.record(&mut order, OrderEvent::Placed).unwrap();
    }
    work.commit().await.unwrap();
}

/// Every event of the log has come; others may have come too.
async fn all_come(shop: &Shop, gate: Option<&Notify>, seen: impl Fn() -> Vec<(i64, i64)>) {
    let (engine, store) = shop.elsewhere().await;
    five_more(&store, "new").await;
    for n in 0..3 {
        place(&store, &format!("later {n}")).await.unwrap();
    }
    gate.into_iter().for_each(Notify::notify_one);
    let log: Vec<_> = events(&engine, 0).await.into_iter().map(|event| (event.0, event.1)).collect();
    assert_eq!(log.len(), 18);
    let missing = || log.iter().filter(|event| !seen().contains(event)).count();
    let standby = &shop.standby;
    let is_done = async || cursor(standby) == 18 && missing() == 0;
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while !is_done().await {
        let (moved, lost) = (cursor(standby), missing());
        assert!(std::time::Instant::now() < end, "{lost} events never came, the cursor is at {moved}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn model(at: &Place) -> Vec<(i64, i64)> {
    let rows = at.psql("SELECT position, aggregate FROM @model ORDER BY position");
    let row = |row: &str| row.split_once('|').map(|(a, b)| (a.parse().unwrap(), b.parse().unwrap()));
    rows.lines().filter_map(row).collect()
}

#[test]
fn nobody_who_remembers_what_a_failover_lost_does_harm_with_it() {
    block_on(async {
        let Some(pair) = Pair::start() else { return };
        let mut shops = Vec::new();
        for _ in 0..8 {
            shops.push(Shop::open(&pair).await);
        }
        let shops: [Shop; 8] = shops.try_into().unwrap_or_else(|_| unreachable!());
        let [again, reads, writes, clock, handle, slow, quick, once] = shops;
        for shop in [&again, &reads, &writes] {
            place(&shop.store, "one").await.unwrap();
        }
        let mut orders = fill_by_a_wrong_clock(&clock).await;
        place(&handle.store, "known").await.unwrap();
        let seen_slowly = Seen { stops_at: Some(11), ..Seen::default() };
        let seen_quickly = Seen::default();
        seen_slowly.run(&slow.store);
        seen_quickly.run(&quick.store);
        once.at.psql("CREATE TABLE @model (position bigint, aggregate bigint)");
        let insert = format!("INSERT INTO {}.model VALUES ($1, $2)", once.at.schema);
        let sink = once.engine.projection(move |sql, delivery| {
            let insert = insert.clone();
            Box::pin(async move {
                for event in delivery.events() {
                    sql.execute(&insert, &[&event.position().get(), &event.aggregate().get()]).await?;
                }
                Ok(())
            })
        });
        let subscription = once.store.subscription("model").unwrap();
        tokio::spawn(async move { subscription.run_sink(std::future::pending(), sink).await.unwrap() });
        for shop in [&slow, &quick, &once] {
            ten_handled(shop).await;
        }

        pair.cut().await;
        for shop in [&again, &reads, &writes] {
            let ship = |_: &shipping::Order| [shipping::OrderEvent::Shipped];
            shop.store.update::<shipping::Order, _, _>("one", ship).await.unwrap();
        }
        let url = clock.at.url.clone();
        clock.together(&url, &mut orders).await.into_iter().for_each(|outcome| drop(outcome.unwrap()));
        place(&handle.store, "known").await.unwrap();
        place(&handle.store, "alice").await.unwrap();
        let (known, alice) = (handle.load("known").await, handle.load("alice").await);
        for shop in [&slow, &quick, &once] {
            five_more(&shop.store, "lost").await;
        }
        soon("the slow one is at 11", async || seen_slowly.last() == 11).await;
        for shop in [&quick, &once] {
            soon("the quick one is at 15", async || cursor(&shop.at) == 15).await;
        }

        pair.fail_over();
        let events = |seen: &Seen| seen.events.lock().unwrap().clone();
        let gate = Arc::clone(&seen_slowly.gate);
        let checks: Vec<(&str, JoinHandle<()>)> = vec![
            ("a name that was lost", tokio::spawn(async move { name_again(&again).await })),
            ("another's name, read", tokio::spawn(async move { name_of_another(&reads, true).await })),
            ("another's name, written", tokio::spawn(async move { name_of_another(&writes, false).await })),
            ("the witness", tokio::spawn(async move { witness_by_a_wrong_clock(&clock, orders).await })),
            ("handles", tokio::spawn(async move { handles(&handle, known, alice).await })),
            (
                "a slow handler",
                tokio::spawn(async move { all_come(&slow, Some(&gate), || events(&seen_slowly)).await }),
            ),
            (
                "a lost cursor",
                tokio::spawn(async move { all_come(&quick, None, || events(&seen_quickly)).await }),
            ),
            (
                "exactly once",
                tokio::spawn(async move {
                    all_come(&once, None, || model(&once.standby)).await;
                    assert_eq!(model(&once.standby).len(), 18);
                }),
            ),
        ];
        let mut failed = Vec::new();
        for (what, check) in checks {
            if check.await.is_err() {
                failed.push(what);
            }
        }
        assert!(failed.is_empty(), "{failed:?}");
    });
}

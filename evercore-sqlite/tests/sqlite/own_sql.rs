//! The user's SQL in the transaction of a commit: together or not at all.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use evercore_memory::MemoryEngine;
use evercore_sqlite::rusqlite::{self, Connection};
use evercore_sqlite::{
    Aggregate, BoxError, CommandId, ErrorKind, EventStore, Json, Position, Receipt, Result, SqliteEngine,
    StorageEngine,
};
use serde::{Deserialize, Serialize};

use crate::common::{Folder, block_on, kind};

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Order {
    events: i64,
}

#[derive(Debug, Serialize, Deserialize)]
enum OrderEvent {
    Placed,
}

impl Aggregate for Order {
    const TYPE: &'static str = "order";
    type Event = OrderEvent;
    type Codec = Json;

    fn apply(&mut self, _: OrderEvent) {
        self.events += 1;
    }
}

#[derive(Debug, PartialEq)]
struct NotToday;

impl std::fmt::Display for NotToday {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("not today")
    }
}

impl std::error::Error for NotToday {}

/// A store with an outbox, and an order "first" with one event.
struct Shop {
    engine: SqliteEngine,
    store: EventStore,
}

impl Shop {
    async fn new(engine: SqliteEngine) -> Self {
        let store = EventStore::new(engine.clone());
        let table = "CREATE TABLE shop_outbox (message TEXT NOT NULL) STRICT";
        engine.commit_with(store.begin(), move |sql| Ok(sql.execute_batch(table)?)).await.unwrap();
        store.update_or_create::<Order, _, _>("first", |_| [OrderEvent::Placed]).await.unwrap();
        Self { engine, store }
    }

    async fn in_a_file(folder: &Folder, sql_timeout: Duration) -> Self {
        let builder = SqliteEngine::builder().sql_timeout(sql_timeout);
        Self::new(builder.open(folder.store()).await.unwrap()).await
    }

    /// Opens the engine in each mode.
    async fn all(folder: &Folder) -> [Self; 3] {
        let on_caller = SqliteEngine::builder().commit_on_caller_thread(true);
        [
            Self::new(SqliteEngine::open(folder.store()).await.unwrap()).await,
            Self::new(on_caller.open(folder.file("caller.db")).await.unwrap()).await,
            Self::new(SqliteEngine::open_in_memory().await.unwrap()).await,
        ]
    }

    /// Places the order once more, with this SQL in the transaction.
    async fn place<F>(&self, key: &str, sql: F) -> Result<Receipt>
    where
        F: FnOnce(&Connection) -> Result<(), BoxError> + Send + 'static,
    {
        let mut work = self.store.begin();
        let mut order = work.load_or_create::<Order>(key).await?;
        work.record(&mut order, OrderEvent::Placed)?;
        self.engine.commit_with(work, sql).await
    }

    async fn events(&self) -> i64 {
        self.store.head().await.unwrap().get()
    }

    /// The number of messages, read on the engine's own connection.
    async fn messages(&self) -> i64 {
        let count = Arc::new(AtomicI64::new(-1));
        let found = Arc::clone(&count);
        let ask = move |sql: &Connection| {
            let count = sql.query_row("SELECT count(*) FROM shop_outbox", [], |row| row.get(0))?;
            found.store(count, Ordering::SeqCst);
            Ok(())
        };
        self.engine.commit_with(self.store.begin(), ask).await.unwrap();
        count.load(Ordering::SeqCst)
    }

    /// Asserts that events and messages are as at the beginning, and the store is valid.
    async fn is_as_before(&self) {
        assert_eq!((self.events().await, self.messages().await), (1, 0));
        self.place("after", send).await.unwrap();
        self.store.update::<Order, _, _>("after", |_| [OrderEvent::Placed]).await.unwrap();
        assert_eq!((self.events().await, self.messages().await), (3, 1));
    }
}

fn send(sql: &Connection) -> Result<(), BoxError> {
    sql.prepare_cached("INSERT INTO shop_outbox VALUES ('hello')")?.execute([])?;
    Ok(())
}

/// Runs until it is interrupted.
fn count_for_ever(sql: &Connection) -> rusqlite::Result<i64> {
    let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";
    sql.query_row(endless, [], |row| row.get(0))
}

#[test]
fn an_error_shows_its_cause_and_no_value() {
    block_on(async {
        let engine = SqliteEngine::open_in_memory().await.unwrap();
        let store = EventStore::new(engine.clone());
        let tables = "CREATE TABLE names (name TEXT UNIQUE) STRICT;
            CREATE TRIGGER no BEFORE DELETE ON names BEGIN SELECT RAISE(ABORT, 'sesame'); END;
            INSERT INTO names VALUES ('one')";
        engine.commit_with(store.begin(), move |sql| Ok(sql.execute_batch(tables)?)).await.unwrap();
        for (statements, shown) in [
            ("INSERT INTO names VALUES ('sesame'), ('sesame')", "UNIQUE constraint failed: names.name"),
            ("INSERT INTO absent VALUES ('sesame')", "no such table: absent"),
            ("INSERT INTO names VALUES ('sesame', sesame", "SQLite result 1"),
            ("DELETE FROM names", "SQLite result 1811"),
        ] {
            let sql = move |sql: &Connection| Ok(sql.execute_batch(statements)?);
            let error = engine.commit_with(store.begin(), sql).await.unwrap_err();
            assert_eq!(error.to_string(), "the SQL of `commit_with` failed");
            let debug = format!("{error:?}");
            assert!(debug.contains(shown), "{debug}");
            assert!(!debug.contains("sesame"), "{debug}");
        }
    });
}

#[test]
fn rows_and_events_are_written_together() {
    let folder = Folder::new();
    block_on(async {
        for shop in Shop::all(&folder).await {
            let receipt = shop.place("second", send).await.unwrap();
            assert_eq!((receipt.first.get(), receipt.last.get(), receipt.aggregates.len()), (2, 2, 1));
            assert_eq!((shop.events().await, shop.messages().await), (2, 1));
            assert_eq!(shop.store.load::<Order>("second").await.unwrap().events, 1);
        }
        let file = Connection::open(folder.store()).unwrap();
        let messages: i64 = file.query_row("SELECT count(*) FROM shop_outbox", [], |row| row.get(0)).unwrap();
        assert_eq!(messages, 1);
    });
}

#[test]
fn the_sql_sees_the_store_as_it_was_and_a_unit_without_events_rings_no_bell() {
    block_on(async {
        let shop = Shop::new(SqliteEngine::open_in_memory().await.unwrap()).await;
        let look = |sql: &Connection| {
            let events: i64 = sql.query_row("SELECT count(*) FROM events", [], |row| row.get(0))?;
            assert_eq!(events, 1);
            send(sql)
        };
        shop.place("first", look).await.unwrap();
        let receipt = shop.engine.commit_with(shop.store.begin(), send).await.unwrap();
        assert_eq!((receipt.first, receipt.last), (Position::ZERO, Position::ZERO));
        assert_eq!((shop.events().await, shop.messages().await), (2, 2));
    });
}

#[test]
fn an_error_of_the_sql_rolls_both_back_and_is_the_source() {
    let folder = Folder::new();
    block_on(async {
        for shop in Shop::all(&folder).await {
            let refuse = |sql: &Connection| {
                send(sql)?;
                Err(NotToday.into())
            };
            let error = shop.place("second", refuse).await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Rejected);
            assert_eq!(error.cause::<NotToday>(), Some(&NotToday));
            assert!(!error.is_retryable());

            let wrong = |sql: &Connection| Ok(sql.execute_batch("INSERT INTO shop_outbox VALUES (NULL)")?);
            let error = shop.place("second", wrong).await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Rejected);
            assert!(error.cause::<rusqlite::Error>().is_some());
            shop.is_as_before().await;
        }
    });
}

#[test]
fn a_unit_that_is_refused_takes_the_rows_with_it() {
    let folder = Folder::new();
    block_on(async {
        for shop in Shop::all(&folder).await {
            let mut stale = shop.store.begin();
            let mut order = stale.load::<Order>("first").await.unwrap();
            stale.record(&mut order, OrderEvent::Placed).unwrap();
            let mut guarded = shop.store.begin();
            guarded.guard(&guarded_order(&shop).await).unwrap();
            shop.store.update::<Order, _, _>("first", |_| [OrderEvent::Placed]).await.unwrap();
            for work in [stale, guarded] {
                let error = shop.engine.commit_with(work, send).await.unwrap_err();
                assert!(error.is_conflict(), "{error:?}");
            }

            let mut taken = shop.store.begin();
            taken.create_with_key::<Order>("first").await.unwrap();
            let error = shop.engine.commit_with(taken, send).await.unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::KeyTaken { .. }), "{error:?}");

            // As with `commit`, another unit refuses a handle of a unit that did not commit.
            let mut other = shop.store.begin();
            assert_eq!(kind(other.record(&mut order, OrderEvent::Placed)), ErrorKind::Invalid);
            assert_eq!((shop.events().await, shop.messages().await), (2, 0));
        }
    });
}

async fn guarded_order(shop: &Shop) -> evercore_sqlite::Loaded<Order> {
    shop.store.load::<Order>("first").await.unwrap()
}

#[test]
fn a_key_that_somebody_took_meanwhile_is_a_conflict_as_at_commit() {
    block_on(async {
        let shop = Shop::new(SqliteEngine::open_in_memory().await.unwrap()).await;
        let mut work = shop.store.begin();
        work.load_or_create::<Order>("raced").await.unwrap();
        shop.store.load_or_create::<Order>("raced").await.unwrap();
        assert!(shop.engine.commit_with(work, send).await.unwrap_err().is_conflict());
        assert_eq!(shop.messages().await, 0);
    });
}

#[test]
fn the_sql_of_a_repeated_command_takes_no_effect() {
    let folder = Folder::new();
    block_on(async {
        for shop in Shop::all(&folder).await {
            let ran = Arc::new(AtomicI64::new(0));
            let order = shop.store.load::<Order>("first").await.unwrap();
            let place = async |command: &str, times: usize| {
                let mut work = shop.store.begin();
                work.set_command(CommandId::new(command).unwrap());
                let mut order = order.clone();
                work.record_all(&mut order, (0..times).map(|_| OrderEvent::Placed)).unwrap();
                let ran = Arc::clone(&ran);
                let sql = move |sql: &Connection| {
                    ran.fetch_add(1, Ordering::SeqCst);
                    send(sql)
                };
                shop.engine.commit_with(work, sql).await
            };
            let first = place("once", 1).await.unwrap();
            assert_eq!(place("once", 1).await.unwrap(), first);
            assert_eq!(place("once", 2).await.unwrap(), first);
            let mut other = shop.store.begin();
            other.set_command(CommandId::new("once").unwrap());
            other.create::<Order>().await.unwrap();
            assert_eq!(kind(shop.engine.commit_with(other, send).await), ErrorKind::CommandReused);
            let abandoned = CommandId::new("abandoned").unwrap();
            assert_eq!(shop.store.settle(&abandoned).await.unwrap(), None);
            assert_eq!(kind(place("abandoned", 1).await), ErrorKind::CommandAbandoned);
            assert_eq!(ran.load(Ordering::SeqCst), 1);
            assert_eq!((shop.events().await, shop.messages().await), (2, 1));
        }
    });
}

#[test]
fn a_statement_that_runs_too_long_is_interrupted_and_others_go_on() {
    let folder = Folder::new();
    block_on(async {
        let shop = Shop::in_a_file(&folder, Duration::from_millis(300)).await;
        let began = Instant::now();
        let slow = shop.place("second", |sql| {
            send(sql)?;
            count_for_ever(sql)?;
            Ok(())
        });
        let (slow, other) = futures_lite::future::zip(slow, async {
            shop.engine.pause(Duration::from_millis(50)).await;
            shop.store.update::<Order, _, _>("first", |_| [OrderEvent::Placed]).await
        })
        .await;
        let error = slow.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Rejected);
        assert_eq!(error.to_string(), "the SQL of `commit_with` took longer than 300ms");
        assert!(error.cause::<rusqlite::Error>().is_some());
        other.unwrap();
        let took = began.elapsed();
        assert!((Duration::from_millis(300)..Duration::from_secs(3)).contains(&took), "{took:?}");
        assert_eq!((shop.events().await, shop.messages().await), (2, 0));
    });
}

#[test]
fn the_clock_is_looked_at_again_when_the_sql_has_returned() {
    let folder = Folder::new();
    block_on(async {
        let shop = Shop::in_a_file(&folder, Duration::from_millis(100)).await;
        let sleeps = |sql: &Connection| {
            send(sql)?;
            std::thread::sleep(Duration::from_millis(200));
            Ok(())
        };
        assert_eq!(kind(shop.place("second", sleeps).await), ErrorKind::Rejected);
        let swallows = |sql: &Connection| {
            let _ = count_for_ever(sql);
            send(sql)
        };
        assert_eq!(kind(shop.place("second", swallows).await), ErrorKind::Rejected);
        // An interrupted write rolls the transaction back by itself.
        let writes = |sql: &Connection| {
            let _ = sql.execute_batch(
                "INSERT INTO shop_outbox
                 WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT 'x' FROM n",
            );
            Ok(())
        };
        let error = shop.place("second", writes).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Rejected);
        assert!(error.to_string().contains("longer than"), "{error}");
        shop.is_as_before().await;
    });
}

#[test]
fn the_time_out_is_of_the_sql_alone() {
    let folder = Folder::new();
    block_on(async {
        let shop = Shop::in_a_file(&folder, Duration::from_millis(50)).await;
        shop.place("second", send).await.unwrap();
        shop.engine.pause(Duration::from_millis(60)).await;
        let many = |_: &Order| (0..1_000).map(|_| OrderEvent::Placed).collect::<Vec<_>>();
        shop.store.update::<Order, _, _>("second", many).await.unwrap();
        assert_eq!(shop.events().await, 1_002);
    });
}

#[test]
fn a_panic_goes_on_in_the_caller_and_the_engine_goes_on_too() {
    let folder = Folder::new();
    let shops = block_on(Shop::all(&folder));
    for shop in shops {
        let panics = |sql: &Connection| {
            send(sql)?;
            panic!("on purpose")
        };
        let panic = catch_unwind(AssertUnwindSafe(|| block_on(shop.place("second", panics)))).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
        block_on(shop.is_as_before());
    }
}

#[test]
fn the_sql_cannot_end_the_transaction() {
    let folder = Folder::new();
    block_on(async {
        for shop in Shop::all(&folder).await {
            let attempts = [
                "INSERT INTO shop_outbox VALUES ('x'); COMMIT",
                "INSERT INTO shop_outbox VALUES ('x'); COMMIT; BEGIN IMMEDIATE",
                "INSERT INTO shop_outbox VALUES ('x'); ROLLBACK",
                "ROLLBACK; BEGIN IMMEDIATE; INSERT INTO shop_outbox VALUES ('x')",
                "ROLLBACK; INSERT INTO shop_outbox VALUES ('x')",
            ];
            for attempt in attempts {
                let strict = move |sql: &Connection| Ok(sql.execute_batch(attempt)?);
                let careless = move |sql: &Connection| {
                    let _ = sql.execute_batch(attempt);
                    Ok(())
                };
                assert_eq!(kind(shop.place("second", strict).await), ErrorKind::Invalid, "{attempt}");
                assert_eq!(kind(shop.place("second", careless).await), ErrorKind::Invalid, "{attempt}");
            }
            let savepoint = "SAVEPOINT mine; INSERT INTO shop_outbox VALUES ('x');
                             ROLLBACK TO mine; RELEASE mine";
            shop.place("first", move |sql| Ok(sql.execute_batch(savepoint)?)).await.unwrap();
            assert_eq!((shop.events().await, shop.messages().await), (2, 0));
        }
    });
}

#[test]
fn a_constraint_that_is_looked_at_in_the_end_rolls_both_back() {
    block_on(async {
        let shop = Shop::new(SqliteEngine::open_in_memory().await.unwrap()).await;
        let orphan = "CREATE TABLE shop_lines (of INTEGER NOT NULL REFERENCES aggregates DEFERRABLE INITIALLY DEFERRED);
                      INSERT INTO shop_lines VALUES (4711)";
        let error = shop.place("second", move |sql| Ok(sql.execute_batch(orphan)?)).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Backend);
        shop.is_as_before().await;
    });
}

#[test]
fn a_unit_of_another_engine_is_refused() {
    let folder = Folder::new();
    block_on(async {
        let shop = Shop::in_a_file(&folder, Duration::from_secs(5)).await;
        let same_file = SqliteEngine::open(folder.store()).await.unwrap();
        let others = [EventStore::new(same_file), EventStore::new(MemoryEngine::new())];
        let ran = Arc::new(AtomicBool::new(false));
        for other in others {
            let ran = Arc::clone(&ran);
            let sql = move |_: &Connection| {
                ran.store(true, Ordering::SeqCst);
                Ok(())
            };
            assert_eq!(kind(shop.engine.commit_with(other.begin(), sql).await), ErrorKind::Invalid);
        }
        assert!(!ran.load(Ordering::SeqCst));
        shop.engine.clone().commit_with(shop.store.clone().begin(), send).await.unwrap();
    });
}

#[test]
fn a_closed_and_a_read_only_engine_run_nothing() {
    let folder = Folder::new();
    block_on(async {
        let shop = Shop::in_a_file(&folder, Duration::from_secs(5)).await;
        let reading = SqliteEngine::builder().read_only(true).open(folder.store()).await.unwrap();
        let reader = EventStore::new(reading.clone());
        assert_eq!(kind(reading.commit_with(reader.begin(), send).await), ErrorKind::ReadOnly);
        shop.engine.close().await.unwrap();
        let closed = shop.engine.commit_with(shop.store.begin(), send).await;
        assert_eq!(kind(closed), ErrorKind::Closed);
    });
}

#[test]
fn it_wakes_those_who_wait_and_new_names_are_known() {
    let folder = Folder::new();
    block_on(async {
        let shop = Shop::in_a_file(&folder, Duration::from_secs(5)).await;
        let waiting = smol::spawn({
            let engine = shop.engine.clone();
            async move { engine.wait(Position::new(1).unwrap(), Duration::from_secs(60)).await }
        });
        shop.engine.pause(Duration::from_millis(20)).await;
        shop.place("second", send).await.unwrap();
        assert_eq!(waiting.await.unwrap().get(), 2);
        assert_eq!(shop.store.types().await.unwrap().len(), 1);
    });
}

#[test]
fn a_dropped_call_is_carried_through_whole_or_not_at_all() {
    let folder = Folder::new();
    block_on(async {
        let shop = Shop::in_a_file(&folder, Duration::from_secs(5)).await;
        for n in 0..100 {
            let mut work = shop.store.begin();
            let mut order = work.create::<Order>().await.unwrap();
            work.record(&mut order, OrderEvent::Placed).unwrap();
            let mut commit = Box::pin(shop.engine.commit_with(work, send));
            for _ in 0..n % 3 {
                if let Some(done) = futures_lite::future::poll_once(&mut commit).await {
                    done.unwrap();
                    break;
                }
            }
        }
        let messages = shop.messages().await;
        assert!(messages >= 30, "{messages}");
        assert_eq!(shop.events().await, messages + 1);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_writers_of_both_kinds_leave_as_many_rows_as_events() {
    let folder = Folder::new();
    for shop in Shop::all(&folder).await {
        let table = "CREATE TABLE shop_count (n INTEGER NOT NULL) STRICT; INSERT INTO shop_count VALUES (0)";
        shop.engine.commit_with(shop.store.begin(), move |sql| Ok(sql.execute_batch(table)?)).await.unwrap();
        let shop = Arc::new(shop);
        let writers = (0..8).map(|writer| tokio::spawn(write_both_ways(Arc::clone(&shop), writer)));
        let mut counted = 0;
        for writer in writers.collect::<Vec<_>>() {
            counted += writer.await.unwrap();
        }
        let check = move |sql: &Connection| {
            let found: i64 = sql.query_row("SELECT n FROM shop_count", [], |row| row.get(0))?;
            let placed = "SELECT count(*) FROM events WHERE reference = 'with SQL'";
            let placed: i64 = sql.query_row(placed, [], |row| row.get(0))?;
            assert_eq!((found, placed), (counted, counted));
            Ok(())
        };
        shop.engine.commit_with(shop.store.begin(), check).await.unwrap();
        assert_eq!(shop.events().await, 1 + 8 * 25 + counted);
    }
}

/// 25 plain commits, and 25 attempts with SQL on four orders that others write too. Gives how many of the attempts
/// committed.
async fn write_both_ways(shop: Arc<Shop>, writer: i64) -> i64 {
    let mut landed = 0;
    for n in 0..25 {
        shop.store
            .update_or_create::<Order, _, _>(format!("own {writer}"), |_| [OrderEvent::Placed])
            .await
            .unwrap();
        let mut work = shop.store.begin();
        let mut order = work.load_or_create::<Order>(format!("shared {}", n % 4)).await.unwrap();
        let metadata = evercore_sqlite::Metadata::new().with_reference("with SQL").unwrap();
        work.record_with(&mut order, OrderEvent::Placed, &metadata).unwrap();
        let count = |sql: &Connection| {
            sql.prepare_cached("UPDATE shop_count SET n = n + 1")?.execute([])?;
            Ok(())
        };
        match shop.engine.commit_with(work, count).await {
            Ok(_) => landed += 1,
            Err(error) => assert!(error.is_conflict(), "{error:?}"),
        }
    }
    landed
}

//! The user's SQL in the transaction of a commit: together or not at all.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evercore_memory::MemoryEngine;
use evercore_postgres::deadpool_postgres::{Manager, Pool};
use evercore_postgres::tokio_postgres::{self, NoTls};
use evercore_postgres::{
    Aggregate, Builder, CommandId, ErrorKind, EventStore, Json, Metadata, Position, PostgresEngine, Receipt,
    Result, StorageEngine,
};
use serde::{Deserialize, Serialize};

use crate::common::{Place, block_on};
use crate::orders::{
    NotToday, Order, OrderEvent, Own, all_of, closure, kind, named, own, place, place_with, soon,
};

/// A store with an outbox, and an order "first" with one event.
struct Shop {
    at: Place,
    engine: PostgresEngine,
    store: EventStore,
}

impl Shop {
    async fn open(at: Place, engine: PostgresEngine) -> Self {
        let store = EventStore::new(engine.clone());
        let shop = Self { at, engine, store };
        let table = shop.sql("CREATE TABLE @outbox (message TEXT NOT NULL)");
        shop.engine.commit_with(shop.store.begin(), table).await.unwrap();
        place(&shop.store, "first").await.unwrap();
        shop
    }

    async fn with(set: impl FnOnce(Builder) -> Builder) -> Option<Self> {
        let at = Place::fresh()?;
        let engine = set(at.builder()).connect(&at.url).await.unwrap();
        Some(Self::open(at, engine).await)
    }

    async fn new() -> Option<Self> {
        Self::with(|builder| builder).await
    }

    /// One engine for each kind of connection.
    async fn all() -> Vec<Self> {
        let Some(direct) = Self::new().await else { return Vec::new() };
        let without_sessions = Self::with(|builder| builder.pooler(true)).await.unwrap();
        let at = Place::fresh().unwrap();
        let manager = Manager::new(at.url.parse().unwrap(), NoTls);
        let pool = Pool::builder(manager).max_size(4).build().unwrap();
        let engine = at.builder().with_pool(pool).await.unwrap();
        vec![direct, without_sessions, Self::open(at, engine).await]
    }

    /// SQL with `@` before the names of tables.
    fn sql(&self, statements: &str) -> impl Own + use<> {
        own(statements.replace('@', &format!("{}.", self.at.schema)))
    }

    fn send(&self) -> impl Own + use<> {
        self.sql("INSERT INTO @outbox VALUES ('hello')")
    }

    async fn place(&self, key: &str, sql: impl Own) -> Result<Receipt> {
        place_with(&self.engine, key, sql).await
    }

    /// The numbers of events and messages.
    fn count(&self) -> (i64, i64) {
        let count = |table| self.at.psql(&format!("SELECT count(*) FROM {table}")).parse().unwrap();
        (count("@events"), count("@outbox"))
    }

    /// Asserts that nothing was written since the beginning, and the store is valid.
    async fn is_as_before(&self) {
        assert_eq!(self.count(), (1, 0));
        self.place("after", self.send()).await.unwrap();
        place(&self.store, "after").await.unwrap();
        assert_eq!(self.count(), (3, 1));
        assert_eq!(crate::orders::positions(&self.engine).await, [1, 2, 3]);
    }
}

#[test]
fn rows_and_events_are_written_together() {
    block_on(async {
        for shop in Shop::all().await {
            let receipt = shop.place("second", shop.send()).await.unwrap();
            assert_eq!((receipt.first.get(), receipt.last.get(), receipt.aggregates.len()), (2, 2, 1));
            assert_eq!(shop.count(), (2, 1));
            assert_eq!(shop.store.load::<Order>("second").await.unwrap().events, 1);
            // The SQL sees earlier rows; the events of the unit are written after it.
            let look = shop.sql("INSERT INTO @outbox SELECT 'seen' FROM @events");
            shop.place("second", look).await.unwrap();
            assert_eq!(shop.count(), (3, 3));
        }
    });
}

#[test]
fn an_error_shows_its_cause_and_no_value() {
    block_on(async {
        let Some(shop) = Shop::new().await else { return };
        let table = shop.sql("CREATE TABLE @names (name TEXT, CONSTRAINT names_once UNIQUE (name))");
        shop.engine.commit_with(shop.store.begin(), table).await.unwrap();
        let raise = "DO $$ BEGIN RAISE EXCEPTION 'sesame' USING ERRCODE = '23514'; END $$";
        for (statements, code, shown) in [
            ("SET LOCAL ROLE pg_monitor; INSERT INTO @names VALUES ('sesame')", "42501", "permission denied"),
            ("INSERT INTO @names VALUES ('sesame'), ('sesame')", "23505", "constraint \\\"names_once\\\""),
            ("SELECT * FROM @nothing", "42P01", "does not exist"),
            ("SELECT 'sesame'::int", "22P02", "22P02\""),
            (raise, "23514", "23514\""),
        ] {
            let error = shop.place("second", shop.sql(statements)).await.unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("the SQL of `commit_with` failed (SQLSTATE {code})"),
                "{statements}"
            );
            let debug = format!("{error:?}");
            assert!(debug.contains(&format!("SQLSTATE {code}")) && debug.contains(shown), "{debug}");
            assert!(!debug.contains("sesame"), "{debug}");
            assert!(error.cause::<tokio_postgres::Error>().is_some());
        }
    });
}

#[test]
fn a_unit_that_holds_nothing_is_fine() {
    block_on(async {
        for shop in Shop::all().await {
            let receipt = shop.engine.commit_with(shop.store.begin(), shop.send()).await.unwrap();
            assert_eq!((receipt.first, receipt.last), (Position::ZERO, Position::ZERO));
            assert_eq!(shop.count(), (1, 1));
        }
    });
}

#[test]
fn an_error_of_the_sql_rolls_both_back_and_is_the_source() {
    block_on(async {
        for shop in Shop::all().await {
            let send = shop.at.schema.clone();
            let refuse = closure(move |sql| {
                Box::pin(async move {
                    sql.batch_execute(&format!("INSERT INTO {send}.outbox VALUES ('hello')")).await?;
                    Err(NotToday.into())
                })
            });
            let error = shop.place("second", refuse).await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Rejected);
            assert_eq!(error.cause::<NotToday>(), Some(&NotToday));
            assert!(!error.is_retryable());

            let wrong = shop.sql("INSERT INTO @outbox VALUES (NULL)");
            let error = shop.place("second", wrong).await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Rejected);
            let cause = error.cause::<tokio_postgres::Error>().unwrap();
            assert_eq!(cause.code().unwrap().code(), "23502");
            shop.is_as_before().await;
        }
    });
}

#[test]
fn a_unit_that_is_refused_takes_the_rows_with_it() {
    block_on(async {
        for shop in Shop::all().await {
            let mut stale = shop.store.begin();
            let mut order = stale.load::<Order>("first").await.unwrap();
            stale.record(&mut order, OrderEvent::Placed).unwrap();
            let mut guarded = shop.store.begin();
            guarded.guard(&shop.store.load::<Order>("first").await.unwrap()).unwrap();
            place(&shop.store, "first").await.unwrap();
            for work in [stale, guarded] {
                let error = shop.engine.commit_with(work, shop.send()).await.unwrap_err();
                assert!(error.is_conflict(), "{error:?}");
            }

            let mut taken = shop.store.begin();
            taken.create_with_key::<Order>("first").await.unwrap();
            let error = kind(shop.engine.commit_with(taken, shop.send()).await);
            assert!(matches!(error, ErrorKind::KeyTaken { .. }), "{error:?}");

            let mut raced = shop.store.begin();
            raced.load_or_create::<Order>("raced").await.unwrap();
            shop.store.load_or_create::<Order>("raced").await.unwrap();
            assert!(shop.engine.commit_with(raced, shop.send()).await.unwrap_err().is_conflict());
            assert_eq!(shop.count(), (2, 0));
        }
    });
}

/// Records one event on "first" as a command, and counts how often its SQL runs.
async fn command(
    shop: &Shop,
    id: &str,
    events: usize,
    seconds: f32,
    ran: &Arc<AtomicUsize>,
) -> Result<Receipt> {
    let mut work = shop.store.begin();
    work.set_command(CommandId::new(id).unwrap());
    let mut order = work.load::<Order>("first").await?;
    work.record_all(&mut order, (0..events).map(|_| OrderEvent::Placed))?;
    let (ran, schema) = (Arc::clone(ran), shop.at.schema.clone());
    let sql = closure(move |sql| {
        Box::pin(async move {
            ran.fetch_add(1, Ordering::SeqCst);
            let text = format!("SELECT pg_sleep({seconds}); INSERT INTO {schema}.outbox VALUES ('hello')");
            Ok(sql.batch_execute(&text).await?)
        })
    });
    shop.engine.commit_with(work, sql).await
}

#[test]
fn the_sql_of_a_repeated_command_takes_no_effect() {
    block_on(async {
        for shop in Shop::all().await {
            let ran = Arc::default();
            let first = command(&shop, "once", 1, 0.0, &ran).await.unwrap();
            // The order has changed, and the repeated request decides otherwise.
            assert_eq!(command(&shop, "once", 2, 0.0, &ran).await.unwrap(), first);
            let mut other = shop.store.begin();
            other.set_command(CommandId::new("once").unwrap());
            other.create::<Order>().await.unwrap();
            assert_eq!(kind(shop.engine.commit_with(other, shop.send()).await), ErrorKind::CommandReused);
            assert_eq!(shop.store.receipt(&CommandId::new("once").unwrap()).await.unwrap(), Some(first));
            let abandoned = CommandId::new("abandoned").unwrap();
            assert_eq!(shop.store.settle(&abandoned).await.unwrap(), None);
            assert_eq!(kind(command(&shop, "abandoned", 1, 0.0, &ran).await), ErrorKind::CommandAbandoned);
            assert_eq!(ran.load(Ordering::SeqCst), 1);
            assert_eq!(shop.count(), (2, 1));
        }
    });
}

#[test]
fn the_same_command_sent_eight_times_at_once_takes_effect_once() {
    block_on(async {
        for shop in Shop::all().await {
            let (shop, ran) = (Arc::new(shop), Arc::default());
            let send = || {
                let (shop, ran) = (Arc::clone(&shop), Arc::clone(&ran));
                tokio::spawn(async move { command(&shop, "at once", 1, 0.2, &ran).await })
            };
            let mut receipts = Vec::new();
            for sent in (0..8).map(|_| send()).collect::<Vec<_>>() {
                receipts.push(sent.await.unwrap().unwrap());
            }
            receipts.dedup();
            assert_eq!(receipts.len(), 1, "one receipt for all");
            assert_eq!(shop.count(), (2, 1));
            assert!(ran.load(Ordering::SeqCst) > 1, "none came late enough to meet the others");
        }
    });
}

/// Commits until `slow` has ended. Gives how many committed, and the time of the slowest.
async fn commits_beside<T>(shop: &Shop, slow: tokio::task::JoinHandle<T>) -> (T, u32, Duration) {
    let (mut count, mut slowest) = (0, Duration::ZERO);
    while !slow.is_finished() {
        let began = Instant::now();
        place(&shop.store, "other").await.unwrap();
        (count, slowest) = (count + 1, slowest.max(began.elapsed()));
    }
    (slow.await.unwrap(), count, slowest)
}

#[test]
fn sql_that_takes_too_long_is_rolled_back_and_others_go_on_meanwhile() {
    block_on(async {
        let Some(shop) = Shop::with(|builder| builder.sql_timeout(Duration::from_millis(800))).await else {
            return;
        };
        let in_the_server = shop.sql("INSERT INTO @outbox VALUES ('slow'); SELECT pg_sleep(20)");
        let schema = shop.at.schema.clone();
        let in_the_client = closure(move |sql| {
            Box::pin(async move {
                sql.batch_execute(&format!("INSERT INTO {schema}.outbox VALUES ('slow')")).await?;
                tokio::time::sleep(Duration::from_secs(20)).await;
                Ok(())
            })
        });
        let engine = shop.engine.clone();
        slow(&shop, tokio::spawn(async move { place_with(&engine, "second", in_the_server).await })).await;
        let engine = shop.engine.clone();
        slow(&shop, tokio::spawn(async move { place_with(&engine, "second", in_the_client).await })).await;
        let at_work = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(20)%' AND pid <> pg_backend_pid()";
        soon("the server has ended the statement", async || shop.at.psql(at_work) == "0").await;
        let (events, messages) = shop.count();
        assert_eq!(messages, 0);
        shop.place("second", shop.send()).await.unwrap();
        assert_eq!(shop.count(), (events + 1, 1));
    });
}

async fn slow(shop: &Shop, slow: tokio::task::JoinHandle<Result<Receipt>>) {
    let began = Instant::now();
    let (outcome, others, slowest) = commits_beside(shop, slow).await;
    let error = outcome.unwrap_err();
    let took = began.elapsed();
    assert_eq!(error.kind(), &ErrorKind::Rejected, "{error:?}");
    assert_eq!(error.to_string(), "the SQL of `commit_with` took longer than 800ms");
    assert!((Duration::from_millis(800)..Duration::from_secs(4)).contains(&took), "{took:?}");
    println!("{others} commits of others meanwhile, the slowest in {slowest:?}");
    assert!(others >= 20, "only {others} commits of others in {took:?}");
    assert!(slowest < Duration::from_millis(600), "a commit of another took {slowest:?}");
}

#[test]
fn as_much_sql_at_once_as_there_are_connections_holds_nobody_up() {
    block_on(async {
        let Some(shop) = Shop::with(|builder| builder.pool_size(2)).await else { return };
        let engine = shop.engine.clone();
        let many = tokio::spawn(async move {
            let slow = (0..3).map(|n| {
                let engine = engine.clone();
                tokio::spawn(async move {
                    place_with(&engine, &format!("slow {n}"), own("SELECT pg_sleep(0.6)")).await
                })
            });
            for slow in slow.collect::<Vec<_>>() {
                slow.await.unwrap().unwrap();
            }
        });
        let ((), others, slowest) = commits_beside(&shop, many).await;
        println!("{others} commits of others meanwhile, the slowest in {slowest:?}");
        assert!(slowest < Duration::from_millis(500), "a commit of another took {slowest:?}");
    });
}

#[test]
fn an_error_that_the_sql_keeps_to_itself_is_no_commit() {
    block_on(async {
        for shop in Shop::all().await {
            let swallow = |statements: &str| {
                let statements = statements.replace('@', &format!("{}.", shop.at.schema));
                closure(move |sql| {
                    Box::pin(async move {
                        let _ = sql.batch_execute(&statements).await;
                        Ok(())
                    })
                })
            };
            let wrong = "INSERT INTO @outbox VALUES ('hello'); INSERT INTO @outbox VALUES (NULL)";
            assert_eq!(kind(shop.place("second", swallow(wrong)).await), ErrorKind::Rejected);
            let empty = shop.engine.commit_with(shop.store.begin(), swallow(wrong)).await;
            assert_eq!(kind(empty), ErrorKind::Rejected);
            let recovered =
                "SAVEPOINT mine; INSERT INTO @outbox VALUES ('x'); ROLLBACK TO mine; RELEASE mine";
            shop.engine.commit_with(shop.store.begin(), swallow(recovered)).await.unwrap();
            shop.is_as_before().await;
        }
    });
}

/// If the SQL commits by itself, its rows stay; nothing can prevent that. Nothing of the unit is written with them.
#[test]
fn sql_that_ends_the_transaction_is_refused_and_nothing_of_the_unit_is_written() {
    block_on(async {
        for shop in Shop::all().await {
            let insert = "INSERT INTO @outbox VALUES ('x')";
            for (n, (ending, of_its_own)) in [
                ("COMMIT", 1),
                ("COMMIT; BEGIN", 1),
                ("COMMIT; BEGIN; SELECT 1", 1),
                ("COMMIT AND CHAIN", 1),
                ("ROLLBACK", 0),
                ("ROLLBACK; BEGIN", 0),
                ("ROLLBACK AND CHAIN", 0),
            ]
            .into_iter()
            .enumerate()
            {
                let (_, before) = shop.count();
                let sql = shop.sql(&format!("{insert}; {ending}"));
                assert_eq!(kind(shop.place("second", sql).await), ErrorKind::Invalid, "{n}: {ending}");
                assert_eq!(shop.count(), (1, before + of_its_own), "{n}: {ending}");
            }
            let in_steps = shop.at.schema.clone();
            let in_steps = closure(move |sql| {
                Box::pin(async move {
                    sql.batch_execute("ROLLBACK").await?;
                    sql.batch_execute("BEGIN").await?;
                    Ok(sql.batch_execute(&format!("INSERT INTO {in_steps}.outbox VALUES ('x')")).await?)
                })
            });
            assert_eq!(kind(shop.place("second", in_steps).await), ErrorKind::Invalid);
            assert!(shop.store.find::<Order>("second").await.unwrap().is_none());
            shop.at.psql("DELETE FROM @outbox");
            shop.is_as_before().await;
        }
    });
}

#[test]
fn a_panic_goes_on_in_the_caller_and_leaves_the_pool_whole() {
    for shop in block_on(Shop::all()) {
        for _ in 0..10 {
            let panics = shop.at.schema.clone();
            let panics = closure(move |sql| {
                Box::pin(async move {
                    sql.batch_execute(&format!("INSERT INTO {panics}.outbox VALUES ('x')")).await?;
                    panic!("on purpose")
                })
            });
            let panic =
                catch_unwind(AssertUnwindSafe(|| block_on(shop.place("second", panics)))).unwrap_err();
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
        }
        block_on(shop.is_as_before());
        let status = shop.engine.pool().status();
        assert_eq!((status.waiting, status.size), (0, status.available), "{status:?}");
    }
}

#[test]
fn a_unit_of_another_engine_is_refused() {
    block_on(async {
        let Some(shop) = Shop::new().await else { return };
        let same_store = shop.at.engine().await;
        let ran = Arc::new(AtomicBool::new(false));
        for other in [EventStore::new(same_store), EventStore::new(MemoryEngine::new())] {
            let ran = Arc::clone(&ran);
            let sql = closure(move |_| {
                ran.store(true, Ordering::SeqCst);
                Box::pin(async { Ok(()) })
            });
            assert_eq!(kind(shop.engine.commit_with(other.begin(), sql).await), ErrorKind::Invalid);
        }
        assert!(!ran.load(Ordering::SeqCst));
        shop.engine.clone().commit_with(shop.store.clone().begin(), shop.send()).await.unwrap();
    });
}

#[test]
fn a_constraint_that_is_looked_at_in_the_end_rolls_both_back() {
    block_on(async {
        for shop in Shop::all().await {
            shop.at.psql(
                "CREATE TABLE @lines (id bigint PRIMARY KEY, of bigint REFERENCES @lines DEFERRABLE INITIALLY DEFERRED)",
            );
            for _ in 0..3 {
                let orphan =
                    shop.sql("INSERT INTO @outbox VALUES ('x'); INSERT INTO @lines VALUES (1, 4711)");
                let error = shop.place("second", orphan).await.unwrap_err();
                assert_eq!(error.kind(), &ErrorKind::Rejected, "{}", all_of(&error));
                assert!(all_of(&error).contains("23503"), "{}", all_of(&error));
            }
            shop.is_as_before().await;
        }
    });
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Invoice;

#[derive(Debug, Serialize, Deserialize)]
enum InvoiceEvent {
    Written,
    Paid,
}

impl Aggregate for Invoice {
    const TYPE: &'static str = "invoice";
    type Event = InvoiceEvent;
    type Codec = Json;

    fn apply(&mut self, _: InvoiceEvent) {}
}

#[test]
fn names_first_used_in_a_commit_that_is_rolled_back_are_not_registered() {
    block_on(async {
        for shop in Shop::all().await {
            let invoice = async |event| {
                let mut work = shop.store.begin();
                let mut invoice = work.create::<Invoice>().await.unwrap();
                work.record(&mut invoice, event).unwrap();
                work
            };
            shop.at.psql(
                "CREATE TABLE @lines (id bigint PRIMARY KEY, of bigint REFERENCES @lines DEFERRABLE INITIALLY DEFERRED)",
            );
            // Refused by the SQL, by the checks of the unit, and at the COMMIT.
            let no = shop.sql("SELECT 1/0");
            shop.engine.commit_with(invoice(InvoiceEvent::Written).await, no).await.unwrap_err();
            let mut stale = invoice(InvoiceEvent::Written).await;
            stale.guard(&shop.store.load::<Order>("first").await.unwrap()).unwrap();
            place(&shop.store, "first").await.unwrap();
            shop.engine.commit_with(stale, shop.send()).await.unwrap_err();
            let orphan = shop.sql("INSERT INTO @lines VALUES (1, 4711)");
            shop.engine.commit_with(invoice(InvoiceEvent::Written).await, orphan).await.unwrap_err();
            let names = async || {
                let types = shop.store.types().await.unwrap();
                types.iter().map(|known| known.aggregate_type.to_string()).collect::<Vec<_>>()
            };
            assert_eq!(names().await, ["order"]);
            // Another process gives the unused numbers to other names.
            let other = EventStore::new(shop.at.engine().await);
            let mut work = other.begin();
            let mut paid = work.create::<Invoice>().await.unwrap();
            work.record(&mut paid, InvoiceEvent::Paid).unwrap();
            work.commit().await.unwrap();
            shop.engine.commit_with(invoice(InvoiceEvent::Written).await, shop.send()).await.unwrap();
            let log = "SELECT string_agg(event_type, ' ' ORDER BY position) FROM @event_log";
            assert_eq!(shop.at.psql(log), "Placed Placed Paid Written");
            assert_eq!(names().await, ["invoice", "order"]);
        }
    });
}

#[test]
fn a_closed_and_a_read_only_engine_run_nothing() {
    block_on(async {
        let Some(shop) = Shop::new().await else { return };
        let reading = shop.at.builder().read_from(&shop.at.url).await.unwrap();
        let reader = EventStore::new(reading.clone());
        assert_eq!(kind(reading.commit_with(reader.begin(), shop.send()).await), ErrorKind::ReadOnly);
        shop.engine.close().await.unwrap();
        let closed = shop.engine.commit_with(shop.store.begin(), shop.send()).await;
        assert_eq!(kind(closed), ErrorKind::Closed);
        assert_eq!(shop.count(), (1, 0));
    });
}

#[test]
fn it_wakes_those_who_wait() {
    block_on(async {
        let Some(shop) = Shop::new().await else { return };
        let engine = shop.engine.clone();
        let waiting = tokio::spawn(async move {
            engine.wait(Position::new(1).unwrap(), Duration::from_secs(60)).await.unwrap()
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        let began = Instant::now();
        shop.place("second", shop.send()).await.unwrap();
        assert_eq!(waiting.await.unwrap().get(), 2);
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    });
}

#[test]
fn what_the_sql_sets_for_its_session_does_not_reach_others() {
    block_on(async {
        let Some(shop) = Shop::with(|builder| builder.pool_size(2)).await else { return };
        let settings = async || {
            let client = shop.engine.pool().get().await.unwrap();
            let all = "SELECT string_agg(name || ' ' || setting, ', ' ORDER BY name) FROM pg_settings";
            client.query_one(all, &[]).await.unwrap().get::<_, String>(0)
        };
        let before = settings().await;
        assert!(before.contains("enable_seqscan off, ") && before.contains("statement_timeout 30000, "));
        let set = "SET synchronous_commit = off; SET statement_timeout = 7; SET search_path = pg_temp; \
                   SET TimeZone = 'Asia/Kathmandu'; SET enable_indexscan = off";
        for _ in 0..4 {
            shop.place("second", own(set)).await.unwrap();
        }
        let clients = (settings().await, settings().await);
        assert_eq!(clients, (before.clone(), before));
    });
}

/// RESET ALL does not change the role.
#[test]
fn a_role_that_the_sql_takes_is_not_that_of_the_commit_nor_of_others() {
    block_on(async {
        let Some(shop) = Shop::with(|builder| builder.pool_size(2)).await else { return };
        for set in ["SET ROLE pg_monitor", "SET SESSION AUTHORIZATION pg_monitor"] {
            let outcome = shop.place("second", own(set)).await;
            outcome.unwrap_or_else(|error| panic!("{set}: {}", all_of(&error)));
            let clients = (shop.engine.pool().get().await.unwrap(), shop.engine.pool().get().await.unwrap());
            for client in [clients.0, clients.1] {
                let user = "SELECT session_user || ' ' || current_user || ' ' || current_setting('role')";
                let user: String = client.query_one(user, &[]).await.unwrap().get(0);
                assert_eq!(user, "evercore evercore none", "{set}");
            }
        }
    });
}

#[test]
fn a_dropped_call_is_carried_through_whole_or_not_at_all() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engine = at.builder().connect(&named(&at.url, &at.schema)).await.unwrap();
        let shop = Shop::open(at, engine).await;
        for n in 0..60 {
            let mut work = shop.store.begin();
            let mut order = work.create::<Order>().await.unwrap();
            work.record(&mut order, OrderEvent::Placed).unwrap();
            let call = shop.engine.commit_with(work, shop.send());
            let _ = tokio::time::timeout(Duration::from_micros(n * 50), call).await;
        }
        let at_work = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{}' AND state <> 'idle'",
            shop.at.schema
        );
        soon("all is over", async || shop.at.psql(&at_work) == "0").await;
        let (events, messages) = shop.count();
        println!("{messages} of 60 calls were carried through");
        assert_eq!(events, messages + 1);
        assert_eq!(crate::orders::positions(&shop.engine).await, crate::orders::up_to(events));
    });
}

#[test]
fn eight_writers_of_both_kinds_leave_as_many_rows_as_events() {
    block_on(async {
        for shop in Shop::all().await {
            shop.at.psql("CREATE TABLE @counter (n bigint NOT NULL); INSERT INTO @counter VALUES (0)");
            let shop = Arc::new(shop);
            let writers = (0..8).map(|writer| tokio::spawn(write_both_ways(Arc::clone(&shop), writer)));
            let mut counted = 0;
            for writer in writers.collect::<Vec<_>>() {
                counted += writer.await.unwrap();
            }
            let found = "SELECT n, (SELECT count(*) FROM @events WHERE reference = 'with SQL') FROM @counter";
            assert_eq!(shop.at.psql(found), format!("{counted}|{counted}"));
            assert!(counted > 20, "{counted}");
            assert_eq!(
                crate::orders::positions(&shop.engine).await,
                crate::orders::up_to(1 + 8 * 10 + counted)
            );
        }
    });
}

/// Ten plain commits, and ten attempts with SQL on eight orders that others write too. Gives how many of the attempts
/// committed.
async fn write_both_ways(shop: Arc<Shop>, writer: i64) -> i64 {
    let mut landed = 0;
    for n in 0..10 {
        place(&shop.store, &format!("own {writer}")).await.unwrap();
        let mut work = shop.store.begin();
        let mut order = work.load_or_create::<Order>(format!("shared {}", (writer + n) % 8)).await.unwrap();
        let metadata = Metadata::new().with_reference("with SQL").unwrap();
        work.record_with(&mut order, OrderEvent::Placed, &metadata).unwrap();
        match shop.engine.commit_with(work, shop.sql("UPDATE @counter SET n = n + 1")).await {
            Ok(_) => landed += 1,
            Err(error) => assert!(error.is_conflict(), "{}", all_of(&error)),
        }
    }
    landed
}

/// The server reports an ERROR with a code that a proxy or a cluster gives for a broken connection to the node that
/// commits.
#[test]
fn an_error_that_may_come_after_the_commit_leaves_the_outcome_open() {
    block_on(async {
        let Some(shop) = Shop::new().await else { return };
        let fail = |code: &str, when: &str| {
            shop.at.psql(&format!(
                "CREATE OR REPLACE FUNCTION @fail() RETURNS trigger LANGUAGE plpgsql
                     AS $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$;
                 DROP TRIGGER IF EXISTS fail ON @events;
                 CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON @events DEFERRABLE INITIALLY {when}
                     FOR EACH ROW EXECUTE FUNCTION @fail()"
            ));
        };
        for (code, is_open) in [("08006", true), ("XX000", true), ("40003", true), ("22012", false)] {
            fail(code, "DEFERRED");
            // In one statement, in the careful way (with a new type name), and with SQL of the user.
            let note = |_: &Order| [crate::orders::noted(code)];
            let mut outcomes = vec![
                kind(place(&shop.store, "first").await),
                kind(shop.store.update::<Order, _, _>("first", note).await),
                kind(shop.place("first", shop.send()).await),
            ];
            fail(code, "IMMEDIATE");
            outcomes.push(kind(place(&shop.store, "first").await));
            let open = outcomes.iter().filter(|kind| **kind == ErrorKind::OutcomeUnknown).count();
            assert_eq!(open, if is_open { 4 } else { 0 }, "{code}: {outcomes:?}");
        }
        shop.at.psql("DROP TRIGGER fail ON @events");
        shop.is_as_before().await;
    });
}

/// Another transaction was in the way. The same work may succeed a moment later.
#[test]
fn what_the_server_undoes_may_be_tried_again() {
    block_on(async {
        for shop in Shop::all().await {
            for code in ["40001", "40P01"] {
                for when in ["DEFERRED", "IMMEDIATE"] {
                    shop.at.psql(&format!(
                        "CREATE OR REPLACE FUNCTION @undo() RETURNS trigger LANGUAGE plpgsql
                             AS $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$;
                         CREATE CONSTRAINT TRIGGER undo AFTER INSERT ON @outbox DEFERRABLE INITIALLY {when}
                             FOR EACH ROW EXECUTE FUNCTION @undo()"
                    ));
                    let error = shop.place("first", shop.send()).await.unwrap_err();
                    assert_eq!(error.kind(), &ErrorKind::Unavailable, "{when}: {}", all_of(&error));
                    assert!(error.to_string().contains(code), "{error}");
                    shop.at.psql("DROP TRIGGER undo ON @outbox");
                }
            }
            shop.is_as_before().await;
        }
    });
}

#[test]
fn the_sql_is_planned_as_postgresql_does_by_itself() {
    block_on(async {
        for shop in Shop::all().await {
            let note = shop.sql(
                "INSERT INTO @outbox SELECT pg_catalog.string_agg(name || ' ' || setting, ', ' ORDER BY name)
                     FROM pg_settings WHERE name IN ('enable_seqscan', 'enable_bitmapscan', 'plan_cache_mode',
                         'search_path', 'statement_timeout', 'synchronous_commit', 'transaction_isolation')",
            );
            shop.place("second", note).await.unwrap();
            let expected = "enable_bitmapscan on, enable_seqscan on, plan_cache_mode auto, \
                            search_path \"$user\", public, statement_timeout 5000, synchronous_commit on, \
                            transaction_isolation read committed";
            assert_eq!(shop.at.psql("SELECT message FROM @outbox"), expected);
        }
    });
}

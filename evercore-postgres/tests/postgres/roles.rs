//! The roles of `roles/`: an application that appends and changes nothing, and a reader.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use evercore_core::engine::{
    Advance, Append, Batch, NewEvent, ParkedChange, Payload, Step, SubscriptionStorage,
};
use evercore_postgres::{
    AggregateId, AggregateType, CommandId, CursorId, ErrorKind, EventStore, EventType, KnownType, Lease,
    LogQuery, Metadata, OwnerId, Parked, Position, PostgresEngine, Result, Sequence, StorageEngine,
    SubscriptionName, Timestamp,
};
use evercore_testkit::postgres::{self, Server};

use crate::common::block_on;
use crate::orders::{Order, all_of, closure, kind, noted, place, positions, up_to};

const APPLICATION: &str = include_str!("../../roles/application.sql");
const READ_ONLY: &str = include_str!("../../roles/read_only.sql");

/// A server with an owner, an application and a reader; the owner has made the store.
struct Shop {
    server: Server,
    owner: String,
    application: String,
    reader: String,
}

impl Shop {
    async fn new() -> Option<Self> {
        let server = Server::builder().start_or_skip()?;
        server
            .psql(
                "postgres",
                "CREATE ROLE shop_owner LOGIN; CREATE ROLE shop_app LOGIN; CREATE ROLE shop_reports LOGIN;
                 GRANT CREATE ON DATABASE postgres TO shop_owner",
            )
            .unwrap();
        let url = |role: &str| server.url().replace("//evercore@", &format!("//{role}@"));
        let (owner, application, reader) = (url("shop_owner"), url("shop_app"), url("shop_reports"));
        let shop = Self { server, owner, application, reader };
        PostgresEngine::builder().migrate(&shop.owner).await.unwrap();
        shop.grant(APPLICATION, "shop_app");
        shop.grant(READ_ONLY, "shop_reports");
        Some(shop)
    }

    /// Runs a file as `psql -v schema=evercore -v role=… -f …` does.
    fn grant(&self, file: &str, role: &str) {
        let variables = format!("\\set schema evercore\n\\set role {role}\n");
        postgres::psql(&self.owner, &(variables + file)).unwrap();
    }

    fn psql(&self, sql: &str) -> String {
        self.server.psql("postgres", sql).unwrap()
    }
}

/// The error code of a statement of the role.
async fn code_of(url: &str, sql: &str) -> String {
    let tls = evercore_postgres::tokio_postgres::NoTls;
    let (client, connection) = evercore_postgres::tokio_postgres::connect(url, tls).await.unwrap();
    tokio::spawn(connection);
    let error = client.batch_execute(sql).await.expect_err(sql);
    error.code().unwrap().code().to_owned()
}

/// Makes every call of an engine, with new names; gives the number in them.
async fn walk(engine: &PostgresEngine) -> Result<usize> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let store = EventStore::new(engine.clone());
    for round in 0..12 {
        store.update_or_create::<Order, _, _>(format!("order {n}"), |_| [noted(format!("{round}"))]).await?;
    }
    let mut work = store.begin();
    let mut order = work.load::<Order>(format!("order {n}")).await?;
    work.record(&mut order, noted("renamed"))?;
    work.change_key(&mut order, format!("renamed {n}"))?;
    work.set_command(CommandId::new(format!("command {n}"))?);
    let receipt = work.commit().await?;
    let order = store.load::<Order>(format!("renamed {n}")).await?;
    assert_eq!((order.events, order.sequence().get()), (13, 13));
    assert_eq!(store.settle(&CommandId::new(format!("command {n}"))?).await?, Some(receipt));
    assert_eq!(store.settle(&CommandId::new(format!("never {n}"))?).await?, None);
    let mut guarded = store.begin();
    guarded.guard(&order).unwrap();
    guarded.commit().await?;
    new_names(engine, n).await?;
    let page = store.read_log(&LogQuery::after(Position::ZERO)).await?;
    store.position_at(Timestamp::now()).await?;
    assert_eq!(page.head, store.head().await?);
    let beside = closure(|sql| Box::pin(async move { Ok(sql.batch_execute("SELECT 1").await?) }));
    let mut work = store.begin();
    let mut order = work.load::<Order>(format!("renamed {n}")).await?;
    work.record(&mut order, noted("with SQL"))?;
    engine.commit_with(work, beside).await?;
    subscribe(engine, n).await?;
    Ok(n)
}

/// Moves a cursor, and parks an event twice.
async fn subscribe(engine: &PostgresEngine, n: usize) -> Result<()> {
    let id = CursorId { subscription: SubscriptionName::new(format!("walk {n}"))?, version: 1, partition: 0 };
    engine.step(&id, &Step::declare(1, Position::ZERO, None)).await?;
    let (owner, time) = (OwnerId::new("walker")?, Duration::from_secs(9));
    let cursor = engine.step(&id, &Step::claim(owner.clone(), time)).await?.unwrap();
    let parked = Parked {
        position: Position::new(1)?,
        aggregate: AggregateId::new(1)?,
        holds_back: true,
        attempts: 1,
        error: "no".to_owned(),
        parked_at: Timestamp::now(),
        is_due: false,
    };
    let lease = Lease { owner, epoch: cursor.epoch };
    let mut advance = Advance::new(lease, Position::ZERO, Position::new(1)?, time);
    advance.parked = vec![ParkedChange::Keep(parked.clone()), ParkedChange::Keep(parked)];
    engine.step(&id, &Step::Advance(advance)).await?;
    assert_eq!(engine.parked(&id, Position::ZERO, 9).await?.len(), 1);
    engine.step(&id, &Step::Remove).await?;
    assert!(engine.cursors(Some(&id.subscription)).await?.cursors.is_empty());
    Ok(())
}

/// Registers some names by a warm-up, and others by a commit.
async fn new_names(engine: &PostgresEngine, n: usize) -> Result<()> {
    let (warm, cold) = (AggregateType::new(format!("warm {n}"))?, AggregateType::new(format!("cold {n}"))?);
    let event_type = EventType::new("Happened")?;
    engine.warmup(&[KnownType { aggregate_type: warm, event_types: vec![event_type.clone()] }]).await?;
    let id = engine.reserve(1).await?.next().unwrap();
    let event = NewEvent {
        event_type,
        payload: Payload::new(b"{}")?,
        time: Timestamp::now(),
        metadata: Arc::new(Metadata::new()),
    };
    let mut batch = Batch::new();
    batch.create(evercore_core::engine::NewAggregate { id, aggregate_type: cold.clone(), key: None })?;
    batch.append(Append {
        aggregate: id,
        aggregate_type: cold,
        expected: Sequence::ZERO,
        events: vec![event],
    })?;
    engine.commit(batch).await.map(drop)
}

#[test]
fn an_application_without_rights_to_change_does_all_its_work() {
    block_on(async {
        let Some(shop) = Shop::new().await else { return };
        // Migrating on connect is on, and finds nothing to do.
        for builder in [PostgresEngine::builder(), PostgresEngine::builder().pooler(true)] {
            let engine = builder.connect(&shop.application).await.unwrap();
            walk(&engine).await.unwrap();
            walk(&engine).await.unwrap();
            engine.close().await.unwrap();
        }
        let elsewhere = PostgresEngine::builder().schema("elsewhere").unwrap();
        assert_eq!(kind(elsewhere.connect(&shop.application).await), ErrorKind::ReadOnly);
        for refused in [
            "UPDATE evercore.events SET payload = ''",
            "DELETE FROM evercore.events",
            "TRUNCATE evercore.events",
            "DELETE FROM evercore.aggregates",
            "UPDATE evercore.aggregates SET aggregate_type_id = 1",
            "UPDATE evercore.commands SET receipt = NULL",
            "DELETE FROM evercore.commands",
            "DELETE FROM evercore.snapshots",
            "DELETE FROM evercore.log_end",
            "UPDATE evercore.store SET schema_version = 2",
            "UPDATE evercore.event_types SET name = 'x'",
            "ALTER TABLE evercore.events ADD COLUMN x int",
            "ALTER TABLE evercore.events DISABLE TRIGGER ALL",
            "DROP TABLE evercore.events",
            "DROP SCHEMA evercore CASCADE",
            "CREATE TABLE evercore.mine (x int)",
            "CREATE INDEX ON evercore.events (reference)",
        ] {
            assert_eq!(code_of(&shop.application, refused).await, "42501", "{refused}");
        }
    });
}

/// Takes away each right of the application's role, one at a time. Something must fail each time.
#[test]
fn the_application_needs_every_right_that_it_has() {
    block_on(async {
        let Some(shop) = Shop::new().await else { return };
        let rights = "SELECT string_agg(right_, ';') FROM (
            SELECT privilege_type || ' ON evercore.' || table_name AS right_ FROM information_schema.table_privileges
            WHERE grantee = 'shop_app'
            UNION ALL
            SELECT DISTINCT 'UPDATE (' || column_name || ') ON evercore.' || table_name
            FROM information_schema.column_privileges WHERE grantee = 'shop_app' AND privilege_type = 'UPDATE'
              AND table_name NOT IN ('cursors', 'parked_events')
            UNION ALL SELECT 'USAGE ON SCHEMA evercore') AS r";
        let rights = shop.psql(rights);
        let rights: Vec<&str> = rights.split(';').collect();
        assert_eq!(rights.len(), 8 + 6 + 7 + 2 * 4 + 1, "{rights:?}");
        for right in rights {
            shop.psql(&format!("REVOKE {right} FROM shop_app"));
            let outcome = async { walk(&PostgresEngine::connect(&shop.application).await?).await }.await;
            shop.psql(&format!("GRANT {right} TO shop_app"));
            let error = outcome.expect_err(right);
            assert_eq!(error.kind(), &ErrorKind::ReadOnly, "{right}: {}", all_of(&error));
            assert!(all_of(&error).contains("42501"), "{right}: {}", all_of(&error));
        }
        walk(&PostgresEngine::connect(&shop.application).await.unwrap()).await.unwrap();
    });
}

#[test]
fn a_reader_reads_everything_and_writes_nothing() {
    block_on(async {
        let Some(shop) = Shop::new().await else { return };
        let writing = PostgresEngine::connect(&shop.application).await.unwrap();
        let n = walk(&writing).await.unwrap();
        let head = writing.head().await.unwrap();
        let engine = PostgresEngine::read_from(&shop.reader).await.unwrap();
        let store = EventStore::new(engine.clone());
        assert_eq!(positions(&engine).await, up_to(head.get()));
        assert_eq!(store.load::<Order>(format!("renamed {n}")).await.unwrap().events, 14);
        assert_eq!(store.types().await.unwrap(), EventStore::new(writing.clone()).types().await.unwrap());
        assert!(store.receipt(&CommandId::new(format!("command {n}")).unwrap()).await.unwrap().is_some());
        assert_eq!(store.position_at(Timestamp::now()).await.unwrap(), head);
        for refused in [
            kind(place(&store, "another").await),
            kind(store.settle(&CommandId::new("x").unwrap()).await),
            kind(store.warmup::<Order>().await),
            kind(engine.reserve(1).await),
            kind(engine.commit_with(store.begin(), crate::orders::own("SELECT 1")).await),
            kind(subscribe(&engine, n).await),
        ] {
            assert_eq!(refused, ErrorKind::ReadOnly);
        }
        assert!(engine.cursors(None).await.unwrap().cursors.is_empty());
        // It connects as a writer, and the server refuses its writes.
        let hopeful = EventStore::new(PostgresEngine::connect(&shop.reader).await.unwrap());
        assert_eq!(kind(place(&hopeful, "another").await), ErrorKind::ReadOnly);
        assert_eq!(writing.head().await.unwrap(), head);
        let log = postgres::psql(&shop.reader, "SELECT count(*) FROM evercore.event_log").unwrap();
        assert_eq!(log, head.to_string());
        assert_eq!(code_of(&shop.reader, "DELETE FROM evercore.event_log").await, "55000");
        assert_eq!(code_of(&shop.reader, "INSERT INTO evercore.commands VALUES ('x')").await, "42501");
    });
}

/// A role makes functions in `public` that fit our calls better than PostgreSQL's. They must not run as the
/// application.
#[test]
fn what_others_make_in_public_does_not_run_as_the_application() {
    block_on(async {
        let Some(shop) = Shop::new().await else { return };
        shop.psql("CREATE ROLE mallory LOGIN; GRANT CREATE ON SCHEMA public TO mallory");
        let mallory = shop.owner.replace("shop_owner", "mallory");
        let traps = "CREATE TABLE public.loot (who text); GRANT ALL ON public.loot TO PUBLIC;
            CREATE FUNCTION public.concat(bigint, text, bigint, text, bigint, text) RETURNS text LANGUAGE plpgsql
                AS $$ BEGIN INSERT INTO public.loot VALUES (current_user); RETURN '7 7 7;1 7'; END $$;
            CREATE FUNCTION public.times(double precision, integer) RETURNS double precision LANGUAGE plpgsql
                AS $$ BEGIN INSERT INTO public.loot VALUES (current_user); RETURN 1; END $$;
            CREATE OPERATOR public.* (FUNCTION = public.times, LEFTARG = double precision, RIGHTARG = integer);
            CREATE FUNCTION public.times(numeric, integer) RETURNS numeric LANGUAGE plpgsql
                AS $$ BEGIN INSERT INTO public.loot VALUES (current_user); RETURN 1; END $$;
            CREATE OPERATOR public.* (FUNCTION = public.times, LEFTARG = numeric, RIGHTARG = integer);
            CREATE FUNCTION public.array_position(bigint[], bigint) RETURNS integer LANGUAGE plpgsql
                AS $$ BEGIN INSERT INTO public.loot VALUES (current_user); RETURN 1; END $$";
        postgres::psql(&mallory, traps).unwrap();
        let engine =
            PostgresEngine::builder().migrate_on_connect(false).connect(&shop.application).await.unwrap();
        let n = walk(&engine).await.unwrap();
        let store = EventStore::new(engine.clone());
        let command = CommandId::new("once").unwrap();
        let paid =
            store.update_once::<Order, _, _>(command.clone(), format!("renamed {n}"), |_| [noted("x")]).await;
        let receipt = store.receipt(&command).await.unwrap().unwrap();
        assert_eq!(receipt.last, paid.unwrap().last);
        assert_eq!(shop.psql("SELECT string_agg(DISTINCT who, ' ') FROM public.loot"), "");
    });
}

/// If pg_catalog comes after another schema, an operator may belong to another role.
#[test]
fn a_search_path_that_has_others_before_pg_catalog_is_refused() {
    block_on(async {
        let Some(shop) = Shop::new().await else { return };
        let connect =
            async || PostgresEngine::builder().migrate_on_connect(false).connect(&shop.application).await;
        for (path, is_fine) in [
            ("public, pg_catalog", false),
            ("pg_temp, evercore, pg_catalog", false),
            ("pg_catalog, public", true),
            ("evercore, public", true),
            ("''", true),
        ] {
            shop.psql(&format!("ALTER ROLE shop_app SET search_path = {path}"));
            match connect().await {
                Ok(_) => assert!(is_fine, "{path}"),
                Err(error) => {
                    assert!(!is_fine && error.to_string().contains("search_path"), "{path}: {error}");
                    assert_eq!(error.kind(), &ErrorKind::Backend);
                }
            }
        }
    });
}

//! Creating a store, and schemas that are not one.

use std::time::Duration;

use evercore_postgres::{Builder, ErrorKind, EventStore, PostgresEngine, StorageEngine};
use evercore_testkit::postgres;

use crate::common::{Place, block_on};
use crate::orders::{all_of, as_child, child, kind, named, place, positions, soon, up_to, with_database};

/// The content of a schema.
fn relations(at: &Place) -> String {
    let sql = "SELECT coalesce(string_agg(relname, ' ' ORDER BY relname), '') FROM pg_class
               WHERE relkind IN ('r', 'v') AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = '#')";
    postgres::psql(&at.url, &sql.replace('#', &at.schema)).unwrap()
}

fn schema_exists(at: &Place) -> bool {
    let sql = format!("SELECT count(*) FROM pg_namespace WHERE nspname = '{}'", at.schema);
    postgres::psql(&at.url, &sql).unwrap() == "1"
}

/// Fails in each way without making a store.
async fn refusals(at: &Place) -> Vec<ErrorKind> {
    let reading = at.builder().read_from(&at.url).await;
    vec![kind(at.builder().migrate_on_connect(false).connect(&at.url).await), kind(reading)]
}

#[test]
fn a_store_is_made_once_and_connecting_again_is_harmless() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engine = at.engine().await;
        assert_eq!(engine.schema(), at.schema);
        assert_eq!(engine.store_id().len(), 32);
        place(&EventStore::new(engine.clone()), "first").await.unwrap();
        let tables = relations(&at);
        assert_eq!(
            tables,
            "aggregate_types aggregates commands cursors event_log event_types events evercore_schema_history log_end \
             parked_events snapshots store"
        );
        at.builder().migrate(&at.url).await.unwrap();
        for again in [at.builder(), at.builder().migrate_on_connect(false), at.builder().pooler(true)] {
            let again = again.connect(&at.url).await.unwrap();
            assert_eq!(again.store_id(), engine.store_id());
            assert_eq!(again.identity(), engine.identity());
            assert_eq!(positions(&again).await, [1]);
        }
        assert_eq!(relations(&at), tables);
    });
}

#[test]
fn a_schema_that_somebody_made_before_is_filled() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        postgres::psql(
            &at.url,
            &format!("CREATE SCHEMA {}; CREATE TABLE {0}.letters (text text)", at.schema),
        )
        .unwrap();
        assert_eq!(refusals(&at).await, [ErrorKind::NotAStore, ErrorKind::NotAStore]);
        place(&EventStore::new(at.engine().await), "first").await.unwrap();
        assert!(relations(&at).contains("letters"));
    });
}

#[test]
fn eight_processes_may_make_one_store_at_once() {
    if let Some(at) = as_child() {
        let (url, schema) = at.split_once('|').unwrap();
        let engine = block_on(PostgresEngine::builder().schema(schema).unwrap().connect(url)).unwrap();
        block_on(place(&EventStore::new(engine.clone()), "shared")).unwrap();
        println!("store {}", engine.store_id());
        return;
    }
    for _ in 0..2 {
        let Some(at) = Place::fresh() else { return };
        let with = format!("{}|{}", at.url, at.schema);
        let start = || child("migrate::eight_processes_may_make_one_store_at_once", &with).spawn().unwrap();
        let children: Vec<_> = (0..8).map(|_| start()).collect();
        let mut stores = Vec::new();
        for child in children {
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
            stores.extend(said.lines().filter_map(|line| Some(line.split_once("store ")?.1.to_owned())));
        }
        assert_eq!(stores.len(), 8);
        stores.dedup();
        assert_eq!(stores.len(), 1);
        assert_eq!(block_on(async { positions(&at.engine().await).await }), up_to(8));
        assert_eq!(at.psql("SELECT count(*) FROM @aggregates"), "1");
    }
}

#[test]
fn several_stores_live_in_one_database() {
    block_on(async {
        let (Some(one), Some(other)) = (Place::fresh(), Place::fresh()) else { return };
        let (first, second) = (one.engine().await, other.engine().await);
        assert_ne!(first.store_id(), second.store_id());
        assert_ne!(first.identity(), second.identity());
        for _ in 0..3 {
            place(&EventStore::new(first.clone()), "same key").await.unwrap();
        }
        assert_eq!((positions(&first).await, positions(&second).await), (up_to(3), up_to(0)));
        place(&EventStore::new(second.clone()), "same key").await.unwrap();
        assert_eq!((positions(&first).await, positions(&second).await), (up_to(3), up_to(1)));
    });
}

#[test]
fn the_name_of_a_schema_is_checked_and_a_word_of_sql_may_be_one() {
    let bad: [&str; 8] =
        ["", "Orders", "a-b", "a b", "a\"; DROP TABLE x; --", "pg_mine", "9a", &"x".repeat(64)];
    for name in bad {
        assert_eq!(kind(PostgresEngine::builder().schema(name)), ErrorKind::InvalidName, "{name}");
    }
    block_on(async {
        let Some(mut at) = Place::fresh() else { return };
        let longest = format!("{:x<63}", at.schema);
        for name in ["select".to_owned(), longest] {
            at.schema = name;
            let drop = format!("DROP SCHEMA IF EXISTS \"{}\" CASCADE", at.schema);
            postgres::psql(&at.url, &drop).unwrap();
            let store = EventStore::new(at.engine().await);
            place(&store, "first").await.unwrap();
            let waited = store.wait(store.head().await.unwrap(), Duration::from_millis(50)).await.unwrap();
            assert_eq!(waited.get(), 1);
            postgres::psql(&at.url, &drop).unwrap();
        }
    });
}

#[test]
fn a_newer_schema_is_refused_with_both_numbers_and_left_alone() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        drop(at.engine().await);
        at.psql("UPDATE @store SET schema_version = 99");
        let too_new = |kind: &ErrorKind| matches!(kind, ErrorKind::SchemaTooNew { found: 99, known: 1, .. });
        for kind in refusals(&at).await.into_iter().chain([
            kind(at.builder().connect(&at.url).await),
            kind(at.builder().migrate(&at.url).await),
            kind(at.builder().pooler(true).connect(&at.url).await),
        ]) {
            assert!(too_new(&kind), "{kind:?}");
        }
        assert_eq!(at.psql("SELECT schema_version FROM @store"), "99");
    });
}

#[test]
fn a_store_that_is_not_to_be_made_is_not_made() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        assert_eq!(refusals(&at).await, [ErrorKind::NotAStore, ErrorKind::NotAStore]);
        assert!(!schema_exists(&at));
        at.builder().migrate(&at.url).await.unwrap();
        at.builder().migrate_on_connect(false).connect(&at.url).await.unwrap();
    });
}

#[test]
fn tables_of_others_by_our_names_are_no_store_and_left_alone() {
    block_on(async {
        for theirs in [
            "CREATE TABLE @store (isbn text); INSERT INTO @store VALUES ('x')",
            "CREATE TABLE @store (one int, schema_version text); INSERT INTO @store VALUES (1, 'mine')",
            "CREATE TABLE @store (one int, schema_version int)",
            "CREATE VIEW @store AS SELECT 1 AS number",
            "CREATE TABLE @events (what text)",
            "CREATE TABLE @evercore_schema_history (version int4 PRIMARY KEY, name varchar(255), \
             applied_on varchar(255), checksum varchar(255)); \
             INSERT INTO @evercore_schema_history VALUES (1, 'letters', '2026-01-01T00:00:00Z', '17')",
        ] {
            let Some(at) = Place::fresh() else { return };
            postgres::psql(&at.url, &format!("CREATE SCHEMA {}", at.schema)).unwrap();
            at.psql(theirs);
            let before = relations(&at);
            for builder in [at.builder(), at.builder().migrate_on_connect(false)] {
                let error = builder.connect(&at.url).await.unwrap_err();
                assert_eq!(error.kind(), &ErrorKind::NotAStore, "{theirs}: {}", all_of(&error));
                let is_migrated = error.to_string().contains("a table that is not evercore's");
                assert_eq!(is_migrated, error.to_string().contains("42P07"), "{error}");
            }
            assert_eq!(relations(&at), before, "{theirs}");
        }
    });
}

#[test]
fn a_database_that_is_not_in_utf_8_is_refused_in_plain_words() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        for encoding in ["LATIN1", "SQL_ASCII"] {
            let name = format!("{}_{}", at.schema, encoding.to_lowercase());
            let create =
                format!("CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0");
            postgres::psql(&at.url, &create).unwrap();
            let url = with_database(&at.url, &name);
            let error = at.builder().connect(&url).await.unwrap_err();
            postgres::psql(&at.url, &format!("DROP DATABASE {name} WITH (FORCE)")).unwrap();
            assert_eq!(error.kind(), &ErrorKind::Backend);
            let plain = format!("the database is encoded in {encoding}, a store needs UTF8");
            assert_eq!(error.to_string(), plain);
        }
    });
}

/// Another session makes a table of the same name and does not commit, so the migration waits in the middle.
#[test]
fn a_migration_that_is_cut_off_leaves_nothing() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        postgres::psql(&at.url, &format!("CREATE SCHEMA {}", at.schema)).unwrap();
        let (mut side, connection) =
            evercore_postgres::tokio_postgres::connect(&at.url, NO_TLS).await.unwrap();
        tokio::spawn(connection);
        let in_the_way = side.transaction().await.unwrap();
        in_the_way.batch_execute(&format!("CREATE TABLE {}.snapshots (x int)", at.schema)).await.unwrap();
        let at_work = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cut off' AND wait_event_type = 'Lock'";
        let url = named(&at.url, "cut%20off");
        let (builder, target): (Builder, String) = (at.builder(), url);
        let migration = tokio::spawn(async move { builder.connect(&target).await.map(drop) });
        soon("the migration waits for the table", async || at.psql(at_work) == "1").await;
        migration.abort();
        assert!(migration.await.unwrap_err().is_cancelled());
        in_the_way.rollback().await.unwrap();
        let left = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cut off'";
        soon("its connection is gone", async || at.psql(left) == "0").await;
        assert_eq!(relations(&at), "");
        place(&EventStore::new(at.engine().await), "first").await.unwrap();
    });
}

const NO_TLS: evercore_postgres::tokio_postgres::NoTls = evercore_postgres::tokio_postgres::NoTls;

#[test]
fn what_is_made_by_one_is_seen_by_the_next_at_once() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let engines = [at.engine().await, at.engine().await];
        for round in 0..4 {
            let store = EventStore::new(engines[round % 2].clone());
            place(&store, &format!("order {round}")).await.unwrap();
            for engine in &engines {
                assert_eq!(engine.head().await.unwrap().get(), i64::try_from(round).unwrap() + 1);
            }
        }
    });
}

/// An application that uses refinery has its own history, also in the schema of the store.
#[test]
fn the_history_of_the_applications_own_migrations_is_left_alone() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        postgres::psql(&at.url, &format!("CREATE SCHEMA {}", at.schema)).unwrap();
        at.psql(
            "CREATE TABLE @refinery_schema_history (version int4 PRIMARY KEY, name varchar(255), \
             applied_on varchar(255), checksum varchar(255)); \
             INSERT INTO @refinery_schema_history VALUES (1, 'letters', '2026-01-01T00:00:00Z', '17')",
        );
        place(&EventStore::new(at.engine().await), "first").await.unwrap();
        at.engine().await;
        assert_eq!(at.psql("SELECT version, name FROM @refinery_schema_history"), "1|letters");
    });
}

/// A statement of a migration has no time-out; a commit has one. The error gives the reason.
#[test]
fn a_migration_is_not_bound_by_the_time_out_of_statements() {
    block_on(async {
        let Some(at) = Place::fresh() else { return };
        let name = format!("{}_slow", at.schema);
        postgres::psql(&at.url, &format!("CREATE DATABASE {name}")).unwrap();
        let url = with_database(&at.url, &name);
        let trigger = |body: &str| {
            let sql = format!(
                "DROP EVENT TRIGGER IF EXISTS slow; CREATE OR REPLACE FUNCTION slow() RETURNS event_trigger
                 LANGUAGE plpgsql AS $$ BEGIN {body}; END $$;
                 CREATE EVENT TRIGGER slow ON ddl_command_end WHEN TAG IN ('CREATE VIEW') EXECUTE FUNCTION slow()"
            );
            postgres::psql(&url, &sql).unwrap();
        };
        let timeout = Duration::from_secs(1);
        let builder = at.builder().statement_timeout(timeout).connect_timeout(timeout);
        trigger("RAISE EXCEPTION 'no' USING ERRCODE = '22012'");
        let error = builder.clone().connect(&url).await.unwrap_err();
        assert!(error.to_string().contains("22012"), "{}", all_of(&error));
        trigger("PERFORM pg_sleep(1.5)");
        builder.connect(&url).await.unwrap().close().await.unwrap();
        postgres::psql(&at.url, &format!("DROP DATABASE {name} WITH (FORCE)")).unwrap();
    });
}

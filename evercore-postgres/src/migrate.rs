//! Checks whether the schema holds a store, and creates or migrates it.

use evercore_core::{Error, ErrorKind};
use refinery::AsyncMigrate;
use refinery::{Migration, Runner};
use refinery_core::traits::r#async::{AsyncQuery, AsyncTransaction};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, GenericClient, IsolationLevel, Row, Transaction};

use crate::connection::pool::Pools;
use crate::error::{Result, UNTOLD_POOLER, at_first, not_a_store};

mod embedded {
    refinery::embed_migrations!("migrations");
}

/// The schema version that this library writes, which is that of the last migration.
const SCHEMA_VERSION: u32 = 1;

/// Asks for the server's encoding, whether the schema exists, whether it has a table `store`, and for one of our
/// session settings, which shows whether the settings reached the session.
pub(crate) const INSPECT: &str =
    "SELECT pg_catalog.current_setting('server_encoding'), n.oid IS NOT NULL, c.oid IS NOT NULL,
        pg_catalog.current_setting('plan_cache_mode')
    FROM (SELECT 1) AS one
    LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = $1
    LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = 'store'";

/// The table of the migrations that have run. It does not have refinery's default name, because an application may use
/// refinery too.
const HISTORY: &str = "evercore_schema_history";

/// The search path of the session.
const SEARCHED: &str = "SELECT pg_catalog.current_schemas(true)";

/// The state of a schema before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SchemaState {
    Store(u32),
    EmptySchema,
    NoSchema,
}

/// Makes sure that the schema holds a store of this library's schema version.
pub(crate) async fn prepare(pools: &Pools) -> Result<(), Error> {
    let has_sessions = pools.settings.has_sessions();
    let checkout = pools.to_read().await.map_err(|error| at_first(error, has_sessions))?;
    let outcome = pools.in_time(async { inspect(pools, checkout.sender()?.client).await }).await;
    let found = checkout.after(outcome)?;
    let may_migrate = pools.settings.migrate && !pools.settings.read_only;
    match found {
        SchemaState::Store(version) if version > SCHEMA_VERSION => {
            Err(Error::schema_too_new(version, SCHEMA_VERSION))
        }
        SchemaState::Store(SCHEMA_VERSION) => Ok(()),
        _ if may_migrate => Ok(migrate(pools).await?),
        SchemaState::Store(version) => Err(not_a_store(format!(
            "the store has schema version {version}, this library needs {SCHEMA_VERSION}: migrate it first"
        ))),
        SchemaState::EmptySchema | SchemaState::NoSchema => {
            Err(not_a_store(format!("the schema \"{}\" holds no store", pools.settings.schema.as_str())))
        }
    }
}

/// Uses unnamed statements, because it runs once and must work on any kind of connection.
async fn inspect(pools: &Pools, client: &impl GenericClient) -> Result<SchemaState> {
    let schema = pools.settings.schema.as_str();
    check_search_path(client).await?;
    let name = [(&schema as &(dyn ToSql + Sync), Type::TEXT)];
    let row = client.query_typed(INSPECT, &name).await?;
    let row = row.first().ok_or_else(|| not_a_store("the server's catalogue is empty"))?;
    let encoding: String = row.try_get(0)?;
    if encoding != "UTF8" {
        let message = format!("the database is encoded in {encoding}, a store needs UTF8");
        return Err(Error::new(ErrorKind::Backend, message).into());
    }
    if pools.settings.has_sessions() && row.try_get::<_, &str>(3)? != "force_generic_plan" {
        return Err(Error::new(ErrorKind::Backend, UNTOLD_POOLER).into());
    }
    if !row.try_get::<_, bool>(1)? {
        return Ok(SchemaState::NoSchema);
    }
    if !row.try_get::<_, bool>(2)? {
        return Ok(SchemaState::EmptySchema);
    }
    let version = pools.settings.schema.fill("SELECT schema_version FROM @store WHERE one = 1");
    let row = client.query_typed(&version, &[]).await?;
    let row = row.first().ok_or_else(|| not_a_store("the table of the store is empty"))?;
    let version: i32 = row.try_get(0)?;
    Ok(SchemaState::Store(u32::try_from(version).unwrap_or(u32::MAX)))
}

/// PostgreSQL searches pg_catalog first unless the search path names it later. Then our SQL could call operators that
/// others have created.
async fn check_search_path(client: &impl GenericClient) -> Result<()> {
    let rows = client.query_typed(SEARCHED, &[]).await?;
    let schemas: Vec<String> = rows.first().map(|row| row.try_get(0)).transpose()?.unwrap_or_default();
    let first = schemas.iter().find(|schema| !schema.starts_with("pg_temp"));
    match first {
        Some(first) if first != "pg_catalog" => {
            let message = format!(
                "the search_path has \"{first}\" before pg_catalog, so what is made there would run instead of \
                 PostgreSQL's own: put pg_catalog first, or leave it out"
            );
            Err(Error::new(ErrorKind::Backend, message).into())
        }
        _ => Ok(()),
    }
}

/// Runs all migrations in one transaction under a lock: refinery takes none, and several hosts may start at once.
async fn migrate(pools: &Pools) -> Result<()> {
    let mut checkout = pools.to_write().await?;
    let outcome = run(pools, checkout.client_mut()?).await;
    outcome.map(|()| checkout.put_back())
}

async fn run(pools: &Pools, client: &mut Client) -> Result<()> {
    let schema = pools.settings.schema.as_str();
    // With a guard, so that the transaction is rolled back if this future is dropped.
    let begin = client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start();
    let transaction = pools.in_time(async { Ok(begin.await?) }).await?;
    let lock = format!(
        "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('evercore {schema}', 0))"
    );
    let found = pools.in_time(async {
        transaction.batch_execute(&lock).await?;
        inspect(pools, &transaction).await
    });
    match found.await? {
        SchemaState::Store(version) if version >= SCHEMA_VERSION => {}
        found => {
            if found == SchemaState::NoSchema {
                transaction.batch_execute(&format!("CREATE SCHEMA \"{schema}\"")).await?;
            }
            // Filling a large table may take any time, so there is no statement time-out. The lock time-out stays.
            transaction.batch_execute("SET LOCAL statement_timeout = 0").await?;
            transaction.batch_execute(&format!("SET LOCAL search_path TO \"{schema}\", pg_temp")).await?;
            let runner = embedded::migrations::runner();
            Runner::new(runner.get_migrations())
                .set_grouped(true)
                .set_migration_table_name(HISTORY)
                .run_async(&mut InOne(&transaction))
                .await?;
        }
    }
    Ok(transaction.commit().await?)
}

/// Lets refinery run its statements in a transaction that is already open.
struct InOne<'a>(&'a Transaction<'a>);

impl AsyncTransaction for InOne<'_> {
    type Error = tokio_postgres::Error;

    async fn execute<'a, T: Iterator<Item = &'a str> + Send + 'a>(
        &'a mut self,
        queries: T,
    ) -> Result<usize, Self::Error> {
        let mut count = 0;
        for query in queries {
            self.0.batch_execute(query).await?;
            count += 1;
        }
        Ok(count)
    }
}

impl AsyncQuery<Vec<Migration>> for InOne<'_> {
    async fn query<'a>(&'a mut self, query: &'a str) -> Result<Vec<Migration>, Self::Error> {
        let rows = self.0.query_typed(query, &[]).await?;
        rows.iter().map(applied).collect()
    }
}

impl AsyncMigrate for InOne<'_> {}

/// A row of refinery's table. The time of the migration is not read. An unreadable checksum matches no migration.
fn applied(row: &Row) -> Result<Migration, tokio_postgres::Error> {
    let (version, name, checksum): (i32, String, String) =
        (row.try_get(0)?, row.try_get(1)?, row.try_get(3)?);
    let checksum = checksum.parse().unwrap_or_default();
    Ok(Migration::applied(version, name, time::OffsetDateTime::UNIX_EPOCH, checksum))
}

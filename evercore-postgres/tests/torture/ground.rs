//! PostgreSQL for the shared long runs: a store on a server, and more tables in it.

use std::sync::Arc;

use evercore_postgres::{BoxError, EventStore, PostgresEngine, Projection, Result};
use evercore_testkit::postgres::{psql, shared_url};
use tokio::sync::oneshot;

use crate::tally::counted;

pub(crate) type Engine = PostgresEngine;

/// Whether all processes use the clock of a server.
pub(crate) const HAS_ONE_CLOCK: bool = true;

/// Logs every move of a cursor.
const WATCH: &str = "
    CREATE TABLE @moves (nth BIGSERIAL PRIMARY KEY, old_position BIGINT, position BIGINT, old_epoch BIGINT,
                         epoch BIGINT, owner TEXT);
    CREATE FUNCTION @watch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO @moves (old_position, position, old_epoch, epoch, owner)
        VALUES (old.position, new.position, old.epoch, new.epoch, new.owner);
        RETURN NULL;
    END $$;
    CREATE FUNCTION @watch_unfenced() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO @moves (old_position, position, old_epoch, epoch) VALUES (old.position, new.position, 0, 0);
        RETURN NULL;
    END $$;
    CREATE TRIGGER watch AFTER UPDATE ON @cursors FOR EACH ROW EXECUTE FUNCTION @watch();
    CREATE TRIGGER watch AFTER UPDATE ON @unfenced FOR EACH ROW EXECUTE FUNCTION @watch_unfenced()";

/// A separate schema on the server that these tests share.
pub(crate) struct Place {
    pub(crate) address: String,
}

impl Place {
    /// Prints a message and gives `None` if there is no server.
    pub(crate) fn fresh() -> Option<Self> {
        let url = shared_url()?;
        let address = format!("torture_{:016x} {url}", fastrand::u64(..));
        Some(Self { address })
    }
}

/// On a server of others the schema is removed.
impl Drop for Place {
    fn drop(&mut self) {
        if let Some((schema, url)) = self.address.split_once(' ') {
            let _ = psql(url, &format!("DROP SCHEMA IF EXISTS {schema} CASCADE"));
        }
    }
}

/// An engine on it, and SQL for the tests.
#[derive(Clone)]
pub(crate) struct Ground {
    pub(crate) engine: Engine,
    /// The prefix of the names of tables.
    prefix: String,
}

impl Ground {
    pub(crate) async fn open(address: &str) -> Self {
        let (schema, url) = address.split_once(' ').unwrap();
        let builder = PostgresEngine::builder().schema(schema).unwrap();
        Self { engine: builder.connect(url).await.unwrap(), prefix: format!("{schema}.") }
    }

    pub(crate) fn of(engine: Engine) -> Self {
        Self { engine, prefix: "public.".to_owned() }
    }

    pub(crate) fn store(&self) -> EventStore {
        EventStore::new(self.engine.clone())
    }

    fn named(&self, sql: &str) -> String {
        sql.replace('@', &self.prefix)
    }

    pub(crate) async fn watch(&self) {
        self.sql(WATCH).await;
    }

    /// Runs several statements. An `@` stands before the names of tables.
    pub(crate) async fn sql(&self, sql: &str) {
        let sql = self.named(sql);
        let run = self.engine.commit_with(self.store().begin(), move |connection| {
            Box::pin(async move { Ok(connection.batch_execute(&sql).await?) })
        });
        run.await.unwrap();
    }

    /// Runs one statement and gives the number of changed rows.
    pub(crate) async fn execute(&self, sql: &str) -> u64 {
        let (sql, (send, receive)) = (self.named(sql), oneshot::channel());
        let run = self.engine.commit_with(self.store().begin(), move |connection| {
            Box::pin(async move {
                send.send(connection.execute(&sql, &[]).await?).map_err(|_| "nobody listens".into())
            })
        });
        run.await.unwrap();
        receive.await.unwrap()
    }

    pub(crate) async fn rows<const N: usize>(&self, sql: &str) -> Vec<[i64; N]> {
        let (sql, (send, receive)) = (self.named(sql), oneshot::channel());
        let run = self.engine.commit_with(self.store().begin(), move |connection| {
            Box::pin(async move {
                let rows = connection.query(&sql, &[]).await?;
                let rows = rows.iter().map(|row| std::array::from_fn(|at| row.get(at))).collect();
                send.send(rows).map_err(|_| "nobody listens".into())
            })
        });
        run.await.unwrap();
        receive.await.unwrap()
    }

    /// Adds one to the row of each key, in a separate transaction.
    pub(crate) async fn count(&self, table: &str, keys: Vec<i64>) -> Result<(), BoxError> {
        let sql = self.named(&count(table));
        let run = self.engine.commit_with(self.store().begin(), move |connection| {
            Box::pin(async move {
                let (keys, times): (Vec<i64>, Vec<i64>) = counted(keys).into_iter().unzip();
                connection.execute(&sql, &[&keys, &times]).await?;
                Ok(())
            })
        });
        run.await?;
        Ok(())
    }

    /// Writes these rows, new or not, in a separate transaction.
    pub(crate) async fn put(&self, table: &str, rows: Vec<(i64, i64)>) -> Result<(), BoxError> {
        let sql = self.named(&format!(
            "INSERT INTO {table} SELECT * FROM unnest($1::bigint[], $2::bigint[])
             ON CONFLICT (position) DO UPDATE SET times = excluded.times"
        ));
        let run = self.engine.commit_with(self.store().begin(), move |connection| {
            Box::pin(async move {
                let (keys, values): (Vec<i64>, Vec<i64>) = rows.into_iter().unzip();
                connection.execute(&sql, &[&keys, &values]).await?;
                Ok(())
            })
        });
        run.await?;
        Ok(())
    }

    /// Adds one to the row of each event's key, exactly once, and then calls this in the same transaction.
    pub(crate) fn counting(
        &self,
        table: &str,
        key: fn(&evercore_postgres::Event) -> i64,
        then: impl Fn() + Send + Sync + 'static,
    ) -> Projection {
        let (sql, then) = (self.named(&count(table)), Arc::new(then));
        self.engine.projection(move |connection, delivery| {
            let (sql, then) = (sql.clone(), Arc::clone(&then));
            Box::pin(async move {
                let keys = delivery.events().iter().map(key).collect();
                let (keys, times): (Vec<i64>, Vec<i64>) = counted(keys).into_iter().unzip();
                connection.execute(&sql, &[&keys, &times]).await?;
                then();
                Ok(())
            })
        })
    }
}

fn count(table: &str) -> String {
    format!(
        "INSERT INTO {table} AS counts SELECT * FROM unnest($1::bigint[], $2::bigint[])
         ON CONFLICT (position) DO UPDATE SET times = counts.times + excluded.times"
    )
}

/// Runs the work of a process in a thread. If it stalls, its connections stall too.
pub(crate) fn alone<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

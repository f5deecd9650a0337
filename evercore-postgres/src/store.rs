//! An open store: its parts, its id, and how it is opened and closed.

use std::sync::Arc;

use deadpool_postgres::Pool;
use evercore_core::{Result, StoreId};

use crate::commit::batch::Batches;
use crate::commit::commands::Commands;
use crate::commit::flight::Flights;
use crate::commit::ids::Ids;
use crate::commit::with_sql::BatchesWithSql;
use crate::connection::connect::Address;
use crate::connection::pool::{Checkout, Pools};
use crate::error::{PostgresError, damaged};
use crate::migrate;
use crate::names::Names;
use crate::read::load::Loader;
use crate::read::log::Log;
use crate::read::wait::Watch;
use crate::settings::{Schema, Settings};
use crate::sql::Sql;
use crate::subscription::inline::InlineProjections;
use crate::subscription::subscriptions::CursorStore;

/// The parts of an open store. Each holds the parts that it needs.
pub(crate) struct Store {
    pub(crate) pools: Arc<Pools>,
    pub(crate) names: Arc<Names>,
    pub(crate) log: Arc<Log>,
    pub(crate) loader: Loader,
    pub(crate) watch: Arc<Watch>,
    pub(crate) cursors: Arc<CursorStore>,
    pub(crate) commands: Arc<Commands>,
    pub(crate) ids: Ids,
    pub(crate) with_sql: Arc<BatchesWithSql>,
    pub(crate) flights: Arc<Flights>,
    pub(crate) store_id: String,
    pub(crate) identity: StoreId,
}

pub(crate) fn store_id_sql(schema: &Schema) -> Sql {
    Sql::new(schema, "SELECT store_id FROM @store WHERE one = 1", &[])
}

impl Store {
    pub(crate) async fn open(settings: Settings, pool: Pool, address: Option<Address>) -> Result<Self> {
        let pools = Arc::new(Pools::new(settings, pool, address)?);
        let names = Arc::new(Names::new(&pools.settings.schema));
        let log = Arc::new(Log::new(Arc::clone(&pools), Arc::clone(&names)));
        let watch = Arc::new(Watch::new(Arc::clone(&pools), Arc::clone(&log)));
        let cursors = Arc::new(CursorStore::new(Arc::clone(&pools)));
        let commands = Arc::new(Commands::new(Arc::clone(&pools)));
        let batches = Arc::new(Batches::new(Arc::clone(&pools), Arc::clone(&names), Arc::clone(&commands)));
        let parts = (Arc::clone(&pools), Arc::clone(&names), Arc::clone(&log), Arc::clone(&cursors));
        let inline = InlineProjections::new(parts.0, parts.1, parts.2, parts.3)?;
        let with_sql =
            BatchesWithSql::new(Arc::clone(&pools), Arc::clone(&batches), Arc::clone(&commands), inline);
        let with_sql = Arc::new(with_sql);
        let parts = (Arc::clone(&pools), Arc::clone(&names), Arc::clone(&with_sql), Arc::clone(&watch));
        let flights = Flights::new(parts.0, parts.1, Arc::clone(&batches), parts.2, parts.3);

        migrate::prepare(&pools).await?;
        let store_id = store_id_sql(&pools.settings.schema);
        let read = |checkout: Arc<Checkout>| {
            let (names, log, store_id) = (&names, &log, &store_id);
            async move {
                let sender = checkout.sender()?;
                let row = sender.row(store_id, &[]).await?;
                let row = row.ok_or_else(|| damaged("the table of the store is empty"))?;
                names.reload(sender).await?;
                log.seen.raise(log.head_within(sender).await?);
                Ok::<String, PostgresError>(row.try_get(0)?)
            }
        };
        let store_id = pools.read(read).await?;
        batches.ends_at(log.seen.get());
        if let Some(address) = &pools.address {
            address.hosts().follow(&store_id, log.seen.subscribe());
        }
        with_sql.inline.catch_up().await?;
        Ok(Self {
            identity: StoreId::of(&store_id),
            store_id,
            loader: Loader::new(Arc::clone(&pools), Arc::clone(&names)),
            ids: Ids::new(Arc::clone(&pools)),
            pools,
            names,
            log,
            watch,
            cursors,
            commands,
            with_sql,
            flights: Arc::new(flights),
        })
    }

    /// Closes the store after the running commits have ended. Later calls are `Closed`.
    pub(crate) async fn close(&self) {
        self.pools.close();
        self.watch.close();
        self.flights.idle().await;
        self.pools.close_connections();
    }
}

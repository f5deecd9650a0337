//! An open store: its parts, its id, and how it is opened and closed.

use std::sync::Arc;

use deadpool_postgres::Pool;
use evercore_core::{Result, StoreId};

use crate::commit::batch::Batches;
use crate::commit::commands::Commands;
use crate::commit::flight::{Flights, Queue};
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
use crate::settings::Settings;
use crate::sql::Sql;
use crate::subscription::inline::{InlineProjections, checked};
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

impl Store {
    pub(crate) async fn open(settings: Settings, pool: Pool, address: Option<Address>) -> Result<Self> {
        let pools = Arc::new(Pools::new(settings, pool, address)?);
        let names = Arc::new(Names::new(&pools.settings.schema));
        let log = Arc::new(Log::new(Arc::clone(&pools), Arc::clone(&names)));
        let watch = Arc::new(Watch::new(Arc::clone(&pools), Arc::clone(&log)));
        let cursors = Arc::new(CursorStore::new(Arc::clone(&pools)));
        let commands = Arc::new(Commands::new(Arc::clone(&pools)));
        let batches = Batches::new(
            Arc::clone(&pools),
            Arc::clone(&names),
            Arc::clone(&commands),
            Arc::clone(&log.seen),
        );
        let batches = Arc::new(batches);
        let inline = InlineProjections {
            pools: Arc::clone(&pools),
            names: Arc::clone(&names),
            log: Arc::clone(&log),
            cursors: Arc::clone(&cursors),
            all: checked(&pools.settings)?,
        };
        let with_sql = Arc::new(BatchesWithSql {
            pools: Arc::clone(&pools),
            batches: Arc::clone(&batches),
            commands: Arc::clone(&commands),
            inline,
        });
        let flights = Arc::new(Flights {
            pools: Arc::clone(&pools),
            names: Arc::clone(&names),
            batches: Arc::clone(&batches),
            with_sql: Arc::clone(&with_sql),
            watch: Arc::clone(&watch),
            queue: Queue::default(),
        });

        migrate::prepare(&pools).await?;
        let store_id = Sql::new(&pools.settings.schema, "SELECT store_id FROM @store WHERE one = 1", &[]);
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
        if let Some(address) = &pools.address {
            address.hosts.follow(&store_id, log.seen.subscribe());
        }
        with_sql.inline.catch_up().await?;
        Ok(Self {
            identity: StoreId::of(&store_id),
            store_id,
            loader: Loader::new(Arc::clone(&pools), Arc::clone(&names), Arc::clone(&log.seen)),
            ids: Ids::new(Arc::clone(&pools)),
            pools,
            names,
            log,
            watch,
            cursors,
            commands,
            with_sql,
            flights,
        })
    }

    /// Closes the store after the running commits have ended. Later calls are `Closed`.
    pub(crate) async fn close(&self) {
        self.pools.close();
        self.watch.close();
        self.flights.queue.idle().await;
        self.pools.close_connections();
    }
}

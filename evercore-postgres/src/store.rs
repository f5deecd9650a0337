//! An open store: its connections, its type names, the log position it has seen, and how it is closed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use deadpool_postgres::Pool;
use evercore_core::{Error, ErrorKind, Result, StoreId};

use crate::builder::Settings;
use crate::commit::batch::CommitSql;
use crate::commit::flight::Queue;
use crate::commit::own_sql::Turns;
use crate::commit::recent::Written;
use crate::connection::connect::Address;
use crate::connection::notices::Heard;
use crate::connection::pool::{FOR_COMMITS, Lent};
use crate::error::{self, closed, damaged};
use crate::migrate;
use crate::names::Names;
use crate::read::load::LoadSql;
use crate::read::log::LogSql;
use crate::read::rows::UsualSize;
use crate::read::wait::Watch;
use crate::sql::{Schema, Sql};
use crate::subscription::inline::{self, Inline};
use crate::subscription::subscriptions::SubscriptionSql;

pub(crate) struct Store {
    pub(crate) settings: Settings,
    /// For reads and for the user's SQL.
    pub(crate) pool: Pool,
    /// For the engine's own writes. With a pool of the application, both are that pool.
    pub(crate) commits: Pool,
    /// The server's address; `None` with a pool of the application.
    pub(crate) address: Option<Arc<Address>>,
    /// The server's notices; empty with a pool of the application.
    pub(crate) heard: Heard,
    pub(crate) sql: Statements,
    pub(crate) names: Names,
    pub(crate) queue: Queue,
    pub(crate) written: Written,
    pub(crate) turns: Turns,
    pub(crate) watch: Watch,
    pub(crate) usual_size: UsualSize,
    pub(crate) inline: Vec<Inline>,
    store_id: OnceLock<(String, StoreId)>,
    closed: AtomicBool,
}

/// The texts of all statements, with the schema's name filled in.
#[derive(Debug)]
pub(crate) struct Statements {
    pub(crate) commit: CommitSql,
    pub(crate) load: LoadSql,
    pub(crate) log: LogSql,
    pub(crate) subscriptions: SubscriptionSql,
    store_id: Sql,
}

impl Statements {
    pub(crate) fn new(schema: &Schema) -> Self {
        Self {
            commit: CommitSql::new(schema),
            load: LoadSql::new(schema),
            log: LogSql::new(schema),
            subscriptions: SubscriptionSql::new(schema),
            store_id: Sql::new(schema, "SELECT store_id FROM @store WHERE one = 1", &[]),
        }
    }
}

impl Store {
    pub(crate) async fn open(settings: Settings, pool: Pool, address: Option<Address>) -> Result<Self> {
        let commits = match &address {
            Some(address) => address.pool(FOR_COMMITS)?,
            None => pool.clone(),
        };
        let store = Self {
            inline: inline::checked(&settings)?,
            sql: Statements::new(&settings.schema),
            names: Names::new(&settings.schema),
            watch: Watch::new(&settings.schema),
            queue: Queue::default(),
            written: Written::default(),
            turns: Turns::new(pool.status().max_size),
            usual_size: UsualSize::default(),
            store_id: OnceLock::new(),
            closed: AtomicBool::new(false),
            heard: address.as_ref().map(|address| address.heard().clone()).unwrap_or_default(),
            settings,
            pool,
            commits,
            address: address.map(Arc::new),
        };
        migrate::prepare(&store).await?;
        let opened = &store;
        store.read(|lent| async move { opened.look_around(&lent).await }).await?;
        if let Some(address) = &store.address {
            address.hosts().follow(store.store_id(), store.watch.subscribe());
        }
        inline::catch_up(&store).await?;
        Ok(store)
    }

    async fn look_around(&self, lent: &Lent) -> error::Result<()> {
        let sender = lent.sender()?;
        let row = sender.row(&self.sql.store_id, &[]).await?;
        let row = row.ok_or_else(|| damaged("the table of the store is empty"))?;
        let store_id: String = row.try_get(0)?;
        let identity = StoreId::of(&store_id);
        let _ = self.store_id.set((store_id, identity));
        self.names.reload(sender).await?;
        let head = self.sql.log.head(sender).await?;
        self.watch.saw(head);
        self.written.ends_at(head);
        Ok(())
    }

    pub(crate) fn store_id(&self) -> &str {
        self.store_id.get().map_or("", |(store_id, _)| store_id)
    }

    /// The id, which an open store always knows.
    pub(crate) fn identity(&self) -> StoreId {
        self.store_id.get().map_or_else(|| StoreId::of(""), |(_, identity)| *identity)
    }

    pub(crate) fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) { Err(closed()) } else { Ok(()) }
    }

    pub(crate) fn check_writable(&self) -> Result<()> {
        self.check_open()?;
        if self.settings.read_only { Err(error::read_only()) } else { Ok(()) }
    }

    /// Closes the store: later calls are `Closed`.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.watch.close();
    }

    /// Closes the pools, except a pool of the application.
    pub(crate) fn close_pool(&self) {
        if self.address.is_some() {
            self.pool.close();
            self.commits.close();
        }
    }
}

/// The error for a store that lacks required rows.
pub(crate) fn not_a_store(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::NotAStore, message)
}

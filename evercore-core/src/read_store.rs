//! A view of a store that can only read.

use std::time::Duration;

use crate::aggregate::Aggregate;
use crate::batch::Receipt;
use crate::contract::{AggregateQuery, Filter, KnownType, LogPage, LogQuery};
use crate::error::Result;
use crate::event::Events;
use crate::ids::{AggregateId, Position};
use crate::loaded::Loaded;
use crate::log_reader::LogReader;
use crate::name::CommandId;
use crate::replay::AsOf;
use crate::store::EventStore;
use crate::subscription::{EphemeralSubscription, Start};
use crate::target::IntoTarget;
use crate::time::Timestamp;

/// A view of a store that has only the methods that read. Made by [`EventStore::read_only`]; cheap to clone.
///
/// It keeps code from writing by mistake. To forbid writes in the database itself, open the SQLite engine read-only, or use
/// a PostgreSQL role without the right to write.
///
/// ```
/// # use evercore_core::{Aggregate, EventStore, ReadStore, Result};
/// async fn report<Order: Aggregate>(store: ReadStore) -> Result<()> {
///     let order = store.load::<Order>("4711").await?;
///     println!("order {} is at sequence {}", order.id(), order.sequence());
///     Ok(())
/// }
/// # async fn run<Order: Aggregate>(store: EventStore) -> Result<()> {
/// report::<Order>(store.read_only()).await
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ReadStore(EventStore);

impl EventStore {
    /// A view of this store for code that only reads.
    pub fn read_only(&self) -> ReadStore {
        ReadStore(self.clone())
    }
}

impl ReadStore {
    /// As [`EventStore::load`].
    ///
    /// # Errors
    /// As [`EventStore::load`].
    pub async fn load<T: Aggregate>(&self, target: impl IntoTarget) -> Result<Loaded<T>> {
        self.0.load(target).await
    }

    /// As [`EventStore::load_as_of`].
    ///
    /// # Errors
    /// As [`EventStore::load_as_of`].
    pub async fn load_as_of<T: Aggregate>(&self, target: impl IntoTarget, as_of: AsOf) -> Result<Loaded<T>> {
        self.0.load_as_of(target, as_of).await
    }

    /// As [`EventStore::find`].
    ///
    /// # Errors
    /// As [`EventStore::find`].
    pub async fn find<T: Aggregate>(&self, key: impl AsRef<str>) -> Result<Option<AggregateId>> {
        self.0.find::<T>(key).await
    }

    /// As [`EventStore::filter_by_key`].
    ///
    /// # Errors
    /// As [`EventStore::filter_by_key`].
    pub async fn filter_by_key<T: Aggregate>(&self, key: impl AsRef<str>) -> Result<Filter> {
        self.0.filter_by_key::<T>(key).await
    }

    /// As [`EventStore::read_aggregate`].
    ///
    /// # Errors
    /// As [`EventStore::read_aggregate`].
    pub async fn read_aggregate(&self, query: AggregateQuery) -> Result<Events> {
        self.0.read_aggregate(query).await
    }

    /// As [`EventStore::read_log`].
    ///
    /// # Errors
    /// As [`EventStore::read_log`].
    pub async fn read_log(&self, query: &LogQuery) -> Result<LogPage> {
        self.0.read_log(query).await
    }

    /// As [`EventStore::log_reader`].
    pub fn log_reader(&self, query: LogQuery) -> LogReader {
        self.0.log_reader(query)
    }

    /// As [`EventStore::subscribe`].
    ///
    /// # Errors
    /// As [`EventStore::subscribe`].
    pub async fn subscribe(&self, filter: Filter, start: Start) -> Result<EphemeralSubscription> {
        self.0.subscribe(filter, start).await
    }

    /// As [`EventStore::head`].
    ///
    /// # Errors
    /// As [`EventStore::head`].
    pub async fn head(&self) -> Result<Position> {
        self.0.head().await
    }

    /// As [`EventStore::position_at`].
    ///
    /// # Errors
    /// As [`EventStore::position_at`].
    pub async fn position_at(&self, time: Timestamp) -> Result<Position> {
        self.0.position_at(time).await
    }

    /// As [`EventStore::position_from`].
    ///
    /// # Errors
    /// As [`EventStore::position_from`].
    pub async fn position_from(&self, time: Timestamp) -> Result<Option<Position>> {
        self.0.position_from(time).await
    }

    /// As [`EventStore::wait`].
    ///
    /// # Errors
    /// As [`EventStore::wait`].
    pub async fn wait(&self, after: Position, at_most: Duration) -> Result<Position> {
        self.0.wait(after, at_most).await
    }

    /// As [`EventStore::types`].
    ///
    /// # Errors
    /// As [`EventStore::types`].
    pub async fn types(&self) -> Result<Vec<KnownType>> {
        self.0.types().await
    }

    /// As [`EventStore::receipt`].
    ///
    /// # Errors
    /// As [`EventStore::receipt`].
    pub async fn receipt(&self, command: &CommandId) -> Result<Option<Receipt>> {
        self.0.receipt(command).await
    }
}

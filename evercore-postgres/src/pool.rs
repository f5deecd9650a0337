//! Connections: taken from the pool, and given back only if they are as they were.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use deadpool_postgres::{ClientWrapper, Object, PoolError};
use evercore_core::{Error, ErrorKind};

use crate::error::{PostgresError, Result, closed, is_rolled_back, takes_no_writes};
use crate::sql::Sender;
use crate::store::Store;

/// A connection for as long as this is held.
#[derive(Debug)]
pub(crate) struct Lent {
    object: Option<Object>,
    named: bool,
    is_clean: AtomicBool,
}

impl Lent {
    /// For statements that leave nothing open: who goes away half-way does no harm, since what still comes in is
    /// thrown away before the next statement. Dropped, it goes back to the pool.
    pub(crate) async fn to_read(store: &Store) -> Result<Self> {
        store.check_open()?;
        // A pool that was handed in may have no time-out of its own.
        let object = tokio::time::timeout(store.settings.connect_timeout, store.pool.get()).await;
        let object =
            object.map_err(|_| Error::new(ErrorKind::Unavailable, "no connection became free in time"))?;
        let object = object.map_err(|error| match error {
            PoolError::Closed => closed().into(),
            error => PostgresError::from(error),
        })?;
        Ok(Self { object: Some(object), named: !store.settings.pooler, is_clean: AtomicBool::new(true) })
    }

    /// For transactions: dropped, it is closed, unless it was [put back](Self::put_back) before.
    pub(crate) async fn to_write(store: &Store) -> Result<Self> {
        let lent = Self::to_read(store).await?;
        lent.spoil();
        Ok(lent)
    }

    pub(crate) fn sender(&self) -> Result<Sender<'_>> {
        let object = self.object.as_ref().ok_or_else(gone)?;
        Ok(Sender { client: object, cache: &object.statement_cache, named: self.named })
    }

    pub(crate) fn is_named(&self) -> bool {
        self.named
    }

    pub(crate) fn client_mut(&mut self) -> Result<&mut ClientWrapper> {
        Ok(self.object.as_mut().ok_or_else(gone)?)
    }

    /// To the pool, for the next: every transaction has been seen to end.
    pub(crate) fn put_back(mut self) {
        *self.is_clean.get_mut() = true;
    }

    /// Lets nobody have it after this.
    pub(crate) fn spoil(&self) {
        self.is_clean.store(false, Ordering::Relaxed);
    }

    /// Gives it back after a read, unless that tells that it is of no use any more.
    pub(crate) fn after<T>(self, outcome: Result<T>) -> Result<T> {
        match &outcome {
            Err(error) if is_rolled_back(error) && !takes_no_writes(error) => {}
            Err(PostgresError::Postgres(_) | PostgresError::Silent(_)) => self.spoil(),
            _ => {}
        }
        outcome
    }
}

/// It is there for as long as this is; the type cannot say so.
fn gone() -> Error {
    Error::new(ErrorKind::Backend, "the connection was given back")
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        if !*self.is_clean.get_mut() {
            // Out of the pool; dropped, it is closed, and the server rolls back what was open.
            drop(Object::take(object));
        }
    }
}

impl Store {
    /// Waits for the server no longer than a little more than the server itself would.
    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::timeout(self.patience(), work).await?
    }

    /// How long that is.
    pub(crate) fn patience(&self) -> Duration {
        self.settings.statement_timeout.saturating_add(self.settings.connect_timeout)
    }
}

//! The server's notices, and their meaning for a commit that the server reports as done.
//!
//! A commit that waits for a synchronous standby can be made to give up the wait, by `pg_cancel_backend` or a cancel
//! request. The server then still reports success, with a warning: the commit took effect, but a failover may lose it.

use evercore_core::Error;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio_postgres::Row;
use tokio_postgres::error::{DbError, Severity, SqlState};

use crate::error::Result;

/// How often the server has warned that a commit may not have been replicated. A warning comes before the answer of its
/// commit. All connections of an engine share the number, so a commit that runs at the same time is in doubt too.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notices(Arc<AtomicU64>);

impl Notices {
    /// Recognises the warning by the function of the server that sends it: its text is translated, and its code is that
    /// of any warning.
    pub(crate) fn note(&self, notice: &DbError) {
        let is_warning =
            notice.parsed_severity() == Some(Severity::Warning) && *notice.code() == SqlState::WARNING;
        if is_warning && notice.routine() == Some("SyncRepWaitForLSN") {
            self.0.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Runs a commit. Its outcome is unknown if the server warns meanwhile.
    pub(crate) async fn commit<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.watch(work, |_| true).await
    }

    /// The same for a statement that returns a row if it has written something. Without a row, nothing is in doubt.
    pub(crate) async fn write(&self, work: impl Future<Output = Result<Vec<Row>>>) -> Result<Vec<Row>> {
        self.watch(work, |rows| !rows.is_empty()).await
    }

    /// The same for a commit whose outcome tells whether it has written something.
    pub(crate) async fn watch<T>(
        &self,
        work: impl Future<Output = Result<T>>,
        has_written: impl Fn(&T) -> bool,
    ) -> Result<T> {
        let before = self.0.load(Ordering::Acquire);
        let outcome = work.await?;
        if has_written(&outcome) && self.0.load(Ordering::Acquire) != before {
            return Err(Error::outcome_unknown("the commit").into());
        }
        Ok(outcome)
    }
}

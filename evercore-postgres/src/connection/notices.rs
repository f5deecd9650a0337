//! What the server says unasked, and what follows from it for a commit that it calls done.
//!
//! A commit that waits for a synchronous standby can be made to give up the wait, by `pg_cancel_backend` or a request to
//! cancel. The server then says "done" all the same, and warns: the commit is there, but a failover may lose it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio_postgres::Row;
use tokio_postgres::error::{DbError, Severity, SqlState};

use crate::error::{Result, outcome_unknown};

/// How often the server has warned of a commit that may not have been replicated. A warning comes before the answer of
/// the commit that it is about. Shared by the connections of an engine: a commit beside one that is warned of is in doubt
/// too.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard(Arc<AtomicU64>);

impl Heard {
    /// By the place in the server's code from which the warning comes: its text is translated, and its code is that of
    /// any warning.
    pub(crate) fn note(&self, notice: &DbError) {
        let is_warning =
            notice.parsed_severity() == Some(Severity::Warning) && *notice.code() == SqlState::WARNING;
        if is_warning && notice.routine() == Some("SyncRepWaitForLSN") {
            self.0.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// To be taken before a commit is sent.
    pub(crate) fn before_commit(&self) -> Doubt {
        Doubt { heard: self.clone(), before: self.0.load(Ordering::Acquire) }
    }
}

/// Whether the server has warned since.
#[derive(Debug)]
pub(crate) struct Doubt {
    heard: Heard,
    before: u64,
}

impl Doubt {
    /// The outcome of the commit, which is unknown if the server has warned.
    pub(crate) fn settle<T>(self, outcome: Result<T>) -> Result<T> {
        if outcome.is_ok() && self.heard.0.load(Ordering::Acquire) != self.before {
            return Err(outcome_unknown().into());
        }
        outcome
    }

    /// The same for a statement that returns a row for what it has written: without one it wrote nothing, and nothing is in
    /// doubt.
    pub(crate) fn settle_rows(self, rows: Result<Vec<Row>>) -> Result<Vec<Row>> {
        if rows.as_ref().is_ok_and(Vec::is_empty) { rows } else { self.settle(rows) }
    }
}

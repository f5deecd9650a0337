//! Work in a task of its own: a caller who goes away leaves nothing half done.

use std::future::Future;
use std::panic::resume_unwind;

use evercore_core::{Error, ErrorKind};
use tokio::runtime::{Handle, TryCurrentError};

use crate::error::outcome_unknown;

/// Carries the work through, whatever becomes of the caller; a panic goes on in the caller.
pub(crate) async fn in_task<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Error> {
    let runtime = Handle::try_current().map_err(no_runtime)?;
    match runtime.spawn(work).await {
        Ok(outcome) => Ok(outcome),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_) => Err(outcome_unknown()),
        },
    }
}

/// Who is called outside of tokio.
pub(crate) fn no_runtime(error: TryCurrentError) -> Error {
    Error::new(ErrorKind::Backend, "the PostgreSQL engine runs on tokio, and there is none")
        .with_source(error)
}

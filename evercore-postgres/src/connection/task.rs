//! Runs work in its own task, so that a dropped call leaves nothing half done.

use std::future::Future;
use std::panic::resume_unwind;

use evercore_core::{Error, ErrorKind};
use tokio::runtime::{Handle, TryCurrentError};

/// Runs the work to its end even if the caller is dropped. A panic of the work continues in the caller.
pub(crate) async fn in_task<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Error> {
    let runtime = Handle::try_current().map_err(no_runtime)?;
    match runtime.spawn(work).await {
        Ok(outcome) => Ok(outcome),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_) => Err(Error::outcome_unknown("the commit")),
        },
    }
}

/// For calls from outside of tokio.
pub(crate) fn no_runtime(error: TryCurrentError) -> Error {
    Error::new(ErrorKind::Backend, "the PostgreSQL engine must be called within a tokio runtime")
        .with_source(error)
}

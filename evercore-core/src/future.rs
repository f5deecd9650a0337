//! The futures of the traits that engines implement.

use std::future::Future;
use std::pin::Pin;

/// What every method of an engine returns.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

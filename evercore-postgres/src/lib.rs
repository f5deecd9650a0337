#![doc = include_str!("../README.md")]

mod builder;
mod check;
mod commit;
mod connect;
mod engine;
mod error;
mod flight;
pub mod guide;
mod heard;
mod hosts;
mod inline;
mod load;
mod log;
mod migrate;
mod names;
mod own_sql;
#[cfg(all(test, unix))]
mod plans;
mod pool;
mod projection;
mod rows;
mod sql;
mod store;
mod subscriptions;
mod task;
#[cfg(feature = "rustls")]
mod tls;
mod url;
mod wait;
mod write;
mod writing;
mod written;

pub use builder::{Builder, SynchronousCommit};
pub use engine::PostgresEngine;
pub use evercore_core::*;
pub use projection::Projection;
pub use {deadpool_postgres, tokio_postgres};

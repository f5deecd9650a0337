#![doc = include_str!("../README.md")]

mod builder;
mod commit;
mod connection;
mod error;
pub mod guide;
mod migrate;
mod names;
#[cfg(all(test, unix))]
mod plans;
mod postgres_engine;
mod read;
mod settings;
mod sql;
mod store;
mod subscription;

pub use builder::Builder;
pub use evercore_core::*;
pub use postgres_engine::PostgresEngine;
pub use settings::SynchronousCommit;
pub use subscription::projection::Projection;
pub use {deadpool_postgres, tokio_postgres};

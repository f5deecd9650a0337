//! The SQLite engine of evercore: one file, one writer, durable.
#![doc = include_str!("../README.md")]

mod backup;
mod builder;
mod commit;
mod connection;
mod engine;
mod error;
mod flight;
mod guard;
mod inline;
mod load;
mod log;
mod migrate;
mod names;
mod own_sql;
mod pool;
mod projection;
mod rows;
mod store;
mod subscriptions;
mod transaction;
mod wait;

pub use builder::{Builder, Durability};
pub use engine::SqliteEngine;
pub use evercore_core::*;
pub use projection::Projection;
/// For SQL of your own, as in [`SqliteEngine::commit_with`]: the version that the engine is built with.
pub use rusqlite;

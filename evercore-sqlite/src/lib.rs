#![doc = include_str!("../README.md")]

mod backup;
mod builder;
mod commit;
mod connection;
mod engine;
mod error;
mod flight;
mod guard;
pub mod guide;
mod inline;
mod load;
mod log;
mod migrate;
mod names;
mod own_sql;
mod pool;
mod projection;
mod queue;
mod reads;
mod rows;
mod store;
mod subscriptions;
mod transaction;
mod wait;
mod wal;

pub use builder::{Builder, Durability};
pub use engine::SqliteEngine;
pub use evercore_core::*;
pub use projection::Projection;
/// For SQL of your own, as in [`SqliteEngine::commit_with`]. It is part of this crate's interface: a new minor version of
/// rusqlite, which may break your SQL code, comes with a new minor version of this crate, and never with a patch.
pub use rusqlite;

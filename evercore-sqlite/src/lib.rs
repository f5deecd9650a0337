#![doc = include_str!("../README.md")]

mod backup;
mod builder;
mod commit;
mod connection;
mod error;
pub mod guide;
mod log_end;
mod migrate;
mod names;
mod read;
mod settings;
mod sqlite_engine;
mod store;
mod subscription;

pub use builder::Builder;
pub use evercore_core::*;
/// For your own SQL, as in [`SqliteEngine::commit_with`]. It is part of this crate's interface: a new minor version of
/// rusqlite may break your code, so it comes only with a new minor version of this crate.
pub use rusqlite;
pub use settings::Durability;
pub use sqlite_engine::SqliteEngine;
pub use subscription::projection::Projection;

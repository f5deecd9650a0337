#![doc = include_str!("../README.md")]

mod backup;
mod builder;
mod commit;
mod connection;
mod engine;
mod error;
pub mod guide;
mod log_end;
mod migrate;
mod names;
mod read;
mod settings;
mod store;
mod subscription;

pub use builder::Builder;
pub use engine::SqliteEngine;
pub use evercore_core::*;
/// For SQL of your own, as in [`SqliteEngine::commit_with`]. It is part of this crate's interface: a new minor version of
/// rusqlite, which may break your SQL code, comes with a new minor version of this crate, and never with a patch.
pub use rusqlite;
pub use settings::Durability;
pub use subscription::projection::Projection;

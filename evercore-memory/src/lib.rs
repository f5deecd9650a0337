#![doc = include_str!("../README.md")]
//!
//! # For engine authors
//!
//! An engine keeps a log, checks a batch against it, and reads it. Here the log is a `Vec` under a mutex. `commit`
//! runs all checks and then writes everything, so a failed check leaves nothing written. `load` and `log` copy
//! pages out of the `Vec`. No lock is held while a task waits.

mod commit;
mod inline;
mod load;
mod log;
mod memory_engine;
mod projection;
mod state;
mod subscriptions;

pub use evercore_core::*;
pub use memory_engine::MemoryEngine;
pub use projection::Projection;

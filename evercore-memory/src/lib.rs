#![doc = include_str!("../README.md")]
//!
//! ```
//! use evercore_memory::{EventStore, MemoryEngine};
//!
//! let store = EventStore::new(MemoryEngine::new());
//! ```
//!
//! # How to read it
//!
//! An engine is a log, a way to check a batch against it, and a way to read it. Here the log is a `Vec` under a mutex
//! ([`state`](self)); `commit` checks everything and then writes everything, so it can stop at any check with
//! nothing written; `load` and `log` copy pages out of it. No lock is held while anybody waits.

mod commit;
mod engine;
mod inline;
mod load;
mod log;
mod projection;
mod state;
mod subscriptions;

pub use engine::MemoryEngine;
pub use evercore_core::*;
pub use projection::Projection;

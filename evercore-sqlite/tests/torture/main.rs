//! Long runs on real files, with what goes wrong in the field: runners that stall, crash and run by a wrong clock, a store
//! that is closed and opened again, projections tortured. Each says at its end what it has counted.
//!
//! Short unless `EVERCORE_TORTURE` is `full`; seen with `-- --nocapture`.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

/// The other files are the same on every engine.
use evercore_sqlite as evercore;

mod ground;
mod hot_products;
mod kit;
mod restart;
mod runners;
mod tally;
mod unfenced;

//! Long runs on real files, with the faults of production: runners that stall, crash and have a wrong clock; a store
//! that is closed and opened again; crash tests of projections. Each prints its counts at the end.
//!
//! They are short unless `EVERCORE_TORTURE` is `full`. `-- --nocapture` shows the counts.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

/// The shared files reach the engine by this name.
use evercore_sqlite as evercore;

mod ground;
mod hot_products;

// Shared by the engines.
#[path = "../../../evercore-testkit/torture/kit.rs"]
mod kit;
#[path = "../../../evercore-testkit/torture/restart.rs"]
mod restart;
#[path = "../../../evercore-testkit/torture/runners.rs"]
mod runners;
#[path = "../../../evercore-testkit/torture/tally.rs"]
mod tally;
#[path = "../../../evercore-testkit/torture/unfenced.rs"]
mod unfenced;

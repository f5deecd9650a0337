//! Long runs against real servers, with what goes wrong in the field: slow and stale writers, killed processes and
//! servers, cut connections, callers who go away, foreign settings. Each says at its end what it has counted.
//!
//! Short unless `EVERCORE_TORTURE` is `full`; seen with `-- --nocapture`.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

/// The shared files reach the engine by this name.
use evercore_postgres as evercore;

mod book;
mod crash;
mod cuts;
mod drops;
mod foreign;
mod ground;
mod hot;
mod live;
mod load;
mod log;
mod processes;
mod skew;
mod stall;
mod tools;
mod writers;

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

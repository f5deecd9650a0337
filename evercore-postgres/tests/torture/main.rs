//! Long runs on real servers, with the faults of production: slow and stale writers, killed processes and servers,
//! cut connections, callers that go away, foreign settings. Each prints its counts at the end.
//!
//! They are short unless `EVERCORE_TORTURE` is `full`. `-- --nocapture` shows the counts.

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

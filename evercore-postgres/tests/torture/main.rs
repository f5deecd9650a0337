//! Long runs against real servers, with what goes wrong in the field: slow and stale writers, killed processes and
//! servers, cut connections, callers who go away, foreign settings. Each says at its end what it has counted.
//!
//! Short unless `EVERCORE_TORTURE` is `full`; seen with `-- --nocapture`.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

/// The files that are the same on every engine say so.
use evercore_postgres as evercore;

mod book;
mod crash;
mod cuts;
mod drops;
mod foreign;
mod ground;
mod hot;
mod kit;
mod live;
mod load;
mod log;
mod processes;
mod restart;
mod runners;
mod skew;
mod stall;
mod tally;
mod tools;
mod unfenced;
mod writers;

//! Long runs against real servers, with what goes wrong in the field: slow and stale writers, killed processes and
//! servers, cut connections, callers who go away, foreign settings. Each says at its end what it has counted.
//!
//! Short unless `EVERCORE_TORTURE` is `full`; seen with `-- --nocapture`.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

mod book;
mod crash;
mod cuts;
mod drops;
mod foreign;
mod hot;
mod load;
mod log;
mod processes;
mod skew;
mod stall;
mod tools;
mod writers;

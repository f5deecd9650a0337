//! Tests of `evercore-core` itself: stores, units of work, readers and subscriptions work in the same way on every
//! engine. The tests run on the memory engine, the fastest one. The promises of engines are tested by the conformance
//! suite.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

mod handles;
mod operators;
mod projections;
mod read_ahead;
mod recording;
mod shared_log;
mod sharing;
mod sinks;
mod subscriptions;
mod turns;
mod units;
mod versions;

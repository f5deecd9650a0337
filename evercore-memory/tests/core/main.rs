//! Tests of `evercore-core` itself: what the store, units of work, readers and subscriptions do is the same on every
//! engine. They run on the memory engine, the fastest one. What an engine must do is in the conformance suite.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

mod handles;
mod operators;
mod projections;
mod read_ahead;
mod recording;
mod sharing;
mod sinks;
mod subscriptions;
mod turns;
mod units;
mod versions;

//! Says of an engine whether it keeps the promises of [`StorageEngine`](evercore_core::StorageEngine).
#![doc = include_str!("../README.md")]

pub mod broken;
mod cases;
mod fixture;
mod given;
mod model;
#[cfg(all(feature = "postgres", unix))]
pub mod postgres;
pub mod projection;
mod tools;

pub use cases::{CASES, Case};
pub use fixture::{Fixture, Harness, run};
pub use given::{Given, When};
pub use tools::{block_on, poll_at_most};

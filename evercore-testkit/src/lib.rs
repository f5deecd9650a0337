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
mod watchdog;

pub use cases::{CASES, Case};
pub use fixture::{Ability, Fixture, Harness, run, tell_what_is_skipped};
pub use given::{Given, When};
pub use tools::{block_on, poll_at_most};

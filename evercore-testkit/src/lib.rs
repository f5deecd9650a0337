#![doc = include_str!("../README.md")]

pub mod broken;
mod cases;
mod fixture;
mod given;
mod model;
#[cfg(all(feature = "postgres", unix))]
pub mod postgres;
pub mod projection;
mod runner;
mod tools;
mod watchdog;

pub use cases::{CASES, Case};
pub use fixture::{Ability, Fixture, Harness};
pub use given::{Given, When};
pub use runner::{run, tell_what_is_skipped};
pub use tools::{block_on, poll_at_most};

//! The specialities of the SQLite engine: files, processes, executors, disk faults, projections. The promises of all
//! engines are in the conformance suite.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

mod common;

mod commits;
mod copies;
mod executors;
mod faults;
mod files;
mod inline;
mod long_log;
mod own_sql;
mod subscriptions;

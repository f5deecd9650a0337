//! The specialities of the PostgreSQL engine, on real servers: connections, roles, standbys, poolers, projections.
//! The promises of all engines are in the conformance suite.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

mod common;
mod fixture;
mod orders;

mod cursors;
mod flights;
mod inline;
mod long_log;
mod lost_tail;
mod migrate;
mod own_sql;
mod pooler;
mod projection_faults;
mod projections;
mod replica;
mod restore;
mod roles;
mod settings;
mod surviving;
mod tls;

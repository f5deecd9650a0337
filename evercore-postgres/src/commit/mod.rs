//! Commits: how they are combined, checked and written.

pub(crate) mod batch;
pub(crate) mod check;
pub(crate) mod columns;
pub(crate) mod commands;
pub(crate) mod flight;
pub(crate) mod ids;
pub(crate) mod own_sql;
pub(crate) mod recent;
pub(crate) mod statement;
pub(crate) mod with_sql;

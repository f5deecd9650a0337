//! Commits: how they are combined, checked and written.

pub(crate) mod batch;
pub(crate) mod check;
pub(crate) mod columns;
pub(crate) mod commands;
pub(crate) mod commit_with;
pub(crate) mod flight;
pub(crate) mod ids;
pub(crate) mod recent;
pub(crate) mod statement;
pub(crate) mod with_sql;

//! Commits: how they are combined, checked and written.

pub(crate) mod batch;
pub(crate) mod check;
pub(crate) mod columns;
pub(crate) mod flight;
pub(crate) mod own_sql;
pub(crate) mod recent;
pub(crate) mod statement;

//! Commits: the queue for the one writer, and the batches that it writes.

pub(crate) mod batch;
pub(crate) mod commands;
pub(crate) mod flight;
pub(crate) mod queue;

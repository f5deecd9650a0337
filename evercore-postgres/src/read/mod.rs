//! Reads: one aggregate, the log, and the wait for new events.

pub(crate) mod head;
pub(crate) mod load;
pub(crate) mod log;
pub(crate) mod rows;
pub(crate) mod wait;

//! Reading aggregates and the log.

pub(crate) mod load;
pub(crate) mod log;
pub(crate) mod rows;
pub(crate) mod wait;

//! Connections to one file, and their transactions.

pub(crate) mod guard;
pub(crate) mod open;
pub(crate) mod path;
pub(crate) mod pool;
pub(crate) mod reads;
pub(crate) mod transaction;
pub(crate) mod wal;

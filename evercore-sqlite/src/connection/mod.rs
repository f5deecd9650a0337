//! Connections to a database, and their transactions.

pub(crate) mod open;
pub(crate) mod path;
pub(crate) mod pool;
pub(crate) mod reads;
pub(crate) mod transaction;
pub(crate) mod user_sql;
pub(crate) mod wal;

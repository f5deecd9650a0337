//! Connections to the server: from the URL to a connection that is taken from a pool.

pub(crate) mod connect;
pub(crate) mod hosts;
pub(crate) mod notices;
pub(crate) mod pool;
pub(crate) mod task;
#[cfg(feature = "rustls")]
pub(crate) mod tls;
pub(crate) mod url;
pub(crate) mod user_sql;

//! The settings of an engine.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use evercore_core::{BoxError, BoxFuture, Error, ErrorKind, Event, Result};
use tokio_postgres::Transaction;

/// The longest time-out: PostgreSQL counts milliseconds in 32 bits, and 0 means "no limit".
pub(crate) const LONGEST: Duration = Duration::from_millis(i32::MAX.unsigned_abs() as u64);

/// Which failures an acknowledged commit survives: the values of PostgreSQL's setting `synchronous_commit`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SynchronousCommit {
    /// A crash of the server's machine: the commit is flushed to its disk, and to that of a synchronous standby if one
    /// is configured. If somebody cancels the wait for that standby, the commit is
    /// [`OutcomeUnknown`](crate::ErrorKind::OutcomeUnknown): it is on the primary, but a failover may lose it.
    #[default]
    On,
    /// A crash of the server's machine, without waiting for any standby.
    Local,
    /// As [`On`](Self::On), but the standby has only handed the commit to its operating system, not flushed it.
    RemoteWrite,
    /// As [`On`](Self::On), and reads from the synchronous standby see the commit.
    RemoteApply,
    /// A crash of this process only. A crash of the server may lose the last commits, but never part of one.
    Off,
}

impl SynchronousCommit {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Local => "local",
            Self::RemoteWrite => "remote_write",
            Self::RemoteApply => "remote_apply",
            Self::Off => "off",
        }
    }
}

/// The settings of an engine.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) schema: Schema,
    pub(crate) synchronous_commit: SynchronousCommit,
    pub(crate) pool_size: usize,
    pub(crate) connect_timeout: Duration,
    pub(crate) statement_timeout: Duration,
    pub(crate) sql_timeout: Duration,
    pub(crate) connection_age: Duration,
    pub(crate) poll_interval: Duration,
    pub(crate) migrate: bool,
    pub(crate) read_only: bool,
    pub(crate) pooler: bool,
    /// Whether the engine set up every connection itself, so that their settings are known.
    pub(crate) own_sessions: bool,
    pub(crate) plain_text: bool,
    pub(crate) root_certificate: Option<PathBuf>,
    pub(crate) client_certificate: Option<(PathBuf, PathBuf)>,
    pub(crate) inline: Vec<InlineProjection>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            schema: Schema::default(),
            synchronous_commit: SynchronousCommit::default(),
            pool_size: 8,
            connect_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(30),
            sql_timeout: Duration::from_secs(5),
            connection_age: Duration::from_secs(30 * 60),
            poll_interval: Duration::from_millis(50),
            migrate: true,
            read_only: false,
            pooler: false,
            own_sessions: true,
            plain_text: false,
            root_certificate: None,
            client_certificate: None,
            inline: Vec::new(),
        }
    }
}

impl Settings {
    /// Whether a session keeps the settings it started with.
    pub(crate) const fn has_sessions(&self) -> bool {
        self.own_sessions && !self.pooler
    }

    /// The settings of each of our sessions, and of each transaction in sessions of others.
    ///
    /// Each statement of the engine has one good plan, which uses an index. A plan is kept once it is made, perhaps
    /// while the tables are still empty, so the number of rows must not decide it.
    pub(crate) fn of_session(&self) -> Vec<(&'static str, String)> {
        let milliseconds = |time: Duration| time.as_millis().to_string();
        vec![
            ("default_transaction_isolation", "read committed".to_owned()),
            // A cancelled wait for a standby is reported only as a warning.
            ("client_min_messages", "warning".to_owned()),
            ("synchronous_commit", self.synchronous_commit.as_str().to_owned()),
            ("statement_timeout", milliseconds(self.statement_timeout)),
            ("lock_timeout", milliseconds(self.statement_timeout)),
            ("idle_in_transaction_session_timeout", milliseconds(self.sql_timeout)),
            ("plan_cache_mode", "force_generic_plan".to_owned()),
            ("enable_seqscan", "off".to_owned()),
            ("enable_bitmapscan", "off".to_owned()),
            ("jit", "off".to_owned()),
        ]
    }

    /// Starts a writing transaction, independent of the session's settings.
    pub(crate) fn begin(&self) -> String {
        let mut text = "BEGIN ISOLATION LEVEL READ COMMITTED".to_owned();
        if !self.has_sessions() {
            text.push_str("; ");
            text.push_str(&self.set_local());
        }
        text
    }

    /// The same settings for one transaction.
    pub(crate) fn set_local(&self) -> String {
        let set = |(name, value): (&str, String)| format!("SET LOCAL {name} = '{value}'");
        self.of_session().into_iter().skip(1).map(set).collect::<Vec<_>>().join("; ")
    }
}

/// The name of the store's schema, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Schema(String);

impl Schema {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let mut letters = name.bytes();
        let begins_well = letters.next().is_some_and(|first| first.is_ascii_lowercase() || first == b'_');
        let goes_on_well =
            letters.all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == b'_');
        if !begins_well || !goes_on_well || name.len() > 63 || name.starts_with("pg_") {
            let message = format!(
                "\"{name}\" is no name for a schema: a-z, 0-9 and _, at most 63, not a digit first, not pg_"
            );
            return Err(Error::new(ErrorKind::InvalidName, message));
        }
        Ok(Self(name.to_owned()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Puts the schema before every name that has an `@`.
    pub(crate) fn fill(&self, text: &str) -> String {
        text.replace('@', &format!("\"{}\".", self.0))
    }
}

impl Default for Schema {
    fn default() -> Self {
        Self("evercore".to_owned())
    }
}

/// The handler of an inline projection.
pub(crate) type InlineHandler =
    dyn for<'t> Fn(&'t Transaction<'t>, &'t [Event]) -> BoxFuture<'t, Result<(), BoxError>> + Send + Sync;

/// An inline projection as it was given to the builder.
#[derive(Clone)]
pub(crate) struct InlineProjection {
    pub(crate) name: String,
    pub(crate) version: u32,
    pub(crate) handle: Arc<InlineHandler>,
}

impl fmt::Debug for InlineProjection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlineProjection")
            .field("name", &self.name)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_is_a_plain_name() {
        for name in ["evercore", "_a9", &"x".repeat(63)] {
            assert!(Schema::new(name).is_ok(), "{name}");
        }
        for name in ["", "9a", "a-b", "Orders", "a b", "a\"b", "pg_x", "é", &"x".repeat(64)] {
            assert_eq!(*Schema::new(name).unwrap_err().kind(), ErrorKind::InvalidName, "{name}");
        }
    }

    #[test]
    fn the_schema_goes_before_marked_names_only() {
        let schema = Schema::new("orders").unwrap();
        assert_eq!(schema.fill("SELECT one FROM @store s"), "SELECT one FROM \"orders\".store s");
    }
}

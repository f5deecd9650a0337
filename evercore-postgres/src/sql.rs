//! The engine's statements: how the schema's name gets into the text, and how a statement is sent.
//!
//! `@events` stands for the table `events` in the store's schema. Values are always parameters.

use std::fmt;
use std::pin::Pin;

use deadpool_postgres::StatementCache;
use evercore_core::{Error, ErrorKind, Result as CoreResult};
use futures_lite::StreamExt;
use futures_lite::future::zip;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row, RowStream, Statement};

use crate::builder::Settings;
use crate::error::Result;

/// Locks the log against other writers: locks the single row of `log_end`, found from the top of its index.
pub(crate) const LOCK_LOG_END: &str = "SELECT one FROM @log_end
    WHERE position >= (SELECT max(l.position) FROM @log_end l WHERE l.position >= 0) FOR UPDATE";

/// The name of the store's schema, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Schema(String);

impl Schema {
    pub(crate) fn new(name: &str) -> CoreResult<Self> {
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

/// The settings of each of our sessions, and of each transaction in sessions of others.
///
/// Each statement of the engine has one good plan, which uses an index. A plan is kept once it is made, perhaps while
/// the tables are still empty, so the number of rows must not decide it.
pub(crate) fn session_settings(settings: &Settings) -> Vec<(&'static str, String)> {
    let milliseconds = |time: std::time::Duration| time.as_millis().to_string();
    vec![
        ("default_transaction_isolation", "read committed".to_owned()),
        // A cancelled wait for a standby is reported only as a warning.
        ("client_min_messages", "warning".to_owned()),
        ("synchronous_commit", settings.synchronous_commit.as_str().to_owned()),
        ("statement_timeout", milliseconds(settings.statement_timeout)),
        ("lock_timeout", milliseconds(settings.statement_timeout)),
        ("idle_in_transaction_session_timeout", milliseconds(settings.sql_timeout)),
        ("plan_cache_mode", "force_generic_plan".to_owned()),
        ("enable_seqscan", "off".to_owned()),
        ("enable_bitmapscan", "off".to_owned()),
        ("jit", "off".to_owned()),
    ]
}

/// Starts a writing transaction, independent of the session's settings.
pub(crate) fn begin(settings: &Settings) -> String {
    let mut text = "BEGIN ISOLATION LEVEL READ COMMITTED".to_owned();
    if !settings.has_sessions() {
        text.push_str("; ");
        text.push_str(&set_local(settings));
    }
    text
}

/// The same settings for one transaction.
pub(crate) fn set_local(settings: &Settings) -> String {
    let set = |(name, value): (&str, String)| format!("SET LOCAL {name} = '{value}'");
    session_settings(settings).into_iter().skip(1).map(set).collect::<Vec<_>>().join("; ")
}

/// A statement and the types of its parameters.
#[derive(Clone)]
pub(crate) struct Sql {
    text: String,
    types: Vec<Type>,
}

/// Shows its text, which contains no value.
impl fmt::Debug for Sql {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

/// The values of a statement.
pub(crate) type Values<'a> = [&'a (dyn ToSql + Sync)];

impl Sql {
    pub(crate) fn new(schema: &Schema, text: &str, types: &[Type]) -> Self {
        let sql = Self { text: schema.fill(text), types: types.to_vec() };
        #[cfg(test)]
        MADE.with_borrow_mut(|made| made.push(sql.clone()));
        sql
    }

    #[cfg(test)]
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    #[cfg(test)]
    pub(crate) fn types(&self) -> &[Type] {
        &self.types
    }
}

// All statements made on this thread, for the tests of their plans.
#[cfg(test)]
thread_local! {
    pub(crate) static MADE: std::cell::RefCell<Vec<Sql>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// How statements are sent on one connection.
#[derive(Clone, Copy)]
pub(crate) struct Sender<'a> {
    pub(crate) client: &'a Client,
    pub(crate) cache: &'a StatementCache,
    /// Named prepared statements do not survive a pooler in transaction mode.
    pub(crate) named: bool,
}

/// A statement that is prepared already, or is prepared when it is sent.
pub(crate) struct Ready<'a> {
    sender: Sender<'a>,
    sql: &'a Sql,
    statement: Option<Statement>,
}

impl<'a> Sender<'a> {
    /// Prepares a statement, once per connection.
    pub(crate) async fn ready(self, sql: &'a Sql) -> Result<Ready<'a>> {
        let statement = match self.named {
            true => Some(self.cache.prepare_typed(self.client, &sql.text, &sql.types).await?),
            false => None,
        };
        Ok(Ready { sender: self, sql, statement })
    }

    /// All rows.
    pub(crate) async fn rows(self, sql: &'a Sql, values: &Values<'_>) -> Result<Vec<Row>> {
        self.ready(sql).await?.rows(values).await
    }

    /// The first row, if there is one.
    pub(crate) async fn row(self, sql: &'a Sql, values: &Values<'_>) -> Result<Option<Row>> {
        Ok(self.rows(sql, values).await?.into_iter().next())
    }
}

impl Ready<'_> {
    /// The rows as they arrive.
    pub(crate) async fn stream(&self, values: &Values<'_>) -> Result<Pin<Box<RowStream>>> {
        let client = self.sender.client;
        let rows = match &self.statement {
            Some(statement) => client.query_raw(statement, values.iter().copied()).await?,
            None => {
                let typed = values.iter().copied().zip(self.sql.types.iter().cloned());
                client.query_typed_raw(&self.sql.text, typed).await?
            }
        };
        Ok(Box::pin(rows))
    }

    /// All rows, after the server has reported the end of the statement.
    pub(crate) async fn rows(&self, values: &Values<'_>) -> Result<Vec<Row>> {
        let mut stream = self.stream(values).await?;
        let mut rows = Vec::new();
        while let Some(row) = stream.try_next().await? {
            rows.push(row);
        }
        Ok(rows)
    }
}

impl Ready<'_> {
    /// Runs a writing statement in its own transaction. In sessions of unknown settings it is sent together with a
    /// BEGIN that makes the settings it needs, and a COMMIT.
    pub(crate) async fn write(&self, settings: &Settings, values: &Values<'_>) -> Result<Vec<Row>> {
        if settings.has_sessions() {
            return self.rows(values).await;
        }
        let (begin, client) = (begin(settings), self.sender.client);
        let rest = zip(self.rows(values), client.batch_execute("COMMIT"));
        let (begun, (rows, committed)) = zip(client.batch_execute(&begin), rest).await;
        let rows = rows?;
        begun?;
        // After an error, COMMIT rolls back without an error of its own. Here there was no error.
        committed?;
        Ok(rows)
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

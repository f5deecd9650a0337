//! The engine's statements: how the schema's name gets into the text, and how a statement is sent.
//!
//! `@events` stands for the table `events` in the store's schema. Values are always parameters.

use std::fmt;
use std::pin::Pin;

use deadpool_postgres::StatementCache;

use futures_lite::StreamExt;
use futures_lite::future::zip;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row, RowStream, Statement};

use crate::error::Result;
use crate::settings::{Schema, Settings};

/// Locks the log against other writers: locks the single row of `log_end`, found from the top of its index.
pub(crate) const LOCK_LOG_END: &str = "SELECT position FROM @log_end
    WHERE position >= (SELECT max(l.position) FROM @log_end l WHERE l.position >= 0) FOR UPDATE";

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

    /// Runs plain SQL without parameters, such as COMMIT.
    pub(crate) async fn execute(self, text: &str) -> Result<()> {
        Ok(self.client.batch_execute(text).await?)
    }

    /// Sends the statements that begin a transaction; nothing if it is open already.
    pub(crate) async fn begin(self, begin: Option<&str>) -> Result<()> {
        match begin {
            Some(begin) => self.execute(begin).await,
            None => Ok(()),
        }
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

    /// Runs a writing statement in its own transaction. In sessions of unknown settings it is sent together with a
    /// BEGIN that makes the settings it needs, and a COMMIT.
    pub(crate) async fn write(&self, settings: &Settings, values: &Values<'_>) -> Result<Vec<Row>> {
        if settings.has_sessions() {
            return self.rows(values).await;
        }
        let begin = settings.begin();
        let rest = zip(self.rows(values), self.sender.execute("COMMIT"));
        let (begun, (rows, committed)) = zip(self.sender.execute(&begin), rest).await;
        let rows = rows?;
        begun?;
        // After an error, COMMIT rolls back without reporting one. Here there was no error.
        committed?;
        Ok(rows)
    }
}

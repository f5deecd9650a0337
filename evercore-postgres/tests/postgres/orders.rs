//! A shop that takes orders, for tests that need an aggregate and SQL, and more helpers.

use std::fmt;
use std::future::Future;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use evercore_postgres::tokio_postgres::Transaction;
use evercore_postgres::{
    Aggregate, BoxError, BoxFuture, ErrorKind, EventStore, Json, LogQuery, Position, PostgresEngine, Receipt,
    Result, StorageEngine,
};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) events: i64,
    pub(crate) notes: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum OrderEvent {
    Placed,
    Noted { note: String },
}

impl Aggregate for Order {
    const TYPE: &'static str = "order";
    const SNAPSHOT_EVERY: u32 = 10;
    type Event = OrderEvent;
    type Codec = Json;

    fn apply(&mut self, event: OrderEvent) {
        self.events += 1;
        if let OrderEvent::Noted { note } = event {
            self.notes.push(note);
        }
    }
}

pub(crate) fn noted(note: impl Into<String>) -> OrderEvent {
    OrderEvent::Noted { note: note.into() }
}

/// Places the order with this key, or once more if it exists.
pub(crate) async fn place(store: &EventStore, key: &str) -> Result<Receipt> {
    store.update_or_create::<Order, _, _>(key, |_| [OrderEvent::Placed]).await
}

/// A closure for `commit_with`.
pub(crate) trait Own:
    for<'t> FnOnce(&'t Transaction<'t>) -> BoxFuture<'t, Result<(), BoxError>> + Send + 'static
{
}

impl<F> Own for F where
    F: for<'t> FnOnce(&'t Transaction<'t>) -> BoxFuture<'t, Result<(), BoxError>> + Send + 'static
{
}

/// Runs these statements and returns their result.
pub(crate) fn own(statements: impl Into<String>) -> impl Own {
    let statements = statements.into();
    closure(move |sql| Box::pin(async move { Ok(sql.batch_execute(&statements).await?) }))
}

/// Gives the closure the lifetimes that the compiler cannot infer.
pub(crate) fn closure<F>(own: F) -> F
where
    F: for<'t> FnOnce(&'t Transaction<'t>) -> BoxFuture<'t, Result<(), BoxError>> + Send + 'static,
{
    own
}

/// Places the order with this key once more, with this SQL in the transaction.
pub(crate) async fn place_with(engine: &PostgresEngine, key: &str, sql: impl Own) -> Result<Receipt> {
    let mut work = EventStore::new(engine.clone()).begin();
    let mut order = work.load_or_create::<Order>(key).await?;
    work.record(&mut order, OrderEvent::Placed)?;
    engine.commit_with(work, sql).await
}

#[derive(Debug, PartialEq)]
pub(crate) struct NotToday;

impl fmt::Display for NotToday {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not today")
    }
}

impl std::error::Error for NotToday {}

/// The positions of the whole log, in pages of full size.
pub(crate) async fn positions(engine: &impl StorageEngine) -> Vec<i64> {
    let mut query = LogQuery::after(Position::ZERO);
    let mut positions = Vec::new();
    loop {
        let page = engine.read_log(&query).await.unwrap();
        positions.extend(page.events.iter().map(|event| event.position().get()));
        if page.scanned >= page.head {
            return positions;
        }
        query.from = page.scanned;
    }
}

pub(crate) fn up_to(head: i64) -> Vec<i64> {
    (1..=head).collect()
}

pub(crate) fn kind<T: fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind().clone()
}

/// The text of an error and of all its causes.
pub(crate) fn all_of(error: &evercore_postgres::Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(" {cause} {cause:?}"));
        source = cause.source();
    }
    text
}

/// The URL with an application name, by which the server lists its connections.
pub(crate) fn named(url: &str, application: &str) -> String {
    let joint = if url.contains('?') { '&' } else { '?' };
    format!("{url}{joint}application_name={application}")
}

/// The URL with another database.
pub(crate) fn with_database(url: &str, name: &str) -> String {
    let (place, query) =
        url.split_once('?').map_or((url, String::new()), |(place, query)| (place, format!("?{query}")));
    let (server, _) = place.rsplit_once('/').unwrap();
    format!("{server}/{name}{query}")
}

/// Asks until the answer is yes; panics after the time-out.
pub(crate) async fn soon<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let end = Instant::now() + Duration::from_secs(15);
    while !is_so().await {
        assert!(Instant::now() < end, "not within 15 seconds: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Prints what is skipped. The capture of test output does not hide it.
pub(crate) fn skipped(what: &str) {
    let mut stderr = std::io::stderr();
    writeln!(stderr, "SKIPPED: {what}").unwrap();
}

/// Runs one test of this binary in another process, with `CHILD` set. The name includes the module.
pub(crate) fn child(test: &str, with: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env("CHILD", with);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The task of the child; `None` if this process is no child.
pub(crate) fn as_child() -> Option<String> {
    std::env::var("CHILD").ok()
}

//! Helpers of the tests of this crate.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use evercore_core::engine::{Append, Batch, Guard, NewAggregate, NewEvent, Payload};
use evercore_sqlite::{
    AggregateId, AggregateType, ErrorKind, EventType, Key, LogQuery, Metadata, Receipt, Result, Sequence,
    SqliteEngine, StorageEngine, Timestamp,
};
pub(crate) use futures_lite::future::block_on;
use tempfile::TempDir;

pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.file("store.db")
    }
}

pub(crate) fn aggregate_type() -> AggregateType {
    AggregateType::new("account").unwrap()
}

pub(crate) fn event(name: &str, payload: &[u8]) -> NewEvent {
    NewEvent {
        event_type: EventType::new(name).unwrap(),
        payload: Payload::new(payload).unwrap(),
        time: Timestamp::now(),
        metadata: Arc::new(Metadata::new()),
    }
}

pub(crate) fn append(aggregate: AggregateId, expected: i64, events: Vec<NewEvent>) -> Append {
    Append { aggregate, aggregate_type: aggregate_type(), expected: Sequence::new(expected).unwrap(), events }
}

pub(crate) fn one_event(aggregate: AggregateId, expected: i64) -> Batch {
    let mut batch = Batch::new();
    batch.append(append(aggregate, expected, vec![event("Paid", b"{}")])).unwrap();
    batch
}

pub(crate) fn guard(aggregate: AggregateId, expected: i64) -> Guard {
    Guard { aggregate, expected: Sequence::new(expected).unwrap() }
}

pub(crate) fn new_aggregate(id: AggregateId, key: Option<&str>) -> NewAggregate {
    NewAggregate { id, aggregate_type: aggregate_type(), key: key.map(|key| Key::new(key).unwrap()) }
}

/// Creates an aggregate with one event.
pub(crate) async fn create(engine: &dyn StorageEngine, key: Option<&str>) -> Result<(AggregateId, Receipt)> {
    let id = engine.reserve(1).await?.next().unwrap();
    let mut batch = Batch::new();
    batch.create(new_aggregate(id, key))?;
    batch.append(append(id, 0, vec![event("Opened", b"{}")]))?;
    Ok((id, engine.commit(batch).await?))
}

/// The positions of the whole log.
pub(crate) async fn positions(engine: &SqliteEngine) -> Vec<i64> {
    let mut query = LogQuery::after(evercore_sqlite::Position::ZERO);
    let mut positions = Vec::new();
    loop {
        let page = engine.read_log(&query).await.unwrap();
        if page.events.is_empty() {
            return positions;
        }
        positions.extend(page.events.iter().map(|event| event.position().get()));
        query.from = page.scanned;
    }
}

pub(crate) fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind().clone()
}

/// Runs one test of this binary in another process, with `CHILD` set. The name includes the module.
pub(crate) fn child(test: &str, path: &std::path::Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture"])
        .env("CHILD", path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// The path that the child works on; `None` if this process is no child.
pub(crate) fn as_child() -> Option<PathBuf> {
    std::env::var_os("CHILD").map(PathBuf::from)
}

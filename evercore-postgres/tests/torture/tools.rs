//! Shared by the long runs: their length, and an aggregate whose events name their unit.

use std::time::{Duration, Instant};

use evercore_postgres::tokio_postgres::{self, Client, NoTls};
use evercore_postgres::{
    Aggregate, AggregateId, CommandId, Error, ErrorKind, EventStore, Json, Loaded, PostgresEngine, Result,
    RetryPolicy, UnitOfWork,
};
use serde::{Deserialize, Serialize};

/// One of two sizes: the second if `EVERCORE_TORTURE` is `full`.
pub(crate) fn sized<T>(short: T, full: T) -> T {
    if std::env::var("EVERCORE_TORTURE").is_ok_and(|size| size == "full") { full } else { short }
}

/// Counts its events, so that a state shows whether it has seen all of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) events: i64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum AccountEvent {
    Credited(Part),
    Debited(Part),
}

/// Names the unit of an event and its number within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) unit: i64,
    pub(crate) nth: usize,
    pub(crate) of: usize,
}

impl Aggregate for Account {
    const TYPE: &'static str = "account";
    const SNAPSHOT_EVERY: u32 = 7;
    type Event = AccountEvent;
    type Codec = Json;

    fn apply(&mut self, _: AccountEvent) {
        self.events += 1;
    }
}

/// A store that never retries; the test does.
pub(crate) fn patient_not(engine: &PostgresEngine) -> EventStore {
    EventStore::new(engine.clone()).with_retry(RetryPolicy::new().with_attempts(1))
}

/// The number of a unit. It is unique among all writers.
pub(crate) fn number(writer: usize, nth: i64) -> i64 {
    i64::try_from(writer + 1).unwrap() << 32 | nth
}

pub(crate) fn command(unit: i64) -> CommandId {
    CommandId::new(format!("unit {unit:020}")).unwrap()
}

/// Creates accounts. Each gets an event of a separate unit.
pub(crate) async fn accounts(store: &EventStore, count: usize, unit: i64) -> Vec<AggregateId> {
    let mut work = store.begin();
    let mut accounts = Vec::new();
    for _ in 0..count {
        accounts.push(work.create::<Account>().await.unwrap());
    }
    record(&mut work, &mut accounts, unit, count);
    work.set_command(command(unit));
    work.commit().await.unwrap();
    accounts.iter().map(Loaded::id).collect()
}

/// Loads the accounts and records this many events, on the accounts in turn.
pub(crate) async fn unit(
    store: &EventStore,
    ids: &[AggregateId],
    unit: i64,
    events: usize,
) -> Result<UnitOfWork> {
    let mut work = store.begin();
    let mut accounts = Vec::new();
    for id in ids {
        let account = work.load::<Account>(*id).await?;
        assert_eq!(account.events, account.sequence().get(), "a state that has missed some of its events");
        accounts.push(account);
    }
    record(&mut work, &mut accounts, unit, events);
    work.set_command(command(unit));
    Ok(work)
}

pub(crate) fn record(work: &mut UnitOfWork, accounts: &mut [Loaded<Account>], unit: i64, events: usize) {
    for nth in 0..events {
        let (part, account) = (Part { unit, nth, of: events }, nth % accounts.len());
        let event = if nth % 2 == 0 { AccountEvent::Credited(part) } else { AccountEvent::Debited(part) };
        work.record(&mut accounts[account], event).unwrap();
    }
}

/// The kind of an error, in one word.
pub(crate) fn word(error: &Error) -> String {
    let kind = format!("{:?}", error.kind());
    kind.split([' ', '{']).next().unwrap_or_default().to_owned()
}

pub(crate) fn is_unknown(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::OutcomeUnknown)
}

/// Whether the same command may be tried again.
pub(crate) fn is_trouble(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::OutcomeUnknown | ErrorKind::Unavailable)
}

/// An engine, even if connections are ended at random.
pub(crate) async fn engine(url: &str) -> PostgresEngine {
    loop {
        match PostgresEngine::connect(url).await {
            Ok(engine) => return engine,
            Err(error) => assert_eq!(*error.kind(), ErrorKind::Unavailable, "{error:?}"),
        }
    }
}

/// A connection outside of the engine.
pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Waits for a server that cannot be reached, as long as it needs to come back.
pub(crate) struct Patience(Instant);

impl Patience {
    pub(crate) fn new() -> Self {
        Self(Instant::now() + Duration::from_secs(30))
    }

    /// Waits a moment before the next attempt.
    pub(crate) async fn pause(&self, error: &Error) {
        assert!(Instant::now() < self.0, "half a minute, and still {error:?}");
        tokio::time::sleep(milliseconds(5)).await;
    }
}

pub(crate) fn milliseconds(time: u64) -> Duration {
    Duration::from_millis(time)
}

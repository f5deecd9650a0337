//! What the long runs share: how long they are, and an aggregate whose events tell to which unit they belong.

use std::time::{Duration, Instant};

use evercore_postgres::tokio_postgres::{self, Client, NoTls};
use evercore_postgres::{
    Aggregate, AggregateId, CommandId, Error, ErrorKind, EventStore, Json, Loaded, PostgresEngine, Result,
    RetryPolicy, UnitOfWork,
};
use serde::{Deserialize, Serialize};

/// One of two sizes: the second where `EVERCORE_TORTURE` is `full`.
pub(crate) fn sized<T>(short: T, full: T) -> T {
    if std::env::var("EVERCORE_TORTURE").is_ok_and(|size| size == "full") { full } else { short }
}

/// Counts its events; a state that has not seen all of them tells on itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) events: i64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum AccountEvent {
    Credited(Part),
    Debited(Part),
}

/// Which event of which unit this is.
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

/// A store that leaves it to the test to try again.
pub(crate) fn patient_not(engine: &PostgresEngine) -> EventStore {
    EventStore::new(engine.clone()).with_retry(RetryPolicy::new().with_attempts(1))
}

/// The number of a unit: no two writers have one in common.
pub(crate) fn number(writer: usize, nth: i64) -> i64 {
    i64::try_from(writer + 1).unwrap() << 32 | nth
}

pub(crate) fn command(unit: i64) -> CommandId {
    CommandId::new(format!("unit {unit:020}")).unwrap()
}

/// New accounts, each with an event of a unit of its own.
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

/// Loads the accounts and records so many events, dealt out in turn.
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

/// The kind of an error in one word.
pub(crate) fn word(error: &Error) -> String {
    let kind = format!("{:?}", error.kind());
    kind.split([' ', '{']).next().unwrap_or_default().to_owned()
}

pub(crate) fn is_unknown(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::OutcomeUnknown)
}

/// Whether the same command may simply be tried again.
pub(crate) fn is_trouble(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::OutcomeUnknown | ErrorKind::Unavailable)
}

/// An engine, also where connections are ended at random.
pub(crate) async fn engine(url: &str) -> PostgresEngine {
    loop {
        match PostgresEngine::connect(url).await {
            Ok(engine) => return engine,
            Err(error) => assert_eq!(*error.kind(), ErrorKind::Unavailable, "{error:?}"),
        }
    }
}

/// A connection of the test's own, beside the engine's.
pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Patience with a server that is out of reach: as much as it needs to come back.
pub(crate) struct Patience(Instant);

impl Patience {
    pub(crate) fn new() -> Self {
        Self(Instant::now() + Duration::from_secs(30))
    }

    /// Waits a moment before it is tried again.
    pub(crate) async fn pause(&self, error: &Error) {
        assert!(Instant::now() < self.0, "half a minute, and still {error:?}");
        tokio::time::sleep(milliseconds(5)).await;
    }
}

pub(crate) fn milliseconds(time: u64) -> Duration {
    Duration::from_millis(time)
}

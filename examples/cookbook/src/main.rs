//! The recipes of docs/cookbook.md as one program. A test compares the page with this file.

use std::error::Error as StdError;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use evercore_memory::MemoryEngine;
use evercore_sqlite::rusqlite::Connection;
use evercore_sqlite::{
    Aggregate, AggregateQuery, AsOf, BoxError, Command, CommandId, Durability, Error, EventStore,
    FailureAction, FailurePolicy, Filter, Json, LogQuery, Metadata, PageLimit, Patch, Position, Result,
    RunEnd, Sequence, SqliteEngine, Start, StateAggregate, StorageEngine, Timestamp,
};
use evercore_testkit::Given;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Account {
    balance: i64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum AccountEvent {
    Deposited { amount: i64 },
    Withdrawn { amount: i64 },
}

impl Aggregate for Account {
    const TYPE: &'static str = "account";
    const SNAPSHOT_EVERY: u32 = 100; // keep a snapshot after every hundredth event
    const SNAPSHOT_VERSION: u32 = 1; // raise it when the state changes its shape or meaning
    type Event = AccountEvent;
    type Codec = Json;

    fn apply(&mut self, event: AccountEvent) {
        match event {
            AccountEvent::Deposited { amount } => self.balance += amount,
            AccountEvent::Withdrawn { amount } => self.balance -= amount,
        }
    }

    fn validate(&self) -> Result<(), BoxError> {
        if self.balance < 0 { Err("an account is never overdrawn".into()) } else { Ok(()) }
    }
}

#[derive(Debug, PartialEq)]
struct NotEnough {
    missing: i64,
}

impl fmt::Display for NotEnough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is missing", self.missing)
    }
}

impl StdError for NotEnough {}

impl Account {
    fn withdraw(&self, amount: i64) -> Result<[AccountEvent; 1], NotEnough> {
        if amount > self.balance {
            return Err(NotEnough { missing: amount - self.balance });
        }
        Ok([AccountEvent::Withdrawn { amount }])
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Customer {
    name: String,
    phone: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
enum CustomerEvent {
    Registered { name: String },
    Changed { name: Option<String>, phone: Patch<String> }, // `None` leaves a field as it is, `Patch` can clear it
}

impl StateAggregate for Customer {
    const TYPE: &'static str = "customer";
    type Event = CustomerEvent;
}

fn main() -> Result<()> {
    smol::block_on(run())
}

async fn run() -> Result<()> {
    stories();
    let engine = SqliteEngine::open_in_memory().await?;
    let store = EventStore::new(engine.clone());
    natural_keys(&store).await?;
    decisions(&store).await?;
    several_aggregates(&store).await?;
    guards(&store).await?;
    command_ids(&store).await?;
    own_sql(&engine, &store).await?;
    subscriptions(&store).await?;
    projections(&engine, &store).await?;
    live(&store).await?;
    by_hand(&store).await?;
    metadata(&store).await?;
    as_of(&store).await?;
    reading(&store).await?;
    backwards(&store).await?;
    overwritten(&store).await?;
    under_smol(&store).await?;
    let runtime = tokio::runtime::Runtime::new().map_err(Error::rejected)?;
    runtime.block_on(under_tokio(store))?;
    files().await
}

async fn natural_keys(store: &EventStore) -> Result<()> {
    let mut work = store.begin();
    let mut alice = work.load_or_create::<Account>("alice").await?;
    work.record(&mut alice, AccountEvent::Deposited { amount: 100 })?;
    work.change_key(&mut alice, "alice@example.org")?;
    work.commit().await?;

    let same = store.load::<Account>("alice@example.org").await?; // by key
    let same = store.load::<Account>(same.id()).await?; // by id
    assert_eq!(same.balance, 100);
    assert!(store.find::<Account>("alice").await?.is_none()); // the old key is free
    Ok(())
}

async fn decisions(store: &EventStore) -> Result<()> {
    store.update_or_create("bob", |_: &Account| [AccountEvent::Deposited { amount: 50 }]).await?;

    let refused = store.update("bob", |bob: &Account| bob.withdraw(80)).await.err();
    let reason = refused.as_ref().and_then(|error| error.cause::<NotEnough>());
    assert_eq!(reason, Some(&NotEnough { missing: 30 }));
    Ok(())
}

async fn several_aggregates(store: &EventStore) -> Result<()> {
    store
        .retry(async || {
            let mut work = store.begin();
            let mut from = work.load::<Account>("alice@example.org").await?;
            let mut to = work.load::<Account>("bob").await?;
            let events = from.withdraw(25).map_err(Error::rejected)?;
            work.record_all(&mut from, events)?;
            work.record(&mut to, AccountEvent::Deposited { amount: 25 })?;
            work.commit().await
        })
        .await?;
    Ok(())
}

async fn guards(store: &EventStore) -> Result<()> {
    let mut work = store.begin();
    let rich = work.load::<Account>("alice@example.org").await?;
    let mut poor = work.load::<Account>("bob").await?;
    if rich.balance > 0 {
        work.guard(&rich)?; // not written, but it must not change before the commit
        work.record(&mut poor, AccountEvent::Deposited { amount: 5 })?;
    }
    match work.commit().await {
        Err(error) if error.is_conflict() => println!("somebody was faster: load and decide again"),
        result => println!("committed at {}", result?.last),
    }
    Ok(())
}

async fn command_ids(store: &EventStore) -> Result<()> {
    let request = CommandId::new("request 7f3a")?;
    let first = store.update_once(request.clone(), "bob", |bob: &Account| bob.withdraw(10)).await?;
    let again = store.update_once(request.clone(), "bob", |bob: &Account| bob.withdraw(10)).await?;
    assert_eq!(first, again); // one effect, one receipt

    // After a lost answer (`OutcomeUnknown`): the receipt, or `None` if it has no effect and never will have one.
    let receipt = store.settle(&request).await?;
    assert_eq!(receipt, Some(first));

    // Over several aggregates. The same id with another word or other aggregates: `CommandReused`.
    let command = Command::new(CommandId::new("request 7f3b")?, "1 from bob to alice");
    store
        .once(command, async |mut work| {
            let mut from = work.load::<Account>("bob").await?;
            let mut to = work.load::<Account>("alice@example.org").await?;
            work.record(&mut from, AccountEvent::Withdrawn { amount: 1 })?;
            work.record(&mut to, AccountEvent::Deposited { amount: 1 })?;
            work.commit().await
        })
        .await?;
    Ok(())
}

async fn own_sql(engine: &SqliteEngine, store: &EventStore) -> Result<()> {
    let table = "CREATE TABLE bank_outbox (id INTEGER PRIMARY KEY, message TEXT NOT NULL) STRICT";
    engine.commit_with(store.begin(), move |sql| Ok(sql.execute_batch(table)?)).await?;

    let mut work = store.begin();
    work.set_command(CommandId::new("request 7f3c")?); // a repeated command does not run the SQL again
    let mut bob = work.load::<Account>("bob").await?;
    work.record(&mut bob, AccountEvent::Deposited { amount: 3 })?;
    let message = format!("tell {} of 3", bob.id());
    let send = move |sql: &Connection| {
        sql.prepare_cached("INSERT INTO bank_outbox (message) VALUES (?1)")?.execute([message])?;
        Ok(())
    };
    engine.commit_with(work, send).await?; // the event and the row, or neither
    Ok(())
}

async fn subscriptions(store: &EventStore) -> Result<()> {
    let shutdown = done(store, "mails");
    store
        .subscription("mails")?
        .with_filter(Filter::of::<Account>()?)
        .on_failure(FailurePolicy::new(FailureAction::Park).with_attempts(3)) // then set aside: see `store.parked`
        .run(shutdown, |event| async move {
            let AccountEvent::Withdrawn { amount } = event.decode::<Account>()? else { return Ok(()) };
            if !event.is_replay() {
                println!("a mail about {amount} withdrawn from account {}", event.aggregate());
            }
            Ok(())
        })
        .await?;
    Ok(())
}

async fn projections(engine: &SqliteEngine, store: &EventStore) -> Result<()> {
    let table = "CREATE TABLE bank_totals (account INTEGER PRIMARY KEY, deposited INTEGER NOT NULL) STRICT";
    engine.commit_with(store.begin(), move |sql| Ok(sql.execute_batch(table)?)).await?;

    // The handler writes in the transaction that moves the cursor, so each event counts once.
    let totals = engine.projection(|sql, delivery| {
        let add = "INSERT INTO bank_totals VALUES (?1, ?2)
                   ON CONFLICT (account) DO UPDATE SET deposited = deposited + excluded.deposited";
        let mut add = sql.prepare_cached(add)?;
        for event in delivery.events() {
            if let AccountEvent::Deposited { amount } = event.decode::<Account>()? {
                add.execute((event.aggregate().get(), amount))?;
            }
        }
        Ok(())
    });
    let of_accounts = Filter::of::<Account>()?;
    let subscription = store.subscription("totals")?.with_filter(of_accounts);
    subscription.declare().await?;

    // A writer waits until the projection has its event, and then reads the table.
    let mut read = Ok(());
    let reading = async {
        let deposit = |_: &Account| [AccountEvent::Deposited { amount: 9 }];
        read = match store.update("bob", deposit).await {
            Ok(receipt) => store.wait_for(&receipt, "totals", Duration::from_secs(5)).await,
            Err(error) => Err(error),
        };
    };
    let ended = subscription.run_sink(reading, totals).await?; // ends with `reading`; in a service, on Ctrl-C
    read?;
    assert_eq!(ended, RunEnd::ShutDown);
    Ok(())
}

/// A shutdown that comes as soon as a subscription has seen the whole log. Yours is Ctrl-C.
async fn done(store: &EventStore, name: &str) {
    let head = store.head().await.unwrap_or_default();
    while store.wait_for_position(head, name, Duration::from_secs(5)).await.is_err() {
        store.engine().pause(Duration::from_millis(5)).await;
    }
}

async fn live(store: &EventStore) -> Result<()> {
    let mut news = store.subscribe(Filter::all(), Start::Beginning).await?; // no row is written
    let first = news.next().await?; // waits until there is something
    assert_eq!(first.first().map(|event| event.position()), Some(Position::ZERO.next()));
    Ok(())
}

async fn by_hand(store: &EventStore) -> Result<()> {
    let mut audit = store.subscription("audit")?.claim().await?; // waits while another owner has it
    let delivery = audit.next().await?;
    println!("{} events to look at, lease {}", delivery.events().len(), delivery.lease().epoch);
    audit.ack(&delivery).await?; // `LeaseLost` if another owner has come meanwhile
    audit.release().await?;

    for state in store.subscriptions().await? {
        println!("{} has {} events to go", state.cursor.id.subscription, state.lag_events);
    }
    store.reset_subscription("audit", Start::Beginning).await // all events come again, as a replay
}

async fn metadata(store: &EventStore) -> Result<()> {
    let mut work = store.begin();
    work.set_metadata(Metadata::new().with_reference("clerk 112")?.with_correlation_id("request 7f3b")?)?;
    let mut bob = work.load::<Account>("bob").await?;
    work.record(&mut bob, AccountEvent::Deposited { amount: 1 })?;
    let late = Metadata::new()
        .with_time(Timestamp::from_micros(1_317_422_324_546_000)?)
        .with_header("source", "mail")?;
    work.record_with(&mut bob, AccountEvent::Deposited { amount: 2 }, &late)?;
    work.commit().await?;
    Ok(())
}

async fn as_of(store: &EventStore) -> Result<()> {
    let first = store.load_as_of::<Account>("bob", AsOf::Sequence(Sequence::new(1)?)).await?;
    assert_eq!(first.balance, 50);
    let today = store.load_as_of::<Account>("bob", AsOf::Recorded(Timestamp::now())).await?;
    assert_eq!(today.state(), store.load::<Account>("bob").await?.state());
    Ok(())
}

async fn reading(store: &EventStore) -> Result<()> {
    let filter = Filter::of::<Account>()?;
    let mut log = store.log_reader(LogQuery::after(Position::ZERO).with_filter(filter));
    loop {
        while let Some(page) = log.next().await? {
            for event in &page.events {
                let what = event.decode::<Account>()?;
                println!("{} {what:?} {:?}", event.position(), event.reference());
            }
        }
        let cursor = log.position(); // also past events that the filter leaves out
        if store.wait(cursor, Duration::from_millis(10)).await? == cursor {
            return Ok(()); // nothing new for a while
        }
    }
}

async fn backwards(store: &EventStore) -> Result<()> {
    let bob = store.load::<Account>("bob").await?;
    let last_three = AggregateQuery::before(bob.id(), Sequence::MAX).with_limit(PageLimit::events(3)?);
    assert_eq!(store.read_aggregate(last_three).await?.len(), 3);
    Ok(())
}

async fn overwritten(store: &EventStore) -> Result<()> {
    let mut work = store.begin();
    let mut ada = work.create_with_key::<Customer>("ada").await?;
    work.record(&mut ada, CustomerEvent::Registered { name: "Ada".to_owned() })?;
    work.record(&mut ada, CustomerEvent::Changed { name: None, phone: Patch::Set("0123".to_owned()) })?;
    work.record(&mut ada, CustomerEvent::Changed { name: Some("Ada L.".to_owned()), phone: Patch::Clear })?;
    work.commit().await?;
    assert_eq!((ada.name.as_str(), ada.phone.as_ref()), ("Ada L.", None));
    Ok(())
}

async fn under_smol(store: &EventStore) -> Result<()> {
    let task = smol::spawn({
        let store = store.clone(); // cheap: all clones share one engine
        async move { store.update("bob", |bob: &Account| bob.withdraw(1)).await }
    });
    task.await?;
    Ok(())
}

async fn under_tokio(store: EventStore) -> Result<()> {
    let task = tokio::spawn(async move {
        let again = || async {
            let mut work = store.begin();
            let mut bob = work.load::<Account>("bob").await?;
            work.record(&mut bob, AccountEvent::Withdrawn { amount: 1 })?;
            work.commit().await
        };
        store.retry(again).await
    });
    task.await.map_err(Error::rejected)??;
    Ok(())
}

async fn files() -> Result<()> {
    let folder = tempfile::tempdir().map_err(Error::rejected)?;
    let folder = folder.path();

    let engine = SqliteEngine::builder()
        .durability(Durability::ProcessCrash) // weaker than the default, which survives a power cut
        .read_connections(2)
        .open(folder.join("accounts.db"))
        .await?;
    let store = EventStore::new(engine.clone());
    store.update_or_create("bob", |_: &Account| [AccountEvent::Deposited { amount: 50 }]).await?;

    engine.backup_to(folder.join("backup.db")).await?; // a consistent copy, while others go on writing
    engine.close().await?;

    let backup = SqliteEngine::builder().read_only(true).open(folder.join("backup.db")).await?;
    let bob = EventStore::new(backup).load::<Account>("bob").await?;
    assert_eq!(bob.balance, 50);
    by_uri(folder).await
}

/// The scheme of the URI names the engine. The program lists the engines that it is built with.
async fn connect(uri: &str) -> Result<EventStore> {
    let engine: Arc<dyn StorageEngine> = match uri.split_once(':') {
        Some(("memory", _)) => Arc::new(MemoryEngine::new()),
        Some(("sqlite", path)) => Arc::new(SqliteEngine::open(path).await?),
        // Some(("postgres" | "postgresql", _)) => Arc::new(PostgresEngine::connect(uri).await?),
        _ => return Err(Error::invalid("the URI begins with no scheme of an engine")),
    };
    Ok(EventStore::shared(engine))
}

async fn by_uri(folder: &Path) -> Result<()> {
    for uri in ["memory:".to_owned(), format!("sqlite:{}", folder.join("by uri.db").display())] {
        let store = connect(&uri).await?;
        store.load_or_create::<Account>("bob").await?;
        store.close().await?;
    }
    assert!(connect("mysql://localhost").await.is_err());
    Ok(())
}

fn stories() {
    Given::<Account>::events([AccountEvent::Deposited { amount: 50 }])
        .when(|account| account.withdraw(20))
        .then([AccountEvent::Withdrawn { amount: 20 }])
        .then_state(|account| assert_eq!(account.balance, 30));

    Given::<Account>::nothing().when(|account| account.withdraw(20)).then_rejected_with::<NotEnough>();
}

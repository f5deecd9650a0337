//! Messages to the outside world: a letter for every order, sent at least once and delivered once.
//!
//! A mail service cannot take part in a transaction, so a letter may be sent again. Four things make that harmless: the
//! service recognises a letter by the position of its event, and an old owner by the epoch of its lease. A letter that cannot be
//! sent is set aside, and a replay of the log sends nothing.
//!
//!     cargo run -p outbox

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use evercore_sqlite::{
    Aggregate, AggregateId, BoxError, Error, Event, EventStore, FailureAction, FailurePolicy, Json, Lease,
    Position, Result, RunEnd, SqliteEngine, Start, Subscription,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

const NAME: &str = "letters";
const SOON: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Order {
    address: String,
}

#[derive(Debug, Serialize, Deserialize)]
enum OrderEvent {
    Placed { address: String },
    Shipped { address: String },
}

impl Aggregate for Order {
    const TYPE: &'static str = "order";
    type Event = OrderEvent;
    type Codec = Json;

    fn apply(&mut self, event: OrderEvent) {
        let (OrderEvent::Placed { address } | OrderEvent::Shipped { address }) = event;
        self.address = address;
    }
}

/// A mail service that fails often.
#[derive(Debug, Default)]
struct MailService(Mutex<Books>);

/// The records of the service.
#[derive(Clone, Debug, Default)]
pub(crate) struct Books {
    /// The accepted letters, by the position of their event.
    pub(crate) delivered: BTreeMap<Position, String>,
    pub(crate) calls: u32,
    pub(crate) busy: u32,
    pub(crate) lost_answers: u32,
    pub(crate) known_already: u32,
    pub(crate) fenced_off: u32,
    /// The highest epoch that it has seen.
    epoch: i64,
    addresses: BTreeSet<String>,
}

#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("the mail service is busy")]
    Busy,
    #[error("the mail service did not answer")]
    NoAnswer,
    #[error("there is no such address")]
    NoSuchAddress,
    #[error("somebody else sends the letters now")]
    Fenced,
}

impl MailService {
    /// Accepts each letter once, and only from the present owner.
    fn take(&self, id: Position, lease: &Lease, address: &str, text: String) -> Result<(), Refusal> {
        let mut books = self.books();
        books.calls += 1;
        if lease.epoch < books.epoch {
            books.fenced_off += 1;
            return Err(Refusal::Fenced);
        }
        books.epoch = lease.epoch;
        if !books.addresses.contains(address) {
            return Err(Refusal::NoSuchAddress);
        }
        if books.calls.is_multiple_of(3) {
            books.busy += 1;
            return Err(Refusal::Busy);
        }
        if books.delivered.contains_key(&id) {
            books.known_already += 1;
            return Ok(());
        }
        books.delivered.insert(id, text);
        if books.calls.is_multiple_of(4) {
            books.lost_answers += 1;
            return Err(Refusal::NoAnswer); // but the letter was accepted
        }
        Ok(())
    }

    fn open_mailbox(&self, address: &str) {
        self.books().addresses.insert(address.to_owned());
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The address that gets a letter about this event.
fn send(service: &MailService, event: &Event, lease: &Lease) -> Result<(), BoxError> {
    let (address, text) = match event.decode::<Order>()? {
        OrderEvent::Placed { address } => (address, "thank you for your order"),
        OrderEvent::Shipped { address } => (address, "it is on its way"),
    };
    let text = format!("dear {address}, {text}");
    Ok(service.take(event.position(), lease, &address, text)?)
}

fn letters(store: &EventStore) -> Result<Subscription> {
    // Four attempts, with growing pauses. Then the event is parked, and later events of its order wait for it.
    // The owner looks for resumed events after each third of its lease. The lease is short, so you need not wait long.
    let policy = FailurePolicy::new(FailureAction::Park)
        .with_attempts(4)
        .with_pauses(Duration::from_millis(5), Duration::from_millis(50));
    Ok(store.subscription(NAME)?.with_lease(Duration::from_secs(1)).on_failure(policy))
}

/// Sends letters until it is told to stop.
async fn run_letters(
    store: EventStore,
    service: Arc<MailService>,
    stop: oneshot::Receiver<()>,
) -> Result<RunEnd> {
    let shutdown = async { drop(stop.await) };
    letters(&store)?
        .run(shutdown, move |event| {
            let service = Arc::clone(&service);
            async move {
                if event.is_replay() {
                    return Ok(()); // it was sent when it happened
                }
                send(&service, &event, event.lease())
            }
        })
        .await
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    run().await.map(drop)
}

pub(crate) async fn run() -> Result<Books> {
    let store = EventStore::new(SqliteEngine::open_in_memory().await?);
    let service = Arc::new(MailService::default());
    ["ada", "bob", "cleo"].into_iter().for_each(|address| service.open_mailbox(address));
    letters(&store)?.declare().await?; // orders that were placed before this moment are replay: no letter is sent about them
    let mut orders = vec![place(&store, "ada").await?];

    // An owner gets the first letter, and then sleeps for longer than its lease.
    let mut sleeper = letters(&store)?.with_lease(Duration::from_millis(50)).claim().await?;
    let forgotten = sleeper.next().await?;
    tokio::time::sleep(Duration::from_millis(60)).await;

    // Another owner takes over and sends it, and the later ones.
    let (stop, stopped) = oneshot::channel();
    let runner = tokio::spawn(run_letters(store.clone(), Arc::clone(&service), stopped));
    for address in ["bob", "nobody", "cleo"] {
        orders.push(place(&store, address).await?);
    }
    for order in orders {
        let ship = |order: &Order| [OrderEvent::Shipped { address: order.address.clone() }];
        store.update(order, ship).await?;
    }
    let last = store.head().await?;
    store.wait_for_position(last, NAME, SOON).await?;
    show("all events are handled", &service);

    // The first owner wakes up. The service and the store both refuse it.
    for event in forgotten.iter() {
        let late = send(&service, &event, event.lease()).expect_err("another has the lease");
        println!("too late for the letter about event {}: {late}", event.position());
    }
    let late = sleeper.ack(&forgotten).await.expect_err("another has the lease");
    println!("too late to acknowledge it: {late}");

    // The letter that could not be sent was set aside. The cause is removed, and it is sent again.
    for (_, parked) in store.parked(NAME).await? {
        println!("parked: event {} after {} attempts: {}", parked.position, parked.attempts, parked.error);
    }
    service.open_mailbox("nobody");
    while let Some((cursor, parked)) = store.parked(NAME).await?.pop() {
        if !parked.is_due {
            store.resume_parked(&cursor, Some(parked.position)).await?; // to be tried once
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    show("the address was put right", &service);

    // All events are read again. It is a replay, so no letter is sent.
    // A reset forgets parked events, so settle them before.
    store.reset_subscription(NAME, Start::Beginning).await?;
    store.wait_for_position(last, NAME, SOON).await?;
    show("the log was read once more", &service);

    drop(stop);
    runner.await.map_err(Error::rejected)??;
    let books = service.books().clone();
    Ok(books)
}

async fn place(store: &EventStore, address: &str) -> Result<AggregateId> {
    let mut work = store.begin();
    let mut order = work.create::<Order>().await?;
    work.record(&mut order, OrderEvent::Placed { address: address.to_owned() })?;
    work.commit().await?;
    Ok(order.id())
}

fn show(when: &str, service: &MailService) {
    let Books { delivered, calls, busy, lost_answers, known_already, .. } = &*service.books();
    println!("{when}: {} letters delivered by {calls} calls,", delivered.len());
    println!("    {busy} times busy, {lost_answers} answers lost, {known_already} letters known already");
}

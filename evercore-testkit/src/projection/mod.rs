//! Crash tests for projections. They crash processes, repeat deliveries and lose leases, from a seed. In the end the
//! projection must be as if nothing had happened.
//!
//! [`ProjectionUnderTest`] describes your projection: its storage, its handler, and its expected content as a pure
//! fold of all events. [`Torture`] writes a seeded history, runs the handler in the subscriptions of core, and
//! injects each [`Fault`]. Each time the handler has caught up, these must be equal:
//!
//! * the projection that went through the faults,
//! * a projection that was built from the first event without faults, and
//! * the fold.
//!
//! A sink that [holds its cursor](evercore_core::engine::Sink::holds_cursor) delivers exactly once. It must equal the fold up
//! to its cursor even after a crash.
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::sync::{Arc, Mutex};
//!
//! use evercore_core::engine::Sink;
//! use evercore_memory::{Aggregate, AggregateId, Event, EventCodec, EventStore, Json, MemoryEngine, Sequence};
//! use evercore_testkit::block_on;
//! use evercore_testkit::projection::{Dice, ProjectionUnderTest, Torture, each};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Clone, Default, Serialize, Deserialize)]
//! struct Account { cents: i64 }
//!
//! #[derive(Serialize, Deserialize)]
//! enum AccountEvent { Moved { cents: i64 } }
//!
//! impl Aggregate for Account {
//!     const TYPE: &'static str = "account";
//!     type Event = AccountEvent;
//!     type Codec = Json;
//!     fn apply(&mut self, AccountEvent::Moved { cents }: AccountEvent) { self.cents += cents }
//! }
//!
//! fn moved(event: &Event) -> i64 {
//!     let AccountEvent::Moved { cents } = Json::decode(event.event_type().as_str(), event.payload()).unwrap();
//!     cents
//! }
//!
//! /// A table of balances; each row knows up to which sequence it counts, so that an event counts once.
//! #[derive(Default)]
//! struct Balances(Arc<Mutex<BTreeMap<AggregateId, (i64, Sequence)>>>);
//!
//! impl ProjectionUnderTest for Balances {
//!     type Engine = MemoryEngine;
//!     type Model = BTreeMap<AggregateId, i64>;
//!
//!     async fn empty(_: &Arc<MemoryEngine>) -> Self {
//!         Self::default()
//!     }
//!
//!     fn handler(&self) -> impl Sink + 'static {
//!         let rows = Arc::clone(&self.0);
//!         each(move |event| {
//!             let rows = Arc::clone(&rows);
//!             async move {
//!                 let mut rows = rows.lock().unwrap();
//!                 let (balance, counted) = rows.entry(event.aggregate()).or_default();
//!                 if event.sequence() > *counted {
//!                     (*balance, *counted) = (*balance + moved(&event), event.sequence());
//!                 }
//!                 Ok(())
//!             }
//!         })
//!     }
//!
//!     async fn clear(&self) {
//!         self.0.lock().unwrap().clear();
//!     }
//!
//!     async fn model(&self) -> Self::Model {
//!         self.0.lock().unwrap().iter().map(|(id, (balance, _))| (*id, *balance)).collect()
//!     }
//!
//!     async fn happen(store: &EventStore, dice: &mut Dice) {
//!         let mut work = store.begin();
//!         let name = ["alice", "bob"][dice.below(2)];
//!         let mut account = work.load_or_create::<Account>(name).await.unwrap();
//!         work.record(&mut account, AccountEvent::Moved { cents: dice.below(100) as i64 }).unwrap();
//!         work.commit().await.unwrap();
//!     }
//!
//!     fn fold(events: &[Event]) -> Self::Model {
//!         let mut model = Self::Model::new();
//!         events.iter().for_each(|event| *model.entry(event.aggregate()).or_default() += moved(event));
//!         model
//!     }
//! }
//!
//! block_on(Torture::<Balances>::on(async || MemoryEngine::new()).seeds(20).run());
//! ```
//!
//! A failure names the seed, the difference, and all faults up to it. `EVERCORE_SEED`, or [`Torture::seed`], repeats
//! it. If an engine has threads of its own, the repeated run may cut the events into other batches. On the memory
//! engine everything is the same.

mod dice;
mod fault;
mod finding;
mod handlers;
mod life;
mod process;
mod torture;
mod world;

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use evercore_core::engine::Sink;
use evercore_core::{Event, EventStore, StorageEngine};

pub use dice::{Dice, plain_events};
pub use fault::Fault;
pub use finding::{Finding, Report};
pub use handlers::{each, may_crash_here, whole};
pub use torture::Torture;

/// A projection under test. A value stands for the storage, which survives crashes. A handler's memory does not
/// survive. All methods may panic, as in a test.
pub trait ProjectionUnderTest: Sized + Send + Sync + 'static {
    /// The engine that stores the events.
    type Engine: StorageEngine;

    /// The content of the projection, which is compared.
    type Model: PartialEq + fmt::Debug + Send;

    /// Makes a new, empty projection that shares nothing with others: a value in memory, or tables with new names.
    /// There are several at a time.
    fn empty(engine: &Arc<Self::Engine>) -> impl Future<Output = Self> + Send;

    /// Makes the handler when a process starts; it is lost when the process ends. Use the handler of production,
    /// turned into a sink by [`each`] or [`whole`], or a sink of an engine.
    fn handler(&self) -> impl Sink + 'static;

    /// Empties the storage, before the projection is built again in the same place.
    fn clear(&self) -> impl Future<Output = ()> + Send;

    /// Reads the content.
    fn model(&self) -> impl Future<Output = Self::Model> + Send;

    /// Commits one unit of work, chosen by the dice. If the handler uses only positions, [`plain_events`] is enough.
    fn happen(store: &EventStore, dice: &mut Dice) -> impl Future<Output = ()> + Send;

    /// The expected content after these events: all events that pass the filter, from the first one on. It should
    /// share as little code with the handler as possible.
    fn fold(events: &[Event]) -> Self::Model;
}

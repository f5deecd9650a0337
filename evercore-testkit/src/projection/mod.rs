//! Torture for projections: seeded crashes, redeliveries and lost leases, after which a projection must be what it would be
//! without.
//!
//! You say by [`ProjectionUnderTest`] where your projection lies, which handler keeps it, and what it should be: a pure fold
//! of all events. [`Torture`] writes a seeded history, runs the handler by the subscriptions of core, has everything happen
//! that [`Fault`] names, and demands each time the handler has caught up that
//!
//! * the projection as it was kept,
//! * one that was built from the first event without any fault, and
//! * the fold
//!
//! are equal. An exactly-once sink, one that [holds its cursor](evercore_core::Sink::holds_cursor), must be equal to the fold
//! up to its cursor even after a crash.
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::sync::{Arc, Mutex};
//!
//! use evercore_memory::{
//!     Aggregate, AggregateId, Event, EventCodec, EventStore, Json, MemoryEngine, Sequence, Sink,
//! };
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
//! Where it fails it tells the seed, what differs and all that was done to the projection until then; `EVERCORE_SEED`, or
//! [`Torture::seed`], does the same again. Where an engine works in threads of its own, events may come in other batches the
//! second time; on the memory engine all is the same.

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

use evercore_core::{Event, EventStore, Sink, StorageEngine};

pub use dice::{Dice, plain_events};
pub use fault::Fault;
pub use finding::{Finding, Report};
pub use handlers::{each, may_crash_here, whole};
pub use torture::Torture;

/// A projection, as [`Torture`] meets it: a value is the storage that outlives crashes; what a handler keeps in memory does
/// not. All of these may panic, as a test does.
pub trait ProjectionUnderTest: Sized + Send + Sync + 'static {
    /// The engine on which the events lie.
    type Engine: StorageEngine;

    /// What the projection says, to be compared.
    type Model: PartialEq + fmt::Debug + Send;

    /// A fresh one, empty, on a storage that no other has: a value in memory, tables with names of their own. There are
    /// several at a time.
    fn empty(engine: &Arc<Self::Engine>) -> impl Future<Output = Self> + Send;

    /// What a process makes when it starts, and takes into its grave: the very handler of production, as [`each`] or
    /// [`whole`] make it a sink, or a sink of an engine.
    fn handler(&self) -> impl Sink + 'static;

    /// Empties the storage, as is done when a projection is to be built again in its place.
    fn clear(&self) -> impl Future<Output = ()> + Send;

    /// Reads the model back.
    fn model(&self) -> impl Future<Output = Self::Model> + Send;

    /// Has something happen: commits a unit of work, which one is up to the dice. Where the handler looks at positions only,
    /// [`plain_events`] will do.
    fn happen(store: &EventStore, dice: &mut Dice) -> impl Future<Output = ()> + Send;

    /// What the model is after these events, which are all that pass the filter, from the first on. Let it share as little
    /// with the handler as may be.
    fn fold(events: &[Event]) -> Self::Model;
}

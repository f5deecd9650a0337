// The program on this page uses serde.
#![cfg_attr(feature = "json", doc = include_str!("../README.md"))]
#![cfg_attr(not(feature = "json"), doc = "The common part of evercore, an event store for Rust.")]

mod aggregate;
mod ahead;
mod backoff;
mod batch;
mod check;
mod command;
mod context;
mod decision;
mod engine;
mod error;
mod event;
mod future;
pub mod guide;
mod hash;
mod ids;
#[cfg(feature = "json")]
mod json;
pub mod limits;
mod loaded;
mod log_reader;
mod mark;
mod metadata;
mod name;
mod name_table;
mod observe;
mod panic;
mod race;
mod read_store;
mod replay;
mod retry;
#[cfg(feature = "json")]
mod serde_impls;
#[cfg(feature = "json")]
mod state;
mod store;
mod store_id;
mod subscription;
mod target;
mod text;
mod time;
mod turn;
mod unit_of_work;

pub use aggregate::{Aggregate, Encoded, EventCodec, EventsOnly, StateCodec};
pub use backoff::RetryPolicy;
pub use batch::{Append, Batch, Guard, KeyChange, NewAggregate, Receipt, SequenceChange, Snapshot};
pub use check::{Checked, Lookup, StoredAggregate};
pub use command::{Command, KnownCommand};
pub use context::EventContext;
pub use decision::Decision;
pub use engine::{
    AggregateQuery, Direction, Filter, History, KnownType, LoadRequest, LogPage, LogQuery, PageLimit,
    StorageEngine,
};
pub use error::{BoxError, Error, ErrorKind, Result};
pub use event::{Event, EventRow, Events, EventsBuilder, EventsIter, NewEvent, Payload};
pub use future::BoxFuture;
pub use ids::{AggregateId, IdBlock, Position, Sequence};
#[cfg(feature = "json")]
pub use json::Json;
pub use loaded::Loaded;
pub use log_reader::LogReader;
pub use mark::{Mark, Witness};
pub use metadata::{Headers, Metadata};
pub use name::{AggregateType, CommandId, EventType, Key, OwnerId, SubscriptionName};
pub use name_table::NameTable;
pub use panic::CaughtPanic;
pub use read_store::ReadStore;
pub use replay::AsOf;
#[cfg(feature = "json")]
pub use state::{Patch, StateAggregate};
pub use store::EventStore;
pub use store_id::StoreId;
pub use subscription::{
    Advance, Cursor, CursorId, CursorState, CursorStatus, Cursors, Delivered, Delivery,
    EphemeralSubscription, Failure, FailureAction, FailurePolicy, Lease, Outcome, OwnedSubscription, Parked,
    ParkedChange, RunEnd, Sink, Start, Step, StepOutcome, Subscription, SubscriptionStorage,
};
pub use target::{IntoTarget, Target};
pub use time::Timestamp;
pub use unit_of_work::UnitOfWork;

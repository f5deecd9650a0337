// The program on this page uses serde.
#![cfg_attr(feature = "json", doc = include_str!("../README.md"))]
#![cfg_attr(not(feature = "json"), doc = "The common part of evercore, an event store for Rust.")]

mod aggregate;
mod ahead;
mod awaited;
mod backoff;
mod batch;
mod check;
mod command;
mod context;
mod contract;
mod decision;
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
mod page_limit;
mod panic;
mod race;
mod read_store;
mod replay;
mod retry;
#[cfg(feature = "json")]
mod serde_impls;
mod shared_log;
#[cfg(feature = "json")]
mod state;
mod store;
mod store_id;
mod subscription;
mod target;
mod text;
mod time;
mod together;
mod turn;
mod unit_of_work;

/// The items that only authors of engines need.
///
/// An engine implements [`StorageEngine`] and [`SubscriptionStorage`](engine::SubscriptionStorage). `evercore-memory` is the smallest example, and
/// `evercore-testkit` tests an engine against the contract.
pub mod engine {
    pub use crate::batch::{Append, Batch, Guard, KeyChange, NewAggregate, SequenceChange, Snapshot};
    pub use crate::check::{Checked, Lookup, StoredAggregate};
    pub use crate::command::KnownCommand;
    pub use crate::contract::{History, LoadRequest, StorageEngine};
    pub use crate::event::{EventRow, EventsBuilder, NewEvent, Payload};
    pub use crate::future::BoxFuture;
    pub use crate::ids::IdBlock;
    pub use crate::mark::{Mark, Witness};
    pub use crate::name_table::{NameCache, NameTable};
    pub use crate::panic::CaughtPanic;
    pub use crate::subscription::{
        Advance, Backlog, Backlogs, ChangeOutcome, Changed, Cursors, Outcome, ParkedChange, Sink, Step,
        StepOutcome, StoredCursor, StoredParked, Subject, SubscriptionChange, SubscriptionStorage,
    };
    pub use crate::target::Target;
}

pub use aggregate::{Aggregate, Encoded, EventCodec, EventsOnly, StateCodec};
pub use backoff::RetryPolicy;
pub use batch::Receipt;
pub use command::Command;
pub use context::EventContext;
pub use contract::{AggregateQuery, Direction, Filter, KnownType, LogPage, LogQuery, StorageEngine};
pub use decision::Decision;
pub use error::{BoxError, Error, ErrorKind, Result};
pub use event::{Event, Events, EventsIter};
pub use future::BoxFuture;
pub use ids::{AggregateId, Position, Sequence};
#[cfg(feature = "json")]
pub use json::Json;
pub use loaded::Loaded;
pub use log_reader::LogReader;
pub use metadata::{Headers, Metadata};
pub use name::{AggregateType, CommandId, EventType, Key, OwnerId, SubscriptionName};
pub use page_limit::PageLimit;
pub use read_store::ReadStore;
pub use replay::AsOf;
#[cfg(feature = "json")]
pub use state::{Patch, StateAggregate};
pub use store::EventStore;
pub use store_id::StoreId;
pub use subscription::{
    Cursor, CursorId, CursorState, CursorStatus, Delivered, Delivery, EphemeralSubscription, Failed,
    FailedEvent, Failure, FailureAction, FailurePolicy, Health, Lease, OwnedSubscription, Parked, Problem,
    Promotion, RunEnd, Selection, Start, Subscription, SubscriptionHealth, Trouble, VersionState,
};
pub use target::IntoTarget;
pub use time::Timestamp;
pub use unit_of_work::UnitOfWork;

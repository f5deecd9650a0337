//! The words and promises of evercore.
#![doc = include_str!("../README.md")]

mod aggregate;
mod batch;
mod engine;
mod error;
mod event;
mod ids;
#[cfg(feature = "json")]
mod json;
pub mod limits;
mod metadata;
mod name;
#[cfg(feature = "json")]
mod state;
mod store;
mod text;
mod time;
mod unit_of_work;

pub use aggregate::{Aggregate, Encoded, EventCodec, StateCodec};
pub use batch::{Append, Batch, Growth, Guard, KeyChange, NewAggregate, Receipt, Snapshot};
pub use engine::{
    AggregateQuery, BoxFuture, Direction, Filter, History, KnownType, LoadRequest, LogPage, LogQuery,
    PageLimit, StorageEngine, Target,
};
pub use error::{BoxError, Error, ErrorKind, Result};
pub use event::{Event, EventRow, Events, EventsBuilder, EventsIter, NewEvent, Payload};
pub use ids::{AggregateId, IdBlock, Position, Sequence};
#[cfg(feature = "json")]
pub use json::Json;
pub use metadata::{Headers, Metadata};
pub use name::{AggregateType, CommandId, EventType, Key};
#[cfg(feature = "json")]
pub use state::{Patch, StateAggregate};
pub use store::{AsOf, Decision, EventStore, IntoTarget, Loaded, RetryPolicy};
pub use time::Timestamp;
pub use unit_of_work::UnitOfWork;

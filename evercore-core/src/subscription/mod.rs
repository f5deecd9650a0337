//! Reading the log as it grows: subscriptions, their cursors and leases, and who hands events to handlers.
//!
//! From below: [`cursor`] says what a store remembers, [`step`] every way in which one cursor changes, [`change`] every way
//! in which several of them change together, [`storage`] what an engine does for it. [`held`] is a cursor in hand, [`runner`] delivers from it, [`worker`] has several of them. Users meet
//! [`settings`], [`owned`], [`ephemeral`] and [`manage`].

mod change;
mod cursor;
mod delivery;
mod ephemeral;
mod failure;
mod handler;
mod health;
mod held;
mod known;
mod manage;
mod owned;
mod partition;
mod runner;
mod settings;
mod spawn;
mod step;
mod stop;
mod storage;
mod stored;
mod tail;
mod worker;

pub use change::{ChangeOutcome, Changed, Subject, SubscriptionChange, VersionState};
pub use cursor::{Cursor, CursorId, CursorStatus, Failure, Lease, Parked, ParkedChange, Selection};
pub use delivery::{Delivered, Delivery, Outcome, Sink};
pub use ephemeral::EphemeralSubscription;
pub use failure::{Failed, FailedEvent, FailureAction, FailurePolicy};
pub use health::{Health, Problem, SubscriptionHealth, Trouble};
pub use manage::{CursorState, Promotion};
pub use owned::OwnedSubscription;
pub use settings::{Start, Subscription};
pub use step::{Advance, Step, StepOutcome};
pub use storage::{Backlog, Backlogs, Cursors, SubscriptionStorage};
pub use stored::{StoredCursor, StoredParked};
pub use worker::RunEnd;

//! What a store remembers of a durable subscription: its cursors, each with its lease, and the events that were parked.

use crate::error::{Error, ErrorKind, Result};
use crate::ids::{AggregateId, Position};
use crate::limits;
use crate::name::{OwnerId, SubscriptionName};
use crate::time::Timestamp;

/// Which cursor: a subscription has one per version and partition.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CursorId {
    /// The name of the subscription.
    pub subscription: SubscriptionName,
    /// The version of the projection, 1 or more.
    pub version: u32,
    /// The partition, from 0.
    pub partition: u32,
}

/// A right to move a cursor: the owner, and the epoch, which grows at every claim. Both are named in every move.
///
/// For a sink that is not in the store, the epoch serves as a fencing token: let it refuse a smaller one for the same
/// [`CursorId`]. Another version counts anew, and so does a cursor that was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Who holds it.
    pub owner: OwnerId,
    /// How often the cursor had been claimed by then.
    pub epoch: i64,
}

/// How far one partition of one version of a subscription has come, and who moves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Which one.
    pub id: CursorId,
    /// How many partitions there are.
    pub partitions: u32,
    /// Everything up to here is done, passed over or parked.
    pub position: Position,
    /// How often it was claimed or reset.
    pub epoch: i64,
    /// Who holds the lease; `None`: nobody.
    pub owner: Option<OwnerId>,
    /// Until when, by the engine's clock; without an owner, until when nobody may claim it.
    pub expires_at: Timestamp,
    /// Who would like to have it, because others have more than they do.
    pub wanted_by: Option<OwnerId>,
    /// Until when that holds.
    pub wanted_until: Timestamp,
    /// Events behind this are live, those up to it are a replay; `None`: all are, while the version is being built.
    pub live_from: Option<Position>,
    /// Whether it may be moved.
    pub status: CursorStatus,
    /// Where it stopped, if it did and has not come further since.
    pub failure: Option<Failure>,
    /// Grows whenever parked events are resumed or dropped by hand.
    pub parked_changes: i64,
}

/// Whether a cursor may be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CursorStatus {
    /// It may.
    Active,
    /// Somebody has paused the subscription.
    Paused,
    /// A newer version has taken over, for good.
    Retired,
}

impl CursorStatus {
    /// A number for it, to be stored.
    pub const fn code(self) -> i32 {
        match self {
            Self::Active => 0,
            Self::Paused => 1,
            Self::Retired => 2,
        }
    }

    /// The status with this number.
    ///
    /// # Errors
    /// [`Backend`](ErrorKind::Backend) if there is none.
    pub fn from_code(code: i32) -> Result<Self> {
        [Self::Active, Self::Paused, Self::Retired]
            .into_iter()
            .find(|status| status.code() == code)
            .ok_or_else(|| Error::new(ErrorKind::Backend, format!("there is no status {code} of a cursor")))
    }
}

/// Why a subscription stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The event that could not be handled.
    pub position: Position,
    /// How often it was tried.
    pub attempts: u32,
    /// What the handler said the last time, and what caused it, cut to [`limits::STORED_ERROR_BYTES`]. It is the user's own
    /// text, or that of a database: show it to those who may see the data.
    pub error: String,
}

/// An event that could not be handled and was put aside, so that others can go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parked {
    /// The event.
    pub position: Position,
    /// The aggregate it belongs to.
    pub aggregate: AggregateId,
    /// Whether later events of the same aggregate wait for it.
    pub holds_back: bool,
    /// How often it was tried.
    pub attempts: u32,
    /// What the handler said the last time, cut to [`limits::STORED_ERROR_BYTES`].
    pub error: String,
    /// When it was parked, by the engine's clock.
    pub parked_at: Timestamp,
    /// Whether somebody wants it to be tried again; the owner of the cursor does so.
    pub is_due: bool,
}

/// What becomes of a cursor's parked events in one [`Step`](crate::Step).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParkedChange {
    /// Keeps this one, in place of the one at the same position if there is one.
    Keep(Parked),
    /// Forgets the one at this position.
    Remove(Position),
    /// Forgets all.
    RemoveAll,
    /// Marks the one at this position, or all, as due.
    Due(Option<Position>),
}

/// As much of an error as is stored.
pub(crate) fn stored_error(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    let mut text = text.replace('\0', "\u{fffd}");
    if text.len() > limits::STORED_ERROR_BYTES {
        let end = text.floor_char_boundary(limits::STORED_ERROR_BYTES);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_cut_at_a_letter_and_has_no_nul() {
        let error = Error::new(ErrorKind::Backend, "é\0".repeat(400));
        let text = stored_error(&error);
        assert!(text.len() <= limits::STORED_ERROR_BYTES && text.len() > 990);
        assert!(text.starts_with("é\u{fffd}é"));
    }

    #[test]
    fn every_status_has_a_code() {
        for status in [CursorStatus::Active, CursorStatus::Paused, CursorStatus::Retired] {
            assert_eq!(CursorStatus::from_code(status.code()).ok(), Some(status));
        }
        assert!(CursorStatus::from_code(3).is_err());
    }
}

//! The stored state of a durable subscription: its cursors, each with its lease, and its parked events.

use crate::error::{Error, ErrorKind, Result};
use crate::ids::{AggregateId, Position};
use crate::limits;
use crate::name::{OwnerId, SubscriptionName};
use crate::time::Timestamp;

/// The id of a cursor. A subscription has one cursor per version and partition.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CursorId {
    /// The name of the subscription.
    pub subscription: SubscriptionName,
    /// The version of the projection, 1 or more.
    pub version: u32,
    /// The partition, from 0.
    pub partition: u32,
}

impl CursorId {
    /// The cursor of an inline projection: it has one partition. `others` are the cursors of the inline projections that
    /// the engine has already.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) if the name breaks a rule; [`Invalid`](ErrorKind::Invalid) if the version is
    /// 0, or if there is an inline projection of this name and version.
    pub fn of_inline<'a>(
        name: impl AsRef<str>,
        version: u32,
        others: impl IntoIterator<Item = &'a Self>,
    ) -> Result<Self> {
        let subscription = SubscriptionName::new(name)?;
        if version == 0 {
            let message = format!("inline projection \"{subscription}\" has version 0, the first is 1");
            return Err(Error::invalid(message));
        }
        let id = Self { subscription, version, partition: 0 };
        if others.into_iter().any(|other| *other == id) {
            let message = format!(
                "there are two inline projections \"{}\" of version {version}: give one of them another name",
                id.subscription
            );
            return Err(Error::invalid(message));
        }
        Ok(id)
    }
}

/// Which cursors of a subscription an operator means: all, or those of a version, of a partition, or of both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Selection {
    version: Option<u32>,
    partition: Option<u32>,
}

impl Selection {
    /// All cursors.
    pub const fn all() -> Self {
        Self { version: None, partition: None }
    }

    /// Those of a version.
    pub const fn of_version(version: u32) -> Self {
        Self { version: Some(version), partition: None }
    }

    /// Those of a partition, in all versions.
    pub const fn of_partition(partition: u32) -> Self {
        Self { version: None, partition: Some(partition) }
    }

    /// Of these, only those of this partition.
    #[must_use]
    pub const fn and_partition(mut self, partition: u32) -> Self {
        self.partition = Some(partition);
        self
    }

    /// The only version, if it is restricted to one.
    pub const fn version(self) -> Option<u32> {
        self.version
    }

    /// The only partition, if it is restricted to one.
    pub const fn partition(self) -> Option<u32> {
        self.partition
    }

    /// Whether this cursor is one of them.
    pub fn has(self, id: &CursorId) -> bool {
        self.version.is_none_or(|version| version == id.version)
            && self.partition.is_none_or(|partition| partition == id.partition)
    }
}

impl Error {
    /// Another owner holds the lease of the cursor, or has the cursor in hand.
    pub fn already_owned(cursor: &CursorId) -> Self {
        let message =
            format!("the lease on subscription \"{}\" belongs to another owner", cursor.subscription);
        Self::new(ErrorKind::AlreadyOwned, message)
    }
}

/// The right to move a cursor: the owner, and the epoch, which grows with every claim. Every move names both.
///
/// For a sink outside of the store the epoch is a fencing token: let the sink refuse an epoch smaller than the last one for
/// the same [`CursorId`]. Epochs of another version, and of a cursor that was removed and made again, start from the
/// beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The holder of the lease.
    pub owner: OwnerId,
    /// How often the cursor had been claimed at this claim.
    pub epoch: i64,
}

/// The position of one partition of one version of a subscription, and its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Subscription, version and partition.
    pub id: CursorId,
    /// How many partitions there are.
    pub partitions: u32,
    /// Every event up to here was handled, passed over or parked.
    pub position: Position,
    /// How often it was claimed or reset.
    pub epoch: i64,
    /// The holder of the lease, if there is one.
    pub owner: Option<OwnerId>,
    /// When the lease expires, by the engine's clock; if unowned, the earliest time it can be claimed.
    pub expires_at: Timestamp,
    /// An owner that asks for this cursor because it has fewer than others.
    pub wanted_by: Option<OwnerId>,
    /// When that request expires.
    pub wanted_until: Timestamp,
    /// Events after this position are live, events up to it are replay. `None` while the version is being built: then all
    /// are replay.
    pub live_from: Option<Position>,
    /// Whether the version waits for its [promotion](crate::EventStore::promote_version) while it is not live, instead of
    /// taking over by itself.
    pub is_held: bool,
    /// Whether it may be moved.
    pub status: CursorStatus,
    /// The event at which the subscription stopped, until it gets past that event.
    pub failure: Option<Failure>,
    /// Grows whenever an operator resumes or drops parked events.
    pub parked_changes: i64,
    /// How many owners in a row lost the lease to another one without a move of the cursor, while they were not idle. The
    /// handler may block its thread at the next event, or end its process.
    pub lost_leases: u32,
}

/// Whether a cursor may be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CursorStatus {
    /// It may be moved.
    Active,
    /// An operator has paused the subscription.
    Paused,
    /// A newer version has taken over. It stands still until its version is
    /// [promoted](crate::EventStore::promote_version).
    Retired,
}

impl CursorStatus {
    /// The number that engines store.
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
    /// [`Backend`](ErrorKind::Backend) if no status has this number.
    pub fn from_code(code: i32) -> Result<Self> {
        [Self::Active, Self::Paused, Self::Retired]
            .into_iter()
            .find(|status| status.code() == code)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Backend,
                    format!(
                        "the stored status {code} of a cursor is unknown; a newer version may have written it"
                    ),
                )
            })
    }
}

/// Why a subscription stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The event that could not be handled.
    pub position: Position,
    /// How often it was tried.
    pub attempts: u32,
    /// The handler's last error with its causes, cut to [`limits::STORED_ERROR_BYTES`]. The text comes from the application
    /// or a database and may contain data: show it only to people who may see the data.
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
    /// The handler's last error, cut to [`limits::STORED_ERROR_BYTES`].
    pub error: String,
    /// When it was parked, by the clock of the process that parked it.
    pub parked_at: Timestamp,
    /// Whether an operator has asked for another try. The owner of the cursor makes it.
    pub is_due: bool,
}

/// A change of a cursor's parked events, made by a [`Step`](crate::engine::Step).
///
/// Exhaustive on purpose: an engine must handle every change, and the compiler shows where a new one is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParkedChange {
    /// Stores this parked event. It replaces one at the same position.
    Keep(Parked),
    /// Removes the parked event at this position.
    Remove(Position),
    /// Removes all parked events of the cursor.
    RemoveAll,
    /// Marks the parked event at this position, or all of them, as due.
    Due(Option<Position>),
}

/// The text of an error with its causes, cut to the stored length.
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

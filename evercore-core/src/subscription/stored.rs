//! Cursors and parked events as the plain values that an engine stores.

use super::cursor::{Cursor, CursorId, CursorStatus, Failure, Parked};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{AggregateId, Position};
use crate::name::{OwnerId, SubscriptionName};
use crate::time::Timestamp;

/// A cursor as numbers and texts. An engine writes the fields of [`From`] a cursor into a row, and makes the cursor from
/// the row again.
///
/// Times are microseconds since 1970, UTC. Exhaustive on purpose: the compiler shows where an engine lacks a new field.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the fields are those of Cursor and Failure")]
pub struct StoredCursor<'a> {
    pub subscription: &'a str,
    pub version: i64,
    pub partition: i64,
    pub partitions: i64,
    pub position: i64,
    pub epoch: i64,
    pub owner: Option<&'a str>,
    pub expires_at: i64,
    pub wanted_by: Option<&'a str>,
    pub wanted_until: i64,
    pub live_from: Option<i64>,
    pub status: i32,
    /// `None`, like the two fields after it, if there is no failure.
    pub failed_position: Option<i64>,
    pub failed_attempts: Option<i64>,
    pub failed_error: Option<&'a str>,
    pub parked_changes: i64,
    pub is_held: bool,
    pub lost_leases: i64,
}

impl<'a> From<&'a Cursor> for StoredCursor<'a> {
    fn from(cursor: &'a Cursor) -> Self {
        let failure = cursor.failure.as_ref();
        Self {
            subscription: cursor.id.subscription.as_str(),
            version: i64::from(cursor.id.version),
            partition: i64::from(cursor.id.partition),
            partitions: i64::from(cursor.partitions),
            position: cursor.position.get(),
            epoch: cursor.epoch,
            owner: cursor.owner.as_ref().map(OwnerId::as_str),
            expires_at: cursor.expires_at.as_micros(),
            wanted_by: cursor.wanted_by.as_ref().map(OwnerId::as_str),
            wanted_until: cursor.wanted_until.as_micros(),
            live_from: cursor.live_from.map(Position::get),
            status: cursor.status.code(),
            failed_position: failure.map(|failure| failure.position.get()),
            failed_attempts: failure.map(|failure| i64::from(failure.attempts)),
            failed_error: failure.map(|failure| failure.error.as_str()),
            parked_changes: cursor.parked_changes,
            is_held: cursor.is_held,
            lost_leases: i64::from(cursor.lost_leases),
        }
    }
}

/// Fails if a value is out of range, or a text is no name: then the store is damaged, or a newer version has written it.
impl TryFrom<StoredCursor<'_>> for Cursor {
    type Error = Error;

    fn try_from(stored: StoredCursor<'_>) -> Result<Self> {
        let failure = match (stored.failed_position, stored.failed_attempts, stored.failed_error) {
            (None, ..) => None,
            (Some(position), attempts, error) => Some(Failure {
                position: Position::new(position)?,
                attempts: small(attempts.unwrap_or(0))?,
                error: error.unwrap_or_default().to_owned(),
            }),
        };
        Ok(Self {
            id: CursorId {
                subscription: SubscriptionName::new(stored.subscription)?,
                version: small(stored.version)?,
                partition: small(stored.partition)?,
            },
            partitions: small(stored.partitions)?,
            position: Position::new(stored.position)?,
            epoch: stored.epoch,
            owner: stored.owner.map(OwnerId::new).transpose()?,
            expires_at: Timestamp::from_micros(stored.expires_at)?,
            wanted_by: stored.wanted_by.map(OwnerId::new).transpose()?,
            wanted_until: Timestamp::from_micros(stored.wanted_until)?,
            live_from: stored.live_from.map(Position::new).transpose()?,
            is_held: stored.is_held,
            status: CursorStatus::from_code(stored.status)?,
            failure,
            parked_changes: stored.parked_changes,
            lost_leases: small(stored.lost_leases)?,
        })
    }
}

/// A parked event as numbers and texts, like [`StoredCursor`].
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the fields are those of Parked")]
pub struct StoredParked<'a> {
    pub position: i64,
    pub aggregate: i64,
    pub holds_back: bool,
    pub attempts: i64,
    pub error: &'a str,
    pub parked_at: i64,
    pub is_due: bool,
}

impl<'a> From<&'a Parked> for StoredParked<'a> {
    fn from(parked: &'a Parked) -> Self {
        Self {
            position: parked.position.get(),
            aggregate: parked.aggregate.get(),
            holds_back: parked.holds_back,
            attempts: i64::from(parked.attempts),
            error: &parked.error,
            parked_at: parked.parked_at.as_micros(),
            is_due: parked.is_due,
        }
    }
}

/// Fails as that of a [`StoredCursor`].
impl TryFrom<StoredParked<'_>> for Parked {
    type Error = Error;

    fn try_from(stored: StoredParked<'_>) -> Result<Self> {
        Ok(Self {
            position: Position::new(stored.position)?,
            aggregate: AggregateId::new(stored.aggregate)?,
            holds_back: stored.holds_back,
            attempts: small(stored.attempts)?,
            error: stored.error.to_owned(),
            parked_at: Timestamp::from_micros(stored.parked_at)?,
            is_due: stored.is_due,
        })
    }
}

fn small(stored: i64) -> Result<u32> {
    let message = || format!("the number {stored} of a stored cursor is out of range");
    u32::try_from(stored).map_err(|_| Error::new(ErrorKind::NotAStore, message()))
}

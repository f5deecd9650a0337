//! Errors, by what the caller can do about them.

use std::error::Error as StdError;
use std::{fmt, io};

use crate::ids::{AggregateId, Position, Sequence};
use crate::name::{AggregateType, EventType};

/// The result of every call of evercore that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any error of user code: of a validation, a decision, a codec.
pub type BoxError = Box<dyn StdError + Send + Sync + 'static>;

/// An error of evercore: a [kind](ErrorKind) to act on, a sentence to read, and often a [source](StdError::source).
///
/// `Display` and `Debug` never show a payload, a natural key or a password. A source comes from other code and may show
/// one: print it only for people who may see the data. `Debug` shows a source that is itself an error of evercore, and the
/// [detail](Self::detail) that an engine took from the error of its driver. It hides any other source.
///
/// ```
/// # use evercore_core::{Error, ErrorKind};
/// let theirs = std::io::Error::other("who paid: ann");
/// let error = Error::new(ErrorKind::Rejected, "the user's SQL in the commit failed").with_source(theirs);
/// let error = error.with_detail("SQLSTATE 42501: permission denied for table outbox");
/// assert_eq!(error.to_string(), "the user's SQL in the commit failed");
/// let shown = format!("{error:?}");
/// assert!(shown.contains("permission denied for table outbox") && !shown.contains("ann"));
/// ```
pub struct Error(Box<Repr>);

struct Repr {
    kind: ErrorKind,
    message: String,
    detail: Option<String>,
    source: Option<BoxError>,
}

/// The kind of an error, by what the caller can do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such aggregate or subscription. Create it, or ask for another.
    NotFound,
    /// The aggregate has another type than the call expects. Load it as its own type.
    #[non_exhaustive]
    WrongType {
        /// The type that the call expects.
        expected: AggregateType,
        /// The type of the aggregate.
        actual: AggregateType,
    },
    /// The natural key belongs to another aggregate of the same type. Choose another key, or load that aggregate.
    #[non_exhaustive]
    KeyTaken {
        /// The type within which the key is taken.
        aggregate_type: AggregateType,
    },
    /// The aggregate is not at the sequence that the unit of work expected. Load again, decide again.
    #[non_exhaustive]
    Conflict {
        /// The aggregate that has changed.
        aggregate: AggregateId,
        /// The sequence on which the decision was based.
        expected: Sequence,
        /// The sequence at which the aggregate is.
        actual: Sequence,
    },
    /// A name or key breaks a rule of [`limits`](crate::limits). Correct the input.
    InvalidName,
    /// A value is out of range or over a limit, or a call does not fit the ones before it. Correct the input or the call.
    Invalid,
    /// The aggregate's `validate` refuses the state after this event. The source is its reason.
    InvalidState,
    /// User code refused or failed: a decision, SQL in a commit, an inline projection, or the handler of a subscription
    /// that stops on failure. The source is its error.
    Rejected,
    /// An event could not be encoded or decoded, or does not fit the state. Correct the type or the data.
    #[non_exhaustive]
    Codec {
        /// The type of the event; `None` if the event could not be encoded.
        event_type: Option<EventType>,
        /// The position of the event; `None` if it is not stored.
        position: Option<Position>,
    },
    /// The command id was used before for another command, with another [word](crate::Command::new) or other aggregates.
    /// Use a new id for a new command.
    CommandReused,
    /// The command id was settled as "never committed" and can never take effect. Use a new id.
    CommandAbandoned,
    /// It is not known whether a write took effect: its answer was lost, or the disk failed during it. Settle it with the
    /// same command id, or read.
    OutcomeUnknown,
    /// The position is past the end of the log: the store has lost its tail, or it is another store. Do not read on.
    #[non_exhaustive]
    CursorAhead {
        /// The position from which the reader wanted to continue.
        cursor: Position,
        /// The end of the log.
        head: Position,
    },
    /// An event that was read is no longer in the log: the log has lost its tail, in a failover or a restore, and other
    /// events may have taken the place of the lost ones. Go back to an earlier position that you trust.
    #[non_exhaustive]
    TailLost {
        /// The position of the event that was read. It is empty now, or has another event.
        position: Position,
    },
    /// The cursor was claimed by another owner or reset. That owner may handle the same events again. Stop; claim the
    /// cursor again if you want it back.
    LeaseLost,
    /// Another owner holds the lease of the cursor, or the cursor rests after a failure. Wait, or leave it to that owner.
    AlreadyOwned,
    /// The subscription is paused. Resume it.
    Paused,
    /// A newer version of the subscription has taken over. Stop.
    Superseded,
    /// The store could not be reached or was too busy, and nothing was written. Try again.
    Unavailable,
    /// The store was opened read-only, or its file or server does not allow writes.
    ReadOnly,
    /// The disk is full, and nothing was written. Make space.
    Full,
    /// Not a store of evercore, or damaged. Restore a backup, or open another.
    NotAStore,
    /// The store's schema is newer than this library. Use a newer evercore.
    #[non_exhaustive]
    SchemaTooNew {
        /// The schema version found.
        found: u32,
        /// The newest schema version that this library knows.
        known: u32,
    },
    /// The engine is closed, or closed itself after a failed flush. Open it again.
    Closed,
    /// Any other failure of the engine. The source tells more.
    Backend,
}

impl Error {
    /// An error of this kind with this message: lower case, no full stop, the wrong thing in quotes.
    ///
    /// For engines and codecs; `message` must not show a payload, a natural key or a password.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Repr { kind, message: message.into(), detail: None, source: None }))
    }

    /// The same error with its cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The same error with the part of its source that may be shown to everybody.
    ///
    /// For engines; `detail` must not show a payload, a natural key or a password.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// The same error with its cause, and with a [detail](Self::detail): the part of the cause that may be shown to
    /// everybody.
    ///
    /// For engines. `told` gets the cause, then the cause of the cause, and so on, until it returns a detail. The detail must
    /// not show a payload, a natural key or a password. The detail of an error of the operating system is the text of its
    /// code.
    #[must_use]
    pub fn with_cause(
        self,
        cause: impl Into<BoxError>,
        told: impl Fn(&(dyn StdError + 'static)) -> Option<String>,
    ) -> Self {
        let cause = cause.into();
        let (mut detail, mut next) = (None, Some(&*cause as &(dyn StdError + 'static)));
        while let (None, Some(cause)) = (&detail, next) {
            detail = told(cause).or_else(|| cause.downcast_ref().map(told_by_system));
            next = cause.source();
        }
        let error = self.with_source(cause);
        detail.into_iter().fold(error, Self::with_detail)
    }

    /// A copy without the source, for another of several callers that share this error.
    #[must_use]
    pub fn again(&self) -> Self {
        let Repr { kind, message, detail, .. } = &*self.0;
        Self(Box::new(Repr {
            kind: kind.clone(),
            message: message.clone(),
            detail: detail.clone(),
            source: None,
        }))
    }

    /// The aggregate is not at the sequence that was expected.
    pub fn conflict(aggregate: AggregateId, expected: Sequence, actual: Sequence) -> Self {
        let message = format!("aggregate {aggregate} is at sequence {actual}, expected {expected}");
        Self::new(ErrorKind::Conflict { aggregate, expected, actual }, message)
    }

    /// The aggregate is at the expected sequence, but its last event is not the one that was read.
    pub fn other_event(aggregate: AggregateId, sequence: Sequence) -> Self {
        let message = format!(
            "event {sequence} of aggregate {aggregate} is not the one that was read: the log has lost its tail; load again"
        );
        Self::new(ErrorKind::Conflict { aggregate, expected: sequence, actual: sequence }, message)
    }

    /// The natural key belongs to another aggregate of that type.
    pub fn key_taken(aggregate_type: AggregateType) -> Self {
        let message = format!("the natural key belongs to another \"{aggregate_type}\"");
        Self::new(ErrorKind::KeyTaken { aggregate_type }, message)
    }

    /// The id of a new aggregate is in use.
    pub fn id_in_use(aggregate: AggregateId) -> Self {
        Self::invalid(format!("aggregate {aggregate} exists already"))
    }

    /// There is no aggregate with that id.
    pub fn not_found(aggregate: AggregateId) -> Self {
        Self::new(ErrorKind::NotFound, format!("there is no aggregate {aggregate}"))
    }

    /// There is no aggregate of that type with that natural key.
    pub fn key_not_found(aggregate_type: &AggregateType) -> Self {
        Self::new(ErrorKind::NotFound, format!("there is no \"{aggregate_type}\" with that natural key"))
    }

    /// The aggregate has another type than the call expects.
    pub fn wrong_type(aggregate: AggregateId, expected: AggregateType, actual: AggregateType) -> Self {
        let message = format!("aggregate {aggregate} is of type \"{actual}\", not \"{expected}\"");
        Self::new(ErrorKind::WrongType { expected, actual }, message)
    }

    /// The cursor is past the end of the log.
    pub fn cursor_ahead(cursor: Position, head: Position) -> Self {
        let message = format!("cursor {cursor} is ahead of the log, which ends at {head}");
        Self::new(ErrorKind::CursorAhead { cursor, head }, message)
    }

    /// The event at this position is not the one that was read.
    pub fn tail_lost(position: Position) -> Self {
        let message = format!(
            "the event that was read at position {position} is gone: the log has lost its tail; go back to an earlier position"
        );
        Self::new(ErrorKind::TailLost { position }, message)
    }

    /// The command id was used before for another command.
    pub fn command_reused() -> Self {
        let message =
            "the command id took effect before, for another request or other aggregates; use a new id";
        Self::new(ErrorKind::CommandReused, message)
    }

    /// The command id was settled as "never committed".
    pub fn command_abandoned() -> Self {
        let message = "the command id was settled as never committed; use a new id";
        Self::new(ErrorKind::CommandAbandoned, message)
    }

    /// The engine is closed.
    pub fn closed() -> Self {
        Self::new(ErrorKind::Closed, "the engine is closed, open a new one")
    }

    /// The engine was opened for reading only.
    pub fn read_only() -> Self {
        Self::new(ErrorKind::ReadOnly, "the engine was opened for reading only")
    }

    /// It is not known whether a write took effect. `what` names it, for instance "the commit".
    pub fn outcome_unknown(what: &str) -> Self {
        Self::new(ErrorKind::OutcomeUnknown, format!("whether {what} took effect is not known"))
    }

    /// The store's schema is newer than this library.
    pub fn schema_too_new(found: u32, known: u32) -> Self {
        let message = format!("the store has schema version {found}, this library knows up to {known}");
        Self::new(ErrorKind::SchemaTooNew { found, known }, message)
    }

    /// A value is out of range or over a limit.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// A refusal by user code, for work that runs in [`EventStore::retry`](crate::EventStore::retry). It is not tried
    /// again, and comes back as the source of a [`Rejected`](ErrorKind::Rejected).
    pub fn rejected(source: impl Into<BoxError>) -> Self {
        Self::new(ErrorKind::Rejected, "the decision refused").with_source(source)
    }

    pub(crate) fn invalid_state(aggregate: AggregateId, event_type: &EventType, source: BoxError) -> Self {
        let message = format!("event \"{event_type}\" would leave aggregate {aggregate} in an invalid state");
        Self::new(ErrorKind::InvalidState, message).with_source(source)
    }

    /// Another unit made the aggregate that this unit found missing and wanted to make.
    pub(crate) fn raced(aggregate: AggregateId) -> Self {
        let kind = ErrorKind::Conflict { aggregate, expected: Sequence::ZERO, actual: Sequence::ZERO };
        Self::new(kind, "another unit of work made the aggregate with that natural key first")
    }

    pub(crate) fn invalid_name(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidName, message)
    }

    /// A new event could not be encoded.
    pub(crate) fn not_encoded(aggregate_type: &AggregateType, source: BoxError) -> Self {
        let kind = ErrorKind::Codec { event_type: None, position: None };
        let message = format!("an event of \"{aggregate_type}\" was not recorded: its codec cannot write it");
        Self::new(kind, message).with_source(source)
    }

    /// A new event does not survive encoding and decoding.
    pub(crate) fn not_read_back(event_type: EventType, source: BoxError) -> Self {
        let message =
            format!("event \"{event_type}\" was not recorded: it does not survive encoding and decoding");
        Self::new(ErrorKind::Codec { event_type: Some(event_type), position: None }, message)
            .with_source(source)
    }

    /// A recorded event cannot be decoded.
    pub(crate) fn not_decoded(event_type: &EventType, position: Option<Position>, source: BoxError) -> Self {
        Self::codec(event_type, position, "cannot be decoded", source)
    }

    /// The aggregate refuses a decoded event.
    pub(crate) fn misfit(event_type: &EventType, position: Option<Position>, source: BoxError) -> Self {
        Self::codec(event_type, position, "does not fit the state of its aggregate", source)
    }

    fn codec(event_type: &EventType, position: Option<Position>, what: &str, source: BoxError) -> Self {
        let place = position.map_or_else(String::new, |position| format!(" at position {position}"));
        let message = format!("event \"{event_type}\"{place} {what}");
        let kind = ErrorKind::Codec { event_type: Some(event_type.clone()), position };
        Self::new(kind, message).with_source(source)
    }

    /// The part of the source that may be shown to everybody. For an error of a database: its code, the names of table and
    /// constraint, and its message if that shows no value.
    pub fn detail(&self) -> Option<&str> {
        self.0.detail.as_deref()
    }

    /// The kind, by what the caller can do.
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// Whether another writer was faster. With the new state the same decision may succeed.
    pub fn is_conflict(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Conflict { .. })
    }

    /// Whether another attempt may succeed: after a conflict with the new state, after `Unavailable` unchanged.
    pub fn is_retryable(&self) -> bool {
        self.is_conflict() || matches!(self.0.kind, ErrorKind::Unavailable)
    }

    /// The source as an error of type `E`, for instance the refusal of a decision or of a validation.
    ///
    /// ```
    /// # use evercore_core::Error;
    /// #[derive(Debug, PartialEq)]
    /// struct TooLate;
    /// # impl std::fmt::Display for TooLate { fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str("too late") } }
    /// # impl std::error::Error for TooLate {}
    /// let error = Error::rejected(TooLate);
    /// assert_eq!(error.cause::<TooLate>(), Some(&TooLate));
    /// ```
    pub fn cause<E: StdError + 'static>(&self) -> Option<&E> {
        self.0.source.as_deref().and_then(|source| source.downcast_ref())
    }
}

/// The text of an error of the operating system, without the name of a file.
fn told_by_system(error: &io::Error) -> String {
    let code = error.raw_os_error().map(io::Error::from_raw_os_error);
    code.map_or_else(|| error.kind().to_string(), |error| error.to_string())
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Error");
        shown.field("kind", &self.0.kind).field("message", &self.0.message);
        if let Some(detail) = &self.0.detail {
            shown.field("detail", detail);
        }
        match self.0.source.as_deref().map(|source| source.downcast_ref::<Self>()) {
            None => shown.finish(),
            Some(Some(ours)) => shown.field("source", ours).finish(),
            Some(None) => {
                shown.field("source", &format_args!("hidden, it may show data: ask `source`")).finish()
            }
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

//! What can go wrong, named by what the caller can do about it.

use std::error::Error as StdError;
use std::{fmt, io};

use crate::ids::{AggregateId, Position, Sequence};
use crate::name::{AggregateType, EventType};

/// The result of everything in evercore that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any error, as user code hands it in: from a validation, a decision, a codec.
pub type BoxError = Box<dyn StdError + Send + Sync + 'static>;

/// An error of evercore: a [kind](ErrorKind) to act on, a sentence to read, and often a [source](StdError::source).
///
/// `Display` and `Debug` never show a payload, a natural key or a password. A source is somebody else's error and
/// may: show it to those who may see the data. `Debug` shows a source that is itself an error of evercore, and the
/// [detail](Self::detail) that an engine has taken from its driver's error; any other source it calls hidden.
///
/// ```
/// # use evercore_core::{Error, ErrorKind};
/// let theirs = std::io::Error::other("who paid: ann");
/// let error = Error::new(ErrorKind::Rejected, "the SQL beside the commit said no").with_source(theirs);
/// let error = error.with_detail("SQLSTATE 42501: permission denied for table outbox");
/// assert_eq!(error.to_string(), "the SQL beside the commit said no");
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

/// What went wrong, by what the caller can do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such aggregate. Create it, or ask for another.
    NotFound,
    /// The aggregate exists but is of another type than asked for. Load it as what it is.
    #[non_exhaustive]
    WrongType {
        /// What was asked for.
        expected: AggregateType,
        /// What it is.
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
        /// The aggregate that is elsewhere.
        aggregate: AggregateId,
        /// The sequence on which the decision was based.
        expected: Sequence,
        /// The sequence at which the aggregate is.
        actual: Sequence,
    },
    /// A name or key breaks a rule of [`limits`](crate::limits). Mend the input.
    InvalidName,
    /// A value is out of range or over a limit. Mend the input.
    Invalid,
    /// The event would bring the aggregate into a state that its `validate` refuses. The source tells why.
    InvalidState,
    /// The user's own decision said no, or SQL of the user's own in a commit, an inline projection, or the handler of a
    /// subscription whose policy is to stop. The source is its error.
    Rejected,
    /// An event could not be encoded or decoded, or does not fit the state. Mend the type, or the data.
    #[non_exhaustive]
    Codec {
        /// The type of the event, as stored; `None` if the event could not be encoded and so has none.
        event_type: Option<EventType>,
        /// Where the event lies in the log; `None` if it is not stored.
        position: Option<Position>,
    },
    /// The command id took effect before, for something else: another [word](crate::Command::new) or other aggregates.
    /// Use a new id for a new command.
    CommandReused,
    /// The outcome of the command id was settled as "never committed"; it can take effect no more. Use a new id.
    CommandAbandoned,
    /// Whether the commit took effect is not known. Settle it with the same command id, or look.
    OutcomeUnknown,
    /// The cursor lies behind the end of the log: this store lost its tail or is another one. Do not read on.
    #[non_exhaustive]
    CursorAhead {
        /// Where the reader wanted to go on.
        cursor: Position,
        /// Where the log ends.
        head: Position,
    },
    /// What was read of the log is not in it any more: the log has lost its tail since, in a failover or a restore, and
    /// other events may have come in its place. Go back to where you were before, and read on from there.
    #[non_exhaustive]
    TailLost {
        /// The event that was read and is gone, or is another one now.
        position: Position,
    },
    /// The cursor belongs to another owner, or was reset: what was done with it since may be done again by that owner.
    /// Stop; claim it again if you want it back.
    LeaseLost,
    /// Another owner holds the lease of the cursor, or it rests after a failure. Wait, or leave it to that owner.
    AlreadyOwned,
    /// The subscription is paused. Resume it.
    Paused,
    /// A newer version of the subscription has taken over. Stop.
    Superseded,
    /// The store could not be reached or was too busy, and nothing was written. Try again.
    Unavailable,
    /// The store was opened read-only, or its file or server allows no writing.
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
    /// Anything else the engine met. The source tells more.
    Backend,
}

impl Error {
    /// An error of this kind with this sentence: lower case, no full stop, the thing that is wrong in quotes.
    ///
    /// For engines and codecs; `message` must not show a payload, a natural key or a password.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Repr { kind, message: message.into(), detail: None, source: None }))
    }

    /// The same error, with what caused it.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The same error, with what its source says, as far as everybody may read it.
    ///
    /// For engines; `detail` must not show a payload, a natural key or a password.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// The same error, with its cause, and as [detail](Self::detail) the words of the cause that everybody may read.
    ///
    /// For engines. `told` gets the cause, then the cause of the cause, and so on, until it returns these words. They must
    /// not show a payload, a natural key or a password. For an error of the operating system, its code tells them.
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

    /// The same error once more, without its source: for the next of several callers who share it.
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

    /// The aggregate is at the sequence that was expected, by another event than the one that was read.
    pub fn other_event(aggregate: AggregateId, sequence: Sequence) -> Self {
        let message = format!(
            "event {sequence} of aggregate {aggregate} is not the one that was read: the log has lost its tail since"
        );
        Self::new(ErrorKind::Conflict { aggregate, expected: sequence, actual: sequence }, message)
    }

    /// The natural key belongs to another aggregate of that type.
    pub fn key_taken(aggregate_type: AggregateType) -> Self {
        let message = format!("the natural key belongs to another \"{aggregate_type}\"");
        Self::new(ErrorKind::KeyTaken { aggregate_type }, message)
    }

    /// A batch creates an aggregate with an id that another aggregate has.
    pub fn id_in_use(aggregate: AggregateId) -> Self {
        Self::invalid(format!("aggregate {aggregate} exists already"))
    }

    /// There is no aggregate with that id.
    pub fn not_found(aggregate: AggregateId) -> Self {
        Self::new(ErrorKind::NotFound, format!("there is no aggregate {aggregate}"))
    }

    /// There is no aggregate of that type with the natural key asked for.
    pub fn key_not_found(aggregate_type: &AggregateType) -> Self {
        Self::new(ErrorKind::NotFound, format!("there is no \"{aggregate_type}\" with that natural key"))
    }

    /// The aggregate is of another type than asked for.
    pub fn wrong_type(aggregate: AggregateId, expected: AggregateType, actual: AggregateType) -> Self {
        let message = format!("aggregate {aggregate} is of type \"{actual}\", not \"{expected}\"");
        Self::new(ErrorKind::WrongType { expected, actual }, message)
    }

    /// The cursor lies behind the end of the log.
    pub fn cursor_ahead(cursor: Position, head: Position) -> Self {
        let message = format!("cursor {cursor} is ahead of the log, which ends at {head}");
        Self::new(ErrorKind::CursorAhead { cursor, head }, message)
    }

    /// The event at this position is not the one that was read.
    pub fn tail_lost(position: Position) -> Self {
        let message = format!(
            "the event that was read at position {position} is gone: the log has lost its tail since, read on from before"
        );
        Self::new(ErrorKind::TailLost { position }, message)
    }

    /// The command id took effect before, for something else.
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

    /// The answer to a write was lost. `what` names it, for instance "the commit".
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

    /// The user's own refusal, for work that runs in [`EventStore::retry`](crate::EventStore::retry): it is not tried
    /// again and comes back as the source of a [`Rejected`](ErrorKind::Rejected).
    pub fn rejected(source: impl Into<BoxError>) -> Self {
        Self::new(ErrorKind::Rejected, "the decision said no").with_source(source)
    }

    pub(crate) fn invalid_state(aggregate: AggregateId, event_type: &EventType, source: BoxError) -> Self {
        let message = format!("event \"{event_type}\" would leave aggregate {aggregate} in an invalid state");
        Self::new(ErrorKind::InvalidState, message).with_source(source)
    }

    /// Somebody else made the aggregate that this unit found missing and wanted to make.
    pub(crate) fn raced(aggregate: AggregateId) -> Self {
        let kind = ErrorKind::Conflict { aggregate, expected: Sequence::ZERO, actual: Sequence::ZERO };
        Self::new(kind, "another unit of work made the aggregate with that natural key first")
    }

    pub(crate) fn invalid_name(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidName, message)
    }

    /// An event that was to be recorded could not be encoded.
    pub(crate) fn not_encoded(aggregate_type: &AggregateType, source: BoxError) -> Self {
        let kind = ErrorKind::Codec { event_type: None, position: None };
        let message = format!("an event of \"{aggregate_type}\" was not recorded: its codec cannot write it");
        Self::new(kind, message).with_source(source)
    }

    /// An event that was to be recorded would be lost or changed once it is read.
    pub(crate) fn not_read_back(event_type: EventType, source: BoxError) -> Self {
        let message = format!(
            "event \"{event_type}\" was not recorded: its codec does not read back what it has written"
        );
        Self::new(ErrorKind::Codec { event_type: Some(event_type), position: None }, message)
            .with_source(source)
    }

    /// A recorded event does not decode.
    pub(crate) fn not_decoded(event_type: &EventType, position: Option<Position>, source: BoxError) -> Self {
        Self::codec(event_type, position, "cannot be decoded", source)
    }

    /// An event decodes, but the state does not take it.
    pub(crate) fn misfit(event_type: &EventType, position: Option<Position>, source: BoxError) -> Self {
        Self::codec(event_type, position, "does not fit the state of its aggregate", source)
    }

    fn codec(event_type: &EventType, position: Option<Position>, what: &str, source: BoxError) -> Self {
        let place = position.map_or_else(String::new, |position| format!(" at position {position}"));
        let message = format!("event \"{event_type}\"{place} {what}");
        let kind = ErrorKind::Codec { event_type: Some(event_type.clone()), position };
        Self::new(kind, message).with_source(source)
    }

    /// What the source says, as far as everybody may read it: of a database's error its code, the names of table and
    /// constraint, and its message where that shows no value.
    pub fn detail(&self) -> Option<&str> {
        self.0.detail.as_deref()
    }

    /// What went wrong, by what the caller can do.
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// Whether somebody else was faster: on fresh state the same decision may succeed.
    pub fn is_conflict(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Conflict { .. })
    }

    /// Whether trying again may help: after a conflict on fresh state, after "unavailable" as it is.
    pub fn is_retryable(&self) -> bool {
        self.is_conflict() || matches!(self.0.kind, ErrorKind::Unavailable)
    }

    /// The user's own error of type `E`, if a decision or a validation raised this one.
    ///
    /// ```
    /// # use evercore_core::{Error, ErrorKind};
    /// #[derive(Debug, PartialEq)]
    /// struct TooLate;
    /// # impl std::fmt::Display for TooLate { fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str("too late") } }
    /// # impl std::error::Error for TooLate {}
    /// let error = Error::new(ErrorKind::Rejected, "the decision said no").with_source(TooLate);
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

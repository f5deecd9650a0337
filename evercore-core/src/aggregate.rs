//! What a user writes: the aggregate, and how its events and its state become bytes.

use std::borrow::Cow;

use crate::error::{BoxError, Result};
use crate::name::AggregateType;

/// An aggregate: a state that changes by events, and by nothing else.
///
/// ```
/// use evercore_core::{Aggregate, BoxError, Json};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Debug, Default, Serialize, Deserialize)]
/// struct User { email: String, is_active: bool }
///
/// #[derive(Debug, Serialize, Deserialize)]
/// enum UserEvent {
///     Registered { email: String },
///     Deactivated,
/// }
///
/// impl Aggregate for User {
///     const TYPE: &'static str = "user";
///     type Event = UserEvent;
///     type Codec = Json;
///
///     fn apply(&mut self, event: UserEvent) {
///         match event {
///             UserEvent::Registered { email } => *self = User { email, is_active: true },
///             UserEvent::Deactivated => self.is_active = false,
///         }
///     }
///
///     fn validate(&self) -> Result<(), BoxError> {
///         if self.email.contains('@') { Ok(()) } else { Err("an e-mail address has an @".into()) }
///     }
/// }
/// ```
pub trait Aggregate: Default + Clone + Send + Sync + 'static {
    /// The name of the type, as it is stored; see [`AggregateType`](crate::AggregateType) for what a name may be.
    const TYPE: &'static str;

    /// After how many events the state is kept as a snapshot; 0, the default: never.
    const SNAPSHOT_EVERY: u32 = 0;

    /// The version of the state's shape. Raise it whenever the state changes its shape or its meaning: snapshots of
    /// another version are not read, the events are.
    const SNAPSHOT_VERSION: u32 = 1;

    /// What can happen to it; most often an enum.
    type Event: Send + Sync + 'static;

    /// How events and state become bytes; most often [`Json`](crate::Json).
    type Codec: EventCodec<Self::Event> + StateCodec<Self>;

    /// Changes the state by what has happened. It is history: it cannot be refused.
    fn apply(&mut self, event: Self::Event);

    /// Refuses a state that must not be. Asked after each newly recorded event, never when history is replayed.
    ///
    /// # Errors
    /// Any error or sentence; it comes back as the source of [`InvalidState`](crate::ErrorKind::InvalidState).
    fn validate(&self) -> Result<(), BoxError> {
        Ok(())
    }

    /// As [`apply`](Self::apply), for states that an event may not fit. Called wherever `apply` would be.
    ///
    /// # Errors
    /// If the event does not fit; the default never fails.
    #[doc(hidden)]
    fn try_apply(&mut self, event: Self::Event) -> Result<(), BoxError> {
        self.apply(event);
        Ok(())
    }
}

/// An event as bytes, under the name by which it is stored.
#[derive(Clone, PartialEq, Eq)]
#[expect(missing_debug_implementations, reason = "it is all content, and content is not shown")]
pub struct Encoded {
    /// The name of the event type.
    pub event_type: Cow<'static, str>,
    /// The content.
    pub payload: Vec<u8>,
}

/// How the events of one aggregate become bytes and come back. [`Json`](crate::Json) serves most; encryption,
/// protobuf, CBOR are others. Without state: what a codec needs, such as keys, it finds by itself.
pub trait EventCodec<E> {
    /// The event as bytes.
    ///
    /// # Errors
    /// Any; it comes back as the source of [`Codec`](crate::ErrorKind::Codec).
    fn encode(event: &E) -> Result<Encoded, BoxError>;

    /// The event from bytes, by the name under which it was stored.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    fn decode(event_type: &str, payload: &[u8]) -> Result<E, BoxError>;

    /// The names of all event types there are, as far as the codec knows: what a warm-up registers.
    fn event_types() -> &'static [&'static str];
}

/// How the state of an aggregate becomes the bytes of a snapshot and comes back.
pub trait StateCodec<S> {
    /// The state as bytes.
    ///
    /// # Errors
    /// Any; it comes back as the source of [`Codec`](crate::ErrorKind::Codec).
    fn encode_state(state: &S) -> Result<Vec<u8>, BoxError>;

    /// The state from bytes.
    ///
    /// # Errors
    /// Any; the snapshot is then ignored, counted, and the events are replayed.
    fn decode_state(bytes: &[u8]) -> Result<S, BoxError>;
}

/// The name of this type, checked.
pub(crate) fn aggregate_type<T: Aggregate>() -> Result<AggregateType> {
    AggregateType::from_static(T::TYPE)
}

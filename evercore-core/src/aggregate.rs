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

    /// Whether events and snapshots are written without reading them back first; `false`, the default: they are read.
    ///
    /// By default `record` decodes what the codec has written, refuses an event that does not come back, and applies
    /// the decoded event. So the state in hand is the state that a load will find. That costs a decoding and a second
    /// encoding per event. Set this to `true` only if you have measured that cost and tests show that every event and
    /// state comes back: an event that cannot be decoded makes its aggregate unreadable.
    const TRUSTS_CODEC: bool = false;

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
///
/// A codec that wraps another one passes each method on. A codec that does not always write the same bytes, for instance
/// since it encrypts with a nonce, writes [`read_back`](Self::read_back) itself:
///
/// ```
/// use evercore_core::{BoxError, Encoded, EventCodec, Json};
/// # fn seal(plain: Vec<u8>) -> Vec<u8> { plain }
/// # fn open(sealed: &[u8]) -> Result<Vec<u8>, BoxError> { Ok(sealed.to_vec()) }
///
/// struct Sealed;
///
/// impl<E> EventCodec<E> for Sealed
/// where
///     Json: EventCodec<E>,
/// {
///     fn encode(event: &E) -> Result<Encoded, BoxError> {
///         let encoded = Json::encode(event)?;
///         Ok(Encoded { payload: seal(encoded.payload), ..encoded })
///     }
///
///     fn decode(event_type: &str, payload: &[u8]) -> Result<E, BoxError> {
///         Json::decode(event_type, &open(payload)?)
///     }
///
///     fn read_back(encoded: &Encoded) -> Result<E, BoxError> {
///         let payload = open(&encoded.payload)?;
///         Json::read_back(&Encoded { event_type: encoded.event_type.clone(), payload })
///     }
///
///     fn event_types() -> Vec<&'static str> {
///         <Json as EventCodec<E>>::event_types()
///     }
/// }
/// ```
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

    /// Decodes what [`encode`](Self::encode) has just written, and refuses it if the decoded event is written in another
    /// way. `record` calls this, stages `encoded`, and applies what comes back.
    ///
    /// By default the bytes must be the same. A codec for which different bytes can say the same compares what they say.
    ///
    /// # Errors
    /// Any; it comes back as the source of [`Codec`](crate::ErrorKind::Codec), and the event is not recorded.
    fn read_back(encoded: &Encoded) -> Result<E, BoxError> {
        let event = Self::decode(&encoded.event_type, &encoded.payload)?;
        if Self::encode(&event)? == *encoded { Ok(event) } else { Err(COMES_BACK_CHANGED.into()) }
    }

    /// The names under which events are written, as far as the codec knows them: what a warm-up registers. A name that
    /// is only read, such as an alias, is not one of them.
    fn event_types() -> Vec<&'static str>;
}

/// Said of an event or state that is written in another way once it was read.
pub(crate) const COMES_BACK_CHANGED: &str = "what was written is read as another value";

/// How the state of an aggregate becomes the bytes of a snapshot and comes back.
pub trait StateCodec<S> {
    /// The state as bytes.
    ///
    /// # Errors
    /// Any; no snapshot is then kept, which is counted, and the unit of work goes on.
    fn encode_state(state: &S) -> Result<Vec<u8>, BoxError>;

    /// The state from bytes.
    ///
    /// # Errors
    /// Any; the snapshot is then ignored, counted, and the events are replayed.
    fn decode_state(bytes: &[u8]) -> Result<S, BoxError>;

    /// Decodes what [`encode_state`](Self::encode_state) has just written, and refuses it if the decoded state is
    /// written in another way. Called before a snapshot is staged.
    ///
    /// By default the bytes must be the same, as with [`EventCodec::read_back`].
    ///
    /// # Errors
    /// As [`encode_state`](Self::encode_state).
    fn read_back_state(bytes: &[u8]) -> Result<S, BoxError> {
        let state = Self::decode_state(bytes)?;
        if Self::encode_state(&state)? == bytes { Ok(state) } else { Err(COMES_BACK_CHANGED.into()) }
    }
}

/// The name of this type, checked.
pub(crate) fn aggregate_type<T: Aggregate>() -> Result<AggregateType> {
    AggregateType::from_static(T::TYPE)
}

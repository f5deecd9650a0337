//! The traits that users implement: aggregates, and codecs for events and states.

use std::borrow::Cow;
use std::marker::PhantomData;

use crate::context::EventContext;
use crate::error::{BoxError, Result};
use crate::name::AggregateType;

/// An aggregate: a state that only events change.
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
    /// The stored name of the type. [`AggregateType`](crate::AggregateType) has the rules for names.
    const TYPE: &'static str;

    /// After how many events a snapshot of the state is kept. The default is 0: never.
    const SNAPSHOT_EVERY: u32 = 0;

    /// The version of the state's type. Raise it whenever its fields or their meaning change: snapshots of another
    /// version are ignored, and the events are replayed.
    const SNAPSHOT_VERSION: u32 = 1;

    /// Whether events and snapshots are written without reading them back first. The default, `false`, reads
    /// them back.
    ///
    /// By default `record` decodes the encoded event, refuses it if the result differs, and applies the decoded event.
    /// So the state in memory is the same as after a load. That costs a decoding and a second encoding per event. Set
    /// this to `true` only if you have measured that cost, and tests show that every event and state can be decoded: an
    /// event that cannot be decoded makes its aggregate unreadable.
    const TRUSTS_CODEC: bool = false;

    /// The events of the aggregate, usually an enum.
    type Event: Send + Sync + 'static;

    /// Encodes events and the state, usually [`Json`](crate::Json). A state without snapshots needs no serde: see
    /// [`EventsOnly`].
    type Codec: EventCodec<Self::Event> + StateCodec<Self>;

    /// Changes the state. The event has already happened, so it cannot be refused.
    fn apply(&mut self, event: Self::Event);

    /// As [`apply`](Self::apply), for a state that also depends on the event's time or metadata, or that an event may
    /// not fit. A store always calls this method to apply an event; by default it calls `apply`.
    ///
    /// The context is the same when the event is recorded and when it is replayed.
    ///
    /// ```
    /// use evercore_core::{Aggregate, BoxError, EventContext, Json, Timestamp};
    /// use serde::{Deserialize, Serialize};
    ///
    /// #[derive(Clone, Default, Serialize, Deserialize)]
    /// struct Login { count: u32, last_micros: i64, last_by: Option<String> }
    ///
    /// #[derive(Serialize, Deserialize)]
    /// enum LoginEvent { LoggedIn, PasswordChanged }
    ///
    /// impl Aggregate for Login {
    ///     const TYPE: &'static str = "login";
    ///     type Event = LoginEvent;
    ///     type Codec = Json;
    ///
    ///     fn apply(&mut self, event: LoginEvent) {
    ///         match event {
    ///             LoginEvent::LoggedIn => self.count += 1,
    ///             LoginEvent::PasswordChanged => self.count = 0,
    ///         }
    ///     }
    ///
    ///     fn apply_with(&mut self, event: LoginEvent, context: &EventContext<'_>) -> Result<(), BoxError> {
    ///         if matches!(event, LoginEvent::LoggedIn) {
    ///             self.last_micros = context.time().as_micros();
    ///             self.last_by = context.reference().map(str::to_owned);
    ///         }
    ///         self.apply(event);
    ///         Ok(())
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    /// If the event does not fit the state. When the event is recorded, the error refuses it
    /// ([`Codec`](crate::ErrorKind::Codec)). When it is replayed, the aggregate cannot be loaded: refuse no event that
    /// an earlier version of the program has recorded.
    fn apply_with(&mut self, event: Self::Event, context: &EventContext<'_>) -> Result<(), BoxError> {
        let _ = context;
        self.apply(event);
        Ok(())
    }

    /// Refuses a state that is not allowed. Called after each newly recorded event, and never during a replay.
    ///
    /// # Errors
    /// Any error or text. It becomes the source of [`InvalidState`](crate::ErrorKind::InvalidState).
    fn validate(&self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// An encoded event, with the name of its type.
#[derive(Clone, PartialEq, Eq)]
#[expect(missing_debug_implementations, reason = "it is all content, and content is not shown")]
pub struct Encoded {
    /// The name of the event type.
    pub event_type: Cow<'static, str>,
    /// The content.
    pub payload: Vec<u8>,
}

/// Encodes and decodes the events of an aggregate. [`Json`](crate::Json) is enough for most. Others can use encryption,
/// protobuf or CBOR. A codec has no state, so it must find its keys by itself.
///
/// A codec that wraps another one passes each method on. A codec that does not always write the same bytes, for example
/// because it encrypts with a nonce, implements [`read_back`](Self::read_back) itself:
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
    /// Encodes an event.
    ///
    /// # Errors
    /// Any. It becomes the source of [`Codec`](crate::ErrorKind::Codec).
    fn encode(event: &E) -> Result<Encoded, BoxError>;

    /// Decodes an event from its stored name and bytes.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    fn decode(event_type: &str, payload: &[u8]) -> Result<E, BoxError>;

    /// Decodes the result of [`encode`](Self::encode), and refuses it if the decoded event is encoded differently.
    /// `record` calls this, stages `encoded`, and applies the decoded event.
    ///
    /// By default the bytes must be the same. A codec that can write the same event as different bytes must compare
    /// the decoded contents.
    ///
    /// # Errors
    /// Any. It becomes the source of [`Codec`](crate::ErrorKind::Codec), and the event is not recorded.
    fn read_back(encoded: &Encoded) -> Result<E, BoxError> {
        let event = Self::decode(&encoded.event_type, &encoded.payload)?;
        if Self::encode(&event)? == *encoded { Ok(event) } else { Err(COMES_BACK_CHANGED.into()) }
    }

    /// The names of event types that a warm-up registers: those that the codec knows and writes. A name that is only
    /// read, such as an alias, is not one of them.
    fn event_types() -> Vec<&'static str>;
}

/// The error for an event or state that is encoded differently after it was decoded.
pub(crate) const COMES_BACK_CHANGED: &str = "encoding and decoding it gives a different value";

/// Encodes and decodes the states of an aggregate for snapshots.
pub trait StateCodec<S> {
    /// Whether there is a codec for states. Without one, an aggregate with snapshots does not compile.
    const KEEPS_STATES: bool = true;

    /// Encodes a state.
    ///
    /// # Errors
    /// Any. Then no snapshot is kept, which is counted, and the unit of work continues.
    fn encode_state(state: &S) -> Result<Vec<u8>, BoxError>;

    /// Decodes a state.
    ///
    /// # Errors
    /// Any. Then the snapshot is ignored, which is counted, and the events are replayed.
    fn decode_state(bytes: &[u8]) -> Result<S, BoxError>;

    /// Decodes the result of [`encode_state`](Self::encode_state), and refuses it if the decoded state is encoded
    /// differently. Called before a snapshot is staged.
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

/// The codec `C` for events, and no codec for the state. For an aggregate without snapshots.
///
/// ```
/// use std::collections::HashMap;
/// use std::time::Instant;
///
/// use evercore_core::{Aggregate, EventsOnly, Json};
/// use serde::{Deserialize, Serialize};
///
/// /// JSON has no such keys, and serde has no such values.
/// #[derive(Clone, Default)]
/// struct Grid { cells: HashMap<(u8, u8), Instant> }
///
/// #[derive(Serialize, Deserialize)]
/// enum GridEvent { Cleared }
///
/// impl Aggregate for Grid {
///     const TYPE: &'static str = "grid";
///     type Event = GridEvent;
///     type Codec = EventsOnly<Json>;
///
///     fn apply(&mut self, GridEvent::Cleared: GridEvent) { self.cells.clear() }
/// }
/// ```
///
/// With `SNAPSHOT_EVERY` the program does not compile:
///
/// ```compile_fail
/// # use evercore_core::{Aggregate, EventsOnly, Json, Loaded, Result, UnitOfWork};
/// # #[derive(Clone, Default)] struct Grid;
/// # #[derive(serde::Serialize, serde::Deserialize)] enum GridEvent { Cleared }
/// impl Aggregate for Grid {
///     const TYPE: &'static str = "grid";
///     const SNAPSHOT_EVERY: u32 = 100;
///     type Event = GridEvent;
///     type Codec = EventsOnly<Json>;
/// #    fn apply(&mut self, _: GridEvent) {}
/// }
/// # let _: fn(&mut UnitOfWork, &mut Loaded<Grid>, GridEvent) -> Result<()> = UnitOfWork::record;
/// ```
#[expect(missing_debug_implementations, reason = "names a codec, and is never made")]
pub struct EventsOnly<C>(PhantomData<C>);

impl<E, C: EventCodec<E>> EventCodec<E> for EventsOnly<C> {
    fn encode(event: &E) -> Result<Encoded, BoxError> {
        C::encode(event)
    }

    fn decode(event_type: &str, payload: &[u8]) -> Result<E, BoxError> {
        C::decode(event_type, payload)
    }

    fn read_back(encoded: &Encoded) -> Result<E, BoxError> {
        C::read_back(encoded)
    }

    fn event_types() -> Vec<&'static str> {
        C::event_types()
    }
}

impl<S, C> StateCodec<S> for EventsOnly<C> {
    const KEEPS_STATES: bool = false;

    fn encode_state(_: &S) -> Result<Vec<u8>, BoxError> {
        Err(NO_STATES.into())
    }

    fn decode_state(_: &[u8]) -> Result<S, BoxError> {
        Err(NO_STATES.into())
    }
}

const NO_STATES: &str = "the codec `EventsOnly` has no codec for states";

/// The checked name of this type.
pub(crate) fn aggregate_type<T: Aggregate>() -> Result<AggregateType> {
    AggregateType::from_static(T::TYPE)
}

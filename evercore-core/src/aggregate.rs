//! What a user writes: the aggregate, and how its events and its state become bytes.

use std::borrow::Cow;
use std::marker::PhantomData;

use crate::context::EventContext;
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

    /// How events and state become bytes; most often [`Json`](crate::Json). A state that is never kept as a snapshot
    /// needs no serde: see [`EventsOnly`].
    type Codec: EventCodec<Self::Event> + StateCodec<Self>;

    /// Changes the state by what has happened. It is history: it cannot be refused.
    fn apply(&mut self, event: Self::Event);

    /// As [`apply`](Self::apply), for a state that also depends on the event's time or metadata, or that an event may
    /// not fit. A store calls this method wherever it applies an event; by default it calls `apply`.
    ///
    /// The context is the same when the event is recorded and whenever it is replayed.
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

    /// Refuses a state that must not be. Asked after each newly recorded event, never when history is replayed.
    ///
    /// # Errors
    /// Any error or sentence; it comes back as the source of [`InvalidState`](crate::ErrorKind::InvalidState).
    fn validate(&self) -> Result<(), BoxError> {
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
    /// Whether there is a codec for states at all. Without one, an aggregate with snapshots does not compile.
    const KEEPS_STATES: bool = true;

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

/// The codec `C` for events, and none for the state: for an aggregate that keeps no snapshots.
///
/// ```
/// use std::collections::HashMap;
/// use std::time::Instant;
///
/// use evercore_core::{Aggregate, EventsOnly, Json};
/// use serde::{Deserialize, Serialize};
///
/// /// JSON has no such keys, and serde no such values.
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

const NO_STATES: &str = "the codec is for events only";

/// The name of this type, checked.
pub(crate) fn aggregate_type<T: Aggregate>() -> Result<AggregateType> {
    AggregateType::from_static(T::TYPE)
}

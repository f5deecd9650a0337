//! Plain serde enums as events, plain serde types as snapshots, both as JSON.

mod join;
mod probe;
mod refuse;
mod split;
mod write;

#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::{Deserialize, DeserializeOwned};

use crate::aggregate::{Encoded, EventCodec, StateCodec};
use crate::error::{BoxError, Error, Result};
use crate::event::Event;

pub(crate) use self::probe::{Shape, shape_of};
pub(crate) use self::refuse::refuse;
pub(crate) use self::write::to_json;

/// What is said to every type that is no event.
const NOT_AN_EVENT: &str = "an event must be an externally tagged serde enum, \
     not a struct, an option, or an enum with `tag` or `untagged`";

/// The codec for events that are plain serde enums, and for states that are plain serde types.
///
/// An event is split in two: the name of its variant is its event type, the content of the variant is its payload.
///
/// | variant                | event type | payload       |
/// |------------------------|------------|---------------|
/// | `Moved { x: 1, y: 2 }` | `Moved`    | `{"x":1,"y":2}` |
/// | `Renamed("b".into())`  | `Renamed`  | `"b"`         |
/// | `Resized(3, 4)`        | `Resized`  | `[3,4]`       |
/// | `Removed`              | `Removed`  | `null`        |
///
/// ```
/// use evercore_core::{EventCodec, Json};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Debug, PartialEq, Serialize, Deserialize)]
/// enum ShapeEvent {
///     Moved { x: i32, y: i32 },
///     Removed,
/// }
///
/// let encoded = Json::encode(&ShapeEvent::Moved { x: 1, y: 2 })?;
/// assert_eq!(encoded.event_type, "Moved");
/// assert_eq!(encoded.payload, br#"{"x":1,"y":2}"#);
///
/// let event: ShapeEvent = Json::decode("Removed", b"null")?;
/// assert_eq!(event, ShapeEvent::Removed);
///
/// assert_eq!(<Json as EventCodec<ShapeEvent>>::event_types(), ["Moved", "Removed"]);
/// # Ok::<(), evercore_core::BoxError>(())
/// ```
///
/// # Events that change with time
///
/// Serde's attributes work as ever. Old events need no conversion if
/// * a renamed variant or field keeps its old name as `#[serde(alias = "…")]`,
/// * a new field has a `#[serde(default)]` or is an `Option`; a variant without content may become one with such fields,
/// * a reader that knows only some of the events has a last variant `#[serde(other)] Other`, which takes all others,
///   whatever their content is.
///
/// A name that the enum does not know is otherwise an error.
///
/// # What is refused
///
/// Enums with `tag` or `untagged` (also on a single variant), structs and options are refused with one sentence, both
/// when encoding and when decoding. So is what could be written but not read again: a variant whose name is not one of
/// [`event_types`](EventCodec::event_types), content nested deeper than 127 levels, and content of more than
/// [`limits::PAYLOAD_BYTES`](crate::limits::PAYLOAD_BYTES), which is noticed while it is written.
///
/// JSON has no word for `NaN` and the infinities; `serde_json` writes `null` for them, which is not a number when it is
/// read again. Keep them out of events.
///
/// # Errors and their content
///
/// The errors of this codec are those of serde, and these may quote a value: `invalid type: string "…", expected u32`.
/// They are only ever the source of an [`Error`]; its own `Display` and `Debug` show none of the payload.
#[derive(Clone, Copy, Debug, Default)]
pub struct Json;

impl<E: Serialize + DeserializeOwned> EventCodec<E> for Json {
    fn encode(event: &E) -> Result<Encoded, BoxError> {
        let Shape::Enum(known) = shape_of::<E>() else {
            return Err(NOT_AN_EVENT.into());
        };
        let (name, payload) = split::split(event)?;
        if !known.contains(&name) {
            return Err(format!(
                "event \"{name}\" could not be read again: it is not among the known variants"
            )
            .into());
        }
        Ok(Encoded { event_type: name.into(), payload })
    }

    fn decode(event_type: &str, payload: &[u8]) -> Result<E, BoxError> {
        Ok(join::join(event_type, payload)?)
    }

    fn event_types() -> &'static [&'static str] {
        match shape_of::<E>() {
            Shape::Enum(known) => known,
            Shape::Struct(_) | Shape::Other => &[],
        }
    }
}

impl<S: Serialize + DeserializeOwned> StateCodec<S> for Json {
    fn encode_state(state: &S) -> Result<Vec<u8>, BoxError> {
        Ok(to_json(state)?)
    }

    fn decode_state(bytes: &[u8]) -> Result<S, BoxError> {
        Ok(serde_json::from_slice(bytes)?)
    }
}

impl Event {
    /// The event as a variant of `E`, written by [`Json`]. Texts may be borrowed from the page.
    ///
    /// `E` need not be the enum that the event was written from: a reader may know fewer events, with fewer fields.
    ///
    /// ```
    /// # use evercore_core::Event;
    /// #[derive(serde::Deserialize)]
    /// enum Mailing<'a> {
    ///     EmailChanged { email: &'a str },
    ///     #[serde(other)]
    ///     Other,
    /// }
    ///
    /// fn new_address(event: &Event) -> evercore_core::Result<Option<&str>> {
    ///     Ok(match event.json()? {
    ///         Mailing::EmailChanged { email } => Some(email),
    ///         Mailing::Other => None,
    ///     })
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Codec`](crate::ErrorKind::Codec) if the event does not fit `E`.
    pub fn json<'a, E: Deserialize<'a>>(&'a self) -> Result<E> {
        join::join(self.event_type().as_str(), self.payload()).map_err(|error| {
            Error::codec(Some(self.event_type().clone()), Some(self.position()), error.into())
        })
    }
}

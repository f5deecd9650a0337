//! The codec that stores plain serde enums as events and plain serde types as snapshots, both as JSON.

mod join;
mod probe;
mod refuse;
mod same;
mod split;
mod write;

#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::{Deserialize, DeserializeOwned};

use crate::aggregate::{COMES_BACK_CHANGED, Encoded, EventCodec, StateCodec};
use crate::error::{BoxError, Error, Result};
use crate::event::Event;

pub(crate) use self::probe::{Shape, shape_of};
use self::probe::{UNKNOWN, variant_of};
pub(crate) use self::refuse::refuse;
pub(crate) use self::write::to_json;

/// The error for every type that cannot be an event.
const NOT_AN_EVENT: &str = "an event must be an externally tagged serde enum, \
     not a struct, an option, or an enum with `tag` or `untagged`";

/// The codec for events that are plain serde enums, and for states that are plain serde types.
///
/// The name of the variant is the event type, and the content of the variant is the payload.
///
/// | variant                | event type | payload         |
/// |------------------------|------------|-----------------|
/// | `Moved { x: 1, y: 2 }` | `Moved`    | `{"x":1,"y":2}` |
/// | `Renamed("b".into())`  | `Renamed`  | `"b"`           |
/// | `Resized(3, 4)`        | `Resized`  | `[3,4]`         |
/// | `Removed`              | `Removed`  | `null`          |
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
/// Serde's attributes work as usual. Old events need no conversion if
/// * a renamed variant or field keeps its old name as `#[serde(alias = "…")]`,
/// * a new field has a `#[serde(default)]` or is an `Option`; a variant without content can get such fields,
/// * a reader that knows only some of the events has a last variant `#[serde(other)] Other`, which accepts all other
///   events with any content.
///
/// Without such a variant an unknown name is an error.
///
/// # What is refused
///
/// Enums with `tag` or `untagged` (also on a single variant), structs and options are refused with the same error, when
/// encoding and when decoding. Events that could be written but not read are refused too: a variant whose name the enum
/// does not read, content nested deeper than 127 levels, and content of more than
/// [`limits::PAYLOAD_BYTES`](crate::limits::PAYLOAD_BYTES). Encoding stops at that limit.
///
/// `record` also [reads back](EventCodec::read_back) the encoded event. It refuses an event whose JSON does not decode,
/// or whose decoded value encodes to different JSON. The order of maps, sets and lists is not compared. Usual causes:
/// * `NaN` and the infinities, which JSON cannot express: `serde_json` writes `null`;
/// * `skip_serializing_if` without a `default`, or with a different one; `rename(serialize = "…")` on a field;
/// * 128-bit numbers and integer keys in values that serde buffers: `flatten`, and enums with `tag` or `untagged`;
/// * a flattened map with a key that is also the name of a field.
///
/// Some values are written and read without an error, but change: `Some(None)` and `Some(())` become `None`, and a
/// field with `#[serde(skip)]` gets its default. `record` applies the decoded event, so the state in memory is the same
/// as after a load.
///
/// A state that changes in this way is not refused, because the events still have the truth. No snapshot of it is kept,
/// and [`EventStore::snapshots_skipped`](crate::EventStore::snapshots_skipped) counts that.
///
/// # Errors and their content
///
/// The errors of this codec come from serde and may quote a value: `invalid type: string "…", expected u32`. They
/// appear only as the source of an [`Error`], whose own `Display` and `Debug` show nothing of the payload.
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

    fn read_back(encoded: &Encoded) -> Result<E, BoxError> {
        let event: E = join::join(&encoded.event_type, &encoded.payload)?;
        let again = Self::encode(&event)?;
        if again.event_type == encoded.event_type && same::same(&again.payload, &encoded.payload) {
            Ok(event)
        } else {
            Err(COMES_BACK_CHANGED.into())
        }
    }

    /// The names of the variants. A variant with an alias is left out, because serde does not tell which is its name,
    /// and so is the variant with `other`.
    fn event_types() -> Vec<&'static str> {
        let Shape::Enum(known) = shape_of::<E>() else { return Vec::new() };
        let variants: Vec<_> = known.iter().map(|name| variant_of::<E>(name)).collect();
        let other = variant_of::<E>(UNKNOWN);
        let is_only_name = |variant: &Option<_>| {
            *variant != other && variants.iter().filter(|another| *another == variant).count() == 1
        };
        known
            .iter()
            .zip(&variants)
            .filter(|(_, variant)| is_only_name(variant))
            .map(|(name, _)| *name)
            .collect()
    }
}

impl<S: Serialize + DeserializeOwned> StateCodec<S> for Json {
    fn encode_state(state: &S) -> Result<Vec<u8>, BoxError> {
        Ok(to_json(state)?)
    }

    fn decode_state(bytes: &[u8]) -> Result<S, BoxError> {
        Ok(serde_json::from_slice(bytes)?)
    }

    fn read_back_state(bytes: &[u8]) -> Result<S, BoxError> {
        let state: S = Self::decode_state(bytes)?;
        if same::same(&to_json(&state)?, bytes) { Ok(state) } else { Err(COMES_BACK_CHANGED.into()) }
    }
}

impl Event {
    /// Decodes an event that was written by [`Json`].
    ///
    /// `E` can be another enum than the one that wrote the event, with fewer variants and fewer fields. A `Cow` borrows
    /// a text from the page if possible. A `&str` must borrow, and fails if the text contains an escape, such as a
    /// quote or a new line.
    ///
    /// ```
    /// # use evercore_core::Event;
    /// use std::borrow::Cow;
    ///
    /// #[derive(serde::Deserialize)]
    /// enum Mailing<'a> {
    ///     EmailChanged {
    ///         #[serde(borrow)]
    ///         email: Cow<'a, str>,
    ///     },
    ///     #[serde(other)]
    ///     Other,
    /// }
    ///
    /// fn new_address(event: &Event) -> evercore_core::Result<Option<Cow<'_, str>>> {
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
        join::join(self.event_type().as_str(), self.payload())
            .map_err(|error| Error::not_decoded(self.event_type(), Some(self.position()), error.into()))
    }
}

//! The change of one field by an event: keep, set or clear.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Visitor};
use serde::ser::{Impossible, Serialize, Serializer};

use crate::json::{refuse, to_json};

/// How an event of a [`StateAggregate`](crate::StateAggregate) changes one field.
///
/// In JSON, `null` and a missing field mean keep, `{"set":…}` means set, and `"clear"` means clear.
///
/// ```
/// # use evercore_core::Patch;
/// #[derive(serde::Serialize, serde::Deserialize)]
/// enum CustomerEvent {
///     Changed {
///         #[serde(default, skip_serializing_if = "Patch::is_keep")] // optional: leaves out a `null`
///         phone: Patch<String>,
///     },
/// }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Patch<T> {
    /// The field stays as it is.
    #[default]
    Keep,
    /// The field gets this value.
    Set(T),
    /// The field gets the value that it has in the state's `Default`.
    Clear,
}

impl<T> Patch<T> {
    /// Whether the field stays as it is.
    pub fn is_keep(&self) -> bool {
        matches!(self, Self::Keep)
    }
}

/// By this name [`PatchReader`] recognises a [`Change`]. No other type has it, and it does not appear in JSON.
const CHANGE: &str = "$evercore::Change";

/// The form in which set and clear are written.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(rename = "$evercore::Change", rename_all = "lowercase")]
enum Change<T> {
    Set(T),
    Clear,
}

impl<T: Serialize> Serialize for Patch<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Keep => serializer.serialize_none(),
            Self::Set(value) => serializer.serialize_some(&Change::Set(value)),
            Self::Clear => serializer.serialize_some(&Change::<T>::Clear),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patch<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Read as an option, so that a missing field means keep without further attributes.
        deserializer.deserialize_option(PatchVisitor(PhantomData))
    }
}

struct PatchVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for PatchVisitor<T> {
    type Value = Patch<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("null, {\"set\": …} or \"clear\"")
    }

    fn visit_none<E>(self) -> Result<Patch<T>, E> {
        Ok(Patch::Keep)
    }

    fn visit_unit<E>(self) -> Result<Patch<T>, E> {
        Ok(Patch::Keep)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Patch<T>, D::Error> {
        Ok(match Change::deserialize(deserializer)? {
            Change::Set(value) => Patch::Set(value),
            Change::Clear => Patch::Clear,
        })
    }
}

/// The change by an event's field, with JSON as the value. A field that is not a [`Patch`] means set, or keep if it is
/// `null`.
pub(super) fn patch_of<T: Serialize + ?Sized>(value: &T) -> Result<Patch<Vec<u8>>, serde_json::Error> {
    if let Ok(patch) = value.serialize(PatchReader) {
        return patch;
    }
    let json = to_json(value)?;
    Ok(if json == b"null" { Patch::Keep } else { Patch::Set(json) })
}

/// Accepts only a [`Patch`].
struct PatchReader;

impl PatchReader {
    fn refusal() -> NotAPatch {
        NotAPatch
    }
}

impl Serializer for PatchReader {
    type Ok = Result<Patch<Vec<u8>>, serde_json::Error>;
    type Error = NotAPatch;

    fn serialize_none(self) -> Result<Self::Ok, NotAPatch> {
        Ok(Ok(Patch::Keep))
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Self::Ok, NotAPatch> {
        value.serialize(self)
    }

    fn serialize_unit_variant(
        self,
        name: &'static str,
        _: u32,
        _: &'static str,
    ) -> Result<Self::Ok, NotAPatch> {
        if name == CHANGE { Ok(Ok(Patch::Clear)) } else { Err(NotAPatch) }
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        _: u32,
        _: &'static str,
        value: &T,
    ) -> Result<Self::Ok, NotAPatch> {
        if name == CHANGE { Ok(to_json(value).map(Patch::Set)) } else { Err(NotAPatch) }
    }

    refuse!(scalars collections structs tuple_variants struct_variants);
}

/// The value is not a [`Patch`].
#[derive(Debug)]
struct NotAPatch;

impl fmt::Display for NotAPatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a patch")
    }
}

impl std::error::Error for NotAPatch {}

impl serde::ser::Error for NotAPatch {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

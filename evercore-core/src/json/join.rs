//! Joins the name of a variant and the JSON of its content to an event again.

use serde::Deserializer;
use serde::de::value::StrDeserializer;
use serde::de::{
    Deserialize, DeserializeSeed, EnumAccess, Error as _, IntoDeserializer, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::Error;

use super::NOT_AN_EVENT;
use super::probe::{UNKNOWN, variant_of};

/// What a variant without content has as its content.
const NOTHING: &[u8] = b"null";

/// The event of that name with that content.
pub(super) fn join<'de, E: Deserialize<'de>>(name: &str, payload: &'de [u8]) -> Result<E, Error> {
    E::deserialize(Named { name, payload }).or_else(|error| {
        // An event may have the very name of the variant with `#[serde(other)]`: its content is another's business too.
        let variant = variant_of::<E>(name);
        if payload == NOTHING || variant.is_none() || variant != variant_of::<E>(UNKNOWN) {
            return Err(error);
        }
        E::deserialize(Named { name, payload: NOTHING }).map_err(|_| error)
    })
}

/// Gives an enum and nothing else.
struct Named<'n, 'de> {
    name: &'n str,
    payload: &'de [u8],
}

impl<'de> Deserializer<'de> for Named<'_, 'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(Error::custom(NOT_AN_EVENT))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(Variant { name: self.name, payload: self.payload, known })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

struct Variant<'n, 'de> {
    name: &'n str,
    payload: &'de [u8],
    known: &'static [&'static str],
}

impl<'de> EnumAccess<'de> for Variant<'_, 'de> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let name: StrDeserializer<'_, Error> = self.name.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_, 'de> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        // A name that is not known got here through `#[serde(other)]`: its content is another's business.
        if self.payload == NOTHING || !self.known.contains(&self.name) {
            return Ok(());
        }
        read(self.payload, |json| <()>::deserialize(json))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        read(self.payload, |json| seed.deserialize(json))
    }

    fn tuple_variant<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, Error> {
        read(self.payload, |json| json.deserialize_tuple(length, visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        // The variant had no content when the event was written; its fields have come since.
        let payload = if self.payload == NOTHING { b"{}" } else { self.payload };
        read(payload, |json| json.deserialize_struct("", fields, visitor))
    }
}

type Reader<'de> = serde_json::Deserializer<serde_json::de::SliceRead<'de>>;

/// Reads the payload to its end; what follows the value is an error.
fn read<'de, T>(
    payload: &'de [u8],
    value: impl FnOnce(&mut Reader<'de>) -> Result<T, Error>,
) -> Result<T, Error> {
    let mut json = Reader::from_slice(payload);
    let value = value(&mut json)?;
    json.end()?;
    Ok(value)
}

//! Makes an event from the name of a variant and the JSON of its content.

use serde::Deserializer;
use serde::de::value::StrDeserializer;
use serde::de::{
    Deserialize, DeserializeSeed, EnumAccess, Error as _, IntoDeserializer, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::Error;

use super::NOT_AN_EVENT;
use super::probe::{UNKNOWN, variant_of};

/// The payload of a variant without content.
const NOTHING: &[u8] = b"null";

/// Decodes the event with this name and this content.
pub(super) fn join<'de, E: Deserialize<'de>>(name: &str, payload: &'de [u8]) -> Result<E, Error> {
    E::deserialize(Named { name, payload }).or_else(|error| {
        // The event may have the same name as the variant with `#[serde(other)]`. Then its content is ignored, too.
        let variant = variant_of::<E>(name);
        if payload == NOTHING || variant.is_none() || variant != variant_of::<E>(UNKNOWN) {
            return Err(error);
        }
        E::deserialize(Named { name, payload: NOTHING }).map_err(|_| error)
    })
}

/// A deserializer that only an enum can read.
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
        // Unknown names get here through `#[serde(other)]`, which ignores the content.
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
        // The variant had no fields when the event was written.
        let payload = if self.payload == NOTHING { b"{}" } else { self.payload };
        read(payload, |json| json.deserialize_struct("", fields, visitor))
    }
}

type Reader<'de> = serde_json::Deserializer<serde_json::de::SliceRead<'de>>;

/// Reads the whole payload. More text after the value is an error.
fn read<'de, T>(
    payload: &'de [u8],
    value: impl FnOnce(&mut Reader<'de>) -> Result<T, Error>,
) -> Result<T, Error> {
    let mut json = Reader::from_slice(payload);
    let value = value(&mut json)?;
    json.end()?;
    Ok(value)
}

//! Splits an event into the name of its variant and the JSON of its content.

use serde::ser::{
    Error as _, Impossible, SerializeStruct, SerializeStructVariant, SerializeTuple, SerializeTupleVariant,
};
use serde::{Serialize, Serializer};
use serde_json::Error;

use super::write::{Writer, writer, written};
use super::{NOT_AN_EVENT, refuse};

type Name = &'static str;

/// The name of the variant, and the JSON of its content.
pub(super) fn split<E: Serialize>(event: &E) -> Result<(Name, Vec<u8>), Error> {
    let mut content = writer();
    let name = event.serialize(Variant(&mut content))?;
    Ok((name, written(content)))
}

/// Accepts only a variant of an enum. Writes the content and returns the name.
struct Variant<'a>(&'a mut Writer);

impl Variant<'_> {
    fn refusal() -> Error {
        Error::custom(NOT_AN_EVENT)
    }
}

impl<'a> Serializer for Variant<'a> {
    type Ok = Name;
    type Error = Error;
    type SerializeTupleVariant = Content<<&'a mut Writer as Serializer>::SerializeTuple>;
    type SerializeStructVariant = Content<<&'a mut Writer as Serializer>::SerializeStruct>;

    fn serialize_unit_variant(self, _: Name, _: u32, name: Name) -> Result<Name, Error> {
        self.0.serialize_unit()?;
        Ok(name)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: Name,
        _: u32,
        name: Name,
        content: &T,
    ) -> Result<Name, Error> {
        content.serialize(self.0)?;
        Ok(name)
    }

    fn serialize_tuple_variant(
        self,
        _: Name,
        _: u32,
        name: Name,
        length: usize,
    ) -> Result<Self::SerializeTupleVariant, Error> {
        Ok(Content { name, parts: self.0.serialize_tuple(length)? })
    }

    fn serialize_struct_variant(
        self,
        type_name: Name,
        _: u32,
        name: Name,
        length: usize,
    ) -> Result<Self::SerializeStructVariant, Error> {
        Ok(Content { name, parts: self.0.serialize_struct(type_name, length)? })
    }

    refuse!(scalars options collections structs);
}

/// Writes the content of a variant, part by part.
struct Content<P> {
    name: Name,
    parts: P,
}

impl<P: SerializeTuple<Error = Error>> SerializeTupleVariant for Content<P> {
    type Ok = Name;
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.parts.serialize_element(value)
    }

    fn end(self) -> Result<Name, Error> {
        self.parts.end()?;
        Ok(self.name)
    }
}

impl<P: SerializeStruct<Error = Error>> SerializeStructVariant for Content<P> {
    type Ok = Name;
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, field: Name, value: &T) -> Result<(), Error> {
        self.parts.serialize_field(field, value)
    }

    fn skip_field(&mut self, field: Name) -> Result<(), Error> {
        self.parts.skip_field(field)
    }

    fn end(self) -> Result<Name, Error> {
        self.parts.end()?;
        Ok(self.name)
    }
}

//! Asks a type what it wants to be read from, without reading anything.

use std::fmt;

use serde::de::{self, Deserialize, Visitor};
use serde::forward_to_deserialize_any;

type Names = &'static [&'static str];

/// What a type wants to be read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// An externally tagged enum, with the names of its variants.
    Enum(Names),
    /// A struct, with the names of its fields.
    Struct(Names),
    /// Anything else.
    Other,
}

/// What `T` wants to be read from. Costs next to nothing: derived code asks for its shape first, and gets no further.
#[inline]
pub(crate) fn shape_of<'de, T: Deserialize<'de>>() -> Shape {
    let mut shape = Shape::Other;
    let _: Result<T, Stop> = T::deserialize(Probe(&mut shape));
    shape
}

/// Notes the first thing it is asked for, and stops.
struct Probe<'a>(&'a mut Shape);

impl<'de> de::Deserializer<'de> for Probe<'_> {
    type Error = Stop;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Stop> {
        Err(Stop)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        names: Names,
        _: V,
    ) -> Result<V::Value, Stop> {
        *self.0 = Shape::Enum(names);
        Err(Stop)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        names: Names,
        _: V,
    ) -> Result<V::Value, Stop> {
        *self.0 = Shape::Struct(names);
        Err(Stop)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map identifier ignored_any
    }
}

/// The probe has seen enough.
#[derive(Debug)]
struct Stop;

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the probe has seen enough")
    }
}

impl std::error::Error for Stop {}

impl de::Error for Stop {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

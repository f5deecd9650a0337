//! Finds out the shape of a type from its `Deserialize`, without reading anything.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::mem;

use serde::de::value::StrDeserializer;
use serde::de::{self, Deserialize, DeserializeSeed, EnumAccess, IntoDeserializer, VariantAccess, Visitor};
use serde::forward_to_deserialize_any;

type Names = &'static [&'static str];

/// The kind of value that a type is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// An externally tagged enum, with the names of its variants.
    Enum(Names),
    /// A struct, with the names of its fields.
    Struct(Names),
    /// Anything else.
    Other,
}

/// The shape of `T`. This is cheap: derived code first asks for its shape, and stops there.
#[inline]
pub(crate) fn shape_of<'de, T: Deserialize<'de>>() -> Shape {
    let mut shape = Shape::Other;
    let _: Result<T, Stop> = T::deserialize(Probe(&mut shape));
    shape
}

/// Notes the first request, and stops.
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

/// A name that no variant has.
pub(super) const UNKNOWN: &str = "\0";

/// Identifies the variant that the enum `T` chooses for this name. A name and its aliases give the same value, and so
/// do all names that `#[serde(other)]` accepts. `None` if `T` has no variant for it.
pub(super) fn variant_of<'de, T: Deserialize<'de>>(name: &str) -> Option<u64> {
    let mut variant = None;
    let _: Result<T, Stop> = T::deserialize(Chooser { name, variant: &mut variant });
    variant
}

/// Gives the name of a variant, and stops when the enum has chosen.
struct Chooser<'a> {
    name: &'a str,
    variant: &'a mut Option<u64>,
}

impl<'de> de::Deserializer<'de> for Chooser<'_> {
    type Error = Stop;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Stop> {
        Err(Stop)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: Names,
        visitor: V,
    ) -> Result<V::Value, Stop> {
        visitor.visit_enum(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> EnumAccess<'de> for Chooser<'_> {
    type Error = Stop;
    type Variant = Self;

    /// Derived code turns the name into an enum with one case per variant.
    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self), Stop> {
        let name: StrDeserializer<'_, Stop> = self.name.into_deserializer();
        let mut hasher = DefaultHasher::new();
        mem::discriminant(&seed.deserialize(name)?).hash(&mut hasher);
        *self.variant = Some(hasher.finish());
        Err(Stop)
    }
}

impl<'de> VariantAccess<'de> for Chooser<'_> {
    type Error = Stop;

    fn unit_variant(self) -> Result<(), Stop> {
        Err(Stop)
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, _: S) -> Result<S::Value, Stop> {
        Err(Stop)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Stop> {
        Err(Stop)
    }

    fn struct_variant<V: Visitor<'de>>(self, _: Names, _: V) -> Result<V::Value, Stop> {
        Err(Stop)
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

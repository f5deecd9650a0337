//! Compares two JSON texts without regard to the order of their parts.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Error;
use serde_json::value::RawValue;

/// Whether both are equal except for the order. Both come from the same writer, so equal scalars have equal texts, and
/// numbers are compared to the last digit.
///
/// The order is ignored because a `HashMap` is written as an object and a `HashSet` as a list, each in any order.
pub(super) fn same(one: &[u8], other: &[u8]) -> bool {
    one == other || (one.len() == other.len() && same_parts(one, other).unwrap_or(false))
}

#[cold]
fn same_parts(one: &[u8], other: &[u8]) -> Result<bool, Error> {
    Ok(Tree::of(serde_json::from_slice(one)?)? == Tree::of(serde_json::from_slice(other)?)?)
}

/// A JSON value with its parts sorted.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Tree<'a> {
    Scalar(&'a str),
    List(Vec<Self>),
    Object(Vec<(&'a str, Self)>),
}

impl<'a> Tree<'a> {
    fn of(json: &'a RawValue) -> Result<Self, Error> {
        let text = json.get();
        Ok(match text.as_bytes().first() {
            Some(b'[') => {
                let parts: Vec<&RawValue> = serde_json::from_str(text)?;
                Self::List(sorted(parts.into_iter().map(Self::of))?)
            }
            Some(b'{') => {
                let Entries(parts) = serde_json::from_str(text)?;
                Self::Object(sorted(
                    parts.into_iter().map(|(name, value)| Ok((name.get(), Self::of(value)?))),
                )?)
            }
            _ => Self::Scalar(text),
        })
    }
}

fn sorted<T: Ord>(parts: impl Iterator<Item = Result<T, Error>>) -> Result<Vec<T>, Error> {
    let mut parts: Vec<T> = parts.collect::<Result<_, _>>()?;
    parts.sort_unstable();
    Ok(parts)
}

/// The entries of an object, including those with the same name.
struct Entries<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<'de>, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Entries(entries))
    }
}

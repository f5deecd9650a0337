//! The fields of a state or of an event, each as a piece of JSON.

use serde::ser::{Error as _, Impossible, SerializeStruct, SerializeStructVariant};
use serde::{Serialize, Serializer};
use serde_json::Error;

use super::patch::{Patch, patch_of};
use crate::json::{refuse, to_json};

type Name = &'static str;

/// Fields by name, in the order in which serde wrote them. A skipped field is [`Patch::Keep`].
#[derive(Default)]
pub(super) struct Fields(Vec<(Name, Patch<Vec<u8>>)>);

impl Fields {
    pub(super) fn of_state<S: Serialize>(state: &S) -> Result<Self, Error> {
        state.serialize(Collector { from: From::State, fields: Self::default() })
    }

    pub(super) fn of_event<E: Serialize>(event: &E) -> Result<Self, Error> {
        event.serialize(Collector { from: From::Event, fields: Self::default() })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = Name> {
        self.0.iter().map(|(name, _)| *name)
    }

    /// Whether every field is [`Patch::Keep`].
    pub(super) fn are_none(&self) -> bool {
        self.0.iter().all(|(_, patch)| patch.is_keep())
    }

    /// These fields of a state after the changes of an event. `cleared` returns the fields of the default state.
    pub(super) fn overwritten_by(
        mut self,
        changes: Self,
        cleared: impl FnOnce() -> Result<Self, Error>,
    ) -> Result<Self, Error> {
        let mut cleared = if changes.clears() { cleared()? } else { Self::default() };
        for (name, change) in changes.0 {
            match change {
                Patch::Keep => {}
                Patch::Set(_) => self.put(name, change),
                Patch::Clear => self.put(name, cleared.take(name)),
            }
        }
        Ok(self)
    }

    /// The fields as one JSON object.
    pub(super) fn to_object(&self) -> Result<Vec<u8>, Error> {
        let mut object = vec![b'{'];
        for (name, patch) in &self.0 {
            if let Patch::Set(json) = patch {
                if object.len() > 1 {
                    object.push(b',');
                }
                object.extend_from_slice(&to_json(name)?);
                object.push(b':');
                object.extend_from_slice(json);
            }
        }
        object.push(b'}');
        Ok(object)
    }

    fn clears(&self) -> bool {
        self.0.iter().any(|(_, patch)| *patch == Patch::Clear)
    }

    fn put(&mut self, name: Name, value: Patch<Vec<u8>>) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }

    /// The value of the field; [`Patch::Keep`] if serde did not write it.
    fn take(&mut self, name: Name) -> Patch<Vec<u8>> {
        self.0
            .iter_mut()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| std::mem::take(value))
            .unwrap_or_default()
    }
}

/// The source of the fields.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    /// A struct, in which `null` is a value.
    State,
    /// An enum's variant.
    Event,
    /// The struct in a newtype variant. As in all events, `null` means keep.
    Content,
}

/// Accepts only structs, or only variants.
struct Collector {
    from: From,
    fields: Fields,
}

impl Collector {
    fn refusal() -> Error {
        Error::custom("a state and the content of its events must have named fields, without `flatten`")
    }

    fn start(self, allowed: bool) -> Result<Self, Error> {
        if allowed { Ok(self) } else { Err(Self::refusal()) }
    }

    fn collect<T: Serialize + ?Sized>(&mut self, name: Name, value: &T) -> Result<(), Error> {
        let value = if self.from == From::State { Patch::Set(to_json(value)?) } else { patch_of(value)? };
        self.fields.0.push((name, value));
        Ok(())
    }

    fn skip(&mut self, name: Name) {
        self.fields.0.push((name, Patch::Keep));
    }
}

impl Serializer for Collector {
    type Ok = Fields;
    type Error = Error;
    type SerializeStruct = Self;
    type SerializeStructVariant = Self;

    fn serialize_struct(self, _: Name, _: usize) -> Result<Self, Error> {
        let allowed = self.from != From::Event;
        self.start(allowed)
    }

    fn serialize_struct_variant(self, _: Name, _: u32, _: Name, _: usize) -> Result<Self, Error> {
        let allowed = self.from == From::Event;
        self.start(allowed)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        mut self,
        _: Name,
        _: u32,
        _: Name,
        content: &T,
    ) -> Result<Fields, Error> {
        let allowed = self.from == From::Event;
        self.from = From::Content;
        content.serialize(self.start(allowed)?)
    }

    fn serialize_unit_variant(self, _: Name, _: u32, _: Name) -> Result<Fields, Error> {
        let allowed = self.from == From::Event;
        self.start(allowed).map(|collector| collector.fields)
    }

    refuse!(scalars options collections tuple_variants);
}

impl SerializeStruct for Collector {
    type Ok = Fields;
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, name: Name, value: &T) -> Result<(), Error> {
        self.collect(name, value)
    }

    fn skip_field(&mut self, name: Name) -> Result<(), Error> {
        self.skip(name);
        Ok(())
    }

    fn end(self) -> Result<Fields, Error> {
        Ok(self.fields)
    }
}

impl SerializeStructVariant for Collector {
    type Ok = Fields;
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, name: Name, value: &T) -> Result<(), Error> {
        self.collect(name, value)
    }

    fn skip_field(&mut self, name: Name) -> Result<(), Error> {
        self.skip(name);
        Ok(())
    }

    fn end(self) -> Result<Fields, Error> {
        Ok(self.fields)
    }
}

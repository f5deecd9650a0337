//! The name by which a call finds an aggregate: an id or a natural key.

use crate::error::{Error, Result};
use crate::ids::AggregateId;
use crate::name::{AggregateType, Key};

/// Which aggregate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The one with this id.
    Id(AggregateId),
    /// The one of this type with this natural key.
    Key(AggregateType, Key),
}

impl Target {
    /// There is no such aggregate.
    pub(crate) fn not_found(&self) -> Error {
        match self {
            Self::Id(id) => Error::not_found(*id),
            Self::Key(aggregate_type, _) => Error::key_not_found(aggregate_type),
        }
    }
}

/// Anything that names an aggregate: its id, or its natural key as text or [`Key`].
pub trait IntoTarget: Send {
    /// The target, for an aggregate of this type.
    ///
    /// # Errors
    /// [`InvalidName`](crate::ErrorKind::InvalidName) if the text breaks a rule of natural keys.
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target>;
}

impl IntoTarget for AggregateId {
    fn into_target(self, _: &AggregateType) -> Result<Target> {
        Ok(Target::Id(self))
    }
}

impl IntoTarget for Key {
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target> {
        Ok(Target::Key(aggregate_type.clone(), self))
    }
}

impl IntoTarget for &Key {
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target> {
        self.clone().into_target(aggregate_type)
    }
}

impl IntoTarget for &str {
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target> {
        Key::new(self)?.into_target(aggregate_type)
    }
}

impl IntoTarget for &String {
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target> {
        self.as_str().into_target(aggregate_type)
    }
}

impl IntoTarget for String {
    fn into_target(self, aggregate_type: &AggregateType) -> Result<Target> {
        self.as_str().into_target(aggregate_type)
    }
}

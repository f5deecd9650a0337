//! Aggregates whose events overwrite fields of the state.

mod fields;
mod patch;

#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::DeserializeOwned;

use self::fields::Fields;
pub use self::patch::Patch;
use crate::aggregate::Aggregate;
use crate::context::EventContext;
use crate::error::BoxError;
use crate::json::{Json, Shape, shape_of};

/// An aggregate whose events overwrite fields of its state, so that you write no `apply`.
///
/// The fields of an event's variant are copied to the fields of the state that have the same name:
/// * A missing field, `None` or `null` does not change the state's field. A variant without content changes nothing.
/// * With [`Patch`] an event can also clear a field, which then gets its value from the state's `Default`.
/// * If the state does not have a field, or the field cannot hold the value, that is an error, and the state is not
///   changed.
///
/// ```
/// use evercore_core::{Aggregate, BoxError, Patch, StateAggregate};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Debug, Default, Serialize, Deserialize)]
/// struct Customer { name: String, phone: Option<String>, discount: u32 }
///
/// #[derive(Debug, Serialize, Deserialize)]
/// enum CustomerEvent {
///     Registered { name: String },
///     Changed { name: Option<String>, phone: Patch<String> },
///     DiscountGranted { discount: u32 },
/// }
///
/// impl StateAggregate for Customer {
///     const TYPE: &'static str = "customer";
///     type Event = CustomerEvent;
/// }
///
/// let mut customer = Customer::default();
/// customer.apply(CustomerEvent::Registered { name: "Ada".into() });
/// customer.apply(CustomerEvent::Changed { name: None, phone: Patch::Set("0123".into()) });
/// assert_eq!((customer.name.as_str(), customer.phone.as_deref()), ("Ada", Some("0123")));
///
/// customer.apply(CustomerEvent::Changed { name: Some("Ada L.".into()), phone: Patch::Clear });
/// assert_eq!((customer.name.as_str(), customer.phone), ("Ada L.", None));
/// ```
///
/// # What the state must be
///
/// A struct with named fields that serde can write to JSON and read again, because each event does both. A field has
/// the name that serde writes (`rename`, `rename_all`); an `alias` does not count. `skip_serializing_if` needs a
/// `default`, as always. An event cannot set a field with `skip`, and serde gives it its default. `flatten` and tuple
/// structs are refused.
///
/// A field is overwritten as a whole. Serde's rules apply to a nested struct: with `#[serde(deny_unknown_fields)]` it
/// refuses fields that it does not know.
///
/// # What an event must be
///
/// An enum that [`Json`] accepts. Its variants have named fields, one struct with named fields, or no content.
pub trait StateAggregate: Default + Clone + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// As [`Aggregate::TYPE`].
    const TYPE: &'static str;

    /// As [`Aggregate::SNAPSHOT_EVERY`].
    const SNAPSHOT_EVERY: u32 = 0;

    /// As [`Aggregate::SNAPSHOT_VERSION`].
    const SNAPSHOT_VERSION: u32 = 1;

    /// As [`Aggregate::TRUSTS_CODEC`].
    const TRUSTS_CODEC: bool = false;

    /// Its events: an enum that serde can write and read.
    type Event: Serialize + DeserializeOwned + Send + Sync + 'static;

    /// As [`Aggregate::validate`].
    ///
    /// # Errors
    /// As [`Aggregate::validate`].
    fn validate(&self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl<S: StateAggregate> Aggregate for S {
    const TYPE: &'static str = S::TYPE;
    const SNAPSHOT_EVERY: u32 = S::SNAPSHOT_EVERY;
    const SNAPSHOT_VERSION: u32 = S::SNAPSHOT_VERSION;
    const TRUSTS_CODEC: bool = S::TRUSTS_CODEC;

    type Event = S::Event;
    type Codec = Json;

    /// Overwrites the fields. An event that does not fit changes nothing; a store reports it as an error.
    fn apply(&mut self, event: S::Event) {
        if let Ok(changed) = overwritten(self, &event) {
            *self = changed;
        }
    }

    fn validate(&self) -> Result<(), BoxError> {
        S::validate(self)
    }

    fn apply_with(&mut self, event: S::Event, _: &EventContext<'_>) -> Result<(), BoxError> {
        *self = overwritten(self, &event)?;
        Ok(())
    }
}

/// The state after the event has overwritten its fields.
fn overwritten<S: StateAggregate>(state: &S, event: &S::Event) -> Result<S, BoxError> {
    let Shape::Struct(known) = shape_of::<S>() else {
        return Err("the state must be a struct with named fields, without `flatten`".into());
    };
    let changes = Fields::of_event(event)?;
    if let Some(unknown) = changes.names().find(|name| !known.contains(name)) {
        return Err(format!("the state has no field \"{unknown}\"").into());
    }
    if changes.are_none() {
        return Ok(state.clone());
    }
    let fields = Fields::of_state(state)?.overwritten_by(changes, || Fields::of_state(&S::default()))?;
    Ok(serde_json::from_slice(&fields.to_object()?)?)
}

//! Aggregates whose state is simply overwritten by what the events say.

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

/// An aggregate whose events overwrite fields of its state, so that no `apply` need be written.
///
/// The fields of an event's variant are copied to the fields of the state that have the same name:
/// * A missing field, `None` or `null` leaves the state's field alone. So does a variant without content.
/// * [`Patch`] lets an event also clear a field, which brings back its value in the state's `Default`.
/// * A field that the state does not have, or whose value the state's field cannot hold, is an error; the state is
///   then as it was before.
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
/// A struct with named fields that serde can write to JSON and read again, for that is what happens at each event.
/// Names are those that serde writes (`rename`, `rename_all`), an `alias` is none of them. `skip_serializing_if` needs
/// its `default`, as ever. A field with `skip` cannot be set by an event and comes back as serde fills it;
/// `flatten` and tuple structs are refused.
///
/// A field is overwritten as a whole. What lies within it, such as a nested struct, is read by serde's rules: put
/// `#[serde(deny_unknown_fields)]` on a nested struct that shall not overlook anything.
///
/// # What an event must be
///
/// What [`Json`] takes; the variants have named fields, one struct with named fields, or no content.
pub trait StateAggregate: Default + Clone + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// As [`Aggregate::TYPE`].
    const TYPE: &'static str;

    /// As [`Aggregate::SNAPSHOT_EVERY`].
    const SNAPSHOT_EVERY: u32 = 0;

    /// As [`Aggregate::SNAPSHOT_VERSION`].
    const SNAPSHOT_VERSION: u32 = 1;

    /// As [`Aggregate::TRUSTS_CODEC`].
    const TRUSTS_CODEC: bool = false;

    /// What can happen to it: an enum that serde can write and read.
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

    /// Overwrites the fields; an event that does not fit changes nothing. A store tells of such an event instead.
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

/// The state with the event's fields written over its own.
fn overwritten<S: StateAggregate>(state: &S, event: &S::Event) -> Result<S, BoxError> {
    let Shape::Struct(known) = shape_of::<S>() else {
        return Err("the state must be a struct with named fields, without `flatten`".into());
    };
    let changes = Fields::of_event(event)?;
    if let Some(stranger) = changes.names().find(|name| !known.contains(name)) {
        return Err(format!("the state has no field \"{stranger}\"").into());
    }
    if changes.are_none() {
        return Ok(state.clone());
    }
    let fields = Fields::of_state(state)?.overwritten_by(changes, || Fields::of_state(&S::default()))?;
    Ok(serde_json::from_slice(&fields.to_object()?)?)
}

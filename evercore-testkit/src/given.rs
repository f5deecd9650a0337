//! Given, when, then: a decision and the events that follow from it, without a store.

use std::error::Error as StdError;
use std::fmt;

use evercore_core::{Aggregate, BoxError, Decision, Encoded, EventCodec};

/// What has happened to an aggregate before.
///
/// Events are written and read with the aggregate's codec, as a store would, and compared in that form: they need no
/// `PartialEq`.
///
/// ```
/// use evercore_core::{Aggregate, BoxError, Json};
/// use evercore_testkit::Given;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Default, Serialize, Deserialize)]
/// struct Light { is_on: bool }
///
/// #[derive(Serialize, Deserialize)]
/// enum LightEvent { SwitchedOn, SwitchedOff }
///
/// #[derive(Debug)]
/// struct AlreadyOn;
/// # impl std::fmt::Display for AlreadyOn {
/// #     fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str("already on") }
/// # }
/// # impl std::error::Error for AlreadyOn {}
///
/// impl Aggregate for Light {
///     const TYPE: &'static str = "light";
///     type Event = LightEvent;
///     type Codec = Json;
///     fn apply(&mut self, event: LightEvent) { self.is_on = matches!(event, LightEvent::SwitchedOn); }
/// }
///
/// impl Light {
///     fn switch_on(&self) -> Result<[LightEvent; 1], AlreadyOn> {
///         if self.is_on { Err(AlreadyOn) } else { Ok([LightEvent::SwitchedOn]) }
///     }
/// }
///
/// Given::<Light>::nothing()
///     .when(|light| light.switch_on())
///     .then([LightEvent::SwitchedOn])
///     .then_state(|light| assert!(light.is_on));
///
/// Given::<Light>::events([LightEvent::SwitchedOn])
///     .when(|light| light.switch_on())
///     .then_rejected_with::<AlreadyOn>();
/// ```
#[must_use = "a story without `when` tests nothing"]
pub struct Given<T> {
    state: T,
}

impl<T: Aggregate> Given<T> {
    /// Nothing has happened yet.
    pub fn nothing() -> Self {
        Self { state: T::default() }
    }

    /// These events have happened. History is not validated.
    ///
    /// # Panics
    /// If an event does not go through the codec and back, or does not fit the state.
    pub fn events(events: impl IntoIterator<Item = T::Event>) -> Self {
        Self::nothing().and(events)
    }

    /// These have happened, too.
    ///
    /// # Panics
    /// As [`events`](Self::events).
    pub fn and(mut self, events: impl IntoIterator<Item = T::Event>) -> Self {
        for event in events {
            let encoded = encode::<T>(&event);
            decode_into(&mut self.state, &encoded)
                .unwrap_or_else(|error| panic!("history does not fit: {error}"));
        }
        self
    }

    /// This is decided. What follows is applied and validated, as in a unit of work.
    ///
    /// # Panics
    /// If an event does not go through the codec and back, or does not fit the state.
    pub fn when<D: Decision<T::Event>>(self, decide: impl FnOnce(&T) -> D) -> When<T> {
        let Self { mut state } = self;
        let outcome = decide(&state).into_events().and_then(|events| {
            let before = state.clone();
            let recorded = events.into_iter().map(|event| {
                let encoded = encode::<T>(&event);
                decode_into(&mut state, &encoded)
                    .unwrap_or_else(|error| panic!("an event does not fit: {error}"));
                state.validate().map(|()| encoded)
            });
            let recorded: Result<Vec<Encoded>, BoxError> = recorded.collect();
            if recorded.is_err() {
                state = before;
            }
            recorded
        });
        When { state, outcome }
    }
}

/// What came of a decision.
pub struct When<T> {
    state: T,
    outcome: Result<Vec<Encoded>, BoxError>,
}

impl<T: Aggregate> When<T> {
    /// Exactly these events happen.
    ///
    /// # Panics
    /// If others do, or the decision is refused.
    #[expect(clippy::needless_pass_by_value, reason = "a list of events reads best without a reference")]
    pub fn then<const N: usize>(self, events: [T::Event; N]) -> Self {
        let wanted: Vec<Encoded> = events.iter().map(encode::<T>).collect();
        match &self.outcome {
            Ok(found) => assert!(*found == wanted, "expected {}, happened {}", shown(&wanted), shown(found)),
            Err(error) => panic!("expected {}, refused: {error}", shown(&wanted)),
        }
        self
    }

    /// Nothing happens, and nothing is refused.
    ///
    /// # Panics
    /// If something does, or the decision is refused.
    pub fn then_nothing(self) -> Self {
        self.then([])
    }

    /// It is refused with this error, by the decision itself or by `validate`.
    ///
    /// # Panics
    /// If it is not refused, or with another error.
    pub fn then_rejected_with<E: StdError + 'static>(self) -> Self {
        let name = std::any::type_name::<E>();
        match &self.outcome {
            Ok(found) => panic!("expected a refusal with {name}, happened {}", shown(found)),
            Err(error) => assert!(error.is::<E>(), "expected a refusal with {name}, refused: {error:?}"),
        }
        self
    }

    /// It is refused, with whatever error.
    ///
    /// # Panics
    /// If it is not refused.
    pub fn then_rejected(self) -> Self {
        if let Ok(found) = &self.outcome {
            panic!("expected a refusal, happened {}", shown(found));
        }
        self
    }

    /// The state is as these assertions say; after a refusal, as it was before.
    pub fn then_state(self, check: impl FnOnce(&T)) -> Self {
        check(&self.state);
        self
    }
}

fn encode<T: Aggregate>(event: &T::Event) -> Encoded {
    T::Codec::encode(event).unwrap_or_else(|error| panic!("an event does not encode: {error}"))
}

fn decode_into<T: Aggregate>(state: &mut T, encoded: &Encoded) -> Result<(), BoxError> {
    state.try_apply(T::Codec::read_back(encoded)?)
}

fn shown(events: &[Encoded]) -> String {
    let one = |event: &Encoded| format!("{} {}", event.event_type, String::from_utf8_lossy(&event.payload));
    format!("[{}]", events.iter().map(one).collect::<Vec<_>>().join(", "))
}

impl<T> fmt::Debug for Given<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Given").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for When<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("When").field("is_refused", &self.outcome.is_err()).finish_non_exhaustive()
    }
}

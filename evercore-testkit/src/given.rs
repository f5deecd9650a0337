//! Given, when, then: tests a decision and its events without a store.

use std::error::Error as StdError;
use std::fmt;

use evercore_core::{
    Aggregate, BoxError, Decision, Encoded, EventCodec, EventContext, Metadata, Sequence, StateCodec,
    Timestamp,
};

/// The events that have happened to an aggregate.
///
/// Events are encoded and decoded with the aggregate's codec, as in a store, and compared in encoded form. They need
/// no `PartialEq`.
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
///
/// A snapshot must give the same state as a replay of all events: [`then_snapshots_agree`](Self::then_snapshots_agree).
#[must_use = "a story without `when` tests nothing"]
pub struct Given<T> {
    state: T,
    history: Vec<Happened>,
    metadata: Metadata,
}

/// An event with its metadata and time.
#[derive(Clone)]
struct Happened {
    encoded: Encoded,
    metadata: Metadata,
}

impl<T: Aggregate> Given<T> {
    /// Nothing has happened yet.
    pub fn nothing() -> Self {
        Self { state: T::default(), history: Vec::new(), metadata: Metadata::new() }
    }

    /// Gives all later events this metadata, for an aggregate with an [`apply_with`](Aggregate::apply_with). Without
    /// a time in it, events happen at the first moment of 1970.
    pub fn carrying(mut self, metadata: Metadata) -> Self {
        self.metadata = metadata;
        self
    }

    /// These events have happened. History is not validated.
    ///
    /// # Panics
    /// If an event does not survive the codec, or does not fit the state.
    pub fn events(events: impl IntoIterator<Item = T::Event>) -> Self {
        Self::nothing().and(events)
    }

    /// These events have happened, too.
    ///
    /// # Panics
    /// As [`events`](Self::events).
    pub fn and(mut self, events: impl IntoIterator<Item = T::Event>) -> Self {
        for event in events {
            let happened = Happened { encoded: encode::<T>(&event), metadata: self.metadata.clone() };
            apply(&mut self.state, self.history.len(), &happened)
                .unwrap_or_else(|error| panic!("history does not fit: {error}"));
            self.history.push(happened);
        }
        self
    }

    /// Checks that a snapshot taken after any of these events gives the same state as a replay, there and after each
    /// later event.
    ///
    /// A store keeps no snapshot of a state that decodes to another state. It cannot notice a part of the state that
    /// is not encoded at all, for instance a field with `#[serde(skip)]`. This check does. Give a history that uses
    /// every part of the state.
    ///
    /// ```
    /// use evercore_core::{Aggregate, Json};
    /// use evercore_testkit::Given;
    /// use serde::{Deserialize, Serialize};
    ///
    /// #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    /// struct Stock { items: u32 }
    ///
    /// #[derive(Serialize, Deserialize)]
    /// enum StockEvent { Added { items: u32 }, Emptied }
    ///
    /// impl Aggregate for Stock {
    ///     const TYPE: &'static str = "stock";
    ///     const SNAPSHOT_EVERY: u32 = 100;
    ///     type Event = StockEvent;
    ///     type Codec = Json;
    ///     fn apply(&mut self, event: StockEvent) {
    ///         match event {
    ///             StockEvent::Added { items } => self.items += items,
    ///             StockEvent::Emptied => self.items = 0,
    ///         }
    ///     }
    /// }
    ///
    /// let events = [StockEvent::Added { items: 3 }, StockEvent::Emptied, StockEvent::Added { items: 1 }];
    /// Given::<Stock>::events(events).then_snapshots_agree();
    /// ```
    ///
    /// # Panics
    /// If a state does not survive the codec, or a snapshot leads to another state.
    pub fn then_snapshots_agree(&self)
    where
        T: PartialEq,
    {
        let mut replayed = T::default();
        let mut restored: Vec<T> = Vec::new();
        for (before, happened) in self.history.iter().enumerate() {
            let now = before + 1;
            for state in restored.iter_mut().chain([&mut replayed]) {
                apply(state, before, happened)
                    .unwrap_or_else(|error| panic!("event {now} does not fit: {error}"));
            }
            let kept = T::Codec::encode_state(&replayed).and_then(|bytes| T::Codec::read_back_state(&bytes));
            restored
                .push(kept.unwrap_or_else(|error| panic!("the state after event {now} is lost: {error}")));
            for (from, state) in restored.iter().enumerate() {
                let from = from + 1;
                assert!(
                    *state == replayed,
                    "a snapshot after event {from} gives another state after event {now}"
                );
            }
        }
    }

    /// Makes this decision. Its events are applied and validated, as in a unit of work.
    ///
    /// # Panics
    /// If an event does not survive the codec, or does not fit the state.
    pub fn when<D: Decision<T::Event>>(self, decide: impl FnOnce(&T) -> D) -> When<T> {
        let Self { mut state, history, metadata } = self;
        let outcome = decide(&state).into_events().and_then(|events| {
            let before = state.clone();
            let recorded = (history.len()..).zip(events).map(|(before, event)| {
                let happened = Happened { encoded: encode::<T>(&event), metadata: metadata.clone() };
                apply(&mut state, before, &happened)
                    .unwrap_or_else(|error| panic!("an event does not fit: {error}"));
                state.validate().map(|()| happened.encoded)
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

/// The result of a decision.
pub struct When<T> {
    state: T,
    outcome: Result<Vec<Encoded>, BoxError>,
}

impl<T: Aggregate> When<T> {
    /// Asserts that exactly these events happen.
    ///
    /// # Panics
    /// If other events happen, or the decision is refused.
    #[expect(clippy::needless_pass_by_value, reason = "a list of events reads best without a reference")]
    pub fn then<const N: usize>(self, events: [T::Event; N]) -> Self {
        let wanted: Vec<Encoded> = events.iter().map(encode::<T>).collect();
        match &self.outcome {
            Ok(found) => assert!(*found == wanted, "expected {}, happened {}", shown(&wanted), shown(found)),
            Err(error) => panic!("expected {}, refused: {error}", shown(&wanted)),
        }
        self
    }

    /// Asserts that no event happens and the decision is not refused.
    ///
    /// # Panics
    /// If an event happens, or the decision is refused.
    pub fn then_nothing(self) -> Self {
        self.then([])
    }

    /// Asserts that it is refused with this error, by the decision itself or by `validate`.
    ///
    /// # Panics
    /// If it is not refused, or is refused with another error.
    pub fn then_rejected_with<E: StdError + 'static>(self) -> Self {
        let name = std::any::type_name::<E>();
        match &self.outcome {
            Ok(found) => panic!("expected a refusal with {name}, happened {}", shown(found)),
            Err(error) => assert!(error.is::<E>(), "expected a refusal with {name}, refused: {error:?}"),
        }
        self
    }

    /// Asserts that it is refused, with any error.
    ///
    /// # Panics
    /// If it is not refused.
    pub fn then_rejected(self) -> Self {
        if let Ok(found) = &self.outcome {
            panic!("expected a refusal, happened {}", shown(found));
        }
        self
    }

    /// Runs assertions on the state. After a refusal it is the state before the decision.
    pub fn then_state(self, check: impl FnOnce(&T)) -> Self {
        check(&self.state);
        self
    }
}

fn encode<T: Aggregate>(event: &T::Event) -> Encoded {
    T::Codec::encode(event).unwrap_or_else(|error| panic!("an event does not encode: {error}"))
}

/// Applies an event as a store does, to a state that has had `before` events.
fn apply<T: Aggregate>(state: &mut T, before: usize, happened: &Happened) -> Result<(), BoxError> {
    let sequence = Sequence::new(i64::try_from(before)? + 1)?;
    let time = happened.metadata.time().map_or_else(|| Timestamp::from_micros(0), Ok)?;
    let event = T::Codec::read_back(&happened.encoded)?;
    state.apply_with(event, &EventContext::new(sequence, time, &happened.metadata))
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

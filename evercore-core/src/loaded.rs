//! An aggregate that the application has loaded.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use crate::aggregate::Aggregate;
use crate::context::EventContext;
use crate::error::{BoxError, Result};
use crate::ids::{AggregateId, Sequence};
use crate::mark::Mark;
use crate::name::Key;
use crate::store_id::StoreId;

/// A handle of an aggregate: its state, id, natural key and sequence. It derefs to the state.
pub struct Loaded<T> {
    store: StoreId,
    id: AggregateId,
    key: Option<Key>,
    sequence: Sequence,
    state: T,
    is_new: bool,
    /// The mark of its last event, if that event was read.
    mark: Option<Mark>,
    /// Set if the state includes events of a unit of work.
    staged_in: Option<Arc<Fate>>,
}

/// The fate of a unit of work: the mark of its events once it has committed.
pub(crate) type Fate = OnceLock<Mark>;

impl<T> Loaded<T> {
    /// A handle of an aggregate of this store before its first event.
    pub(crate) fn new(store: StoreId, id: AggregateId, key: Option<Key>, state: T) -> Self {
        Self { store, id, key, sequence: Sequence::ZERO, state, is_new: false, mark: None, staged_in: None }
    }

    /// The same, for an aggregate that the current call makes.
    pub(crate) fn created(self) -> Self {
        Self { is_new: true, ..self }
    }

    /// The same aggregate with the state of a snapshot.
    pub(crate) fn at(self, sequence: Sequence, state: T) -> Self {
        Self { sequence, state, ..self }
    }

    /// The same with the mark of the last event in the state.
    pub(crate) fn marked(self, mark: Option<Mark>) -> Self {
        Self { mark, ..self }
    }

    /// The mark of the last event in the state, if it is known.
    pub(crate) fn mark(&self) -> Option<Mark> {
        let mark = self.staged_in.as_ref().map_or(self.mark, |unit| unit.get().copied());
        mark.filter(|_| self.sequence > Sequence::ZERO)
    }

    pub(crate) fn staged_in(mut self, unit: &Arc<Fate>) -> Self {
        self.staged_in = Some(Arc::clone(unit));
        self
    }

    /// Whether the state includes events of another unit that are not committed.
    pub(crate) fn is_stale(&self, unit: &Arc<Fate>) -> bool {
        self.staged_in.as_ref().is_some_and(|other| !Arc::ptr_eq(other, unit) && other.get().is_none())
    }

    /// The store from which it was loaded.
    pub(crate) fn store(&self) -> StoreId {
        self.store
    }

    pub(crate) fn set_key(&mut self, key: Key) {
        self.key = Some(key);
    }

    /// The aggregate's id.
    pub fn id(&self) -> AggregateId {
        self.id
    }

    /// Its natural key, if it has one.
    pub fn key(&self) -> Option<&Key> {
        self.key.as_ref()
    }

    /// The sequence of the last event in the state, including events that are staged in a unit of work.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }

    /// Whether the call that returned this handle made the aggregate. `create` always does; `load_or_create` does if there
    /// was none. It stays true after events are recorded and after the commit. A handle from `load` is never new, not even
    /// within the unit that made the aggregate.
    ///
    /// ```
    /// # use evercore_core::{Aggregate, Result, UnitOfWork};
    /// async fn open<T: Aggregate>(work: &mut UnitOfWork, key: &str, opened: T::Event) -> Result<()> {
    ///     let mut account = work.load_or_create::<T>(key).await?;
    ///     if account.is_new() {
    ///         work.record(&mut account, opened)?;
    ///     }
    ///     Ok(())
    /// }
    /// ```
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// The state.
    pub fn state(&self) -> &T {
        &self.state
    }

    /// The state alone.
    pub fn into_state(self) -> T {
        self.state
    }
}

impl<T: Aggregate> Loaded<T> {
    /// Applies the next event. After an error the handle must not be used again.
    pub(crate) fn advance(&mut self, event: T::Event, context: &EventContext<'_>) -> Result<(), BoxError> {
        self.state.apply_with(event, context)?;
        self.sequence = self.sequence.next();
        Ok(())
    }
}

impl<T> Deref for Loaded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.state
    }
}

impl<T: Clone> Clone for Loaded<T> {
    fn clone(&self) -> Self {
        Self {
            store: self.store,
            id: self.id,
            key: self.key.clone(),
            sequence: self.sequence,
            state: self.state.clone(),
            is_new: self.is_new,
            mark: self.mark,
            staged_in: self.staged_in.clone(),
        }
    }
}

/// Shows id and sequence, not the state.
impl<T> fmt::Debug for Loaded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded")
            .field("id", &self.id)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

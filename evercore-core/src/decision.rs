//! Decisions: pure functions from a state to events, and how the store carries them out.

use crate::aggregate::{Aggregate, aggregate_type};
use crate::batch::Receipt;
use crate::engine::Target;
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::name::{CommandId, Key};
use crate::retry::Attempts;
use crate::store::EventStore;
use crate::target::IntoTarget;

/// What a decision may return: no event, one or several, or a refusal.
///
/// Implemented for `Vec`, arrays and `Option` of events, and for a `Result` of these with an error of the user's.
pub trait Decision<E> {
    /// The events, in order.
    ///
    /// # Errors
    /// The user's refusal; it comes back as the source of [`Rejected`](ErrorKind::Rejected).
    fn into_events(self) -> Result<Vec<E>, BoxError>;
}

impl<E> Decision<E> for Vec<E> {
    fn into_events(self) -> Result<Self, BoxError> {
        Ok(self)
    }
}

impl<E, const N: usize> Decision<E> for [E; N] {
    fn into_events(self) -> Result<Vec<E>, BoxError> {
        Ok(self.into())
    }
}

impl<E> Decision<E> for Option<E> {
    fn into_events(self) -> Result<Vec<E>, BoxError> {
        Ok(self.into_iter().collect())
    }
}

impl<E, D: Decision<E>, R: Into<BoxError>> Decision<E> for Result<D, R> {
    fn into_events(self) -> Result<Vec<E>, BoxError> {
        self.map_err(Into::into)?.into_events()
    }
}

impl EventStore {
    /// Loads, decides, commits; and again on fresh state if somebody was faster.
    ///
    /// The decision sees the state and returns what is to happen: events, none, or an error of its own. It must have
    /// no effects, since it may run several times.
    ///
    /// # Errors
    /// [`Rejected`](ErrorKind::Rejected) with the decision's own error as its source, not tried again; otherwise as
    /// [`load`](Self::load), [`record`](crate::UnitOfWork::record) and [`commit`](crate::UnitOfWork::commit), the
    /// conflict only after the last attempt.
    pub async fn update<T, F, D>(&self, target: impl IntoTarget, decide: F) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let target = target.into_target(&aggregate_type::<T>()?)?;
        self.decide(target, false, None, decide).await
    }

    /// As [`update`](Self::update), for an aggregate that is made if there is none with this natural key.
    ///
    /// # Errors
    /// As [`update`](Self::update), but never [`NotFound`](ErrorKind::NotFound).
    pub async fn update_or_create<T, F, D>(&self, key: impl AsRef<str>, decide: F) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let target = Target::Key(aggregate_type::<T>()?, Key::new(key)?);
        self.decide(target, true, None, decide).await
    }

    /// As [`update`](Self::update), once per command id: if the command took effect before, its first receipt comes
    /// back and nothing is decided.
    ///
    /// # Errors
    /// As [`update`](Self::update), and [`CommandAbandoned`](ErrorKind::CommandAbandoned). After
    /// [`OutcomeUnknown`](ErrorKind::OutcomeUnknown), call it again with the same id.
    pub async fn update_once<T, F, D>(
        &self,
        command: CommandId,
        target: impl IntoTarget,
        decide: F,
    ) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let target = target.into_target(&aggregate_type::<T>()?)?;
        self.decide(target, false, Some(command), decide).await
    }

    async fn decide<T, F, D>(
        &self,
        target: Target,
        create: bool,
        command: Option<CommandId>,
        mut decide: F,
    ) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let mut attempts = Attempts::new(self.retry_policy());
        loop {
            let result = self.decide_once(&target, create, command.as_ref(), &mut decide).await;
            let Err(error) = result else { return result };
            let was_first = command.is_some() && matches!(error.kind(), ErrorKind::CommandReused);
            if !(was_first || error.is_retryable()) || !attempts.pause(self).await {
                return Err(error);
            }
        }
    }

    async fn decide_once<T, F, D>(
        &self,
        target: &Target,
        create: bool,
        command: Option<&CommandId>,
        decide: &mut F,
    ) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let mut work = self.begin();
        if let Some(command) = command {
            if let Some(first) = self.receipt(command).await? {
                return Ok(first);
            }
            work.set_command_id(command.clone());
        }
        let mut aggregate = match target {
            Target::Key(_, key) if create => work.load_or_create::<T>(key).await?,
            Target::Key(_, key) => work.load::<T>(key).await?,
            Target::Id(id) => work.load::<T>(*id).await?,
        };
        let events = decide(&aggregate).into_events().map_err(Error::rejected)?;
        work.record_all(&mut aggregate, events)?;
        work.commit().await
    }
}

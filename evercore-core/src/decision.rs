//! Decisions: pure functions from a state to events, and the calls that carry them out.

use crate::aggregate::{Aggregate, aggregate_type};
use crate::batch::Receipt;
use crate::command::{Command, CommandTarget};
use crate::error::{BoxError, Error, Result};
use crate::name::Key;
use crate::retry::{Attempts, Once};
use crate::store::EventStore;
use crate::target::{IntoTarget, Target};

/// The result of a decision: no event, one or several, or a refusal.
///
/// Implemented for `Vec`, arrays and `Option` of events, and for a `Result` of these with the user's error.
pub trait Decision<E> {
    /// The events, in order.
    ///
    /// # Errors
    /// The user's refusal; it comes back as the source of [`Rejected`](crate::ErrorKind::Rejected).
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
    /// Loads the aggregate, decides, and commits. After a conflict it does so again with the new state.
    ///
    /// The decision sees the state and returns events, no events, or its own error. It must have no effects,
    /// since it may run several times.
    ///
    /// Updates of one aggregate through one store and its clones run one after the other, in the order of the calls, so
    /// they do not conflict with each other. Updates of other processes can conflict. If an update does not end, the next
    /// one waits for a second and then passes it. An update of the same aggregate from inside the decision waits that long
    /// too.
    ///
    /// Updates by natural key and updates by id have different queues, since the key is not looked up first. After a first
    /// conflict they share one. So name an aggregate that is written often always in the same way.
    ///
    /// # Errors
    /// [`Rejected`](crate::ErrorKind::Rejected) with the decision's error as its source, without another attempt; those of
    /// [`load`](Self::load), [`record`](crate::UnitOfWork::record) and [`commit`](crate::UnitOfWork::commit), a conflict
    /// only after the last attempt.
    pub async fn update<T, F, D>(&self, target: impl IntoTarget, decide: F) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let target = target.into_target(&aggregate_type::<T>()?)?;
        self.decide(target, false, None, decide).await
    }

    /// As [`update`](Self::update), but makes the aggregate if there is none with this natural key.
    ///
    /// # Errors
    /// As [`update`](Self::update), but never [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn update_or_create<T, F, D>(&self, key: impl AsRef<str>, decide: F) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let target = Target::Key(aggregate_type::<T>()?, Key::new(key)?);
        self.decide(target, true, None, decide).await
    }

    /// As [`update`](Self::update), once per command: if the command took effect before, this returns its first receipt and
    /// decides nothing. This also holds if the command comes twice at the same time.
    ///
    /// The same id for another target, or with another word, is a mistake and is refused; see [`Command`]. A refusal by the
    /// decision is not remembered: if the same command comes again, it is decided again.
    ///
    /// # Errors
    /// As [`update`](Self::update), [`CommandReused`](crate::ErrorKind::CommandReused) and
    /// [`CommandAbandoned`](crate::ErrorKind::CommandAbandoned). After [`OutcomeUnknown`](crate::ErrorKind::OutcomeUnknown), call it
    /// again with the same command.
    pub async fn update_once<T, F, D>(
        &self,
        command: impl Into<Command> + Send,
        target: impl IntoTarget,
        decide: F,
    ) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let target = target.into_target(&aggregate_type::<T>()?)?;
        self.decide(target, false, Some(command.into()), decide).await
    }

    /// As [`update_once`](Self::update_once), but makes the aggregate if there is none with this natural key.
    ///
    /// # Errors
    /// As [`update_once`](Self::update_once), but never [`NotFound`](crate::ErrorKind::NotFound).
    pub async fn update_or_create_once<T, F, D>(
        &self,
        command: impl Into<Command> + Send,
        key: impl AsRef<str> + Send,
        decide: F,
    ) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let target = Target::Key(aggregate_type::<T>()?, Key::new(key)?);
        self.decide(target, true, Some(command.into()), decide).await
    }

    async fn decide<T, F, D>(
        &self,
        target: Target,
        create: bool,
        command: Option<Command>,
        mut decide: F,
    ) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let once = match command {
            Some(command) => {
                let aggregate_type = aggregate_type::<T>()?;
                let fingerprint = command.fingerprint([CommandTarget::of(&aggregate_type, &target)]);
                Some(Once { command, fingerprint })
            }
            None => None,
        };
        let mut attempts = Attempts::new(self);
        attempts.take_turn(&target).await;
        loop {
            let error = match self.decide_once(&target, create, once.as_ref(), &mut decide).await {
                Ok(receipt) => return Ok(receipt),
                Err(error) => error,
            };
            if error.is_retryable() && attempts.go_on(&error).await {
                continue;
            }
            return match &once {
                Some(once) => once.receipt_or(self, error).await,
                None => Err(error),
            };
        }
    }

    async fn decide_once<T, F, D>(
        &self,
        target: &Target,
        create: bool,
        once: Option<&Once>,
        decide: &mut F,
    ) -> Result<Receipt>
    where
        T: Aggregate,
        F: FnMut(&T) -> D + Send,
        D: Decision<T::Event> + Send,
    {
        let mut work = self.begin();
        if let Some(once) = once {
            if let Some(first) = once.receipt(self).await? {
                return Ok(first);
            }
            once.mark(&mut work);
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

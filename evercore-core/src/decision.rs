//! Decisions: pure functions from a state to events, and how the store carries them out.

use crate::aggregate::{Aggregate, aggregate_type};
use crate::batch::Receipt;
use crate::command::{Command, CommandTarget};
use crate::engine::Target;
use crate::error::{BoxError, Error, Result};
use crate::name::Key;
use crate::retry::{Attempts, Once};
use crate::store::EventStore;
use crate::target::IntoTarget;

/// What a decision may return: no event, one or several, or a refusal.
///
/// Implemented for `Vec`, arrays and `Option` of events, and for a `Result` of these with an error of the user's.
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
    /// Loads, decides, commits; and again on fresh state if somebody was faster.
    ///
    /// The decision sees the state and returns what is to happen: events, none, or an error of its own. It must have
    /// no effects, since it may run several times.
    ///
    /// Updates of one aggregate through one store and its clones go one after the other, in the order in which they
    /// came, so that they do not race; other processes are met by conflicts alone. Nobody waits longer than a second
    /// for an update that does not end: the next one passes it. An update of the same aggregate from inside the
    /// decision waits that long.
    ///
    /// Updates by natural key and updates by id queue apart, since a key is not looked up before. They meet at the first
    /// conflict, and queue together from there. Name an aggregate that is often written in one way.
    ///
    /// # Errors
    /// [`Rejected`](crate::ErrorKind::Rejected) with the decision's own error as its source, not tried again; otherwise as
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

    /// As [`update`](Self::update), once per command: if it took effect before, its first receipt comes back and
    /// nothing is decided. So it does if the command comes twice at once, and the decision sees what the other one did.
    ///
    /// The same id for another target, or with another word, is a mistake of the caller's and is refused; see
    /// [`Command`]. A refusal is not remembered: the same command may come again, and is decided again.
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

    /// As [`update_once`](Self::update_once), for an aggregate that is made if there is none with this natural key.
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

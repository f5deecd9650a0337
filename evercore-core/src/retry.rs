//! Runs work again after a conflict, in turns or after a pause.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use crate::backoff::backoff;
use crate::batch::Receipt;
use crate::command::Command;
use crate::error::{Error, ErrorKind, Result};
use crate::race::{First, race};
use crate::store::EventStore;
use crate::target::Target;
use crate::turn::Turn;
use crate::unit_of_work::UnitOfWork;

impl EventStore {
    /// Runs the work, and again after a conflict or while the engine is unavailable, within the bounds of the policy.
    ///
    /// After the first conflict about an aggregate the work waits for its turn to write it, as an
    /// [`update`](Self::update) does, and keeps the turn to the end.
    ///
    /// ```
    /// # use evercore_core::{Aggregate, EventStore, Json, Result};
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Clone, Default, Serialize, Deserialize)] struct Doctor { on_call: bool }
    /// # #[derive(Serialize, Deserialize)] enum DoctorEvent { WentHome }
    /// # impl Aggregate for Doctor {
    /// #     const TYPE: &'static str = "doctor"; type Event = DoctorEvent; type Codec = Json;
    /// #     fn apply(&mut self, _: DoctorEvent) { self.on_call = false }
    /// # }
    /// async fn go_home(store: &EventStore) -> Result<()> {
    ///     store.retry(async || {
    ///         let mut work = store.begin();
    ///         let mut alice = work.load::<Doctor>("alice").await?;
    ///         let bob = work.load::<Doctor>("bob").await?;
    ///         if bob.on_call {
    ///             work.guard(&bob)?;
    ///             work.record(&mut alice, DoctorEvent::WentHome)?;
    ///         }
    ///         work.commit().await?;
    ///         Ok(())
    ///     }).await
    /// }
    /// ```
    ///
    /// If the future must be `Send` in a generic place (`tokio::spawn`), write `|| async { … }` or
    /// `|| { let store = store.clone(); async move { … } }`.
    ///
    /// # Errors
    /// The work's error, if it is not [retryable](crate::Error::is_retryable) or if it comes from the last attempt. A
    /// refusal that the work makes with [`Error::rejected`](crate::Error::rejected) is not tried again.
    pub async fn retry<R, F, W>(&self, mut work: F) -> Result<R>
    where
        F: FnMut() -> W,
        W: Future<Output = Result<R>>,
    {
        let mut attempts = Attempts::new(self);
        loop {
            match work().await {
                Err(error) if error.is_retryable() => {
                    if !attempts.go_on(&error).await {
                        return Err(error);
                    }
                }
                result => return result,
            }
        }
    }
}

impl EventStore {
    /// Runs the work once per command. It is [`retry`](Self::retry), but if the command took effect before, this returns
    /// its first receipt and does not run the work. Use it for commands that change several aggregates; for a single
    /// aggregate there is [`update_once`](Self::update_once).
    ///
    /// The work gets a unit of work that carries the command, and commits it, with [`commit`](UnitOfWork::commit) or with
    /// the engine's `commit_with`. Only the command's word shows that an id is used again for another request, so the word
    /// should contain the whole request. If the work fails and no attempt is left, this asks for the receipt once more: the same command may have
    /// arrived twice, and the work may have seen the effect of the other one. A refusal is not remembered.
    ///
    /// ```
    /// # use evercore_core::{Aggregate, Command, CommandId, Error, EventStore, Json, Receipt, Result};
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Clone, Default, Serialize, Deserialize)] struct Account { cents: i64 }
    /// # #[derive(Serialize, Deserialize)] enum AccountEvent { Moved { cents: i64 } }
    /// # impl Aggregate for Account {
    /// #     const TYPE: &'static str = "account"; type Event = AccountEvent; type Codec = Json;
    /// #     fn apply(&mut self, AccountEvent::Moved { cents }: AccountEvent) { self.cents += cents }
    /// # }
    /// async fn transfer(store: &EventStore, request: CommandId, cents: i64) -> Result<Receipt> {
    ///     let command = Command::new(request, format!("{cents} from alice to bob"));
    ///     store.once(command, async |mut work| {
    ///         let mut from = work.load::<Account>("alice").await?;
    ///         let mut to = work.load::<Account>("bob").await?;
    ///         if from.cents < cents {
    ///             return Err(Error::rejected("not enough"));
    ///         }
    ///         work.record(&mut from, AccountEvent::Moved { cents: -cents })?;
    ///         work.record(&mut to, AccountEvent::Moved { cents })?;
    ///         work.commit().await
    ///     }).await
    /// }
    /// ```
    ///
    /// If the future must be `Send` in a generic place (`tokio::spawn`), write `|mut work| async move { … }`.
    ///
    /// # Errors
    /// As [`retry`](Self::retry), [`CommandReused`](ErrorKind::CommandReused) and
    /// [`CommandAbandoned`](ErrorKind::CommandAbandoned). After [`OutcomeUnknown`](ErrorKind::OutcomeUnknown), call it
    /// again with the same command.
    pub async fn once<F, W>(&self, command: Command, mut work: F) -> Result<Receipt>
    where
        F: FnMut(UnitOfWork) -> W,
        W: Future<Output = Result<Receipt>>,
    {
        let once = Once { fingerprint: command.fingerprint([]), command };
        let mut attempts = Attempts::new(self);
        loop {
            let outcome = match once.receipt(self).await {
                Ok(Some(first)) => return Ok(first),
                Ok(None) => {
                    let mut unit = self.begin();
                    once.mark(&mut unit);
                    work(unit).await
                }
                Err(error) => Err(error),
            };
            match outcome {
                Ok(receipt) => return Ok(receipt),
                Err(error) if error.is_retryable() && attempts.go_on(&error).await => {}
                Err(error) => return once.receipt_or(self, error).await,
            }
        }
    }
}

/// A command with its fingerprint.
pub(crate) struct Once {
    pub(crate) command: Command,
    pub(crate) fingerprint: Option<i64>,
}

impl Once {
    /// Sets the command of a unit.
    pub(crate) fn mark(&self, work: &mut UnitOfWork) {
        work.set_command_as(&self.command, self.fingerprint);
    }

    /// Its first receipt, if it took effect.
    pub(crate) async fn receipt(&self, store: &EventStore) -> Result<Option<Receipt>> {
        let known = store.engine().command(self.command.id()).await?;
        known.map(|known| known.answer_to(self.fingerprint)).transpose()
    }

    /// The receipt in place of the error, if the command took effect meanwhile: for another caller that sent it at the same
    /// time, or in an attempt whose answer was lost. The error then only shows that the effect is there.
    pub(crate) async fn receipt_or(&self, store: &EventStore, error: Error) -> Result<Receipt> {
        match self.receipt(store).await {
            Ok(Some(first)) => Ok(first),
            _ => Err(error),
        }
    }
}

/// How long a waiter waits for one holder before it passes it. The holder may be asleep, or wait for this waiter.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many holders a waiter passes before it goes on without the turn.
const WAITS: usize = 10;

/// Counts attempts, and waits for a better moment between them.
pub(crate) struct Attempts<'a> {
    store: &'a EventStore,
    made: u32,
    /// The turns of this work, by queue.
    turns: BTreeMap<u64, Turn<'a>>,
}

impl<'a> Attempts<'a> {
    pub(crate) fn new(store: &'a EventStore) -> Self {
        Self { store, made: 1, turns: BTreeMap::new() }
    }

    /// Waits for the turn to write this aggregate, after all earlier writers of the same store.
    pub(crate) async fn take_turn(&mut self, target: &Target) {
        self.wait_in(self.store.turns().queue_of(target)).await;
    }

    async fn wait_in(&mut self, queue: u64) {
        let turn = self.store.turns().enter(queue);
        for _ in 0..WAITS {
            let Some(holder) = turn.holder() else { break };
            match race(turn.comes(), self.store.engine().pause(PATIENCE)).await {
                First::Left(()) => break,
                First::Right(()) => turn.pass(holder),
            }
        }
        self.turns.insert(queue, turn);
    }

    /// Waits before the next attempt; false if there is none left. After the first conflict about an aggregate this waits
    /// for its turn, after later ones for a pause. TurnQueues help only against conflicts. If the engine is unavailable they are
    /// given back, so that the writers of a queue do not learn it one after the other.
    pub(crate) async fn go_on(&mut self, error: &Error) -> bool {
        let policy = self.store.retry_policy();
        if self.made >= policy.attempts {
            return false;
        }
        self.made += 1;
        crate::observe::run_again();
        if let ErrorKind::Conflict { aggregate, .. } = error.kind() {
            let queue = self.store.turns().queue_of(&Target::Id(*aggregate));
            if !self.turns.contains_key(&queue) {
                self.queue_anew(queue).await;
                return true;
            }
        } else {
            self.turns.clear();
        }
        let pause = backoff(self.made - 1, policy.first_pause, policy.longest_pause);
        if !pause.is_zero() {
            self.store.engine().pause(pause).await;
        }
        true
    }

    /// Gives all turns back and takes them again in one order, so that no two writers wait for each other.
    async fn queue_anew(&mut self, another: u64) {
        let mut queues: Vec<u64> = self.turns.keys().copied().chain([another]).collect();
        self.turns.clear();
        queues.sort_unstable();
        for queue in queues {
            self.wait_in(queue).await;
        }
    }
}

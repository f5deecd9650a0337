//! Runs a subscription: claims partitions, runs them concurrently, and shares them with other workers.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::cursor::{Cursor, CursorStatus};
use super::delivery::{Delivered, Delivery, Sink};
use super::handler::{Batches, Each};
use super::held::{Held, is_passing};
use super::runner::{self, Ended};
use super::settings::Subscription;
use super::step::Step;
use super::stop::Stop;
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::future::BoxFuture;
use crate::name::{OwnerId, SubscriptionName};
use crate::observe;
use crate::race::{First, race};

/// Why a run ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RunEnd {
    /// The shutdown came. Finished work is acknowledged, and the lease is given back.
    ShutDown,
    /// A newer version has taken over.
    Superseded,
}

impl Subscription {
    /// Runs the handler for each event, until the shutdown is ready. The cursor moves after each batch, so after a crash or
    /// a lost lease an event may come again.
    ///
    /// Handlers of one partition run one after the other. The lease is renewed while a handler waits; a handler that blocks
    /// its thread for longer than the lease loses it. While the engine is unavailable, this tries again. While the
    /// subscription is paused, this waits and then goes on.
    ///
    /// A handler owns its data: use a `move` closure that clones an [`Arc`] for each event. A panic counts as an error of
    /// the handler. After a drop of this future the lease is not given back but expires, so end a run by the shutdown.
    ///
    /// ```
    /// # use evercore_core::{EventStore, Result};
    /// # async fn print(store: EventStore, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
    /// let printer = store.subscription("printer")?;
    /// printer
    ///     .run(shutdown, |event| async move {
    ///         println!("{}: {}", event.position(), event.event_type());
    ///         Ok(())
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Rejected`](ErrorKind::Rejected) with the handler's error if the policy is to stop;
    /// [`AlreadyOwned`](ErrorKind::AlreadyOwned) and [`Paused`](ErrorKind::Paused)
    /// [without standby](Self::without_standby); [`NotFound`](ErrorKind::NotFound) if the subscription was removed meanwhile;
    /// [`Invalid`](ErrorKind::Invalid) if the cursors have another number of partitions;
    /// [`CursorAhead`](ErrorKind::CursorAhead) if the log has lost its end; those of the engine.
    pub async fn run<F, H>(&self, shutdown: impl Future<Output = ()> + Send, handler: F) -> Result<RunEnd>
    where
        F: Fn(Delivered) -> H + Send + Sync + 'static,
        H: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        self.run_sink(shutdown, Each(handler)).await
    }

    /// As [`run`](Self::run), with all events of a batch together. After a failure they come one by one, to find the event
    /// at fault, so the events before it come a second time.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub async fn run_batches<F, H>(
        &self,
        shutdown: impl Future<Output = ()> + Send,
        handler: F,
    ) -> Result<RunEnd>
    where
        F: Fn(Delivery) -> H + Send + Sync + 'static,
        H: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        self.run_sink(shutdown, Batches(handler)).await
    }

    /// As [`run`](Self::run), with an engine's projection. Its handler writes in the transaction that moves the cursor, so
    /// each event counts exactly once.
    ///
    /// # Errors
    /// As [`run`](Self::run); [`Invalid`](ErrorKind::Invalid) if the projection belongs to another store.
    pub async fn run_sink(
        &self,
        shutdown: impl Future<Output = ()> + Send,
        sink: impl Sink + 'static,
    ) -> Result<RunEnd> {
        let mut worker = Worker::new(self.clone(), Arc::new(sink))?;
        let stop = Arc::clone(&worker.stop);
        let (mut shutdown, mut work) = (pin!(shutdown), pin!(worker.work()));
        poll_fn(|context| {
            if !stop.is_set() && shutdown.as_mut().poll(context).is_ready() {
                stop.set_now();
            }
            work.as_mut().poll(context)
        })
        .await
    }
}

struct Worker {
    subscription: Subscription,
    owner: OwnerId,
    sink: Arc<dyn Sink>,
    stop: Arc<Stop>,
    runners: Vec<(u32, BoxFuture<'static, Ended>)>,
    /// The try to get one more cursor; it waits before it ends.
    claiming: Option<BoxFuture<'static, Result<Claimed>>>,
    has_failed: Option<Error>,
    /// How many leases in a row were lost without progress. The next claim comes after a pause.
    losses: u32,
}

enum Claimed {
    /// One more.
    One(Box<Held>),
    /// None for now. The wait is over already.
    None,
    /// There will be none any more.
    Superseded,
}

/// The cursors of the subscription by owner.
struct CursorOwners {
    free: Vec<u32>,
    /// The owned cursors that no other worker asks for.
    owned: HashMap<OwnerId, Vec<u32>>,
    /// How many cursors this worker asks for already. Their owners may notice that much later.
    asked: usize,
    is_there: bool,
    is_retired: bool,
}

impl Worker {
    fn new(subscription: Subscription, sink: Arc<dyn Sink>) -> Result<Self> {
        let owner = subscription.new_owner()?;
        let (stop, runners) = (Arc::default(), Vec::new());
        Ok(Self { subscription, owner, sink, stop, runners, claiming: None, has_failed: None, losses: 0 })
    }

    async fn work(&mut self) -> Result<RunEnd> {
        let partitions = self.subscription.settings.partitions as usize;
        match declare(self.subscription.clone(), Arc::clone(&self.stop)).await {
            Err(error) if matches!(error.kind(), ErrorKind::Superseded) => return Ok(RunEnd::Superseded),
            declared => declared?,
        }
        loop {
            if self.stop.is_set() && self.runners.is_empty() && self.claiming.is_none() {
                return self.has_failed.take().map_or(Ok(RunEnd::ShutDown), Err);
            }
            if self.claiming.is_none() && !self.stop.is_set() && self.runners.len() < partitions {
                let held = self.runners.iter().map(|(partition, _)| *partition).collect();
                self.claiming = Some(Box::pin(claim(
                    self.subscription.clone(),
                    self.owner.clone(),
                    held,
                    Arc::clone(&self.stop),
                    self.losses,
                )));
            }
            if let Some(end) = self.next().await? {
                return Ok(end);
            }
        }
    }

    /// Until a runner ends, or a claim does. After the shutdown both do soon: a lease that was just got is given back.
    async fn next(&mut self) -> Result<Option<RunEnd>> {
        match poll_fn(|context| self.poll(context)).await {
            First::Left(ended) => Ok(self.note_end(ended)),
            First::Right(claimed) => self.note_claim(claimed),
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<First<Ended, Result<Claimed>>> {
        for index in 0..self.runners.len() {
            if let Poll::Ready(ended) = self.runners[index].1.as_mut().poll(context) {
                drop(self.runners.swap_remove(index));
                return Poll::Ready(First::Left(ended));
            }
        }
        if let Some(claiming) = &mut self.claiming
            && let Poll::Ready(claimed) = claiming.as_mut().poll(context)
        {
            self.claiming = None;
            return Poll::Ready(First::Right(claimed));
        }
        Poll::Pending
    }

    fn note_end(&mut self, ended: Ended) -> Option<RunEnd> {
        self.stop.set_held(self.runners.len());
        match ended {
            Ended::Stopped | Ended::GivenUp => None,
            Ended::Lost { has_moved } => {
                self.losses = if has_moved { 0 } else { self.losses.saturating_add(1) };
                None
            }
            Ended::Superseded if self.has_failed.is_none() => {
                self.runners.is_empty().then_some(RunEnd::Superseded)
            }
            Ended::Superseded => None,
            Ended::Failed(error) => {
                // The other runners finish first.
                self.has_failed.get_or_insert(error);
                self.stop.set_now();
                None
            }
        }
    }

    fn note_claim(&mut self, claimed: Result<Claimed>) -> Result<Option<RunEnd>> {
        match claimed {
            Ok(Claimed::One(held)) => {
                let partition = held.context.id.partition;
                let runner = runner::run(*held, Arc::clone(&self.sink), Arc::clone(&self.stop));
                self.runners.push((partition, Box::pin(runner)));
                self.stop.set_held(self.runners.len());
                Ok(None)
            }
            Ok(Claimed::None) => Ok(None),
            Ok(Claimed::Superseded) if self.has_failed.is_none() => {
                Ok(self.runners.is_empty().then_some(RunEnd::Superseded))
            }
            Ok(Claimed::Superseded) => Ok(None),
            Err(error) if self.runners.is_empty() => Err(error),
            // The runners meet it too, if it is in everybody's way.
            Err(_) => Ok(None),
        }
    }
}

/// Makes the cursors as soon as the engine can be reached.
async fn declare(subscription: Subscription, stop: Arc<Stop>) -> Result<()> {
    loop {
        match subscription.declare().await {
            Err(error) if is_passing(&error) && !stop.is_set() => {
                let time = runner::between_claims(subscription.settings.lease);
                race(subscription.store.engine().pause(time), stop.set()).await;
            }
            outcome => return outcome,
        }
    }
}

/// Tries to get one more cursor. If none is free, it waits.
async fn claim(
    subscription: Subscription,
    owner: OwnerId,
    held: Vec<u32>,
    stop: Arc<Stop>,
    losses: u32,
) -> Result<Claimed> {
    let seen = subscription.store.cursor_moves().count();
    if losses > 0 {
        // What lost the last lease may be there still.
        let pause = runner::after_losses(losses, subscription.settings.lease);
        race(subscription.store.engine().pause(pause), stop.set()).await;
        if stop.is_set() {
            return Ok(Claimed::None);
        }
    }
    let outcome = claim_one(&subscription, &owner, &held, &stop).await;
    let must_wait = match &outcome {
        Ok(Claimed::One(_)) => false,
        Ok(Claimed::None | Claimed::Superseded) => true,
        Err(error) if is_passing(error) => true,
        Err(_) if !held.is_empty() => true,
        Err(error) => {
            subscription.settings.is_standby
                && matches!(error.kind(), ErrorKind::AlreadyOwned | ErrorKind::Paused)
        }
    };
    if !must_wait {
        return outcome;
    }
    race(before_next_claim(&subscription, seen), stop.set()).await;
    match outcome {
        Ok(Claimed::Superseded) => Ok(Claimed::Superseded),
        _ => Ok(Claimed::None),
    }
}

/// Waits until a lease may have been given back after this many signals, or may have expired.
pub(crate) async fn before_next_claim(subscription: &Subscription, seen: u64) {
    let (time, store) = (runner::between_claims(subscription.settings.lease), &subscription.store);
    let given_back = store.cursor_moves().after(seen);
    if matches!(race(store.engine().pause(time), given_back).await, First::Right(())) {
        // A ring may come with each move of a cursor: not each of them is worth a query.
        store.engine().pause(time / 10).await;
    }
}

async fn claim_one(
    subscription: &Subscription,
    owner: &OwnerId,
    held: &[u32],
    stop: &Stop,
) -> Result<Claimed> {
    let mut owners = CursorOwners::at(subscription, owner, held).await?;
    if owners.is_retired && !owners.is_there {
        return Ok(Claimed::Superseded);
    }
    if !owners.is_there {
        let message = format!("subscription \"{}\" was removed", subscription.name);
        return Err(Error::new(ErrorKind::NotFound, message));
    }
    // In a random order, since workers that start together would all claim the same cursor.
    if !owners.free.is_empty() {
        let first = crate::backoff::random_bits() as usize % owners.free.len();
        owners.free.rotate_left(first);
    }
    let mut refused = Error::already_owned(&subscription.cursor_id(0));
    for partition in owners.free.drain(..) {
        match Held::claim(subscription, partition, owner, stop.flag()).await {
            Ok(held) => return Ok(Claimed::One(Box::new(held))),
            Err(error) if matches!(error.kind(), ErrorKind::AlreadyOwned | ErrorKind::Paused) => {
                refused = error;
            }
            // Just now; the next query shows whether that was the last.
            Err(error) if matches!(error.kind(), ErrorKind::Superseded) => {}
            Err(error) => return Err(error),
        }
    }
    want_one(subscription, owner, held, &owners).await?;
    Err(refused)
}

/// Asks the owner with the most cursors for one, if it has at least two more than this worker. A cursor that was asked for
/// counts as given.
async fn want_one(
    subscription: &Subscription,
    owner: &OwnerId,
    held: &[u32],
    owners: &CursorOwners,
) -> Result<()> {
    let Some(most) = owners.owned.values().max_by_key(|owned| owned.len()) else { return Ok(()) };
    if most.len() < held.len() + owners.asked + 2 {
        return Ok(());
    }
    let which = most[crate::backoff::random_bits() as usize % most.len()];
    let want = Step::Want { owner: owner.clone(), time: subscription.settings.lease };
    subscription.store.engine().step(&subscription.cursor_id(which), &want).await?;
    observe::lease_changed(&subscription.cursor_id(which), "wanted");
    Ok(())
}

impl CursorOwners {
    async fn at(subscription: &Subscription, owner: &OwnerId, held: &[u32]) -> Result<Self> {
        let name: &SubscriptionName = &subscription.name;
        let found = subscription.store.engine().cursors(Some(name)).await?;
        let own = |cursor: &&Cursor| cursor.id.version == subscription.settings.version;
        let mut owners =
            Self { free: Vec::new(), owned: HashMap::new(), asked: 0, is_there: false, is_retired: false };
        for cursor in found.cursors.iter().filter(own) {
            let partition = cursor.id.partition;
            if cursor.status == CursorStatus::Retired {
                owners.is_retired = true;
                continue;
            }
            owners.is_there = true;
            match &cursor.owner {
                Some(other) if other != owner && cursor.is_owned(found.now) => {
                    match cursor.wanted_by.as_ref().filter(|_| cursor.wanted_until > found.now) {
                        Some(wanted) => owners.asked += usize::from(wanted == owner),
                        None => owners.owned.entry(other.clone()).or_default().push(partition),
                    }
                }
                _ if held.contains(&partition) => {}
                _ => owners.free.push(partition),
            }
        }
        Ok(owners)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_may_be_spawned_on_any_thread() {
        fn is_send<T: Send>(_: &dyn Fn(&'static Subscription) -> T) {}
        is_send(&|it| it.run(std::future::pending(), async |_| Ok(())));
        is_send(&|it| it.run_batches(std::future::pending(), async |_| Ok(())));
        is_send(&|it| it.claim());
    }
}

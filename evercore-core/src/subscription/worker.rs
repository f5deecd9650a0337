//! Whoever runs a subscription: claims partitions, runs them beside each other, shares them with others.

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

/// Why a subscription is not run any more, without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RunEnd {
    /// The shutdown came: what was done is acknowledged, nothing else, and the lease is given back.
    ShutDown,
    /// A newer version has taken over.
    Superseded,
}

impl Subscription {
    /// Runs the handler for each event, until the shutdown is ready. The cursor is moved after each batch, so an event
    /// may come again: after a crash, after a lost lease.
    ///
    /// Handlers of one partition run one after the other. The lease is renewed while a handler waits for something; one
    /// that blocks its thread for longer than the lease loses it. Where an engine is out of reach, it is tried again. While
    /// the subscription is paused this waits, and goes on when it is resumed.
    ///
    /// A handler owns what it needs: a `move` closure that clones an [`Arc`] for each event. One that panics has failed, as
    /// if it had returned an error. If this future is dropped, the lease is not given back but ends by itself; so end it by
    /// the shutdown.
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
    /// [`AlreadyOwned`](ErrorKind::AlreadyOwned) and [`Paused`](ErrorKind::Paused) if it is
    /// [not to wait](Self::without_standby); [`NotFound`](ErrorKind::NotFound) if the subscription was removed meanwhile;
    /// [`Invalid`](ErrorKind::Invalid) if the number of partitions is another than before;
    /// [`CursorAhead`](ErrorKind::CursorAhead) if the log has lost its end; what else the engine says.
    pub async fn run<F, H>(&self, shutdown: impl Future<Output = ()> + Send, handler: F) -> Result<RunEnd>
    where
        F: Fn(Delivered) -> H + Send + Sync + 'static,
        H: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        self.run_sink(shutdown, Each(handler)).await
    }

    /// The same for all events of a batch together. After a failure its events come one by one, to find the one at fault:
    /// those before it for a second time.
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

    /// The same into an engine's projection, whose handler writes in the transaction that moves the cursor: exactly once.
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
    /// How many leases in a row were lost before anything was done: the next claim comes after a pause.
    losses: u32,
}

enum Claimed {
    /// One more.
    One(Box<Held>),
    /// None for now; that was waited for already.
    None,
    /// There will be none any more.
    Superseded,
}

/// Which cursors there are, and who has them.
struct CursorOwners {
    free: Vec<u32>,
    /// By owner, those whose lease holds and for which nobody asks.
    owned: HashMap<OwnerId, Vec<u32>>,
    /// How many we ask for already: their owners let go when they see it, which may be many looks later.
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
                // The others end in peace first.
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

/// Sees to it that there are cursors, as soon as the engine can be reached.
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

/// Tries to get one more cursor. Where there is none to be had, that is waited for.
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

/// Until a lease may have been given back, since so many rings, or has ended by itself.
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
    // Not all of them in the same order: who comes at the same time wants the same.
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

/// Asks whoever has most for one, if that is at least two more than we have; what was asked for counts as given.
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

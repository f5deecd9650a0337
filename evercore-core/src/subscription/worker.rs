//! Runs a subscription: claims partitions, runs them concurrently, and shares them with other workers.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::cursor::{Cursor, CursorStatus};
use super::delivery::{Delivered, Delivery, Sink};
use super::handler::{Batches, Each, HandlerTime};
use super::held::Held;
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
    /// A newer version has taken over, and this one was removed or does not stand by.
    Superseded,
}

impl Subscription {
    /// Runs the handler for each event, until the shutdown is ready. The cursor moves after each batch and
    /// [each second](Self::with_ack_every), so after a crash or a lost lease an event may come again.
    ///
    /// Handlers of one partition run one after the other. The lease is renewed while a handler waits; a handler that blocks
    /// its thread for longer than the lease loses it, unless there is a [spawner](Self::with_spawner).
    ///
    /// Nothing but the shutdown, the removal of this version or of the subscription, and [`Stop`](crate::FailureAction::Stop)
    /// ends a run that has begun. Whatever the store answers, also that it is read-only, full, or refuses the login, the run
    /// tries again, at least each second. Tracing warns of it, and a metric counts it. While the subscription is paused, the
    /// run waits, and also while its version is retired: it goes on if an operator
    /// [rolls back](crate::EventStore::roll_back) to it. A partition whose event fails [rests](crate::FailureAction::Rest), and the others go on.
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
    /// [`Rejected`](ErrorKind::Rejected) with the handler's error if the policy or the handler asks for
    /// [`Stop`](crate::FailureAction::Stop); [`NotFound`](ErrorKind::NotFound) if the subscription was removed meanwhile;
    /// [`AlreadyOwned`](ErrorKind::AlreadyOwned) and [`Paused`](ErrorKind::Paused)
    /// [without standby](Self::without_standby), if it has no partition;
    /// [`Closed`](ErrorKind::Closed) if the engine is closed, since it never answers again.
    ///
    /// Mistakes that show when it begins, before it has read anything: as [`declare`](Self::declare), with
    /// [`CursorAhead`](ErrorKind::CursorAhead) if the stored cursor is past the end of the log,
    /// [`NotAStore`](ErrorKind::NotAStore) and [`SchemaTooNew`](ErrorKind::SchemaTooNew).
    pub async fn run<F, H>(&self, shutdown: impl Future<Output = ()> + Send, handler: F) -> Result<RunEnd>
    where
        F: Fn(Delivered) -> H + Send + Sync + 'static,
        H: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        let each = Each { handle: handler, time: self.handler_time(), ack: self.settings.ack };
        self.run_sink(shutdown, each).await
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
        self.run_sink(shutdown, Batches { handle: handler, time: self.handler_time() }).await
    }

    fn handler_time(&self) -> HandlerTime {
        HandlerTime { engine: Arc::clone(self.store.engine()), at_most: self.settings.handler_time }
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
        let mut worker = Worker::new(self.clone(), self.strict(sink))?;
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
    /// How often in a row the engine has failed.
    failures: u32,
    /// Whether it has had a cursor.
    has_run: bool,
    /// Whether it has read the log.
    has_read: bool,
    /// How many leases in a row were lost without progress. The next claim comes after a pause.
    losses: u32,
}

enum Claimed {
    /// One more.
    One(Box<Held>),
    /// None for now, perhaps because of an error of the engine. The wait is over already.
    None(Option<Error>),
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
    has_others: bool,
    /// A cursor cannot be claimed yet, because its handler has failed.
    rests: bool,
    /// A cursor cannot be claimed yet, because another owner asks for it, such as a newer version that takes over.
    stands_still: bool,
}

impl Worker {
    fn new(subscription: Subscription, sink: Arc<dyn Sink>) -> Result<Self> {
        let owner = subscription.new_owner()?;
        let (stop, runners) = (Arc::default(), Vec::new());
        Ok(Self {
            subscription,
            owner,
            sink,
            stop,
            runners,
            claiming: None,
            has_failed: None,
            failures: 0,
            has_run: false,
            has_read: false,
            losses: 0,
        })
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
                    !self.has_run,
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
        match ended {
            Ended::Stopped | Ended::GivenUp | Ended::Rests => None,
            Ended::Lost { has_moved, has_read, error } => {
                self.has_read |= has_read;
                match error {
                    // It is another store, or a copy from before.
                    Some(error)
                        if matches!(error.kind(), ErrorKind::CursorAhead { .. }) && !self.has_read =>
                    {
                        return self.note_end(Ended::Failed(error));
                    }
                    Some(error) => self.note_failure(&error),
                    None => {}
                }
                self.losses = if has_moved { 0 } else { self.losses.saturating_add(1) };
                None
            }
            // The next claim decides whether it stands by.
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
                self.failures = 0;
                self.has_run = true;
                Ok(None)
            }
            Ok(Claimed::None(error)) => {
                if let Some(error) = error {
                    self.note_failure(&error);
                }
                Ok(None)
            }
            Ok(Claimed::Superseded) if self.has_failed.is_none() => {
                Ok(self.runners.is_empty().then_some(RunEnd::Superseded))
            }
            Ok(Claimed::Superseded) => Ok(None),
            Err(error) if self.runners.is_empty() => Err(self.has_failed.take().unwrap_or(error)),
            // The runners meet it too, if it is in everybody's way.
            Err(_) => Ok(None),
        }
    }

    fn note_failure(&mut self, error: &Error) {
        self.failures = self.failures.saturating_add(1);
        observe::store_failed(&self.subscription.cursor_id(0), error, self.failures);
    }
}

/// Makes the cursors as soon as the engine works. A mistake of the program ends this at once.
async fn declare(subscription: Subscription, stop: Arc<Stop>) -> Result<()> {
    let mut failures = 0;
    loop {
        match subscription.declare().await {
            Err(error) if !is_mistake(&error) && !stop.is_set() => {
                failures += 1;
                observe::store_failed(&subscription.cursor_id(0), &error, failures);
                let time = runner::between_claims(subscription.settings.lease);
                race(subscription.store.engine().pause(time), stop.set()).await;
            }
            outcome => return outcome,
        }
    }
}

/// An error that waiting does not mend, when a run begins.
fn is_mistake(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Invalid
            | ErrorKind::InvalidName
            | ErrorKind::CursorAhead { .. }
            | ErrorKind::Superseded
            | ErrorKind::NotAStore
            | ErrorKind::SchemaTooNew { .. }
            | ErrorKind::Closed
    )
}

/// Tries to get one more cursor. If none is free, it waits.
async fn claim(
    subscription: Subscription,
    owner: OwnerId,
    held: Vec<u32>,
    stop: Arc<Stop>,
    losses: u32,
    is_first: bool,
) -> Result<Claimed> {
    let seen = subscription.store.cursor_moves().count();
    if losses > 0 {
        // What lost the last lease may be there still.
        let pause = runner::after_losses(losses, subscription.settings.lease);
        race(subscription.store.engine().pause(pause), stop.set()).await;
        if stop.is_set() {
            return Ok(Claimed::None(None));
        }
    }
    let outcome = claim_one(&subscription, &owner, &held, &stop, is_first).await;
    let must_wait = match &outcome {
        Ok(Claimed::One(_)) => false,
        Ok(Claimed::None(_)) => true,
        Ok(Claimed::Superseded) => !held.is_empty(),
        Err(_) if !held.is_empty() => true,
        Err(error) => match error.kind() {
            ErrorKind::AlreadyOwned | ErrorKind::Paused => subscription.settings.is_standby,
            ErrorKind::NotFound | ErrorKind::Closed => false,
            _ => true,
        },
    };
    if !must_wait {
        return outcome;
    }
    race(before_next_claim(&subscription, seen), stop.set()).await;
    match outcome {
        Err(error) if is_busy(&error) => Ok(Claimed::None(None)),
        Err(error) => Ok(Claimed::None(Some(error))),
        claimed => claimed,
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
    is_first: bool,
) -> Result<Claimed> {
    let mut owners = CursorOwners::at(subscription, owner, held).await?;
    if !owners.is_there && owners.is_retired && subscription.settings.is_standby {
        // It goes on if an operator promotes it again.
        return Ok(Claimed::None(None));
    }
    // Only this version was removed.
    if !owners.is_there && (owners.is_retired || owners.has_others) {
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
    // A partition that rests after a failure of this run is nobody else's: the run waits for it.
    let rests = owners.rests && !is_first;
    let mut refused = Error::already_owned(&subscription.cursor_id(0));
    for partition in owners.free.drain(..) {
        match Held::claim(subscription, partition, owner, stop.flag()).await {
            Ok(held) => return Ok(Claimed::One(Box::new(held))),
            Err(error) if is_busy(&error) => {
                refused = error;
            }
            // Just now; the next query shows whether that was the last.
            Err(error) if matches!(error.kind(), ErrorKind::Superseded) => {}
            Err(error) => return Err(error),
        }
    }
    want_one(subscription, owner, held, &owners).await?;
    if rests || owners.stands_still { Ok(Claimed::None(None)) } else { Err(refused) }
}

fn is_busy(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::AlreadyOwned | ErrorKind::Paused)
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
        let mut owners = Self {
            free: Vec::new(),
            owned: HashMap::new(),
            asked: 0,
            is_there: false,
            is_retired: false,
            has_others: found.cursors.iter().any(|it| it.id.version != subscription.settings.version),
            rests: false,
            stands_still: false,
        };
        for cursor in found.cursors.iter().filter(own) {
            let partition = cursor.id.partition;
            // It was removed and made again since this run began.
            if cursor.partitions != subscription.settings.partitions {
                return Err(subscription.other_partitions(cursor.partitions));
            }
            if cursor.status == CursorStatus::Retired {
                owners.is_retired = true;
                continue;
            }
            owners.is_there = true;
            owners.rests |=
                cursor.owner.is_none() && cursor.failure.is_some() && cursor.expires_at > found.now;
            owners.stands_still |= cursor.owner.is_none()
                && cursor.wanted_until > found.now
                && cursor.wanted_by.as_ref().is_some_and(|wanted| wanted != owner);
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

//! One seed: processes run the projection one after another until it has caught up; then it is compared.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use evercore_core::engine::{Advance, Outcome, Sink};
use evercore_core::{
    CursorId, Delivery, Error, ErrorKind, OwnedSubscription, Position, Result, SubscriptionName,
};

use super::ProjectionUnderTest;
use super::fault::Fault;
use super::process::Process;
use super::world::{World, either, until};

/// More lives than this mean that the projection makes no progress.
const LIVES: usize = 1_000;

/// How long a process that asks for deliveries itself waits for the next one before it acknowledges the last.
const UNACKNOWLEDGED: Duration = Duration::from_millis(50);

/// How often a process that asks for deliveries itself repeats a failed one.
const ATTEMPTS: usize = 10;

pub(crate) struct Life<P: ProjectionUnderTest> {
    pub(crate) world: Arc<World>,
    engine: Arc<P::Engine>,
    projection: Arc<P>,
    id: CursorId,
    pub(crate) checks: usize,
}

/// A text that says what went wrong.
type Checked = std::result::Result<(), String>;

impl<P: ProjectionUnderTest> Life<P> {
    pub(crate) async fn new(engine: Arc<P::Engine>, world: Arc<World>) -> Self {
        let projection = Arc::new(P::empty(&engine).await);
        Self { world, engine, projection, id: cursor_named("tortured"), checks: 0 }
    }

    pub(crate) async fn live(&mut self) -> Checked {
        loop {
            for _ in 0..=self.world.below(6) {
                self.world.happen::<P>().await;
            }
            self.world.allow(1 + self.world.below(8));
            self.catch_up().await?;
            self.compare().await?;
            if !self.world.has_more() {
                return Ok(());
            }
        }
    }

    async fn catch_up(&mut self) -> Checked {
        for _ in 0..LIVES {
            if self.world.draws(Fault::NewVersion, 5) {
                self.id.version += 1;
                self.projection = Arc::new(P::empty(&self.engine).await);
                self.world.tell(format!("version {} is built", self.id.version));
            }
            let process = Process::start(&self.world, &self.projection, &self.id);
            let is_exactly_once = process.holds_cursor();
            self.keep(process).await?;
            if is_exactly_once {
                self.compare_with_cursor().await?;
            }
            if self.world.has_caught_up(&self.id).await {
                return Ok(());
            }
        }
        Err(format!("{LIVES} processes have not caught up"))
    }

    /// Runs one process until it stops or dies.
    async fn keep(&self, process: Process<P>) -> Checked {
        let (world, batch) = (Arc::clone(&self.world), self.world.any_batch());
        world.forget_the_last_process();
        let ended = if !process.holds_cursor() && world.draws(Fault::LateAck, 4) {
            let every = 2 + world.below(3);
            world.tell(format!("a process acknowledges each {every}. delivery of at most {batch}"));
            unless_crashed(&world, self.ask(Process { is_asking: true, ..process }, batch, every)).await
        } else {
            world.tell(format!("a process runs with deliveries of at most {batch}"));
            let idle = self.until_idle();
            let stop = until(|| world.state().must_stop);
            let subscription = world.subscription(&self.id, batch);
            unless_crashed(&world, subscription.run_sink(either(stop, idle), process))
                .await
                .map(|it| it.map(drop))
        };
        if ended.is_none() {
            world.end_lease(&self.id).await;
        }
        let stopped = world.state().stopped.take();
        match ended {
            Some(Err(error)) => Err(format!("the subscription stopped: {error:?}")),
            _ => stopped.map_or(Ok(()), |error| Err(format!("the subscription stopped: {error}"))),
        }
    }

    /// Runs processes until the projection has caught up and no fault is left.
    async fn until_idle(&self) {
        loop {
            self.world.caught_up(&self.id, 0).await;
            if !self.world.has_more() || !self.world.one_in(3) {
                return;
            }
            self.world.happen::<P>().await;
        }
    }

    /// A process that claims the cursor and asks for deliveries itself.
    async fn ask(&self, process: Process<P>, batch: usize, every: usize) -> Result<()> {
        let mut owned = self.world.subscription(&self.id, batch).claim().await?;
        match self.ask_on(&process, &mut owned, every).await {
            Err(error) if matches!(error.kind(), ErrorKind::LeaseLost) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => owned.release().await,
        }
    }

    async fn ask_on(&self, process: &Process<P>, owned: &mut OwnedSubscription, every: usize) -> Result<()> {
        let (mut seen, mut last) = (owned.position(), None);
        for count in 1_usize.. {
            if self.world.state().must_stop || seen >= self.world.target().await {
                break;
            }
            let next = async { Some(owned.next().await) };
            let too_late = async {
                self.world.store.engine().pause(UNACKNOWLEDGED).await;
                None
            };
            let Some(delivery) = either(next, too_late).await else {
                // A version takes over only when all that it got is acknowledged, and gets no more before.
                if let Some(delivery) = last.take() {
                    owned.ack(&delivery).await?;
                }
                continue;
            };
            let delivery = delivery?;
            handle(process, owned, &delivery).await?;
            seen = delivery.end();
            if count.is_multiple_of(every) {
                owned.ack(&delivery).await?;
            }
            last = Some(delivery);
        }
        match last {
            Some(delivery) => owned.ack(&delivery).await,
            None => Ok(()),
        }
    }

    async fn compare(&mut self) -> Checked {
        self.checks += 1;
        let kept = self.projection.model().await;
        let rebuilt = self.rebuilt().await?;
        let folded = P::fold(&self.world.events(Position::MAX).await);
        differs(&[("incremental", &kept), ("rebuilt", &rebuilt), ("fold", &folded)])
    }

    /// A sink that moves the cursor together with its writes must always equal the fold up to the cursor.
    async fn compare_with_cursor(&mut self) -> Checked {
        self.checks += 1;
        loop {
            // A write of a dead process may end only now.
            let Some(before) = self.world.cursor(&self.id).await else { return Ok(()) };
            let kept = self.projection.model().await;
            if self.world.cursor(&self.id).await.is_some_and(|after| after.position == before.position) {
                let folded = P::fold(&self.world.events(before.position).await);
                let fold = format!("fold up to position {}", before.position);
                return differs(&[("incremental", &kept), (&fold, &folded)]);
            }
        }
    }

    /// A projection that is built without faults.
    async fn rebuilt(&self) -> std::result::Result<P::Model, String> {
        let (id, projection) = (cursor_named("rebuilt"), P::empty(&self.engine).await);
        let subscription = self.world.subscription(&id, 100);
        let ran = subscription.run_sink(self.world.caught_up(&id, 0), projection.handler()).await;
        ran.map_err(|error| format!("the subscription stopped while building again: {error:?}"))?;
        self.world.store.remove_subscription(&id.subscription).await.unwrap();
        Ok(projection.model().await)
    }
}

/// Lets the handler work on a delivery until it succeeds.
async fn handle<P: ProjectionUnderTest>(
    process: &Process<P>,
    owned: &OwnedSubscription,
    delivery: &Delivery,
) -> Result<()> {
    let (lease, from) = (owned.lease().clone(), owned.position());
    let advance = Advance::new(lease, from, delivery.end(), Duration::from_secs(30));
    let mut failed = None;
    for _ in 0..ATTEMPTS {
        match process.deliver(delivery, &advance).await {
            Outcome::Failed { error, .. } => drop(failed.insert(error)),
            Outcome::Refused(error) => return Err(error),
            // A delivery cannot be acknowledged in part.
            Outcome::Handled(count) if count < delivery.events().len() => {}
            _ => return Ok(()),
        }
    }
    let error = Error::new(ErrorKind::Rejected, format!("the handler failed {ATTEMPTS} times"));
    Err(match failed {
        Some(source) => error.with_source(source),
        None => error,
    })
}

/// Polls until the end or until a crash, and then drops everything.
async fn unless_crashed<T>(world: &World, work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(ended) => Poll::Ready(Some(ended)),
        Poll::Pending if world.state().has_crashed => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    })
    .await
}

/// Compares every model with the last one.
fn differs<M: PartialEq + fmt::Debug>(models: &[(&str, &M)]) -> Checked {
    let Some(((right, truth), others)) = models.split_last() else { return Ok(()) };
    let wrong: Vec<_> = others.iter().filter(|(_, model)| model != truth).map(|(name, _)| *name).collect();
    if wrong.is_empty() {
        return Ok(());
    }
    let all: String = models.iter().map(|(name, model)| format!("\n  {name}: {model:?}")).collect();
    Err(format!("{} differs from {right}{all}", wrong.join(" and ")))
}

fn cursor_named(name: &str) -> CursorId {
    CursorId { subscription: SubscriptionName::new(name).unwrap(), version: 1, partition: 0 }
}

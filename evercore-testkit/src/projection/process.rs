//! A process that runs the handler under test, and the faults at each delivery.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use evercore_core::engine::{Advance, Outcome, Sink};
use evercore_core::{BoxFuture, CursorId, Delivery, Error, ErrorKind, Position, Start};

use super::ProjectionUnderTest;
use super::fault::Fault;
use super::handlers::may_crash_here;
use super::world::{World, either, until};
use crate::tools::poll_at_most;

/// A crash happens at one of this many awaits.
const POLLS: usize = 6;

/// The lease of a process that goes on while another one stands still.
const OTHER_LEASE: Duration = Duration::from_millis(200);

pub(crate) struct Process<P> {
    pub(crate) world: Arc<World>,
    pub(crate) projection: Arc<P>,
    pub(crate) id: CursorId,
    pub(crate) handler: Arc<dyn Sink>,
    /// Whether it asks for deliveries itself, and acknowledges late.
    pub(crate) is_asking: bool,
}

impl<P: ProjectionUnderTest> Process<P> {
    pub(crate) fn start(world: &Arc<World>, projection: &Arc<P>, id: &CursorId) -> Self {
        let handler: Arc<dyn Sink> = Arc::new(projection.handler());
        let (world, projection, id) = (Arc::clone(world), Arc::clone(projection), id.clone());
        Self { world, projection, id, handler, is_asking: false }
    }

    /// A process that asks for deliveries notices a reset only when it acknowledges. It would write into the emptied
    /// projection. In production it must be paused first, too.
    fn is_borne(&self, fault: Fault) -> bool {
        match fault {
            Fault::Reset => !self.is_asking,
            _ => fault.is_for_sinks() || !self.handler.holds_cursor(),
        }
    }

    async fn deliver_now(&self, delivery: &Delivery, advance: &Advance) -> Outcome {
        let (world, is_exactly_once) = (&self.world, self.handler.holds_cursor());
        let in_hand = world.take_in_hand();
        let fault = world.draw(delivery, |fault| self.is_borne(fault));
        // The handler is called at the first poll.
        let work: BoxFuture<'_, Outcome> = Box::pin(async { self.handler.deliver(delivery, advance).await });
        match fault {
            None | Some(Fault::LateAck | Fault::NewVersion) => work.await,
            Some(Fault::CrashBefore) => self.crash().await,
            Some(Fault::CrashInside) => {
                poll_at_most(1 + world.below(POLLS), work).await;
                self.crash().await
            }
            Some(Fault::CrashAfter) => {
                work.await;
                self.crash().await
            }
            Some(Fault::FailBefore) => {
                Outcome::Failed { handled: 0, error: "injected by the torture".into() }
            }
            Some(Fault::FailAfter) => unheard(work.await),
            Some(Fault::LeaseLost) => self.stand_still(work).await,
            // Before the handler, because a sink that holds its cursor must refuse then, and a late handler would
            // write into the emptied projection.
            Some(Fault::Reset) if is_exactly_once => {
                self.reset().await;
                work.await
            }
            Some(Fault::Reset) => {
                let outcome = work.await;
                self.reset().await;
                outcome
            }
            Some(Fault::OlderCursor) => {
                let outcome = work.await;
                self.put_back().await;
                outcome
            }
            Some(Fault::ShutDown) => {
                let outcome = work.await;
                world.state().must_stop = true;
                drop(in_hand);
                may_crash_here().await;
                outcome
            }
            Some(Fault::Arrival) => {
                world.happen::<P>().await;
                work.await
            }
        }
    }

    /// This process does nothing any more. The caller that polls this future drops it.
    async fn crash(&self) -> Outcome {
        self.world.state().has_crashed = true;
        self.world.bury(Arc::clone(&self.handler));
        std::future::pending().await
    }

    /// Polls the handler a few times, lets another process go on, and then lets the handler finish.
    async fn stand_still(&self, mut work: BoxFuture<'_, Outcome>) -> Outcome {
        let world = &self.world;
        let polls = match self.handler.holds_cursor() {
            true => [0, usize::MAX][world.below(2)],
            false => world.below(POLLS),
        };
        let early = poll_at_most(polls, &mut work).await;
        world.end_lease(&self.id).await;
        self.have_another_go_on().await;
        match early {
            Some(outcome) => outcome,
            None => work.await,
        }
    }

    /// Another process without faults, for a few deliveries.
    async fn have_another_go_on(&self) {
        let (world, is_done) = (&self.world, Arc::new(AtomicBool::new(false)));
        let (batch, deliveries) = (world.any_batch(), 1 + world.below(3));
        world.tell(format!("another process goes on, {deliveries} deliveries of at most {batch}"));
        let other = Other {
            handler: Box::new(self.projection.handler()),
            left: AtomicUsize::new(deliveries),
            is_done: Arc::clone(&is_done),
        };
        let is_enough = until(move || is_done.load(Ordering::Acquire));
        let shutdown = either(is_enough, world.caught_up(&self.id, 1));
        // It is dropped with this handler if the process learns meanwhile that it has lost its lease. Then nobody gives
        // the other lease back, so that one is short.
        let subscription = world.subscription(&self.id, batch).with_lease(OTHER_LEASE);
        if let Err(error) = subscription.run_sink(shutdown, other).await {
            world.state().stopped = Some(format!("{error:?}"));
        }
    }

    async fn reset(&self) {
        self.world.store.reset_subscription(&self.id.subscription, Start::Beginning).await.unwrap();
        self.projection.clear().await;
    }

    async fn put_back(&self) {
        let Some(cursor) = self.world.cursor(&self.id).await else { return };
        let stands = usize::try_from(cursor.position.get()).unwrap();
        let to = Position::ZERO.plus(self.world.below(stands + 1));
        self.world.tell(format!("the cursor goes back from {} to {to}", cursor.position));
        self.world.store.reset_subscription(&self.id.subscription, Start::After(to)).await.unwrap();
    }
}

impl<P: ProjectionUnderTest> Sink for Process<P> {
    fn deliver<'a>(&'a self, delivery: &'a Delivery, advance: &'a Advance) -> BoxFuture<'a, Outcome> {
        Box::pin(async move {
            let outcome = self.deliver_now(delivery, advance).await;
            self.world.note(&outcome);
            outcome
        })
    }

    fn tells_which(&self) -> bool {
        self.handler.tells_which()
    }

    fn holds_cursor(&self) -> bool {
        self.handler.holds_cursor()
    }
}

/// The error of a delivery whose outcome is lost.
fn unheard(outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Advanced(_) => {
            Outcome::Refused(Error::new(ErrorKind::OutcomeUnknown, "injected by the torture"))
        }
        Outcome::Handled(_) => Outcome::Failed { handled: 0, error: "injected by the torture".into() },
        other => other,
    }
}

struct Other {
    handler: Box<dyn Sink>,
    left: AtomicUsize,
    is_done: Arc<AtomicBool>,
}

impl Sink for Other {
    fn deliver<'a>(&'a self, delivery: &'a Delivery, advance: &'a Advance) -> BoxFuture<'a, Outcome> {
        Box::pin(async move {
            let outcome = self.handler.deliver(delivery, advance).await;
            if self.left.fetch_sub(1, Ordering::AcqRel) <= 1 {
                self.is_done.store(true, Ordering::Release);
                self.left.store(1, Ordering::Release);
                may_crash_here().await;
            }
            outcome
        })
    }

    fn tells_which(&self) -> bool {
        self.handler.tells_which()
    }

    fn holds_cursor(&self) -> bool {
        self.handler.holds_cursor()
    }
}

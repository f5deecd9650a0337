//! Calls of the engine that several callers make together, as one.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::future::BoxFuture;
use crate::race::{Wakers, lock};

/// A call that takes longer is given up: the runtime on which it depends may be gone.
const STUCK: Duration = Duration::from_secs(30);

/// Makes one call at a time. Questions that come meanwhile are answered by the next call, all together. Whichever caller
/// is polled drives the call, so no task is needed, and a caller that is dropped or is not polled delays no other.
#[derive(Debug)]
pub(crate) struct Together<Q, A> {
    state: Mutex<State<Q, A>>,
    wakers: Arc<Wakers>,
    next: AtomicU64,
}

#[derive(Debug)]
struct State<Q, A> {
    waiting: Vec<(u64, Q)>,
    /// Whether one of them does not want to wait for more.
    is_urgent: bool,
    /// The callers of the call that is under way.
    asked: Vec<u64>,
    call: Slot<A>,
    answers: HashMap<u64, Result<A>>,
}

enum Slot<A> {
    Empty,
    Here(Running<A>),
    /// A caller polls it at this moment.
    Away,
}

impl<A> std::fmt::Debug for Slot<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Empty => "Empty",
            Self::Here(_) => "Here",
            Self::Away => "Away",
        })
    }
}

struct Running<A> {
    since: Instant,
    phase: Phase<A>,
}

enum Phase<A> {
    /// Waits for more questions.
    Gathering(BoxFuture<'static, ()>),
    Asking(BoxFuture<'static, Vec<Result<A>>>),
}

/// How a call is made.
pub(crate) trait Ask<Q, A>: Unpin {
    /// A short pause in which questions gather; `None` for a question that does not want to wait for others.
    fn gather(&self) -> Option<BoxFuture<'static, ()>>;

    /// Asks all questions, and returns as many answers in the same order.
    fn ask(&self, questions: Vec<Q>) -> BoxFuture<'static, Vec<Result<A>>>;
}

impl<Q, A> Default for Together<Q, A> {
    fn default() -> Self {
        let (waiting, asked, answers) = (Vec::new(), Vec::new(), HashMap::new());
        let state = State { waiting, is_urgent: false, asked, call: Slot::Empty, answers };
        Self { state: Mutex::new(state), wakers: Arc::default(), next: AtomicU64::new(0) }
    }
}

impl<Q, A> Together<Q, A> {
    /// Asks a question together with others. The call that answers it begins after this.
    pub(crate) fn ask<H: Ask<Q, A>>(&self, question: Q, how: H) -> Asking<'_, Q, A, H> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.state).waiting.push((number, question));
        let gathering = how.gather();
        lock(&self.state).is_urgent |= gathering.is_none();
        Asking { together: self, number, gathering, how }
    }
}

/// A caller that waits for its answer.
pub(crate) struct Asking<'a, Q, A, H> {
    together: &'a Together<Q, A>,
    number: u64,
    gathering: Option<BoxFuture<'static, ()>>,
    how: H,
}

impl<Q, A, H: Ask<Q, A>> Future for Asking<'_, Q, A, H> {
    type Output = Result<A>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<A>> {
        let together = self.together;
        let Together { state, wakers, .. } = together;
        loop {
            // Before the look, so that nothing that happens after it is missed.
            wakers.add(self.number, context.waker());
            let mut running = {
                let mut state = lock(state);
                if let Some(answer) = state.answers.remove(&self.number) {
                    return Poll::Ready(answer);
                }
                match std::mem::replace(&mut state.call, Slot::Away) {
                    Slot::Away => return Poll::Pending,
                    Slot::Here(running) if running.since.elapsed() < STUCK => running,
                    Slot::Here(_) => {
                        state.call = Slot::Empty;
                        state.answer(Vec::new());
                        continue;
                    }
                    Slot::Empty => {
                        let gathering = self.gathering.take();
                        let gathering = gathering.unwrap_or_else(|| Box::pin(std::future::ready(())));
                        Running { since: Instant::now(), phase: Phase::Gathering(gathering) }
                    }
                }
            };
            let mut lent = Lent { together, is_back: false };
            wakers.listen();
            let waker = Waker::from(Arc::clone(wakers));
            let mut inner = Context::from_waker(&waker);
            let is_urgent = lock(state).is_urgent;
            if let Phase::Gathering(pause) = &mut running.phase
                && (is_urgent || pause.as_mut().poll(&mut inner).is_ready())
            {
                let questions = lock(state).take_waiting();
                running.phase = Phase::Asking(self.how.ask(questions));
            }
            let answers = match &mut running.phase {
                Phase::Gathering(_) => Poll::Pending,
                Phase::Asking(call) => call.as_mut().poll(&mut inner),
            };
            let is_pending = answers.is_pending();
            {
                let mut state = lock(state);
                state.call = Slot::Empty;
                match answers {
                    Poll::Pending => state.call = Slot::Here(running),
                    Poll::Ready(answers) => state.answer(answers),
                }
            }
            lent.is_back = true;
            if !is_pending || wakers.has_rung() {
                wakers.wake_all();
            }
            if is_pending {
                return Poll::Pending;
            }
        }
    }
}

impl<Q, A, H> Drop for Asking<'_, Q, A, H> {
    fn drop(&mut self) {
        self.together.wakers.remove(self.number);
        // Dropped after the lock is released.
        let _unwanted;
        let mut state = lock(&self.together.state);
        state.waiting.retain(|(number, _)| *number != self.number);
        state.answers.remove(&self.number);
        if let Some(asked) = state.asked.iter_mut().find(|number| **number == self.number) {
            *asked = NOBODY;
        }
        // A call that nobody waits for would keep its connection until somebody asks again.
        let is_wanted = !state.waiting.is_empty() || state.asked.iter().any(|number| *number != NOBODY);
        if !is_wanted && matches!(state.call, Slot::Here(_)) {
            state.asked.clear();
            _unwanted = std::mem::replace(&mut state.call, Slot::Empty);
        }
    }
}

const NOBODY: u64 = u64::MAX;

impl<Q, A> State<Q, A> {
    fn take_waiting(&mut self) -> Vec<Q> {
        self.is_urgent = false;
        let (asked, questions) = std::mem::take(&mut self.waiting).into_iter().unzip();
        self.asked = asked;
        questions
    }

    fn answer(&mut self, answers: Vec<Result<A>>) {
        let mut answers = answers.into_iter();
        for number in std::mem::take(&mut self.asked) {
            let answer = answers.next();
            if number != NOBODY {
                let none = || {
                    let message = "a call that others had begun did not end: try again";
                    Err(Error::new(ErrorKind::OutcomeUnknown, message))
                };
                self.answers.insert(number, answer.unwrap_or_else(none));
            }
        }
    }
}

/// A call that a caller polls. If the poll panics, the others get an error instead of an answer.
struct Lent<'a, Q, A> {
    together: &'a Together<Q, A>,
    is_back: bool,
}

impl<Q, A> Drop for Lent<'_, Q, A> {
    fn drop(&mut self) {
        if !self.is_back {
            let mut state = lock(&self.together.state);
            state.call = Slot::Empty;
            state.answer(Vec::new());
            drop(state);
            self.together.wakers.wake_all();
        }
    }
}

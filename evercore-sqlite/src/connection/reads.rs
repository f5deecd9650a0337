//! The queue of reads. As many run at once as there are read connections, on threads that may block.
//!
//! A read that has begun completes, polled or not. So it waits for its turn in this queue, not in its caller's future.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use evercore_core::{Error, ErrorKind, Result};
use futures_channel::oneshot;
use futures_lite::future;
use futures_timer::Delay;

use crate::connection::pool::none_free;

type Read = Box<dyn FnOnce() + Send>;

/// The reads of one store, first come, first served.
pub(crate) struct Reads {
    at_once: u32,
    busy_timeout: Duration,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    reads: VecDeque<Read>,
    /// How many threads take reads from the queue.
    threads: u32,
}

impl Reads {
    pub(crate) fn new(at_once: u32, busy_timeout: Duration) -> Self {
        Self { at_once, busy_timeout, waiting: Mutex::default() }
    }

    /// Runs a read on a thread that may block. It waits for its turn at most for the busy time-out. After that it may
    /// take any time.
    pub(crate) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let (begin, begun) = oneshot::channel();
        let read = Box::new(move || {
            // Skipped if the caller has gone: nobody needs the answer.
            if !reply.is_canceled() {
                let _ = begin.send(());
                let _ = reply.send(work());
            }
        });
        if !self.push(read) {
            let begun = async {
                let _ = begun.await;
                Ok(())
            };
            let too_late = async {
                Delay::new(self.busy_timeout).await;
                Err(none_free())
            };
            future::or(begun, too_late).await?;
        }
        answer.await.unwrap_or_else(|_| Err(panicked()))
    }

    /// Queues a read. Returns `true` if its turn is now.
    fn push(self: &Arc<Self>, read: Read) -> bool {
        let mut waiting = self.lock();
        waiting.reads.push_back(read);
        let has_turn = waiting.threads < self.at_once;
        if has_turn {
            waiting.threads += 1;
            drop(waiting);
            let reads = Arc::clone(self);
            blocking::unblock(move || reads.work_off()).detach();
        }
        has_turn
    }

    /// Runs reads until none waits.
    fn work_off(&self) {
        while let Some(read) = self.next() {
            // A read that panics drops its reply, which tells its caller. The other reads continue.
            let _ = catch_unwind(AssertUnwindSafe(read));
        }
    }

    fn next(&self) -> Option<Read> {
        let mut waiting = self.lock();
        let read = waiting.reads.pop_front();
        if read.is_none() {
            waiting.threads -= 1;
        }
        read
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn panicked() -> Error {
    Error::new(ErrorKind::Backend, "reading panicked")
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    #[test]
    fn the_time_out_is_for_the_turn_and_not_for_the_read() {
        let reads = Arc::new(Reads::new(1, Duration::from_millis(300)));
        let slow = |millis| {
            reads.run(move || {
                sleep(Duration::from_millis(millis));
                Ok(millis)
            })
        };
        // The second read gets its turn in time, and is slow then. The third gets its turn too late.
        let (first, (second, third)) =
            future::block_on(future::zip(slow(50), future::zip(slow(600), slow(0))));
        assert_eq!((first.unwrap(), second.unwrap()), (50, 600));
        assert_eq!(third.unwrap_err().kind(), &ErrorKind::Unavailable);
    }
}

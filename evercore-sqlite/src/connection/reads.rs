//! The reads that wait for their turn: as many run at once as there are read connections, on threads that may block.
//!
//! A read that was begun comes to its end, polled or not. So it does not wait in its caller's future for its turn, but
//! in this queue.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use evercore_core::{Error, ErrorKind, Result};
use futures_channel::oneshot;
use futures_lite::future;
use futures_timer::Delay;

use crate::connection::pool::none_free;
use crate::store::Store;

type Read = Box<dyn FnOnce(&Store) + Send>;

/// The reads that wait, in the order in which they came.
#[derive(Default)]
pub(crate) struct Reads(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    reads: VecDeque<Read>,
    /// How many threads take from the queue.
    threads: u32,
}

/// Reads where blocking is allowed. A read waits for its turn for the busy time-out at most; once begun it may take longer.
pub(crate) async fn read<T: Send + 'static>(
    store: &Arc<Store>,
    work: impl FnOnce(&Store) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (reply, answer) = oneshot::channel();
    let (begin, begun) = oneshot::channel();
    let read = Box::new(move |store: &Store| {
        // Nobody needs the answer if the caller has gone.
        if !reply.is_canceled() {
            let _ = begin.send(());
            let _ = reply.send(work(store));
        }
    });
    if !push(store, read) {
        let begun = async {
            let _ = begun.await;
            Ok(())
        };
        let too_late = async {
            Delay::new(store.settings.busy_timeout).await;
            Err(none_free())
        };
        future::or(begun, too_late).await?;
    }
    answer.await.unwrap_or_else(|_| Err(panicked()))
}

/// Queues a read; `true` if its turn is now.
fn push(store: &Arc<Store>, read: Read) -> bool {
    let most = if store.path.is_some() { store.settings.read_connections } else { 1 };
    let mut waiting = store.reads.0.lock().unwrap_or_else(PoisonError::into_inner);
    waiting.reads.push_back(read);
    let has_turn = waiting.threads < most;
    if has_turn {
        waiting.threads += 1;
        drop(waiting);
        let store = Arc::clone(store);
        blocking::unblock(move || run(&store)).detach();
    }
    has_turn
}

/// Reads until nobody waits any more.
fn run(store: &Store) {
    while let Some(read) = next(&store.reads) {
        // The caller is told, since the reply is dropped; the others go on.
        let _ = catch_unwind(AssertUnwindSafe(|| read(store)));
    }
}

fn next(reads: &Reads) -> Option<Read> {
    let mut waiting = reads.0.lock().unwrap_or_else(PoisonError::into_inner);
    let read = waiting.reads.pop_front();
    if read.is_none() {
        waiting.threads -= 1;
    }
    read
}

fn panicked() -> Error {
    Error::new(ErrorKind::Backend, "reading panicked")
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;
    use crate::settings::Settings;

    #[test]
    fn the_time_out_is_for_the_turn_and_not_for_the_read() {
        let busy_timeout = Duration::from_millis(300);
        let settings = Settings { busy_timeout, read_connections: 1, ..Settings::default() };
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(settings, Vec::new(), Some(folder.path().join("store.db"))).unwrap();
        let store = Arc::new(store);
        let slow = |millis| {
            read(&store, move |_| {
                sleep(Duration::from_millis(millis));
                Ok(millis)
            })
        };
        // The second gets its turn in time and is slow then; the third gets its turn too late.
        let (first, (second, third)) =
            future::block_on(future::zip(slow(50), future::zip(slow(600), slow(0))));
        assert_eq!((first.unwrap(), second.unwrap()), (50, 600));
        assert_eq!(third.unwrap_err().kind(), &ErrorKind::Unavailable);
    }
}

//! Work in a task of the application's runtime.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::future::BoxFuture;

/// Starts a task.
#[derive(Clone)]
pub(crate) struct Spawner(pub(crate) Arc<dyn Fn(BoxFuture<'static, ()>) + Send + Sync>);

impl fmt::Debug for Spawner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a spawner")
    }
}

impl Spawner {
    /// Starts this work in a task. Dropping the answer ends the task at its next await.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Answer<T> {
        let shared = Arc::new(Shared(Mutex::new(State {
            result: None,
            is_over: false,
            is_dropped: false,
            asking: None,
            task: None,
        })));
        (self.0)(Box::pin(Task { work: Some(Box::pin(work)), shared: Arc::clone(&shared) }));
        Answer(shared)
    }
}

struct Shared<T>(Mutex<State<T>>);

struct State<T> {
    result: Option<T>,
    /// The task has ended, or was dropped.
    is_over: bool,
    /// Nobody asks for the result any more.
    is_dropped: bool,
    asking: Option<Waker>,
    task: Option<Waker>,
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Task<T> {
    work: Option<BoxFuture<'static, T>>,
    shared: Arc<Shared<T>>,
}

impl<T> Future for Task<T> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        {
            let mut state = self.shared.state();
            if state.is_dropped {
                return Poll::Ready(());
            }
            state.task = Some(context.waker().clone());
        }
        let Some(work) = &mut self.work else { return Poll::Ready(()) };
        let Poll::Ready(result) = work.as_mut().poll(context) else { return Poll::Pending };
        self.work = None;
        self.shared.state().result = Some(result);
        Poll::Ready(())
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        // The work ends before anybody hears of it.
        self.work = None;
        let asking = {
            let mut state = self.shared.state();
            state.is_over = true;
            state.asking.take()
        };
        asking.into_iter().for_each(Waker::wake);
    }
}

/// The result of a task; `None` if the task was dropped before its end.
pub(crate) struct Answer<T>(Arc<Shared<T>>);

impl<T> Future for Answer<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.0.state();
        if state.is_over {
            return Poll::Ready(state.result.take());
        }
        state.asking = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        let task = {
            let mut state = self.0.state();
            state.is_dropped = true;
            state.task.take()
        };
        task.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::mpsc;

    use super::*;

    fn poll<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn spawner() -> (Spawner, mpsc::Receiver<BoxFuture<'static, ()>>) {
        let (give, tasks) = mpsc::channel();
        (Spawner(Arc::new(move |task| drop(give.send(task)))), tasks)
    }

    #[test]
    fn the_result_of_a_task_comes_back() {
        let (spawner, tasks) = spawner();
        let mut answer = pin!(spawner.spawn(async { 7 }));
        assert!(poll(answer.as_mut()).is_pending());
        let Ok(mut task) = tasks.recv() else { panic!("there is no task") };
        assert!(poll(task.as_mut()).is_ready());
        drop(task);
        assert_eq!(poll(answer), Poll::Ready(Some(7)));
    }

    #[test]
    fn a_dropped_task_gives_no_result_and_a_dropped_answer_ends_the_task() {
        let (spawner, tasks) = spawner();
        let answer = pin!(spawner.spawn(std::future::pending::<u8>()));
        drop(tasks.recv());
        assert_eq!(poll(answer), Poll::Ready(None));
        drop(spawner.spawn(std::future::pending::<u8>()));
        let Ok(mut task) = tasks.recv() else { panic!("there is no task") };
        assert!(poll(task.as_mut()).is_ready());
    }
}

//! A fresh engine for each case: where it comes from, and what stands below it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use evercore_core::{EventStore, StorageEngine};

use crate::cases::CASES;
use crate::tools;

/// A future that stays on its thread, as cases do.
pub(crate) type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// How the suite comes by an engine.
pub trait Harness: 'static {
    /// The name by which `EVERCORE_REQUIRE` asks for this engine.
    const NAME: &'static str;

    /// The engine.
    type Engine: StorageEngine;

    /// What the engine stands on, such as a folder; dropped after every engine.
    type Guard: 'static;

    /// An engine on a fresh, empty storage; `None` if there is none here, after printing why.
    fn engine() -> impl Future<Output = Option<(Self::Guard, Self::Engine)>>;

    /// A further engine on the same storage. Also used to reopen the storage after the first engine is dropped.
    /// `None`, the default: the engine cannot do this, and the cases that need it are skipped, loudly.
    fn another(guard: &Self::Guard) -> impl Future<Output = Option<Self::Engine>> {
        let _ = guard;
        async { None }
    }

    /// Runs a future to its end. The default needs no runtime. An engine that needs one must make progress also while
    /// the thread of one of these calls is busy, and is called from many threads.
    fn block_on<F: Future>(future: F) -> F::Output {
        tools::block_on(future)
    }
}

type Open = Box<dyn Fn() -> LocalFuture<'static, Option<Arc<dyn StorageEngine>>>>;
type BlockOn = fn(LocalFuture<'_, ()>);

/// What a case works on: a fresh engine, and perhaps further ones on the same storage.
pub struct Fixture {
    name: &'static str,
    engine: Option<Arc<dyn StorageEngine>>,
    open: Open,
    block_on: BlockOn,
}

impl Fixture {
    /// A fixture on an engine that has no storage but itself: all further engines are this one.
    ///
    /// For engines that are broken on purpose; others have a [`Harness`].
    pub fn shared(engine: Arc<dyn StorageEngine>) -> Self {
        let further = Arc::clone(&engine);
        let open: Open = Box::new(move || {
            let further = Arc::clone(&further);
            Box::pin(async move { Some(further) })
        });
        Self { name: "shared", engine: Some(engine), open, block_on: |future| tools::block_on(future) }
    }

    async fn fresh<H: Harness>() -> Option<Self> {
        let (guard, engine) = H::engine().await?;
        let guard = Arc::new(guard);
        let open: Open = Box::new(move || {
            let guard = Arc::clone(&guard);
            Box::pin(async move {
                H::another(&guard).await.map(|engine| Arc::new(engine) as Arc<dyn StorageEngine>)
            })
        });
        Some(Self {
            name: H::NAME,
            engine: Some(Arc::new(engine)),
            open,
            block_on: |future| H::block_on(future),
        })
    }

    /// The engine.
    ///
    /// # Panics
    /// If it was closed and could not be reopened.
    pub fn engine(&self) -> Arc<dyn StorageEngine> {
        Arc::clone(self.engine.as_ref().expect("the engine is open"))
    }

    /// A store on the engine.
    pub fn store(&self) -> EventStore {
        EventStore::shared(self.engine())
    }

    /// A further engine on the same storage; without one the case is skipped.
    ///
    /// # Panics
    /// If the engine is required by `EVERCORE_REQUIRE`.
    pub async fn another(&self) -> Option<Arc<dyn StorageEngine>> {
        let engine = (self.open)().await;
        if engine.is_none() {
            eprintln!("SKIPPED: \"{}\" gives no further engine on the same storage", self.name);
            assert!(
                !is_required(self.name),
                "\"{}\" is required, and nothing of it may be skipped",
                self.name
            );
        }
        engine
    }

    /// Drops the engine and opens the storage again; `None`, and the case is skipped, if that cannot be. The case must
    /// not hold the engine any more.
    pub async fn reopen(&mut self) -> Option<Arc<dyn StorageEngine>> {
        drop(self.engine.take());
        self.engine = self.another().await;
        self.engine.clone()
    }

    /// Runs the work on that many threads at once, each with its number.
    pub(crate) fn threads<R, F>(&self, count: usize, work: impl Fn(usize) -> F + Sync) -> Vec<R>
    where
        R: Send,
        F: Future<Output = R>,
    {
        let (block_on, work) = (self.block_on, &work);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..count)
                .map(|number| {
                    scope.spawn(move || {
                        let mut result = None;
                        block_on(Box::pin(async { result = Some(work(number).await) }));
                        result
                    })
                })
                .collect();
            let ended = threads.into_iter().map(|thread| thread.join());
            ended
                .filter_map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        })
    }
}

impl fmt::Debug for Fixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fixture").field("engine", &self.engine).finish_non_exhaustive()
    }
}

/// Runs one case of [`CASES`] on a fresh engine.
///
/// # Panics
/// If the engine breaks the promise, if there is no such case, or if the engine is required and not available.
pub fn run<H: Harness>(name: &str) {
    let case = CASES.iter().find(|case| case.name == name);
    let case = case.unwrap_or_else(|| panic!("there is no case \"{name}\""));
    H::block_on(async {
        match Fixture::fresh::<H>().await {
            Some(mut fixture) => (case.run)(&mut fixture).await,
            None => {
                eprintln!("SKIPPED: \"{}\" is not available", H::NAME);
                assert!(!is_required(H::NAME), "\"{}\" is required and not available", H::NAME);
            }
        }
    });
}

pub(crate) fn is_required(name: &str) -> bool {
    std::env::var("EVERCORE_REQUIRE").is_ok_and(|names| names.split(',').any(|known| known.trim() == name))
}

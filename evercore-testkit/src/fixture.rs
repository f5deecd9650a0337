//! The engines that a case works on, and the harness that makes them.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use evercore_core::{EventStore, StorageEngine};

use crate::tools;

/// A future that need not be `Send`; cases run on one thread.
pub(crate) type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// An ability that some cases need in addition to a fresh engine. [`Case::needs`](crate::Case::needs) lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ability {
    /// [`Harness::further`]: a second engine on the same storage, at the same time.
    Further,
    /// [`Harness::reopen`]: opens the storage again after the engine was closed.
    Reopen,
    /// [`Harness::crash_image`]: copies the storage as a crash at this moment would leave it.
    CrashImage,
    /// [`Harness::turn_clock_back`]: turns the engine's clock back.
    TurnClockBack,
    /// The engine leaves the executor's thread free while it works. An engine in memory works on that thread, so it
    /// lacks this ability.
    OffThread,
}

impl Ability {
    /// All abilities.
    pub const ALL: &[Self] =
        &[Self::Further, Self::Reopen, Self::CrashImage, Self::TurnClockBack, Self::OffThread];
}

/// Gives the suite its engines.
pub trait Harness: 'static {
    /// The name by which `EVERCORE_REQUIRE` asks for this engine.
    const NAME: &'static str;

    /// The abilities that this engine lacks. The cases that need them are skipped, and listed once in each run. All
    /// other cases must run: a method below that gives `None` for an ability that is not listed here fails the case.
    const CANNOT: &'static [Ability] = &[];

    /// An ordinary run includes only the cases whose names begin with one of these. If the list is empty, which is
    /// the default, it includes all cases. `EVERCORE_CASES=all` always runs all. Use this for a second way into an
    /// engine that runs all cases with another harness.
    const ONLY: &'static [&'static str] = &[];

    /// The engine.
    type Engine: StorageEngine;

    /// The engine's storage, such as a folder; dropped after the engines.
    type Guard: 'static;

    /// Makes an engine on a fresh, empty storage. Prints the reason and gives `None` if there is none on this
    /// machine.
    fn engine() -> impl Future<Output = Option<(Self::Guard, Self::Engine)>>;

    /// Opens a second engine on the same storage, while the first is open.
    fn further(guard: &Self::Guard) -> impl Future<Output = Option<Self::Engine>> {
        let _ = guard;
        async { None }
    }

    /// Opens an engine on the same storage, after all others were dropped.
    fn reopen(guard: &Self::Guard) -> impl Future<Output = Option<Self::Engine>> {
        let _ = guard;
        async { None }
    }

    /// Opens an engine on a copy of the storage, with a separate guard. The first engine is open and does not help:
    /// copy its files, for example. No call is running meanwhile.
    fn crash_image(guard: &Self::Guard) -> impl Future<Output = Option<(Self::Guard, Self::Engine)>> {
        let _ = guard;
        async { None }
    }

    /// Turns the engine's clock back by this much. Making the stored times later has the same effect for the engine.
    /// Gives `false` if neither is possible.
    fn turn_clock_back(guard: &Self::Guard, by: Duration) -> impl Future<Output = bool> {
        let _ = (guard, by);
        async { false }
    }

    /// Runs a future to its end. The default needs no runtime. It is called from many threads. A runtime must make
    /// progress even if the thread of one of these calls is busy.
    fn block_on<F: Future>(future: F) -> F::Output {
        tools::block_on(future)
    }
}

type BlockOn = fn(LocalFuture<'_, ()>);

/// An engine, and its storage if that is new too.
pub(crate) type Opened = (Option<Box<dyn Any>>, Arc<dyn StorageEngine>);

/// How to get more engines. A way that a harness lacks gives `None`.
pub(crate) trait Doors {
    fn further(&self) -> LocalFuture<'_, Option<Opened>>;
    fn reopen(&self) -> LocalFuture<'_, Option<Opened>>;
    fn crash_image(&self) -> LocalFuture<'_, Option<Opened>>;
    fn turn_clock_back(&self, by: Duration) -> LocalFuture<'_, bool>;
}

struct DoorsOf<H: Harness> {
    guard: H::Guard,
}

impl<H: Harness> Doors for DoorsOf<H> {
    fn further(&self) -> LocalFuture<'_, Option<Opened>> {
        Box::pin(async { Some((None, Arc::new(H::further(&self.guard).await?) as _)) })
    }

    fn reopen(&self) -> LocalFuture<'_, Option<Opened>> {
        Box::pin(async { Some((None, Arc::new(H::reopen(&self.guard).await?) as _)) })
    }

    fn crash_image(&self) -> LocalFuture<'_, Option<Opened>> {
        Box::pin(async {
            let (guard, engine) = H::crash_image(&self.guard).await?;
            Some((Some(Box::new(guard) as _), Arc::new(engine) as _))
        })
    }

    fn turn_clock_back(&self, by: Duration) -> LocalFuture<'_, bool> {
        Box::pin(H::turn_clock_back(&self.guard, by))
    }
}

/// An engine without a storage outside of itself.
struct Alone(Arc<dyn StorageEngine>);

impl Doors for Alone {
    fn further(&self) -> LocalFuture<'_, Option<Opened>> {
        Box::pin(async { Some((None, Arc::clone(&self.0))) })
    }

    fn reopen(&self) -> LocalFuture<'_, Option<Opened>> {
        self.further()
    }

    fn crash_image(&self) -> LocalFuture<'_, Option<Opened>> {
        Box::pin(async { None })
    }

    fn turn_clock_back(&self, _: Duration) -> LocalFuture<'_, bool> {
        Box::pin(async { false })
    }
}

/// The engine of a case, and more engines on the same storage if the harness can make them.
pub struct Fixture {
    name: &'static str,
    engine: Option<Arc<dyn StorageEngine>>,
    block_on: BlockOn,
    // In this order: the storage is dropped after the engines.
    doors: Box<dyn Doors>,
    images: Vec<Box<dyn Any>>,
}

impl Fixture {
    /// A fixture on an engine without a storage outside of itself: second and reopened engines are this one. It
    /// cannot give a crash image or turn a clock back.
    ///
    /// For engines that are broken on purpose; other engines have a [`Harness`].
    pub fn shared(engine: Arc<dyn StorageEngine>) -> Self {
        Self::with_doors(Arc::clone(&engine), Box::new(Alone(engine)))
    }

    pub(crate) fn with_doors(engine: Arc<dyn StorageEngine>, doors: Box<dyn Doors>) -> Self {
        let block_on: BlockOn = |future| tools::block_on(future);
        Self { name: "shared", engine: Some(engine), block_on, doors, images: Vec::new() }
    }

    pub(crate) async fn fresh<H: Harness>() -> Option<Self> {
        let (guard, engine) = H::engine().await?;
        Some(Self {
            name: H::NAME,
            engine: Some(Arc::new(engine)),
            block_on: |future| H::block_on(future),
            doors: Box::new(DoorsOf::<H> { guard }),
            images: Vec::new(),
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

    /// Gives a second engine on the same storage. The case needs [`Ability::Further`].
    ///
    /// # Panics
    /// If the harness gives none.
    pub async fn further(&mut self) -> Arc<dyn StorageEngine> {
        let opened = self.doors.further().await;
        self.keep(opened, Ability::Further)
    }

    /// Drops the engine and opens the storage again. The case needs [`Ability::Reopen`], and must have dropped its
    /// own handles of the engine.
    ///
    /// # Panics
    /// If the harness cannot do that.
    pub async fn reopen(&mut self) -> Arc<dyn StorageEngine> {
        drop(self.engine.take());
        let opened = self.doors.reopen().await;
        let engine = self.keep(opened, Ability::Reopen);
        self.engine = Some(Arc::clone(&engine));
        engine
    }

    /// Gives an engine on the storage as a crash at this moment would leave it. The case needs
    /// [`Ability::CrashImage`].
    ///
    /// # Panics
    /// If the harness gives none.
    pub async fn crash_image(&mut self) -> Arc<dyn StorageEngine> {
        let opened = self.doors.crash_image().await;
        self.keep(opened, Ability::CrashImage)
    }

    /// Turns the engine's clock back. The case needs [`Ability::TurnClockBack`].
    ///
    /// # Panics
    /// If the harness cannot do that.
    pub async fn turn_clock_back(&mut self, by: Duration) {
        let is_turned = self.doors.turn_clock_back(by).await;
        assert!(is_turned, "{}", self.unlisted(Ability::TurnClockBack));
    }

    fn keep(&mut self, opened: Option<Opened>, ability: Ability) -> Arc<dyn StorageEngine> {
        let (guard, engine) = opened.unwrap_or_else(|| panic!("{}", self.unlisted(ability)));
        self.images.extend(guard);
        engine
    }

    fn unlisted(&self, ability: Ability) -> String {
        format!(
            "the harness of \"{}\" cannot do {ability:?}, and does not list it in `CANNOT`; or the case does not list \
             it in what it needs",
            self.name
        )
    }

    /// Runs the work on this many threads at once. Each gets its number.
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

pub(crate) fn is_required(name: &str) -> bool {
    std::env::var("EVERCORE_REQUIRE").is_ok_and(|names| names.split(',').any(|known| known.trim() == name))
}

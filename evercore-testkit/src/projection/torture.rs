//! The torture, as users order it.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use evercore_core::{EventStore, Filter};

use super::ProjectionUnderTest;
use super::fault::Fault;
use super::finding::{Finding, Report};
use super::life::Life;
use super::world::World;

/// Runs a projection through everything that [`Fault`] names, seed after seed.
#[must_use = "nothing is tested before `run`"]
pub struct Torture<P, F = ()> {
    engines: F,
    seeds: std::ops::Range<u64>,
    happenings: usize,
    filter: Filter,
    without: Vec<Fault>,
    of: PhantomData<fn() -> P>,
}

impl<P: ProjectionUnderTest> Torture<P, ()> {
    /// On these engines, one for each seed. One with events on it is as good as an empty one; nothing must be subscribed to
    /// it by the names `tortured` and `rebuilt`.
    ///
    /// 100 seeds, and in each something happens 40 times, unless said otherwise.
    pub fn on<F: AsyncFn() -> P::Engine>(engines: F) -> Torture<P, F> {
        Torture {
            engines,
            seeds: 0..100,
            happenings: 40,
            filter: Filter::all(),
            without: Vec::new(),
            of: PhantomData,
        }
    }
}

impl<P: ProjectionUnderTest, F: AsyncFn() -> P::Engine> Torture<P, F> {
    /// So many seeds, from 0 on.
    pub fn seeds(mut self, count: u64) -> Self {
        self.seeds = 0..count;
        self
    }

    /// This seed alone.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seeds = seed..seed.saturating_add(1);
        self
    }

    /// How often [`happen`](ProjectionUnderTest::happen) is called for each seed; 0 if the events are there already.
    pub fn happenings(mut self, count: usize) -> Self {
        self.happenings = count;
        self
    }

    /// The filter of the subscription; all events unless said otherwise.
    pub fn with_filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// Spares the projection one fault: one that it need not bear, or one whose part in a failure is to be seen.
    pub fn without(mut self, fault: Fault) -> Self {
        self.without.push(fault);
        self
    }

    /// Runs all seeds, or the one that `EVERCORE_SEED` names. No time limits it: a handler that never ends is waited for.
    ///
    /// # Panics
    /// If the projection is wrong, with the [`Finding`]; as [`try_seed`](Self::try_seed).
    pub async fn run(&self) -> Report {
        let named = std::env::var("EVERCORE_SEED").ok().and_then(|text| text.parse().ok());
        let seeds = named.map_or(self.seeds.clone(), |seed| seed..seed + 1);
        let mut report = Report::default();
        for seed in seeds {
            report.add(self.try_seed(seed).await.unwrap_or_else(|finding| panic!("{finding}")));
        }
        report
    }

    /// Runs one seed.
    ///
    /// # Errors
    /// What is wrong with the projection.
    ///
    /// # Panics
    /// If the engine fails, or a method of the projection panics; the seed is then printed.
    pub async fn try_seed(&self, seed: u64) -> Result<Report, Finding> {
        let engine = Arc::new((self.engines)().await);
        let store = EventStore::shared(Arc::clone(&engine) as _);
        let world = Arc::new(World::new(store, self.filter.clone(), seed, self.happenings, &self.without));
        let told = Told { seed, world: Arc::clone(&world) };
        let mut life = Life::<P>::new(engine, Arc::clone(&world)).await;
        let lived = life.live().await;
        drop(told);
        let state = world.state();
        let (story, faults) = (state.story.clone(), state.faults.clone());
        match lived {
            Ok(()) => Ok(Report { seeds: 1, faults, checks: life.checks, story }),
            Err(what) => Err(Finding { seed, what, story }),
        }
    }
}

impl<P, F> fmt::Debug for Torture<P, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seeds, happenings, without, .. } = self;
        f.debug_struct("Torture")
            .field("seeds", seeds)
            .field("happenings", happenings)
            .field("without", without)
            .finish_non_exhaustive()
    }
}

/// Tells the seed and the story if something panics on the way.
struct Told {
    seed: u64,
    world: Arc<World>,
}

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (seed, story) = (self.seed, self.world.state().story.clone());
            let what = "something panicked".to_owned();
            eprintln!("{}", Finding { seed, what, story });
        }
    }
}

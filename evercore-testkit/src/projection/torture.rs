//! The builder that users call.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use evercore_core::{EventStore, Filter};

use super::ProjectionUnderTest;
use super::fault::Fault;
use super::finding::{Finding, Report};
use super::life::Life;
use super::world::World;

/// Runs a projection through each [`Fault`], seed after seed.
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
    /// Uses these engines, one for each seed. An engine may contain events already, but no subscription with the name
    /// `tortured` or `rebuilt`.
    ///
    /// The default is 100 seeds, with 40 commits each.
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
    /// Runs this many seeds, from 0 on.
    pub fn seeds(mut self, count: u64) -> Self {
        self.seeds = 0..count;
        self
    }

    /// Runs this seed alone.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seeds = seed..seed.saturating_add(1);
        self
    }

    /// How often [`happen`](ProjectionUnderTest::happen) is called for each seed. 0 if the events are there already.
    pub fn happenings(mut self, count: usize) -> Self {
        self.happenings = count;
        self
    }

    /// The filter of the subscription. The default is all events.
    pub fn with_filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// Leaves out a fault: one that the projection need not survive, or one whose part in a failure you want to see.
    pub fn without(mut self, fault: Fault) -> Self {
        self.without.push(fault);
        self
    }

    /// Runs all seeds, or the one in `EVERCORE_SEED`. There is no time limit: it waits even for a handler that never
    /// ends.
    ///
    /// # Panics
    /// If the projection is wrong, with the [`Finding`]; see also [`try_seed`](Self::try_seed).
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
    /// Gives a [`Finding`] if the projection is wrong.
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

/// Prints the seed and the faults so far if something panics.
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

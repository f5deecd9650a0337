//! The crash tests of the testkit on projections as users write them: a table with counters, in which nothing may
//! count twice, and a table whose rows may be written again.

use std::sync::Arc;

use evercore_testkit::projection::{Dice, ProjectionUnderTest, Torture, each, plain_events};

use crate::evercore::{Event, EventStore};
use crate::ground::{Engine, Ground, Place, alone};
use crate::tally::{counted, sized};
use evercore_core::engine::Sink;

/// A separate table.
struct Table {
    ground: Ground,
    name: String,
}

impl Table {
    async fn empty(engine: &Arc<Engine>) -> Self {
        let (ground, name) = (Ground::of((**engine).clone()), format!("@kit_{:016x}", fastrand::u64(..)));
        ground
            .sql(&format!("CREATE TABLE {name} (position BIGINT PRIMARY KEY, times BIGINT NOT NULL)"))
            .await;
        Self { ground, name }
    }

    async fn clear(&self) {
        self.ground.sql(&format!("DELETE FROM {}", self.name)).await;
    }

    async fn model(&self) -> Vec<[i64; 2]> {
        self.ground.rows(&format!("SELECT position, times FROM {} ORDER BY position", self.name)).await
    }
}

/// The number of events of each aggregate, exactly once.
struct Counts(Table);

impl ProjectionUnderTest for Counts {
    type Engine = Engine;
    type Model = Vec<[i64; 2]>;

    async fn empty(engine: &Arc<Engine>) -> Self {
        Self(Table::empty(engine).await)
    }

    fn handler(&self) -> impl Sink + 'static {
        self.0.ground.counting(&self.0.name, |event| event.aggregate().get(), || {})
    }

    async fn clear(&self) {
        self.0.clear().await;
    }

    async fn model(&self) -> Self::Model {
        self.0.model().await
    }

    async fn happen(store: &EventStore, dice: &mut Dice) {
        plain_events(store, dice).await;
    }

    fn fold(events: &[Event]) -> Self::Model {
        let counts = counted(events.iter().map(|event| event.aggregate().get()).collect());
        counts.into_iter().map(|(aggregate, times)| [aggregate, times]).collect()
    }
}

/// The aggregate of the event at each position, at least once.
struct Places(Table);

impl ProjectionUnderTest for Places {
    type Engine = Engine;
    type Model = Vec<[i64; 2]>;

    async fn empty(engine: &Arc<Engine>) -> Self {
        Self(Table::empty(engine).await)
    }

    fn handler(&self) -> impl Sink + 'static {
        let (ground, name) = (self.0.ground.clone(), self.0.name.clone());
        each(move |event| {
            let (ground, name) = (ground.clone(), name.clone());
            async move { ground.put(&name, vec![(event.position().get(), event.aggregate().get())]).await }
        })
    }

    async fn clear(&self) {
        self.0.clear().await;
    }

    async fn model(&self) -> Self::Model {
        self.0.model().await
    }

    async fn happen(store: &EventStore, dice: &mut Dice) {
        plain_events(store, dice).await;
    }

    fn fold(events: &[Event]) -> Self::Model {
        events.iter().map(|event| [event.position().get(), event.aggregate().get()]).collect()
    }
}

fn torture<P: ProjectionUnderTest<Engine = Engine>>(what: &str) {
    let Some(_) = Place::fresh() else { return };
    alone(async {
        let places = std::sync::Mutex::new(Vec::new());
        let engines = async || {
            let place = Place::fresh().unwrap();
            let engine = Ground::open(&place.address).await.engine;
            places.lock().unwrap().push(place);
            engine
        };
        let report = Torture::<P>::on(engines).seeds(sized(8, 300)).happenings(sized(4, 10)).run().await;
        println!("{what}: {report}");
    });
}

#[test]
fn a_table_that_counts_is_exact_under_torture() {
    torture::<Counts>("exactly once, a table of counts");
}

#[test]
fn a_table_of_places_is_right_under_torture() {
    torture::<Places>("at least once, a table of places");
}

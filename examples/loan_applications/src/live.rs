//! The log replayed by several writers at once, and two tables that a subscription keeps meanwhile, exactly once:
//!
//! * how many applications are in which state, and since which day. The state of an application is its last `A_` step;
//! * the work in progress of each resource: the work items it has begun (`START`) less those it has ended (`COMPLETE`).
//!   A work item that one resource begins and another one ends counts +1 and -1.
//!
//! In the end both must agree with the lines of the log.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use indicatif::ProgressBar;

use crate::application::{Application, ApplicationEvent};
use crate::evercore::{BoxError, Event, EventStore, Timestamp};
use crate::import::Import;
use crate::projection::{self, Engine};
use crate::source::{self, Line};

const WRITERS: usize = 8;

/// The name of the subscription.
const NAME: &str = "loan_applications_live";

/// A state, and the day on which an application came into it, counted from 1970.
pub(crate) type State = (i64, String);

/// The content of the tables.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Tables {
    /// How many applications are in a state since a day; none is no row.
    pub(crate) applications: BTreeMap<State, i64>,
    /// The work in progress of each resource, also where it is none.
    pub(crate) work: BTreeMap<String, i64>,
}

/// The changes of a delivery, summed up.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// The state in which each application is after it.
    pub(crate) states: BTreeMap<i64, State>,
    /// By how much the work of each resource grows.
    pub(crate) work: BTreeMap<String, i64>,
}

impl Changes {
    pub(crate) fn of(events: &[Event]) -> Result<Self, BoxError> {
        let mut changes = Self::default();
        for event in events {
            let (name, transition) = event.decode::<Application>()?.to_source();
            if name.starts_with("A_") {
                changes.states.insert(event.aggregate().get(), (day(event.time()), name.to_owned()));
            }
            if let Some(growth) = growth(name, transition) {
                let resource = event.reference().unwrap_or_default();
                *changes.work.entry(resource.to_owned()).or_default() += growth;
            }
        }
        Ok(changes)
    }

    /// By how much the number of applications in each state grows, if they were in these states before.
    pub(crate) fn moves(&self, before: &BTreeMap<i64, State>) -> BTreeMap<State, i64> {
        let mut moves = BTreeMap::new();
        for (application, state) in &self.states {
            if let Some(left) = before.get(application) {
                *moves.entry(left.clone()).or_default() -= 1;
            }
            *moves.entry(state.clone()).or_default() += 1;
        }
        moves
    }
}

fn growth(name: &str, transition: &str) -> Option<i64> {
    match transition {
        "START" if name.starts_with("W_") => Some(1),
        "COMPLETE" if name.starts_with("W_") => Some(-1),
        _ => None,
    }
}

fn day(time: Timestamp) -> i64 {
    time.as_micros().div_euclid(86_400_000_000)
}

/// Fills an empty store and compares the tables with the log.
pub(crate) async fn live(engine: &Engine, log: Option<&Path>) -> Result<(), BoxError> {
    let store = EventStore::new(engine.clone());
    if store.head().await?.get() > 0 {
        return Err("the store is not empty".into());
    }
    projection::make_tables(engine).await?;
    let lines = source::lines(log)?.collect::<Result<Vec<Line>, _>>()?;
    let expected = expected(&lines);
    let began = Instant::now();

    let (is_built, built) = oneshot::channel::<()>();
    let shutdown = async {
        let _ = built.await;
    };
    let (subscription, sink) = (store.subscription(NAME)?, projection::projection(engine));
    let runner = crate::spawn(async move { Ok(subscription.run_sink(shutdown, sink).await?) });
    let keeping = async {
        let written = write(&store, lines).await?;
        println!("live:   {WRITERS} writers, {}", crate::rate(written, began));
        store.wait_for_position(store.head().await?, NAME, Duration::from_secs(600)).await?;
        println!("tables: {}", crate::rate(written, began));
        drop(is_built);
        Ok::<_, BoxError>(())
    };
    futures_lite::future::try_zip(runner, keeping).await?;

    let found = projection::read(engine).await?;
    let applications: i64 = found.applications.values().sum();
    let in_progress: i64 = found.work.values().sum();
    println!("{applications} applications in {} states and days", found.applications.len());
    println!("{in_progress} pieces of work in progress of {} resources", found.work.len());
    if found != expected {
        return Err("the tables are not what the log says".into());
    }
    println!("the tables are what the log says");
    Ok(())
}

/// Each application has one writer, which keeps the order of the log. Returns the number of lines.
async fn write(store: &EventStore, lines: Vec<Line>) -> Result<i64, BoxError> {
    let (mut shares, mut writers) = (vec![Vec::new(); WRITERS], HashMap::new());
    let count = i64::try_from(lines.len())?;
    for line in lines {
        let next = writers.len() % WRITERS;
        let writer: usize = *writers.entry(line.case.clone()).or_insert(next);
        shares[writer].push(line);
    }
    let writing: Vec<_> = shares
        .into_iter()
        .map(|share| {
            let mut import = Import::into(store.clone());
            Box::pin(crate::spawn(async move {
                let lines = share.into_iter().map(Ok);
                import.take_all(lines, &ProgressBar::hidden()).await
            }))
        })
        .collect();
    for writer in writing {
        writer.await?;
    }
    Ok(count)
}

/// The expected content of the tables, from the lines.
fn expected(lines: &[Line]) -> Tables {
    let (mut last, mut tables) = (HashMap::new(), Tables::default());
    for line in lines {
        let (name, transition) = ApplicationEvent::to_source(line.event);
        if name.starts_with("A_") {
            last.insert(&line.case, (day(line.time), name.to_owned()));
        }
        if let Some(growth) = growth(name, transition) {
            *tables.work.entry(line.resource.clone()).or_default() += growth;
        }
    }
    for state in last.into_values() {
        *tables.applications.entry(state).or_default() += 1;
    }
    tables
}

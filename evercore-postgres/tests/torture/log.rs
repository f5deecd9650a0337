//! The log at the end, and readers that follow it while it grows.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use evercore_postgres::{
    ErrorKind, Event, EventStore, EventType, Filter, LogQuery, PageLimit, Position, Result,
};

use crate::tools::{Part, milliseconds};

/// The parts of an event that the tests need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) position: i64,
    aggregate: i64,
    sequence: i64,
    is_debit: bool,
    pub(crate) part: Part,
}

impl Seen {
    fn of(event: &Event) -> Self {
        Self {
            position: event.position().get(),
            aggregate: event.aggregate().get(),
            sequence: event.sequence().get(),
            is_debit: event.event_type().as_str() == "Debited",
            part: serde_json::from_slice(event.payload()).unwrap(),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Log {
    seen: Vec<Seen>,
    units: HashMap<i64, Vec<usize>>,
}

impl Log {
    /// Reads the whole log, and asserts that positions, and the sequences of each aggregate, are 1, 2, 3, ….
    pub(crate) async fn read(store: &EventStore) -> Self {
        Self::read_after(store, Position::ZERO).await
    }

    /// The same from a position on, after which only new aggregates have events.
    pub(crate) async fn read_after(store: &EventStore, position: Position) -> Self {
        let (mut seen, mut query) = (Vec::new(), LogQuery::after(position));
        loop {
            let page = store.read_log(&query).await.unwrap();
            seen.extend(page.events.iter().map(|event| Seen::of(&event)));
            query.from = page.scanned;
            if page.scanned == page.head {
                break;
            }
        }
        assert_no_holes(position, &seen);
        let mut units: HashMap<i64, Vec<usize>> = HashMap::new();
        for (index, event) in seen.iter().enumerate() {
            units.entry(event.part.unit).or_default().push(index);
        }
        Self { seen, units }
    }

    pub(crate) fn events(&self) -> usize {
        self.seen.len()
    }

    pub(crate) fn units(&self) -> HashSet<i64> {
        self.units.keys().copied().collect()
    }

    /// The first and the last position of a unit in the log.
    pub(crate) fn place_of(&self, unit: i64) -> Option<(i64, i64)> {
        let events = self.units.get(&unit)?;
        Some((self.seen[*events.first()?].position, self.seen[*events.last()?].position))
    }

    pub(crate) fn half_units(&self) -> usize {
        self.units.values().filter(|events| !self.is_whole(events)).count()
    }

    fn is_whole(&self, events: &[usize]) -> bool {
        let is_in_place = |(nth, index): (usize, &usize)| {
            *index == events[0] + nth
                && self.seen[*index].part.nth == nth
                && self.seen[*index].part.of == events.len()
        };
        events.iter().enumerate().all(is_in_place)
    }

    /// The events that the reader missed, got twice or got in another order.
    fn against(&self, tail: &Tail) -> Missed {
        let wanted = self.seen.iter().filter(|event| !tail.debits_only || event.is_debit);
        let got: HashSet<i64> = tail.seen.iter().map(|event| event.position).collect();
        let is_back = |pair: &&[Seen]| pair[1].position <= pair[0].position;
        Missed {
            skipped: wanted.clone().filter(|event| !got.contains(&event.position)).count(),
            doubled: tail.seen.len() - got.len(),
            out_of_order: tail.seen.windows(2).filter(is_back).count(),
            differing: usize::from(!wanted.eq(&tail.seen)),
        }
    }
}

fn assert_no_holes(after: Position, seen: &[Seen]) {
    let mut sequences = HashMap::new();
    for (place, event) in (after.get() + 1..).zip(seen) {
        assert_eq!(event.position, place, "a hole in the log");
        let last = sequences.entry(event.aggregate).or_insert(0);
        *last += 1;
        assert_eq!(
            event.sequence, *last,
            "a hole in aggregate {}, or another order than the log's",
            event.aggregate
        );
    }
}

/// The events that a reader got.
#[derive(Debug, Default)]
struct Tail {
    seen: Vec<Seen>,
    debits_only: bool,
    /// How often it got an error that allows a retry.
    turned_away: usize,
}

/// All of them must be 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Missed {
    skipped: usize,
    doubled: usize,
    out_of_order: usize,
    /// The number of readers that differ from the log.
    differing: usize,
}

impl Missed {
    fn add(&mut self, other: Self) {
        self.skipped += other.skipped;
        self.doubled += other.doubled;
        self.out_of_order += other.out_of_order;
        self.differing += other.differing;
    }
}

/// Readers that follow the log until they learn where it ends.
pub(crate) struct Readers {
    end: Arc<AtomicI64>,
    tails: Vec<tokio::task::JoinHandle<Tail>>,
}

impl Readers {
    pub(crate) fn new() -> Self {
        Self { end: Arc::new(AtomicI64::new(i64::MAX)), tails: Vec::new() }
    }

    /// Adds a reader of all events or only of debits.
    pub(crate) fn add(&mut self, store: &EventStore, debits_only: bool) {
        self.tails.push(tokio::spawn(follow(store.clone(), debits_only, Arc::clone(&self.end))));
    }

    /// Lets them read to the end of the log, and asserts that each got everything once and in order. Prints that.
    pub(crate) async fn finish(self, log: &Log) -> String {
        self.end.store(log.seen.len().try_into().unwrap(), Ordering::Release);
        let (readers, mut all, mut turned_away) = (self.tails.len(), Missed::default(), 0);
        for tail in self.tails {
            let tail = tokio::time::timeout(Duration::from_secs(30), tail).await.unwrap().unwrap();
            all.add(log.against(&tail));
            turned_away += tail.turned_away;
        }
        assert_eq!(all, Missed::default());
        let Missed { skipped, doubled, out_of_order, differing } = all;
        format!(
            "{readers} readers, turned away {turned_away} times: {skipped} skipped, {doubled} doubled, \
             {out_of_order} out of order, {differing} differing"
        )
    }
}

async fn follow(store: EventStore, debits_only: bool, end: Arc<AtomicI64>) -> Tail {
    let mut tail = Tail { debits_only, ..Tail::default() };
    let mut query = LogQuery::after(Position::ZERO);
    if debits_only {
        query.filter = Filter::all().with_event_type(EventType::new("Debited").unwrap());
    }
    while query.from.get() < end.load(Ordering::Acquire) {
        match read_on(&store, &mut query, &mut tail).await {
            Ok(()) => {}
            Err(error) if *error.kind() == ErrorKind::Unavailable => {
                tail.turned_away += 1;
                tokio::time::sleep(milliseconds(5)).await;
            }
            Err(error) => panic!("a reader met {error:?}"),
        }
    }
    tail
}

async fn read_on(store: &EventStore, query: &mut LogQuery, tail: &mut Tail) -> Result<()> {
    store.wait(query.from, milliseconds(100)).await?;
    query.limit = PageLimit::events(fastrand::usize(1..=300))?;
    let page = store.read_log(query).await?;
    tail.seen.extend(page.events.iter().map(|event| Seen::of(&event)));
    query.from = page.scanned;
    Ok(())
}

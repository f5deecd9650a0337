//! Shared by the long runs: their length, their events, and the final counts.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::evercore::{Aggregate, EventStore, Json};
use crate::ground::Ground;

/// One of two sizes: the second if `EVERCORE_TORTURE` is `full`.
pub(crate) fn sized<T>(short: T, full: T) -> T {
    if std::env::var("EVERCORE_TORTURE").is_ok_and(|size| size == "full") { full } else { short }
}

/// How often each key occurs.
pub(crate) fn counted(keys: Vec<i64>) -> BTreeMap<i64, i64> {
    let mut counts = BTreeMap::new();
    keys.into_iter().for_each(|key| *counts.entry(key).or_default() += 1);
    counts
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Meter {
    read: i64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum MeterEvent {
    Read { nth: i64 },
}

impl Aggregate for Meter {
    const TYPE: &'static str = "meter";
    type Event = MeterEvent;
    type Codec = Json;

    fn apply(&mut self, MeterEvent::Read { nth }: MeterEvent) {
        self.read = nth;
    }
}

/// Writes this many events, of ten aggregates in turn.
pub(crate) async fn write(store: &EventStore, events: i64) {
    for begun in (0..events).step_by(50) {
        let (nth, count) = (begun / 50, 50.min(events - begun));
        let read = move |meter: &Meter| {
            let last = meter.read;
            (1..=count).map(|more| MeterEvent::Read { nth: last + more }).collect::<Vec<_>>()
        };
        store.update_or_create::<Meter, _, _>(&format!("meter {}", nth % 10), read).await.unwrap();
    }
}

/// A file in which each runner writes a line for each action. The lines survive a crash of the runner.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Notes(PathBuf);

impl Notes {
    pub(crate) fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    pub(crate) fn note(&self, what: &str) {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&self.0);
        file.unwrap().write_all(format!("{what}\n").as_bytes()).unwrap();
    }

    pub(crate) fn count(&self, what: &str) -> i64 {
        let text = std::fs::read_to_string(&self.0).unwrap_or_default();
        text.lines().filter(|line| *line == what).count() as i64
    }
}

/// The counts of a run.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) events: i64,
    pub(crate) missed: i64,
    pub(crate) doubled: i64,
    pub(crate) extra: i64,
    pub(crate) regressions: i64,
    pub(crate) claims: i64,
    pub(crate) hands: i64,
    pub(crate) refused: i64,
    pub(crate) pauses: i64,
    pub(crate) crashes: i64,
}

impl Tally {
    pub(crate) async fn of(ground: &Ground, notes: &Notes, events: i64) -> Self {
        let [[applied, doubled, extra]] = ground
            .rows::<3>(
                "SELECT count(*), CAST(coalesce(sum(CASE WHEN times > 1 THEN 1 ELSE 0 END), 0) AS BIGINT),
                        CAST(coalesce(sum(times - 1), 0) AS BIGINT) FROM @applied",
            )
            .await[..]
        else {
            panic!("one row was asked for")
        };
        let [[regressions, claims, moves]] = ground
            .rows::<3>(
                "SELECT CAST(coalesce(sum(CASE WHEN position < old_position THEN 1 ELSE 0 END), 0) AS BIGINT),
                        CAST(coalesce(sum(CASE WHEN epoch > old_epoch THEN 1 ELSE 0 END), 0) AS BIGINT),
                        CAST(coalesce(sum(CASE WHEN position > old_position THEN 1 ELSE 0 END), 0) AS BIGINT)
                 FROM @moves",
            )
            .await[..]
        else {
            panic!("one row was asked for")
        };
        let [[hands]] = ground
            .rows::<1>(
                "SELECT count(*) FROM (SELECT owner, lag(owner) OVER (ORDER BY nth) AS last FROM @moves
                                       WHERE epoch > old_epoch) AS claims WHERE last <> owner",
            )
            .await[..]
        else {
            panic!("one row was asked for")
        };
        // A refused runner has written a line. An at-least-once handler does not notice a refusal, but the cursor did
        // not move.
        let refused = notes.count("refused") + (notes.count("handled") - moves).max(0);
        let crashes = notes.count("crash before") + notes.count("crash between");
        let pauses = notes.count("pause");
        let missed = events - applied;
        Self { events, missed, doubled, extra, regressions, claims, hands, refused, pauses, crashes }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { events, missed, doubled, extra, regressions, claims, hands, refused, pauses, crashes } =
            self;
        write!(
            f,
            "{events} events, {missed} missed, {doubled} applied more than once ({extra} extra), {regressions} cursor \
             regressions; {claims} claims, {hands} leases changed hands, {refused} acks refused; {pauses} pauses, \
             {crashes} crashes"
        )
    }
}

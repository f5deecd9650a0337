//! The outcome of each unit, as its writer got it, compared with the log.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Write};
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard};

use evercore_postgres::Receipt;

use crate::log::Log;

/// The last information that a writer has about its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Acknowledged: its events are between these positions.
    There(i64, i64),
    /// Never sent, refused, or settled as never committed.
    Never,
    /// The writer got no answer and had no command id: all of it or nothing.
    Either,
}

impl From<&Receipt> for Fate {
    fn from(receipt: &Receipt) -> Self {
        Self::There(receipt.first.get(), receipt.last.get())
    }
}

impl From<Option<Receipt>> for Fate {
    fn from(settled: Option<Receipt>) -> Self {
        settled.as_ref().map_or(Self::Never, Self::from)
    }
}

/// As a child prints it for its parent.
impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::There(first, last) => write!(f, "there {first} {last}"),
            Self::Never => f.write_str("never"),
            Self::Either => f.write_str("either"),
        }
    }
}

impl FromStr for Fate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |word: &str| word.parse().map_err(|_| text.to_owned());
        match text.split(' ').collect::<Vec<_>>()[..] {
            ["there", first, last] => Ok(Self::There(number(first)?, number(last)?)),
            ["never"] => Ok(Self::Never),
            ["either"] => Ok(Self::Either),
            _ => Err(text.to_owned()),
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Book(Mutex<Pages>);

#[derive(Debug, Default)]
struct Pages {
    fates: HashMap<i64, Fate>,
    counts: BTreeMap<String, usize>,
}

impl Book {
    pub(crate) fn note(&self, unit: i64, fate: Fate) {
        assert_eq!(self.pages().fates.insert(unit, fate), None, "unit {unit} has two fates");
    }

    /// Counts one more.
    pub(crate) fn count(&self, what: impl Into<String>) {
        *self.pages().counts.entry(what.into()).or_default() += 1;
    }

    pub(crate) fn acknowledged(&self) -> usize {
        self.pages().fates.values().filter(|fate| matches!(fate, Fate::There(..))).count()
    }

    /// All counts, such as `3 Conflict, 1 Unavailable`.
    pub(crate) fn counts(&self) -> String {
        let mut text = String::new();
        for (what, count) in &self.pages().counts {
            let comma = if text.is_empty() { "" } else { ", " };
            write!(text, "{comma}{count} {what}").unwrap();
        }
        text
    }

    /// The differences between the log and this book. A unit that is not in the book only has to be complete.
    pub(crate) fn against(&self, log: &Log) -> Faults {
        let pages = self.pages();
        let mut faults = Faults { half_units: log.half_units(), ..Faults::default() };
        for (unit, fate) in &pages.fates {
            match fate {
                Fate::There(first, last) => {
                    faults.lost += usize::from(log.place_of(*unit) != Some((*first, *last)));
                }
                Fate::Never => faults.come_back += usize::from(log.place_of(*unit).is_some()),
                Fate::Either => {}
            }
        }
        faults
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap()
    }
}

/// All of them must be 0.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Faults {
    /// Acknowledged, but not in the log at the positions of the receipt.
    lost: usize,
    /// Refused or settled as never committed, but in the log.
    come_back: usize,
    /// Incomplete, or not contiguous.
    half_units: usize,
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lost, come_back, half_units } = self;
        write!(f, "{lost} lost, {come_back} refused and there, {half_units} half units")
    }
}

impl Faults {
    pub(crate) fn assert_none(&self) {
        assert_eq!(*self, Self::default());
    }
}

//! The results of a run.

use std::collections::BTreeMap;
use std::fmt;

use super::fault::Fault;

/// A failed comparison: the seed, the difference, and all faults up to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub(crate) seed: u64,
    pub(crate) what: String,
    pub(crate) story: Vec<String>,
}

impl Finding {
    /// The seed that reproduces it.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The faults up to it, in order.
    pub fn story(&self) -> &[String] {
        &self.story
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the projection is wrong with seed {}: {}", self.seed, self.what)?;
        writeln!(f, "what was done to it until then:")?;
        for line in &self.story {
            writeln!(f, "  {line}")?;
        }
        write!(f, "again with EVERCORE_SEED={}, or `.seed({})`", self.seed, self.seed)
    }
}

impl std::error::Error for Finding {}

/// Counts of the faults that a projection survived.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub(crate) seeds: u64,
    pub(crate) faults: BTreeMap<Fault, usize>,
    pub(crate) checks: usize,
    pub(crate) story: Vec<String>,
}

impl Report {
    /// The number of seeds.
    pub fn seeds(&self) -> u64 {
        self.seeds
    }

    /// How often this fault happened.
    pub fn times(&self, fault: Fault) -> usize {
        self.faults.get(&fault).copied().unwrap_or(0)
    }

    /// The number of comparisons.
    pub fn checks(&self) -> usize {
        self.checks
    }

    /// The faults of the last seed, in order.
    pub fn story(&self) -> &[String] {
        &self.story
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.checks += other.checks;
        for (fault, times) in other.faults {
            *self.faults.entry(fault).or_default() += times;
        }
        self.story = other.story;
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} seeds, {} comparisons", self.seeds, self.checks)?;
        self.faults.iter().try_for_each(|(fault, times)| write!(f, ", {fault:?} {times}"))
    }
}

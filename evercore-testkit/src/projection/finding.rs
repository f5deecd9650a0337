//! What came of it.

use std::collections::BTreeMap;
use std::fmt;

use super::fault::Fault;

/// What is wrong with a projection: the seed, what differs, and all that was done to it until then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub(crate) seed: u64,
    pub(crate) what: String,
    pub(crate) story: Vec<String>,
}

impl Finding {
    /// The seed that shows it.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// What was done to the projection, in order.
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

/// What a projection has borne.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub(crate) seeds: u64,
    pub(crate) faults: BTreeMap<Fault, usize>,
    pub(crate) checks: usize,
    pub(crate) story: Vec<String>,
}

impl Report {
    /// How many seeds were run.
    pub fn seeds(&self) -> u64 {
        self.seeds
    }

    /// How often this was done to it.
    pub fn times(&self, fault: Fault) -> usize {
        self.faults.get(&fault).copied().unwrap_or(0)
    }

    /// How often it was compared.
    pub fn checks(&self) -> usize {
        self.checks
    }

    /// What was done to it, in order; of the last seed.
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

//! Runs the cases on the engine of a harness, and lists those that are skipped.

use std::io::Write as _;

use crate::cases::{CASES, Case};
use crate::fixture::{Ability, Fixture, Harness, is_required};
use crate::watchdog;

/// Runs one case of [`CASES`] on a fresh engine, unless the harness cannot do what it needs or leaves it to long runs.
///
/// After a minute, prints the name of a case that hangs. Ends the process after `EVERCORE_CASE_SECONDS`, 300 by
/// default.
///
/// # Panics
/// If the engine breaks the promise, if there is no such case, or if the engine is required and not available.
pub fn run<H: Harness>(name: &str) {
    let case = CASES.iter().find(|case| case.name == name);
    let case = case.unwrap_or_else(|| panic!("there is no case \"{name}\""));
    if !why_skipped::<H>(case).is_empty() || is_left_to_long_runs::<H>(case) {
        return;
    }
    let _watched = watchdog::watch(case.name, std::any::type_name::<H>());
    H::block_on(async {
        match Fixture::fresh::<H>().await {
            Some(mut fixture) => (case.run)(&mut fixture).await,
            None => assert!(!is_required(H::NAME), "\"{}\" is required and not available", H::NAME),
        }
    });
}

/// Lists the cases that a harness skips. The capture of test output does not hide the list.
/// [`conformance!`](crate::conformance) calls it once in each run.
///
/// # Panics
/// If `ONLY` has an entry that fits no case, or if the engine is required and not available.
pub fn tell_what_is_skipped<H: Harness>() {
    for only in H::ONLY {
        assert!(CASES.iter().any(|case| case.name.starts_with(only)), "there is no case \"{only}…\"");
    }
    let harness = std::any::type_name::<H>();
    let mut told = Vec::new();
    if H::block_on(H::engine()).is_none() {
        assert!(!is_required(H::NAME), "\"{}\" is required and not available", H::NAME);
        told.push(format!("SKIPPED by {harness}: all cases, \"{}\" is not available", H::NAME));
    }
    for ability in H::CANNOT {
        let needing = CASES.iter().filter(|case| case.needs.contains(ability)).map(|case| case.name);
        let needing = needing.collect::<Vec<_>>().join(", ");
        told.push(format!("SKIPPED by {harness}, which cannot do {ability:?}: {needing}"));
    }
    let left = CASES.iter().filter(|case| is_left_to_long_runs::<H>(case)).count();
    if left > 0 {
        told.push(format!(
            "LEFT to long runs by {harness}: {left} of {} cases (EVERCORE_CASES=all)",
            CASES.len()
        ));
    }
    if !told.is_empty() {
        let _ = writeln!(std::io::stderr(), "{}", told.join("\n"));
    }
}

fn why_skipped<H: Harness>(case: &Case) -> Vec<Ability> {
    case.needs.iter().filter(|need| H::CANNOT.contains(need)).copied().collect()
}

fn is_left_to_long_runs<H: Harness>(case: &Case) -> bool {
    let runs_all = H::ONLY.is_empty() || std::env::var("EVERCORE_CASES").is_ok_and(|which| which == "all");
    !runs_all && !H::ONLY.iter().any(|only| case.name.starts_with(only))
}

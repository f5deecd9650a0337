//! Tests of the suite: a correct engine passes every case, and the cases of its list catch each broken engine.

mod table;

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use evercore_memory::{MemoryEngine, StorageEngine as _, Timestamp};
use evercore_testkit::broken::{Broken, Fault};
use evercore_testkit::{Ability, CASES, Case, Fixture, Harness, block_on};
use table::{Row, table};

fn passes(case: &Case, mut fixture: Fixture) -> bool {
    catch_unwind(AssertUnwindSafe(|| block_on((case.run)(&mut fixture)))).is_ok()
}

fn case_named(name: &str) -> &'static Case {
    CASES.iter().find(|case| case.name == name).unwrap_or_else(|| panic!("there is no case \"{name}\""))
}

/// An engine with this fault, on a memory engine. A case with a crash image also gets a second engine, and a clock
/// that stands still.
fn broken(fault: Fault, case: &Case) -> Fixture {
    if !case.needs.contains(&Ability::CrashImage) {
        return Broken::fixture(Arc::new(MemoryEngine::new()), None, fault);
    }
    let now = Timestamp::now();
    let engine = || Arc::new(MemoryEngine::with_clock(move || now));
    Broken::fixture(engine(), Some(engine()), fault)
}

/// The cases for an engine in memory, which works on the caller's thread.
fn cases() -> impl Iterator<Item = &'static Case> {
    CASES.iter().filter(|case| !case.needs.contains(&Ability::OffThread))
}

/// The cases that fail. They run side by side.
fn failing(cases: &[&'static Case], fixture: impl Fn(&Case) -> Fixture + Sync) -> Vec<&'static str> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if !passes(case, fixture(case)) {
                        failed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(case.name);
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[test]
fn an_honest_engine_passes_every_case() {
    let shared = |_: &Case| Fixture::shared(Arc::new(MemoryEngine::new()));
    let cases: Vec<_> = cases()
        .filter(|case| {
            !case.needs.iter().any(|need| matches!(need, Ability::CrashImage | Ability::TurnClockBack))
        })
        .collect();
    assert_eq!(failing(&cases, shared), [""; 0]);
}

#[test]
fn an_engine_that_passes_everything_on_is_as_honest_as_what_is_below() {
    // The wrapper alone must not fail a case. This fault concerns one method, which only one case looks at.
    let others = cases().filter(|case| case.name != "values::nothing_shows_a_key_or_a_payload");
    let others: Vec<_> = others.collect();
    assert_eq!(failing(&others, |case| broken(Fault::ShowsKeys, case)), [""; 0]);
}

#[test]
fn every_name_is_there_once() {
    let mut names: Vec<_> = CASES.iter().map(|case| case.name).collect();
    names.sort_unstable();
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
}

#[test]
fn every_fault_is_in_the_table_and_no_list_is_empty() {
    assert!(table().map(|row| row.fault).eq(Fault::ALL.iter().copied()));
    for row in table() {
        assert!(quick(row).next().is_some(), "{:?}", row.fault);
        row.must_fail.iter().chain(row.may_fail).for_each(|name| assert_eq!(case_named(name).name, *name));
    }
}

/// The first case of each list fails, and the fault has struck in it. One fault is left to long runs. A fault that
/// shows only in a race may hide in one run on a busy machine.
#[test]
fn every_fault_strikes_and_is_seen() {
    let of_row = |row: &'static Row| quick(row).take(1).map(|name| (row.fault, name));
    // A wake-up that is only sometimes lost takes minutes to notice.
    let is_long = |row: &&Row| row.fault == Fault::LosesWakeUps && !is_full();
    let pairs: Vec<_> = table().filter(|row| !is_long(row)).flat_map(of_row).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut unseen = Vec::new();
        while let Some((fault, name)) = pairs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let case = case_named(name);
            if !(0..5).any(|_| strikes_and_fails(*fault, case)) {
                unseen.push(format!("{name} does not see {fault:?}"));
            }
        }
        unseen
    };
    let unseen: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    });
    assert_eq!(unseen, [""; 0]);
}

/// Whether this is a long run.
fn is_full() -> bool {
    std::env::var("EVERCORE_TORTURE").is_ok_and(|size| size == "full")
}

/// The cases without those of subscriptions, which wait long for a broken engine.
fn quick(row: &'static Row) -> impl Iterator<Item = &'static str> {
    row.must_fail.iter().copied().filter(|name| !name.starts_with("subscriptions::"))
}

fn strikes_and_fails(fault: Fault, case: &Case) -> bool {
    if case.needs.contains(&Ability::CrashImage) {
        return !passes(case, broken(fault, case));
    }
    let engine = Arc::new(Broken::new(Arc::new(MemoryEngine::new()), fault));
    !passes(case, Broken::fixture_of(Arc::clone(&engine))) && engine.strikes() > 0
}

/// A case that runs longer than this on a broken engine has failed: it waits for something that never comes.
const BOUND: Duration = Duration::from_secs(10);

/// Whether a case passes within the bound. It runs in a separate thread. A case that blocks is left running, and one
/// that awaits is dropped.
fn passes_in_time(fault: Fault, case: &'static Case) -> bool {
    let (tell, told) = mpsc::channel();
    let run = move || {
        let work = async {
            let mut fixture = broken(fault, case);
            let clock = MemoryEngine::new();
            let (mut run, mut bound) = ((case.run)(&mut fixture), clock.pause(BOUND));
            poll_fn(|context| match run.as_mut().poll(context) {
                Poll::Ready(()) => Poll::Ready(true),
                Poll::Pending => bound.as_mut().poll(context).map(|()| false),
            })
            .await
        };
        let passed = catch_unwind(AssertUnwindSafe(|| block_on(work))).unwrap_or(false);
        let _ = tell.send(passed);
    };
    thread::spawn(run);
    told.recv_timeout(BOUND + Duration::from_secs(1)).unwrap_or(false)
}

/// Runs all cases except those of subscriptions on all broken engines. Exactly the cases of the list must fail; those
/// that need luck may fail. It takes about a minute, so it runs only if `EVERCORE_TORTURE` is `full`.
#[test]
fn exactly_the_cases_of_the_table_fail() {
    if !is_full() {
        return;
    }
    let began = Instant::now();
    let is_looked_at = |case: &&Case| !case.name.starts_with("subscriptions::");
    let cases: Vec<&'static Case> = cases().filter(is_looked_at).collect();
    let runs: Vec<_> = table().flat_map(|row| cases.iter().map(move |case| (row, *case))).collect();
    let (next, unexpected) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                while let Some((row, case)) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let passed = passes_in_time(row.fault, case);
                    let must_fail = row.must_fail.contains(&case.name);
                    if passed == must_fail && !row.may_fail.contains(&case.name) {
                        unexpected.lock().unwrap_or_else(PoisonError::into_inner).push((row, *case, passed));
                    }
                }
            });
        }
    });
    println!("{} cases on broken engines took {:?}", runs.len(), began.elapsed());
    let unexpected = unexpected.into_inner().unwrap_or_else(PoisonError::into_inner);
    // On a busy machine one run is not enough.
    let mut wrong: Vec<_> = unexpected
        .into_iter()
        .filter(|(row, case, passed)| (0..3).all(|_| passes_in_time(row.fault, case) == *passed))
        .map(|(row, case, passed)| {
            format!(
                "{:?}: {} {}",
                row.fault,
                case.name,
                if passed { "does not see it" } else { "sees it too" }
            )
        })
        .collect();
    wrong.sort_unstable();
    println!("with another look at what was not expected: {:?}", began.elapsed());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A harness that gives nothing and lists nothing in `CANNOT`.
struct Modest;

impl Harness for Modest {
    const NAME: &'static str = "modest";
    const ONLY: &'static [&'static str] = &["log::an_empty_log", "aggregates::no_id_is_given_out_twice"];
    type Engine = MemoryEngine;
    type Guard = ();

    async fn engine() -> Option<((), MemoryEngine)> {
        Some(((), MemoryEngine::new()))
    }
}

#[test]
#[should_panic(expected = "cannot do Further, and does not list it in `CANNOT`")]
fn a_skip_that_is_not_allowed_fails() {
    evercore_testkit::run::<Modest>("aggregates::no_id_is_given_out_twice_by_any_engine_on_the_same_storage");
}

#[test]
fn what_is_left_to_long_runs_passes_at_once() {
    // The case would fail, because the harness gives no second engine.
    evercore_testkit::run::<Modest>("types::two_engines_on_one_storage_agree");
    evercore_testkit::run::<Modest>("log::an_empty_log_ends_at_zero");
    evercore_testkit::tell_what_is_skipped::<Modest>();
}

/// A harness that never gives an engine.
struct Hanging;

impl Harness for Hanging {
    const NAME: &'static str = "hanging";
    type Engine = MemoryEngine;
    type Guard = ();

    async fn engine() -> Option<((), MemoryEngine)> {
        std::future::pending().await
    }
}

const HANGS: &str = "EVERCORE_TEST_HANGS";

#[test]
fn a_case_that_hangs_is_named() {
    if std::env::var_os(HANGS).is_some() {
        evercore_testkit::run::<Hanging>("log::an_empty_log_ends_at_zero");
        return;
    }
    let program = std::env::current_exe().unwrap_or_default();
    let child = Command::new(program)
        .args(["a_case_that_hangs_is_named", "--exact", "--nocapture"])
        .envs([(HANGS, "1"), ("EVERCORE_CASE_SECONDS", "1")])
        .output();
    let child = child.unwrap_or_else(|error| panic!("{error}"));
    let said = String::from_utf8_lossy(&child.stderr);
    assert!(!child.status.success());
    assert!(said.contains("log::an_empty_log_ends_at_zero on self_check::Hanging has run for"), "{said}");
}

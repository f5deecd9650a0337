//! Prints the name of a case that hangs, because a test that never ends prints nothing.

use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const NAMED_AFTER: Duration = Duration::from_secs(60);

/// The running cases.
static RUNNING: Mutex<Vec<Running>> = Mutex::new(Vec::new());

struct Running {
    case: &'static str,
    harness: &'static str,
    began: Instant,
    is_named: bool,
}

/// Watches a case until this is dropped.
pub(crate) struct Watched(Instant, &'static str);

pub(crate) fn watch(case: &'static str, harness: &'static str) -> Watched {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(thread::Builder::new().name("watchdog".to_owned()).spawn(look_on)));
    let began = Instant::now();
    running().push(Running { case, harness, began, is_named: false });
    Watched(began, case)
}

impl Drop for Watched {
    fn drop(&mut self) {
        running().retain(|running| (running.began, running.case) != (self.0, self.1));
    }
}

fn running() -> MutexGuard<'static, Vec<Running>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn look_on() {
    let limit = limit();
    loop {
        thread::sleep(Duration::from_millis(200));
        let mut running = running();
        for overdue in
            running.iter_mut().filter(|it| !it.is_named && it.began.elapsed() >= NAMED_AFTER.min(limit))
        {
            overdue.is_named = true;
            say(&format!(
                "{} on {} has run for {:?}",
                overdue.case,
                overdue.harness,
                overdue.began.elapsed()
            ));
        }
        if running.iter().any(|it| it.began.elapsed() >= limit) {
            say(&format!("HANGS: a case ran for {limit:?} (EVERCORE_CASE_SECONDS); the process ends here"));
            std::process::abort();
        }
    }
}

/// A long random walk has more time.
fn limit() -> Duration {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let steps = number("EVERCORE_STEPS").unwrap_or_default();
    number("EVERCORE_CASE_SECONDS").map_or(Duration::from_secs(300 + steps / 20), Duration::from_secs)
}

fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

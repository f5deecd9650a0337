//! The conformance suite on the memory engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use evercore_memory::{MemoryEngine, Timestamp};
use evercore_testkit::{Ability, Harness, conformance};

struct Memory;

/// The engine, and how many microseconds its clock is slow.
struct Guard {
    engine: MemoryEngine,
    behind: Arc<AtomicI64>,
}

/// The store exists as long as a clone of its engine.
impl Harness for Memory {
    const NAME: &'static str = "memory";
    const CANNOT: &'static [Ability] = &[Ability::Reopen, Ability::CrashImage, Ability::OffThread];
    type Engine = MemoryEngine;
    type Guard = Guard;

    async fn engine() -> Option<(Guard, MemoryEngine)> {
        let behind = Arc::new(AtomicI64::new(0));
        let clock = Arc::clone(&behind);
        let engine = MemoryEngine::with_clock(move || {
            let micros = Timestamp::now().as_micros() - clock.load(Ordering::SeqCst);
            Timestamp::from_micros(micros).unwrap_or(Timestamp::MIN)
        });
        Some((Guard { engine: engine.clone(), behind }, engine))
    }

    async fn further(guard: &Guard) -> Option<MemoryEngine> {
        Some(guard.engine.clone())
    }

    async fn turn_clock_back(guard: &Guard, by: Duration) -> bool {
        guard.behind.fetch_add(i64::try_from(by.as_micros()).unwrap_or(i64::MAX), Ordering::SeqCst);
        true
    }
}

conformance!(Memory);

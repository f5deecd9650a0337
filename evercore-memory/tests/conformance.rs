//! The memory engine keeps every promise of the contract.

use evercore_memory::MemoryEngine;
use evercore_testkit::{Harness, conformance};

struct Memory;

impl Harness for Memory {
    const NAME: &'static str = "memory";
    type Engine = MemoryEngine;
    type Guard = MemoryEngine;

    async fn engine() -> Option<(MemoryEngine, MemoryEngine)> {
        let engine = MemoryEngine::new();
        Some((engine.clone(), engine))
    }

    async fn another(guard: &MemoryEngine) -> Option<MemoryEngine> {
        Some(guard.clone())
    }
}

conformance!(Memory);

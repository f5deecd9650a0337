use evercore_memory::MemoryEngine;
use evercore_testkit::{Harness, conformance};
struct Memory;
impl Harness for Memory {
    const NAME: &'static str = "memory";
    type Engine = MemoryEngine;
    type Guard = MemoryEngine;
    async fn engine() -> Option<(MemoryEngine, MemoryEngine)> {
        let e = MemoryEngine::new();
        Some((e.clone(), e))
    }
    async fn another(guard: &MemoryEngine) -> Option<MemoryEngine> {
        Some(guard.clone())
    }
}
conformance!(Memory);

//! Who tests the tests: an honest engine passes every case, and every broken one is caught.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use evercore_memory::MemoryEngine;
use evercore_testkit::broken::{Broken, Fault};
use evercore_testkit::{CASES, Case, Fixture, block_on};

fn passes(case: &Case, fixture: &mut Fixture) -> bool {
    catch_unwind(AssertUnwindSafe(|| block_on((case.run)(fixture)))).is_ok()
}

#[test]
fn zz_print() {
    for fault in Fault::ALL {
        let began = std::time::Instant::now();
        let failed: Vec<_> = CASES
            .iter()
            .filter(|case| {
                let engine = Broken::new(Arc::new(MemoryEngine::new()), *fault);
                !passes(case, &mut Fixture::shared(Arc::new(engine)))
            })
            .map(|case| case.name)
            .collect();
        println!("{fault:?} {:?} {}", began.elapsed(), failed.join(" "));
    }
}

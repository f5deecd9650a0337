//! Waiting for events.

use std::time::{Duration, Instant};

use evercore_core::{Position, Result};
use futures_lite::future;
use futures_timer::Delay;

use crate::engine::SqliteEngine;

/// How often to look for the commits of other processes, which ring no bell here.
const LOOK: Duration = Duration::from_millis(50);

/// The listener is there before the look at the head: a commit between the two is not missed.
pub(crate) async fn wait(engine: &SqliteEngine, after: Position, at_most: Duration) -> Result<Position> {
    let until = Instant::now().checked_add(at_most);
    loop {
        let committed = engine.store().committed.listen();
        let head = engine.head_now(after).await?;
        let left = until.map_or(LOOK, |until| until.saturating_duration_since(Instant::now()));
        if head > after || left.is_zero() {
            return Ok(head);
        }
        // A store in memory has no other process; a bound is kept all the same, it costs next to nothing.
        future::or(committed, Delay::new(left.min(LOOK))).await;
    }
}

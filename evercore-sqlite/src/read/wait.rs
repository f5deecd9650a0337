//! Waiting for events.

use std::time::{Duration, Instant};

use evercore_core::{Position, Result};
use futures_lite::future;
use futures_timer::Delay;

use crate::engine::SqliteEngine;

/// How long a timer runs that has no end.
const LONG: Duration = Duration::from_secs(3_600);

/// Waits for the bell, which rings for the commits of this engine and, since the store is watched for as long as
/// somebody waits, soon after those of others. The file is looked at in the beginning and in the end.
pub(crate) async fn wait(engine: &SqliteEngine, after: Position, at_most: Duration) -> Result<Position> {
    let store = engine.store();
    let until = Instant::now().checked_add(at_most);
    let mut head = engine.head_now(after).await?;
    let mut watch = None;
    loop {
        // The listener is there before the look at the head: a commit between the two is not missed.
        let committed = store.committed.listen();
        store.check_open()?;
        head = head.max(store.seen());
        if head > after {
            return Ok(head);
        }
        let left = until.map_or(LONG, |until| until.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return if watch.is_some() { engine.head_now(after).await } else { Ok(head) };
        }
        if watch.is_none() {
            watch = Some(engine.watch()?);
        }
        future::or(committed, Delay::new(left.min(LONG))).await;
    }
}

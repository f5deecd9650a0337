//! Waiting for events.

use std::time::{Duration, Instant};

use evercore_core::{Position, Result};
use futures_lite::future;
use futures_timer::Delay;

use crate::store::Store;

/// How long one timer runs if the wait has no end.
const LONG: Duration = Duration::from_secs(3_600);

/// Waits until the log goes past `after`. Commits of this engine wake it at once, and those of other processes soon:
/// while the result of `watch` is held, something looks for them. `read_head` runs at the beginning and at the end.
pub(crate) async fn wait<H, W>(
    store: &Store,
    after: Position,
    at_most: Duration,
    read_head: impl Fn() -> H + Send,
    watch: impl Fn() -> Result<W> + Send,
) -> Result<Position>
where
    H: Future<Output = Result<Position>> + Send,
    W: Send,
{
    let until = Instant::now().checked_add(at_most);
    let mut head = read_head().await?;
    let mut watched = None;
    loop {
        // Listens before it looks at the head, so that a commit in between is not missed.
        let committed = store.committed.listen();
        store.check_open()?;
        head = head.max(store.known_head());
        if head > after {
            return Ok(head);
        }
        let left = until.map_or(LONG, |until| until.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return if watched.is_some() { read_head().await } else { Ok(head) };
        }
        if watched.is_none() {
            watched = Some(watch()?);
        }
        future::or(committed, Delay::new(left.min(LONG))).await;
    }
}

//! A new version of a subscription: it reads as far as the older one, and takes over from it.

use super::{Held, PASS_BY};
use crate::error::Result;
use crate::ids::Position;
use crate::subscription::cursor::CursorStatus;
use crate::subscription::step::Step;

impl Held {
    /// Builds this version while an older one goes on: reads as far as that one is, and takes over when it has caught up.
    pub(crate) async fn build(&mut self) -> Result<()> {
        if self.cursor.live_from.is_some() || !self.pending.is_empty() || !self.tail.is_at_bound() {
            return Ok(());
        }
        let (own, store) = (self.context.id.clone(), self.subscription.store.clone());
        let all = store.engine().cursors(Some(&own.subscription)).await?.cursors;
        let older: Vec<_> = all
            .into_iter()
            .filter(|other| other.id.partition == own.partition && other.id.version < own.version)
            .collect();
        let target = older.iter().map(|other| other.position).max().unwrap_or(self.cursor.position);
        let distance = target.get() - self.taken_to.get();
        if distance > i64::try_from(self.subscription.settings.batch.max_events()).unwrap_or(i64::MAX) {
            self.read_from(target);
            return Ok(());
        }
        if older.iter().any(|other| other.status == CursorStatus::Paused) {
            // The pause applies to this version too.
            store.engine().pause(PASS_BY).await;
            return Ok(());
        }
        // From here on the older versions stand still, and the events that they have handled are replay for this one.
        let mut from = self.cursor.position;
        for other in older {
            let retired = store.engine().step(&other.id, &Step::Retire).await?;
            let stands = retired.unwrap_or(other);
            // One that was reset had come further before.
            from = from.max(stands.position).max(stands.live_from.unwrap_or_default());
        }
        let lease = self.context.lease.clone();
        self.step(&Step::GoLive { lease, from }).await?;
        self.read_from(Position::MAX);
        // Owners of the older ones may be waiting for events: they are to see that they are over.
        store.operator_calls().send();
        crate::observe::lease_changed(&own, "took over");
        Ok(())
    }
}

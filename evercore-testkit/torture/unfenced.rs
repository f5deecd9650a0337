//! A runner without fencing, for comparison: its lease depends on its own clock, and it moves the cursor without a
//! check.

use std::time::{Duration, Instant, SystemTime};

use crate::evercore::{LogQuery, PageLimit, Position};
use crate::ground::Ground;
use crate::runners::{Task, Trouble};

pub(crate) async fn run(ground: &Ground, task: &Task, trouble: &Trouble, until: Instant) {
    let me = fastrand::i64(1..);
    while Instant::now() < until {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let now = i64::try_from(now.as_millis()).unwrap() + task.hours * 3_600_000;
        let expires = now + i64::try_from(task.lease.as_millis()).unwrap();
        let claim = format!(
            "UPDATE @unfenced SET owner = {me}, expires = {expires} WHERE owner = {me} OR expires < {now}"
        );
        let is_mine = ground.execute(&claim).await > 0;
        let position = ground.rows::<1>("SELECT position FROM @unfenced").await[0][0];
        if position >= task.target {
            // With a fast clock the lease would last for hours. A stalled runner may still set the cursor back.
            ground.sql(&format!("UPDATE @unfenced SET expires = 0 WHERE owner = {me}")).await;
            return;
        }
        if !is_mine {
            ground.store().engine().pause(Duration::from_millis(20)).await;
            continue;
        }
        let next =
            LogQuery::after(Position::new(position).unwrap()).with_limit(PageLimit::events(10).unwrap());
        let events = ground.store().read_log(&next).await.unwrap().events;
        let positions: Vec<i64> = events.iter().map(|event| event.position().get()).collect();
        let last = positions[positions.len() - 1];
        ground.count("@applied", positions).await.unwrap();
        trouble.stall();
        trouble.crash("between");
        ground.sql(&format!("UPDATE @unfenced SET position = {last}")).await;
    }
}

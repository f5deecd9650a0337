//! A log so long that it takes longer to search than a lease lasts.

use std::time::{Duration, Instant};

use evercore_sqlite::rusqlite::Connection;
use evercore_sqlite::{
    AggregateType, EventStore, EventType, Filter, KnownType, Position, SqliteEngine, StorageEngine, limits,
};

use crate::common::{Folder, block_on, create};

/// Events that do not match. To look at all of them takes some hundred milliseconds.
const EVENTS: i64 = 1_000_000;

#[test]
fn a_rare_filter_gets_through_a_long_log_under_a_short_lease() {
    block_on(async {
        let folder = Folder::new();
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        create(&engine, None).await.unwrap();
        engine.close().await.unwrap();
        Connection::open(folder.store())
            .unwrap()
            .execute_batch(&format!(
                "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {EVENTS})
                 INSERT INTO events SELECT position + n, aggregate_id, sequence + n, event_type_id, event_time,
                        recorded_at, payload, NULL, NULL, NULL, NULL FROM events, n"
            ))
            .unwrap();
        let engine = SqliteEngine::open(folder.store()).await.unwrap();
        let (rare, names) = (AggregateType::new("rare").unwrap(), 0..=limits::INDEXED_TYPES);
        let event_types = names.map(|number| EventType::new(format!("Rare{number}")).unwrap()).collect();
        let known = KnownType { aggregate_type: rare.clone(), event_types };
        engine.warmup(&[known]).await.unwrap();
        let store = EventStore::new(engine.clone());
        let subscription = store
            .subscription("rare")
            .unwrap()
            .with_filter(Filter::all().with_aggregate_type(rare))
            .with_lease(Duration::from_millis(60));
        let began = Instant::now();
        let there = async {
            let mut position = 0;
            while position < EVENTS + 1 && began.elapsed() < Duration::from_secs(30) {
                engine.pause(Duration::from_millis(20)).await;
                if let Ok(states) = store.subscription_states("rare").await {
                    position = states[0].cursor.position.get();
                }
            }
        };
        subscription.run(there, async |_| Ok(())).await.unwrap();
        let state = store.subscription_states("rare").await.unwrap().remove(0);
        assert_eq!(state.lag_events, 0, "it is at {} in epoch {}", state.cursor.position, state.cursor.epoch);
        assert_eq!(store.head().await.unwrap(), Position::new(EVENTS + 1).unwrap());
    });
}

//! A log so long that it takes longer to search than a lease lasts.

use std::time::{Duration, Instant};

use evercore_postgres::{
    AggregateType, EventStore, EventType, Filter, KnownType, Position, StorageEngine, limits,
};

use crate::common::{Place, block_on};
use crate::fixture::*;

/// Events that do not match. To look at all of them takes some hundred milliseconds.
const EVENTS: i64 = 1_000_000;

#[test]
fn a_rare_filter_gets_through_a_long_log_under_a_short_lease() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        let engine = place.builder().connect(&place.url).await.unwrap();
        fill(&engine, 1).await;
        place.psql(&format!(
            "INSERT INTO @events (position, aggregate_id, sequence, event_type_id, event_time, recorded_at, payload, mark)
             SELECT e.position + n, e.aggregate_id, e.sequence + n, e.event_type_id, e.event_time, e.recorded_at,
                    e.payload, e.mark FROM @events e, generate_series(1, {EVENTS}) n;
             UPDATE @log_end SET position = position + {EVENTS} WHERE position >= 0"
        ));
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
            let mut position = Position::ZERO;
            while position < at(EVENTS + 1) && began.elapsed() < Duration::from_secs(30) {
                engine.pause(Duration::from_millis(20)).await;
                if let Ok(states) = store.subscription_states("rare").await {
                    position = states[0].cursor.position;
                }
            }
        };
        subscription.run(there, async |_| Ok(())).await.unwrap();
        let state = store.subscription_states("rare").await.unwrap().remove(0);
        assert_eq!(state.lag_events, 0, "it is at {} in epoch {}", state.cursor.position, state.cursor.epoch);
    });
}

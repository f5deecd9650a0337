//! The stored state of a subscription: before each step the store is closed and opened again.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::evercore::{Delivered, FailureAction, FailurePolicy, Position, Start, Subscription};
use crate::ground::{Ground, Place, alone};
use crate::runners::{NAME, reached};
use crate::tally::write;

type Seen = Arc<Mutex<Vec<i64>>>;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Opens the store, runs the subscription until its cursor is at this position, and closes the store. Gives the
/// positions at which the handler succeeded.
async fn run(
    place: &Place,
    set: impl Fn(Subscription) -> Subscription,
    to: i64,
    fails_at: Option<i64>,
) -> Vec<i64> {
    let ground = Ground::open(&place.address).await;
    let seen = Seen::default();
    let noting = Arc::clone(&seen);
    let subscription = set(ground.store().subscription(NAME).unwrap());
    let handler = move |event: Delivered| {
        let noting = Arc::clone(&noting);
        async move {
            let position = event.position().get();
            if Some(position) == fails_at {
                return Err("poison".into());
            }
            noting.lock().unwrap().push(position);
            Ok(())
        }
    };
    subscription.run(reached(&ground, to, soon()), handler).await.unwrap();
    ground.engine.close().await.unwrap();
    seen.lock().unwrap().clone()
}

async fn write_anew(place: &Place, events: i64) {
    let ground = Ground::open(&place.address).await;
    write(&ground.store(), events).await;
    ground.engine.close().await.unwrap();
}

#[test]
fn begun_at_the_end_of_an_empty_store_it_misses_nothing_written_while_it_was_down() {
    let Some(place) = Place::fresh() else { return };
    alone(async {
        let at_end = |subscription: Subscription| subscription.starting(Start::End);
        assert!(run(&place, at_end, 0, None).await.is_empty());
        write_anew(&place, 120).await;
        let seen = run(&place, at_end, 120, None).await;
        write_anew(&place, 7).await;
        let more = run(&place, at_end, 127, None).await;
        println!("begun at the end of an empty store: {} and {} events, 0 missed", seen.len(), more.len());
        assert_eq!((seen, more), ((1..=120).collect(), (121..=127).collect()));
    });
}

/// When the bad event is resumed, it comes first, then the waiting events of its aggregate, in order and once each.
#[test]
fn a_parked_event_is_still_parked_after_a_restart_and_comes_when_it_is_resumed() {
    const POISON: i64 = 20;
    let Some(place) = Place::fresh() else { return };
    alone(async {
        let policy = FailurePolicy::new(FailureAction::Park)
            .with_attempts(2)
            .with_pauses(Duration::ZERO, Duration::ZERO);
        let parks = |subscription: Subscription| subscription.on_failure(policy);
        write_anew(&place, 200).await;
        // Of four aggregates with fifty events each, the first one waits.
        let seen = run(&place, parks, 200, Some(POISON)).await;
        let others: Vec<i64> = (1..POISON).chain(51..=200).collect();
        assert_eq!(seen, others);
        // It still waits after a restart and after more events.
        write_anew(&place, 100).await;
        let seen = run(&place, parks, 300, None).await;
        assert_eq!(seen, (251..=300).collect::<Vec<_>>(), "what waits came unasked, or others did not come");

        let ground = Ground::open(&place.address).await;
        let (cursor, parked) = ground.store().parked(NAME).await.unwrap().remove(0);
        assert_eq!((parked.position.get(), parked.attempts, parked.holds_back), (POISON, 2, true));
        ground.store().resume_parked(&cursor, Some(parked.position)).await.unwrap();
        ground.engine.close().await.unwrap();
        assert_eq!(resumed(&place, parks).await, (POISON..=50).chain(201..=250).collect::<Vec<_>>());
        println!("parked at {POISON}: 0 others missed; resumed after a restart, 0 missed, 0 doubled");
    });
}

/// Runs until no event is parked.
async fn resumed(place: &Place, set: impl Fn(Subscription) -> Subscription) -> Vec<i64> {
    let ground = Ground::open(&place.address).await;
    let store = ground.store();
    let seen = Seen::default();
    let noting = Arc::clone(&seen);
    let is_empty = async {
        let until = soon();
        while Instant::now() < until && !store.parked(NAME).await.unwrap().is_empty() {
            store.engine().pause(Duration::from_millis(10)).await;
        }
    };
    let handler = move |event: Delivered| {
        noting.lock().unwrap().push(event.position().get());
        async { Ok(()) }
    };
    set(store.subscription(NAME).unwrap()).run(is_empty, handler).await.unwrap();
    assert!(store.parked(NAME).await.unwrap().is_empty());
    assert_eq!(
        store.subscription_states(NAME).await.unwrap()[0].cursor.position,
        Position::new(300).unwrap()
    );
    ground.engine.close().await.unwrap();
    seen.lock().unwrap().clone()
}

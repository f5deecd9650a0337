//! Operators and runners at the same time: a running handler does not undo the change of an operator.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evercore_core::engine::{Advance, Step};
use evercore_memory::{
    Aggregate, CursorId, Delivery, ErrorKind, EventStore, FailureAction, FailurePolicy, Filter, Json,
    MemoryEngine, Parked, Position, Subscription,
};
use futures_lite::future::{block_on, or, zip};
use serde::{Deserialize, Serialize};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Talk {
    n: u32,
}

#[derive(Serialize, Deserialize)]
enum TalkEvent {
    Said,
}

impl Aggregate for Talk {
    const TYPE: &'static str = "talk";
    type Event = TalkEvent;
    type Codec = Json;

    fn apply(&mut self, TalkEvent::Said: TalkEvent) {
        self.n += 1;
    }
}

async fn say(store: &EventStore, key: &str) {
    let mut work = store.begin();
    let mut talk = work.load_or_create::<Talk>(key).await.unwrap();
    work.record(&mut talk, TalkEvent::Said).unwrap();
    work.commit().await.unwrap();
}

async fn pause(ms: u64) {
    futures_timer::Delay::new(Duration::from_millis(ms)).await;
}

async fn until(mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < Duration::from_secs(5), "it never came");
        pause(2).await;
    }
}

fn subscription(store: &EventStore) -> Subscription {
    let policy =
        FailurePolicy::new(FailureAction::Park).with_attempts(1).with_pauses(Duration::ZERO, Duration::ZERO);
    store.subscription("s").unwrap().on_failure(policy)
}

async fn parked(store: &EventStore) -> Vec<(CursorId, Parked)> {
    store.parked("s").await.unwrap_or_default()
}

async fn number_parked(store: &EventStore, number: usize) {
    while parked(store).await.len() != number {
        pause(2).await;
    }
}

/// A handler that fails on request, and can be stopped inside an event.
#[derive(Clone, Default)]
struct Held {
    fails: Arc<AtomicBool>,
    waits: Arc<AtomicBool>,
    is_inside: Arc<AtomicBool>,
    handled: Arc<Mutex<Vec<i64>>>,
}

impl Held {
    async fn handle(self, position: Position) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let fails = self.fails.load(Ordering::SeqCst);
        self.is_inside.store(true, Ordering::SeqCst);
        while self.waits.load(Ordering::SeqCst) {
            pause(1).await;
        }
        self.is_inside.store(false, Ordering::SeqCst);
        if fails {
            return Err("poison".into());
        }
        self.handled.lock().unwrap().push(position.get());
        Ok(())
    }

    async fn is_inside(&self) {
        until(async || self.is_inside.load(Ordering::SeqCst)).await;
    }

    fn go_on(&self) {
        self.waits.store(false, Ordering::SeqCst);
    }

    fn handled(&self) -> Vec<i64> {
        self.handled.lock().unwrap().clone()
    }
}

/// Runs a subscription over two events of one aggregate. The first is parked. While it is tried again, `then` runs.
async fn while_tried_again(fails: bool, then: impl AsyncFnOnce(&EventStore, &Held, CursorId)) -> Held {
    let store = EventStore::new(MemoryEngine::new());
    say(&store, "a").await;
    say(&store, "a").await;
    let (held, over) = (Held::default(), AtomicBool::new(false));
    held.fails.store(true, Ordering::SeqCst);
    let handler = held.clone();
    let of = subscription(&store);
    let shutdown = async {
        while !over.load(Ordering::SeqCst) {
            pause(2).await;
        }
    };
    let run = of.run(shutdown, move |event| handler.clone().handle(event.position()));
    let operator = async {
        until(async || parked(&store).await.len() == 1).await;
        until(async || store.subscription_states("s").await.unwrap()[0].lag_events == 0).await;
        held.waits.store(true, Ordering::SeqCst);
        held.fails.store(fails, Ordering::SeqCst);
        let id = parked(&store).await.remove(0).0;
        store.resume_parked(&id, None).await.unwrap();
        held.is_inside().await;
        then(&store, &held, id).await;
        over.store(true, Ordering::SeqCst);
    };
    zip(run, operator).await.0.unwrap();
    held
}

#[test]
fn a_parked_event_that_is_dropped_while_it_fails_again_stays_dropped() {
    block_on(async {
        while_tried_again(true, async |store, held, id| {
            store.drop_parked(&id, None).await.unwrap();
            held.go_on();
            pause(50).await;
            assert_eq!(parked(store).await, []);
        })
        .await;
    });
}

#[test]
fn a_move_is_refused_where_an_operator_has_changed_parked_events_since_they_were_looked_at() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let of = subscription(&store).claim().await.unwrap();
        let (id, position) = (of.cursor().id.clone(), of.position());
        store.resume_parked(&id, None).await.unwrap();
        let move_of = || Advance::new(of.lease().clone(), position, position, Duration::from_secs(1));
        for (seen, is_taken) in [(0, false), (1, true)] {
            let moved = store.engine().step(&id, &Step::Advance(move_of().with_parked_seen(seen))).await;
            assert_eq!(moved.is_ok(), is_taken);
        }
        store.engine().step(&id, &Step::Advance(move_of())).await.unwrap();
    });
}

#[test]
fn what_waits_behind_an_event_that_is_dropped_while_it_is_handled_is_passed_over() {
    block_on(async {
        let held = while_tried_again(false, async |store, held, id| {
            store.drop_parked(&id, None).await.unwrap();
            held.go_on();
            pause(50).await;
            assert_eq!(parked(store).await, []);
        })
        .await;
        assert_eq!(held.handled(), [1]);
    });
}

#[test]
fn a_parked_event_that_is_resumed_while_it_fails_again_is_tried_once_more() {
    block_on(async {
        let held = while_tried_again(true, async |store, held, id| {
            store.resume_parked(&id, None).await.unwrap();
            // The running attempt has the old handler, the next one the repaired one.
            held.fails.store(false, Ordering::SeqCst);
            held.go_on();
            until(async || parked(store).await.is_empty()).await;
        })
        .await;
        assert_eq!(held.handled(), [1, 2]);
    });
}

#[test]
fn a_parked_event_that_was_handled_is_not_handled_again_because_another_is_resumed() {
    block_on(async {
        let held = while_tried_again(false, async |store, held, id| {
            store.resume_parked(&id, Position::new(99).ok()).await.unwrap();
            held.go_on();
            until(async || parked(store).await.is_empty()).await;
        })
        .await;
        assert_eq!(held.handled(), [1, 2]);
    });
}

#[test]
fn a_pause_is_heeded_between_two_attempts() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        say(&store, "a").await;
        let pauses = (Duration::from_millis(20), Duration::from_millis(20));
        let policy = FailurePolicy::default().with_attempts(u32::MAX).with_pauses(pauses.0, pauses.1);
        let (tries, of) = (Arc::new(AtomicU32::new(0)), subscription(&store).on_failure(policy));
        let handler = Arc::clone(&tries);
        let run = async {
            of.run_batches(std::future::pending(), move |_: Delivery| {
                handler.fetch_add(1, Ordering::SeqCst);
                async { Err("down".into()) }
            })
            .await
            .unwrap();
        };
        let operator = async {
            until(async || tries.load(Ordering::SeqCst) > 2).await;
            store.pause_subscription("s").await.unwrap();
            pause(50).await;
            let before = tries.load(Ordering::SeqCst);
            pause(200).await;
            assert_eq!(tries.load(Ordering::SeqCst), before, "it goes on");
            store.resume_subscription("s").await.unwrap();
            until(async || tries.load(Ordering::SeqCst) > before).await;
        };
        or(run, operator).await;
    });
}

#[test]
fn a_parked_event_that_the_filter_does_not_let_through_any_more_is_done() {
    block_on(async {
        for then in [FailureAction::Park, FailureAction::ParkAlone] {
            let store = EventStore::new(MemoryEngine::new());
            say(&store, "a").await;
            say(&store, "b").await;
            let policy = FailurePolicy::new(then).with_attempts(1);
            let of = subscription(&store).on_failure(policy);
            let two = number_parked(&store, 2);
            of.run(two, async |_| Err("poison".into())).await.unwrap();

            let id = parked(&store).await.remove(0).0;
            store.resume_parked(&id, None).await.unwrap();
            let b = store.find::<Talk>("b").await.unwrap().unwrap();
            let of = of.with_filter(Filter::all().with_aggregate(b));
            let handled: Arc<Mutex<Vec<i64>>> = Arc::default();
            let handler = Arc::clone(&handled);
            let none = number_parked(&store, 0);
            of.run(none, move |event| {
                handler.lock().unwrap().push(event.position().get());
                async { Ok(()) }
            })
            .await
            .unwrap();
            assert_eq!(*handled.lock().unwrap(), [2]);
        }
    });
}

#[test]
fn who_has_claimed_it_hears_of_a_pause_and_of_its_end_at_once() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let mut owned = store.subscription("s").unwrap().claim().await.unwrap();
        let began = Instant::now();
        let (next, ()) = zip(owned.next(), async {
            pause(20).await;
            store.pause_subscription("s").await.unwrap();
        })
        .await;
        assert!(matches!(next.map_err(|error| error.kind().clone()), Err(ErrorKind::Paused)));
        say(&store, "a").await;
        assert!(owned.next().await.is_err());
        store.resume_subscription("s").await.unwrap();
        assert_eq!(owned.next().await.unwrap().events().len(), 1);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    });
}

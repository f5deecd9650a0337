//! Projections in memory: exactly once with a cursor, or inside the commit.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use evercore_memory::{
    Aggregate, AggregateId, ErrorKind, EventStore, FailureAction, FailurePolicy, Json, MemoryEngine,
    PageLimit, RunEnd,
};
use futures_lite::future::block_on;
use serde::{Deserialize, Serialize};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Account {
    balance: i64,
}

#[derive(Serialize, Deserialize)]
enum AccountEvent {
    Deposited(i64),
}

impl Aggregate for Account {
    const TYPE: &'static str = "account";
    type Event = AccountEvent;
    type Codec = Json;

    fn apply(&mut self, AccountEvent::Deposited(amount): AccountEvent) {
        self.balance += amount;
    }
}

type Sums = BTreeMap<AggregateId, i64>;

fn add(sums: &mut Sums, event: &evercore_memory::Event) -> evercore_memory::Result<()> {
    let AccountEvent::Deposited(amount) = event.decode::<Account>()?;
    *sums.entry(event.aggregate()).or_default() += amount;
    Ok(())
}

async fn deposit(store: &EventStore, account: &str, amount: i64) -> evercore_memory::Result<()> {
    let mut work = store.begin();
    let mut account = work.load_or_create::<Account>(account).await?;
    work.record(&mut account, AccountEvent::Deposited(amount))?;
    work.commit().await.map(drop)
}

#[test]
fn a_projection_counts_each_event_once_though_its_handler_fails_and_panics() {
    block_on(async {
        let engine = MemoryEngine::new();
        let store = EventStore::new(engine.clone());
        for amount in 1..=100 {
            deposit(&store, &format!("account {}", amount % 7), amount).await.unwrap();
        }
        let (sums, tries) = (Arc::new(Mutex::new(Sums::new())), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&tries);
        let projection = engine.projection(Arc::clone(&sums), move |sums, delivery| {
            for event in delivery.events() {
                add(sums, event)?;
                match count.fetch_add(1, Ordering::Relaxed) % 18 {
                    8 => return Err("not now".into()),
                    17 => std::panic::resume_unwind(Box::new("not now")),
                    _ => {}
                }
            }
            Ok(())
        });
        let policy = FailurePolicy::new(FailureAction::Stop).with_pauses(Duration::ZERO, Duration::ZERO);
        let of =
            store.subscription("sums").unwrap().with_batch(PageLimit::events(10).unwrap()).on_failure(policy);
        let total = || sums.lock().unwrap().values().sum::<i64>();
        let shutdown = async {
            while total() < 5_050 {
                store.engine().pause(Duration::from_millis(1)).await;
            }
        };
        assert_eq!(of.run_sink(shutdown, projection).await.unwrap(), RunEnd::ShutDown);
        assert_eq!(total(), 5_050);
        assert!(tries.load(Ordering::Relaxed) > 100, "nothing failed");
    });
}

#[test]
fn an_inline_projection_never_lags_and_refuses_whole_commits() {
    let engine = MemoryEngine::new();
    let store = EventStore::new(engine.clone());
    block_on(deposit(&store, "before", 1_000)).unwrap();
    let sums = Arc::new(Mutex::new(Sums::new()));
    let handle = |sums: &mut Sums, events: &[evercore_memory::Event]| {
        for event in events {
            add(sums, event)?;
            if sums[&event.aggregate()] == 13 {
                return Err("thirteen".into());
            }
        }
        Ok(())
    };
    engine.inline_projection("sums", 1, Arc::clone(&sums), handle).unwrap();
    assert_eq!(sums.lock().unwrap().values().sum::<i64>(), 1_000, "what was there is handled at once");
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (store, sums) = (store.clone(), Arc::clone(&sums));
            scope.spawn(move || {
                block_on(async {
                    let name = format!("account {number}");
                    for round in 1..=50_i64 {
                        deposit(&store, &name, 2).await.unwrap();
                        let id = store.find::<Account>(&name).await.unwrap().unwrap();
                        assert_eq!(sums.lock().unwrap().get(&id), Some(&(round * 2)), "seen with the commit");
                    }
                });
            });
        }
    });
    block_on(async {
        let before = (store.head().await.unwrap(), sums.lock().unwrap().clone());
        let refused = deposit(&store, "unlucky", 13).await.unwrap_err();
        assert!(matches!(refused.kind(), ErrorKind::Rejected));
        assert_eq!(std::error::Error::source(&refused).unwrap().to_string(), "thirteen");
        assert_eq!((store.head().await.unwrap(), sums.lock().unwrap().clone()), before);
        let state = &store.subscription_states("sums").await.unwrap()[0];
        assert_eq!((state.lag_events, state.is_owned), (0, false));
        assert!(engine.inline_projection("sums", 0, Arc::clone(&sums), |_, _| Ok(())).is_err());
    });
}

#[test]
fn an_inline_projection_passes_nothing_over() {
    let engine = MemoryEngine::new();
    let store = EventStore::new(engine.clone());
    let count = Arc::new(Mutex::new(0));
    let counted = |name: &str, count: &Arc<Mutex<usize>>| {
        let handle = |count: &mut usize, events: &[evercore_memory::Event]| {
            *count += events.len();
            Ok(())
        };
        engine.inline_projection(name, 1, Arc::clone(count), handle).unwrap();
    };
    counted("count", &count);
    block_on(async {
        deposit(&store, "one", 1).await.unwrap();
        store.pause_subscription("count").await.unwrap();
        deposit(&store, "one", 1).await.unwrap();
        store.resume_subscription("count").await.unwrap();

        // A commit without events, and a new projection, do not move this one.
        let mut work = store.begin();
        work.create_with_key::<Account>("another").await.unwrap();
        work.commit().await.unwrap();
        let other = Arc::new(Mutex::new(0));
        counted("other", &other);
        assert_eq!(*other.lock().unwrap(), 2);

        deposit(&store, "one", 1).await.unwrap();
        assert_eq!((*count.lock().unwrap(), *other.lock().unwrap()), (3, 3));
    });
}

#[test]
fn an_inline_projection_that_is_far_behind_does_not_hold_up_others() {
    let engine = MemoryEngine::new();
    let store = EventStore::new(engine.clone());
    let count = Arc::new(Mutex::new(0));
    let handle = |count: &mut usize, events: &[evercore_memory::Event]| {
        std::thread::sleep(Duration::from_micros(100) * u32::try_from(events.len()).unwrap());
        *count += events.len();
        Ok(())
    };
    engine.inline_projection("slow", 1, Arc::clone(&count), handle).unwrap();
    block_on(async {
        store.pause_subscription("slow").await.unwrap();
        let mut work = store.begin();
        let mut account = work.create_with_key::<Account>("many").await.unwrap();
        work.record_all(&mut account, (0..8_000).map(|_| AccountEvent::Deposited(1))).unwrap();
        work.commit().await.unwrap();
        store.resume_subscription("slow").await.unwrap();
    });
    std::thread::scope(|scope| {
        let behind = scope.spawn(|| block_on(deposit(&store, "behind", 1)));
        std::thread::sleep(Duration::from_millis(50));
        let began = std::time::Instant::now();
        block_on(store.head()).unwrap();
        let took = began.elapsed();
        assert!(took < Duration::from_millis(500), "{took:?}");
        assert!(!behind.is_finished());
        behind.join().unwrap().unwrap();
    });
    assert_eq!(*count.lock().unwrap(), 8_001);
}

#[test]
fn a_projection_that_takes_longer_than_its_lease_keeps_it_while_nobody_else_wants_it() {
    block_on(async {
        let engine = MemoryEngine::new();
        let store = EventStore::new(engine.clone());
        for amount in 1..=4 {
            deposit(&store, "account", amount).await.unwrap();
        }
        let slow = engine.projection(Arc::new(Mutex::new(0)), |count, _| {
            std::thread::sleep(Duration::from_millis(60));
            *count += 1;
            Ok(())
        });
        let subscription = store.subscription("slow").unwrap().with_lease(Duration::from_millis(30));
        subscription.declare().await.unwrap();
        let done = async {
            let head = store.head().await.unwrap();
            store.wait_for_position(head, "slow", Duration::from_secs(5)).await.unwrap();
        };
        subscription.with_batch(PageLimit::events(1).unwrap()).run_sink(done, slow).await.unwrap();
        assert_eq!(store.subscription_states("slow").await.unwrap()[0].cursor.epoch, 1, "claims");
    });
}

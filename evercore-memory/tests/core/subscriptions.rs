//! How subscriptions run: parked events, attempts, versions, lost leases, shutdowns, failing engines.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use evercore_memory::engine::*;
use evercore_memory::*;
use futures_lite::future::{block_on, or, poll_once, zip};
use serde::{Deserialize, Serialize};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Talk {
    n: u32,
}
#[derive(Serialize, Deserialize)]
enum TalkEvent {
    Said { text: String },
}
impl Aggregate for Talk {
    const TYPE: &'static str = "talk";
    type Event = TalkEvent;
    type Codec = Json;
    fn apply(&mut self, _: TalkEvent) {
        self.n += 1;
    }
}
async fn say(store: &EventStore, key: &str, len: usize) {
    let mut work = store.begin();
    let mut talk = work.load_or_create::<Talk>(key).await.unwrap();
    work.record(&mut talk, TalkEvent::Said { text: "x".repeat(len) }).unwrap();
    work.commit().await.unwrap();
}
fn policy() -> FailurePolicy {
    FailurePolicy::new(FailureAction::Park)
        .with_attempts(2)
        .with_pauses(Duration::from_millis(1), Duration::from_millis(1))
}
async fn pause(ms: u64) {
    futures_timer::Delay::new(Duration::from_millis(ms)).await;
}
async fn parked_one(store: &EventStore) -> CursorId {
    loop {
        if let Ok(p) = store.parked("s").await
            && let Some((id, _)) = p.into_iter().next()
        {
            return id;
        }
        pause(5).await;
    }
}

/// An engine that finishes a step in a task: the answer comes later than the effect.
#[derive(Debug)]
struct Late(MemoryEngine, Renewals);
#[derive(Debug, PartialEq)]
enum Renewals {
    Answered,
    /// As on a dead connection that is not noticed yet.
    NotAnswered,
}
impl SubscriptionStorage for Late {
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, Result<Option<Cursor>>> {
        Box::pin(async move {
            if self.1 == Renewals::NotAnswered && matches!(step, Step::Renew { .. }) {
                std::future::pending::<()>().await;
            }
            let done = self.0.step(id, step).await;
            pause(20).await;
            done
        })
    }
    fn change<'a>(
        &'a self,
        name: &'a SubscriptionName,
        change: &'a SubscriptionChange,
    ) -> BoxFuture<'a, Result<Changed>> {
        self.0.change(name, change)
    }
    fn cursors<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Cursors>> {
        self.0.cursors(of)
    }
    fn backlogs<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Backlogs>> {
        self.0.backlogs(of)
    }

    fn parked<'a>(
        &'a self,
        id: &'a CursorId,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Parked>>> {
        self.0.parked(id, after, limit)
    }
}
impl StorageEngine for Late {
    fn identity(&self) -> StoreId {
        self.0.identity()
    }

    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>> {
        self.0.reserve(count)
    }
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>> {
        self.0.commit(batch)
    }
    fn command<'a>(&'a self, c: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>> {
        self.0.command(c)
    }
    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>> {
        self.0.forget_commands(before)
    }
    fn settle<'a>(&'a self, c: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>> {
        self.0.settle(c)
    }
    fn load(&self, r: LoadRequest) -> BoxFuture<'_, Result<Option<History>>> {
        self.0.load(r)
    }
    fn read_aggregate(&self, q: AggregateQuery) -> BoxFuture<'_, Result<Events>> {
        self.0.read_aggregate(q)
    }
    fn read_log<'a>(&'a self, q: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>> {
        self.0.read_log(q)
    }
    fn head(&self) -> BoxFuture<'_, Result<Position>> {
        self.0.head()
    }
    fn position_at(&self, t: Timestamp) -> BoxFuture<'_, Result<Position>> {
        self.0.position_at(t)
    }
    fn wait(&self, a: Position, m: Duration) -> BoxFuture<'_, Result<Position>> {
        self.0.wait(a, m)
    }
    fn pause(&self, t: Duration) -> BoxFuture<'_, ()> {
        self.0.pause(t)
    }
    fn warmup<'a>(&'a self, t: &'a [KnownType]) -> BoxFuture<'a, Result<()>> {
        self.0.warmup(t)
    }
    fn types(&self) -> BoxFuture<'_, Result<Vec<KnownType>>> {
        self.0.types()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        StorageEngine::close(&self.0)
    }
}

#[test]
fn what_waits_is_not_lost_when_others_are_tried_again() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        say(&store, "b", 1).await; // 1
        let (fixed, failed_once) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let s = stop.clone();
        let shutdown = async move {
            while !s.load(Ordering::Relaxed) {
                pause(5).await;
            }
        };
        let (st, f, fo, se) = (store.clone(), fixed, failed_once, seen.clone());
        let sub = store.subscription("s").unwrap().on_failure(policy());
        let run = sub.run(shutdown, move |event| {
            let (st, f, fo, se) = (st.clone(), f.clone(), fo.clone(), se.clone());
            async move {
                let p = event.position().get();
                if p == 1 && !f.load(Ordering::Relaxed) {
                    return Err("poison".into());
                }
                if p == 2 {
                    f.store(true, Ordering::Relaxed);
                    let (id, _) = st.parked("s").await?.remove(0);
                    st.resume_parked(&id, None).await?;
                }
                if p == 4 && !fo.swap(true, Ordering::Relaxed) {
                    return Err("hiccup".into());
                }
                se.lock().unwrap().push(p);
                Ok(())
            }
        });
        let drive = async {
            parked_one(&store).await;
            say(&store, "a", 1).await;
            say(&store, "b", 1).await;
            say(&store, "a", 1).await; // 2 3 4
            pause(500).await;
            stop.store(true, Ordering::Relaxed);
        };
        zip(run, drive).await.0.unwrap();
        let mut seen = seen.lock().unwrap().clone();
        seen.sort();
        assert_eq!(seen, [1, 2, 3, 4]);
    });
}

#[test]
fn large_events_that_wait_come_all() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        for _ in 0..3 {
            say(&store, "b", 5 * 1024 * 1024).await;
        }
        let fixed = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let s = stop.clone();
        let shutdown = async move {
            while !s.load(Ordering::Relaxed) {
                pause(5).await;
            }
        };
        let (f, se) = (fixed.clone(), seen.clone());
        let sub = store.subscription("s").unwrap().on_failure(policy());
        let run = sub.run(shutdown, move |event| {
            let (f, se) = (f.clone(), se.clone());
            async move {
                if !f.load(Ordering::Relaxed) {
                    return Err("poison".into());
                }
                se.lock().unwrap().push(event.position().get());
                Ok(())
            }
        });
        let drive = async {
            let id = parked_one(&store).await;
            pause(300).await;
            fixed.store(true, Ordering::Relaxed);
            store.resume_parked(&id, None).await.unwrap();
            pause(500).await;
            stop.store(true, Ordering::Relaxed);
        };
        zip(run, drive).await.0.unwrap();
        let seen = seen.lock().unwrap().clone();
        assert_eq!(seen, [1, 2, 3]);
    });
}

#[test]
fn a_new_version_begins_where_the_old_one_lags() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let sub = |v| {
            store
                .subscription("s")
                .unwrap()
                .with_version(v)
                .starting(Start::End)
                .with_lease(Duration::from_millis(60))
        };
        sub(1).declare().await.unwrap();
        for _ in 0..5 {
            say(&store, "b", 1).await;
        }
        let mut two = sub(2).claim().await.unwrap();
        let next = or(async { two.next().await.map(|d| d.events().len()) }, async {
            pause(200).await;
            Ok(0)
        })
        .await;

        let one = sub(1).claim().await.map(|_| ());

        assert!(next.unwrap() == 5 || one.is_ok());
    });
}

#[test]
fn an_old_version_does_not_come_back() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        say(&store, "b", 1).await;
        let sub = |v| store.subscription("s").unwrap().with_version(v);
        for v in [1, 2] {
            let mut owned = sub(v).claim().await.unwrap();
            let d = owned.next().await.unwrap();

            owned.ack(&d).await.unwrap();
            owned.release().await.unwrap();
        }
        // v2 takes over
        let mut two = sub(2).claim().await.unwrap();
        or(async { two.next().await.map(drop) }, async {
            pause(100).await;
            Ok(())
        })
        .await
        .unwrap();
        assert_eq!(store.live_version("s").await.unwrap(), 2);
        store.remove_version("s", 1).await.unwrap();
        let again = sub(1).claim().await;
        if let Ok(mut one) = again {
            let d = one.next().await.unwrap();
            panic!("v1 again, replay: {}", d.is_replay());
        }
    });
}

#[test]
fn a_paused_version_is_not_taken_over() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let sub = |v| store.subscription("s").unwrap().with_version(v).without_standby();
        sub(1).declare().await.unwrap();
        store.pause_subscription("s").await.unwrap();
        say(&store, "b", 1).await;
        let mut two = sub(2).claim().await.unwrap();
        let delivered = or(async { two.next().await.map(|_| true) }, async {
            pause(150).await;
            Ok(false)
        })
        .await;
        assert!(!delivered.unwrap());
        store.resume_subscription("s").await.unwrap();
        assert!(!two.next().await.unwrap().is_replay());
    });
}

#[test]
fn a_lease_without_end() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        say(&store, "b", 1).await;
        let sub = store.subscription("s").unwrap().with_lease(Duration::MAX);
        let mut owned = sub.claim().await.unwrap();
        owned.next().await.unwrap();
    });
}

#[test]
fn a_shutdown_skips_nothing() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        say(&store, "b", 1).await;
        let sub = store
            .subscription("s")
            .unwrap()
            .on_failure(FailurePolicy::new(FailureAction::Skip).with_attempts(1));
        sub.run_batches(pause(50), |d: Delivery| async move {
            while !d.is_stopping() {
                pause(5).await;
            }
            Err("stopping".into())
        })
        .await
        .unwrap();
        assert_eq!(store.subscription_states("s").await.unwrap()[0].cursor.position, Position::ZERO);
    });
}

#[test]
fn a_dropped_ack_keeps_the_lease() {
    block_on(async {
        let store = EventStore::new(Late(MemoryEngine::new(), Renewals::Answered));
        say(&store, "a", 1).await;
        let mut owned = store.subscription("s").unwrap().claim().await.unwrap();
        let one = owned.next().await.unwrap();
        assert!(poll_once(owned.ack(&one)).await.is_none()); // select! took another branch
        say(&store, "a", 1).await;
        let two = owned.next().await.unwrap();
        owned.ack(&two).await.unwrap();
    });
}

#[test]
fn a_dropped_next_keeps_the_lease() {
    block_on(async {
        let store = EventStore::new(Late(MemoryEngine::new(), Renewals::Answered));
        let none = Filter::all().with_aggregate_type(AggregateType::new("nothing").unwrap());
        let mut owned = store.subscription("s").unwrap().with_filter(none).claim().await.unwrap();
        for i in 0..60 {
            say(&store, "a", 1).await;
            let tick = async {
                pause(if i % 8 == 7 { 45 } else { 7 }).await;
                Ok(())
            };
            or(async { owned.next().await.map(drop) }, tick).await.unwrap();
        }
    });
}

#[test]
fn a_reset_does_not_bring_a_retired_version_back() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        say(&store, "b", 1).await;
        let sub = |v| store.subscription("s").unwrap().with_version(v);
        for v in [1, 2] {
            let mut owned = sub(v).claim().await.unwrap();
            let d = owned.next().await.unwrap();
            owned.ack(&d).await.unwrap();
            owned.release().await.unwrap();
        }
        let mut two = sub(2).claim().await.unwrap();
        or(async { two.next().await.map(drop) }, async {
            pause(100).await;
            Ok(())
        })
        .await
        .unwrap();
        assert_eq!(store.live_version("s").await.unwrap(), 2);
        store.reset_subscription("s", Start::Beginning).await.unwrap();
        assert_eq!(store.live_version("s").await.unwrap(), 2);
    });
}

struct Refuses(Arc<AtomicUsize>);

impl Sink for Refuses {
    fn deliver<'a>(&'a self, _: &'a Delivery, _: &'a Advance) -> BoxFuture<'a, Outcome> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Box::pin(async { Outcome::Refused(Error::new(ErrorKind::Unavailable, "the connection broke")) })
    }

    fn tells_which(&self) -> bool {
        false
    }

    fn holds_cursor(&self) -> bool {
        true
    }
}

#[test]
fn an_engine_that_fails_is_not_asked_at_full_speed() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        say(&store, "a", 1).await;
        let count = Arc::new(AtomicUsize::new(0));
        let of = store.subscription("s").unwrap();
        let run = async { of.run_sink(std::future::pending(), Refuses(Arc::clone(&count))).await.map(drop) };
        or(run, async {
            pause(300).await;
            Ok(())
        })
        .await
        .unwrap();
        let count = count.load(Ordering::Relaxed);
        assert!((2..20).contains(&count), "{count} deliveries in 300 ms");
    });
}

#[test]
fn each_event_has_its_attempts_and_its_pauses() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        for name in ["a", "b", "c", "d", "e"] {
            say(&store, name, 1).await;
        }
        let began = Instant::now();
        let pauses = (Duration::from_millis(40), Duration::from_millis(40));
        let policy = FailurePolicy::new(FailureAction::Park).with_attempts(2).with_pauses(pauses.0, pauses.1);
        let tries: Arc<Mutex<Vec<(i64, u32)>>> = Arc::default();
        let handler = Arc::clone(&tries);
        let of = store.subscription("s").unwrap().on_failure(policy);
        let all = async {
            while store.parked("s").await.map_or(0, |parked| parked.len()) < 5 {
                pause(2).await;
            }
        };
        of.run(all, move |event| {
            handler.lock().unwrap().push((event.position().get(), event.attempt()));
            async { Err("down".into()) }
        })
        .await
        .unwrap();
        let expected: Vec<_> = (1..=5).flat_map(|position| [(position, 1), (position, 2)]).collect();
        assert_eq!(*tries.lock().unwrap(), expected);
        assert!(began.elapsed() > Duration::from_millis(20), "no pause at all in {:?}", began.elapsed());
    });
}

#[test]
fn a_batch_has_one_event_at_least() {
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        block_on(async {
            let store = EventStore::new(MemoryEngine::new());
            say(&store, "a", 1).await;
            let none = PageLimit::events(0).unwrap();
            let mut owned = store.subscription("s").unwrap().with_batch(none).claim().await.unwrap();
            done.send(owned.next().await.unwrap().events().len()).unwrap();
            let news = store.subscribe(Filter::all(), Start::Beginning).await.unwrap();
            done.send(news.with_batch(none).next().await.unwrap().len()).unwrap();
        });
    });
    // In a thread, because a failure would never end.
    for _ in 0..2 {
        assert_eq!(is_done.recv_timeout(Duration::from_secs(2)), Ok(1));
    }
}

#[test]
fn a_handler_does_not_outlive_a_lease_whose_renewal_is_not_answered() {
    block_on(async {
        let store = EventStore::new(Late(MemoryEngine::new(), Renewals::NotAnswered));
        say(&store, "a", 1).await;
        let lease = Duration::from_millis(300);
        let mut owned = store.subscription("s").unwrap().with_lease(lease).claim().await.unwrap();
        let began = Instant::now();
        let kept = owned.keep(pause(2_000)).await;
        assert!(matches!(kept.map_err(|error| error.kind().clone()), Err(ErrorKind::LeaseLost)));
        assert!(began.elapsed() < lease, "{:?}", began.elapsed());
    });
}

#[test]
fn a_shutdown_is_seen_by_a_runner_that_never_waits() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        for _ in 0..200 {
            say(&store, "a", 1).await;
        }
        let handled = Arc::new(AtomicUsize::new(0));
        let handler = Arc::clone(&handled);
        let enough = poll_fn(|_| match handled.load(Ordering::Relaxed) {
            0..50 => Poll::Pending,
            _ => Poll::Ready(()),
        });
        let of = store.subscription("s").unwrap().with_batch(PageLimit::events(10).unwrap());
        of.run(enough, move |_| {
            handler.fetch_add(1, Ordering::Relaxed);
            async { Ok(()) }
        })
        .await
        .unwrap();
        assert_eq!(handled.load(Ordering::Relaxed), 50);
    });
}

#[test]
fn who_waits_to_claim_is_told_that_a_lease_was_given_back() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let of = store.subscription("s").unwrap();
        let first = of.claim().await.unwrap();
        let began = Instant::now();
        let (second, ()) = zip(of.claim(), async {
            pause(20).await;
            first.release().await.unwrap();
        })
        .await;
        second.unwrap();
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    });
}

#[test]
fn who_may_not_claim_after_a_stop_is_told_why() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        say(&store, "a", 1).await;
        let policy = FailurePolicy::new(FailureAction::Stop).with_attempts(1);
        let sub = store.subscription("s").unwrap().on_failure(policy).without_standby();
        sub.run(std::future::pending(), |_| async { Err("poison".into()) }).await.unwrap_err();
        let refused = sub.claim().await.map(drop).unwrap_err();
        assert_eq!(*refused.kind(), ErrorKind::AlreadyOwned);
        let message = "subscription \"s\" rests after it failed at position 1; resuming it ends the rest";
        assert_eq!(refused.to_string(), message);
        store.resume_subscription("s").await.unwrap();
        sub.claim().await.unwrap();
    });
}

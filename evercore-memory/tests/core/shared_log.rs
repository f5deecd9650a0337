//! What many subscriptions of one process cost: they share what they read, and ask the engine together.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use evercore_core::engine::{
    Append, Backlogs, Batch, Changed, Cursors, History, IdBlock, KnownCommand, LoadRequest, NewAggregate,
    NewEvent, Payload, Step, SubscriptionChange, SubscriptionStorage,
};
use evercore_memory::{
    AggregateId, AggregateQuery, AggregateType, BoxFuture, CommandId, Cursor, CursorId, EventStore,
    EventType, Events, Filter, KnownType, LogPage, LogQuery, MemoryEngine, PageLimit, Parked, Position,
    Receipt, Result, Sequence, Start, StorageEngine, StoreId, SubscriptionName, Timestamp,
};
use futures_lite::future::{block_on, or};

/// Passes all calls on and counts them. Each read takes a moment, as on a server.
#[derive(Debug, Default)]
struct Counted {
    inner: MemoryEngine,
    reads: AtomicUsize,
    waits: AtomicUsize,
    steps: AtomicUsize,
    lists: AtomicUsize,
    /// Reads and waits do not end.
    hangs: AtomicBool,
}

const MOMENT: Duration = Duration::from_millis(1);

impl Counted {
    async fn moment(&self) {
        self.inner.pause(MOMENT).await;
        while self.hangs.load(Ordering::SeqCst) {
            self.inner.pause(MOMENT).await;
        }
    }

    fn count(&self) -> [usize; 4] {
        [&self.reads, &self.waits, &self.steps, &self.lists].map(|count| count.load(Ordering::SeqCst))
    }

    /// The reads, waits, steps and lists since then.
    fn since(&self, before: [usize; 4]) -> [usize; 4] {
        let now = self.count();
        [0, 1, 2, 3].map(|at| now[at] - before[at])
    }
}

impl SubscriptionStorage for Counted {
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, Result<Option<Cursor>>> {
        self.steps.fetch_add(1, Ordering::SeqCst);
        self.inner.step(id, step)
    }

    fn change<'a>(
        &'a self,
        name: &'a SubscriptionName,
        change: &'a SubscriptionChange,
    ) -> BoxFuture<'a, Result<Changed>> {
        self.inner.change(name, change)
    }

    fn cursors<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Cursors>> {
        Box::pin(async move {
            self.lists.fetch_add(1, Ordering::SeqCst);
            self.inner.pause(MOMENT).await;
            self.inner.cursors(of).await
        })
    }

    fn backlogs<'a>(&'a self, of: Option<&'a SubscriptionName>) -> BoxFuture<'a, Result<Backlogs>> {
        self.inner.backlogs(of)
    }

    fn parked<'a>(
        &'a self,
        id: &'a CursorId,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Parked>>> {
        self.inner.parked(id, after, limit)
    }
}

impl StorageEngine for Counted {
    fn identity(&self) -> StoreId {
        self.inner.identity()
    }

    fn reserve(&self, count: u32) -> BoxFuture<'_, Result<IdBlock>> {
        self.inner.reserve(count)
    }

    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Receipt>> {
        self.inner.commit(batch)
    }

    fn command<'a>(&'a self, id: &'a CommandId) -> BoxFuture<'a, Result<Option<KnownCommand>>> {
        self.inner.command(id)
    }

    fn forget_commands(&self, before: Timestamp) -> BoxFuture<'_, Result<u64>> {
        self.inner.forget_commands(before)
    }

    fn settle<'a>(&'a self, command: &'a CommandId) -> BoxFuture<'a, Result<Option<Receipt>>> {
        self.inner.settle(command)
    }

    fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<Option<History>>> {
        self.inner.load(request)
    }

    fn read_aggregate(&self, query: AggregateQuery) -> BoxFuture<'_, Result<Events>> {
        self.inner.read_aggregate(query)
    }

    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>> {
        Box::pin(async move {
            self.reads.fetch_add(1, Ordering::SeqCst);
            self.moment().await;
            self.inner.read_log(query).await
        })
    }

    fn head(&self) -> BoxFuture<'_, Result<Position>> {
        self.inner.head()
    }

    fn position_at(&self, time: Timestamp) -> BoxFuture<'_, Result<Position>> {
        self.inner.position_at(time)
    }

    fn wait(&self, after: Position, at_most: Duration) -> BoxFuture<'_, Result<Position>> {
        Box::pin(async move {
            self.waits.fetch_add(1, Ordering::SeqCst);
            let head = self.inner.wait(after, at_most).await;
            self.moment().await;
            head
        })
    }

    fn pause(&self, time: Duration) -> BoxFuture<'_, ()> {
        self.inner.pause(time)
    }

    fn warmup<'a>(&'a self, types: &'a [KnownType]) -> BoxFuture<'a, Result<()>> {
        self.inner.warmup(types)
    }

    fn types(&self) -> BoxFuture<'_, Result<Vec<KnownType>>> {
        self.inner.types()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        StorageEngine::close(&self.inner)
    }
}

fn store() -> (Arc<Counted>, EventStore) {
    let engine = Arc::new(Counted::default());
    (Arc::clone(&engine), EventStore::shared(engine))
}

fn kind(number: usize) -> AggregateType {
    AggregateType::new(format!("kind{number}")).unwrap()
}

/// Aggregates, one of each kind, that grow event by event.
struct Writer {
    engine: Arc<Counted>,
    ids: Vec<AggregateId>,
    written: Vec<i64>,
}

impl Writer {
    async fn new(engine: &Arc<Counted>, kinds: usize) -> Self {
        let mut block = engine.reserve(u32::try_from(kinds).unwrap()).await.unwrap();
        let ids: Vec<_> = (0..kinds).map(|_| block.next().unwrap()).collect();
        let mut batch = Batch::new();
        for (number, id) in ids.iter().enumerate() {
            batch.create(NewAggregate { id: *id, aggregate_type: kind(number), key: None }).unwrap();
        }
        engine.commit(batch).await.unwrap();
        Self { engine: Arc::clone(engine), written: vec![0; kinds], ids }
    }

    async fn write(&mut self, number: usize, count: i64) -> Receipt {
        let event = || NewEvent {
            event_type: EventType::new("Happened").unwrap(),
            payload: Payload::new("{}").unwrap(),
            time: Timestamp::now(),
            metadata: Arc::default(),
        };
        let mut batch = Batch::new();
        batch
            .append(Append {
                aggregate: self.ids[number],
                aggregate_type: kind(number),
                expected: Sequence::new(self.written[number]).unwrap(),
                events: (0..count).map(|_| event()).collect(),
            })
            .unwrap();
        self.written[number] += count;
        self.engine.commit(batch).await.unwrap()
    }
}

fn of_kind(number: usize) -> Filter {
    Filter::all().with_aggregate_type(kind(number))
}

fn positions(events: &Events) -> Vec<i64> {
    events.iter().map(|event| event.position().get()).collect()
}

/// The positions that a query without subscriptions finds.
async fn stored(store: &EventStore, filter: Filter) -> Vec<i64> {
    let mut log = store.log_reader(LogQuery::after(Position::ZERO).with_filter(filter));
    let mut found = Vec::new();
    while let Some(page) = log.next().await.unwrap() {
        found.extend(positions(&page.events));
    }
    found
}

/// Follows the log with this many views, of which each sees another kind, while this many commits come. Gives the reads
/// and waits.
fn follow(views: usize, commits: usize) -> usize {
    let (engine, store) = store();
    let mut writer = block_on(Writer::new(&engine, views));
    block_on(writer.write(0, 1));
    let end = Position::new(i64::try_from(commits).unwrap() + 1).unwrap();
    let ready = Arc::new(std::sync::Barrier::new(views + 1));
    let followers: Vec<_> = (0..views)
        .map(|number| {
            let (store, ready) = (store.clone(), Arc::clone(&ready));
            thread::spawn(move || {
                block_on(async {
                    let mut view = store.subscribe(of_kind(number), Start::Beginning).await.unwrap();
                    let mut seen = positions(&view.next_page().await.unwrap().events);
                    ready.wait();
                    while view.position() < end {
                        seen.extend(positions(&view.next_page().await.unwrap().events));
                    }
                    assert_eq!(seen, stored(&store, of_kind(number)).await, "what view {number} sees");
                });
            })
        })
        .collect();
    ready.wait();
    let before = engine.count();
    for commit in 0..commits {
        thread::sleep(Duration::from_millis(15));
        block_on(writer.write(commit % views, 1));
    }
    // The threads also read the log once each, for the comparison.
    followers.into_iter().for_each(|follower| follower.join().unwrap());
    let [reads, waits, ..] = engine.since(before);
    reads + waits - views
}

#[test]
fn many_views_cost_as_much_as_one() {
    let (one, many) = (follow(1, 20), follow(40, 20));
    assert!(many <= one + one / 5 + 8, "40 views cost {many} calls, one costs {one}");
}

#[test]
fn partitions_read_the_log_once() {
    let read = |partitions: u32| {
        let (engine, store) = store();
        block_on(async {
            let mut writer = Writer::new(&engine, 16).await;
            for round in 0..32 {
                writer.write(round % 16, 500).await;
            }
            let before = engine.count();
            let handled = Arc::new(AtomicUsize::new(0));
            let counter = Arc::clone(&handled);
            let done = async {
                while handled.load(Ordering::SeqCst) < 16_000 {
                    engine.pause(MOMENT).await;
                }
            };
            let of = store.subscription("all").unwrap().with_partitions(partitions);
            let run = of.run_batches(done, move |delivery| {
                counter.fetch_add(delivery.events().len(), Ordering::SeqCst);
                async { Ok(()) }
            });
            run.await.unwrap();
            assert_eq!(handled.load(Ordering::SeqCst), 16_000);
            engine.since(before)[0]
        })
    };
    let (one, eight) = (read(1), read(8));
    assert!(eight <= 2 * one, "8 partitions read {eight} pages, one reads {one}");
}

#[test]
fn filters_that_match_nothing_write_nothing() {
    const SUBSCRIPTIONS: usize = 30;
    let (engine, store) = store();
    let mut writer = block_on(Writer::new(&engine, 1));
    let is_over = Arc::new(AtomicBool::new(false));
    let runners: Vec<_> = (0..SUBSCRIPTIONS)
        .map(|number| {
            let (engine, is_over) = (Arc::clone(&engine), Arc::clone(&is_over));
            let of = store.subscription(format!("never{number}")).unwrap().with_filter(of_kind(number + 1));
            thread::spawn(move || {
                let over = async {
                    while !is_over.load(Ordering::SeqCst) {
                        engine.pause(Duration::from_millis(5)).await;
                    }
                };
                block_on(of.run(over, async |_| Ok(()))).unwrap();
            })
        })
        .collect();
    block_on(writer.write(0, 1));
    thread::sleep(Duration::from_millis(300));
    let before = engine.count();
    for _ in 0..60 {
        thread::sleep(Duration::from_millis(15));
        block_on(writer.write(0, 1));
    }
    let steps = engine.since(before)[2];
    assert!(steps <= SUBSCRIPTIONS, "{SUBSCRIPTIONS} subscriptions that got nothing took {steps} steps");
    // A caller that waits does not wait for that: the cursor moves for it.
    let receipt = block_on(writer.write(0, 1));
    let began = Instant::now();
    block_on(store.wait_for(&receipt, "never3", Duration::from_secs(10))).unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "it took {:?}", began.elapsed());
    // Nor does a caller that waits first.
    let waiting = {
        let (store, next) = (store.clone(), receipt.last.next());
        thread::spawn(move || {
            let began = Instant::now();
            block_on(store.wait_for_position(next, "never7", Duration::from_secs(10))).unwrap();
            began.elapsed()
        })
    };
    thread::sleep(Duration::from_millis(50));
    block_on(writer.write(0, 1));
    let took = waiting.join().unwrap();
    assert!(took < Duration::from_secs(2), "it took {took:?}");
    is_over.store(true, Ordering::SeqCst);
    runners.into_iter().for_each(|runner| runner.join().unwrap());
    // They store how far they are when they end.
    let states = block_on(store.subscriptions()).unwrap();
    assert!(states.iter().all(|state| state.lag_events == 0), "{states:?}");
}

#[test]
fn callers_that_wait_share_their_queries() {
    let lists = |waiters: usize, names: usize| {
        let (engine, store) = store();
        let mut writer = block_on(Writer::new(&engine, 1));
        let receipt = block_on(writer.write(0, 1));
        for name in 0..names {
            block_on(store.subscription(format!("stuck{name}")).unwrap().declare()).unwrap();
        }
        let before = engine.count();
        let threads: Vec<_> = (0..waiters)
            .map(|number| {
                let (store, receipt) = (store.clone(), receipt.clone());
                thread::spawn(move || {
                    let name = format!("stuck{}", number % names);
                    let time = Duration::from_millis(400);
                    block_on(store.wait_for(&receipt, name, time)).unwrap_err();
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        engine.since(before)[3]
    };
    let (one, same, different) = (lists(1, 1), lists(50, 1), lists(50, 10));
    assert!(same <= 4 * one, "50 callers made {same} queries, one makes {one}");
    assert!(
        different <= 4 * one,
        "50 callers for 10 subscriptions made {different} queries, one makes {one}"
    );
}

#[test]
fn a_view_that_is_dropped_or_not_polled_delays_no_other() {
    let (engine, store) = store();
    let mut writer = block_on(Writer::new(&engine, 2));
    block_on(async {
        writer.write(0, 3).await;
        let mut views = Vec::new();
        for number in [0, 1, 0] {
            let mut view = store.subscribe(of_kind(number), Start::Beginning).await.unwrap();
            view.next_page().await.unwrap();
            views.push(view);
        }
        let [mut first, mut second, mut third] = <[_; 3]>::try_from(views).unwrap();
        for round in 0..20 {
            // The first begins to wait or to read, and is then left as it is, or dropped.
            engine.hangs.store(round % 2 == 0, Ordering::SeqCst);
            let mut begun = Box::pin(first.next_page());
            let mut polls = 0;
            let left = poll_fn(|context| {
                polls += 1;
                match begun.as_mut().poll(context) {
                    Poll::Pending if polls < 3 + round => Poll::Pending,
                    _ => Poll::Ready(()),
                }
            });
            let time = async { engine.pause(Duration::from_millis(10)).await };
            or(left, time).await;
            if round % 3 == 0 {
                drop(begun);
                engine.hangs.store(false, Ordering::SeqCst);
                let last = writer.write(1, 1).await.last;
                while second.position() < last || third.position() < last {
                    if second.position() < last {
                        in_time(second.next_page()).await.unwrap();
                    } else {
                        in_time(third.next_page()).await.unwrap();
                    }
                }
                continue;
            }
            engine.hangs.store(false, Ordering::SeqCst);
            let last = writer.write(1, 1).await.last;
            while second.position() < last {
                in_time(second.next_page()).await.unwrap();
            }
            while third.position() < last {
                in_time(third.next_page()).await.unwrap();
            }
            drop(begun);
        }
        let end = writer.write(0, 1).await.last;
        let mut seen = Vec::new();
        while first.position() < end {
            seen.extend(positions(&in_time(first.next_page()).await.unwrap().events));
        }
        assert_eq!(seen, [end.get()], "the slow view gets what it has not seen");
    });
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    let late = async {
        futures_timer::Delay::new(Duration::from_secs(10)).await;
        panic!("another view is in the way");
    };
    or(pin!(work), late).await
}

#[test]
fn a_slow_view_misses_nothing_and_keeps_no_pages() {
    let (engine, store) = store();
    let mut writer = block_on(Writer::new(&engine, 3));
    block_on(async {
        writer.write(0, 1).await;
        let mut slow = store.subscribe(of_kind(1), Start::Beginning).await.unwrap();
        let mut quick = store.subscribe(Filter::all(), Start::Beginning).await.unwrap();
        let few = PageLimit::events(7).unwrap();
        let mut small = store.subscribe(of_kind(2), Start::Beginning).await.unwrap().with_batch(few);
        let (mut by_slow, mut by_quick, mut by_small) = (Vec::new(), Vec::new(), Vec::new());
        let mut last = Position::ZERO;
        for round in 0..60 {
            last = writer.write(round % 3, 700).await.last;
            while quick.position() < last {
                by_quick.extend(positions(&quick.next_page().await.unwrap().events));
            }
            if round % 20 == 5 {
                for _ in 0..3 {
                    if slow.position() < last {
                        by_slow.extend(positions(&slow.next_page().await.unwrap().events));
                    }
                    let page = small.next_page().await.unwrap().events;
                    assert!(page.len() <= 7);
                    by_small.extend(positions(&page));
                }
            }
        }
        while slow.position() < last {
            by_slow.extend(positions(&slow.next_page().await.unwrap().events));
        }
        while small.position() < last {
            by_small.extend(positions(&small.next_page().await.unwrap().events));
        }
        assert_eq!(by_quick, stored(&store, Filter::all()).await);
        assert_eq!(by_slow, stored(&store, of_kind(1)).await);
        assert_eq!(by_small, stored(&store, of_kind(2)).await);
    });
}

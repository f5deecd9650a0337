//! Reading ahead, seen from the engine: when core asks for pages, how often, and where errors go.

use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use evercore_core::engine::{
    Backlogs, Batch, Changed, Cursors, History, IdBlock, KnownCommand, LoadRequest, Step, SubscriptionChange,
    SubscriptionStorage,
};
use evercore_memory::{
    Aggregate, AggregateQuery, AsOf, BoxFuture, CommandId, Cursor, CursorId, Error, ErrorKind, EventStore,
    Events, Json, KnownType, LogPage, LogQuery, MemoryEngine, PageLimit, Parked, Position, Receipt, Result,
    Sequence, StorageEngine, StoreId, SubscriptionName, Timestamp,
};
use futures_lite::future::{block_on, poll_once};
use serde::{Deserialize, Serialize};

/// Passes all calls on and counts the pages. It can be slow, and fail once.
#[derive(Debug, Default)]
struct Watched {
    inner: MemoryEngine,
    asked: AtomicUsize,
    is_slow: bool,
    /// The page that fails once.
    fails: Mutex<Option<usize>>,
}

impl Watched {
    /// Begins to read a page. If the engine is slow, it is ready at the second poll.
    async fn page(&self) -> Result<()> {
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut is_waiting = self.is_slow;
        poll_fn(|context| {
            context.waker().wake_by_ref();
            if std::mem::take(&mut is_waiting) { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        match self.fails.lock().unwrap().take_if(|page| *page == number) {
            Some(page) => Err(Error::new(ErrorKind::Unavailable, format!("page {page}"))),
            None => Ok(()),
        }
    }
}

impl SubscriptionStorage for Watched {
    fn step<'a>(&'a self, id: &'a CursorId, step: &'a Step) -> BoxFuture<'a, Result<Option<Cursor>>> {
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
        self.inner.cursors(of)
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

impl StorageEngine for Watched {
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
        Box::pin(async move {
            self.page().await?;
            self.inner.read_aggregate(query).await
        })
    }

    fn read_log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<LogPage>> {
        Box::pin(async move {
            self.page().await?;
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
        self.inner.wait(after, at_most)
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

/// An aggregate that stores at every event how many pages the engine was asked for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Witness {
    saw: Vec<usize>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Seen {
    Happened,
}

static ASKED: Mutex<Option<Arc<Watched>>> = Mutex::new(None);

impl Aggregate for Witness {
    const TYPE: &'static str = "witness";
    type Event = Seen;
    type Codec = Json;

    fn apply(&mut self, _: Seen) {
        let engine = ASKED.lock().unwrap();
        self.saw.push(engine.as_ref().map_or(0, |engine| engine.asked.load(Ordering::SeqCst)));
    }
}

/// A store with one aggregate of this many events. Nothing was read yet.
async fn store(events: usize, is_slow: bool) -> (Arc<Watched>, EventStore) {
    let engine = Arc::new(Watched { is_slow, ..Watched::default() });
    let store = EventStore::shared(engine.clone());
    let mut work = store.begin();
    let mut witness = work.create_with_key::<Witness>("w").await.unwrap();
    work.record_all(&mut witness, (0..events).map(|_| Seen::Happened)).unwrap();
    work.commit().await.unwrap();
    (engine, store)
}

fn in_tens() -> LogQuery {
    LogQuery::after(Position::ZERO).with_limit(PageLimit::events(10).unwrap())
}

#[test]
fn the_next_pages_are_asked_for_before_this_one_is_handed_out() {
    block_on(async {
        let (engine, store) = store(30, true).await;
        let mut log = store.log_reader(in_tens());
        for asked in [3, 3, 3] {
            assert_eq!(log.next().await.unwrap().unwrap().events.len(), 10);
            assert_eq!(engine.asked.load(Ordering::SeqCst), asked);
        }
        assert!(log.next().await.unwrap().is_none());
        assert_eq!(engine.asked.load(Ordering::SeqCst), 3, "the end was known");
        assert!(log.next().await.unwrap().is_none());
        assert_eq!(engine.asked.load(Ordering::SeqCst), 4, "it looks again");
    });
}

#[test]
fn an_engine_that_answers_at_once_is_not_hurried() {
    block_on(async {
        let (engine, store) = store(40, false).await;
        let mut log = store.log_reader(in_tens());
        for asked in [2, 2, 3, 4] {
            log.next().await.unwrap().unwrap();
            assert_eq!(engine.asked.load(Ordering::SeqCst), asked);
        }
        assert!(log.next().await.unwrap().is_none());
    });
}

#[test]
fn an_error_comes_in_the_place_of_its_page_and_the_page_comes_after_it() {
    block_on(async {
        for is_slow in [true, false] {
            let (engine, store) = store(40, is_slow).await;
            *engine.fails.lock().unwrap() = Some(3);
            let mut log = store.log_reader(in_tens());
            let mut found = Vec::new();
            for _ in 0..2 {
                found.extend(log.next().await.unwrap().unwrap().events);
            }
            assert_eq!(log.next().await.unwrap_err().to_string(), "page 3");
            while let Some(page) = log.next().await.unwrap() {
                found.extend(page.events);
            }
            let positions = found.iter().map(|event| event.position().get());
            assert!(positions.eq(1..=40));
        }
    });
}

#[test]
fn a_dropped_next_does_not_ask_twice() {
    block_on(async {
        let (engine, store) = store(30, true).await;
        let mut log = store.log_reader(in_tens());
        assert!(poll_once(log.next()).await.is_none());
        assert_eq!(engine.asked.load(Ordering::SeqCst), 1);
        let page = log.next().await.unwrap().unwrap();
        assert_eq!(page.events.first().unwrap().position().get(), 1);
        assert_eq!(engine.asked.load(Ordering::SeqCst), 3);
    });
}

#[test]
fn pages_that_end_early_are_read_one_behind_the_other() {
    block_on(async {
        let (engine, store) = store(30, true).await;
        // A payload has at least four bytes, so the limit in bytes ends a page after some of its ten events.
        let limit = PageLimit::events(10).unwrap().and_bytes(16).unwrap();
        let mut log = store.log_reader(LogQuery::after(Position::ZERO).with_limit(limit));
        let (mut found, mut pages) = (Vec::new(), 0);
        while let Some(page) = log.next().await.unwrap() {
            found.extend(page.events.iter().map(|event| event.position().get()));
            pages += 1;
        }
        assert!(found.iter().copied().eq(1..=30) && pages > 3, "{pages} pages: {found:?}");
        assert_eq!(engine.asked.load(Ordering::SeqCst), pages + 1, "one page was asked for in vain");
    });
}

/// One test for everything about `ASKED`, because the tests of this file share it.
#[test]
fn a_long_history_is_folded_while_its_next_page_is_on_its_way() {
    block_on(async {
        let (engine, store) = store(2_500, true).await;
        *ASKED.lock().unwrap() = Some(Arc::clone(&engine));
        let witness = store.load::<Witness>("w").await.unwrap();
        let expected = [vec![1; 1_000], vec![2; 1_000], vec![2; 500]].concat();
        assert_eq!(witness.saw, expected);
        assert_eq!(engine.asked.load(Ordering::SeqCst), 2);

        // A load that ends within a page asks for no other page, or for one page too many.
        engine.asked.store(0, Ordering::SeqCst);
        let early = store.load_as_of::<Witness>("w", AsOf::Sequence(Sequence::new(900).unwrap())).await;
        assert_eq!((early.unwrap().saw.len(), engine.asked.load(Ordering::SeqCst)), (900, 0));
        let early = store.load_as_of::<Witness>("w", AsOf::Position(Position::new(900).unwrap())).await;
        assert_eq!((early.unwrap().saw.len(), engine.asked.load(Ordering::SeqCst)), (900, 1));

        engine.asked.store(0, Ordering::SeqCst);
        *engine.fails.lock().unwrap() = Some(2);
        let error = store.load::<Witness>("w").await.unwrap_err();
        assert_eq!(error.to_string(), "page 2");
    });
}

#[test]
fn a_reader_goes_where_it_is_needed() {
    fn is_send(_: &(impl Send + 'static)) {}
    block_on(async {
        let (_, store) = store(1, true).await;
        let mut log = store.log_reader(in_tens());
        is_send(&log);
        assert!(format!("{log:?}").contains("LogReader"));
        let next = async move { log.next().await };
        is_send(&next);
    });
}

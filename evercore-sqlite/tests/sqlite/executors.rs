//! The same program in `tokio::spawn`, under smol, and under a plain `block_on`: every future is `Send`.

use std::time::Duration;

use evercore_sqlite::{
    Aggregate, AggregateQuery, AsOf, CommandId, Direction, Error, EventStore, Json, LogQuery, PageLimit,
    Position, Result, Sequence, SqliteEngine, Timestamp,
};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Counter {
    count: u32,
}

#[derive(Debug, Serialize, Deserialize)]
enum CounterEvent {
    Counted,
}

impl Aggregate for Counter {
    const TYPE: &'static str = "counter";
    const SNAPSHOT_EVERY: u32 = 2;
    type Event = CounterEvent;
    type Codec = Json;

    fn apply(&mut self, _: CounterEvent) {
        self.count += 1;
    }
}

/// Calls every asynchronous method. A future that is not `Send` does not compile inside `tokio::spawn`.
async fn everything(store: EventStore) -> Result<u32> {
    let mut work = store.begin();
    let mut first = work.create::<Counter>().await?;
    let mut second = work.create_with_key::<Counter>("second").await?;
    work.record_all(&mut first, [CounterEvent::Counted, CounterEvent::Counted])?;
    work.record(&mut second, CounterEvent::Counted)?;
    work.load::<Counter>("second").await?;
    work.load_or_create::<Counter>("third").await?;
    work.commit().await?;

    store.load_or_create::<Counter>("fourth").await?;
    store.update::<Counter, _, _>("second", |_| [CounterEvent::Counted]).await?;
    store.update_or_create::<Counter, _, _>("fifth", |_| Some(CounterEvent::Counted)).await?;
    let command = CommandId::new("once")?;
    store.update_once::<Counter, _, _>(command.clone(), first.id(), |_| vec![CounterEvent::Counted]).await?;
    store.settle(&command).await?;
    store.receipt(&command).await?;
    let again = || async {
        let mut work = store.begin();
        let mut second = work.load::<Counter>("second").await?;
        work.record(&mut second, CounterEvent::Counted)?;
        work.commit().await
    };
    store.retry(again).await?;

    store.load_as_of::<Counter>("second", AsOf::Recorded(Timestamp::now())).await?;
    store.find::<Counter>("nobody").await?;
    store.read_log(&LogQuery::after(Position::ZERO)).await?;
    let query = AggregateQuery {
        aggregate: first.id(),
        direction: Direction::Backward,
        from: Sequence::MAX,
        to: Sequence::ZERO,
        limit: PageLimit::default(),
    };
    store.read_aggregate(query).await?;
    let head = store.head().await?;
    store.position_at(Timestamp::now()).await?;
    store.wait(head, Duration::from_millis(1)).await?;
    store.warmup::<Counter>().await?;
    store.types().await?;
    Ok(store.load::<Counter>("second").await?.count)
}

async fn open() -> Result<(tempfile::TempDir, EventStore)> {
    let folder = tempfile::tempdir().map_err(Error::rejected)?;
    let engine = SqliteEngine::open(folder.path().join("store.db")).await?;
    Ok((folder, EventStore::new(engine)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inside_tokio_spawn() -> Result<()> {
    let (_folder, store) = open().await?;
    let count = tokio::spawn(everything(store)).await.map_err(Error::rejected)??;
    assert_eq!(count, 3);
    Ok(())
}

#[test]
fn under_smol() -> Result<()> {
    smol::block_on(async {
        let (_folder, store) = open().await?;
        assert_eq!(smol::spawn(everything(store)).await?, 3);
        Ok(())
    })
}

#[test]
fn under_a_bare_block_on() -> Result<()> {
    futures_lite::future::block_on(async {
        let (_folder, store) = open().await?;
        assert_eq!(everything(store).await?, 3);
        Ok(())
    })
}

/// An executor with one thread keeps running while a commit waits for its flush.
#[test]
fn a_commit_does_not_block_the_executors_thread() -> Result<()> {
    futures_lite::future::block_on(async {
        let (_folder, store) = open().await?;
        let mut work = store.begin();
        let mut counter = work.create::<Counter>().await?;
        work.record(&mut counter, CounterEvent::Counted)?;
        let mut commit = Box::pin(work.commit());
        let first = futures_lite::future::poll_once(&mut commit).await;
        assert!(first.is_none(), "the first poll of a commit came back with the flush done");
        commit.await?;
        Ok(())
    })
}

//! A full unit of work refuses the line that adds too much, and is unchanged by it.

use evercore_memory::{Aggregate, ErrorKind, EventStore, Json, MemoryEngine, limits};
use futures_lite::future::block_on;
use serde::{Deserialize, Serialize};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Page {
    lines: usize,
}

#[derive(Serialize, Deserialize)]
enum PageEvent {
    Written(String),
}

impl Aggregate for Page {
    const TYPE: &'static str = "page";
    type Event = PageEvent;
    type Codec = Json;
    /// Decoding many megabytes takes long without optimisation.
    const TRUSTS_CODEC: bool = true;

    fn apply(&mut self, _: PageEvent) {
        self.lines += 1;
    }
}

fn written(bytes: usize) -> PageEvent {
    PageEvent::Written("x".repeat(bytes))
}

#[test]
fn an_event_too_many_is_refused_by_record_and_the_rest_commits() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let mut work = store.begin();
        let mut page = work.create::<Page>().await.unwrap();
        for _ in 0..limits::UNIT_EVENTS {
            work.record(&mut page, written(1)).unwrap();
        }
        let error = work.record(&mut page, written(1)).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("10001 events, the limit is 10000"), "{error}");
        assert_eq!(page.state().lines, limits::UNIT_EVENTS);
        work.commit().await.unwrap();
        assert_eq!(store.load::<Page>(page.id()).await.unwrap().state().lines, limits::UNIT_EVENTS);
    });
}

#[test]
fn a_byte_too_many_is_refused_by_record() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let mut work = store.begin();
        let mut page = work.create::<Page>().await.unwrap();
        // Four of these fit into 64 MiB, so an endless iterator is refused at its fifth event.
        let events = std::iter::repeat_with(|| written(15 * 1024 * 1024));
        assert_eq!(*work.record_all(&mut page, events).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(page.state().lines, 0);
        work.record(&mut page, written(1)).unwrap();
        work.commit().await.unwrap();
    });
}

#[test]
fn an_aggregate_too_many_is_refused_by_create_and_change_key() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let mut work = store.begin();
        let mut pages = Vec::new();
        for nth in 0..limits::UNIT_AGGREGATES {
            pages.push(work.create_with_key::<Page>(format!("page {nth}")).await.unwrap());
        }
        assert_eq!(*work.create::<Page>().await.unwrap_err().kind(), ErrorKind::Invalid);
        work.commit().await.unwrap();

        let mut other = store.begin();
        let mut one = other.create_with_key::<Page>("one more").await.unwrap();
        other.commit().await.unwrap();
        let mut work = store.begin();
        for (nth, page) in pages.iter_mut().enumerate() {
            work.change_key(page, format!("leaf {nth}")).unwrap();
        }
        assert_eq!(*work.change_key(&mut one, "leaf").unwrap_err().kind(), ErrorKind::Invalid);
        // A key that this unit changed may change again, also the key of a new aggregate.
        work.change_key(&mut pages[0], "title").unwrap();
        let mut made = work.create::<Page>().await.unwrap();
        work.change_key(&mut made, "made").unwrap();
        work.commit().await.unwrap();
    });
}

#[test]
fn a_guard_too_many_is_refused() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let mut made = store.begin();
        let mut pages = Vec::new();
        for _ in 0..limits::UNIT_AGGREGATES {
            pages.push(made.create::<Page>().await.unwrap());
        }
        made.commit().await.unwrap();
        let mut more = store.begin();
        pages.push(more.create::<Page>().await.unwrap());
        more.commit().await.unwrap();

        let mut work = store.begin();
        let one_too_many = pages.pop().unwrap();
        pages.iter().chain(pages.last()).for_each(|page| work.guard(page).unwrap());
        assert_eq!(*work.guard(&one_too_many).unwrap_err().kind(), ErrorKind::Invalid);
        work.commit().await.unwrap();
    });
}

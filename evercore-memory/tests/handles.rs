//! A handle belongs to the store that it came from.

#![allow(clippy::unwrap_used)]

use evercore_memory::{Aggregate, ErrorKind, EventStore, Json, Loaded, MemoryEngine};
use futures_lite::future::block_on;
use serde::{Deserialize, Serialize};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Tally {
    count: u32,
}

#[derive(Serialize, Deserialize)]
enum TallyEvent {
    Counted,
}

impl Aggregate for Tally {
    const TYPE: &'static str = "tally";
    type Event = TallyEvent;
    type Codec = Json;

    fn apply(&mut self, TallyEvent::Counted: TallyEvent) {
        self.count += 1;
    }
}

async fn counted(store: &EventStore, key: &str) -> Loaded<Tally> {
    store.update_or_create::<Tally, _, _>(key, |_| [TallyEvent::Counted]).await.unwrap();
    store.load(key).await.unwrap()
}

#[test]
fn a_handle_of_another_store_is_refused() {
    block_on(async {
        let (ours, theirs) = (EventStore::new(MemoryEngine::new()), EventStore::new(MemoryEngine::new()));
        let stranger = counted(&ours, "stranger").await;
        let known = counted(&theirs, "known").await;
        assert_eq!(
            (known.id(), known.sequence()),
            (stranger.id(), stranger.sequence()),
            "only the store differs"
        );
        let created = theirs.begin().create::<Tally>().await.unwrap();

        for mut handle in [known.clone(), created] {
            let mut work = ours.begin();
            let refused = work.record(&mut handle, TallyEvent::Counted).unwrap_err();
            assert_eq!(*refused.kind(), ErrorKind::Invalid);
            assert!(refused.to_string().contains("another store"), "{refused}");
            let all = work.record_all(&mut handle, [TallyEvent::Counted]);
            assert_eq!(*all.unwrap_err().kind(), ErrorKind::Invalid);
            assert_eq!(*work.change_key(&mut handle, "new").unwrap_err().kind(), ErrorKind::Invalid);
            assert!(work.commit().await.unwrap().sequence_of(stranger.id()).is_none());
            let mut work = ours.begin();
            work.guard(&handle);
            let refused = work.commit().await.unwrap_err();
            assert_eq!(*refused.kind(), ErrorKind::Invalid);
            assert!(refused.to_string().contains("another store"), "{refused}");
        }

        let after = ours.load::<Tally>("stranger").await.unwrap();
        assert_eq!((after.count, ours.find::<Tally>("new").await.unwrap()), (1, None));
    });
}

#[test]
fn a_clone_of_an_engine_is_the_same_store() {
    block_on(async {
        let engine = MemoryEngine::new();
        let (one, other) = (EventStore::new(engine.clone()), EventStore::new(engine));
        let mut tally = counted(&one, "a").await;
        let mut work = other.begin();
        work.record(&mut tally, TallyEvent::Counted).unwrap();
        work.commit().await.unwrap();
        assert_eq!(one.load::<Tally>("a").await.unwrap().count, 2);
    });
}

//! A handle belongs to the store that it came from, and to its unit of work.

use evercore_memory::{Aggregate, CommandId, ErrorKind, EventStore, Json, Loaded, MemoryEngine};
use futures_lite::future::block_on;
use serde::{Deserialize, Serialize};

#[derive(Clone, Default, Serialize, Deserialize)]
struct Tally {
    count: u32,
}

#[derive(Serialize, Deserialize)]
enum TallyEvent {
    Counted,
    Added(u32),
}

impl Aggregate for Tally {
    const TYPE: &'static str = "tally";
    type Event = TallyEvent;
    type Codec = Json;

    fn apply(&mut self, event: TallyEvent) {
        self.count += match event {
            TallyEvent::Counted => 1,
            TallyEvent::Added(count) => count,
        }
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
            let refused = work.guard(&handle).unwrap_err();
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

#[test]
fn a_handle_of_a_repeated_command_is_refused() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let known = counted(&store, "known").await;
        let command = CommandId::new("add").unwrap();
        // Two units have the same command id and have loaded the same aggregate.
        let (mut first, mut again) = (store.begin(), store.begin());
        let (mut written, mut phantom) = (known.clone(), known.clone());
        for (work, handle, count) in [(&mut first, &mut written, 5), (&mut again, &mut phantom, 9)] {
            work.set_command(&command);
            work.record(handle, TallyEvent::Added(count)).unwrap();
        }
        let receipt = first.commit().await.unwrap();
        assert!(!receipt.is_repeated());
        let repeated = again.commit().await.unwrap();
        assert_eq!(repeated, receipt);
        assert!(repeated.is_repeated() && store.receipt(&command).await.unwrap().unwrap().is_repeated());

        let mut work = store.begin();
        let refused = work.record(&mut phantom, TallyEvent::Counted).unwrap_err();
        assert_eq!(*refused.kind(), ErrorKind::Invalid, "it has seen 9, and the store has 5");
        work.record(&mut written, TallyEvent::Counted).unwrap();
        work.commit().await.unwrap();
        assert_eq!(store.load::<Tally>("known").await.unwrap().count, 1 + 5 + 1);
    });
}

#[test]
fn a_handle_made_by_a_repeated_command_is_refused() {
    block_on(async {
        let store = EventStore::new(MemoryEngine::new());
        let mut handles = Vec::new();
        for _ in 0..2 {
            let mut work = store.begin();
            work.set_command(CommandId::new("make").unwrap());
            let mut made = work.create::<Tally>().await.unwrap();
            work.record(&mut made, TallyEvent::Counted).unwrap();
            work.commit().await.unwrap();
            handles.push(made);
        }
        let mut work = store.begin();
        work.record(&mut handles[0], TallyEvent::Counted).unwrap();
        let refused = work.record(&mut handles[1], TallyEvent::Counted).unwrap_err();
        assert_eq!(*refused.kind(), ErrorKind::Invalid);
    });
}

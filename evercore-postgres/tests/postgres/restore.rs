//! A dump that is restored into a new cluster is the same store, and so is a cluster that is recovered to a point in time:
//! positions are stored data, not counters of a server.

use evercore_core::engine::{LoadRequest, Target};
use evercore_postgres::{
    Aggregate, AggregateId, CommandId, EventStore, LogQuery, Metadata, PageLimit, Position, PostgresEngine,
    Receipt, Sequence, StorageEngine, Timestamp,
};
use evercore_testkit::postgres::Server;

use crate::common::{Place, block_on};
use crate::orders::{Order, OrderEvent, noted, place, positions, skipped, up_to};

/// The readable content of a store, as text.
async fn everything(engine: &PostgresEngine) -> String {
    let store = EventStore::new(engine.clone());
    let mut text = format!("{} {:?}\n", engine.store_id(), store.types().await.unwrap());
    let page = store.read_log(&LogQuery::after(Position::ZERO)).await.unwrap();
    let mut ids: Vec<AggregateId> = Vec::new();
    for event in &page.events {
        let payload = String::from_utf8_lossy(event.payload()).into_owned();
        text += &format!("{event:?} {payload} {:?} {:?}\n", event.reference(), event.headers());
        ids.push(event.aggregate());
    }
    ids.sort();
    ids.dedup();
    for id in ids {
        let request = LoadRequest {
            target: Target::Id(id),
            snapshot: Some(Order::SNAPSHOT_VERSION),
            up_to: Sequence::MAX,
            limit: PageLimit::default(),
        };
        let history = engine.load(request).await.unwrap().unwrap();
        let key = history.key.as_ref().map(|key| key.as_str().to_owned());
        text += &format!("{id} {key:?} {:?} {:?}\n", history.sequence, history.snapshot);
    }
    text
}

/// Writes some orders with keys, snapshots, commands and metadata, and a key that moved.
async fn fill(store: &EventStore) -> Receipt {
    for round in 0..40 {
        let key = format!("order {}", round % 3);
        store.update_or_create::<Order, _, _>(key, |_| [noted(format!("note {round} – ü"))]).await.unwrap();
    }
    let mut work = store.begin();
    let mut order = work.load::<Order>("order 1").await.unwrap();
    work.change_key(&mut order, "moved").unwrap();
    let metadata =
        Metadata::new().with_reference("a reference").unwrap().with_time(Timestamp::from_micros(-1).unwrap());
    let metadata = metadata.with_header("tenant", "ü").unwrap();
    work.record_with(&mut order, OrderEvent::Placed, &metadata).unwrap();
    work.commit().await.unwrap();
    assert_eq!(store.settle(&CommandId::new("never").unwrap()).await.unwrap(), None);
    let once = CommandId::new("once").unwrap();
    store.update_once::<Order, _, _>(once, "moved", |_| [OrderEvent::Placed]).await.unwrap()
}

#[test]
fn a_restored_store_is_the_same_and_goes_on() {
    block_on(async {
        let Some(old) = Server::builder().start_or_skip() else { return };
        let Some(new) = Server::builder().start_or_skip() else { return };
        let at = Place::on(old.url());
        let engine = at.engine().await;
        let store = EventStore::new(engine.clone());
        let receipt = fill(&store).await;
        let dump = match old.dump("postgres") {
            Err(error) if error.contains("version mismatch") || error.contains("could not be run") => {
                return skipped(&format!("dump and restore: {error}"));
            }
            dump => dump.unwrap(),
        };
        let before = everything(&engine).await;
        assert!(before.contains("Snapshot") && before.contains("moved"), "{before}");
        let newest = store.load_or_create::<Order>("not in the dump").await.unwrap().id();

        new.create_database("restored", "").unwrap();
        new.restore("restored", &dump).unwrap();
        let restored = at.builder().migrate_on_connect(false).connect(&new.url_of("restored")).await.unwrap();
        assert_eq!(everything(&restored).await, before);
        let again = EventStore::new(restored.clone());
        let once = CommandId::new("once").unwrap();
        assert_eq!(again.receipt(&once).await.unwrap(), Some(receipt.clone()));
        let repeated = again.update_once::<Order, _, _>(once, "moved", |_| [OrderEvent::Placed]).await;
        assert_eq!(repeated.unwrap(), receipt);
        assert_eq!(again.settle(&CommandId::new("never").unwrap()).await.unwrap(), None);

        // It goes on after the head. New ids are drawn at random, so none is used twice.
        let next = place(&again, "moved").await.unwrap();
        assert_eq!(next.last, receipt.last.plus(1));
        let made = again.load_or_create::<Order>("new").await.unwrap().id();
        assert_ne!(made, newest, "it was given out before");
        for round in 0..15 {
            place(&again, &format!("later {}", round % 4)).await.unwrap();
        }
        let head = next.last.plus(15).get();
        assert_eq!(positions(&restored).await, up_to(head));
        assert_eq!(
            again.load::<Order>("moved").await.unwrap().events,
            store.load::<Order>("moved").await.unwrap().events + 1
        );
    });
}

/// By mistake all events are deleted. The operator recovers the server to the moment before, from a base backup and the
/// archived log. The application goes on running meanwhile, with its engine.
#[test]
fn a_store_recovered_to_a_point_in_time_is_the_store_of_that_moment_and_goes_on() {
    block_on(async {
        let archiving = Server::ARCHIVING.into_iter();
        let builder =
            archiving.fold(Server::builder(), |builder, (name, value)| builder.setting(name, value));
        let Some(server) = builder.start_or_skip() else { return };
        let at = Place::on(server.url());
        let engine = at.engine().await;
        let store = EventStore::new(engine.clone());
        fill(&store).await;
        let backup = server.base_backup().unwrap();
        for round in 0..20 {
            place(&store, &format!("after the backup {}", round % 3)).await.unwrap();
        }
        let before = everything(&engine).await;
        let head = store.head().await.unwrap();
        let moment = server.psql("postgres", "SELECT clock_timestamp()").unwrap();

        // These events are lost, and the engine remembers them. Then the mistake destroys the others.
        let lost = place(&store, "lost").await.unwrap();
        store
            .update_or_create::<Order, _, _>("after the backup 0", |_| [noted("lost".to_owned())])
            .await
            .unwrap();
        let events = format!("{}.events", at.schema);
        server.psql("postgres", &format!("DELETE FROM {events}; SELECT pg_switch_wal()")).unwrap();
        assert!(lost.last > head);

        server.recover(&backup, ("recovery_target_time", &moment)).unwrap();
        let recovered = at.engine().await;
        assert_eq!(everything(&recovered).await, before);
        assert_eq!(EventStore::new(recovered.clone()).head().await.unwrap(), head);

        // The engine that has seen the lost events goes on after the head, too.
        let next = again_until_it_answers(&store, "after the backup 0").await;
        assert_eq!(next.last, head.next());
        assert_eq!(positions(&engine).await, up_to(head.next().get()));
        assert_eq!(store.find::<Order>("lost").await.unwrap(), None);
        let after = EventStore::new(recovered).load::<Order>("after the backup 0").await.unwrap();
        assert_eq!(after.events, store.load::<Order>("after the backup 0").await.unwrap().events);
    });
}

/// The connections from before the recovery are broken, so the first call may fail.
async fn again_until_it_answers(store: &EventStore, key: &str) -> Receipt {
    for _ in 0..20 {
        if let Ok(receipt) = place(store, key).await {
            return receipt;
        }
    }
    place(store, key).await.unwrap()
}

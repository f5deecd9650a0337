//! Event types that a subscription knows, and new ones that it does not know yet.

use std::time::Duration;

use evercore_core::{AggregateId, ErrorKind, EventStore, FailureAction, Filter, Subscription};

use crate::fixture::Fixture;
use crate::tools::*;

use super::tools::*;

/// Wants `Paid` of orders, and knows `Placed` too.
fn shipping(store: &EventStore) -> Subscription {
    let filter = Filter::all().with_aggregate_type(type_named("order")).with_event_type(event_named("Paid"));
    subscription(store, "shipping").with_filter(filter).with_known_types([event_named("Placed")])
}

/// One event of each of these types, each in a commit of its own.
async fn happen(engine: &Engine, id: AggregateId, of_type: &str, names: &[&str]) {
    for name in names {
        let expected = sequence_of(engine, id).await;
        unit().events(id, of_type, expected, vec![event(name, b"")]).commit(engine).await.unwrap();
    }
}

/// Runs until the failure of the cursor is stored, and returns its position.
async fn fails_at(engine: &Engine, of: &Subscription, store: &EventStore) -> i64 {
    let seen = Seen::default();
    let handler = seen.clone();
    let has_failed = async {
        while store.subscription_states("shipping").await.map_or(true, |it| it[0].cursor.failure.is_none()) {
            engine.pause(Duration::from_millis(2)).await;
        }
    };
    let _ = of
        .run(has_failed, move |event| {
            handler.push(&event);
            async { Ok(()) }
        })
        .await;
    let failure = state(store, "shipping").await.cursor.failure.unwrap();
    assert!(seen.numbers().iter().all(|position| *position < failure.position.get()));
    assert!(failure.error.contains("PaidInParts"), "{}", failure.error);
    failure.position.get()
}

pub(crate) async fn a_new_event_type_stops_a_subscription_that_names_those_it_knows(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let (order, other) = (grown(&engine, "order", 0).await, grown(&engine, "invoice", 0).await);
    happen(&engine, order, "order", &["Placed", "Paid", "Placed"]).await;
    happen(&engine, other, "invoice", &["PaidInParts"]).await;
    happen(&engine, order, "order", &["Paid", "PaidInParts", "Paid"]).await;
    let of = shipping(&store).on_failure(no_pause(FailureAction::Stop));
    assert_eq!(
        fails_at(&engine, &of, &store).await,
        6,
        "a type of another aggregate is none of its business"
    );
    assert_eq!(state(&store, "shipping").await.cursor.position, place(5));
    store.resume_subscription("shipping").await.unwrap();

    // Without the call the type would be passed over in silence. A pulled subscription tells it too.
    let mut owned = of.clone().claim().await.unwrap();
    assert_kind!(owned.next().await, ErrorKind::Rejected);
    assert_kind!(owned.next().await, ErrorKind::Rejected);
    owned.release().await.unwrap();

    // A program that knows the type goes on where the old one stopped.
    let newer = Filter::all()
        .with_aggregate_type(type_named("order"))
        .with_event_type(event_named("Paid"))
        .with_event_type(event_named("PaidInParts"));
    let newer = of.with_filter(newer);
    assert_eq!(events_seen(&engine, &newer, 2).await, [6, 7]);
    assert_eq!(state(&store, "shipping").await.cursor.failure, None);
}

pub(crate) async fn an_unknown_type_can_be_parked_until_a_program_knows_it(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let (order, other) = (grown(&engine, "order", 0).await, grown(&engine, "order", 0).await);
    happen(&engine, order, "order", &["Paid", "PaidInParts", "Paid"]).await;
    happen(&engine, other, "order", &["Paid"]).await;
    let of = shipping(&store).on_failure(no_pause(FailureAction::Park));
    assert_eq!(events_seen(&engine, &of, 2).await, [1, 4]);
    let parked = store.parked("shipping").await.unwrap();
    assert_eq!(parked.iter().map(|(_, it)| it.position.get()).collect::<Vec<_>>(), [2]);
    let cursor = &parked[0].0;

    // The same program parks it again.
    store.resume_parked(cursor, None).await.unwrap();
    let again = async {
        while store.parked("shipping").await.unwrap()[0].1.attempts == parked[0].1.attempts {
            engine.pause(Duration::from_millis(2)).await;
        }
    };
    of.run(again, |_| async { panic!("it is not known") }).await.unwrap();

    store.resume_parked(cursor, None).await.unwrap();
    let newer = ["Placed", "PaidInParts", "Paid"].map(event_named);
    let newer =
        of.with_filter(Filter::all().with_aggregate_type(type_named("order"))).with_known_types(newer);
    let seen = Seen::default();
    run_until(&engine, &newer, &seen, 2).await;
    assert_eq!(seen.numbers(), [2, 3], "the parked event, and the one that waited for it");
    assert!(store.parked("shipping").await.unwrap().is_empty());
}

//! The health of subscriptions: what operators, metrics and probes see.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use evercore_core::{ErrorKind, EventStore, FailureAction, Problem, Start, Subscription, Trouble};

use crate::fixture::Fixture;
use crate::tools::*;

use super::tools::*;

const MAX_LAG: Duration = Duration::from_millis(40);

/// Each problem in words, without the times.
async fn problems(store: &EventStore) -> Vec<String> {
    let health = store.health().await.unwrap();
    let problems = health.problems(MAX_LAG);
    assert_eq!(health.is_ready(MAX_LAG), problems.is_empty());
    let one_by_one: Vec<Problem> = health.subscriptions.iter().flat_map(|it| it.problems(MAX_LAG)).collect();
    assert_eq!(one_by_one, problems);
    let in_words = |problem: &Problem| {
        let trouble = match &problem.trouble {
            Trouble::Paused => "paused".to_owned(),
            Trouble::Failing { position, attempts, .. } => {
                format!("fails at {position}, {attempts} attempts")
            }
            Trouble::Ahead { position, .. } => format!("ahead at {position}"),
            Trouble::Behind { position, events, .. } => format!("{events} behind at {position}"),
            other => format!("{other:?}"),
        };
        format!("{} {}", problem.cursor.subscription, trouble)
    };
    problems.iter().map(in_words).collect()
}

async fn runs_to_the_end(engine: &Engine, of: &Subscription) {
    let seen = Seen::default();
    let count = engine.head().await.unwrap().get();
    run_until(engine, of, &seen, usize::try_from(count).unwrap()).await;
}

pub(crate) async fn the_health_tells_what_is_wrong_with_live_versions(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    assert!(store.health().await.unwrap().is_ready(Duration::ZERO), "without subscriptions all is well");
    grown(&engine, "user", 6).await;
    for name in ["level", "paused", "versions"] {
        runs_to_the_end(&engine, &subscription(&store, name)).await;
    }
    store.pause_subscription("paused").await.unwrap();
    subscription(&store, "behind").starting(Start::After(place(4))).declare().await.unwrap();
    // It stops at the third event.
    let fails_at_3 = |event: evercore_core::Delivered| async move {
        if event.position() == place(3) { Err("a secret of the handler".into()) } else { Ok(()) }
    };
    let stops = subscription(&store, "stopped").on_failure(no_pause(FailureAction::Stop)).with_live_past();
    let has_failed = async {
        while state_or_none(&store, "stopped").await != Some(place(2))
            || state(&store, "stopped").await.cursor.failure.is_none_or(|failure| failure.attempts < 3)
        {
            engine.pause(Duration::from_millis(2)).await;
        }
    };
    let _ = stops.run(has_failed, fails_at_3).await;
    // It parks the third event and goes on.
    let parks = subscription(&store, "parks").on_failure(no_pause(FailureAction::ParkAlone));
    let at_the_end = async {
        while state_or_none(&store, "parks").await != Some(place(6)) {
            engine.pause(Duration::from_millis(2)).await;
        }
    };
    parks.run(at_the_end, fails_at_3).await.unwrap();
    // A version that is being built.
    subscription(&store, "versions").with_version(2).declare().await.unwrap();
    engine.pause(MAX_LAG * 2).await;

    let expected = ["behind 2 behind at 4", "paused paused", "stopped fails at 3, 3 attempts"];
    assert_eq!(problems(&store).await, expected);
    let health = store.health().await.unwrap();
    for problem in health.problems(MAX_LAG) {
        let line = problem.to_string();
        assert!(!line.contains("secret") && line.contains(problem.cursor.subscription.as_str()), "{line}");
    }
    assert!(!health.is_ready(Duration::MAX), "no lag is too long, but one has stopped and one is paused");
    let of = |name: &str| health.subscriptions.iter().find(|it| it.name.as_str() == name).unwrap();
    let (parks, versions) = (of("parks"), of("versions"));
    assert_eq!((parks.cursors[0].parked, parks.live_version), (1, 1));
    assert!(parks.cursors[0].parked_time > Duration::ZERO && parks.cursors[0].parked_time < SOON);
    assert_eq!((of("level").cursors[0].parked, of("level").cursors[0].parked_time), (0, Duration::ZERO));
    assert_eq!((versions.live_version, versions.cursors.len()), (1, 2));
    assert_eq!(versions.cursors[1].lag_events, 6, "the state of a version that is being built is shown");
    let failure = of("stopped").cursors[0].cursor.failure.clone().unwrap();
    assert_eq!((failure.position, failure.error.as_str()), (place(3), "a secret of the handler"));

    let one = store.subscription_health("behind").await.unwrap();
    assert_eq!((one.problems(MAX_LAG).len(), one.is_ready(SOON)), (1, true));
    assert_kind!(store.subscription_health("none").await, ErrorKind::NotFound);
    // Operators put it right.
    store.resume_subscription("paused").await.unwrap();
    store.reset_subscription("stopped", Start::End).await.unwrap();
    assert_eq!(problems(&store).await, ["behind 2 behind at 4"]);
    store.reset_subscription("behind", Start::End).await.unwrap();
    assert_eq!(problems(&store).await, [""; 0]);
}

pub(crate) async fn a_sample_of_the_health_ends_with_the_shutdown(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    subscription(&store, "mails").declare().await.unwrap();
    let (is_over, began) = (Arc::new(AtomicBool::new(false)), Instant::now());
    let shutdown = async {
        engine.pause(Duration::from_millis(20)).await;
        is_over.store(true, Ordering::SeqCst);
    };
    store.sample_health(Duration::from_secs(600), shutdown).await;
    assert!(is_over.load(Ordering::SeqCst) && began.elapsed() < SOON);
}

//! Random walks: many small steps on an engine and on the model. Both must agree after each step.

use crate::fixture::Fixture;
use crate::model::walk;

/// A number from the environment, to repeat a walk or make it longer.
fn from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

pub(crate) async fn a_random_walk_agrees_with_a_model(fixture: &mut Fixture) {
    let seed = from_environment("EVERCORE_SEED", 1);
    walk(&fixture.engine(), seed, from_environment("EVERCORE_STEPS", 400)).await;
}

pub(crate) async fn a_second_walk_agrees_too(fixture: &mut Fixture) {
    short_walk(fixture, 2).await;
}

pub(crate) async fn a_third_walk_agrees_too(fixture: &mut Fixture) {
    short_walk(fixture, 3).await;
}

pub(crate) async fn a_fourth_walk_agrees_too(fixture: &mut Fixture) {
    short_walk(fixture, 4).await;
}

/// On a separate store, so that `EVERCORE_SEED` repeats the walk exactly.
async fn short_walk(fixture: &Fixture, seed: u64) {
    walk(&fixture.engine(), seed, from_environment("EVERCORE_STEPS", 400) / 4).await;
}

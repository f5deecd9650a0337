//! The example of a cache, which checks itself.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

#[allow(dead_code)]
#[path = "../src/main.rs"]
mod cache;

#[tokio::test]
async fn the_cache_is_warm_and_fresh_and_writes_nothing() {
    cache::run().await.unwrap(); // it says so itself
}

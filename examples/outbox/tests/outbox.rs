//! The example of an outbox: the records of its mail service at the end.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

#[allow(dead_code)]
#[path = "../src/main.rs"]
mod outbox;

#[tokio::test]
async fn every_letter_of_the_outbox_is_delivered_once() {
    let books = outbox::run().await.unwrap();
    let positions: Vec<i64> = books.delivered.keys().map(|position| position.get()).collect();
    assert_eq!(positions, (1..=8).collect::<Vec<_>>());
    let attempts = 8 + books.busy + books.known_already + books.fenced_off;
    assert!(books.calls > attempts, "the letter without an address was tried, too");
    assert_eq!(books.known_already, books.lost_answers);
    assert_eq!(books.fenced_off, 1);
    assert!(books.busy > 0 && books.lost_answers > 0);
}

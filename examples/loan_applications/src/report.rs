//! Counts the content of the store.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::application::{Application, ApplicationEvent};
use crate::evercore::{BoxError, ErrorKind, EventStore, LogQuery, Position, Sequence};

/// Reads the log once and loads every application.
pub(crate) async fn report(store: &EventStore) -> Result<(), BoxError> {
    let mut kinds = BTreeSet::new();
    let mut cases = BTreeSet::new();
    let began = Instant::now();
    let mut log = store.log_reader(LogQuery::after(Position::ZERO));
    while let Some(page) = log.next().await? {
        for event in &page.events {
            kinds.insert(event.decode::<Application>().map(ApplicationEvent::to_source)?);
            cases.insert(event.aggregate());
        }
    }
    let head = log.position();
    println!("log:    {}", crate::rate(head.get(), began));

    let began = Instant::now();
    let mut total = Application::default();
    let mut longest = Sequence::ZERO;
    for case in &cases {
        let application = match store.load::<Application>(*case).await {
            Err(error) if *error.kind() == ErrorKind::NotFound => continue,
            loaded => loaded?,
        };
        longest = longest.max(application.sequence());
        total.amount_requested += application.amount_requested;
        total.submitted += application.submitted;
        total.approved += application.approved;
        total.declined += application.declined;
        total.cancelled += application.cancelled;
        total.offers_accepted += application.offers_accepted;
    }
    println!("replay: {}", crate::rate(head.get(), began));
    println!("events {head}, applications {}, kinds {}, longest {longest}", cases.len(), kinds.len());
    println!("submitted {}, approved {}, declined {}", total.submitted, total.approved, total.declined);
    println!("cancelled {}, offers accepted {}", total.cancelled, total.offers_accepted);
    println!("amounts asked for {}", total.amount_requested);
    Ok(())
}

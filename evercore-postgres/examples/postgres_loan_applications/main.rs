//! Reads a log of loan applications into a PostgreSQL store, connects again, and counts what is there.
//!
//! ```text
//! cargo run --release -p evercore-postgres --example postgres_loan_applications -- postgres://localhost/loans [LOG.csv]
//! ```
//!
//! Without a log it makes a small one of its own. The log goes in in its own order, one event a line, so the position
//! of the last event is the number of lines that are in: a run that was stopped goes on where it ended, and a second
//! run finds nothing to do.

mod application;
mod import;
mod report;
mod source;

use std::path::{Path, PathBuf};
use std::time::Instant;

use evercore::{BoxError, EventStore, PostgresEngine};
/// The other files are the same on every engine.
use evercore_postgres as evercore;

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let url = arguments.next().and_then(|url| url.into_string().ok());
    let Some(url) = url else {
        eprintln!("usage: postgres_loan_applications postgres://user:password@host/database [LOG.csv]");
        std::process::exit(2);
    };
    if let Err(error) = run(&url, arguments.next().map(PathBuf::from).as_deref()).await {
        eprintln!("error: {error}");
        let mut source = error.source();
        while let Some(cause) = source {
            eprintln!("  because: {cause}");
            source = cause.source();
        }
        std::process::exit(1);
    }
}

async fn run(url: &str, log: Option<&Path>) -> Result<(), BoxError> {
    let builder = PostgresEngine::builder().schema("loan_applications")?;
    let engine = builder.clone().connect(url).await?;
    let imported = import::import(EventStore::new(engine.clone()), log).await;
    engine.close().await?;
    // Connected anew; also after a line that did not read: what came before it is in.
    let engine = builder.connect(url).await?;
    report::report(&EventStore::new(engine.clone())).await?;
    engine.close().await?;
    imported
}

fn rate(events: i64, began: Instant) -> String {
    let seconds = began.elapsed().as_secs_f64();
    format!("{events} events in {seconds:.2} s, {:.0} events/s", events as f64 / seconds)
}

//! Reads a log of loan applications into a PostgreSQL store, connects again, and counts what is there.
//!
//! ```text
//! cargo run --release -p postgres_loan_applications -- postgres://localhost/loans [LOG.csv]
//! ```
//!
//! Without a log it makes a small one. The lines are imported in their order, one event each, so the position of the last
//! event is the number of imported lines. A run that was stopped continues there, and a second run finds nothing to do.
//!
//! With `--live` eight writers replay it at the same time into an empty store, while a subscription fills two tables. At the
//! end the tables are compared with the log.

#[path = "../../loan_applications/src/application.rs"]
mod application;
#[path = "../../loan_applications/src/import.rs"]
mod import;
#[path = "../../loan_applications/src/live.rs"]
mod live;
mod projection;
#[path = "../../loan_applications/src/report.rs"]
mod report;
#[path = "../../loan_applications/src/source.rs"]
mod source;

use std::path::{Path, PathBuf};
use std::time::Instant;

use evercore::{BoxError, EventStore, PostgresEngine};
/// The other files are the same on every engine.
use evercore_postgres as evercore;

#[tokio::main]
async fn main() {
    let (flags, arguments): (Vec<_>, Vec<_>) =
        std::env::args_os().skip(1).partition(|argument| argument == "--live");
    let mut arguments = arguments.into_iter();
    let url = arguments.next().and_then(|url| url.into_string().ok());
    let Some(url) = url else {
        eprintln!(
            "usage: postgres_loan_applications postgres://user:password@host/database [LOG.csv] [--live]"
        );
        std::process::exit(2);
    };
    let log = arguments.next().map(PathBuf::from);
    let outcome = match flags.is_empty() {
        true => run(&url, log.as_deref()).await,
        false => run_live(&url, log.as_deref()).await,
    };
    if let Err(error) = outcome {
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
    // Connect again, also after a bad line: the lines before it are imported.
    let engine = builder.connect(url).await?;
    report::report(&EventStore::new(engine.clone())).await?;
    engine.close().await?;
    imported
}

async fn run_live(url: &str, log: Option<&Path>) -> Result<(), BoxError> {
    let engine = PostgresEngine::builder().schema(projection::SCHEMA)?.connect(url).await?;
    let outcome = live::live(&engine, log).await;
    engine.close().await?;
    outcome
}

/// Runs concurrently with the caller.
fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> impl Future<Output = T> {
    let task = tokio::spawn(work);
    async {
        match task.await {
            Ok(done) => done,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

fn rate(events: i64, began: Instant) -> String {
    let seconds = began.elapsed().as_secs_f64();
    format!("{events} events in {seconds:.2} s, {:.0} events/s", events as f64 / seconds)
}

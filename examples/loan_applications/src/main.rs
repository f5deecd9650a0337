//! Reads a log of loan applications into a SQLite file, opens it again, and counts what is there.
//!
//! ```text
//! cargo run --release -p loan_applications -- LOG.csv [STORE.db]
//! ```
//!
//! Without a log it makes a small one. The lines are imported in their order, one event each, so the position of the last
//! event is the number of imported lines. A run that was stopped continues there, and a second run finds nothing to do.
//!
//! With `--live` eight writers replay it at the same time into an empty store, while a subscription fills two tables. At the
//! end the tables are compared with the log.

mod application;
mod import;
mod live;
mod projection;
mod report;
mod source;

use std::path::{Path, PathBuf};
use std::time::Instant;

use evercore::{BoxError, EventStore, SqliteEngine};
/// The other files are the same on every engine.
use evercore_sqlite as evercore;

fn main() {
    let (flags, arguments): (Vec<_>, Vec<_>) =
        std::env::args_os().skip(1).map(PathBuf::from).partition(|argument| argument == Path::new("--live"));
    let mut arguments = arguments.into_iter();
    let (log, file) = (arguments.next(), arguments.next());
    let file = file.unwrap_or_else(|| match &log {
        Some(_) if flags.is_empty() => "loan_applications.db".into(),
        Some(_) => "loan_applications_live.db".into(),
        None => std::env::temp_dir().join(format!("evercore-loan_applications-{}.db", std::process::id())),
    });
    let outcome = match flags.is_empty() {
        true => smol::block_on(run(log.as_deref(), &file)),
        false => smol::block_on(run_live(log.as_deref(), &file)),
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

async fn run(log: Option<&Path>, file: &Path) -> Result<(), BoxError> {
    let engine = SqliteEngine::open(file).await?;
    let imported = import::import(EventStore::new(engine.clone()), log).await;
    engine.close().await?;
    // Open the file again, also after a bad line: the lines before it are imported.
    let engine = SqliteEngine::open(file).await?;
    report::report(&EventStore::new(engine.clone())).await?;
    engine.close().await?;
    println!("file {} bytes: {}", std::fs::metadata(file)?.len(), file.display());
    imported
}

async fn run_live(log: Option<&Path>, file: &Path) -> Result<(), BoxError> {
    let engine = SqliteEngine::open(file).await?;
    let outcome = live::live(&engine, log).await;
    engine.close().await?;
    outcome
}

/// Runs concurrently with the caller.
fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> impl Future<Output = T> {
    smol::spawn(work)
}

fn rate(events: i64, began: Instant) -> String {
    let seconds = began.elapsed().as_secs_f64();
    format!("{events} events in {seconds:.2} s, {:.0} events/s", events as f64 / seconds)
}

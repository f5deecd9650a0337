//! Reads a log of loan applications into a SQLite file, opens it again, and counts what is there.
//!
//! ```text
//! cargo run --release -p evercore-sqlite --example loan_applications -- LOG.csv [STORE.db]
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

use evercore::{BoxError, EventStore, SqliteEngine};
/// The other files are the same on every engine.
use evercore_sqlite as evercore;

fn main() {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (log, file) = (arguments.next(), arguments.next());
    let file = file.unwrap_or_else(|| match &log {
        Some(_) => "loan_applications.db".into(),
        None => std::env::temp_dir().join(format!("evercore-loan_applications-{}.db", std::process::id())),
    });
    if let Err(error) = smol::block_on(run(log.as_deref(), &file)) {
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
    // Opened anew; also after a line that did not read: what came before it is in.
    let engine = SqliteEngine::open(file).await?;
    report::report(&EventStore::new(engine.clone())).await?;
    engine.close().await?;
    println!("file {} bytes: {}", std::fs::metadata(file)?.len(), file.display());
    imported
}

fn rate(events: i64, began: Instant) -> String {
    let seconds = began.elapsed().as_secs_f64();
    format!("{events} events in {seconds:.2} s, {:.0} events/s", events as f64 / seconds)
}

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
mod source;

use std::collections::{BTreeSet, HashMap};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use application::{Application, ApplicationEvent};
use evercore_sqlite::{
    BoxError, ErrorKind, EventStore, Loaded, LogQuery, Metadata, PageLimit, Position, Sequence, SqliteEngine,
};
use indicatif::{ProgressBar, ProgressStyle};
use source::Line;

/// How many lines go into one unit of work.
const UNIT: usize = 500;

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
    let imported = import(log, file).await;
    report(file).await?; // also after a line that did not read: what came before it is in
    imported
}

async fn import(log: Option<&Path>, file: &Path) -> Result<(), BoxError> {
    let engine = SqliteEngine::open(file).await?;
    let store = EventStore::new(engine.clone());
    let mut import = Import { head: store.head().await?, store, applications: HashMap::new() };
    let (present, began) = (import.head, Instant::now());
    let bar = progress_bar(log)?;
    bar.set_position(present.get().cast_unsigned());
    let mut lines = source::lines(log)?;
    import.skip(&mut lines).await?;
    let outcome = import.take_all(lines, &bar).await;
    bar.finish_and_clear();
    let events = import.head.get() - present.get();
    if events == 0 {
        println!("import: nothing new, {present} events are in the file already");
    } else {
        println!("import: {}", rate(events, began));
    }
    engine.close().await?;
    outcome
}

struct Import {
    store: EventStore,
    head: Position,
    /// What is loaded stays loaded: a handle is good for the next unit once its own has committed.
    applications: HashMap<String, Loaded<Application>>,
}

impl Import {
    /// Passes over the lines that are in, and makes sure that the last of them is the last event.
    async fn skip(&self, lines: &mut impl Iterator<Item = Result<Line, BoxError>>) -> Result<(), BoxError> {
        let Some(last) = usize::try_from(self.head.get())?.checked_sub(1) else { return Ok(()) };
        let line = lines.nth(last).ok_or("the file holds more events than the log has lines")??;
        let page =
            self.store.read_log(&LogQuery::before(Position::MAX).with_limit(PageLimit::events(1)?)).await?;
        let event = page.events.first().ok_or("the log of the file has no end")?;
        let is_same = event.decode::<Application>()? == line.event && event.time() == line.time;
        if is_same { Ok(()) } else { Err("the file holds another log".into()) }
    }

    async fn take_all(
        &mut self,
        lines: impl Iterator<Item = Result<Line, BoxError>>,
        bar: &ProgressBar,
    ) -> Result<(), BoxError> {
        let mut unit = Vec::with_capacity(UNIT);
        for line in lines {
            match line {
                Ok(line) => unit.push(line),
                Err(error) => {
                    self.commit(&mut unit).await?;
                    return Err(error);
                }
            }
            if unit.len() == UNIT {
                self.commit(&mut unit).await?;
                bar.set_position(self.head.get().cast_unsigned());
            }
        }
        self.commit(&mut unit).await
    }

    async fn commit(&mut self, lines: &mut Vec<Line>) -> Result<(), BoxError> {
        if lines.is_empty() {
            return Ok(());
        }
        let mut work = self.store.begin();
        for line in lines.drain(..) {
            let metadata = Metadata::new().with_time(line.time);
            let metadata =
                if line.resource.is_empty() { metadata } else { metadata.with_reference(&line.resource)? };
            let application = match self.applications.get_mut(&line.case) {
                Some(known) => known,
                None => {
                    let application = work.load_or_create(&line.case).await?;
                    self.applications.entry(line.case).or_insert(application)
                }
            };
            work.record_with(application, line.event, &metadata)?;
        }
        self.head = work.commit().await?.last;
        acknowledge(self.head);
        Ok(())
    }
}

/// For those who stop this program at random and want to know what it had promised.
fn acknowledge(head: Position) {
    if std::env::var_os("EVERCORE_ACKNOWLEDGE").is_some() {
        println!("acknowledged {head}");
        std::io::stdout().flush().ok();
    }
}

/// Opens the file anew, reads its log once and loads every application.
async fn report(file: &Path) -> Result<(), BoxError> {
    let engine = SqliteEngine::open(file).await?;
    let store = EventStore::new(engine.clone());
    let mut kinds = BTreeSet::new();
    let mut cases = BTreeSet::new();
    let began = Instant::now();
    let mut query = LogQuery::after(Position::ZERO);
    let head = loop {
        let page = store.read_log(&query).await?;
        for event in &page.events {
            kinds.insert(event.decode::<Application>().map(ApplicationEvent::to_source)?);
            cases.insert(event.aggregate());
        }
        query.from = page.scanned;
        if page.scanned == page.head {
            break page.head;
        }
    };
    println!("log:    {}", rate(head.get(), began));

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
    println!("replay: {}", rate(head.get(), began));
    println!("events {head}, applications {}, kinds {}, longest {longest}", cases.len(), kinds.len());
    println!("submitted {}, approved {}, declined {}", total.submitted, total.approved, total.declined);
    println!("cancelled {}, offers accepted {}", total.cancelled, total.offers_accepted);
    println!("amounts asked for {}", total.amount_requested);
    engine.close().await?;
    println!("file {} bytes: {}", std::fs::metadata(file)?.len(), file.display());
    Ok(())
}

fn rate(events: i64, began: Instant) -> String {
    let seconds = began.elapsed().as_secs_f64();
    format!("{events} events in {seconds:.2} s, {:.0} events/s", events as f64 / seconds)
}

fn progress_bar(log: Option<&Path>) -> Result<ProgressBar, BoxError> {
    let lines = source::lines(log)?.count();
    let bar =
        if std::io::stderr().is_terminal() { ProgressBar::new(lines as u64) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} events, {per_sec}, {eta} left")?);
    Ok(bar)
}

//! From lines of the log to units of work.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use crate::application::Application;
use crate::evercore::{BoxError, EventStore, Loaded, LogQuery, Metadata, PageLimit, Position};
use crate::source::{self, Line};

/// How many lines go into one unit of work.
const UNIT: usize = 500;

/// Imports the lines that the store lacks.
pub(crate) async fn import(store: EventStore, log: Option<&Path>) -> Result<(), BoxError> {
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
        println!("import: nothing new, {present} events are in the store already");
    } else {
        println!("import: {}", crate::rate(events, began));
    }
    outcome
}

pub(crate) struct Import {
    store: EventStore,
    head: Position,
    /// Loaded aggregates: after a commit a handle can be used in the next unit.
    applications: HashMap<String, Loaded<Application>>,
}

impl Import {
    /// Into an empty store, or for one of several writers.
    pub(crate) fn into(store: EventStore) -> Self {
        Self { store, head: Position::ZERO, applications: HashMap::new() }
    }

    /// Passes over the lines that are in, and makes sure that the last of them is the last event.
    async fn skip(&self, lines: &mut impl Iterator<Item = Result<Line, BoxError>>) -> Result<(), BoxError> {
        let Some(last) = usize::try_from(self.head.get())?.checked_sub(1) else { return Ok(()) };
        let line = lines.nth(last).ok_or("the store holds more events than the log has lines")??;
        let page =
            self.store.read_log(&LogQuery::before(Position::MAX).with_limit(PageLimit::events(1)?)).await?;
        let event = page.events.first().ok_or("the log of the store has no end")?;
        let is_same = event.decode::<Application>()? == line.event && event.time() == line.time;
        if is_same { Ok(()) } else { Err("the store holds another log".into()) }
    }

    pub(crate) async fn take_all(
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

/// For tests that kill this program at random and compare the store with its last acknowledged position.
fn acknowledge(head: Position) {
    if std::env::var_os("EVERCORE_ACKNOWLEDGE").is_some() {
        println!("acknowledged {head}");
        std::io::stdout().flush().ok();
    }
}

fn progress_bar(log: Option<&Path>) -> Result<ProgressBar, BoxError> {
    let lines = source::lines(log)?.count();
    let bar =
        if std::io::stderr().is_terminal() { ProgressBar::new(lines as u64) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} events, {per_sec}, {eta} left")?);
    Ok(bar)
}

//! The log as it grows, page by page, as one subscription sees it.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::contract::{Filter, LogPage, LogQuery};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::Position;
use crate::log_reader::LogReader;
use crate::mark::Witness;
use crate::page_limit::PageLimit;
use crate::race::{First, race};
use crate::shared_log::{CaughtUp, Found, Member, Place};
use crate::store::EventStore;

/// Reads to the end of the log and waits there for more. It shares what it reads with others: with those that have the
/// same filter and are at the same place, and at the end of the log with all. There the events are read once without a
/// filter, and each reader picks its own.
#[derive(Debug)]
pub(crate) struct Tail {
    store: EventStore,
    filter: Filter,
    /// The limit of the pages that are returned.
    limit: PageLimit,
    /// Every event up to here was returned or did not pass the filter.
    position: Position,
    /// The event at `position`, if a page ended there.
    read: Option<Witness>,
    /// Where to end, if not at the end of all time.
    bound: Position,
    /// The page that is being returned in parts.
    current: Option<Current>,
    member: Option<Member>,
    alone: Option<Alone>,
    caught_up: Option<CaughtUp>,
    /// Whether it reads at the end of the log although no other reader is there, since those with its filter are far
    /// from there.
    has_left_others: bool,
}

/// A page with the first row that was not looked at yet.
#[derive(Debug)]
struct Current {
    page: LogPage,
    row: usize,
}

/// Reads without others, up to the place where it joins them.
#[derive(Debug)]
struct Alone {
    reader: LogReader,
    up_to: Position,
}

/// A page, and the event up to which the log was read for it, at the end of the page or later.
#[derive(Debug)]
pub(crate) struct TailPage {
    pub(crate) page: LogPage,
    pub(crate) read: Option<Witness>,
}

impl Tail {
    /// `read`: the event at which the query begins, if that was read before.
    pub(crate) fn new(store: &EventStore, query: LogQuery, read: Option<Witness>) -> Self {
        Self {
            store: store.clone(),
            filter: query.filter,
            limit: query.limit,
            position: query.from,
            read: read.filter(|read| read.position == query.from),
            bound: query.to,
            current: None,
            member: None,
            alone: None,
            caught_up: None,
            has_left_others: false,
        }
    }

    /// The event where the pages end that were handed out, if a read ended there.
    pub(crate) fn witness(&self) -> Option<Witness> {
        self.read
    }

    /// The next page; without events if nothing passed the filter. `None` if no page came in that time, or the bound is
    /// reached. The next call then goes on with the same read. Dropped, it loses nothing.
    pub(crate) async fn next(&mut self, at_most: Duration) -> Result<Option<TailPage>> {
        let engine = Arc::clone(self.store.engine());
        let time_is_up = async move { engine.pause(at_most).await };
        match race(poll_fn(|context| self.poll(context)), time_is_up).await {
            First::Left(page) => page,
            First::Right(()) => Ok(None),
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<TailPage>>> {
        loop {
            if let Some(page) = self.part() {
                return Poll::Ready(Ok(Some(page)));
            }
            if self.position >= self.bound {
                return Poll::Ready(Ok(None));
            }
            let polled = match &mut self.alone {
                Some(alone) => alone.reader.poll_next(context).map_ok(|page| self.read_alone(page)),
                None => self.poll_shared(context),
            };
            match polled {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(self.failed(error))),
            }
        }
    }

    fn poll_shared(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let own = self.limit.or_more(PageLimit::default());
        let is_at_end = self.caught_up.as_ref().is_some_and(|caught_up| {
            self.filter == Filter::all() || self.has_left_others || caught_up.has_company()
        });
        let everything = Filter::all();
        let (filter, limit) =
            if is_at_end { (&everything, PageLimit::default()) } else { (&self.filter, own) };
        let member = match self.member.take() {
            Some(member) if member.is_of(filter, limit) => member,
            _ => self.store.shared_log().join(filter, limit),
        };
        let place = Place { position: self.position, read: self.read };
        let polled = member.poll(self.store.engine(), place, is_at_end, context);
        self.member = Some(member);
        polled.map_ok(|found| match found {
            Found::Page(found) => self.take(found.page),
            Found::Alone(up_to) => {
                let query = LogQuery::after(self.position).up_to(up_to).with_filter(self.filter.clone());
                let reader = LogReader::new(Arc::clone(self.store.engine()), query.with_limit(own));
                self.alone = Some(Alone { reader: reader.behind(self.read), up_to });
            }
        })
    }

    /// A page that was read alone; `None` at the end of the log or of the query.
    fn read_alone(&mut self, page: Option<LogPage>) {
        let Some(up_to) = self.alone.as_ref().map(|alone| alone.up_to) else { return };
        if let Some(page) = page {
            if page.scanned >= up_to {
                self.alone = None;
            }
            return self.take(page);
        }
        self.alone = None;
        if up_to == Position::MAX {
            self.has_left_others = true;
            self.caught_up.get_or_insert_with(|| self.store.shared_log().caught_up());
        } else if let Some(member) = &self.member {
            // The log ends before the place where the others are: it has lost its tail.
            member.forget();
        }
    }

    fn take(&mut self, page: LogPage) {
        let distance = page.head.get() - page.scanned.get();
        if CaughtUp::is_near(distance, self.caught_up.is_some()) {
            self.caught_up.get_or_insert_with(|| self.store.shared_log().caught_up());
        } else {
            (self.caught_up, self.has_left_others) = (None, false);
        }
        self.current = Some(Current { page, row: 0 });
    }

    /// The next part of the page at hand: the events that pass, as many as the limit allows.
    fn part(&mut self) -> Option<TailPage> {
        let Current { page, row } = self.current.take()?;
        let (mut rows, mut bytes, mut end, mut next) = (Vec::new(), 0, None, None);
        for (number, event) in page.events.rows_from(row) {
            if event.position > self.bound {
                break;
            }
            if !self.filter.matches_row(&event) {
                continue;
            }
            if !self.limit.has_room(rows.len(), bytes, event.bytes()) {
                next = Some(number);
                break;
            }
            bytes += event.bytes();
            end = Some(event.position);
            rows.push(u32::try_from(number).unwrap_or(u32::MAX));
        }
        let (read, began) = (page.witness(), page.began.filter(|_| row == 0));
        // A page whose limit is 0 events never ends; there is none, since each limit has at least one.
        let scanned = match (next, end) {
            (Some(_), Some(end)) => end,
            _ => page.scanned.min(self.bound),
        };
        self.read = read.filter(|read| read.position == scanned);
        self.position = scanned;
        let ended = self.read.map(|read| read.mark);
        let part = LogPage { events: page.events.picked(rows), scanned, head: page.head, began, ended };
        self.current = next.map(|row| Current { page, row });
        Some(TailPage { page: part, read })
    }

    /// After a loss of the tail, pages that others have read are wrong too.
    fn failed(&mut self, error: Error) -> Error {
        if matches!(error.kind(), ErrorKind::TailLost { .. }) {
            self.alone = None;
            self.store.shared_log().forget();
        }
        error
    }

    /// Whether it has read up to the end of the log, or nearly so, and returned all of it.
    pub(crate) fn has_caught_up(&self) -> bool {
        self.current.is_none() && (self.caught_up.is_some() || self.is_at_bound())
    }

    /// Whether it will find nothing more, however long it waits.
    pub(crate) fn is_at_bound(&self) -> bool {
        self.position >= self.bound
    }

    /// Where it ends.
    pub(crate) fn bound(&self) -> Position {
        self.bound
    }

    /// Up to where the pages go that were handed out.
    pub(crate) fn position(&self) -> Position {
        self.position
    }
}

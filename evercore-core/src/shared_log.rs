//! Pages of the log that several readers in a process share: each page is read once.
//!
//! A [`Stream`] reads the log with one filter, page after page, and waits at its end. Its members poll it; whoever is
//! polled drives the read that is under way, so no task is needed, and a member that is dropped or is not polled delays
//! no other. The last pages stay for members that come a little later. A member that finds no page that begins where it
//! is reads by itself up to the next place at which it can join.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::contract::{Filter, LogPage, LogQuery, StorageEngine};
use crate::error::Result;
use crate::future::BoxFuture;
use crate::ids::Position;
use crate::limits;
use crate::log_reader::LogReader;
use crate::mark::Witness;
use crate::page_limit::PageLimit;
use crate::race::{Wakers, lock};

/// The longest single wait for the log. Another one follows it.
const WAIT: Duration = Duration::from_secs(10);

/// A read or a wait that takes longer is begun again: the runtime on which it depends may be gone.
const STUCK: Duration = Duration::from_secs(30);

/// How long a page stays for others.
const KEPT: Duration = Duration::from_secs(5);

/// The most pages and bytes that a stream keeps for others; it keeps one page at least.
const KEPT_PAGES: usize = 8;
const KEPT_BYTES: usize = 16 * 1024 * 1024;

/// A reader with at most this many events before it has caught up, and reads at the end of the log with all others.
const NEAR: i64 = limits::DEFAULT_PAGE_EVENTS as i64;

/// A reader at the end of the log that falls behind by more than this reads for itself.
const FAR: i64 = 10 * NEAR;

/// All streams of a store.
#[derive(Debug, Default)]
pub(crate) struct SharedLog {
    streams: Mutex<Vec<Weak<Stream>>>,
    /// How many readers have caught up.
    at_end: Arc<AtomicUsize>,
}

impl SharedLog {
    /// Joins the stream with this filter and these pages.
    pub(crate) fn join(&self, filter: &Filter, limit: PageLimit) -> Member {
        let mut streams = lock(&self.streams);
        streams.retain(|stream| stream.strong_count() > 0);
        let known = streams.iter().filter_map(Weak::upgrade);
        let stream = known.into_iter().find(|it| it.limit == limit && it.filter == *filter);
        let stream = stream.unwrap_or_else(|| {
            let made = Arc::new(Stream::new(filter.clone(), limit));
            streams.push(Arc::downgrade(&made));
            made
        });
        stream.members.fetch_add(1, Ordering::SeqCst);
        Member { number: stream.next_member.fetch_add(1, Ordering::Relaxed), stream }
    }

    /// Forgets the pages that are kept, because the log has lost its tail.
    pub(crate) fn forget(&self) {
        let streams: Vec<_> = lock(&self.streams).iter().filter_map(Weak::upgrade).collect();
        streams.iter().for_each(|stream| stream.forget());
    }

    /// Counts a reader that has caught up, as long as the result lives.
    pub(crate) fn caught_up(&self) -> CaughtUp {
        self.at_end.fetch_add(1, Ordering::SeqCst);
        CaughtUp(Arc::clone(&self.at_end))
    }
}

/// A reader that has caught up.
#[derive(Debug)]
pub(crate) struct CaughtUp(Arc<AtomicUsize>);

impl CaughtUp {
    /// Whether there are others.
    pub(crate) fn has_company(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 1
    }

    /// Whether a reader has caught up that is this far from the end of the log; `was` tells whether it had before.
    pub(crate) fn is_near(distance: i64, was: bool) -> bool {
        distance <= if was { FAR } else { NEAR }
    }
}

impl Drop for CaughtUp {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The log with one filter, as its members read it.
#[derive(Debug)]
struct Stream {
    filter: Filter,
    limit: PageLimit,
    members: AtomicUsize,
    next_member: AtomicU64,
    wakers: Arc<Wakers>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The last pages, each beginning where the one before ended.
    pages: VecDeque<SharedPage>,
    driver: Slot,
    /// Grows when the pages are forgotten. A driver from before is not put back.
    forgotten: u64,
}

/// A page that was read.
#[derive(Clone, Debug)]
pub(crate) struct SharedPage {
    pub(crate) from: Position,
    pub(crate) page: LogPage,
    read_at: Instant,
}

#[derive(Debug, Default)]
enum Slot {
    #[default]
    Empty,
    Here(Box<Driver>),
    /// A member polls it at this moment.
    Away(Position),
}

/// The place where a member is: after this position, and the event there if it was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) position: Position,
    pub(crate) read: Option<Witness>,
}

/// The answer to a member.
#[derive(Debug)]
pub(crate) enum Found {
    /// The page that begins where the member is.
    Page(SharedPage),
    /// No page begins there: the member must read by itself, up to here at most.
    Alone(Position),
}

/// A member of a stream.
#[derive(Debug)]
pub(crate) struct Member {
    stream: Arc<Stream>,
    number: u64,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.stream.members.fetch_sub(1, Ordering::SeqCst);
        self.stream.wakers.remove(self.number);
    }
}

impl Member {
    /// Whether this is the stream with this filter and these pages.
    pub(crate) fn is_of(&self, filter: &Filter, limit: PageLimit) -> bool {
        self.stream.limit == limit && self.stream.filter == *filter
    }

    /// Whether the stream has other members.
    pub(crate) fn has_company(&self) -> bool {
        self.stream.members.load(Ordering::SeqCst) > 1
    }

    /// The next page for a member at this place. `is_at_end` is set for the stream that readers at the end of the log share.
    pub(crate) fn poll(
        &self,
        engine: &Arc<dyn StorageEngine>,
        place: Place,
        is_at_end: bool,
        context: &mut Context<'_>,
    ) -> Poll<Result<Found>> {
        loop {
            // Before the look, so that nothing that happens after it is missed.
            self.stream.wakers.add(self.number, context.waker());
            let (driver, forgotten) = {
                let mut state = lock(&self.stream.state);
                match state.look(&self.stream, engine, place, (is_at_end, self.has_company())) {
                    Look::Found(found) => {
                        self.stream.wakers.remove(self.number);
                        return Poll::Ready(Ok(found));
                    }
                    Look::Busy => return Poll::Pending,
                    Look::Drive(driver) => (driver, state.forgotten),
                }
            };
            let mut lent = Lent { stream: &self.stream, driver: None };
            let polled = self.stream.drive(driver, &mut lent);
            match lent.give_back(polled, (forgotten, self.has_company())) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    self.stream.wakers.remove(self.number);
                    return Poll::Ready(Err(error));
                }
            }
        }
    }

    /// Forgets the pages that are kept and the read that is under way.
    pub(crate) fn forget(&self) {
        self.stream.forget();
    }
}

enum Look {
    Found(Found),
    /// Another member polls the driver at this moment.
    Busy,
    Drive(Box<Driver>),
}

impl State {
    fn look(
        &mut self,
        stream: &Stream,
        engine: &Arc<dyn StorageEngine>,
        place: Place,
        (is_at_end, has_company): (bool, bool),
    ) -> Look {
        while self.pages.front().is_some_and(|page| page.read_at.elapsed() > KEPT) {
            self.pages.pop_front();
        }
        if let Some(page) = self.pages.iter().find(|page| page.from == place.position) {
            if place.read.is_none_or(|read| read.stands(page.page.began)) {
                return Look::Found(Found::Page(page.clone()));
            }
            // The log has lost its tail, before or after the page was read. Which of both is found out by reading.
            self.forget();
        }
        let next = self.pages.iter().map(|page| page.from).find(|from| *from > place.position);
        let next = next.filter(|_| has_company);
        let new = || Look::Drive(Box::new(Driver::new(engine, stream, place)));
        match std::mem::take(&mut self.driver) {
            Slot::Away(position) => {
                self.driver = Slot::Away(position);
                match next {
                    Some(next) => Look::Found(Found::Alone(next)),
                    None if position > place.position => Look::Found(Found::Alone(position)),
                    None => Look::Busy,
                }
            }
            Slot::Empty => match next {
                Some(next) => Look::Found(Found::Alone(next)),
                None => self.lend(new()),
            },
            Slot::Here(driver) => {
                let position = driver.reader.position();
                let ahead = place.position.get() - position.get();
                if ahead == 0 {
                    let is_good = !driver.is_stuck() && driver.has_read_as(place);
                    let driver = if is_good { Look::Drive(driver) } else { new() };
                    return self.lend(driver);
                }
                if !has_company || (ahead > 0 && (driver.is_stuck() || (is_at_end && ahead > FAR))) {
                    self.pages.clear();
                    return self.lend(new());
                }
                if ahead < 0 {
                    self.driver = Slot::Here(driver);
                    return Look::Found(Found::Alone(next.unwrap_or(position)));
                }
                // The stream comes after the member.
                if is_at_end {
                    return self.lend(Look::Drive(driver));
                }
                self.driver = Slot::Here(driver);
                Look::Found(Found::Alone(Position::MAX))
            }
        }
    }

    fn lend(&mut self, look: Look) -> Look {
        if let Look::Drive(driver) = &look {
            self.driver = Slot::Away(driver.reader.position());
        }
        look
    }

    fn forget(&mut self) {
        self.pages.clear();
        self.forgotten += 1;
        if let Slot::Here(_) = self.driver {
            self.driver = Slot::Empty;
        }
    }

    fn keep(&mut self, page: SharedPage) {
        self.pages.push_back(page);
        let mut bytes: usize = self.pages.iter().map(|page| page.page.events.size()).sum();
        while self.pages.len() > KEPT_PAGES || (self.pages.len() > 1 && bytes > KEPT_BYTES) {
            bytes -= self.pages.pop_front().map_or(0, |page| page.page.events.size());
        }
    }
}

impl Stream {
    fn new(filter: Filter, limit: PageLimit) -> Self {
        Self {
            filter,
            limit,
            members: AtomicUsize::new(0),
            next_member: AtomicU64::new(0),
            wakers: Arc::default(),
            state: Mutex::default(),
        }
    }

    /// One poll of the driver. It wakes all members when there is something to do.
    fn drive(&self, driver: Box<Driver>, lent: &mut Lent<'_>) -> Poll<Result<SharedPage>> {
        self.wakers.listen();
        let waker = Waker::from(Arc::clone(&self.wakers));
        lent.driver.insert(driver).poll_page(&mut Context::from_waker(&waker))
    }

    fn forget(&self) {
        lock(&self.state).forget();
        self.wakers.wake_all();
    }
}

/// A driver that a member polls. If the poll panics, the next member makes another driver.
struct Lent<'a> {
    stream: &'a Stream,
    driver: Option<Box<Driver>>,
}

impl Lent<'_> {
    fn give_back(
        mut self,
        polled: Poll<Result<SharedPage>>,
        (forgotten, has_company): (u64, bool),
    ) -> Poll<Result<()>> {
        let mut state = lock(&self.stream.state);
        let is_valid = state.forgotten == forgotten;
        state.driver = Slot::Empty;
        let given = match polled {
            Poll::Pending => {
                state.driver = self.driver.take().filter(|_| is_valid).map_or(Slot::Empty, Slot::Here);
                Poll::Pending
            }
            Poll::Ready(Ok(page)) if is_valid => {
                state.driver = self.driver.take().map_or(Slot::Empty, Slot::Here);
                if !has_company {
                    state.pages.clear();
                }
                state.keep(page);
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Ok(_)) => Poll::Ready(Ok(())),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        };
        drop(state);
        if given.is_ready() || !is_valid || self.stream.wakers.has_rung() {
            self.stream.wakers.wake_all();
        }
        given
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if self.driver.is_some() && std::thread::panicking() {
            lock(&self.stream.state).driver = Slot::Empty;
            self.stream.wakers.wake_all();
        }
    }
}

/// Reads to the end of the log and waits there for more.
struct Driver {
    engine: Arc<dyn StorageEngine>,
    reader: LogReader,
    waiting: Option<BoxFuture<'static, Result<Position>>>,
    /// When the last page came, or the last wait ended.
    since: Instant,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("reader", &self.reader).finish_non_exhaustive()
    }
}

impl Driver {
    fn new(engine: &Arc<dyn StorageEngine>, stream: &Stream, place: Place) -> Self {
        let query =
            LogQuery::after(place.position).with_filter(stream.filter.clone()).with_limit(stream.limit);
        Self {
            engine: Arc::clone(engine),
            reader: LogReader::new(Arc::clone(engine), query).behind(place.read),
            waiting: None,
            since: Instant::now(),
        }
    }

    fn is_stuck(&self) -> bool {
        self.since.elapsed() > STUCK
    }

    /// Whether the log is the same for this driver and for a member at this place.
    fn has_read_as(&self, place: Place) -> bool {
        match (self.reader.witness(), place.read) {
            (Some(own), Some(read)) => own == read,
            _ => true,
        }
    }

    fn poll_page(&mut self, context: &mut Context<'_>) -> Poll<Result<SharedPage>> {
        loop {
            if let Some(waiting) = &mut self.waiting {
                let Poll::Ready(head) = waiting.as_mut().poll(context) else { return Poll::Pending };
                self.waiting = None;
                self.since = Instant::now();
                if head? <= self.reader.position() {
                    self.waiting = Some(self.wait());
                    continue;
                }
            }
            let from = self.reader.position();
            match self.reader.poll_next(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(None)) => self.waiting = Some(self.wait()),
                Poll::Ready(Ok(Some(page))) => {
                    self.since = Instant::now();
                    return Poll::Ready(Ok(SharedPage { from, page, read_at: self.since }));
                }
            }
        }
    }

    fn wait(&self) -> BoxFuture<'static, Result<Position>> {
        let (engine, position) = (Arc::clone(&self.engine), self.reader.position());
        Box::pin(async move { engine.wait(position, WAIT).await })
    }
}

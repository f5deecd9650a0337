//! Inline projections: read models that are written in the transaction of the commit itself, under its lock.
//!
//! Each has a cursor in the store, so that it sees every event once, also those that other processes commit.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use evercore_core::engine::{CaughtPanic, NameTable, Step};
use evercore_core::{
    BoxError, BoxFuture, CursorId, CursorStatus, Error, ErrorKind, Event, Position, Result as CoreResult,
    limits,
};
use futures_lite::FutureExt;
use tokio::time::Instant;
use tokio_postgres::Transaction;

use crate::connection::pool::Pools;
use crate::connection::user_sql::UserTransaction;
use crate::error::{Result, damaged};
use crate::names::Names;
use crate::read::log::Log;
use crate::settings::{InlineHandler, InlineProjection, Settings};
use crate::subscription::subscriptions::CursorStore;

/// The inline projections of an engine.
pub(crate) struct InlineProjections {
    pub(crate) pools: Arc<Pools>,
    pub(crate) names: Arc<Names>,
    pub(crate) log: Arc<Log>,
    pub(crate) cursors: Arc<CursorStore>,
    pub(crate) all: Vec<NamedProjection>,
}

/// An inline projection whose name was checked.
pub(crate) struct NamedProjection {
    id: CursorId,
    handle: Arc<InlineHandler>,
}

impl InlineProjections {
    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Hands the inline projections all events that they have not seen yet.
    pub(crate) async fn catch_up(&self) -> CoreResult<()> {
        for inline in &self.all {
            let begin = Step::declare(1, Position::ZERO, Some(Position::ZERO));
            self.cursors.step(&inline.id, &begin).await?;
            let catch_up = || self.pools.again_if_stale(|| self.catch_up_once(inline));
            while catch_up().await.map_err(|error| Error::from(error).resume_panic())? {}
        }
        Ok(())
    }

    /// Hands the inline projections the events that others have committed without them, page by page and without the
    /// lock of the log, until at most one page is left for the next commit.
    pub(crate) async fn draw_near(&self) -> Result<()> {
        let until = Instant::now() + self.pools.settings.statement_timeout;
        for inline in &self.all {
            loop {
                let behind = self.cursors.behind(&inline.id).await?;
                if behind <= i64::try_from(limits::DEFAULT_PAGE_EVENTS).unwrap_or(i64::MAX) {
                    break;
                }
                if Instant::now() >= until {
                    let message = format!(
                        "{} has not yet handled {behind} events, and nothing was written: try again",
                        inline.name()
                    );
                    return Err(Error::new(ErrorKind::Unavailable, message).into());
                }
                self.pools.again_if_stale(|| self.catch_up_once(inline)).await?;
            }
        }
        Ok(())
    }

    /// Hands the inline projections the events up to `head` that they have not seen, in the transaction that has locked
    /// and written the log.
    pub(crate) async fn apply(
        &self,
        transaction: &UserTransaction<'_>,
        table: &Arc<NameTable>,
        head: Position,
    ) -> Result<()> {
        for inline in self.all.iter().filter(|_| head > Position::ZERO) {
            while self.take_page(inline, transaction, table, head).await? {}
        }
        Ok(())
    }

    /// Handles one page in its own transaction, without the lock of the log. Returns whether there is more.
    async fn catch_up_once(&self, inline: &NamedProjection) -> Result<bool> {
        let mut checkout = self.pools.to_commit().await?;
        let transaction = UserTransaction::begin(&self.pools, &mut checkout).await?;
        let sender = transaction.sender();
        // Read the cursor before the head: a commit of another process may move the cursor while this waits for it.
        self.pools.in_time(self.cursors.hold(sender, &inline.id)).await?;
        // Read the head before the names: the names of all events up to the head have then been committed.
        let read = async { Ok((self.log.head_within(sender).await?, self.names.reload(sender).await?)) };
        let (head, table) = self.pools.in_time(read).await?;
        let has_more = self.take_page(inline, &transaction, &table, head).await?;
        // If a failover loses this commit, the cursor goes back together with the handler's rows.
        transaction.commit_unwatched().await?;
        checkout.put_back();
        Ok(has_more)
    }

    /// Handles a page of events after the cursor, and moves the cursor. Returns whether there is more.
    async fn take_page(
        &self,
        inline: &NamedProjection,
        transaction: &UserTransaction<'_>,
        table: &Arc<NameTable>,
        head: Position,
    ) -> Result<bool> {
        let sender = transaction.sender();
        let held = self.pools.in_time(self.cursors.hold(sender, &inline.id)).await?;
        // Skip a cursor that was removed by hand.
        let Some(mut cursor) = held else { return Ok(false) };
        if cursor.status != CursorStatus::Active || cursor.position == head {
            return Ok(false);
        }
        if cursor.position > head {
            return Err(Error::cursor_ahead(cursor.position, head).into());
        }
        let page = self.log.page_within(sender, Arc::clone(table), (cursor.position, head));
        let events: Vec<Event> = self.pools.in_time(page).await?.iter().collect();
        let last = events.last().ok_or_else(|| damaged("the log lacks its last events"))?;
        cursor.position = last.position();
        let name = inline.name();
        if let Err(fault) = transaction.run(&name, || inline.handle(transaction.sql(), &events)).await {
            fault.unless_late(self.pools.in_time(sender.execute("ROLLBACK")).await)?;
            return Err(fault.into_error(&name));
        }
        self.pools.in_time(self.cursors.put(sender, &cursor)).await?;
        Ok(cursor.position < head)
    }
}

impl NamedProjection {
    /// Calls the handler. A panic becomes an error that carries it to the caller, since the flight runs in another
    /// task.
    fn handle<'t>(
        &'t self,
        transaction: &'t Transaction<'t>,
        events: &'t [Event],
    ) -> BoxFuture<'t, Result<(), BoxError>> {
        Box::pin(async move {
            let handled = AssertUnwindSafe(async { (self.handle)(transaction, events).await });
            handled.catch_unwind().await.unwrap_or_else(|panic| Err(CaughtPanic::new(panic).into()))
        })
    }

    /// For errors.
    fn name(&self) -> String {
        format!("inline projection \"{}\"", self.id.subscription)
    }
}

/// Checks the inline projections before the store is opened.
pub(crate) fn checked(settings: &Settings) -> CoreResult<Vec<NamedProjection>> {
    let mut checked: Vec<NamedProjection> = Vec::with_capacity(settings.inline.len());
    for InlineProjection { name, version, handle } in &settings.inline {
        let id = CursorId::of_inline(name, *version, checked.iter().map(|other| &other.id))?;
        if settings.read_only {
            let why = "needs to write, but the engine is connected for reading only";
            return Err(Error::invalid(format!("inline projection \"{name}\" {why}")));
        }
        checked.push(NamedProjection { id, handle: Arc::clone(handle) });
    }
    Ok(checked)
}

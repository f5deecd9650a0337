//! Inline projections: read models that are written in the transaction of the commit itself, under its lock.
//!
//! Each has a cursor in the store, so that it sees every event once, also those that other processes commit.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use evercore_core::{
    Batch, BoxError, BoxFuture, CursorId, CursorStatus, Error, ErrorKind, Event, NameTable, PageLimit,
    Position, Result as CoreResult, Step, SubscriptionName, limits,
};
use futures_lite::FutureExt;
use tokio::time::Instant;
use tokio_postgres::Transaction;

use crate::builder::Settings;
use crate::commit::batch::{self, Flown, Sorted};
use crate::commit::own_sql::{at_the_end, open, run_within};
use crate::connection::pool::Lent;
use crate::error::{Result, damaged, is_ours, is_rolled_back};
use crate::read::rows::Page;
use crate::sql::Sender;
use crate::store::Store;
use crate::subscription::subscriptions::{self, Writes};

type Handle =
    dyn for<'t> Fn(&'t Transaction<'t>, &'t [Event]) -> BoxFuture<'t, Result<(), BoxError>> + Send + Sync;

/// An inline projection as it was given to the builder.
#[derive(Clone)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    pub(crate) version: u32,
    pub(crate) handle: Arc<Handle>,
}

impl fmt::Debug for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wanted")
            .field("name", &self.name)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// An inline projection whose name was checked.
pub(crate) struct Inline {
    id: CursorId,
    handle: Arc<Handle>,
}

/// Checks the inline projections before the store is opened.
pub(crate) fn checked(settings: &Settings) -> CoreResult<Vec<Inline>> {
    let mut checked: Vec<Inline> = Vec::with_capacity(settings.inline.len());
    for wanted in &settings.inline {
        let (name, version) = (&wanted.name, wanted.version);
        let id = CursorId { subscription: SubscriptionName::new(name)?, version, partition: 0 };
        if settings.read_only {
            return Err(Error::invalid(
                "an inline projection writes, but the engine is connected for reading only",
            ));
        }
        if version == 0 {
            return Err(Error::invalid(format!(
                "inline projection \"{name}\" has version 0, the first is 1"
            )));
        }
        if checked.iter().any(|other| other.id == id) {
            return Err(Error::invalid(format!(
                "there are two inline projections \"{name}\" of version {version}"
            )));
        }
        checked.push(Inline { id, handle: Arc::clone(&wanted.handle) });
    }
    Ok(checked)
}

/// Hands the inline projections all events that they have not seen yet.
pub(crate) async fn catch_up(store: &Store) -> CoreResult<()> {
    for inline in &store.inline {
        let begin = Step::declare(1, Position::ZERO, Some(Position::ZERO));
        subscriptions::step(store, &inline.id, &begin).await?;
        let catch_up = || store.again_if_stale(|| inline.catch_up_once(store));
        while catch_up().await.map_err(|error| go_on(error.into()))? {}
    }
    Ok(())
}

/// Hands the inline projections the events that others have committed without them, page by page and without the lock
/// of the log, until at most one page is left for the next commit.
pub(crate) async fn draw_near(store: &Store) -> Result<()> {
    let until = Instant::now() + store.settings.statement_timeout;
    for inline in &store.inline {
        loop {
            let behind =
                store.look(|lent| async move { subscriptions::behind(store, &lent, &inline.id).await });
            let behind = behind.await?;
            if behind <= i64::try_from(limits::DEFAULT_PAGE_EVENTS).unwrap_or(i64::MAX) {
                break;
            }
            if Instant::now() >= until {
                let message = format!(
                    "{} is {behind} events behind, and nothing was written: try again",
                    inline.what()
                );
                return Err(Error::new(ErrorKind::Unavailable, message).into());
            }
            store.again_if_stale(|| inline.catch_up_once(store)).await?;
        }
    }
    Ok(())
}

/// Writes some batches and runs the inline projections on them, in one transaction.
pub(crate) async fn fly(store: &Store, batches: &[&Batch], table: &Arc<NameTable>) -> Flown {
    if let Err(error) = draw_near(store).await {
        return Flown::RolledBack(error);
    }
    let mut lent = match Lent::to_fly(store).await {
        Ok(lent) => lent,
        Err(error) => return Flown::RolledBack(error),
    };
    match together(store, &mut lent, batches, table).await {
        Ok((flown, is_clean)) => {
            if is_clean {
                lent.put_back();
            }
            flown
        }
        // Nothing was committed, since no COMMIT was sent yet.
        Err(error) if is_rolled_back(&error) && is_ours(&error) => Flown::Look,
        Err(error) => Flown::RolledBack(error),
    }
}

/// Runs the whole transaction. Also returns whether the connection can be reused.
async fn together(
    store: &Store,
    lent: &mut Lent,
    batches: &[&Batch],
    table: &Arc<NameTable>,
) -> Result<(Flown, bool)> {
    let named = lent.is_named();
    let transaction = store.in_time(open(&store.settings, lent.client_mut()?)).await?;
    let sender = Sender { client: transaction.client(), cache: &transaction.statement_cache, named };
    let looked = async {
        let (known, table) = batch::look(store, sender, batches, table, None).await?;
        Ok((batch::sort_out(store, sender, batches, known, &table).await?, table))
    };
    let (Sorted { mut outcomes, writing, fresh }, table) = store.in_time(looked).await?;
    if writing.is_empty() {
        let outcomes = outcomes.into_iter().flatten().collect();
        return Ok((Flown::Done(outcomes), transaction.rollback().await.is_ok()));
    }
    let receipts = store.in_time(batch::write_within(store, sender, &writing)).await?;
    let head = receipts.iter().map(|(_, receipt)| receipt.last).max().unwrap_or_default();
    apply(store, sender, &transaction, &newest(&table, fresh.as_ref()), head).await?;
    let doubt = store.heard.before_commit();
    match doubt.settle(store.in_time(async { Ok(transaction.commit().await?) }).await) {
        Ok(()) => {
            fresh.into_iter().for_each(|fresh| drop(store.names.learn(fresh)));
            receipts.into_iter().for_each(|(index, receipt)| outcomes[index] = Some(Ok(receipt)));
            Ok((Flown::Done(outcomes.into_iter().flatten().collect()), true))
        }
        Err(error) if is_rolled_back(&error) => Err(at_the_end("an inline projection", error)),
        Err(_) => Ok((Flown::Unknown, false)),
    }
}

/// The names, including those registered in the same transaction.
pub(crate) fn newest(table: &Arc<NameTable>, fresh: Option<&NameTable>) -> Arc<NameTable> {
    fresh.map_or_else(|| Arc::clone(table), |fresh| Arc::new(fresh.clone()))
}

/// Hands the inline projections the events up to `head` that they have not seen, in the transaction that has locked and
/// written the log.
pub(crate) async fn apply(
    store: &Store,
    sender: Sender<'_>,
    transaction: &Transaction<'_>,
    table: &Arc<NameTable>,
    head: Position,
) -> Result<()> {
    for inline in store.inline.iter().filter(|_| head > Position::ZERO) {
        while inline.take_page(store, sender, transaction, table, head).await? {}
    }
    Ok(())
}

impl Inline {
    /// Handles one page in its own transaction, without the lock of the log. Returns whether there is more.
    async fn catch_up_once(&self, store: &Store) -> Result<bool> {
        let mut lent = Lent::to_commit(store).await?;
        let named = lent.is_named();
        let transaction = store.in_time(open(&store.settings, lent.client_mut()?)).await?;
        let sender = Sender { client: transaction.client(), cache: &transaction.statement_cache, named };
        // Read the cursor before the head: a commit of another process may move the cursor while this waits for it.
        store.in_time(subscriptions::hold(store, sender, &self.id, (false, Position::ZERO), None)).await?;
        // Read the head before the names: the names of all events up to the head have then been committed.
        let read = async { Ok((store.sql.log.head(sender).await?, store.names.reload(sender).await?)) };
        let (head, table) = store.in_time(read).await?;
        let has_more = self.take_page(store, sender, &transaction, &table, head).await?;
        // No caller relies on this commit: if a failover loses it, the cursor goes back together with the handler's
        // rows.
        store.in_time(async { Ok(transaction.commit().await?) }).await?;
        lent.put_back();
        Ok(has_more)
    }

    /// Handles a page of events after the cursor, and moves the cursor. Returns whether there is more.
    async fn take_page(
        &self,
        store: &Store,
        sender: Sender<'_>,
        transaction: &Transaction<'_>,
        table: &Arc<NameTable>,
        head: Position,
    ) -> Result<bool> {
        let held = store
            .in_time(subscriptions::hold(store, sender, &self.id, (false, Position::ZERO), None))
            .await?;
        // Skip a cursor that was removed by hand.
        let Some(mut cursor) = held.cursor else { return Ok(false) };
        if cursor.status != CursorStatus::Active || cursor.position == head {
            return Ok(false);
        }
        if cursor.position > head {
            return Err(Error::cursor_ahead(cursor.position, head).into());
        }
        let mut page = Page::within(store, sender, Arc::clone(table), PageLimit::default());
        store.in_time(page.fill(store.sql.log.all_between(cursor.position, head))).await?;
        let events: Vec<Event> = page.finish().0.iter().collect();
        let last = events.last().ok_or_else(|| damaged("the log ends before its end"))?;
        cursor.position = last.position();
        let handled = run_within(store, sender, &self.what(), || self.handle(transaction, &events)).await;
        if let Err(fault) = handled {
            let ended = store.in_time(async { Ok(sender.client.batch_execute("ROLLBACK").await?) }).await;
            fault.unless_late(ended)?;
            return Err(fault.into_error(&self.what()));
        }
        store.in_time(Writes::put(store, &cursor).send(sender)).await?;
        Ok(cursor.position < head)
    }

    /// Calls the handler. A panic becomes an error that carries it to the caller, since the flight runs in another
    /// task.
    fn handle<'t>(
        &'t self,
        transaction: &'t Transaction<'t>,
        events: &'t [Event],
    ) -> BoxFuture<'t, Result<(), BoxError>> {
        Box::pin(async move {
            let handled = AssertUnwindSafe(async { (self.handle)(transaction, events).await });
            handled.catch_unwind().await.unwrap_or_else(|panic| Err(Panicked(Mutex::new(Some(panic))).into()))
        })
    }

    fn what(&self) -> String {
        format!("inline projection \"{}\"", self.id.subscription)
    }
}

impl fmt::Debug for Inline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inline").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A handler's panic on its way to the caller.
struct Panicked(Mutex<Option<Box<dyn Any + Send>>>);

impl fmt::Debug for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Panicked")
    }
}

impl fmt::Display for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an inline projection panicked")
    }
}

impl std::error::Error for Panicked {}

/// In the caller: continues a panic, and returns any other error unchanged.
pub(crate) fn go_on(error: Error) -> Error {
    let panicked = error.cause::<Panicked>();
    let panic =
        panicked.and_then(|panicked| panicked.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    match panic {
        Some(panic) => resume_unwind(panic),
        None => error,
    }
}

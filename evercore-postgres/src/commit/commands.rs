//! Command ids: the stored outcome of a command, settling it, and forgetting old ones.

use std::sync::Arc;

use evercore_core::engine::KnownCommand;
use evercore_core::{CommandId, Receipt, Timestamp};
use tokio_postgres::types::Type;

use crate::connection::pool::{Checkout, Pools};
use crate::error::Result;
use crate::sql::{Ready, Sender, Sql};

const FIND: &str = "SELECT command_id, fingerprint, receipt FROM @commands WHERE command_id = ANY ($1)";

/// Waits for a running commit with the same id: the unique index lets one go first.
const ABANDON: &str = "
    INSERT INTO @commands (command_id, recorded_at)
    VALUES ($1, (pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) * 1000000::double precision)::bigint)
    ON CONFLICT (command_id) DO NOTHING RETURNING command_id";

/// All commands, in pieces. Old ones are searched so rarely that an index by time would not pay: each commit would have
/// to maintain it.
const LIST: &str =
    "SELECT command_id, recorded_at FROM @commands WHERE command_id > $1 ORDER BY command_id LIMIT 1000";

const FORGET: &str = "DELETE FROM @commands WHERE command_id = ANY ($1) AND recorded_at < $2";

/// The commands of a store.
#[derive(Debug)]
pub(crate) struct Commands {
    pools: Arc<Pools>,
    find: Sql,
    abandon: Sql,
    list: Sql,
    forget: Sql,
}

impl Commands {
    pub(crate) fn new(pools: Arc<Pools>) -> Self {
        let sql = |text: &str, types: &[Type]| Sql::new(&pools.settings.schema, text, types);
        Self {
            find: sql(FIND, &[Type::TEXT_ARRAY]),
            abandon: sql(ABANDON, &[Type::TEXT]),
            list: sql(LIST, &[Type::TEXT]),
            forget: sql(FORGET, &[Type::TEXT_ARRAY, Type::INT8]),
            pools,
        }
    }

    /// The statement that finds commands by a list of ids.
    pub(crate) async fn ready<'a>(&'a self, sender: Sender<'a>) -> Result<Ready<'a>> {
        sender.ready(&self.find).await
    }

    /// The stored outcome of a command.
    pub(crate) async fn find(&self, id: &CommandId) -> Result<Option<KnownCommand>> {
        self.pools.read(|checkout| async move { self.find_within(checkout.sender()?, id).await }).await
    }

    pub(crate) async fn find_within(
        &self,
        sender: Sender<'_>,
        id: &CommandId,
    ) -> Result<Option<KnownCommand>> {
        let row = sender.row(&self.find, &[&[id.as_str()].as_slice()]).await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(KnownCommand::stored(row.try_get(1)?, row.try_get(2)?)?))
    }

    /// The receipt of a command. If there is none, the command is marked as abandoned and can never take effect.
    pub(crate) async fn settle(&self, id: &CommandId) -> Result<Option<Receipt>> {
        let settle = |checkout: Arc<Checkout>| async move {
            let sender = checkout.sender()?;
            let ready = sender.ready(&self.abandon).await?;
            self.pools.notices.write(ready.write(&self.pools.settings, &[&id.as_str()])).await?;
            Ok(self.find_within(sender, id).await?.and_then(KnownCommand::into_receipt))
        };
        self.pools.write(settle).await
    }

    /// Removes the commands that are older than this, piece by piece. Returns how many.
    pub(crate) async fn forget(&self, before: Timestamp) -> Result<u64> {
        let (mut forgotten, mut after, before) = (0, String::new(), before.as_micros());
        loop {
            let from = after.as_str();
            let forget = |checkout: Arc<Checkout>| async move {
                self.forget_some(checkout.sender()?, from, before).await
            };
            let (removed, last) = self.pools.write(forget).await?;
            forgotten += removed;
            match last {
                Some(last) => after = last,
                None => return Ok(forgotten),
            }
        }
    }

    /// Returns how many commands were removed, and the last id of the piece; `None` if there are no more.
    async fn forget_some(
        &self,
        sender: Sender<'_>,
        after: &str,
        before: i64,
    ) -> Result<(u64, Option<String>)> {
        let piece = sender.rows(&self.list, &[&after]).await?;
        let mut old: Vec<&str> = Vec::new();
        for row in &piece {
            if row.try_get::<_, i64>(1)? < before {
                old.push(row.try_get(0)?);
            }
        }
        if !old.is_empty() {
            let ready = sender.ready(&self.forget).await?;
            self.pools.notices.commit(ready.write(&self.pools.settings, &[&old, &before])).await?;
        }
        let last = piece.last().map(|row| row.try_get(0)).transpose()?;
        Ok((old.len() as u64, last))
    }
}

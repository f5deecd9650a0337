//! Reserves ids for new aggregates.

use std::sync::Arc;

use evercore_core::engine::{IdBlock, Mark};
use evercore_core::{Error, ErrorKind};
use tokio_postgres::types::Type;

use crate::connection::pool::{Checkout, Pools};
use crate::error::{Result, damaged};
use crate::sql::Sql;

/// Whether an id of a block is in use.
const ARE_USED: &str = "SELECT EXISTS (SELECT FROM @aggregates a WHERE a.id >= $1 AND a.id < $2)";

/// Up to this number, integers are exact in JSON and in every language.
const LARGEST_ID: u64 = (1 << 53) - 1;

/// How many blocks to try. The first one is free unless the store has very many aggregates.
const BLOCKS: usize = 100;

/// Reserves ids.
#[derive(Debug)]
pub(crate) struct Ids {
    pools: Arc<Pools>,
    are_used: Sql,
}

impl Ids {
    pub(crate) fn new(pools: Arc<Pools>) -> Self {
        let are_used = Sql::new(&pools.settings.schema, ARE_USED, &[Type::INT8, Type::INT8]);
        Self { pools, are_used }
    }

    /// A block of ids that no other caller gets, at a random place. A counter could be lost with the tail of the log.
    /// It would then give the same ids again, and nobody would notice that they name other aggregates than before.
    pub(crate) async fn reserve(&self, count: u32) -> Result<IdBlock> {
        let reserve = |checkout: Arc<Checkout>| async move {
            for _ in 0..BLOCKS {
                let block = random_start(count);
                let end = block.saturating_add(i64::from(count));
                let row = checkout.sender()?.row(&self.are_used, &[&block, &end]).await?;
                if !row.ok_or_else(|| damaged("the server did not answer"))?.try_get::<_, bool>(0)? {
                    return Ok(IdBlock::new(block, count)?);
                }
            }
            let message = "there is no free block of ids, the store has too many aggregates";
            Err(Error::new(ErrorKind::Backend, message).into())
        };
        self.pools.read_for_commit(reserve).await
    }
}

/// The first id of a block.
fn random_start(count: u32) -> i64 {
    let room = LARGEST_ID - u64::from(count);
    i64::try_from(1 + Mark::random().get().cast_unsigned() % room).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_numbers_that_json_keeps() {
        for count in [1, 256, u32::MAX] {
            let (first, last) = (random_start(count), random_start(count) + i64::from(count) - 1);
            assert!(first >= 1 && last.cast_unsigned() <= LARGEST_ID);
        }
    }
}

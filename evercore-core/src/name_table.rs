//! Type names and the ids that an engine stores instead of them.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::contract::{Filter, KnownType};
use crate::error::{Error, ErrorKind, Result};
use crate::mark::Mark;
use crate::name::{AggregateType, EventType};

/// One more than the largest id of a name. A larger one means a damaged store, and must not fill the memory.
const MAX_TYPE_ID: u32 = 1 << 24;

/// The names known now. A reader takes the current table and keeps it while it reads. For engines that store ids
/// instead of names.
#[derive(Debug, Default)]
pub struct NameCache(RwLock<Arc<NameTable>>);

impl NameCache {
    /// A cache that begins with this table. A transaction begins a separate one, since it may find names that are not
    /// committed yet.
    pub fn new(table: Arc<NameTable>) -> Self {
        Self(RwLock::new(table))
    }

    /// The names known now.
    pub fn table(&self) -> Arc<NameTable> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the names with all committed ones, just read from the store. Names that the store has lost are dropped.
    pub fn replace(&self, mut committed: NameTable) -> Arc<NameTable> {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        committed.share_with(&table);
        *table = Arc::new(committed);
        Arc::clone(&table)
    }

    /// Adds the names that a transaction found or registered. Call it after the transaction has committed.
    pub fn add(&self, committed: NameTable) {
        if committed.is_empty() {
            return;
        }
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut table).add(committed);
    }
}

/// Type names and their ids, found in both directions. For engines that store ids instead of names.
///
/// Ids are small and begin at 1. Put only committed names into a table.
#[derive(Clone, Debug, Default)]
pub struct NameTable {
    by_name: HashMap<AggregateType, EventTypes>,
    aggregate_types: Vec<Option<AggregateType>>,
    event_types: Vec<Option<(AggregateType, EventType)>>,
    complete_to: u32,
    mark: Mark,
}

#[derive(Clone, Debug, Default)]
struct EventTypes {
    id: u32,
    by_name: HashMap<EventType, u32>,
}

impl NameTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// A stored id of a name, checked.
    ///
    /// # Errors
    /// [`NotAStore`](ErrorKind::NotAStore) if no name can have this id: the store is damaged.
    pub fn type_id(stored: i64) -> Result<u32> {
        u32::try_from(stored).ok().filter(|id| (1..MAX_TYPE_ID).contains(id)).ok_or_else(|| {
            Error::new(ErrorKind::NotAStore, format!("the type id {stored} in the store is out of range"))
        })
    }

    /// Adds a stored aggregate type, and one of its event types if it has any.
    ///
    /// # Errors
    /// [`NotAStore`](ErrorKind::NotAStore) if an id is out of range; [`InvalidName`](ErrorKind::InvalidName).
    pub fn add_stored(&mut self, aggregate_type: (i64, &str), event_type: Option<(i64, &str)>) -> Result<()> {
        let of = Self::type_id(aggregate_type.0)?;
        let aggregate_type = match self.aggregate_type(of) {
            Some(known) => known.clone(),
            None => {
                let name = AggregateType::new(aggregate_type.1)?;
                self.set_aggregate_type(of, &name);
                name
            }
        };
        if let Some((id, name)) = event_type {
            self.set_event_type(Self::type_id(id)?, &aggregate_type, &EventType::new(name)?);
        }
        Ok(())
    }

    /// Whether the table has no names.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The id of this aggregate type.
    pub fn aggregate_type_id(&self, name: &AggregateType) -> Option<u32> {
        Some(self.by_name.get(name)?.id)
    }

    /// The aggregate type with this id.
    pub fn aggregate_type(&self, id: u32) -> Option<&AggregateType> {
        self.aggregate_types.get(id as usize)?.as_ref()
    }

    /// The id of this event type in this aggregate type.
    pub fn event_type_id(&self, aggregate_type: &AggregateType, name: &EventType) -> Option<u32> {
        self.by_name.get(aggregate_type)?.by_name.get(name).copied()
    }

    /// The ids of all event types of this aggregate type, in any order.
    pub fn event_type_ids(&self, aggregate_type: &AggregateType) -> impl Iterator<Item = u32> {
        self.by_name.get(aggregate_type).into_iter().flat_map(|known| known.by_name.values().copied())
    }

    /// The event type with this id, and its aggregate type.
    pub fn event_type(&self, id: u32) -> Option<&(AggregateType, EventType)> {
        self.event_types.get(id as usize)?.as_ref()
    }

    /// The largest id up to which no event type is missing.
    pub fn complete_to(&self) -> u32 {
        self.complete_to
    }

    /// Notes that the table has all names that there were at one moment. Then no name is missing up to the largest id,
    /// even if some ids are not used.
    pub fn mark_complete(&mut self) {
        self.complete_to = self.next_event_type() - 1;
    }

    /// The id after the largest one of an aggregate type.
    pub fn next_aggregate_type(&self) -> u32 {
        next(&self.aggregate_types)
    }

    /// The id after the largest one of an event type.
    pub fn next_event_type(&self) -> u32 {
        next(&self.event_types)
    }

    /// The ids of the event types that pass the filter, in order; `None` if all pass.
    pub fn passing(&self, filter: &Filter) -> Option<Vec<u32>> {
        let known = || self.event_types.iter().zip(0..).filter_map(|(entry, id)| Some((entry.as_ref()?, id)));
        let passes = |(aggregate_type, event_type): &(AggregateType, EventType)| {
            filter.matches_type(aggregate_type, event_type)
        };
        if known().all(|(entry, _)| passes(entry)) {
            return None;
        }
        Some(known().filter(|(entry, _)| passes(entry)).map(|(_, id)| id).collect())
    }

    /// All names in order.
    pub fn list(&self) -> Vec<KnownType> {
        let mut types: Vec<KnownType> = self.by_name.iter().map(|(name, known)| known.list(name)).collect();
        types.sort();
        types
    }

    /// Adds an aggregate type.
    pub fn set_aggregate_type(&mut self, id: u32, name: &AggregateType) {
        self.by_name.entry(name.clone()).or_default().id = id;
        set(&mut self.aggregate_types, id, name.clone());
    }

    /// Adds an event type. Its aggregate type must be added too.
    pub fn set_event_type(&mut self, id: u32, aggregate_type: &AggregateType, name: &EventType) {
        self.by_name.entry(aggregate_type.clone()).or_default().by_name.insert(name.clone(), id);
        set(&mut self.event_types, id, (aggregate_type.clone(), name.clone()));
        self.complete_on();
    }

    /// Uses the allocations of another table for the names that both have, because names in the same allocation are
    /// faster to compare.
    fn share_with(&mut self, other: &Self) {
        for name in other.aggregate_types.iter().flatten() {
            if let Some(id) = self.aggregate_type_id(name) {
                set(&mut self.aggregate_types, id, name.clone());
            }
        }
        for (of, name) in other.event_types.iter().flatten() {
            if let Some(id) = self.event_type_id(of, name) {
                set(&mut self.event_types, id, (of.clone(), name.clone()));
            }
        }
    }

    /// The mark under which the names were read. It changes whenever a name is registered. For engines that may lose
    /// the newest names together with the tail of the log.
    pub fn mark(&self) -> Mark {
        self.mark
    }

    /// Notes the mark under which the names were read.
    pub fn set_mark(&mut self, mark: Mark) {
        self.mark = mark;
    }

    fn complete_on(&mut self) {
        while self.event_type(self.complete_to + 1).is_some() {
            self.complete_to += 1;
        }
    }

    /// Adds all names of another table.
    pub fn add(&mut self, other: Self) {
        self.complete_to = self.complete_to.max(other.complete_to);
        for (id, name) in (0..).zip(other.aggregate_types) {
            name.into_iter().for_each(|name| self.set_aggregate_type(id, &name));
        }
        for (id, entry) in (0..).zip(other.event_types) {
            entry.into_iter().for_each(|(of, name)| self.set_event_type(id, &of, &name));
        }
        self.complete_on();
    }
}

impl EventTypes {
    fn list(&self, name: &AggregateType) -> KnownType {
        let mut event_types: Vec<EventType> = self.by_name.keys().cloned().collect();
        event_types.sort();
        KnownType { aggregate_type: name.clone(), event_types }
    }
}

/// Ids begin at 1, so index 0 stays empty.
fn next<T>(places: &[T]) -> u32 {
    u32::try_from(places.len().max(1)).unwrap_or(u32::MAX)
}

fn set<T: Clone>(places: &mut Vec<Option<T>>, id: u32, value: T) {
    let place = id as usize;
    if places.len() <= place {
        places.resize(place + 1, None);
    }
    places[place] = Some(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_complete_up_to_its_first_gap() {
        let user = AggregateType::new("user").unwrap();
        let mut table = NameTable::new();
        table.set_aggregate_type(1, &user);
        for (id, complete_to) in [(2, 0), (1, 2), (4, 2), (3, 4)] {
            table.set_event_type(id, &user, &EventType::new(format!("e{id}")).unwrap());
            assert_eq!(table.complete_to(), complete_to);
        }
    }

    #[test]
    fn a_gap_that_was_there_at_one_moment_misses_nothing() {
        let user = AggregateType::new("user").unwrap();
        let table = |ids: &[u32]| {
            let mut table = NameTable::new();
            table.set_aggregate_type(1, &user);
            for id in ids {
                table.set_event_type(*id, &user, &EventType::new(format!("e{id}")).unwrap());
            }
            table
        };
        let (mut whole, mut learned) = (table(&[1, 4]), table(&[1, 5]));
        whole.mark_complete();
        assert_eq!((whole.complete_to(), learned.complete_to()), (4, 1));
        learned.add(whole);
        assert_eq!(learned.complete_to(), 5);
    }

    #[test]
    fn a_filter_that_all_pass_needs_no_ids() {
        let (user, order) = (AggregateType::new("user").unwrap(), AggregateType::new("order").unwrap());
        let created = EventType::new("Created").unwrap();
        let mut table = NameTable::new();
        for (id, name) in [(1, &user), (2, &order)] {
            table.set_aggregate_type(id, name);
            table.set_event_type(id, name, &created);
        }
        assert_eq!(table.passing(&Filter::all().with_event_type(created)), None);
        assert_eq!(table.passing(&Filter::all().with_aggregate_type(order)), Some(vec![2]));
        assert_eq!(table.list().len(), 2);
    }
}

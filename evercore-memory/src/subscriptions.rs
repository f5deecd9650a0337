//! The cursors of subscriptions, and their parked events.

use evercore_core::engine::{
    Backlog, Changed, Mark, ParkedChange, Step, StepOutcome, Subject, SubscriptionChange,
};
use evercore_core::{Cursor, CursorId, Result, SubscriptionName};

use crate::state::State;

impl State {
    pub(crate) fn step(&mut self, id: &CursorId, step: &Step) -> Result<Option<Cursor>> {
        let outcome = self.take(id, step)?;
        Ok(self.put(id, outcome))
    }

    /// Works out the result of a step. Changes nothing yet.
    pub(crate) fn take(&self, id: &CursorId, step: &Step) -> Result<StepOutcome> {
        let found = self.at(step.looks_at()).map(|_| Mark::ALWAYS);
        step.take(id, self.cursors.get(id).cloned(), self.now(), found)
    }

    pub(crate) fn put(&mut self, id: &CursorId, outcome: StepOutcome) -> Option<Cursor> {
        for change in outcome.parked {
            self.change_parked(id, change);
        }
        match &outcome.cursor {
            Some(cursor) => self.cursors.insert(id.clone(), cursor.clone()),
            None => self.cursors.remove(id),
        };
        outcome.cursor
    }

    pub(crate) fn change(&mut self, name: &SubscriptionName, change: &SubscriptionChange) -> Result<Changed> {
        let of_name = self.cursors.values().filter(|cursor| cursor.id.subscription == *name);
        let cursors: Vec<Cursor> = of_name.cloned().collect();
        let count = |cursor: &Cursor| {
            let parked = self.parked.get(&cursor.id).map_or(0, |parked| parked.len());
            (cursor.id.clone(), u64::try_from(parked).unwrap_or(u64::MAX))
        };
        let parked = cursors.iter().map(count).collect();
        let outcome = change.take(name, &Subject { cursors, parked, now: self.now(), head: self.head() })?;
        for (id, written) in outcome.writes {
            self.put(&id, written);
        }
        Ok(outcome.changed)
    }

    pub(crate) fn backlog(&self, cursor: &Cursor) -> Backlog {
        let parked = || self.parked.get(&cursor.id).into_iter().flat_map(|parked| parked.values());
        Backlog {
            cursor: cursor.clone(),
            next_recorded_at: self.at(cursor.position.next()).map(|event| event.recorded_at),
            parked: parked().count() as u64,
            oldest_parked_at: parked().map(|event| event.parked_at).min(),
        }
    }

    fn change_parked(&mut self, id: &CursorId, change: ParkedChange) {
        let parked = self.parked.entry(id.clone()).or_default();
        match change {
            ParkedChange::Keep(event) => drop(parked.insert(event.position, event)),
            ParkedChange::Remove(position) => drop(parked.remove(&position)),
            ParkedChange::Due(which) => {
                let due =
                    parked.values_mut().filter(|event| which.is_none_or(|which| which == event.position));
                due.for_each(|event| event.is_due = true);
            }
            ParkedChange::RemoveAll => parked.clear(),
        }
    }
}

//! What tells one line of the log from another that took its place.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::ids::Position;

/// A random number that one commit leaves with its events.
///
/// A log may lose its tail, in a failover or a restore, and other events may then come to the same positions. An event
/// that still has its mark is the same event, and so is everything before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mark(i64);

impl Mark {
    /// The mark of every event where the log cannot lose its tail while the engine is open, and of the log's beginning.
    pub const ALWAYS: Self = Self(0);

    /// A new one.
    ///
    /// The standard library seeds every `RandomState` anew.
    pub fn random() -> Self {
        Self(RandomState::new().build_hasher().finish().cast_signed())
    }

    /// Takes a mark that was stored.
    pub const fn new(mark: i64) -> Self {
        Self(mark)
    }

    /// The number.
    pub const fn get(self) -> i64 {
        self.0
    }
}

/// An event as it was read: it proves that everything up to it is as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Witness {
    /// Where the event is.
    pub position: Position,
    /// Its mark.
    pub mark: Mark,
}

impl Witness {
    /// The beginning of the log, which is never lost.
    pub const START: Self = Self { position: Position::ZERO, mark: Mark::ALWAYS };

    /// The event at this position, with this mark.
    pub const fn new(position: Position, mark: Mark) -> Self {
        Self { position, mark }
    }

    /// Whether it stands, where the log has an event with the mark `found` at its position, or none.
    pub fn stands(self, found: Option<Mark>) -> bool {
        self == Self::START || found == Some(self.mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_witness_stands_where_its_mark_is_found() {
        let there = Witness::new(Position::new(7).unwrap(), Mark::random());
        assert!(there.stands(Some(there.mark)));
        assert!(!there.stands(None) && !there.stands(Some(Mark::random())));
        assert!(Witness::START.stands(None));
    }
}

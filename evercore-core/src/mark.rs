//! Marks of events, which show whether the log has lost its tail.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::ids::Position;

/// A random number that a commit stores with its events.
///
/// A log may lose its tail in a failover or a restore, and then other events may get the same positions. If an event
/// still has its mark, it is the same event, and so are all events before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mark(i64);

impl Mark {
    /// The mark of all events if the log cannot lose its tail while the engine is open, and of the beginning of the
    /// log.
    pub const ALWAYS: Self = Self(0);

    /// A new mark.
    ///
    /// The standard library gives each `RandomState` a new seed.
    pub fn random() -> Self {
        Self(RandomState::new().build_hasher().finish().cast_signed())
    }

    /// A stored mark.
    pub const fn new(mark: i64) -> Self {
        Self(mark)
    }

    /// The number.
    pub const fn get(self) -> i64 {
        self.0
    }
}

/// An event that was read. If it is still there, the log up to it is unchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Witness {
    /// The position of the event.
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

    /// Whether it is still there. `found` is the mark that the log now has at its position, if any.
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

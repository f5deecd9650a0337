//! The interface of the two directions of a connection.

/// Decides which bytes pass in one direction.
pub(super) trait Filter {
    /// Takes the bytes that arrived. Gives the bytes to pass on now, and the next action.
    fn take(&mut self, arrived: &[u8]) -> (Vec<u8>, NextAction);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NextAction {
    GoOn,
    Cut,
}

//! Subscriptions: their cursors, and the two kinds of projections.

pub(crate) mod inline;
pub(crate) mod projection;
pub(crate) mod subscriptions;

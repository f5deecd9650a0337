//! Cursors of subscriptions, and the tables that subscriptions and commits fill.

pub(crate) mod inline;
pub(crate) mod projection;
pub(crate) mod subscriptions;

//! Reading the log as it grows: each event once and in order, whichever runner owns the cursor, and whatever the handler
//! does.

mod failures;
mod health;
mod known;
mod operating;
mod partitions;
mod running;
mod sharing;
mod starting;
mod surviving;
mod tools;
mod unwell;
mod versions;

pub(super) use failures::*;
pub(super) use health::*;
pub(super) use known::*;
pub(super) use operating::*;
pub(super) use partitions::*;
pub(super) use running::*;
pub(super) use sharing::*;
pub(super) use starting::*;
pub(super) use surviving::*;
pub(super) use versions::*;

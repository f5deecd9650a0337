//! How an engine was opened.

use std::time::Duration;

/// Which failures an acknowledged commit survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// A power cut and a crash of the operating system: each commit is flushed to the disk (`synchronous=FULL`).
    #[default]
    PowerLoss,
    /// A crash of the process only. A power cut may lose the last commits, but never a part of one
    /// (`synchronous=NORMAL`).
    ProcessCrash,
}

impl Durability {
    /// The value of `PRAGMA synchronous`.
    pub(crate) const fn synchronous(self) -> i64 {
        match self {
            Self::PowerLoss => 2,
            Self::ProcessCrash => 1,
        }
    }
}

/// The settings of an engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) durability: Durability,
    pub(crate) read_connections: u32,
    pub(crate) busy_timeout: Duration,
    pub(crate) open_timeout: Duration,
    pub(crate) sql_timeout: Duration,
    pub(crate) create: bool,
    pub(crate) read_only: bool,
    pub(crate) immutable: bool,
    pub(crate) commit_on_caller_thread: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            durability: Durability::default(),
            read_connections: 4,
            busy_timeout: Duration::from_secs(5),
            open_timeout: Duration::from_secs(10),
            sql_timeout: Duration::from_secs(5),
            create: true,
            read_only: false,
            immutable: false,
            commit_on_caller_thread: false,
        }
    }
}

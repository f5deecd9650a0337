//! All limits. They are the same on every engine.
//!
//! Texts are measured in bytes of UTF-8. A value over its limit is refused with
//! [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) or [`ErrorKind::InvalidName`](crate::ErrorKind::InvalidName) when
//! it is made, so an engine never gets it.

/// The longest name of an aggregate type or event type, in bytes.
pub const NAME_BYTES: usize = 255;

/// The longest natural key, in bytes.
///
/// Far below the 2,704 bytes that one row of a PostgreSQL B-tree index can hold.
pub const KEY_BYTES: usize = 1_024;

/// The longest command id, in bytes.
pub const COMMAND_ID_BYTES: usize = 255;

/// The longest `reference`, correlation id or causation id of an event, in bytes.
pub const REFERENCE_BYTES: usize = 1_024;

/// The largest size of the headers of one event: all names and values together, in bytes.
pub const HEADERS_BYTES: usize = 64 * 1024;

/// The largest payload of one event, and the largest state in a snapshot, in bytes (16 MiB).
pub const PAYLOAD_BYTES: usize = 16 * 1024 * 1024;

/// The most events that one unit of work may have.
pub const UNIT_EVENTS: usize = 10_000;

/// The most payload bytes that one unit of work may have (64 MiB).
pub const UNIT_BYTES: usize = 64 * 1024 * 1024;

/// The most aggregates that one unit of work may create. The same number limits its key changes, and its guards.
pub const UNIT_AGGREGATES: usize = 10_000;

/// The most events that a page of a read may have.
pub const PAGE_EVENTS: usize = 10_000;

/// The most bytes that a page of a read may have, payloads with metadata (64 MiB). A page always has room for
/// one event.
pub const PAGE_BYTES: usize = 64 * 1024 * 1024;

/// The most positions that one page of the log searches if it must look at events one by one. Such a page may have no
/// event, although one comes later.
pub const PAGE_SCANNED: usize = 20_000;

/// Up to this many event types, the SQL engines find the events of a filter by an index.
pub const INDEXED_TYPES: usize = 24;

/// The most events that a page has by default.
pub const DEFAULT_PAGE_EVENTS: usize = 1_000;

/// The most bytes that a page has by default, payloads with metadata (8 MiB).
pub const DEFAULT_PAGE_BYTES: usize = 8 * 1024 * 1024;

/// The most ids that may be reserved at once.
pub const RESERVE_IDS: u32 = 100_000;

/// The most partitions that a subscription may have.
pub const PARTITIONS: u32 = 1_024;

/// The longest error text that is stored with a parked event or a failed cursor, in bytes.
pub const STORED_ERROR_BYTES: usize = 1_000;

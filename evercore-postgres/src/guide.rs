//! The guide, page by page. The pages are also files of the repository.
//!
//! - [`operations`]: for the administrators of the database
//! - the pages of every engine: [`limits`], [`observability`], [`from_go`], [`benchmarks`]

#[doc(inline)]
pub use evercore_core::guide::*;

#[doc = include_str!("../OPERATIONS.md")]
pub mod operations {}

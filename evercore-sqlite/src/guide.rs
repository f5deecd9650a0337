//! The guide, page by page. The pages are also in the folder `docs` of the repository.
//!
//! - [`cookbook`]: a recipe for each task
//! - [`durability`]: when a commit is on disk, and how to copy and restore a file
//! - the pages of every engine: [`limits`], [`observability`], [`from_go`], [`benchmarks`]

#[doc(inline)]
pub use evercore_core::guide::*;

// The recipes are parts of one program, and a test of that program compares them. They do not compile alone, so they
// are not tests of this crate.
#[cfg_attr(not(doctest), doc = include_str!("../docs/cookbook.md"))]
#[cfg_attr(doctest, doc = "The cookbook.")]
pub mod cookbook {}

#[doc = include_str!("../docs/durability.md")]
pub mod durability {}

//! The guide, page by page. The pages are also in the folder `docs` of the repository.
//!
//! - [`subscriptions`]: versions of a subscription, and what operators do
//! - [`limits`]: the largest values that are accepted
//! - [`observability`]: spans and metrics
//! - [`from_go`]: the names of the Go evercore, and the names here
//! - [`benchmarks`]: figures, and the commands that measure them
//!
//! The cookbook is in the guide of `evercore-sqlite`.

#[doc = include_str!("../docs/subscriptions.md")]
pub mod subscriptions {}

#[doc = include_str!("../docs/limits.md")]
pub mod limits {}

#[doc = include_str!("../docs/observability.md")]
pub mod observability {}

#[doc = include_str!("../docs/from-go.md")]
pub mod from_go {}

#[doc = include_str!("../docs/benchmarks.md")]
pub mod benchmarks {}

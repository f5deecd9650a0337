//! The identity of a store in memory.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::hash::hash;

/// Identifies a store, see [`StorageEngine::identity`](crate::StorageEngine::identity). It has eight bytes, because
/// every [`Loaded`](crate::Loaded) has one.
///
/// ```
/// # use evercore_core::StoreId;
/// assert_eq!(StoreId::of("3f0c9a"), StoreId::of("3f0c9a"));
/// assert_ne!(StoreId::of("3f0c9a"), StoreId::of("3f0c9b"));
/// assert_ne!(StoreId::random(), StoreId::random());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StoreId(u64);

impl StoreId {
    /// The identity of a store with this stored id. It is a hash of the text, the same in every process.
    pub fn of(stored: &str) -> Self {
        Self(hash([stored.as_bytes()]))
    }

    /// A new identity, for a store that ends with its process.
    ///
    /// The standard library gives each `RandomState` a new seed.
    pub fn random() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }
}

//! Which store.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::hash::hash;

/// Tells one store from another: what [`StorageEngine::identity`](crate::StorageEngine::identity) gives. A number of eight
/// bytes, since every [`Loaded`](crate::Loaded) has one.
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
    /// That of the store that keeps this text as its id: a hash of it, the same in every process.
    pub fn of(stored: &str) -> Self {
        Self(hash([stored.as_bytes()]))
    }

    /// A new one, for a store that lives no longer than the process.
    ///
    /// The standard library seeds every `RandomState` anew.
    pub fn random() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }
}

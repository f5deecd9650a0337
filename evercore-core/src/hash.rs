//! A hash that never changes.

pub(crate) fn hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let mut hash = Fnv::new();
    parts.into_iter().for_each(|part| hash.part(part));
    hash.finish()
}

/// FNV-1a with 64 bits. Unlike the standard library's hasher it is the same on every machine and in every release. It finds
/// mistakes, such as an id that is used twice, but does not protect against attacks.
pub(crate) struct Fnv(u64);

impl Fnv {
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// The length goes in first, so that different lists of parts do not collide.
    pub(crate) fn part(&mut self, bytes: &[u8]) {
        for byte in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    pub(crate) fn finish(self) -> u64 {
        self.0
    }
}

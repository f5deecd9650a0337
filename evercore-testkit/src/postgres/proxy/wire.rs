//! Where a message of PostgreSQL's protocol ends.

/// How long the first message is, if it is there whole: a kind, then a length that counts itself.
pub(super) fn message(bytes: &[u8]) -> Option<usize> {
    Some(1 + untyped_message(bytes.get(1..)?)?)
}

/// The same for what a client sends first: messages without a kind.
pub(super) fn untyped_message(bytes: &[u8]) -> Option<usize> {
    let length = u32::from_be_bytes(*bytes.first_chunk()?) as usize;
    // A length below 4 is nonsense, and must not stop us either.
    let length = length.max(4);
    (bytes.len() >= length).then_some(length)
}

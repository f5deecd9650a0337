//! Finds the end of a message of PostgreSQL's protocol.

/// The length of the first message, if all of it has arrived: a kind, and a length that includes itself.
pub(super) fn message(bytes: &[u8]) -> Option<usize> {
    Some(1 + untyped_message(bytes.get(1..)?)?)
}

/// The same for the first messages of a client, which have no kind.
pub(super) fn untyped_message(bytes: &[u8]) -> Option<usize> {
    let length = u32::from_be_bytes(*bytes.first_chunk()?) as usize;
    // A length below 4 is invalid, and must not stop the proxy.
    let length = length.max(4);
    (bytes.len() >= length).then_some(length)
}

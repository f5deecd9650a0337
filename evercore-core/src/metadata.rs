//! Metadata of an event: time, reference, correlation and causation ids, headers.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::limits;
use crate::time::Timestamp;

/// Names and values of your choice, in the order of the names.
pub type Headers = BTreeMap<String, String>;

/// Data about a unit of work or about one of its events.
///
/// Set it for a whole unit with [`UnitOfWork::set_metadata`](crate::UnitOfWork::set_metadata), and for one event with
/// [`UnitOfWork::record_with`](crate::UnitOfWork::record_with). The values of an event replace those of its unit. Every
/// read returns all of it, on all engines.
///
/// ```
/// use evercore_core::{Metadata, Timestamp};
///
/// let metadata = Metadata::new()
///     .with_time(Timestamp::now())
///     .with_reference("clerk 112")?
///     .with_correlation_id("request 7f3a")?
///     .with_header("tenant", "north")?;
/// assert_eq!(metadata.reference(), Some("clerk 112"));
/// # Ok::<(), evercore_core::Error>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    time: Option<Timestamp>,
    reference: Option<Arc<str>>,
    correlation_id: Option<Arc<str>>,
    causation_id: Option<Arc<str>>,
    headers: Headers,
}

impl Metadata {
    /// Metadata with nothing set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the time at which the event happened. The default is the time of recording.
    ///
    /// Any time is allowed, because events are ordered by position, never by time.
    #[must_use]
    pub fn with_time(mut self, time: Timestamp) -> Self {
        self.time = Some(time);
        self
    }

    /// Sets a reference for your application, such as a user, a document or a request.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if it has a NUL, or more than [`limits::REFERENCE_BYTES`].
    pub fn with_reference(mut self, reference: impl AsRef<str>) -> Result<Self> {
        self.reference = Some(checked("reference", reference.as_ref())?);
        Ok(self)
    }

    /// Sets the correlation id, which all events of one conversation share.
    ///
    /// # Errors
    /// As [`with_reference`](Self::with_reference).
    pub fn with_correlation_id(mut self, id: impl AsRef<str>) -> Result<Self> {
        self.correlation_id = Some(checked("correlation id", id.as_ref())?);
        Ok(self)
    }

    /// Sets the causation id: the command or event that caused this one.
    ///
    /// # Errors
    /// As [`with_reference`](Self::with_reference).
    pub fn with_causation_id(mut self, id: impl AsRef<str>) -> Result<Self> {
        self.causation_id = Some(checked("causation id", id.as_ref())?);
        Ok(self)
    }

    pub(crate) fn with_cause(mut self, correlation_id: Arc<str>, causation_id: Arc<str>) -> Self {
        self.correlation_id = Some(correlation_id);
        self.causation_id = Some(causation_id);
        self
    }

    /// Adds a header, and replaces one with the same name.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the name is empty, name or value has a NUL, or all headers together
    /// have more than [`limits::HEADERS_BYTES`].
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Result<Self> {
        let (name, value) = (name.into(), value.into());
        if name.is_empty() {
            return Err(Error::invalid("a header's name is empty"));
        }
        if name.contains('\0') || value.contains('\0') {
            return Err(Error::invalid("a header's name or value has a NUL"));
        }
        self.headers.insert(name, value);
        self.check_headers()
    }

    fn check_headers(self) -> Result<Self> {
        let limit = limits::HEADERS_BYTES;
        let bytes: usize = self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        if bytes > limit {
            return Err(Error::invalid(format!("headers have {bytes} bytes, the limit is {limit}")));
        }
        Ok(self)
    }

    /// The time at which the event happened, if set.
    pub fn time(&self) -> Option<Timestamp> {
        self.time
    }

    /// The application's reference, if set.
    pub fn reference(&self) -> Option<&str> {
        self.reference.as_deref()
    }

    /// The correlation id, if set.
    pub fn correlation_id(&self) -> Option<&str> {
        self.correlation_id.as_deref()
    }

    /// The causation id, if set.
    pub fn causation_id(&self) -> Option<&str> {
        self.causation_id.as_deref()
    }

    /// The headers; empty if none is set.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// How many bytes the reference and the ids have.
    pub(crate) fn text_bytes(&self) -> usize {
        let texts = [&self.reference, &self.correlation_id, &self.causation_id];
        texts.into_iter().flatten().map(|text| text.len()).sum()
    }

    /// How many bytes the headers have as a JSON object; 0 if there are none.
    pub(crate) fn header_json_bytes(&self) -> usize {
        // Each name and value has two quotes, and then a colon or a comma.
        self.headers.iter().map(|(name, value)| json_bytes(name) + json_bytes(value) + 6).sum()
    }

    /// This metadata, with values from `base` if they are missing here. Headers are merged by name.
    pub(crate) fn over(mut self, base: &Self) -> Result<Self> {
        self.time = self.time.or(base.time);
        self.reference = self.reference.or_else(|| base.reference.clone());
        self.correlation_id = self.correlation_id.or_else(|| base.correlation_id.clone());
        self.causation_id = self.causation_id.or_else(|| base.causation_id.clone());
        for (name, value) in &base.headers {
            self.headers.entry(name.clone()).or_insert_with(|| value.clone());
        }
        self.check_headers()
    }
}

/// Shows the time, and which other values are set, but not the values.
impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metadata")
            .field("time", &self.time)
            .field("reference", &self.reference.is_some())
            .field("correlation_id", &self.correlation_id.is_some())
            .field("causation_id", &self.causation_id.is_some())
            .field("headers", &self.headers.len())
            .finish()
    }
}

/// How many bytes a text has within a JSON string.
fn json_bytes(text: &str) -> usize {
    let letter = |byte| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        _ => 1,
    };
    text.bytes().map(letter).sum()
}

/// Checks a reference, correlation id or causation id.
pub(crate) fn checked(what: &str, text: &str) -> Result<Arc<str>> {
    let limit = limits::REFERENCE_BYTES;
    if text.len() > limit {
        return Err(Error::invalid(format!("{what} has {} bytes, the limit is {limit}", text.len())));
    }
    if text.contains('\0') {
        return Err(Error::invalid(format!("{what} has a NUL")));
    }
    Ok(Arc::from(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_event_says_goes_before_what_its_unit_says() {
        let unit = Metadata::new().with_reference("unit").unwrap().with_header("a", "unit").unwrap();
        let event = Metadata::new().with_header("a", "event").unwrap().with_header("b", "event").unwrap();
        let both = event.over(&unit).unwrap();
        assert_eq!(both.reference(), Some("unit"));
        assert_eq!(both.headers()["a"], "event");
        assert_eq!(both.headers()["b"], "event");
    }

    #[test]
    fn limits_are_exact() {
        assert!(Metadata::new().with_reference("x".repeat(limits::REFERENCE_BYTES)).is_ok());
        assert!(Metadata::new().with_reference("x".repeat(limits::REFERENCE_BYTES + 1)).is_err());
        let largest = "x".repeat(limits::HEADERS_BYTES - 1);
        assert!(Metadata::new().with_header("h", largest.as_str()).is_ok());
        assert!(Metadata::new().with_header("hh", largest).is_err());
    }
}

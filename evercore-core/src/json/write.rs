//! Writes JSON, not longer and not deeper nested than can be read again.

use std::io;

use serde::Serialize;
use serde_json::ser::Formatter;
use serde_json::{Error, Serializer};

use crate::limits;

/// Reading stops at 128 levels, the recursion limit of `serde_json`. It protects the stack against hostile payloads.
const LEVELS: u8 = 127;

/// A serializer into memory that stops at the limits.
pub(crate) type Writer = Serializer<Limited, Shallow>;

/// A writer with an empty buffer.
pub(crate) fn writer() -> Writer {
    Serializer::with_formatter(Limited(Vec::with_capacity(128)), Shallow(0))
}

/// The written bytes.
pub(crate) fn written(writer: Writer) -> Vec<u8> {
    writer.into_inner().0
}

/// A value as JSON.
pub(crate) fn to_json<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, Error> {
    let mut writer = writer();
    value.serialize(&mut writer)?;
    Ok(written(writer))
}

/// A buffer that refuses bytes beyond [`limits::PAYLOAD_BYTES`].
pub(crate) struct Limited(Vec<u8>);

impl io::Write for Limited {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    #[inline]
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > limits::PAYLOAD_BYTES - self.0.len() {
            return Err(too_long());
        }
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cold]
fn too_long() -> io::Error {
    io::Error::other(format!("the content has more than the allowed {} bytes", limits::PAYLOAD_BYTES))
}

/// Formats compact JSON, and refuses deep nesting.
pub(crate) struct Shallow(u8);

impl Shallow {
    #[inline]
    fn deeper(&mut self) -> io::Result<()> {
        if self.0 == LEVELS {
            return Err(io::Error::other(format!("the content is nested deeper than {LEVELS} levels")));
        }
        self.0 += 1;
        Ok(())
    }
}

impl Formatter for Shallow {
    #[inline]
    fn begin_array<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.deeper()?;
        writer.write_all(b"[")
    }

    #[inline]
    fn end_array<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0 -= 1;
        writer.write_all(b"]")
    }

    #[inline]
    fn begin_object<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.deeper()?;
        writer.write_all(b"{")
    }

    #[inline]
    fn end_object<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0 -= 1;
        writer.write_all(b"}")
    }
}

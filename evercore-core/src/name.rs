//! Names and keys, checked when they are made: aggregate type, event type, natural key, command id.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::limits;
use crate::text::Text;

/// The rules of all names: not empty, not longer than `limit` bytes, no NUL (PostgreSQL cannot store one).
///
/// The message names the rule and never shows the text, which may be personal data.
fn check(what: &str, text: &str, limit: usize) -> Result<()> {
    if text.is_empty() {
        return Err(Error::invalid_name(format!("{what} is empty")));
    }
    if text.len() > limit {
        return Err(Error::invalid_name(format!("{what} has {} bytes, the limit is {limit}", text.len())));
    }
    if let Some(at) = text.bytes().position(|byte| byte == 0) {
        return Err(Error::invalid_name(format!("{what} has a NUL at byte {at}")));
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $limit:path, $debug:expr) => {
        $(#[$doc])*
        ///
        /// Compared bytewise: case and Unicode form matter. Cheap to clone.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Text);

        impl $name {
            #[doc = concat!("Checks the text and converts it to [`", stringify!($name), "`].")]
            ///
            /// # Errors
            /// [`InvalidName`](crate::ErrorKind::InvalidName) if the text is empty, has a NUL, or is longer than
            #[doc = concat!("[`", stringify!($limit), "`](crate::", stringify!($limit), ").")]
            pub fn new(text: impl AsRef<str>) -> Result<Self> {
                let text = text.as_ref();
                check($what, text, $limit)?;
                Ok(Self(Text::Shared(Arc::from(text))))
            }

            #[doc = concat!("As [`", stringify!($name), "::new`], for a constant of the program, which is not copied.")]
            ///
            /// # Errors
            #[doc = concat!("As [`", stringify!($name), "::new`].")]
            pub fn from_static(text: &'static str) -> Result<Self> {
                check($what, text, $limit)?;
                Ok(Self(Text::Static(text)))
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                self.0.as_str()
            }

            #[allow(dead_code)]
            pub(crate) fn is_same(&self, other: &Self) -> bool {
                self.0.is_same(&other.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let debug: fn(&str, &mut fmt::Formatter<'_>) -> fmt::Result = $debug;
                debug(self.as_str(), f)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }

        impl TryFrom<&str> for $name {
            type Error = Error;

            fn try_from(text: &str) -> Result<Self> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;

            fn try_from(text: String) -> Result<Self> {
                Self::new(text)
            }
        }

        impl TryFrom<&String> for $name {
            type Error = Error;

            fn try_from(text: &String) -> Result<Self> {
                Self::new(text)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.as_str().to_owned()
            }
        }

        impl From<&$name> for $name {
            fn from(name: &$name) -> Self {
                name.clone()
            }
        }
    };
}

name! {
    /// The name of an aggregate type, such as `user`.
    AggregateType, "aggregate type", limits::NAME_BYTES, |text, f| write!(f, "{text:?}")
}

name! {
    /// The name of an event type, such as `UserCreated`. It belongs to one aggregate type.
    EventType, "event type", limits::NAME_BYTES, |text, f| write!(f, "{text:?}")
}

name! {
    /// A natural key: the name by which users know an aggregate, such as a login or an order number.
    ///
    /// Unique per aggregate type. Keys are often personal data, so `Debug` shows only the length, and there is no
    /// `Display`: use [`as_str`](Self::as_str) for the text. With the feature `json`, serde uses the text.
    ///
    /// ```
    /// # use evercore_core::Key;
    /// let key: Key = "ann@example.org".parse()?;
    /// assert_eq!(format!("{key:?}"), "Key(15 bytes)");
    /// assert_eq!(key.as_str(), "ann@example.org");
    /// # Ok::<(), evercore_core::Error>(())
    /// ```
    Key, "natural key", limits::KEY_BYTES, |text, f| write!(f, "Key({} bytes)", text.len())
}

name! {
    /// Names a command that must take effect once, such as the id of the request that asked for it.
    CommandId, "command id", limits::COMMAND_ID_BYTES, |text, f| write!(f, "{text:?}")
}

name! {
    /// The name of a subscription. The store keeps its cursors under this name.
    SubscriptionName, "subscription name", limits::NAME_BYTES, |text, f| write!(f, "{text:?}")
}

name! {
    /// Names one runner of a subscription, from its start to its end, as the holder of leases.
    OwnerId, "owner id", limits::NAME_BYTES, |text, f| write!(f, "{text:?}")
}

impl fmt::Display for SubscriptionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for AggregateType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for CommandId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

//! The numbers of the log: aggregate ids, sequences and positions.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Conversions of a number from text, and from and to `i64`.
macro_rules! impl_number {
    ($name:ident, $what:literal) => {
        impl From<$name> for i64 {
            fn from(number: $name) -> Self {
                number.0
            }
        }

        impl TryFrom<i64> for $name {
            type Error = Error;

            fn try_from(number: i64) -> Result<Self> {
                Self::new(number)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                let number =
                    text.parse().map_err(|_| Error::invalid(concat!("the text is not a valid ", $what)))?;
                Self::new(number)
            }
        }
    };
}

/// Identifies an aggregate within one store. It is at least 1, and never used again.
///
/// Ids are reserved in blocks before the commit, so some are never used, and their order has no meaning.
///
/// Ids, sequences and positions can be parsed from text. With the feature `json`, serde uses numbers. For a database
/// driver they convert to `i64`:
///
/// ```
/// # use evercore_core::{AggregateId, Position};
/// let id: AggregateId = "4711".parse()?;
/// let column = i64::from(id);
/// assert_eq!(AggregateId::try_from(column)?, id);
/// assert!("-1".parse::<Position>().is_err());
/// # Ok::<(), evercore_core::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AggregateId(i64);

impl AggregateId {
    /// Makes an id from a number, for example from a URL.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if it is zero or negative.
    pub fn new(id: i64) -> Result<Self> {
        if id < 1 {
            return Err(Error::invalid(format!("aggregate id {id} is not positive")));
        }
        Ok(Self(id))
    }

    /// The number.
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Debug for AggregateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AggregateId({})", self.0)
    }
}

impl fmt::Display for AggregateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl_number!(AggregateId, "aggregate id");

/// A block of ids that is reserved for the new aggregates of one `EventStore`.
#[derive(Debug, Default)]
pub struct IdBlock(Range<i64>);

impl IdBlock {
    /// A block of `count` ids that begins with `first`.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if `first` is not positive, or if the block would exceed the largest
    /// number.
    pub fn new(first: i64, count: u32) -> Result<Self> {
        match first.checked_add(i64::from(count)) {
            Some(end) if first >= 1 => Ok(Self(first..end)),
            _ => Err(Error::invalid(format!("a block of {count} ids cannot begin with {first}"))),
        }
    }
}

impl Iterator for IdBlock {
    type Item = AggregateId;

    fn next(&mut self) -> Option<AggregateId> {
        self.0.next().map(AggregateId)
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(i64);

        impl $name {
            #[doc = concat!("The ", $what, " before the first event.")]
            pub const ZERO: Self = Self(0);

            #[doc = concat!("The largest ", $what, " that is possible.")]
            pub const MAX: Self = Self(i64::MAX);

            #[doc = concat!("Makes a ", $what, " from a number.")]
            ///
            /// # Errors
            /// [`Invalid`](crate::ErrorKind::Invalid) if it is negative.
            pub fn new(value: i64) -> Result<Self> {
                if value < 0 {
                    return Err(Error::invalid(format!(concat!($what, " {} is negative"), value)));
                }
                Ok(Self(value))
            }

            /// The number.
            pub const fn get(self) -> i64 {
                self.0
            }

            #[doc = concat!("The ", $what, " that is `count` events later; at most [`MAX`](Self::MAX).")]
            #[must_use]
            pub const fn plus(self, count: usize) -> Self {
                Self(self.0.saturating_add_unsigned(count as u64))
            }

            #[doc = concat!("The ", $what, " of the next event.")]
            #[must_use]
            pub const fn next(self) -> Self {
                self.plus(1)
            }

            #[doc = concat!("The ", $what, " of the event before; [`ZERO`](Self::ZERO) has none and stays.")]
            #[must_use]
            pub const fn prev(self) -> Self {
                if self.0 > 0 { Self(self.0 - 1) } else { self }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl_number!($name, $what);
    };
}

counter! {
    /// The number of an event within its aggregate: 1, 2, 3, … without gaps.
    ///
    /// [`Sequence::ZERO`] means that the aggregate has no event yet.
    Sequence, "sequence"
}

counter! {
    /// The place of an event in the log of the whole store: 1, 2, 3, … in commit order, without gaps.
    ///
    /// After a reader has seen position p, no new event appears at or below p. [`Position::ZERO`] is the beginning,
    /// before the first event.
    Position, "position"
}

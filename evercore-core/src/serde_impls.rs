//! Core's values for serde: numbers as numbers, names and times as texts, a receipt as an object. Values are checked
//! when they are read.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::batch::Receipt;
use crate::ids::{AggregateId, Position, Sequence};
use crate::mark::Mark;
use crate::name::{AggregateType, CommandId, EventType, Key, OwnerId, SubscriptionName};
use crate::time::Timestamp;

macro_rules! number {
    ($($name:ident),*) => {
        $(impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_i64(self.get())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(i64::deserialize(deserializer)?).map_err(D::Error::custom)
            }
        })*
    };
}

number!(AggregateId, Sequence, Position);

macro_rules! text {
    ($($name:ident),*) => {
        $(impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(String::deserialize(deserializer)?).map_err(D::Error::custom)
            }
        })*
    };
}

text!(AggregateType, EventType, Key, CommandId, SubscriptionName, OwnerId);

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// An aggregate in a receipt, with its sequence after the commit.
#[derive(Serialize, Deserialize)]
struct Left {
    id: AggregateId,
    sequence: Sequence,
}

/// A receipt in its serialized form.
#[derive(Serialize, Deserialize)]
struct Shown {
    first: Position,
    last: Position,
    recorded_at: Timestamp,
    /// A text, because some languages cannot keep 64 bits in a number.
    mark: String,
    aggregates: Vec<Left>,
}

impl Serialize for Receipt {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { first, last, recorded_at, mark, .. } = *self;
        let mark = mark.get().to_string();
        let aggregates = self.aggregates.iter().map(|(id, sequence)| Left { id: *id, sequence: *sequence });
        Shown { first, last, recorded_at, mark, aggregates: aggregates.collect() }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Receipt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Shown { first, last, recorded_at, mark, aggregates } = Shown::deserialize(deserializer)?;
        let aggregates = aggregates.into_iter().map(|left| (left.id, left.sequence)).collect();
        let mark = Mark::new(mark.parse().map_err(D::Error::custom)?);
        Ok(Self { first, last, recorded_at, mark, aggregates, repeat: Default::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_go_through_json_and_are_checked_on_their_way_back() {
        let receipt = Receipt {
            first: Position::new(7).unwrap(),
            last: Position::new(8).unwrap(),
            recorded_at: Timestamp::from_micros(1).unwrap(),
            mark: Mark::new(-5),
            aggregates: vec![(AggregateId::new(3).unwrap(), Sequence::new(2).unwrap())],
            repeat: Default::default(),
        };
        let json = serde_json::to_string(&receipt).unwrap();
        let expected = r#"{"first":7,"last":8,"recorded_at":"1970-01-01T00:00:00.000001Z","mark":"-5","aggregates":[{"id":3,"sequence":2}]}"#;
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_str::<Receipt>(&json).unwrap(), receipt);
        let key = Key::new("ann").unwrap();
        assert_eq!(serde_json::from_str::<Key>(&serde_json::to_string(&key).unwrap()).unwrap(), key);
        assert!(serde_json::from_str::<Key>(r#""""#).is_err());
        assert!(serde_json::from_str::<AggregateId>("0").is_err());
        assert!(serde_json::from_str::<Timestamp>(r#""today""#).is_err());
    }
}

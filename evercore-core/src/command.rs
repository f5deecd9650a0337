//! Commands that take effect once, and how a repeated command is told from another one with the same id.

use crate::batch::{Batch, Receipt};
use crate::error::{Error, Result};
use crate::hash::{Fnv, hash};
use crate::name::{AggregateType, CommandId, Key};
use crate::target::Target;

/// A command: an id under which it takes effect once, and optionally a word that says what it asks for.
///
/// A store remembers the id of each command that took effect, its receipt, and a *fingerprint*, so that it notices when
/// an id is used again for something else. The fingerprint covers what the caller says about the command, never the
/// events: a decision that is made again may give other bytes (it reads a clock, it walks a `HashMap`), and is still the
/// same command. The fingerprint has two parts:
///
/// * the word that the command was [made with](Self::new), for instance the body of the request;
/// * its aggregates, each by its type and by the natural key or id that the caller gave: the target of
///   [`update_once`](crate::EventStore::update_once) and
///   [`update_or_create_once`](crate::EventStore::update_or_create_once), and the aggregates that a unit of work with a
///   [command](crate::UnitOfWork::set_command) makes, adds events to or gives a key to.
///   [`once`](crate::EventStore::once) knows no targets before it runs, so only the word counts there.
///
/// Two commands with the same id differ if both have the same part and it differs. A command that wrote nothing the first
/// time, and would write something now, is therefore the same command, unless it has a word and the words differ.
/// The fingerprint holds 32 bits of each part, the word in the upper half. A missing part is 0.
///
/// A command id alone is a command too, without a word.
///
/// ```
/// use evercore_core::{Command, CommandId};
///
/// let request = r#"{"from":"alice","to":"bob","cents":100}"#;
/// let command = Command::new(CommandId::new("request 7f3a")?, request);
/// assert_eq!(command.id().as_str(), "request 7f3a");
/// # Ok::<(), evercore_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    id: CommandId,
    /// The hash of the caller's word.
    word: Option<u64>,
}

impl Command {
    /// A command with this id and this word: any text or bytes that stay the same when the command is sent again, and that
    /// differ from those of other commands. Only a hash of the word is stored.
    pub fn new(id: CommandId, word: impl AsRef<[u8]>) -> Self {
        Self { id, word: Some(hash([word.as_ref()])) }
    }

    /// The id.
    pub fn id(&self) -> &CommandId {
        &self.id
    }

    /// The fingerprint; `None` if the command has neither word nor aggregates.
    pub(crate) fn fingerprint<'a>(
        &self,
        targets: impl IntoIterator<Item = CommandTarget<'a>>,
    ) -> Option<i64> {
        let mut targets: Vec<u64> = targets.into_iter().map(CommandTarget::hash).collect();
        if self.word.is_none() && targets.is_empty() {
            return None;
        }
        // A decision that is made again may touch its aggregates in another order.
        targets.sort_unstable();
        let mut hash = Fnv::new();
        targets.iter().for_each(|target| hash.part(&target.to_le_bytes()));
        let word = self.word.map_or(0, half);
        let targets = if targets.is_empty() { 0 } else { half(hash.finish()) };
        Some((u64::from(word) << 32 | u64::from(targets)).cast_signed())
    }
}

/// A hash in 32 bits. It is never 0, which stands for a missing part.
fn half(hash: u64) -> u32 {
    let folded = (hash >> 32) ^ (hash & u64::from(u32::MAX));
    u32::try_from(folded).unwrap_or(u32::MAX).max(1)
}

/// Whether two fingerprints belong to different commands: a half that both have differs.
fn differ(one: i64, other: i64) -> bool {
    let halves = |it: i64| [it.cast_unsigned() >> 32, it.cast_unsigned() & u64::from(u32::MAX)];
    halves(one).into_iter().zip(halves(other)).any(|(one, other)| one != 0 && other != 0 && one != other)
}

impl From<CommandId> for Command {
    fn from(id: CommandId) -> Self {
        Self { id, word: None }
    }
}

impl From<&CommandId> for Command {
    fn from(id: &CommandId) -> Self {
        id.clone().into()
    }
}

/// An aggregate of a command, as the caller named it.
#[derive(Clone, Copy)]
pub(crate) enum CommandTarget<'a> {
    Id(&'a AggregateType, i64),
    Key(&'a AggregateType, &'a Key),
    /// A new aggregate without a natural key: it gets another id each time.
    New(&'a AggregateType),
}

impl<'a> CommandTarget<'a> {
    pub(crate) fn of(aggregate_type: &'a AggregateType, target: &'a Target) -> Self {
        match target {
            Target::Id(id) => Self::Id(aggregate_type, id.get()),
            Target::Key(aggregate_type, key) => Self::Key(aggregate_type, key),
        }
    }

    fn hash(self) -> u64 {
        match self {
            Self::Id(aggregate_type, id) => {
                hash([b"id".as_slice(), aggregate_type.as_str().as_bytes(), &id.to_le_bytes()])
            }
            Self::Key(aggregate_type, key) => {
                hash([b"key".as_slice(), aggregate_type.as_str().as_bytes(), key.as_str().as_bytes()])
            }
            Self::New(aggregate_type) => hash([b"new".as_slice(), aggregate_type.as_str().as_bytes()]),
        }
    }
}

/// The stored state of a command id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KnownCommand {
    /// It took effect.
    Committed {
        /// The fingerprint of the batch that carried it out.
        fingerprint: Option<i64>,
        /// The receipt of that batch.
        receipt: Receipt,
    },
    /// It was settled as never committed.
    Abandoned,
}

impl KnownCommand {
    /// From the columns in which engines store it. A command without a receipt was settled as never committed.
    ///
    /// # Errors
    /// [`NotAStore`](crate::ErrorKind::NotAStore) if the text is no receipt.
    pub fn stored(fingerprint: Option<i64>, receipt: Option<&str>) -> Result<Self> {
        Ok(match receipt {
            None => Self::Abandoned,
            Some(receipt) => Self::Committed { fingerprint, receipt: receipt.parse()? },
        })
    }

    /// The answer to a batch with this id, whatever else is in the batch.
    ///
    /// # Errors
    /// [`CommandReused`](crate::ErrorKind::CommandReused), [`CommandAbandoned`](crate::ErrorKind::CommandAbandoned).
    pub fn answer(&self, batch: &Batch) -> Result<Receipt> {
        self.answer_to(batch.fingerprint())
    }

    /// `None` is a fingerprint without parts, as 0 is.
    pub(crate) fn answer_to(&self, asked: Option<i64>) -> Result<Receipt> {
        match self {
            Self::Committed { fingerprint, .. }
                if differ(fingerprint.unwrap_or_default(), asked.unwrap_or_default()) =>
            {
                Err(Error::command_reused())
            }
            Self::Committed { receipt, .. } => Ok(receipt.clone().repeated()),
            Self::Abandoned => Err(Error::command_abandoned()),
        }
    }

    /// The receipt, if it took effect.
    pub fn into_receipt(self) -> Option<Receipt> {
        match self {
            Self::Committed { receipt, .. } => Some(receipt.repeated()),
            Self::Abandoned => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::AggregateId;

    #[test]
    fn commands_differ_only_where_both_say_something() {
        let of = |word: i64, targets: i64| word << 32 | targets;
        for (one, other) in [(of(1, 2), of(1, 2)), (of(1, 0), of(1, 2)), (of(1, 0), of(0, 2)), (0, of(-1, 2))]
        {
            assert!(!differ(one, other) && !differ(other, one), "{one:x} {other:x}");
        }
        for (one, other) in [(of(1, 2), of(3, 2)), (of(1, 2), of(1, 3)), (of(-1, 0), of(1, 2)), (7, -7)] {
            assert!(differ(one, other) && differ(other, one), "{one:x} {other:x}");
        }
        assert_eq!((half(0), half(u64::MAX), half(5 << 32)), (1, 1, 5));
    }

    #[test]
    fn a_fingerprint_is_of_the_word_and_of_the_targets_in_any_order() {
        let (order, user) = (AggregateType::new("order").unwrap(), AggregateType::new("user").unwrap());
        let (id, key) = (Target::Id(AggregateId::new(7).unwrap()), Key::new("7").unwrap());
        let bare = Command::from(CommandId::new("c").unwrap());
        let said = Command::new(CommandId::new("c").unwrap(), "pay");
        let by_id = CommandTarget::of(&order, &id);
        let by_key = CommandTarget::Key(&order, &key);
        assert_eq!(bare.fingerprint([]), None);
        assert_eq!(bare.fingerprint([by_id, by_key]), bare.fingerprint([by_key, by_id]));
        let all = [
            said.fingerprint([]),
            Command::new(CommandId::new("c").unwrap(), "pay 2").fingerprint([]),
            Command::new(CommandId::new("c").unwrap(), "").fingerprint([]),
            said.fingerprint([by_id]),
            bare.fingerprint([by_id]),
            bare.fingerprint([by_key]),
            bare.fingerprint([CommandTarget::New(&order)]),
            bare.fingerprint([CommandTarget::New(&order), CommandTarget::New(&order)]),
            bare.fingerprint([CommandTarget::of(&user, &id)]),
        ];
        for (index, one) in all.iter().enumerate() {
            assert!(one.is_some() && !all[..index].contains(one), "{index}");
        }
    }
}

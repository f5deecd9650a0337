//! A show: seats that are free until they are booked.

use evercore_sqlite::{Aggregate, Json, Result};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Show {
    seats: u32,
    free: u32,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ShowEvent {
    Announced { name: String, seats: u32 },
    Booked { seats: u32 },
}

impl Aggregate for Show {
    const TYPE: &'static str = "show";
    type Event = ShowEvent;
    type Codec = Json;

    fn apply(&mut self, event: ShowEvent) {
        match event {
            ShowEvent::Announced { seats, .. } => *self = Self { seats, free: seats },
            ShowEvent::Booked { seats } => self.free -= seats,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum No {
    #[error("it was announced with {0} seats")]
    Announced(u32),
    #[error("only {0} seats are free")]
    TooFew(u32),
}

impl Show {
    /// To announce it again with as many seats changes nothing.
    pub(crate) fn announce(&self, name: &str, seats: u32) -> Result<Option<ShowEvent>, No> {
        match self.seats {
            0 => Ok(Some(ShowEvent::Announced { name: name.to_owned(), seats })),
            known if known == seats => Ok(None),
            known => Err(No::Announced(known)),
        }
    }

    pub(crate) fn book(&self, seats: u32) -> Result<[ShowEvent; 1], No> {
        if seats > self.free { Err(No::TooFew(self.free)) } else { Ok([ShowEvent::Booked { seats }]) }
    }
}

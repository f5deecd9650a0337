//! The event types that a subscription knows, and what happens at one that it does not know.

use std::sync::Arc;
use std::time::Duration;

use super::delivery::{Delivery, Outcome, Sink};
use super::settings::{Settings, Subscription};
use super::step::Advance;
use crate::contract::Filter;
use crate::error::{Error, ErrorKind};
use crate::event::Event;
use crate::future::BoxFuture;
use crate::name::{EventType, SubscriptionName};

impl Settings {
    /// The events to read. They include unknown types if those must be noticed.
    pub(crate) fn read_filter(&self) -> Filter {
        if self.known_types.is_some() {
            self.filter.clone().without_event_types()
        } else {
            self.filter.clone()
        }
    }

    /// Whether an event that was read is for the handler, or of a type that is not known.
    pub(crate) fn is_wanted(&self, event: &Event) -> bool {
        self.is_unknown(event.event_type()) || self.filter.matches(event)
    }

    /// Whether this type is missing in the declared ones.
    pub(crate) fn is_unknown(&self, event_type: &EventType) -> bool {
        self.known_types.as_ref().is_some_and(|known| {
            !known.contains(event_type) && !self.filter.event_types().contains(event_type)
        })
    }

    /// The error for the first event of a type that is not known.
    pub(crate) fn refuse_unknown(&self, name: &SubscriptionName, delivery: &Delivery) -> Option<Error> {
        let event = delivery.events().iter().find(|event| self.is_unknown(event.event_type()))?;
        let message = format!(
            "subscription \"{name}\" does not know the event type \"{}\" at position {}: run a program that knows it",
            event.event_type(),
            event.position()
        );
        Some(Error::new(ErrorKind::Rejected, message))
    }
}

impl Subscription {
    /// The sink, which fails at unknown types if those must be noticed.
    pub(crate) fn strict(&self, sink: impl Sink + 'static) -> Arc<dyn Sink> {
        let sink = Arc::new(sink);
        if self.settings.known_types.is_none() {
            return sink;
        }
        Arc::new(Strict { name: self.name.clone(), settings: self.settings.clone(), sink })
    }
}

/// A sink that fails at events of unknown types, and passes all others on.
struct Strict {
    name: SubscriptionName,
    settings: Settings,
    sink: Arc<dyn Sink>,
}

impl Sink for Strict {
    fn deliver<'a>(&'a self, delivery: &'a Delivery, advance: &'a Advance) -> BoxFuture<'a, Outcome> {
        match self.settings.refuse_unknown(&self.name, delivery) {
            Some(error) => {
                Box::pin(std::future::ready(Outcome::Failed { handled: 0, error: Box::new(error) }))
            }
            None => self.sink.deliver(delivery, advance),
        }
    }

    fn tells_which(&self) -> bool {
        self.sink.tells_which()
    }

    fn holds_cursor(&self) -> bool {
        self.sink.holds_cursor()
    }

    fn time_limit(&self) -> Option<Duration> {
        self.sink.time_limit()
    }
}

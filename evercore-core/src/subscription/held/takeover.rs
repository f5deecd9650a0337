//! A version that is not live: it reads as far as the live version has handled the log, and takes over from it.

use std::time::{Duration, Instant};

use super::{Held, PASS_BY, is_passing};
use crate::error::{ErrorKind, Result};
use crate::ids::Position;
use crate::race::{First, race};
use crate::subscription::change::{SubscriptionChange, VersionState, bound_of, distance};
use crate::subscription::cursor::{Cursor, CursorStatus};

/// The shortest and the longest pause between two looks at the live version, while that does not move.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// A version is close to the live one if it needs at most this long for the events between them.
const CLOSE: Duration = Duration::from_secs(1);

/// After this many short rounds in which the live version has moved on each time, its owners are asked to stand still.
const ROUNDS: u32 = 3;

/// Only if no partition of this version has more events before it than this, or than a batch.
const NEAR: i64 = 1_000;

/// The way of a version towards the live one.
#[derive(Debug)]
pub(super) struct Approach {
    /// When to look at the live version again.
    next_look: Instant,
    /// The pause after the next look, if nothing has moved.
    pause: Duration,
    /// When the present round began: the live version was ahead then.
    began: Instant,
    /// How long the last round took.
    last_round: Duration,
    /// How many rounds in a row were short.
    short_rounds: u32,
    is_in_round: bool,
    /// When the owners of the live version may be asked again, and how often they were asked.
    next_ask: Instant,
    asks: u32,
    /// Whether it was told already why the version does not take over.
    has_warned: bool,
}

impl Approach {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            next_look: now,
            pause: LOOK_AGAIN.0,
            began: now,
            last_round: Duration::ZERO,
            short_rounds: 0,
            is_in_round: false,
            next_ask: now,
            asks: 0,
            has_warned: false,
        }
    }

    fn begin_round(&mut self) {
        (self.began, self.is_in_round) = (Instant::now(), true);
        (self.next_look, self.pause) = (self.began, LOOK_AGAIN.0);
    }

    fn end_round(&mut self) {
        if std::mem::take(&mut self.is_in_round) {
            self.last_round = self.began.elapsed();
            let is_short = self.last_round <= CLOSE;
            self.short_rounds = if is_short { self.short_rounds.saturating_add(1) } else { 0 };
        }
    }

    /// How long the live version is asked to stand still; zero if it is not asked now. If it was in vain, the live version
    /// goes on undisturbed for four times as long, and then for eight times, and so on.
    fn ask(&self, is_near: bool, lease: Duration) -> Duration {
        let now = Instant::now();
        if !is_near || self.short_rounds < ROUNDS || now < self.next_ask {
            return Duration::ZERO;
        }
        (self.last_round * 4).max(LOOK_AGAIN.1 / 4).min(lease)
    }

    /// The live version was asked to stand still for this time.
    fn has_asked(&mut self, wait: Duration) {
        self.next_ask = Instant::now() + wait * 5 * (1 << self.asks.min(6));
        self.asks += 1;
    }

    fn look_later(&mut self) {
        self.next_look = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LOOK_AGAIN.1);
    }
}

impl Held {
    /// Builds this version while another one is live: reads as far as that one has come, and takes over when all
    /// partitions have reached it. While there is nothing to do, this waits for a short time.
    pub(crate) async fn build(&mut self) -> Result<()> {
        if !self.pending.is_empty() || !self.tail.is_at_bound() {
            return Ok(());
        }
        if self.cursor.live_from.is_some() {
            // It was promoted, or another partition of it has taken over for all.
            self.read_from(Position::MAX);
            return Ok(());
        }
        if self.taken_to > self.cursor.position && self.has_nothing_out() {
            self.advance(self.advance_to(self.taken_to, Vec::new())).await?;
        }
        let wait = self.approach.next_look.saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            let store = self.subscription.store.clone();
            let pause = store.engine().pause(wait.min(PASS_BY));
            if let First::Right(()) = race(pause, store.operator_calls().after(self.heard)).await {
                self.approach.next_look = Instant::now();
                self.refresh().await?;
            }
            return Ok(());
        }
        self.look().await
    }

    /// Looks at the live version, and takes over if it is time.
    async fn look(&mut self) -> Result<()> {
        let (own, store) = (self.context.id.clone(), self.subscription.store.clone());
        let cursors = store.engine().cursors(Some(&own.subscription)).await?.cursors;
        let head = store.head().await?;
        let state = cursors.iter().find(|cursor| cursor.id == own).map(Cursor::version_state);
        if !matches!(state, Some(VersionState::Building | VersionState::Held)) {
            // It is live, retired or removed by now.
            return self.refresh().await;
        }
        self.approach.end_round();
        let bound = bound_of(&cursors, &own, head).unwrap_or(self.cursor.position);
        let settings = &self.subscription.settings;
        let near = i64::try_from(settings.batch.max_events()).unwrap_or(i64::MAX).max(NEAR);
        let distance = distance(&cursors, own.version, head);
        let wait = match state {
            Some(VersionState::Building) => self.approach.ask(distance <= near, settings.lease),
            _ => Duration::ZERO,
        };
        if state == Some(VersionState::Building) && (distance <= 0 || !wait.is_zero()) {
            let change = SubscriptionChange::take_over(own.clone(), self.context.lease.clone(), wait);
            match store.engine().change(&own.subscription, &change).await {
                Ok(changed) if self.was_taken_over(&changed.cursors) => return Ok(()),
                Ok(changed) => {
                    if !wait.is_zero() {
                        self.approach.has_asked(wait);
                    }
                    self.warn(&changed.cursors, head);
                }
                // A handler works on one of the cursors, or the engine does not answer: it is tried again.
                Err(error) if matches!(error.kind(), ErrorKind::AlreadyOwned) || is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if bound > self.taken_to {
            self.approach.begin_round();
            self.read_from(bound);
        } else {
            self.approach.look_later();
        }
        Ok(())
    }

    /// Goes on as the live version if the change has made it that.
    fn was_taken_over(&mut self, after: &[Cursor]) -> bool {
        let own = after.iter().find(|cursor| cursor.id == self.context.id && cursor.live_from.is_some());
        let Some(own) = own.cloned() else { return false };
        self.cursor = own;
        self.read_from(Position::MAX);
        // Owners of the older version may be waiting for events: they learn that it is over. Readers may wait for it.
        self.subscription.store.operator_calls().send();
        self.subscription.store.cursor_moves().send();
        crate::observe::lease_changed(&self.context.id, "took over");
        true
    }

    /// Says once why a version that has caught up does not take over.
    fn warn(&mut self, cursors: &[Cursor], head: Position) {
        if self.approach.has_warned || distance(cursors, self.context.id.version, head) > 0 {
            return;
        }
        let mut live = cursors.iter().filter(|cursor| cursor.version_state() == VersionState::Live);
        let is_paused = live.any(|cursor| cursor.status == CursorStatus::Paused);
        let why = if is_paused { "the live version is paused" } else { "the live version has parked events" };
        crate::observe::waits_to_take_over(&self.context.id, why);
        self.approach.has_warned = true;
    }
}

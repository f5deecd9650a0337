//! The data from the client, split into messages, to find the one that triggers a cut.

use std::sync::atomic::Ordering;

use super::filter::{Filter, NextAction};
use super::link::Link;
use super::{Cut, Shared, wire};

/// The codes that a client may send instead of a protocol version.
const CANCEL_REQUEST: u32 = 80_877_102;
const ENCRYPTION_REQUESTS: [u32; 2] = [80_877_103, 80_877_104];

/// The messages that end a request: Query, Sync and FunctionCall. The server answers each with one ReadyForQuery.
const ENDS: &[u8] = b"QSF";

pub(super) struct Requests<'a> {
    shared: &'a Shared,
    link: &'a Link,
    arrived: Vec<u8>,
    has_started: bool,
    /// The number of requests that were passed on. The start-up counts as one, because it is answered like one.
    passed: u64,
    /// A cut that happens at the end of the current request.
    cut: Option<Cut>,
    /// The last request has passed on, and the connection ends with its reply.
    is_over: bool,
}

enum Verdict {
    Pass,
    CutBefore,
    CutBehind,
}

impl<'a> Requests<'a> {
    pub(super) fn new(shared: &'a Shared, link: &'a Link) -> Self {
        Self { shared, link, arrived: Vec::new(), has_started: false, passed: 0, cut: None, is_over: false }
    }

    fn next_message(&self, from: usize) -> Option<usize> {
        let rest = &self.arrived[from..];
        if self.has_started { wire::message(rest) } else { wire::untyped_message(rest) }
    }

    fn judge(&mut self, from: usize, to: usize) -> Verdict {
        let message = &self.arrived[from..to];
        if !self.has_started {
            self.has_started = self.link.starts_with(message);
            self.passed += u64::from(self.has_started);
            return Verdict::Pass;
        }
        self.cut = self.cut.or_else(|| self.shared.cut_at(message));
        if self.cut == Some(Cut::Before) {
            return Verdict::CutBefore;
        }
        if !ENDS.contains(&message[0]) {
            return Verdict::Pass;
        }
        self.passed += 1;
        let Some(cut) = self.cut.take() else { return Verdict::Pass };
        // Set before the request is sent, because the reply may be quick.
        self.link.last_reply.store(self.passed, Ordering::SeqCst);
        if cut == Cut::During {
            return Verdict::CutBehind;
        }
        self.is_over = true;
        Verdict::Pass
    }
}

impl Filter for Requests<'_> {
    fn take(&mut self, arrived: &[u8]) -> (Vec<u8>, NextAction) {
        self.arrived.extend_from_slice(arrived);
        // A message without a kind begins with a zero; a TLS handshake does not.
        if !self.has_started && self.arrived.first().is_some_and(|byte| *byte != 0) {
            self.link.is_encrypted.store(true, Ordering::SeqCst);
        }
        if self.link.is_encrypted.load(Ordering::SeqCst) {
            return (std::mem::take(&mut self.arrived), NextAction::GoOn);
        }
        let (mut end, mut then) = (0, NextAction::GoOn);
        while !self.is_over
            && then == NextAction::GoOn
            && let Some(length) = self.next_message(end)
        {
            match self.judge(end, end + length) {
                Verdict::Pass => end += length,
                Verdict::CutBefore => then = NextAction::Cut,
                Verdict::CutBehind => {
                    end += length;
                    then = NextAction::Cut;
                }
            }
        }
        (self.arrived.drain(..end).collect(), then)
    }
}

impl Link {
    /// Whether this message starts a session. A request for encryption or for cancellation does not.
    fn starts_with(&self, message: &[u8]) -> bool {
        let code = message.get(4..).and_then(<[u8]>::first_chunk).map_or(0, |code| u32::from_be_bytes(*code));
        if ENCRYPTION_REQUESTS.contains(&code) {
            self.asked_to_encrypt.store(true, Ordering::SeqCst);
        }
        !ENCRYPTION_REQUESTS.contains(&code) && code != CANCEL_REQUEST
    }
}

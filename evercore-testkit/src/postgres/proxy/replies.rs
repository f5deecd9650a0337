//! The data from the server, split into messages, to find the reply that the client must not get.

use std::sync::atomic::Ordering;

use super::filter::{Filter, NextAction};
use super::link::Link;
use super::wire;

/// ReadyForQuery, which ends each reply.
const READY: u8 = b'Z';

pub(super) struct Replies<'a> {
    link: &'a Link,
    arrived: Vec<u8>,
    /// The number of replies that have ended.
    ended: u64,
}

impl<'a> Replies<'a> {
    pub(super) fn new(link: &'a Link) -> Self {
        Self { link, arrived: Vec::new(), ended: 0 }
    }

    /// Whether the current reply must not reach the client.
    fn is_last(&self) -> bool {
        self.ended + 1 == self.link.last_reply.load(Ordering::SeqCst)
    }
}

impl Filter for Replies<'_> {
    fn take(&mut self, arrived: &[u8]) -> (Vec<u8>, NextAction) {
        self.arrived.extend_from_slice(arrived);
        if self.link.asked_to_encrypt.swap(false, Ordering::SeqCst) {
            // A single byte. Nothing follows it until the client goes on.
            self.link.is_encrypted.store(self.arrived.first() != Some(&b'N'), Ordering::SeqCst);
            return (std::mem::take(&mut self.arrived), NextAction::GoOn);
        }
        if self.link.is_encrypted.load(Ordering::SeqCst) {
            return (std::mem::take(&mut self.arrived), NextAction::GoOn);
        }
        let (mut end, mut passed) = (0, 0);
        while let Some(length) = wire::message(&self.arrived[end..]) {
            let is_ready = self.arrived[end] == READY;
            end += length;
            if !self.is_last() {
                passed = end;
            } else if is_ready {
                return (self.arrived.drain(..passed).collect(), NextAction::Cut);
            }
            self.ended += u64::from(is_ready);
        }
        let bytes = self.arrived[..passed].to_vec();
        self.arrived.drain(..end);
        (bytes, NextAction::GoOn)
    }
}

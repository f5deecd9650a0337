//! Copies bytes from one end to the other. Each direction has a thread that reads and one that writes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::Shared;
use super::filter::{Filter, NextAction};
use super::link::Link;
use super::replies::Replies;
use super::requests::Requests;

/// The delayed bytes, each with its time of arrival. The queue has no bound, because a waiting reader would reduce
/// the throughput.
enum Item {
    Bytes(Vec<u8>),
    Cut,
    End,
}

type Due = (Instant, Item);

/// Runs until both ends are closed.
pub(super) fn run(shared: &Shared, link: &Link) {
    thread::scope(|scope| {
        let (requests, requests_due) = channel();
        let (replies, replies_due) = channel();
        scope.spawn(move || read(shared, &link.client, Requests::new(shared, link), &requests));
        scope.spawn(move || write(shared, link, &link.server, &requests_due));
        scope.spawn(move || read(shared, &link.server, Replies::new(link), &replies));
        write(shared, link, &link.client, &replies_due);
    });
}

fn read(shared: &Shared, mut from: &TcpStream, mut filter: impl Filter, queue: &Sender<Due>) {
    // If the writer has ended, the connection is closed.
    let send = |item| drop(queue.send((Instant::now() + shared.delay(), item)));
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) | Err(_) => return send(Item::End),
            Ok(length) => length,
        };
        let (bytes, then) = filter.take(&buffer[..length]);
        if !bytes.is_empty() {
            send(Item::Bytes(bytes));
        }
        if then == NextAction::Cut {
            return send(Item::Cut);
        }
    }
}

fn write(shared: &Shared, link: &Link, mut to: &TcpStream, queue: &Receiver<Due>) {
    for (due, item) in queue {
        if !sleep_until(due, link) {
            break;
        }
        match item {
            Item::Bytes(bytes) if to.write_all(&bytes).is_ok() => {}
            Item::Bytes(_) | Item::End => break,
            Item::Cut => {
                // Counted first, so that a test that sees the connection end also sees the count. Both directions may
                // get here.
                let is_first = !link.is_cut.swap(true, Ordering::SeqCst);
                shared.cuts.fetch_add(usize::from(is_first), Ordering::SeqCst);
                break;
            }
        }
    }
    link.close();
}

/// Gives false if the connection was closed meanwhile.
fn sleep_until(due: Instant, link: &Link) -> bool {
    loop {
        if link.is_closed.load(Ordering::SeqCst) {
            return false;
        }
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        thread::sleep(left.min(Duration::from_millis(50)));
    }
}

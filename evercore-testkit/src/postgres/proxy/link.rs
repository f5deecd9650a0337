//! One connection through the proxy: both ends, and the state that both directions share.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[derive(Debug)]
pub(super) struct Link {
    pub(super) client: TcpStream,
    pub(super) server: TcpStream,
    pub(super) is_closed: AtomicBool,
    /// The armed cut has happened on this connection.
    pub(super) is_cut: AtomicBool,
    /// The client has asked for encryption. The next byte of the server is the answer.
    pub(super) asked_to_encrypt: AtomicBool,
    /// The stream is encrypted from here on and cannot be read.
    pub(super) is_encrypted: AtomicBool,
    /// The number of the request whose reply the client must not get, counted from 1. The connection ends there. 0
    /// means none.
    pub(super) last_reply: AtomicU64,
}

impl Link {
    pub(super) fn new(client: TcpStream, server: TcpStream) -> Self {
        Self {
            client,
            server,
            is_closed: AtomicBool::new(false),
            is_cut: AtomicBool::new(false),
            asked_to_encrypt: AtomicBool::new(false),
            is_encrypted: AtomicBool::new(false),
            last_reply: AtomicU64::new(0),
        }
    }

    /// Closes both ends in both directions. Data that was sent before still arrives.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        // An end may be closed already.
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
    }
}

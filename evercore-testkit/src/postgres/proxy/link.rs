//! One connection through the proxy: its two ends, and what both directions must know.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[derive(Debug)]
pub(super) struct Link {
    pub(super) client: TcpStream,
    pub(super) server: TcpStream,
    pub(super) is_closed: AtomicBool,
    /// The cut that was armed has happened here.
    pub(super) is_cut: AtomicBool,
    /// The client has asked for encryption, and the server's next byte is its answer.
    pub(super) asked_to_encrypt: AtomicBool,
    /// What passes from now on cannot be read.
    pub(super) is_encrypted: AtomicBool,
    /// The reply to this request, counted from 1, is kept from the client, and the connection ends behind it; 0 if there
    /// is none.
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

    /// Ends all reading and writing on both ends. What was sent before still arrives.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        // An end that is closed already is no error.
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
    }
}

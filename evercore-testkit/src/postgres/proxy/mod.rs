//! A proxy in front of a server. It delays data, or cuts connections.

mod filter;
mod link;
mod pump;
mod replies;
mod requests;
mod wire;

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use link::Link;

/// Where a connection is cut: before or after a request or its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The request does not reach the server.
    Before,
    /// The whole request is sent to the server, and nothing waits for its reply. Usually it takes effect; the server
    /// may notice the cut before.
    During,
    /// The server has replied to the whole request, and the client does not get the reply. Messages that the client
    /// sent after the request do not reach the server.
    AfterReply,
}

/// Describes a message of a client.
#[derive(Clone, Debug)]
pub struct Trigger {
    kinds: Option<&'static [u8]>,
    bytes: Vec<u8>,
}

/// Query, Bind and Execute: the messages that make the server work.
const REQUESTS: &[u8] = b"QBE";

impl Trigger {
    /// The next message that runs statements: Query, Bind or Execute.
    pub fn request() -> Self {
        Self::request_with("")
    }

    /// The next such message that contains these bytes, such as a text parameter or a part of a simple query.
    pub fn request_with(bytes: impl Into<Vec<u8>>) -> Self {
        Self { kinds: Some(REQUESTS), bytes: bytes.into() }
    }

    /// The next message of any kind that contains these bytes, for instance one that prepares a statement.
    pub fn bytes(bytes: impl Into<Vec<u8>>) -> Self {
        Self { kinds: None, bytes: bytes.into() }
    }

    fn fits(&self, message: &[u8]) -> bool {
        let is_kind = self.kinds.is_none_or(|kinds| message.first().is_some_and(|kind| kinds.contains(kind)));
        is_kind && (self.bytes.is_empty() || message.windows(self.bytes.len()).any(|part| part == self.bytes))
    }
}

/// A proxy on `127.0.0.1` and a free port, in front of a server on `127.0.0.1`.
///
/// It reads PostgreSQL's messages, so that it can cut before or after one of them. It passes encrypted data on
/// unread, and no trigger matches there. Dropping it closes all connections.
///
/// ```no_run
/// use evercore_testkit::postgres::{Cut, Proxy, Server, Trigger};
///
/// let server = Server::start()?;
/// let proxy = Proxy::start(server.port())?;
/// proxy.cut_next(Cut::AfterReply, Trigger::request_with("COMMIT"));
/// let url = proxy.url(&server.url());
/// # Ok::<(), String>(())
/// ```
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

/// The state that the threads of a proxy share.
#[derive(Debug, Default)]
struct Shared {
    target: u16,
    delay: AtomicU64,
    armed: Mutex<Option<(Cut, Trigger)>>,
    cuts: AtomicUsize,
    is_refusing: AtomicBool,
    links: Mutex<Links>,
}

#[derive(Debug, Default)]
struct Links {
    is_over: bool,
    present: Vec<Weak<Link>>,
}

impl Proxy {
    /// Starts a proxy to the server on this port.
    ///
    /// # Errors
    /// If no port is free.
    pub fn start(target: u16) -> Result<Self, String> {
        let listener = TcpListener::bind(("127.0.0.1", 0));
        let bound = listener.and_then(|listener| Ok((listener.local_addr()?.port(), listener)));
        let (port, listener) = bound.map_err(|error| format!("no port is free: {error}"))?;
        let shared = Arc::new(Shared { target, ..Shared::default() });
        let for_acceptor = Arc::clone(&shared);
        let acceptor = Some(thread::spawn(move || for_acceptor.accept(&listener)));
        Ok(Self { port, shared, acceptor })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The server's URL with the proxy's host and port.
    pub fn url(&self, of: &str) -> String {
        let (scheme, rest) = of.split_once("://").unwrap_or(("postgres", of));
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let user = authority.rsplit_once('@').map(|(user, _)| format!("{user}@")).unwrap_or_default();
        format!("{scheme}://{user}127.0.0.1:{}{path}", self.port)
    }

    /// Delays every byte by this time from now on, in both directions. The throughput stays the same, because delayed
    /// data waits side by side.
    pub fn set_delay(&self, one_way: Duration) {
        let nanos = u64::try_from(one_way.as_nanos()).unwrap_or(u64::MAX);
        self.shared.delay.store(nanos, Ordering::SeqCst);
    }

    /// Cuts the connection of the next message that matches, once. This replaces an armed cut that has not happened.
    pub fn cut_next(&self, cut: Cut, trigger: Trigger) {
        *self.shared.armed() = Some((cut, trigger));
    }

    /// How many [armed](Self::cut_next) cuts have happened.
    pub fn cuts(&self) -> usize {
        self.shared.cuts.load(Ordering::SeqCst)
    }

    /// Cuts all open connections at once.
    pub fn cut_all(&self) {
        self.shared.close_links(&self.shared.links());
    }

    /// Sets whether new connections are closed at once, as if the server were down.
    pub fn refuse(&self, new_connections: bool) {
        self.shared.is_refusing.store(new_connections, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut links = self.shared.links();
        links.is_over = true;
        self.shared.close_links(&links);
        drop(links);
        // Wakes the thread that accepts connections, so that it sees the end.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    /// Ends after the proxy was dropped and the threads of its connections have ended.
    fn accept(&self, listener: &TcpListener) {
        thread::scope(|scope| {
            while !self.links().is_over {
                match listener.accept() {
                    Ok((client, _)) => drop(scope.spawn(|| self.serve(client))),
                    // Too many open files, or a client that has gone.
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        });
    }

    fn serve(&self, client: TcpStream) {
        if self.is_refusing.load(Ordering::SeqCst) {
            return;
        }
        // Without a server the client's connection is closed.
        let Ok(link) = self.connect(client) else { return };
        let link = Arc::new(link);
        if self.enter(&link) {
            pump::run(self, &link);
        }
    }

    fn connect(&self, client: TcpStream) -> io::Result<Link> {
        let server = TcpStream::connect(("127.0.0.1", self.target))?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        Ok(Link::new(client, server))
    }

    fn enter(&self, link: &Arc<Link>) -> bool {
        let mut links = self.links();
        links.present.retain(|other| other.strong_count() > 0);
        links.present.push(Arc::downgrade(link));
        !links.is_over
    }

    fn close_links(&self, links: &Links) {
        links.present.iter().filter_map(Weak::upgrade).for_each(|link| link.close());
    }

    /// Takes the armed cut, if the message matches.
    fn cut_at(&self, message: &[u8]) -> Option<Cut> {
        let mut armed = self.armed();
        let (cut, trigger) = armed.as_ref()?;
        let cut = trigger.fits(message).then_some(*cut)?;
        *armed = None;
        Some(cut)
    }

    fn delay(&self) -> Duration {
        Duration::from_nanos(self.delay.load(Ordering::SeqCst))
    }

    fn armed(&self) -> MutexGuard<'_, Option<(Cut, Trigger)>> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

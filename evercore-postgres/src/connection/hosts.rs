//! Several hosts: each gets a share of the time, hosts that did not answer are tried last, and a host that lacks events
//! which the engine has seen is avoided.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use evercore_core::{Error, ErrorKind};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use crate::settings::Schema;

/// For how long a host that did not answer in time is tried after all others.
const SILENT: Duration = Duration::from_secs(30);

/// How long to wait after a refused login before the next. The pause is doubled each time, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The shortest time between two rounds of asking all other hosts whether one has become the primary.
const ASK_OTHERS: Duration = Duration::from_secs(10);

/// The hosts of a server, and facts about them that all connections of an engine share.
#[derive(Debug)]
pub(crate) struct Hosts {
    pub(crate) all: Vec<Config>,
    in_any_order: bool,
    schema: Schema,
    learned: Mutex<Learned>,
    /// The store's id, and the end of the log that the engine has seen.
    seen: OnceLock<(String, watch::Receiver<i64>)>,
}

#[derive(Debug)]
struct Learned {
    silent_until: Vec<Option<Instant>>,
    timeline: Option<u32>,
    /// Connections made before this time lead to a replaced primary.
    outdated: Option<Instant>,
    asked_others: Option<Instant>,
    refusal: Option<Refusal>,
}

/// The server has refused a login.
#[derive(Debug)]
struct Refusal {
    kind: ErrorKind,
    message: String,
    pause: Duration,
    until: Instant,
}

impl Hosts {
    pub(crate) fn new(all: Vec<Config>, in_any_order: bool, schema: Schema) -> Self {
        let learned = Learned {
            silent_until: vec![None; all.len()],
            timeline: None,
            outdated: None,
            asked_others: None,
            refusal: None,
        };
        Self { all, in_any_order, schema, learned: Mutex::new(learned), seen: OnceLock::new() }
    }

    pub(crate) fn are_several(&self) -> bool {
        self.all.len() > 1
    }

    /// Records the store's id and the receiver for the end of its log.
    pub(crate) fn follow(&self, store_id: &str, log: watch::Receiver<i64>) {
        let _ = self.seen.set((store_id.to_owned(), log));
    }

    /// The numbers of the hosts, in the order in which they are tried.
    pub(crate) fn in_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.all.len()).collect();
        if self.in_any_order {
            shuffle(&mut order);
        }
        let (known, now) = (self.learned(), Instant::now());
        order.sort_by_key(|index| known.silent_until[*index].is_some_and(|until| until > now));
        order
    }

    pub(crate) fn was_silent(&self, index: usize) {
        self.learned().silent_until[index] = Some(Instant::now() + SILENT);
    }

    /// The server's recent refusal of this login, so that not every caller tries to log in again.
    pub(crate) fn refusal(&self) -> Option<Error> {
        let known = self.learned();
        let refusal = known.refusal.as_ref().filter(|refusal| refusal.until > Instant::now())?;
        Some(Error::new(refusal.kind.clone(), refusal.message.clone()))
    }

    pub(crate) fn refused(&self, error: &Error) {
        let mut known = self.learned();
        // If several logins are refused at once, only the first counts.
        if known.refusal.as_ref().is_some_and(|last| last.until > Instant::now()) {
            return;
        }
        let pause = known.refusal.as_ref().map_or(FIRST_PAUSE, |last| (last.pause * 2).min(LONGEST_PAUSE));
        let (kind, message) = (error.kind().clone(), error.to_string());
        known.refusal = Some(Refusal { kind, message, pause, until: Instant::now() + pause });
    }

    pub(crate) fn let_in(&self) {
        self.learned().refusal = None;
    }

    /// Whether a connection made at that time was made to a primary that has been replaced since.
    pub(crate) fn is_outdated(&self, made: Instant) -> bool {
        self.learned().outdated.is_some_and(|outdated| made < outdated)
    }

    /// Whether it is time to ask the other hosts; if so, starts the next interval.
    pub(crate) fn may_ask_others(&self) -> bool {
        let mut known = self.learned();
        let may_ask = known.asked_others.is_none_or(|last| last.elapsed() > ASK_OTHERS);
        if may_ask {
            known.asked_others = Some(Instant::now());
        }
        may_ask
    }

    /// The newest log that the engine knows now. Call it before asking the server.
    pub(crate) fn seen_by_now(&self) -> Seen {
        let seen = self.seen.get();
        Seen {
            store_id: seen.map(|(id, _)| id.clone()),
            timeline: self.learned().timeline,
            position: seen.map_or(0, |(_, log)| *log.borrow()),
        }
    }

    /// Records that the engine has connected to a server with this standing.
    pub(crate) fn take(&self, standing: &Standing) {
        let mut known = self.learned();
        if standing.timeline > known.timeline {
            if known.timeline.is_some() {
                known.outdated = Some(Instant::now());
            }
            known.timeline = standing.timeline;
        }
    }

    pub(crate) async fn standing(&self, client: &Client) -> Standing {
        let timeline = first_row(client, TIMELINE).await.and_then(|row| row.into_iter().next().flatten());
        let log = first_row(client, &self.schema.fill(LOG)).await.unwrap_or_default();
        let mut log = log.into_iter().flatten();
        Standing {
            timeline: timeline.and_then(|hex| u32::from_str_radix(&hex, 16).ok()),
            store_id: log.next(),
            position: log.next().and_then(|position| position.parse().ok()),
        }
    }

    fn learned(&self) -> MutexGuard<'_, Learned> {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Each promotion starts a new timeline. A standby reports none here.
const TIMELINE: &str = "SELECT CASE WHEN NOT pg_catalog.pg_is_in_recovery()
    THEN pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) END";

const LOG: &str = "SELECT (SELECT store_id FROM @store LIMIT 1), (SELECT max(position) FROM @log_end)";

/// The first row; `None` if the statement fails, for example because there is no store yet.
async fn first_row(client: &Client, sql: &str) -> Option<Vec<Option<String>>> {
    let messages = client.simple_query(sql).await.ok()?;
    messages.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect())
        }
        _ => None,
    })
}

/// The timeline, log position and store id that a server reports on connecting.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Standing {
    pub(crate) timeline: Option<u32>,
    position: Option<i64>,
    store_id: Option<String>,
}

/// The newest log that the engine knew before it connected.
pub(crate) struct Seen {
    store_id: Option<String>,
    timeline: Option<u32>,
    position: i64,
}

/// Whether a server may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fit {
    Well,
    /// It lacks events that the engine has seen: it lags, or lost the end of the log. Used only if no other host
    /// answers.
    Behind,
    /// It was the primary before another was promoted.
    Replaced,
    AnotherStore,
}

impl Standing {
    pub(crate) fn fit(&self, seen: &Seen) -> Fit {
        if self.store_id.is_some() && seen.store_id.is_some() && self.store_id != seen.store_id {
            return Fit::AnotherStore;
        }
        match (self.timeline, seen.timeline) {
            (Some(its), Some(newest)) if its < newest => return Fit::Replaced,
            (Some(its), Some(newest)) if its > newest => return Fit::Well,
            _ => {}
        }
        match self.position {
            Some(position) if position < seen.position => Fit::Behind,
            None if seen.store_id.is_some() => Fit::Behind,
            _ => Fit::Well,
        }
    }
}

/// One configuration per address of a host: the given address, or all addresses of its name.
pub(crate) async fn places(config: &Config) -> io::Result<Vec<Config>> {
    let (Some(Host::Tcp(name)), []) = (config.get_hosts().first(), config.get_hostaddrs()) else {
        return Ok(vec![config.clone()]);
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let mut addresses: Vec<IpAddr> = Vec::new();
    for found in tokio::net::lookup_host((name.as_str(), port)).await? {
        if !addresses.contains(&found.ip()) {
            addresses.push(found.ip());
        }
    }
    let at = |address: IpAddr| {
        let mut config = config.clone();
        config.hostaddr(address);
        config
    };
    Ok(addresses.into_iter().map(at).collect())
}

/// The name of a host for errors.
pub(crate) fn name_of(config: &Config) -> String {
    let name = match config.get_hosts().first() {
        Some(Host::Tcp(name)) => name.clone(),
        #[cfg(unix)]
        Some(Host::Unix(path)) => path.display().to_string(),
        None => config.get_hostaddrs().first().map(ToString::to_string).unwrap_or_default(),
    };
    format!("\"{name}:{}\"", config.get_ports().first().copied().unwrap_or(5432))
}

/// Wraps our own reason in a driver error, because the pool accepts no other type.
pub(crate) async fn not_connected(reason: io::Error) -> tokio_postgres::Error {
    let mut config = Config::new();
    config.user("nobody").ssl_mode(SslMode::Disable);
    match config.connect_raw(Broken(Some(reason)), NoTls).await {
        Err(error) => error,
        // Unreachable: no login succeeds on a broken stream.
        Ok(_) => tokio_postgres::Error::__private_api_timeout(),
    }
}

/// A stream on which every operation fails, first with the given reason.
struct Broken(Option<io::Error>);

impl Broken {
    fn fail<T>(&mut self) -> Poll<io::Result<T>> {
        Poll::Ready(Err(self.0.take().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into())))
    }
}

impl AsyncRead for Broken {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.fail()
    }
}

impl AsyncWrite for Broken {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        self.fail()
    }

    fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.fail()
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A new order each time. Its randomness need not be good.
fn shuffle(order: &mut [usize]) {
    use std::hash::{BuildHasher, RandomState};
    let state = RandomState::new();
    order.sort_by_cached_key(|index| state.hash_one(index));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(timeline: Option<u32>, position: Option<i64>, store: Option<&str>) -> Standing {
        Standing { timeline, position, store_id: store.map(str::to_owned) }
    }

    #[test]
    fn a_server_whose_log_is_older_than_what_was_seen_does_not_fit() {
        let seen = Seen { store_id: Some("a".to_owned()), timeline: Some(2), position: 10 };
        for (standing, fit) in [
            (standing(Some(2), Some(10), Some("a")), Fit::Well),
            (standing(Some(3), Some(7), Some("a")), Fit::Well),
            (standing(Some(2), Some(9), Some("a")), Fit::Behind),
            (standing(Some(2), None, None), Fit::Behind),
            (standing(None, Some(9), Some("a")), Fit::Behind),
            (standing(None, Some(11), Some("a")), Fit::Well),
            (standing(Some(1), Some(99), Some("a")), Fit::Replaced),
            (standing(Some(2), Some(99), Some("b")), Fit::AnotherStore),
        ] {
            assert_eq!(standing.fit(&seen), fit, "{standing:?}");
        }
        let nothing = Seen { store_id: None, timeline: None, position: 0 };
        assert_eq!(standing(Some(1), None, None).fit(&nothing), Fit::Well);
    }

    #[test]
    fn a_silent_host_comes_last_and_a_refusal_is_remembered() {
        let hosts = Hosts::new(vec![Config::new(), Config::new(), Config::new()], false, Schema::default());
        hosts.was_silent(0);
        assert_eq!(hosts.in_order(), [1, 2, 0]);
        assert!(hosts.refusal().is_none());
        hosts.refused(&Error::new(ErrorKind::Backend, "no"));
        assert_eq!(hosts.refusal().unwrap().to_string(), "no");
        hosts.let_in();
        assert!(hosts.refusal().is_none());
    }
}

//! Makes connections from a URL: hosts, TLS, time-outs and session settings.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fmt, io};

use deadpool_postgres::{
    Connect, Hook, HookError, Manager, ManagerConfig, Metrics, Pool, RecyclingMethod, Runtime, Timeouts,
};
use evercore_core::{Error, ErrorKind, Result};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{AsyncMessage, CancelToken, Client, Config, Connection, NoTls, Socket};

use crate::connection::hosts::{Fit, Hosts, Standing, name_of, not_connected, places};
use crate::connection::notices::Notices;
use crate::connection::url::Asked;
use crate::error::{PostgresError, is_refused, passes_by_itself};
use crate::settings::{LONGEST, Settings};

/// The hosts of the server, and how to connect to them.
#[derive(Clone)]
pub(crate) struct Address {
    pub(crate) hosts: Arc<Hosts>,
    tls: Tls,
    /// The settings, including those from the URL.
    pub(crate) settings: Settings,
    /// Notices of the server, from all connections to this address.
    pub(crate) notices: Notices,
}

/// Shows no part of the URL.
impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Address").finish_non_exhaustive()
    }
}

#[derive(Clone)]
enum Tls {
    Plain,
    #[cfg(feature = "rustls")]
    Rustls(tokio_postgres_rustls::MakeRustlsConnect),
}

impl Address {
    pub(crate) fn parse(url: &str, settings: &Settings) -> Result<Self> {
        let mut asked = Asked::parse(url)?;
        let tls = choose_tls(&asked, settings)?;
        let mut settings = settings.clone();
        if let Some(each) = asked.connect_timeout {
            let hosts = u32::try_from(asked.hosts.len()).unwrap_or(u32::MAX);
            settings.connect_timeout = each.saturating_mul(hosts);
        }
        let takes_writes = asked.hosts.len() > 1 && !asked.has_target && !settings.read_only;
        for config in &mut asked.hosts {
            config.ssl_mode(if matches!(tls, Tls::Plain) { SslMode::Disable } else { SslMode::Require });
            if takes_writes {
                config.target_session_attrs(TargetSessionAttrs::ReadWrite);
            }
            set_up(config, &settings);
        }
        let hosts = Hosts::new(asked.hosts, asked.in_any_order, settings.schema.clone());
        Ok(Self { hosts: Arc::new(hosts), tls, settings, notices: Notices::default() })
    }

    /// A pool of up to this many connections. Opens none yet.
    pub(crate) fn pool(&self, connections: usize) -> Result<Pool> {
        // The pool need not reset sessions: our statements do not change them, and a connection that did not end
        // cleanly never goes back to the pool.
        let manager_config = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let config = self.hosts.all.first().cloned().unwrap_or_default();
        let manager = Manager::from_connect(config, self.clone(), manager_config);
        // The wait for a free connection has the same limit as a new connection, which limits its time itself.
        let patience = Some(self.settings.connect_timeout);
        let (hosts, at_most) = (Arc::clone(&self.hosts), self.settings.connection_age);
        let is_of_today = Hook::sync_fn(move |_, metrics: &Metrics| {
            if hosts.is_outdated(metrics.created) {
                return Err(HookError::message("the connection leads to a primary that was replaced"));
            }
            // A replaced primary that still runs does not break connections. Only a new connection detects it.
            if metrics.age() > at_most {
                return Err(HookError::message("the connection has reached its maximum age"));
            }
            Ok(())
        });
        Pool::builder(manager)
            .max_size(connections)
            .pre_recycle(is_of_today)
            .timeouts(Timeouts { wait: patience, create: None, recycle: patience })
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| Error::new(ErrorKind::Backend, "the pool cannot be built").with_source(error))
    }

    /// Asks the server to cancel the running statement of a connection.
    pub(crate) async fn cancel(&self, token: &CancelToken) -> Result<(), tokio_postgres::Error> {
        match &self.tls {
            Tls::Plain => token.cancel_query(NoTls).await,
            #[cfg(feature = "rustls")]
            Tls::Rustls(tls) => token.cancel_query(tls.clone()).await,
        }
    }

    /// A connection outside of the pool, and the payloads of the notifications that it receives.
    pub(crate) async fn listen(
        &self,
        notified: impl Fn(&str) + Clone + Send + Sync + 'static,
    ) -> Result<Connected, tokio_postgres::Error> {
        self.reach(notified).await
    }

    /// Connects to the first host that answers and fits. Each host gets an equal share of the remaining time.
    async fn reach(
        &self,
        notified: impl Fn(&str) + Clone + Send + Sync + 'static,
    ) -> Result<Connected, tokio_postgres::Error> {
        if let Some(refusal) = self.hosts.refusal() {
            return Err(not_connected(io::Error::other(refusal)).await);
        }
        let (until, seen) =
            (Instant::now() + self.settings.connect_timeout.min(LONGEST), self.hosts.seen_by_now());
        let order = self.hosts.in_order();
        let (mut failure, mut behind): (Option<tokio_postgres::Error>, Option<(Standing, Connected)>) =
            (None, None);
        for (place, index) in order.iter().copied().enumerate() {
            let reached = self.reach_host(index, until, order.len() - place, &notified).await;
            let failed = match reached {
                Ok((_, connected)) if !self.hosts.are_several() => {
                    self.hosts.let_in();
                    return Ok(connected);
                }
                Ok((standing, connected)) => match standing.fit(&seen) {
                    Fit::Well => {
                        self.hosts.let_in();
                        return Ok(self.newest(index, standing, connected, &notified).await);
                    }
                    Fit::Behind => {
                        self.hosts.let_in();
                        if behind.as_ref().is_none_or(|(best, _)| *best < standing) {
                            behind = Some((standing, connected));
                        }
                        continue;
                    }
                    unfit => {
                        let why = if unfit == Fit::Replaced {
                            "was replaced as the primary"
                        } else {
                            "holds another store"
                        };
                        let message = format!("the host {} {why}", name_of(&self.hosts.all[index]));
                        not_connected(io::Error::other(message)).await
                    }
                },
                Err(error) => error,
            };
            // Prefer a temporary error over a lasting one: that host may be available soon.
            if failure.as_ref().is_none_or(|failure| !passes_by_itself(failure)) {
                failure = Some(failed);
            }
        }
        match (behind, failure) {
            (Some((standing, connected)), _) => {
                self.hosts.take(&standing);
                Ok(connected)
            }
            (None, Some(error)) => {
                if is_refused(&error) {
                    self.hosts.refused(&PostgresError::refused(&error));
                }
                Err(error)
            }
            (None, None) => Err(not_connected(io::Error::other("the URL names no host")).await),
        }
    }

    /// Connects to one host, trying all addresses of its name: TLS, login, and the questions about its standing.
    async fn reach_host(
        &self,
        index: usize,
        until: Instant,
        hosts_left: usize,
        notified: &(impl Fn(&str) + Clone + Send + Sync + 'static),
    ) -> Result<(Standing, Connected), tokio_postgres::Error> {
        let share = |of: usize| {
            let left = until.saturating_duration_since(Instant::now());
            left / u32::try_from(of.max(1)).unwrap_or(u32::MAX)
        };
        let config = &self.hosts.all[index];
        let silent = || {
            let message = format!("the host {} did not answer in time", name_of(config));
            io::Error::new(io::ErrorKind::TimedOut, message)
        };
        let places = match timeout(share(hosts_left), places(config)).await {
            Ok(Ok(places)) => places,
            Ok(Err(error)) => return Err(not_connected(error).await),
            Err(_) => {
                self.hosts.was_silent(index);
                return Err(not_connected(silent()).await);
            }
        };
        let mut failure = None;
        for (place, config) in places.iter().enumerate() {
            let attempt = async {
                let connected = self.connect_to(config, notified.clone()).await?;
                let standing = match self.hosts.are_several() {
                    true => self.hosts.standing(&connected.0).await,
                    false => Standing::default(),
                };
                Ok((standing, connected))
            };
            match timeout(share(hosts_left - 1 + places.len() - place), attempt).await {
                Ok(Ok(reached)) => return Ok(reached),
                Ok(Err(error)) => failure = Some(error),
                Err(_) => {
                    self.hosts.was_silent(index);
                    failure = Some(not_connected(silent()).await);
                }
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Err(not_connected(io::Error::other("the host name has no address")).await),
        }
    }

    /// Finds the newest of several primaries: an isolated old primary may come first in the URL. Asks only now and
    /// then, and waits briefly.
    async fn newest(
        &self,
        index: usize,
        mut standing: Standing,
        mut connected: Connected,
        notified: &(impl Fn(&str) + Clone + Send + Sync + 'static),
    ) -> Connected {
        if standing.timeline.is_some() && self.hosts.may_ask_others() {
            let until = Instant::now() + OTHERS_ANSWER;
            let mut asked = JoinSet::new();
            for other in self.hosts.in_order().into_iter().filter(|other| *other != index) {
                let (address, notified) = (self.clone(), notified.clone());
                asked.spawn(async move { address.reach_host(other, until, 1, &notified).await });
            }
            while let Some(answer) = asked.join_next().await {
                if let Ok(Ok((its, other))) = answer
                    && its.timeline > standing.timeline
                    && its.fit(&self.hosts.seen_by_now()) == Fit::Well
                {
                    (standing, connected) = (its, other);
                }
            }
        }
        self.hosts.take(&standing);
        connected
    }

    async fn connect_to(
        &self,
        config: &Config,
        notified: impl Fn(&str) + Send + 'static,
    ) -> Result<Connected, tokio_postgres::Error> {
        match &self.tls {
            Tls::Plain => spawn(config, NoTls, self.notices.clone(), notified).await,
            #[cfg(feature = "rustls")]
            Tls::Rustls(tls) => spawn(config, tls.clone(), self.notices.clone(), notified).await,
        }
    }
}

/// A connection, and the task that drives it.
pub(crate) type Connected = (Client, JoinHandle<()>);

/// How long to wait for another host to answer that it is the primary now.
const OTHERS_ANSWER: Duration = Duration::from_millis(500);

impl Connect for Address {
    fn connect(&self, _: &Config) -> evercore_core::BoxFuture<'_, Result<Connected, tokio_postgres::Error>> {
        Box::pin(self.reach(|_| {}))
    }
}

async fn spawn<T>(
    config: &Config,
    tls: T,
    notices: Notices,
    notified: impl Fn(&str) + Send + 'static,
) -> Result<Connected, tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    let (client, connection) = config.connect(tls).await?;
    Ok((client, tokio::spawn(run(connection, notices, notified))))
}

/// Drives a connection until it ends. The callers whose statements it interrupts get the reason.
async fn run<S, T>(mut connection: Connection<S, T>, notices: Notices, notified: impl Fn(&str))
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
        match message {
            AsyncMessage::Notification(notification) => notified(notification.payload()),
            AsyncMessage::Notice(notice) => notices.note(&notice),
            _ => {}
        }
    }
}

/// Sets the time-outs, and the settings with which each of our sessions starts.
fn set_up(config: &mut Config, settings: &Settings) {
    config.connect_timeout(settings.connect_timeout);
    config.keepalives(true).keepalives_idle(Duration::from_secs(15));
    config.keepalives_interval(Duration::from_secs(5)).keepalives_retries(3);
    let patience = settings.statement_timeout.saturating_add(settings.connect_timeout);
    // Linux also counts milliseconds in 32 bits.
    config.tcp_user_timeout(patience.min(LONGEST));
    if config.get_application_name().is_none() {
        config.application_name("evercore");
    }
    if !settings.pooler {
        let options: Vec<String> = settings
            .of_session()
            .into_iter()
            .map(|(name, value)| format!("-c {name}={}", value.replace(' ', "\\ ")))
            .collect();
        let own = config.get_options().unwrap_or_default();
        // Our settings come last, so they override the URL's.
        config.options(format!("{own} {}", options.join(" ")).trim());
    }
}

/// Unencrypted to the local computer, verified TLS to all others, unless configured otherwise.
fn choose_tls(asked: &Asked, settings: &Settings) -> Result<Tls> {
    let client = client_certificate(asked, settings)?;
    let mode = asked.ssl_mode.as_deref().unwrap_or("prefer");
    match mode {
        "disable" => return Ok(Tls::Plain),
        "allow" | "prefer" => {
            let is_here = |config: &Config| {
                config.get_hosts().iter().all(is_local)
                    && config.get_hostaddrs().iter().all(std::net::IpAddr::is_loopback)
            };
            // A client certificate needs TLS.
            if settings.plain_text || (asked.hosts.iter().all(is_here) && client.is_none()) {
                return Ok(Tls::Plain);
            }
        }
        "require" | "verify-ca" | "verify-full" => {}
        _ => {
            return Err(Error::invalid(
                "the value of \"sslmode\" in the URL is not one of PostgreSQL's modes",
            ));
        }
    }
    let asked = asked.root_certificate.as_ref().filter(|file| file.as_os_str() != "system");
    verified(settings.root_certificate.as_ref().or(asked), client)
}

/// Whether this host is the local computer.
pub(crate) fn is_local(host: &Host) -> bool {
    match host {
        #[cfg(unix)]
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost" || name.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
        }
    }
}

/// The files of the client certificate and of its key.
fn client_certificate<'a>(asked: &'a Asked, settings: &'a Settings) -> Result<Option<(&'a Path, &'a Path)>> {
    let certificate = asked.client_certificate.as_deref();
    match (&settings.client_certificate, certificate, asked.client_key.as_deref()) {
        (Some((certificate, key)), _, _) => Ok(Some((certificate, key))),
        (None, Some(certificate), Some(key)) => Ok(Some((certificate, key))),
        (None, None, None) => Ok(None),
        (None, Some(_), None) => Err(Error::invalid("the URL has \"sslcert\" without \"sslkey\"")),
        (None, None, Some(_)) => Err(Error::invalid("the URL has \"sslkey\" without \"sslcert\"")),
    }
}

#[cfg(feature = "rustls")]
fn verified(file: Option<&PathBuf>, client: Option<(&Path, &Path)>) -> Result<Tls> {
    Ok(Tls::Rustls(crate::connection::tls::connector(file.map(PathBuf::as_path), client)?))
}

#[cfg(not(feature = "rustls"))]
fn verified(_: Option<&PathBuf>, _: Option<(&Path, &Path)>) -> Result<Tls> {
    let message =
        "a remote host needs the feature `rustls`, or `Builder::plain_text` for an unencrypted connection";
    Err(Error::invalid(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls_of(url: &str) -> Result<bool> {
        let settings = Settings { root_certificate: None, ..Settings::default() };
        Address::parse(url, &settings).map(|address| !matches!(address.tls, Tls::Plain))
    }

    #[test]
    fn plain_text_to_a_remote_host_only_when_asked_for_by_name() {
        for url in ["postgres://localhost/x", "postgres://127.0.0.1/x", "host=/tmp user=a", "host=localhost"]
        {
            assert!(!tls_of(url).unwrap(), "{url}");
        }
        assert!(!tls_of("postgres://db.example.org/x?sslmode=disable").unwrap());
        assert!(!tls_of("host=db.example.org sslmode='disable' user=a").unwrap());
        #[cfg(feature = "rustls")]
        for url in [
            "postgres://db.example.org/x",
            "postgres://localhost,db.example.org/x",
            "postgres://db.example.org/x?sslmode=prefer&application_name=a",
            "postgres://localhost/x?sslmode=verify%2Dfull",
            "host=localhost sslmode = require",
            "host=db.example.org user=a",
            "host=localhost hostaddr=10.0.0.1",
        ] {
            assert!(tls_of(url).unwrap(), "{url}");
        }
    }

    #[test]
    fn what_does_not_read_is_not_shown() {
        for url in [
            "postgres://app:hunter2@[bad",
            "postgres://u:hunter2@h/x?sslmode=never",
            "host",
            "postgres://u:1/hunter2@localhost/x",
            "postgres://u/hunter2@localhost/x",
            "postgres://u:p@hunter2@localhost/x",
            "postgres://u:p@localhost/hunter2@localhost",
        ] {
            let error = tls_of(url).expect_err(url);
            assert!(!format!("{error} {error:?}").contains("hunter2"));
            assert_eq!(*error.kind(), ErrorKind::Invalid);
        }
        // In a parameter, "/" and "@" are ordinary characters.
        assert!(!tls_of("postgres://localhost/x?user=a@b&application_name=c/d@e").unwrap());
    }
}

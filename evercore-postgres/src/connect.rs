//! From a URL to connections that are set up: hosts, TLS, time-outs, settings of the session.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use deadpool_postgres::{Connect, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime, Timeouts};
use evercore_core::{Error, ErrorKind, Result};
use tokio::task::JoinHandle;
use tokio_postgres::config::{SslMode, TargetSessionAttrs};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{AsyncMessage, CancelToken, Client, Config, Connection, NoTls, Socket};

use crate::builder::{LONGEST, Settings, is_local};
use crate::heard::Heard;
use crate::sql::session_settings;

/// Where the server is, and how to speak to it.
#[derive(Clone)]
pub(crate) struct Address {
    config: Config,
    tls: Tls,
    settings: Settings,
    heard: Heard,
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
        let (rest, asked) = Asked::split(url)?;
        let mut config = Config::from_str(&rest)
            .map_err(|_| Error::invalid("the URL of the server does not read (it is not shown here)"))?;
        let tls = choose_tls(&config, &asked, settings)?;
        config.ssl_mode(if matches!(tls, Tls::Plain) { SslMode::Disable } else { SslMode::Require });
        if config.get_hosts().len() > 1 && asked.target.is_none() && !settings.read_only {
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        set_up(&mut config, settings);
        Ok(Self { config, tls, settings: settings.clone(), heard: Heard::default() })
    }

    /// A pool of so many connections to it; none is made yet.
    pub(crate) fn pool(&self, connections: usize) -> Result<Pool> {
        // Clean sessions are not asked of the pool: nothing of ours changes one, and what did not end clean never
        // comes back to it.
        let manager_config = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_connect(self.config.clone(), self.clone(), manager_config);
        let patience = Some(self.settings.connect_timeout);
        Pool::builder(manager)
            .max_size(connections)
            .timeouts(Timeouts { wait: patience, create: patience, recycle: patience })
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| Error::new(ErrorKind::Backend, "the pool cannot be built").with_source(error))
    }

    /// What the server has said, over all connections that were made with this address.
    pub(crate) fn heard(&self) -> &Heard {
        &self.heard
    }

    /// Asks the server to cancel what is at work on a connection.
    pub(crate) async fn cancel(&self, token: &CancelToken) -> Result<(), tokio_postgres::Error> {
        match &self.tls {
            Tls::Plain => token.cancel_query(NoTls).await,
            #[cfg(feature = "rustls")]
            Tls::Rustls(tls) => token.cancel_query(tls.clone()).await,
        }
    }

    /// A connection outside of the pool, and the payloads of the notifications that it gets.
    pub(crate) async fn listen(
        &self,
        mut heard: impl FnMut(&str) + Send + 'static,
    ) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
        match &self.tls {
            Tls::Plain => {
                let (client, connection) = self.config.connect(NoTls).await?;
                Ok((client, tokio::spawn(run(connection, self.heard.clone(), move |payload| heard(payload)))))
            }
            #[cfg(feature = "rustls")]
            Tls::Rustls(tls) => {
                let (client, connection) = self.config.connect(tls.clone()).await?;
                Ok((client, tokio::spawn(run(connection, self.heard.clone(), move |payload| heard(payload)))))
            }
        }
    }
}

impl Connect for Address {
    fn connect(
        &self,
        config: &Config,
    ) -> evercore_core::BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        let config = config.clone();
        Box::pin(async move {
            match &self.tls {
                Tls::Plain => spawn(&config, NoTls, self.heard.clone()).await,
                #[cfg(feature = "rustls")]
                Tls::Rustls(tls) => spawn(&config, tls.clone(), self.heard.clone()).await,
            }
        })
    }
}

async fn spawn<T>(
    config: &Config,
    tls: T,
    heard: Heard,
) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    let (client, connection) = config.connect(tls).await?;
    Ok((client, tokio::spawn(run(connection, heard, |_| {}))))
}

/// Drives a connection until it ends. Why it ended is told to those whose statements it took along.
async fn run<S, T>(mut connection: Connection<S, T>, heard: Heard, mut notified: impl FnMut(&str))
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
        match message {
            AsyncMessage::Notification(notification) => notified(notification.payload()),
            AsyncMessage::Notice(notice) => heard.note(&notice),
            _ => {}
        }
    }
}

/// Time-outs, and the settings that every session of ours begins with.
fn set_up(config: &mut Config, settings: &Settings) {
    config.connect_timeout(settings.connect_timeout);
    config.keepalives(true).keepalives_idle(Duration::from_secs(15));
    config.keepalives_interval(Duration::from_secs(5)).keepalives_retries(3);
    let patience = settings.statement_timeout.saturating_add(settings.connect_timeout);
    // Linux counts in milliseconds too, with as many bits.
    config.tcp_user_timeout(patience.min(LONGEST));
    if config.get_application_name().is_none() {
        config.application_name("evercore");
    }
    if !settings.pooler {
        let options: Vec<String> = session_settings(settings)
            .into_iter()
            .map(|(name, value)| format!("-c {name}={}", value.replace(' ', "\\ ")))
            .collect();
        let own = config.get_options().unwrap_or_default();
        // Ours come last, and so they count.
        config.options(format!("{own} {}", options.join(" ")).trim());
    }
}

/// What the URL asks for that the driver does not know.
#[derive(Debug, Default)]
struct Asked {
    ssl_mode: Option<String>,
    root_certificate: Option<PathBuf>,
    target: Option<String>,
}

impl Asked {
    /// Takes the words for TLS out of a URL, or out of a `name=value` list.
    fn split(url: &str) -> Result<(String, Self)> {
        let mut asked = Self::default();
        let rest = if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            let Some((base, query)) = url.split_once('?') else { return Ok((url.to_owned(), asked)) };
            let kept: Vec<&str> = query.split('&').filter(|pair| !asked.takes(pair)).collect();
            if kept.is_empty() { base.to_owned() } else { format!("{base}?{}", kept.join("&")) }
        } else {
            let words = words(url);
            words.into_iter().filter(|word| !asked.takes(word)).collect::<Vec<_>>().join(" ")
        };
        Ok((rest, asked))
    }

    fn takes(&mut self, pair: &str) -> bool {
        let Some((name, value)) = pair.split_once('=') else { return false };
        let value = value.trim_matches('\'').replace("%2F", "/").replace("%2f", "/");
        match name.trim() {
            "sslmode" => self.ssl_mode = Some(value),
            "sslrootcert" => self.root_certificate = Some(PathBuf::from(value)),
            "target_session_attrs" => {
                self.target = Some(value);
                return false;
            }
            _ => return false,
        }
        true
    }
}

/// The words of a `name=value` list; a value in quotes may have spaces.
fn words(list: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut escaped) = (Vec::new(), String::new(), false, false);
    for letter in list.chars() {
        if letter.is_whitespace() && !quoted && !escaped {
            words.push(std::mem::take(&mut word));
            continue;
        }
        quoted ^= letter == '\'' && !escaped;
        escaped = letter == '\\' && !escaped;
        word.push(letter);
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

/// Plain text to this computer, verified TLS to all others, unless asked otherwise by name.
fn choose_tls(config: &Config, asked: &Asked, settings: &Settings) -> Result<Tls> {
    let mode = asked.ssl_mode.as_deref().unwrap_or("prefer");
    match mode {
        "disable" => return Ok(Tls::Plain),
        "allow" | "prefer" => {
            let is_here = config.get_hosts().iter().all(is_local)
                && config.get_hostaddrs().iter().all(std::net::IpAddr::is_loopback);
            if settings.plain_text || is_here {
                return Ok(Tls::Plain);
            }
        }
        "require" | "verify-ca" | "verify-full" => {}
        _ => return Err(Error::invalid(format!("\"{mode}\" is no sslmode"))),
    }
    let file = settings.root_certificate.as_ref().or(asked.root_certificate.as_ref());
    verified(file)
}

#[cfg(feature = "rustls")]
fn verified(file: Option<&PathBuf>) -> Result<Tls> {
    Ok(Tls::Rustls(crate::tls::connector(file.map(PathBuf::as_path))?))
}

#[cfg(not(feature = "rustls"))]
fn verified(_: Option<&PathBuf>) -> Result<Tls> {
    let message = "a remote host needs the feature `rustls`, or plain text asked for by name";
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
            "postgres://localhost/x?sslmode=verify-full",
            "host=db.example.org user=a",
            "host=localhost hostaddr=10.0.0.1",
        ] {
            assert!(tls_of(url).unwrap(), "{url}");
        }
    }

    #[test]
    fn what_does_not_read_is_not_shown() {
        for url in ["postgres://app:hunter2@[bad", "postgres://u:hunter2@h/x?sslmode=never", "host"] {
            let error = tls_of(url).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"));
            assert_eq!(*error.kind(), ErrorKind::Invalid);
        }
    }

    #[test]
    fn quotes_keep_a_value_together() {
        assert_eq!(words(r"user=a  password='b \' c' host=x"), ["user=a", r"password='b \' c'", "host=x"]);
    }
}

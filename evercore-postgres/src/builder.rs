//! How an engine is connected to its server.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use evercore_core::{BoxError, BoxFuture, Event, Result};
use tokio_postgres::Transaction;
use tokio_postgres::config::Host;

use crate::connect::Address;
use crate::engine::PostgresEngine;
use crate::inline::Wanted;
use crate::sql::Schema;

/// What an acknowledged commit survives: PostgreSQL's setting `synchronous_commit`, by its own words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SynchronousCommit {
    /// A crash of the server's machine: the commit is flushed to its disk, and to that of a synchronous standby if one
    /// is configured. If somebody cancels the wait for that standby, the commit is
    /// [`OutcomeUnknown`](crate::ErrorKind::OutcomeUnknown): it is there, and a failover may lose it.
    #[default]
    On,
    /// A crash of the server's machine, without waiting for any standby.
    Local,
    /// As [`On`](Self::On), and the standby's operating system has it.
    RemoteWrite,
    /// As [`On`](Self::On), and who reads from the synchronous standby sees it.
    RemoteApply,
    /// A crash of this process only: a crash of the server may take the last commits, never half of one.
    Off,
}

impl SynchronousCommit {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Local => "local",
            Self::RemoteWrite => "remote_write",
            Self::RemoteApply => "remote_apply",
            Self::Off => "off",
        }
    }
}

/// How an engine is connected to its server; everything has a default.
///
/// ```no_run
/// # use evercore_postgres::{PostgresEngine, Result};
/// # async fn connect() -> Result<()> {
/// let engine = PostgresEngine::builder()
///     .schema("orders")?
///     .pool_size(16)
///     .connect("postgres://app:secret@db.example.org/shop")
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Builder {
    pub(crate) settings: Settings,
}

/// The settings of an engine.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) schema: Schema,
    pub(crate) synchronous_commit: SynchronousCommit,
    pub(crate) pool_size: usize,
    pub(crate) connect_timeout: Duration,
    pub(crate) statement_timeout: Duration,
    pub(crate) sql_timeout: Duration,
    pub(crate) connection_age: Duration,
    pub(crate) poll_interval: Duration,
    pub(crate) migrate: bool,
    pub(crate) read_only: bool,
    pub(crate) pooler: bool,
    /// Whether each of our connections was set up by us, so that its settings are known.
    pub(crate) own_sessions: bool,
    pub(crate) plain_text: bool,
    pub(crate) root_certificate: Option<PathBuf>,
    pub(crate) client_certificate: Option<(PathBuf, PathBuf)>,
    pub(crate) inline: Vec<Wanted>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            schema: Schema::default(),
            synchronous_commit: SynchronousCommit::default(),
            pool_size: 8,
            connect_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(30),
            sql_timeout: Duration::from_secs(5),
            connection_age: Duration::from_secs(30 * 60),
            poll_interval: Duration::from_millis(50),
            migrate: true,
            read_only: false,
            pooler: false,
            own_sessions: true,
            plain_text: false,
            root_certificate: None,
            client_certificate: None,
            inline: Vec::new(),
        }
    }
}

impl Settings {
    /// Whether the settings of a session stay what they were when it began.
    pub(crate) const fn has_sessions(&self) -> bool {
        self.own_sessions && !self.pooler
    }
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self { settings: Settings::default() }
    }

    /// The PostgreSQL schema in which the store lies; `evercore` unless set. Several stores may share a database, each
    /// in a schema of its own.
    ///
    /// # Errors
    /// [`InvalidName`](crate::ErrorKind::InvalidName) unless it is a lower case letter or underscore followed by at
    /// most 62 lower case letters, digits and underscores; nor may it begin with `pg_`.
    pub fn schema(mut self, name: &str) -> Result<Self> {
        self.settings.schema = Schema::new(name)?;
        Ok(self)
    }

    /// What an acknowledged commit survives; [`SynchronousCommit::On`] unless set, whatever the server's own default.
    pub fn synchronous_commit(mut self, level: SynchronousCommit) -> Self {
        self.settings.synchronous_commit = level;
        self
    }

    /// How many connections there may be for reads, subscriptions and SQL of your own, at least 2; 8 unless set.
    ///
    /// Up to three more are made when they are first needed: one for commits, which are combined, one for what the
    /// engine writes beside them, such as reserved ids, and one that listens for the commits of other processes as soon
    /// as somebody waits. So no read keeps a commit from its connection. A read whose future is dropped is cancelled on
    /// the server.
    pub fn pool_size(mut self, connections: usize) -> Self {
        self.settings.pool_size = connections.max(2);
        self
    }

    /// How long to wait for a free connection, and how long to try to make a new one, before the call ends as
    /// [`Unavailable`](crate::ErrorKind::Unavailable); 5 seconds unless set.
    ///
    /// Several hosts share the time for a new one: each has its share of what is left, for TLS and the login too. A host
    /// that did not answer in its time is tried after all others for 30 seconds. `connect_timeout` in the URL is the time
    /// of each host, as psql has it, and counts instead of this.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.settings.connect_timeout = timeout.max(Duration::from_millis(1));
        self
    }

    /// How long one statement may take, the wait for other writers included; 30 seconds unless set. A migration is not
    /// bound by it, only its wait for locks. A commit that is over it is rolled back; no answer from the server for this
    /// time and the [`connect_timeout`](Self::connect_timeout) makes it [`OutcomeUnknown`](crate::ErrorKind::OutcomeUnknown).
    ///
    /// A commit waits as long at most for its turn: until those before it are written, and until the queue has room. (It
    /// holds 256 MiB, as they are sent, and one statement carries 32 MiB or a single unit.) After that the commit is
    /// [`Unavailable`](crate::ErrorKind::Unavailable), and nothing of it was written. A single unit of more than 384 MiB,
    /// with its metadata and snapshots, is [`Invalid`](crate::ErrorKind::Invalid).
    pub fn statement_timeout(mut self, timeout: Duration) -> Self {
        self.settings.statement_timeout = at_least_a_millisecond(timeout);
        self
    }

    /// How long the SQL of [`PostgresEngine::commit_with`] may take altogether, and how long a transaction may idle
    /// while it holds what others wait for; 5 seconds unless set.
    pub fn sql_timeout(mut self, timeout: Duration) -> Self {
        self.settings.sql_timeout = at_least_a_millisecond(timeout);
        self
    }

    /// How old a connection may become, 30 minutes unless set. One that is older is closed when it is next asked for, and
    /// another is made; whatever is at work on it comes to its end.
    ///
    /// A new connection looks again for the primary among the hosts of the URL. So this is the longest for which an engine
    /// goes on with a primary that was replaced and lives on, if its connections to it never break.
    pub fn connection_age(mut self, at_most: Duration) -> Self {
        self.settings.connection_age = at_most;
        self
    }

    /// How often to look for the commits of other processes where nothing tells of them: on a standby, behind a
    /// pooler, and on a pool that was handed in; 50 milliseconds unless set. Only while somebody waits.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.settings.poll_interval = at_least_a_millisecond(interval);
        self
    }

    /// Whether connecting makes the store or brings it to the newest schema, which is so unless set. Without it a
    /// store that is not there is [`NotAStore`](crate::ErrorKind::NotAStore); see [`Builder::migrate`].
    pub fn migrate_on_connect(mut self, migrate: bool) -> Self {
        self.settings.migrate = migrate;
        self
    }

    /// Whether there is a pooler in transaction mode (PgBouncer and its like) between here and the server. Nothing is
    /// kept in the session then: no named prepared statements, no start-up settings, no LISTEN; what a commit needs is
    /// set in its own transaction.
    pub fn pooler(mut self, pooler: bool) -> Self {
        self.settings.pooler = pooler;
        self
    }

    /// Allows plain text to hosts that are not this computer, as `sslmode=disable` in the URL does. Without it the
    /// connection to a remote host is encrypted and the host's certificate verified, whatever weaker `sslmode` the URL
    /// asks for.
    pub fn plain_text(mut self) -> Self {
        self.settings.plain_text = true;
        self
    }

    /// A file with the root certificates (PEM) to trust instead of those of the operating system, as `sslrootcert` in
    /// the URL does.
    ///
    /// The server's own certificate may be in it too, also one that has signed itself. It is pinned then: a server that
    /// shows it and has its key is trusted, whatever name and dates are in it.
    pub fn root_certificate(mut self, file: impl Into<PathBuf>) -> Self {
        self.settings.root_certificate = Some(file.into());
        self
    }

    /// The files (PEM) of a certificate and of its key, which is not encrypted, to log in with, as `sslcert` and `sslkey`
    /// in the URL do. The connection is encrypted then, also to this computer, unless the URL says `sslmode=disable`.
    pub fn client_certificate(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.settings.client_certificate = Some((certificate.into(), key.into()));
        self
    }

    /// Keeps a read model in step with the log: the handler gets the events of each commit in its own transaction, so
    /// that whoever sees the events sees what they lead to. If it fails, nothing of the unit is written, and the commit
    /// is [`Rejected`](crate::ErrorKind::Rejected) with the handler's error as its source; a panic goes on in the caller.
    ///
    /// It misses nothing: how far it has come is a cursor in the store, of this name and version. Connecting hands it
    /// all that it has not seen, 1,000 events at a time, and what other processes commit without it is handed to it by
    /// the next commit with it: page by page before the log is locked, until one page is left. If that takes longer than
    /// [`statement_timeout`](Self::statement_timeout), the commit is [`Unavailable`](crate::ErrorKind::Unavailable), and
    /// the next one goes on from there. A new version begins again with the first event. Paused, it is passed over.
    ///
    /// It runs while the log is locked, and holds up all other commits: a few statements, nothing that waits. It may
    /// take [`sql_timeout`](Self::sql_timeout) for each 1,000 events. SQL of
    /// [`commit_with`](PostgresEngine::commit_with) that writes the same rows may meet it in a deadlock, which the server
    /// ends by rolling one of them back. What takes longer is work for [a projection](PostgresEngine::projection).
    ///
    /// ```no_run
    /// # use evercore_postgres::{PostgresEngine, Result};
    /// # async fn connect() -> Result<()> {
    /// let engine = PostgresEngine::builder()
    ///     .inline_projection("orders by day", 1, |sql, events| {
    ///         Box::pin(async move {
    ///             let count = "INSERT INTO shop.days VALUES (CURRENT_DATE, $1)
    ///                          ON CONFLICT (day) DO UPDATE SET orders = days.orders + excluded.orders";
    ///             let placed = events.iter().filter(|event| event.event_type().as_str() == "Placed").count();
    ///             sql.execute(count, &[&i64::try_from(placed)?]).await?;
    ///             Ok(())
    ///         })
    ///     })
    ///     .connect("postgres://app:secret@db.example.org/shop")
    ///     .await?;
    /// # Ok(()) }
    /// ```
    ///
    /// Connecting is [`InvalidName`](crate::ErrorKind::InvalidName) if the name is no
    /// [`SubscriptionName`](crate::SubscriptionName), and [`Invalid`](crate::ErrorKind::Invalid) if the version is 0, if
    /// the same version is there twice, or if it is for reading only.
    pub fn inline_projection<F>(mut self, name: impl AsRef<str>, version: u32, handler: F) -> Self
    where
        F: for<'t> Fn(&'t Transaction<'t>, &'t [Event]) -> BoxFuture<'t, Result<(), BoxError>>
            + Send
            + Sync
            + 'static,
    {
        let handle = Arc::new(handler);
        self.settings.inline.push(Wanted { name: name.as_ref().to_owned(), version, handle });
        self
    }

    /// Connects, and makes or migrates the store unless told otherwise.
    ///
    /// The URL is PostgreSQL's, `postgres://user:password@one:5432,two:5432/database?name=value`, or its list
    /// `host=one,two user=app`. Special letters in a URL are written as `%2F`. Of several hosts the one that takes writes is
    /// used. One whose log is older than what this engine has seen is used only if no other answers, and never one that was
    /// the primary before another was promoted. These parameters are understood:
    ///
    /// | parameter | |
    /// |---|---|
    /// | `user`, `password`, `dbname`, `host`, `hostaddr`, `port` | as in the URL itself; a host is required |
    /// | `sslmode` | `disable` is plain text. Everything else is verified TLS to other hosts. To this computer it is plain text unless it is `require`, `verify-ca` or `verify-full` |
    /// | `sslrootcert` | see [`root_certificate`](Self::root_certificate); `system` is the default |
    /// | `sslcert`, `sslkey` | see [`client_certificate`](Self::client_certificate) |
    /// | `connect_timeout` | seconds for each host, see [`connect_timeout`](Self::connect_timeout) |
    /// | `target_session_attrs` | `any`, `read-write` or `read-only` instead of the default above |
    /// | `load_balance_hosts` | `disable`, or `random` for another order of hosts each time |
    /// | `application_name`, `options`, `channel_binding`, `sslnegotiation` | as PostgreSQL has them |
    /// | `keepalives`, `keepalives_idle`, `keepalives_interval`, `keepalives_retries`, `tcp_user_timeout` | read, but evercore sets its own |
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the URL does not read (it is not shown) or has a parameter that is not
    /// understood (its name is), if it names no host, or if the server asks for a password and it has none;
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if no host can be reached;
    /// [`NotAStore`](crate::ErrorKind::NotAStore) if the schema holds something else, or nothing and may not be
    /// made; [`SchemaTooNew`](crate::ErrorKind::SchemaTooNew) for a store of a newer library;
    /// [`ReadOnly`](crate::ErrorKind::ReadOnly) if the role may not make what is missing;
    /// [`Backend`](crate::ErrorKind::Backend) if the server refuses the login, if its certificate is not to be trusted,
    /// if the database is not in UTF-8, or if there is a [pooler](Self::pooler) in between that was not named.
    pub async fn connect(self, url: &str) -> Result<PostgresEngine> {
        let address = Address::parse(url, &self.settings)?;
        let pool = address.pool(self.settings.pool_size)?;
        PostgresEngine::open(address.settings().clone(), pool, Some(address)).await
    }

    /// Connects for reading only, to any server that answers: a standby as well as a primary. What writes is
    /// [`ReadOnly`](crate::ErrorKind::ReadOnly), and nothing is migrated.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn read_from(mut self, url: &str) -> Result<PostgresEngine> {
        self.settings.read_only = true;
        self.connect(url).await
    }

    /// Uses a pool that the application has already. Nothing is expected of its connections: what a commit needs is
    /// set in its own transaction, which costs a little. Commits of other processes are polled for.
    ///
    /// Reads and commits share these connections, so reads that are held up can keep a commit waiting for one. What the
    /// server says unasked is heard by the pool and not by the engine: a commit whose wait for a synchronous standby is
    /// cancelled is acknowledged. A read that is given up is cancelled only where the server accepts that in plain text.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn with_pool(mut self, pool: deadpool_postgres::Pool) -> Result<PostgresEngine> {
        self.settings.own_sessions = false;
        PostgresEngine::open(self.settings, pool, None).await
    }

    /// Makes the store or brings it to the newest schema, and does nothing else: for a role that may create tables,
    /// where the application's own may not. Again is harmless, also from several processes at once.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn migrate(mut self, url: &str) -> Result<()> {
        self.settings.migrate = true;
        self.settings.read_only = false;
        self.settings.inline.clear();
        self.connect(url).await?.close().await
    }
}

/// PostgreSQL counts in milliseconds with 32 bits, and takes 0 for "no limit".
pub(crate) const LONGEST: Duration = Duration::from_millis(i32::MAX.unsigned_abs() as u64);

fn at_least_a_millisecond(time: Duration) -> Duration {
    time.clamp(Duration::from_millis(1), LONGEST)
}

/// Whether this host is the computer we are on.
pub(crate) fn is_local(host: &Host) -> bool {
    match host {
        #[cfg(unix)]
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost" || name.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
        }
    }
}

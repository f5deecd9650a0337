//! How an engine is connected to its server.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use evercore_core::{BoxError, BoxFuture, Event, Result};
use tokio_postgres::Transaction;

use crate::connection::connect::Address;
use crate::postgres_engine::PostgresEngine;
use crate::settings::{InlineProjection, LONGEST, Schema, Settings, SynchronousCommit};

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
    settings: Settings,
}

impl PostgresEngine {
    /// Connects to the store at this URL, and creates it if it is missing. Uses the defaults of
    /// [`PostgresEngine::builder`].
    ///
    /// # Errors
    /// As [`Builder::connect`].
    pub async fn connect(url: &str) -> Result<Self> {
        Self::builder().connect(url).await
    }

    /// Connects for reading only, to any server that answers, a standby as well.
    ///
    /// # Errors
    /// As [`Builder::read_from`].
    pub async fn read_from(url: &str) -> Result<Self> {
        Self::builder().read_from(url).await
    }

    /// Settings for connecting to a store.
    pub fn builder() -> Builder {
        Builder { settings: Settings::default() }
    }
}

impl Builder {
    /// The PostgreSQL schema that holds the store; `evercore` unless set. Several stores may share a database if each
    /// has its own schema.
    ///
    /// # Errors
    /// [`InvalidName`](crate::ErrorKind::InvalidName) unless it is a lower case letter or underscore followed by at
    /// most 62 lower case letters, digits and underscores. It must not begin with `pg_`.
    pub fn schema(mut self, name: &str) -> Result<Self> {
        self.settings.schema = Schema::new(name)?;
        Ok(self)
    }

    /// Which failures an acknowledged commit survives; [`SynchronousCommit::On`] unless set. The server's default does
    /// not matter.
    pub fn synchronous_commit(mut self, level: SynchronousCommit) -> Self {
        self.settings.synchronous_commit = level;
        self
    }

    /// The largest number of connections for reads, subscriptions and your own SQL: at least 2, and 8 unless set.
    ///
    /// The engine opens up to three more when it first needs them: one for commits, which are combined; one for its
    /// other writes, such as reserved ids; and one that listens for commits of other processes, once a caller waits for
    /// events. So reads never take the connection that commits need. Dropping the future of a read cancels the read on
    /// the server.
    pub fn pool_size(mut self, connections: usize) -> Self {
        self.settings.pool_size = connections.max(2);
        self
    }

    /// How long to wait for a free connection, and how long to try to make a new one, before the call ends as
    /// [`Unavailable`](crate::ErrorKind::Unavailable); 5 seconds unless set.
    ///
    /// Several hosts share the time for a new connection: each gets an equal share of the remaining time, which
    /// includes TLS and the login. A host that does not answer in time is tried after all others for the next 30
    /// seconds.
    /// `connect_timeout` in the URL is the time for each host, as in psql, and replaces this setting.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.settings.connect_timeout = timeout.max(Duration::from_millis(1));
        self
    }

    /// How long one statement may take, including the wait for other writers; 30 seconds unless set. For a migration it
    /// limits only the wait for locks. A commit that takes longer is rolled back. If the server does not answer for
    /// this time plus the [`connect_timeout`](Self::connect_timeout), the commit is
    /// [`OutcomeUnknown`](crate::ErrorKind::OutcomeUnknown).
    ///
    /// A commit also waits at most this long for its turn: until earlier commits are written and the queue has room.
    /// (The queue holds 256 MiB, as sent to the server. One statement carries 32 MiB or a single unit.) After that the
    /// commit is [`Unavailable`](crate::ErrorKind::Unavailable), and nothing of it was written. A single unit of more
    /// than 384 MiB, with its metadata and snapshots, is [`Invalid`](crate::ErrorKind::Invalid).
    pub fn statement_timeout(mut self, timeout: Duration) -> Self {
        self.settings.statement_timeout = at_least_a_millisecond(timeout);
        self
    }

    /// How long the SQL of [`PostgresEngine::commit_with`] may take in total, and how long a transaction may idle while
    /// it holds locks; 5 seconds unless set.
    pub fn sql_timeout(mut self, timeout: Duration) -> Self {
        self.settings.sql_timeout = at_least_a_millisecond(timeout);
        self
    }

    /// The maximum age of a connection; 30 minutes unless set. An older connection is closed and replaced the next time
    /// it is taken from the pool. Work that is running on it is not interrupted.
    ///
    /// A new connection looks for the primary among the hosts of the URL again. So this limits how long an engine keeps
    /// using a primary that was replaced but still runs, if its connections to it never break.
    pub fn connection_age(mut self, at_most: Duration) -> Self {
        self.settings.connection_age = at_most;
        self
    }

    /// How often to poll for commits of other processes where notifications are not available: on a standby, through a
    /// pooler, and on a pool of the application; 50 milliseconds unless set. The engine polls only while a caller
    /// waits.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.settings.poll_interval = at_least_a_millisecond(interval);
        self
    }

    /// Whether connecting creates the store or migrates it to the newest schema; `true` unless set. With `false`, a
    /// missing store is [`NotAStore`](crate::ErrorKind::NotAStore); see [`Builder::migrate`].
    pub fn migrate_on_connect(mut self, migrate: bool) -> Self {
        self.settings.migrate = migrate;
        self
    }

    /// Whether connections go through a pooler in transaction mode, such as PgBouncer. If so, the engine keeps no state
    /// in the session: no named prepared statements, no start-up settings, no LISTEN. Each commit makes the settings it
    /// needs in its own transaction.
    pub fn pooler(mut self, pooler: bool) -> Self {
        self.settings.pooler = pooler;
        self
    }

    /// Allows unencrypted connections to remote hosts, as `sslmode=disable` in the URL does. Without it, connections to
    /// remote hosts are encrypted and their certificates verified, even if the URL asks for another, weaker `sslmode`.
    pub fn plain_text(mut self) -> Self {
        self.settings.plain_text = true;
        self
    }

    /// A file with the root certificates (PEM) to trust instead of those of the operating system, as `sslrootcert` in
    /// the URL does.
    ///
    /// The file may also contain the server's own certificate, even a self-signed one. That certificate is then pinned:
    /// a server that presents it and has its key is trusted, and the certificate's name and dates are not checked.
    pub fn root_certificate(mut self, file: impl Into<PathBuf>) -> Self {
        self.settings.root_certificate = Some(file.into());
        self
    }

    /// The files (PEM) of the client certificate to log in with and of its key, as `sslcert` and `sslkey` in the URL.
    /// The key must not be encrypted. The connection is then encrypted, even to this computer, unless the URL says
    /// `sslmode=disable`.
    pub fn client_certificate(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.settings.client_certificate = Some((certificate.into(), key.into()));
        self
    }

    /// Updates a read model in the same transaction as each commit: the handler gets the events of the commit and
    /// writes its rows, and the events and the rows become visible together. If the handler fails, nothing of the unit
    /// is written, and the commit is [`Rejected`](crate::ErrorKind::Rejected) with the handler's error as its source.
    /// If it panics, the panic continues in the caller.
    ///
    /// The handler misses no event: a cursor in the store, under this name and version, records its progress.
    /// Connecting hands it all events that it has not seen, 1,000 at a time. Events that other processes commit without
    /// the handler are handed to it by the next commit that has it: page by page before the log is locked, until one
    /// page is left. If that takes longer than [`statement_timeout`](Self::statement_timeout), the commit is
    /// [`Unavailable`](crate::ErrorKind::Unavailable), and the next commit continues from there. A new version starts
    /// again at the first event. While the projection is paused, its handler is not called.
    ///
    /// The handler runs while the log is locked, so it holds up all other commits: let it run a few statements and
    /// never wait. It may take [`sql_timeout`](Self::sql_timeout) for each 1,000 events. It can deadlock with SQL of
    /// [`commit_with`](PostgresEngine::commit_with) that writes the same rows; the server then rolls one of them back.
    /// Use [a projection](PostgresEngine::projection) for work that takes longer.
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
    /// [`SubscriptionName`](crate::SubscriptionName), and [`Invalid`](crate::ErrorKind::Invalid) if the version is 0,
    /// if the same name and version is given twice, or if the engine is connected for reading only.
    pub fn inline_projection<F>(mut self, name: impl AsRef<str>, version: u32, handler: F) -> Self
    where
        F: for<'t> Fn(&'t Transaction<'t>, &'t [Event]) -> BoxFuture<'t, Result<(), BoxError>>
            + Send
            + Sync
            + 'static,
    {
        let handle = Arc::new(handler);
        self.settings.inline.push(InlineProjection { name: name.as_ref().to_owned(), version, handle });
        self
    }

    /// Connects, and creates or migrates the store unless [`migrate_on_connect`](Self::migrate_on_connect) is off.
    ///
    /// The URL is a PostgreSQL URL, `postgres://user:password@one:5432,two:5432/database?name=value`, or a list,
    /// `host=one,two user=app`. Special characters in a URL are percent-encoded, such as `%2F` for `/`. If there are
    /// several hosts, the engine uses the one that takes writes. It uses a host that lacks events this engine has
    /// already seen only if no other host answers, and never a former primary after another host was promoted. These
    /// parameters are supported:
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
    /// | `keepalives`, `keepalives_idle`, `keepalives_interval`, `keepalives_retries`, `tcp_user_timeout` | accepted, but ignored: evercore sets its own |
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the URL cannot be parsed (the error does not show it) or has an
    /// unsupported parameter (the error shows its name), if it names no host, or if the server asks for a password and
    /// it has none; [`Unavailable`](crate::ErrorKind::Unavailable) if no host can be reached;
    /// [`NotAStore`](crate::ErrorKind::NotAStore) if the schema holds something else, or is empty and the store may not
    /// be created; [`SchemaTooNew`](crate::ErrorKind::SchemaTooNew) for a store of a newer library;
    /// [`ReadOnly`](crate::ErrorKind::ReadOnly) if the role may not create the missing tables;
    /// [`Backend`](crate::ErrorKind::Backend) if the server refuses the login, if its certificate is not trusted, if
    /// the database is not in UTF-8, or if connections go through a [pooler](Self::pooler) and the builder was not
    /// told.
    pub async fn connect(self, url: &str) -> Result<PostgresEngine> {
        let address = Address::parse(url, &self.settings)?;
        let pool = address.pool(self.settings.pool_size)?;
        PostgresEngine::open(address.settings.clone(), pool, Some(address)).await
    }

    /// Connects for reading only, to any server that answers: a standby as well as a primary. Calls that write fail
    /// with [`ReadOnly`](crate::ErrorKind::ReadOnly), and nothing is migrated.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn read_from(mut self, url: &str) -> Result<PostgresEngine> {
        self.settings.read_only = true;
        self.connect(url).await
    }

    /// Uses a pool that the application already has. The engine assumes nothing about the settings of its connections:
    /// each commit makes the settings it needs in its own transaction, which costs a little. The engine polls for
    /// commits of other processes.
    ///
    /// Reads and commits share these connections, so slow reads can keep a commit waiting for a connection. The
    /// server's notices and warnings go to the pool, not to the engine: if the wait of a commit for a synchronous
    /// standby is cancelled, the commit is still acknowledged. A dropped read is cancelled on the server only if the
    /// server accepts unencrypted cancel requests.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn with_pool(mut self, pool: deadpool_postgres::Pool) -> Result<PostgresEngine> {
        self.settings.own_sessions = false;
        PostgresEngine::open(self.settings, pool, None).await
    }

    /// Creates the store or migrates it to the newest schema, and does nothing else. Use it with a role that may create
    /// tables if the application's role may not. Calling it again is harmless, also from several processes at once.
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

fn at_least_a_millisecond(time: Duration) -> Duration {
    time.clamp(Duration::from_millis(1), LONGEST)
}

//! Maps errors of PostgreSQL, the driver, the pool and the migrations to evercore's error kinds.

use deadpool_postgres::PoolError;
use evercore_core::{BoxError, Error, ErrorKind};
use tokio_postgres::error::{DbError, Severity, SqlState};
use tokio_postgres::types::{WasNull, WrongType};

/// An internal error, before it is mapped to an [`ErrorKind`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum PostgresError {
    /// An error of the server or the driver.
    #[error("PostgreSQL: {0}")]
    Postgres(#[from] tokio_postgres::Error),
    /// The pool gave no connection.
    #[error("no connection: {0}")]
    Pool(#[from] PoolError),
    /// An error of a migration.
    #[error("migration: {0}")]
    Migration(#[from] refinery::Error),
    /// A value in the store that evercore cannot have written.
    #[error("damaged: {0}")]
    Damaged(#[from] BoxError),
    /// The server did not answer in time.
    #[error("the server did not answer in time")]
    Silent(#[from] tokio::time::error::Elapsed),
    /// Another process has registered this type since the names were read.
    #[error("a type has the unknown number {0}")]
    UnknownName(u32),
    /// The type names have changed since they were read: some were registered, or lost in a failover.
    #[error("the type names have changed")]
    OtherNames,
    /// The server rolled back a transaction with the user's SQL because of another transaction.
    #[error("undone by the server: {0}")]
    Undone(#[source] BoxError),
    /// Already an error of evercore.
    #[error(transparent)]
    Core(#[from] Error),
}

/// The session lacks our settings, so a pooler probably mixes up sessions.
pub(crate) const UNTOLD_POOLER: &str =
    "the session does not have the settings evercore asked for: with a pooler, call `Builder::pooler(true)`";

const NO_VALUE: &str = "the store is damaged: a stored value is not valid";

pub(crate) type Result<T, E = PostgresError> = std::result::Result<T, E>;

impl From<PostgresError> for Error {
    fn from(error: PostgresError) -> Self {
        let (kind, message) = match &error {
            PostgresError::Postgres(source) => meaning(source),
            PostgresError::Pool(source) => pool_meaning(source),
            PostgresError::Migration(source) => migration_meaning(source),
            PostgresError::Damaged(_) | PostgresError::UnknownName(_) => (ErrorKind::NotAStore, NO_VALUE),
            PostgresError::OtherNames => {
                (ErrorKind::Unavailable, "the type names kept changing while they were read, try again")
            }
            PostgresError::Silent(_) => (ErrorKind::Unavailable, "the server did not answer in time"),
            PostgresError::Undone(_) => (
                ErrorKind::Unavailable,
                "the server rolled back because of another transaction, nothing was written",
            ),
            PostgresError::Core(_) => (ErrorKind::Backend, ""),
        };
        if let Some(told) = ours_within(&error) {
            return told.again().with_source(error);
        }
        match error {
            PostgresError::Core(error) => error,
            PostgresError::Undone(source) => {
                let message = with_code_of(message, said(&*source));
                Self::new(kind, message).because(source)
            }
            other => Self::new(kind, with_code(message, &other)).because(other),
        }
    }
}

/// Adds a source to an error, and the parts of the source's text that cannot contain a stored value.
pub(crate) trait Because {
    fn because(self, source: impl Into<BoxError>) -> Self;
}

impl Because for Error {
    fn because(self, source: impl Into<BoxError>) -> Self {
        self.with_cause(source, |cause| cause.downcast_ref().map(told))
    }
}

/// The server's error among the sources of another error.
fn said<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a DbError> {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.find_map(|cause| cause.downcast_ref())
}

/// The SQLSTATE, the names of schema, table, column and constraint, and the message if it cannot contain a value.
fn told(spoken: &DbError) -> String {
    let mut text = format!("SQLSTATE {}", spoken.code().code());
    if shows_no_value(spoken) {
        text += &format!(": {}", spoken.message());
    }
    let names = [
        ("schema", spoken.schema()),
        ("table", spoken.table()),
        ("column", spoken.column()),
        ("constraint", spoken.constraint()),
    ];
    for (what, name) in names {
        text += &name.map_or_else(String::new, |name| format!(", {what} \"{name}\""));
    }
    text
}

/// Whether the message cannot contain a value. PostgreSQL puts values in the detail, which we never show, but some
/// messages contain values too, and messages raised by user code may contain anything.
fn shows_no_value(spoken: &DbError) -> bool {
    const CLASSES: [&str; 13] =
        ["08", "23", "25", "26", "28", "3D", "3F", "40", "53", "54", "55", "57", "58"];
    const CODES: [SqlState; 3] =
        [SqlState::INSUFFICIENT_PRIVILEGE, SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_FUNCTION];
    let is_raised = spoken.routine() == Some("exec_stmt_raise");
    let code = spoken.code();
    !is_raised && (CODES.contains(code) || CLASSES.iter().any(|class| code.code().starts_with(class)))
}

/// [`Rejected`](ErrorKind::Rejected) because the user's own code failed, with the SQLSTATE if the server caused it.
pub(crate) fn rejected_by(what: &str, source: impl Into<BoxError>) -> Error {
    let source = source.into();
    let code = source.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::code);
    let code = code.map_or_else(String::new, |code| format!(" (SQLSTATE {})", code.code()));
    Error::new(ErrorKind::Rejected, format!("{what} failed{code}")).because(source)
}

/// Adds SQLSTATE and constraint to a message: users search for them, and neither contains a value.
fn with_code(message: &str, error: &PostgresError) -> String {
    with_code_of(message, spoken(error))
}

fn with_code_of(message: &str, spoken: Option<&DbError>) -> String {
    let Some(spoken) = spoken else { return message.to_owned() };
    let constraint = spoken.constraint().map_or_else(String::new, |name| format!(", constraint \"{name}\""));
    format!("{message} (SQLSTATE {}{constraint})", spoken.code().code())
}

impl PostgresError {
    /// The error for a refused login.
    pub(crate) fn refused(error: &tokio_postgres::Error) -> Error {
        let (kind, message) = meaning(error);
        let code = error.code().map_or_else(String::new, |code| format!(" (SQLSTATE {})", code.code()));
        Error::new(kind, format!("{message}{code}"))
    }
}

/// Whether the server refuses the login itself, so that every other connection attempt would fail too.
pub(crate) fn is_refused(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| code.code().starts_with("28")) || lacks_password(error)
}

/// The driver reports a missing password only by this text.
fn lacks_password(error: &tokio_postgres::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.to_string() == "password missing")
}

/// Whether another attempt to connect may succeed.
pub(crate) fn passes_by_itself(error: &tokio_postgres::Error) -> bool {
    meaning(error).0 == ErrorKind::Unavailable
}

/// Our own error inside a driver error, such as a login that is not yet tried again.
fn ours_within(error: &PostgresError) -> Option<&Error> {
    let (PostgresError::Postgres(error) | PostgresError::Pool(PoolError::Backend(error))) = error else {
        return None;
    };
    let io = std::error::Error::source(error)?.downcast_ref::<std::io::Error>()?;
    io.get_ref()?.downcast_ref()
}

/// A value in the store that evercore cannot have written.
pub(crate) fn damaged(error: impl Into<BoxError>) -> PostgresError {
    PostgresError::Damaged(error.into())
}

/// The error for a store that lacks required rows.
pub(crate) fn not_a_store(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::NotAStore, message)
}

/// Maps by SQLSTATE only: messages depend on the server's language and change between releases.
fn meaning(error: &tokio_postgres::Error) -> (ErrorKind, &'static str) {
    let Some(code) = error.code() else { return without_code(error) };
    match *code {
        SqlState::READ_ONLY_SQL_TRANSACTION => {
            (ErrorKind::ReadOnly, "the server takes no writes: a standby, or a read-only database")
        }
        SqlState::INSUFFICIENT_PRIVILEGE => (ErrorKind::ReadOnly, "the role lacks a privilege for this"),
        SqlState::DISK_FULL => (ErrorKind::Full, "the server's disk is full, nothing was written"),
        SqlState::UNDEFINED_TABLE | SqlState::UNDEFINED_COLUMN | SqlState::INVALID_SCHEMA_NAME => {
            (ErrorKind::NotAStore, "the schema holds no store")
        }
        SqlState::DATA_CORRUPTED | SqlState::INDEX_CORRUPTED => {
            (ErrorKind::NotAStore, "the server reports that its files are damaged")
        }
        SqlState::T_R_SERIALIZATION_FAILURE
        | SqlState::T_R_DEADLOCK_DETECTED
        | SqlState::LOCK_NOT_AVAILABLE
        | SqlState::QUERY_CANCELED
        | SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT
        | SqlState::ADMIN_SHUTDOWN
        | SqlState::CRASH_SHUTDOWN
        | SqlState::CANNOT_CONNECT_NOW => (ErrorKind::Unavailable, "the server is busy or restarting"),
        SqlState::INVALID_SQL_STATEMENT_NAME | SqlState::DUPLICATE_PSTATEMENT => {
            (ErrorKind::Unavailable, "the session lost its prepared statements and was closed, try again")
        }
        SqlState::PROTOCOL_VIOLATION if error.as_db_error().is_some_and(is_of_pooler) => {
            (ErrorKind::Unavailable, "the pooler cannot reach the server, or refused the request")
        }
        SqlState::PROTOCOL_VIOLATION => (ErrorKind::Backend, "PostgreSQL refused"),
        _ => match code.code().get(..2) {
            Some("08" | "53" | "57") => {
                (ErrorKind::Unavailable, "the server cannot be reached, or lacks resources")
            }
            Some("28") => (ErrorKind::Backend, "the server refused the login"),
            Some("3D") => (ErrorKind::Backend, "there is no such database"),
            Some("23") => {
                (ErrorKind::Backend, "the statement violates a constraint that does not belong to the store")
            }
            _ => (ErrorKind::Backend, "PostgreSQL refused"),
        },
    }
}

fn without_code(error: &tokio_postgres::Error) -> (ErrorKind, &'static str) {
    let source = std::error::Error::source(error);
    let io = source.and_then(|source| source.downcast_ref::<std::io::Error>());
    // rustls reports refused certificates this way; trying again does not help.
    if io.is_some_and(|error| error.kind() == std::io::ErrorKind::InvalidData) {
        return (ErrorKind::Backend, "the server's certificate is not trusted, or the TLS handshake failed");
    }
    if error.is_closed() || io.is_some() {
        return (ErrorKind::Unavailable, "the connection to the server broke or could not be made");
    }
    if source.is_some_and(|source| source.is::<WrongType>() || source.is::<WasNull>()) {
        return (ErrorKind::NotAStore, NO_VALUE);
    }
    if lacks_password(error) {
        return (ErrorKind::Invalid, "the server asks for a password, and the URL has none");
    }
    if source.is_some() {
        return (ErrorKind::Backend, "the server does not support TLS, or sent an unexpected answer");
    }
    // A connect time-out has neither a code nor a source.
    (ErrorKind::Unavailable, "the server could not be reached")
}

fn pool_meaning(error: &PoolError) -> (ErrorKind, &'static str) {
    match error {
        PoolError::Backend(source) => meaning(source),
        PoolError::Timeout(_) => (ErrorKind::Unavailable, "no connection became free in time"),
        PoolError::Closed => (ErrorKind::Closed, "the engine is closed, open a new one"),
        PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
            (ErrorKind::Backend, "the connection pool failed")
        }
    }
}

fn migration_meaning(error: &refinery::Error) -> (ErrorKind, &'static str) {
    let Some(postgres) = beneath(error) else {
        return (ErrorKind::NotAStore, "the schema contains migrations that are not evercore's");
    };
    match postgres.code() {
        Some(&SqlState::DUPLICATE_TABLE) => {
            (ErrorKind::NotAStore, "the schema contains a table that is not evercore's")
        }
        _ => meaning(postgres),
    }
}

/// The server's error, if the server sent one in answer to a statement or a login.
fn spoken(error: &PostgresError) -> Option<&DbError> {
    match error {
        PostgresError::Postgres(error) => error.as_db_error(),
        PostgresError::Pool(PoolError::Backend(error)) => error.as_db_error(),
        PostgresError::Migration(error) => beneath(error).and_then(tokio_postgres::Error::as_db_error),
        _ => None,
    }
}

/// Finds PostgreSQL's error among the sources of a refinery error.
fn beneath(error: &refinery::Error) -> Option<&tokio_postgres::Error> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(postgres) = cause.downcast_ref() {
            return Some(postgres);
        }
        source = cause.source();
    }
    None
}

/// Whether PgBouncer sent this error. It uses one code for all its own errors: the server is away, a client has waited
/// too long, a setting is not accepted. Unlike a server, PgBouncer does not send the untranslated severity.
fn is_of_pooler(spoken: &DbError) -> bool {
    *spoken.code() == SqlState::PROTOCOL_VIOLATION && spoken.parsed_severity().is_none()
}

/// The error of the first connection. A pooler that the builder was not told of refuses our session settings.
pub(crate) fn at_first(error: PostgresError, has_sessions: bool) -> Error {
    if has_sessions && spoken(&error).is_some_and(is_of_pooler) {
        return Error::new(ErrorKind::Backend, UNTOLD_POOLER).because(error);
    }
    error.into()
}

/// Whether the failed statement certainly had no effect: the server reported ERROR and the session continues. An error
/// that ends the session, or a broken connection, may come after the commit took effect. So may an error that a proxy
/// or a cluster reports for a failure of its server.
pub(crate) fn is_rolled_back(error: &PostgresError) -> bool {
    let ended_well =
        |spoken: &DbError| spoken.parsed_severity() == Some(Severity::Error) && !leaves_open(spoken.code());
    matches!(error, PostgresError::Postgres(_)) && spoken(error).is_some_and(ended_well)
}

/// Whether the code means a broken connection, an internal error or an unknown outcome.
fn leaves_open(code: &SqlState) -> bool {
    code.code().starts_with("08")
        || [SqlState::INTERNAL_ERROR, SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN].contains(code)
}

/// Whether the session takes no writes. It is closed, since a new session may reach a host that takes writes.
pub(crate) fn takes_no_writes(error: &PostgresError) -> bool {
    spoken(error).is_some_and(|spoken| *spoken.code() == SqlState::READ_ONLY_SQL_TRANSACTION)
}

/// Whether the session's prepared statements are lost, exist twice, or are older than a change of a table. This follows
/// from `DEALLOCATE ALL`, a pooler's `DISCARD ALL`, two processes in one session, or `ALTER TABLE`. Nothing was
/// executed, and a new session works.
pub(crate) fn is_stale(error: &PostgresError) -> bool {
    const CODES: [SqlState; 3] = [
        SqlState::INVALID_SQL_STATEMENT_NAME,
        SqlState::DUPLICATE_PSTATEMENT,
        SqlState::FEATURE_NOT_SUPPORTED,
    ];
    matches!(error, PostgresError::Postgres(_))
        && spoken(error).is_some_and(|spoken| CODES.contains(spoken.code()))
}

/// Whether the statement violated one of the store's own constraints, so that the store must be read again. Compares
/// prefixes, because a distributed PostgreSQL appends a shard number to the name.
pub(crate) fn is_ours(error: &PostgresError) -> bool {
    const OURS: [&str; 4] =
        ["events_aggregate_sequence", "aggregates_id", "aggregates_natural_key", "commands_command_id"];
    spoken(error).is_some_and(|spoken| {
        *spoken.code() == SqlState::UNIQUE_VIOLATION
            && spoken.constraint().is_some_and(|name| OURS.iter().any(|ours| name.starts_with(ours)))
    })
}

/// Whether the server rolled back a transaction because of another one: a deadlock or a serialisation failure. Trying
/// again helps, so it is always [`Unavailable`](ErrorKind::Unavailable) and never counts as a failed attempt at an
/// event.
pub(crate) fn passes(error: &PostgresError) -> bool {
    matches!(error, PostgresError::Undone(_)) || spoken(error).is_some_and(undoes)
}

/// The same for an error of the user's SQL, or an error that has it as a source.
pub(crate) fn was_undone(error: &(dyn std::error::Error + 'static)) -> bool {
    said(error).is_some_and(undoes)
}

/// Whether an error of the user's SQL comes from a lock or a time-out of the server: the same statement may succeed later.
pub(crate) fn was_hindered(error: &(dyn std::error::Error + 'static)) -> bool {
    const CODES: [SqlState; 2] = [SqlState::LOCK_NOT_AVAILABLE, SqlState::QUERY_CANCELED];
    said(error).is_some_and(|spoken| undoes(spoken) || CODES.contains(spoken.code()))
}

fn undoes(spoken: &DbError) -> bool {
    [SqlState::T_R_SERIALIZATION_FAILURE, SqlState::T_R_DEADLOCK_DETECTED].contains(spoken.code())
}

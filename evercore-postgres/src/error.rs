//! What PostgreSQL and its helpers can say, and what it means to the caller.

use deadpool_postgres::PoolError;
use evercore_core::{BoxError, Error, ErrorKind};
use tokio_postgres::error::{DbError, Severity, SqlState};
use tokio_postgres::types::{WasNull, WrongType};

/// An error from below, before it is named by what the caller can do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PostgresError {
    /// The server or the driver.
    #[error("PostgreSQL: {0}")]
    Postgres(#[from] tokio_postgres::Error),
    /// No connection in time.
    #[error("no connection: {0}")]
    Pool(#[from] PoolError),
    /// The migrations.
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
    /// The names are not those that were read: some were registered since, or lost.
    #[error("the names of types have changed")]
    OtherNames,
    /// The server undid a transaction with the user's SQL in it, because another was in the way.
    #[error("undone by the server: {0}")]
    Undone(#[source] BoxError),
    /// Already an error of evercore.
    #[error(transparent)]
    Core(#[from] Error),
}

/// A pooler in between, which would mix up sessions.
pub(crate) const UNTOLD_POOLER: &str =
    "the session is not what was asked for: if a pooler is in between, name it by `Builder::pooler`";

const NO_VALUE: &str = "the store has a value that is no value of a store";

pub(crate) type Result<T, E = PostgresError> = std::result::Result<T, E>;

impl From<PostgresError> for Error {
    fn from(error: PostgresError) -> Self {
        let (kind, message) = match &error {
            PostgresError::Postgres(source) => meaning(source),
            PostgresError::Pool(source) => pool_meaning(source),
            PostgresError::Migration(source) => migration_meaning(source),
            PostgresError::Damaged(_) | PostgresError::UnknownName(_) => (ErrorKind::NotAStore, NO_VALUE),
            PostgresError::OtherNames => {
                (ErrorKind::Unavailable, "the names of types change again and again")
            }
            PostgresError::Silent(_) => (ErrorKind::Unavailable, "the server did not answer in time"),
            PostgresError::Undone(_) => {
                (ErrorKind::Unavailable, "another transaction was in the way, and nothing was written")
            }
            PostgresError::Core(_) => (ErrorKind::Backend, ""),
        };
        if let Some(told) = ours_within(&error) {
            return again(told).with_source(error);
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

/// Adds a cause to an error, and of its words those that everybody may read.
pub(crate) trait Because {
    fn because(self, source: impl Into<BoxError>) -> Self;
}

impl Because for Error {
    fn because(self, source: impl Into<BoxError>) -> Self {
        let source = source.into();
        let told = detail(&*source);
        let error = self.with_source(source);
        told.into_iter().fold(error, Self::with_detail)
    }
}

/// The server's own word within an error that somebody else may have made of it.
fn said<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a DbError> {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.find_map(|cause| cause.downcast_ref())
}

/// Of an error and what it comes from, the words that show no value.
fn detail(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(spoken) = cause.downcast_ref::<DbError>() {
            return Some(told(spoken));
        }
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return Some(io.raw_os_error().map_or_else(
                || io.kind().to_string(),
                |code| std::io::Error::from_raw_os_error(code).to_string(),
            ));
        }
        next = cause.source();
    }
    None
}

/// The code, the names of what it is about, and the message if that can show no value.
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

/// Values are in the detail, which is not told; some messages have them too, and what users raise may say anything.
fn shows_no_value(spoken: &DbError) -> bool {
    const CLASSES: [&str; 13] =
        ["08", "23", "25", "26", "28", "3D", "3F", "40", "53", "54", "55", "57", "58"];
    const CODES: [SqlState; 3] =
        [SqlState::INSUFFICIENT_PRIVILEGE, SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_FUNCTION];
    let is_raised = spoken.routine() == Some("exec_stmt_raise");
    let code = spoken.code();
    !is_raised && (CODES.contains(code) || CLASSES.iter().any(|class| code.code().starts_with(class)))
}

/// An error that was refused by what is the user's own, with the server's code if that is what it comes from.
pub(crate) fn said_no(what: &str, source: impl Into<BoxError>) -> Error {
    let source = source.into();
    let code = source.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::code);
    let code = code.map_or_else(String::new, |code| format!(" (SQLSTATE {})", code.code()));
    Error::new(ErrorKind::Rejected, format!("{what} said no{code}")).because(source)
}

/// SQLSTATE and constraint are what one looks up; neither shows a value.
fn with_code(message: &str, error: &PostgresError) -> String {
    with_code_of(message, spoken(error))
}

fn with_code_of(message: &str, spoken: Option<&DbError>) -> String {
    let Some(spoken) = spoken else { return message.to_owned() };
    let constraint = spoken.constraint().map_or_else(String::new, |name| format!(", constraint \"{name}\""));
    format!("{message} (SQLSTATE {}{constraint})", spoken.code().code())
}

impl PostgresError {
    /// What a refused login is told as.
    pub(crate) fn refused(error: &tokio_postgres::Error) -> Error {
        let (kind, message) = meaning(error);
        let code = error.code().map_or_else(String::new, |code| format!(" (SQLSTATE {})", code.code()));
        Error::new(kind, format!("{message}{code}"))
    }
}

/// Whether the server does not let this role in, whoever asks.
pub(crate) fn is_refused(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| code.code().starts_with("28")) || lacks_password(error)
}

/// The driver says so by its text alone.
fn lacks_password(error: &tokio_postgres::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.to_string() == "password missing")
}

/// Whether another attempt to connect may go better.
pub(crate) fn passes_by_itself(error: &tokio_postgres::Error) -> bool {
    meaning(error).0 == ErrorKind::Unavailable
}

/// An error of ours that has come through the driver: a login that is not tried again so soon.
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

/// The engine is closed.
pub(crate) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the engine is closed, connect again")
}

/// A commit of which nobody can say whether it lasts.
pub(crate) fn outcome_unknown() -> Error {
    Error::new(ErrorKind::OutcomeUnknown, "whether the commit took effect is not known")
}

/// The engine was connected for reading only.
pub(crate) fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "the store was connected to for reading only")
}

/// The same error once more, for the next of several callers who share it; without its source.
pub(crate) fn again(error: &Error) -> Error {
    error.again()
}

/// By SQLSTATE alone: messages come in the server's language and change from release to release.
fn meaning(error: &tokio_postgres::Error) -> (ErrorKind, &'static str) {
    let Some(code) = error.code() else { return without_code(error) };
    match *code {
        SqlState::READ_ONLY_SQL_TRANSACTION => {
            (ErrorKind::ReadOnly, "the server takes no writes: a standby, or a read-only database")
        }
        SqlState::INSUFFICIENT_PRIVILEGE => (ErrorKind::ReadOnly, "the role may not do this"),
        SqlState::DISK_FULL => (ErrorKind::Full, "the server's disk is full, nothing was written"),
        SqlState::UNDEFINED_TABLE | SqlState::UNDEFINED_COLUMN | SqlState::INVALID_SCHEMA_NAME => {
            (ErrorKind::NotAStore, "the schema holds no store")
        }
        SqlState::DATA_CORRUPTED | SqlState::INDEX_CORRUPTED => {
            (ErrorKind::NotAStore, "the server says that its files are damaged")
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
            (ErrorKind::Unavailable, "the session has lost what was prepared in it, and is given up")
        }
        SqlState::PROTOCOL_VIOLATION if error.as_db_error().is_some_and(is_of_pooler) => {
            (ErrorKind::Unavailable, "the pooler in between does not reach the server, or refused")
        }
        SqlState::PROTOCOL_VIOLATION => (ErrorKind::Backend, "PostgreSQL refused"),
        _ => match code.code().get(..2) {
            Some("08" | "53" | "57") => {
                (ErrorKind::Unavailable, "the server is out of reach or of resources")
            }
            Some("28") => (ErrorKind::Backend, "the server refused the login"),
            Some("3D") => (ErrorKind::Backend, "there is no such database"),
            Some("23") => (ErrorKind::Backend, "a constraint was broken that is none of the store's"),
            _ => (ErrorKind::Backend, "PostgreSQL refused"),
        },
    }
}

fn without_code(error: &tokio_postgres::Error) -> (ErrorKind, &'static str) {
    let source = std::error::Error::source(error);
    let io = source.and_then(|source| source.downcast_ref::<std::io::Error>());
    // What rustls refuses comes so; it will not pass by itself.
    if io.is_some_and(|error| error.kind() == std::io::ErrorKind::InvalidData) {
        return (ErrorKind::Backend, "the server's certificate was refused, or its TLS was not understood");
    }
    if error.is_closed() || io.is_some() {
        return (ErrorKind::Unavailable, "the connection to the server broke, or none could be made");
    }
    if source.is_some_and(|source| source.is::<WrongType>() || source.is::<WasNull>()) {
        return (ErrorKind::NotAStore, NO_VALUE);
    }
    if lacks_password(error) {
        return (ErrorKind::Invalid, "the server asks for a password, and the URL has none");
    }
    if source.is_some() {
        return (ErrorKind::Backend, "the server was not understood, or it speaks no TLS");
    }
    // A time-out of connecting has neither a code nor a source.
    (ErrorKind::Unavailable, "the server could not be reached")
}

fn pool_meaning(error: &PoolError) -> (ErrorKind, &'static str) {
    match error {
        PoolError::Backend(source) => meaning(source),
        PoolError::Timeout(_) => (ErrorKind::Unavailable, "no connection became free in time"),
        PoolError::Closed => (ErrorKind::Closed, "the engine is closed, connect again"),
        PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
            (ErrorKind::Backend, "the pool does not work")
        }
    }
}

fn migration_meaning(error: &refinery::Error) -> (ErrorKind, &'static str) {
    let Some(postgres) = beneath(error) else {
        return (ErrorKind::NotAStore, "the schema has the migrations of something else");
    };
    match postgres.code() {
        Some(&SqlState::DUPLICATE_TABLE) => {
            (ErrorKind::NotAStore, "the schema has a table of something else")
        }
        _ => meaning(postgres),
    }
}

/// The server's own word, if it was the server that spoke: to a statement, or to a login.
fn spoken(error: &PostgresError) -> Option<&DbError> {
    match error {
        PostgresError::Postgres(error) => error.as_db_error(),
        PostgresError::Pool(PoolError::Backend(error)) => error.as_db_error(),
        PostgresError::Migration(error) => beneath(error).and_then(tokio_postgres::Error::as_db_error),
        _ => None,
    }
}

/// refinery hides PostgreSQL's error some steps down.
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

/// PgBouncer has one code for all that it says itself: that the server is away, that a client has waited for too long, and
/// that it takes no settings for a session. A server tells the severity in English too, PgBouncer does not.
fn is_of_pooler(spoken: &DbError) -> bool {
    *spoken.code() == SqlState::PROTOCOL_VIOLATION && spoken.parsed_severity().is_none()
}

/// Why the first connection cannot be had: a pooler that nobody told of refuses the settings of our sessions.
pub(crate) fn at_first(error: PostgresError, has_sessions: bool) -> Error {
    if has_sessions && spoken(&error).is_some_and(is_of_pooler) {
        return Error::new(ErrorKind::Backend, UNTOLD_POOLER).because(error);
    }
    error.into()
}

/// Whether a statement that failed so has left nothing behind, for sure: the server said ERROR and goes on. What ends
/// the session, or the answer's way, may have come after the commit. So may an error that a proxy or a cluster makes of
/// what befell the server behind it.
pub(crate) fn is_rolled_back(error: &PostgresError) -> bool {
    let ended_well =
        |spoken: &DbError| spoken.parsed_severity() == Some(Severity::Error) && !leaves_open(spoken.code());
    matches!(error, PostgresError::Postgres(_)) && spoken(error).is_some_and(ended_well)
}

/// A connection broke somewhere, something did not work inside, or the code says so itself.
fn leaves_open(code: &SqlState) -> bool {
    code.code().starts_with("08")
        || [SqlState::INTERNAL_ERROR, SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN].contains(code)
}

/// Whether the session takes no writes. Another may, once the host is what it should be, so this one is given up.
pub(crate) fn takes_no_writes(error: &PostgresError) -> bool {
    spoken(error).is_some_and(|spoken| *spoken.code() == SqlState::READ_ONLY_SQL_TRANSACTION)
}

/// Whether the session has lost what was prepared in it, or has it twice, or has it from before a table was changed:
/// `DEALLOCATE ALL`, a pooler's `DISCARD ALL`, two processes in one session, `ALTER TABLE`. Nothing was executed, and a new
/// session knows nothing of that.
pub(crate) fn is_stale(error: &PostgresError) -> bool {
    const CODES: [SqlState; 3] = [
        SqlState::INVALID_SQL_STATEMENT_NAME,
        SqlState::DUPLICATE_PSTATEMENT,
        SqlState::FEATURE_NOT_SUPPORTED,
    ];
    matches!(error, PostgresError::Postgres(_))
        && spoken(error).is_some_and(|spoken| CODES.contains(spoken.code()))
}

/// Whether the statement met one of the store's own constraints, which calls for a look. Matched by prefix: a
/// distributed PostgreSQL adds the number of a shard to the name.
pub(crate) fn is_ours(error: &PostgresError) -> bool {
    const OURS: [&str; 4] =
        ["events_aggregate_sequence", "aggregates_id", "aggregates_natural_key", "commands_command_id"];
    spoken(error).is_some_and(|spoken| {
        *spoken.code() == SqlState::UNIQUE_VIOLATION
            && spoken.constraint().is_some_and(|name| OURS.iter().any(|ours| name.starts_with(ours)))
    })
}

/// Whether the server undid a transaction because another was in its way: a deadlock, or a serialisation failure. It is
/// nobody's fault and passes by itself, so it is [`Unavailable`](ErrorKind::Unavailable) wherever it comes from, and is never
/// counted against an event.
pub(crate) fn passes(error: &PostgresError) -> bool {
    matches!(error, PostgresError::Undone(_)) || spoken(error).is_some_and(undoes)
}

/// The same for an error of the user's SQL, or one that was made of it.
pub(crate) fn was_undone(error: &(dyn std::error::Error + 'static)) -> bool {
    said(error).is_some_and(undoes)
}

fn undoes(spoken: &DbError) -> bool {
    [SqlState::T_R_SERIALIZATION_FAILURE, SqlState::T_R_DEADLOCK_DETECTED].contains(spoken.code())
}

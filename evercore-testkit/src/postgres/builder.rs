//! What a server is made of, before it runs.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use super::account::{give_to_server, run_as_server};
use super::binaries::Binaries;
use super::process::{command, run};
use super::server::Server;
use super::{announce_missing, tls};

/// Settings of every server. Clients are many and small; times and messages are the same everywhere.
///
/// With `mmap`, shared memory lies in the data folder: a server that was killed leaves nothing in `/dev/shm`.
const ALWAYS: [(&str, &str); 4] = [
    ("max_connections", "200"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("dynamic_shared_memory_type", "mmap"),
];

/// A crash of the machine may lose these servers, a crash of the server may not.
const NOT_DURABLE: [(&str, &str); 2] = [("fsync", "off"), ("full_page_writes", "off")];

/// A locale that every system has and that is not `C`, for which nothing is translated.
const TRANSLATED: [(&str, &str); 1] = [("lc_messages", "C.UTF-8")];

/// A server that is still to be started; made by [`Server::builder`].
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Builder {
    binaries: Option<PathBuf>,
    durable: bool,
    initdb_args: Vec<String>,
    language: Option<String>,
    settings: Vec<(String, String)>,
    tls: bool,
}

impl Builder {
    /// The folder with `postgres`, `initdb` and so on, instead of looking for one.
    pub fn binaries(mut self, folder: impl Into<PathBuf>) -> Self {
        self.binaries = Some(folder.into());
        self
    }

    /// Whether it flushes as PostgreSQL does by default. By default it does not, which is faster; what a
    /// [killed](Server::kill) server has committed is there afterwards in both cases.
    pub fn durable(mut self, durable: bool) -> Self {
        self.durable = durable;
        self
    }

    /// A further argument to `initdb`, such as `--locale=de_DE.UTF-8`; by default the locale is `C` and the encoding
    /// UTF-8.
    pub fn initdb_arg(mut self, argument: impl Into<String>) -> Self {
        self.initdb_args.push(argument.into());
        self
    }

    /// Lets it say its messages in a language such as `de`, where its package has the translation; otherwise they stay
    /// English. No locale needs to be installed.
    pub fn language(mut self, code: impl Into<String>) -> Self {
        self.language = Some(code.into());
        self
    }

    /// A line of `postgresql.conf`; it prevails over those written before.
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// Lets it speak TLS too, with a fresh certificate for `localhost` and `127.0.0.1`, signed by a fresh authority:
    /// [`Server::ca_file`]. Needs the program `openssl`.
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Makes the server and starts it; it accepts connections.
    ///
    /// # Errors
    /// In words: no binaries, a program that failed, or a server that did not come up, with the tail of its log.
    pub fn start(self) -> Result<Server, String> {
        let binaries = self.find_binaries()?.ok_or("no PostgreSQL server binaries were found")?;
        self.start_with(binaries)
    }

    /// The same in a test that may be skipped: without server binaries this is announced, and `None`.
    ///
    /// # Panics
    /// If there are none and `EVERCORE_REQUIRE` has `postgres`; if there are and the server cannot be started.
    pub fn start_or_skip(self) -> Option<Server> {
        let found = self.find_binaries().unwrap_or_else(|error| panic!("{error}"));
        let Some(binaries) = found else {
            announce_missing("no PostgreSQL server binaries were found");
            return None;
        };
        Some(self.start_with(binaries).unwrap_or_else(|error| panic!("{error}")))
    }

    fn find_binaries(&self) -> Result<Option<Binaries>, String> {
        match &self.binaries {
            Some(folder) => Binaries::at(folder).map(Some),
            None => Binaries::find(),
        }
    }

    fn start_with(self, binaries: Binaries) -> Result<Server, String> {
        let mut server = Server::in_new_folder(binaries)?;
        self.init(&server)?;
        server.language = self.language;
        server.launch_on_free_port()
    }

    fn init(&self, server: &Server) -> Result<(), String> {
        let data = server.data();
        let mut initdb = command(server.binaries().program("initdb"));
        // The last of two contradicting arguments holds.
        initdb
            .args(["-A", "trust", "-U", "evercore", "--encoding=UTF8", "--locale=C", "--no-sync"])
            .args(&self.initdb_args)
            .arg("-D")
            .arg(&data)
            .current_dir(server.folder());
        run(run_as_server(&mut initdb))?;
        if self.tls {
            tls::make_certificates(&data)?;
        }
        self.configure(&data.join("postgresql.conf"))
    }

    fn configure(&self, file: &Path) -> Result<(), String> {
        let given = self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let lines = ALWAYS
            .into_iter()
            .chain(NOT_DURABLE.into_iter().filter(|_| !self.durable))
            .chain(tls::SETTINGS.into_iter().filter(|_| self.tls))
            .chain(TRANSLATED.into_iter().filter(|_| self.language.is_some()))
            .chain(given)
            .map(|(name, value)| format!("{name} = '{}'\n", value.replace('\'', "''")));
        let sample = fs::read_to_string(file).map_err(|error| format!("\"{}\": {error}", file.display()))?;
        let whole: String = [sample, "\n".to_owned()].into_iter().chain(lines).collect();
        fs::write(file, whole).map_err(|error| format!("\"{}\": {error}", file.display()))
    }
}

/// A new folder for a server, which can be read and written by its account.
pub(super) fn new_folder() -> Result<PathBuf, String> {
    let folder = tempfile::Builder::new().prefix("evercore-postgres-").disable_cleanup(true).tempdir();
    let folder = folder.map_err(|error| format!("no folder could be made: {error}"))?;
    give_to_server(folder.path())?;
    Ok(folder.path().to_owned())
}

/// A port that nobody listens on at the moment.
pub(super) fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    listener.map(|address| address.port()).map_err(|error| format!("no port is free: {error}"))
}

/// Whether nobody listens on this port.
pub(super) fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

//! The settings of a server before it starts.

use std::fs;
use std::path::{Path, PathBuf};

use super::account::run_as_server;
use super::binaries::Binaries;
use super::process::{command, run};
use super::server::Server;
use super::{announce_missing, tls};

/// The settings of every server: many small clients, and the same times and messages on every machine.
///
/// With `mmap`, shared memory is in the data folder, so a killed server leaves nothing in `/dev/shm`.
const ALWAYS: [(&str, &str); 4] = [
    ("max_connections", "200"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("dynamic_shared_memory_type", "mmap"),
];

/// Without flushes. Data survives a crash of the server, but not of the machine.
const NOT_DURABLE: [(&str, &str); 2] = [("fsync", "off"), ("full_page_writes", "off")];

/// A locale that every system has. It is not `C`, which would turn translations off.
const TRANSLATED: [(&str, &str); 1] = [("lc_messages", "C.UTF-8")];

/// A server that has not started; made by [`Server::builder`].
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
    /// Uses the programs in this folder instead of looking for them.
    pub fn binaries(mut self, folder: impl Into<PathBuf>) -> Self {
        self.binaries = Some(folder.into());
        self
    }

    /// Whether the server flushes, as PostgreSQL does by default. The default here is no, which is faster. The
    /// commits of a [killed](Server::kill) server survive in both cases.
    pub fn durable(mut self, durable: bool) -> Self {
        self.durable = durable;
        self
    }

    /// Adds an argument of `initdb`, such as `--locale=de_DE.UTF-8`. The defaults are the locale `C` and the encoding
    /// UTF-8.
    pub fn initdb_arg(mut self, argument: impl Into<String>) -> Self {
        self.initdb_args.push(argument.into());
        self
    }

    /// Sets the language of messages, such as `de`, if the package has translations; otherwise they stay English. No
    /// locale needs to be installed.
    pub fn language(mut self, code: impl Into<String>) -> Self {
        self.language = Some(code.into());
        self
    }

    /// Adds a setting to `postgresql.conf`. It overrides earlier ones.
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// Turns TLS on as well, with a new certificate for `localhost` and `127.0.0.1`, signed by a new authority:
    /// [`Server::ca_file`]. Needs the program `openssl`.
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Makes the server and starts it. It accepts connections when this returns.
    ///
    /// # Errors
    /// A text: no programs were found, a program failed, or the server did not start, with the end of its log.
    pub fn start(self) -> Result<Server, String> {
        let binaries = self
            .find_binaries()?
            .ok_or("no PostgreSQL server was found: install one, or set EVERCORE_POSTGRES_BIN")?;
        self.start_with(binaries)
    }

    /// The same for a test that may be skipped. Without the server's programs it prints that and gives `None`.
    ///
    /// # Panics
    /// If there are none and `EVERCORE_REQUIRE` has `postgres`, or if the server cannot be started.
    pub fn start_or_skip(self) -> Option<Server> {
        let found = self.find_binaries().unwrap_or_else(|error| panic!("{error}"));
        let Some(binaries) = found else {
            announce_missing("no PostgreSQL server was found");
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
        // Of two contradicting arguments the last one counts.
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

impl Server {
    /// Starts a fast server without durability; see [`Builder`].
    ///
    /// # Errors
    /// As for [`Builder::start`].
    pub fn start() -> Result<Self, String> {
        Self::builder().start()
    }

    /// Settings of a server before it starts.
    pub fn builder() -> Builder {
        Builder::default()
    }
}

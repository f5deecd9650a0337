//! Finds PostgreSQL's programs.

use std::fs;
use std::path::{Path, PathBuf};

use super::process::{command, run};

/// The places to look in, after `EVERCORE_POSTGRES_BIN` and before `PATH`. A star stands for a version; the newest
/// comes first.
const PLACES: [&str; 4] = [
    "/usr/lib/postgresql/*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/pgsql-*/bin",
];

/// The variable that names the folder of the server's programs.
const VARIABLE: &str = "EVERCORE_POSTGRES_BIN";

/// A folder with `postgres` and `initdb`, and perhaps more programs of PostgreSQL.
#[derive(Clone, Debug)]
pub(super) struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    /// The programs on this machine, if there are any.
    pub(super) fn find() -> Result<Option<Self>, String> {
        if let Some(folder) = std::env::var_os(VARIABLE).filter(|folder| !folder.is_empty()) {
            return Self::at(Path::new(&folder)).map(Some).map_err(|error| format!("{VARIABLE}: {error}"));
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places = PLACES.into_iter().flat_map(folders_like).chain(std::env::split_paths(&path));
        Ok(places.map(|folder| Self { folder }).find(Self::are_there))
    }

    /// The programs in this folder.
    pub(super) fn at(folder: &Path) -> Result<Self, String> {
        // An absolute path, because servers run in other folders.
        let folder =
            fs::canonicalize(folder).map_err(|error| format!("\"{}\": {error}", folder.display()))?;
        let binaries = Self { folder };
        if binaries.are_there() {
            Ok(binaries)
        } else {
            Err(format!("\"{}\" has no \"postgres\" and \"initdb\"", binaries.folder.display()))
        }
    }

    fn are_there(&self) -> bool {
        ["postgres", "initdb"].iter().all(|name| self.folder.join(name).is_file())
    }

    /// A program in this folder, or else on the `PATH`, because some packages contain only the server.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        let ours = self.folder.join(name);
        if ours.is_file() { ours } else { PathBuf::from(name) }
    }

    /// The version, such as `15.18` or `18beta1`.
    pub(super) fn version(&self) -> Result<String, String> {
        // postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)
        let answer = run(command(self.program("postgres")).arg("--version"))?;
        let answer = String::from_utf8_lossy(&answer);
        let version = answer.split_whitespace().nth(2);
        version.map(str::to_owned).ok_or_else(|| format!("\"postgres --version\" says \"{answer}\""))
    }
}

/// The folders that match a pattern with at most one star, the highest number first.
fn folders_like(pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else { return vec![PathBuf::from(pattern)] };
    let (parent, prefix) = before.rsplit_once('/').unwrap_or(("", before));
    let names = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut names: Vec<String> = names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort_by_key(|name| std::cmp::Reverse(number_in(name)));
    names.into_iter().map(|name| PathBuf::from(format!("{parent}/{name}{after}"))).collect()
}

fn number_in(name: &str) -> u32 {
    let digits: String =
        name.chars().skip_while(|sign| !sign.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

//! Calls PostgreSQL's client programs.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use super::binaries::Binaries;
use super::process::{command, run};
use super::server::Server;

/// Runs statements by `psql` on the server with this URL, like [`Server::psql`].
///
/// # Errors
/// If `psql` fails; with its message.
pub fn psql(url: &str, sql: &str) -> Result<String, String> {
    let program = Binaries::find()?.map_or_else(|| "psql".into(), |binaries| binaries.program("psql"));
    feed_psql(command(program), url, sql.as_bytes())
}

impl Server {
    /// Runs statements by `psql`, each in its own transaction, up to the first that fails. Gives the rows, with `|`
    /// between columns.
    ///
    /// # Errors
    /// If `psql` fails; with its message.
    pub fn psql(&self, database: &str, sql: &str) -> Result<String, String> {
        feed_psql(self.client("psql"), &self.url_of(database), sql.as_bytes())
    }

    /// Creates a database. `options` are those of `CREATE DATABASE`, or empty.
    ///
    /// # Errors
    /// If `psql` fails; with its message.
    pub fn create_database(&self, name: &str, options: &str) -> Result<(), String> {
        let name = name.replace('"', "\"\"");
        self.psql("postgres", &format!("CREATE DATABASE \"{name}\" {options}")).map(drop)
    }

    /// Dumps a database as SQL, by `pg_dump`.
    ///
    /// # Errors
    /// If `pg_dump` fails, for instance because it is older than the server; with its message.
    pub fn dump(&self, database: &str) -> Result<Vec<u8>, String> {
        let mut dump = self.client("pg_dump");
        run(dump.arg("-d").arg(self.url_of(database)))
    }

    /// Restores the text of [`dump`](Self::dump) into an empty database.
    ///
    /// # Errors
    /// If `psql` fails; with its message.
    pub fn restore(&self, database: &str, dump: &[u8]) -> Result<(), String> {
        feed_psql(self.client("psql"), &self.url_of(database), dump).map(drop)
    }

    /// A client program that connects to this server by default.
    pub(super) fn client(&self, name: &str) -> Command {
        let mut client = command(self.binaries().program(name));
        client.env("PGHOST", "127.0.0.1").env("PGPORT", self.port().to_string()).env("PGUSER", "evercore");
        client
    }
}

fn feed_psql(mut psql: Command, url: &str, sql: &[u8]) -> Result<String, String> {
    psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", url]);
    let rows = run_with_input(&mut psql, sql)?;
    Ok(String::from_utf8_lossy(&rows).trim_end_matches('\n').to_owned())
}

fn run_with_input(command: &mut Command, input: &[u8]) -> Result<Vec<u8>, String> {
    let program = Path::new(command.get_program()).display().to_string();
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|error| format!("\"{program}\" could not be run: {error}"))?;
    let pipe = child.stdin.take();
    let output = thread::scope(|scope| {
        // In a thread, because either pipe may be full. If the program reads only a part, its status shows it.
        scope.spawn(move || pipe.map(|mut pipe| pipe.write_all(input)));
        child.wait_with_output()
    });
    let output = output.map_err(|error| format!("\"{program}\" could not be waited for: {error}"))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

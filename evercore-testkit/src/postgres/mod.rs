//! Real PostgreSQL servers for tests, examples and benchmarks, and what goes wrong on the way to them.
//!
//! ```no_run
//! use evercore_testkit::postgres::Server;
//!
//! let server = Server::start()?;
//! assert_eq!(server.psql("postgres", "SELECT 1")?, "1");
//! server.kill(); // all its processes at once
//! server.start_again()?;
//! # Ok::<(), String>(())
//! ```
//!
//! The server's programs are looked for in the folder `EVERCORE_POSTGRES_BIN`, then where packages put them, the newest
//! first, then on the `PATH`. Root runs them as `postgres` or `nobody`. Nothing stays behind when the process ends, in
//! whatever way: a small shell waits for that, stops the server and removes its folder.

mod account;
mod backup;
mod binaries;
mod builder;
mod client;
mod pgbouncer;
mod process;
mod proxy;
mod server;
mod standby;
mod tls;
mod watchdog;

use std::io::Write;
use std::sync::{Once, OnceLock};

pub use backup::BaseBackup;
pub use builder::Builder;
pub use client::psql;
pub use pgbouncer::PgBouncer;
pub use proxy::{Cut, Proxy, Trigger};
pub use server::Server;

use crate::fixture::is_required;

/// The variable that names a server to be used instead of starting one.
const URL_VARIABLE: &str = "EVERCORE_POSTGRES_URL";

/// The URL of the server that the tests of this process share: the one named by `EVERCORE_POSTGRES_URL`, or else one
/// that is started at first use. `None`, after saying so, if there is none.
///
/// # Panics
/// If there is none and `EVERCORE_REQUIRE` has `postgres`, or if it cannot be started.
pub fn shared_url() -> Option<String> {
    static SHARED: OnceLock<Option<Server>> = OnceLock::new();
    if let Some(url) = std::env::var(URL_VARIABLE).ok().filter(|url| !url.is_empty()) {
        return Some(url);
    }
    SHARED.get_or_init(|| Server::builder().start_or_skip()).as_ref().map(Server::url)
}

/// Says once what is skipped and why, past the capture of test output.
fn announce_missing(why: &str) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: all that needs PostgreSQL; {why}. Install its server, name the folder of its programs by \
             EVERCORE_POSTGRES_BIN, or a server by {URL_VARIABLE}."
        );
    });
    assert!(!is_required("postgres"), "\"postgres\" is required, and {why}");
}

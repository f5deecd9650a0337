//! Real PostgreSQL servers for tests, examples and benchmarks, with proxies, poolers and crashes.
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
//! The server's programs are looked for in the folder `EVERCORE_POSTGRES_BIN`, then in the folders of packages, the
//! newest first, then on the `PATH`. Root runs them as `postgres` or `nobody`. Nothing is left when the process ends,
//! even if it is killed: a small shell waits for the end, stops the server and removes its folder.

mod account;
mod backup;
mod binaries;
mod builder;
mod client;
mod pgbouncer;
mod place;
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

/// The variable that names a server to use instead of starting one.
const URL_VARIABLE: &str = "EVERCORE_POSTGRES_URL";

/// The URL of the server that the tests of this process share: the one in `EVERCORE_POSTGRES_URL`, or one that is
/// started at first use. If there is none, prints that and gives `None`.
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

/// Prints once what is skipped and why. The capture of test output does not hide it.
fn announce_missing(why: &str) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: all tests that need PostgreSQL; {why}. Install its server, or name the folder of its programs in \
             EVERCORE_POSTGRES_BIN, or a running server in {URL_VARIABLE}."
        );
    });
    assert!(!is_required("postgres"), "\"postgres\" is required, and {why}");
}

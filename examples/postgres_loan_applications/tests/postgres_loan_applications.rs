//! The live run of the example that imports a log: eight writers replay it while a subscription fills two tables.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

use std::path::PathBuf;
use std::process::Command;

use evercore_testkit::postgres::Server;

/// If `EVERCORE_TORTURE` is `full`, `EVERCORE_LOAN_LOG` names the log; otherwise the example makes a small one.
#[test]
fn tables_built_live_are_what_the_log_says() {
    let Some(server) = Server::builder().start_or_skip() else { return };
    let is_full = std::env::var("EVERCORE_TORTURE").is_ok_and(|size| size == "full");
    let named = std::env::var_os("EVERCORE_LOAN_LOG").filter(|_| is_full).map(PathBuf::from);
    if is_full && named.is_none() {
        eprintln!("SKIPPED: the real log of loan applications; EVERCORE_LOAN_LOG does not name one");
    }
    let program = env!("CARGO_BIN_EXE_postgres_loan_applications");
    let output = Command::new(program).arg("--live").arg(server.url()).args(named).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("the tables are what the log says"), "{text}");
}

//! The example of a projection, killed again and again.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use evercore_sqlite::rusqlite::Connection;

/// The number of events in the table of a version, if the table agrees with the log up to the cursor; read by SQL,
/// without evercore.
fn projected(file: &Path, version: u32) -> i64 {
    let sql = Connection::open(file).unwrap();
    let one = |query: &str| sql.query_row(query, (), |row| row.get::<_, i64>(0)).unwrap_or(0);
    let cursor = one(&format!("SELECT position FROM cursors WHERE version = {version}"));
    let (columns, sums) = match version {
        1 => ("customer, day, orders", "count(*)"),
        _ => ("customer, day, orders, cents", "count(*), sum(payload ->> 'cents')"),
    };
    let table = format!("SELECT {columns} FROM shop_days_{version}");
    let log = format!(
        "SELECT payload ->> 'customer', payload ->> 'day', {sums} FROM event_log
         WHERE position <= {cursor} GROUP BY 1, 2"
    );
    let differences = format!(
        "SELECT (SELECT count(*) FROM ({table} EXCEPT {log})) + (SELECT count(*) FROM ({log} EXCEPT {table}))"
    );
    let is_made = one("SELECT count(*) FROM sqlite_schema WHERE name = 'shop_days_2'") == 1;
    assert!(!is_made || sql.query_row(&differences, (), |row| row.get(0)) == Ok(0), "version {version}");
    cursor
}

/// `EVERCORE_KILLS` sets how often.
#[test]
fn the_projection_is_what_the_log_says_after_every_kill_9() {
    let kills: u32 = std::env::var("EVERCORE_KILLS").map_or(10, |kills| kills.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("orders.db");
    let program = env!("CARGO_BIN_EXE_projection");
    let start = |orders: &str, version: &str| {
        let mut command = Command::new(program);
        command.arg(&file).args([orders, version]).stdout(Stdio::piped()).spawn().unwrap()
    };
    let mut behind = 0;
    for kill in 0..kills {
        let version = if kill < kills / 2 { "1" } else { "2" };
        let mut child = start("1000000", version);
        std::thread::sleep(Duration::from_millis(fastrand::u64(50..700)));
        child.kill().unwrap();
        child.wait().unwrap();
        if !file.exists() {
            continue; // killed before it created the file
        }
        let (first, second) = (projected(&file, 1), projected(&file, 2));
        let sql = Connection::open(&file).unwrap();
        let head: i64 = sql.query_row("SELECT count(*) FROM event_log", (), |row| row.get(0)).unwrap_or(0);
        behind += i64::from(first.max(second) < head);
    }
    let output = start("100", "2").wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("version 2 is live"));
    let (first, second) = (projected(&file, 1), projected(&file, 2));
    let sql = Connection::open(&file).unwrap();
    let ask = |query: &str| sql.query_row(query, (), |row| row.get::<_, i64>(0)).unwrap();
    let claims = ask("SELECT sum(epoch) FROM cursors");
    assert_eq!(second, ask("SELECT count(*) FROM event_log"));
    println!(
        "{kills} kills, {behind} times the table was behind the log, {claims} claims; \
         version 1 has {first} events, version 2 all {second}, each once"
    );
}

//! The example that imports a log: run, run again, stopped by kill -9, with a bad line.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use evercore_sqlite::{Direction, EventStore, LogQuery, Position, SqliteEngine};

/// Lines in one unit of work of the example.
const UNIT: i64 = 500;

fn loan_applications() -> Command {
    Command::new(env!("CARGO_BIN_EXE_loan_applications"))
}

fn run(log: &Path, file: &Path) -> Output {
    loan_applications().arg(log).arg(file).output().unwrap()
}

/// A log of this many lines: interleaved applications of five lines each.
fn write_log(folder: &Path, lines: i64) -> PathBuf {
    let steps = ["A_SUBMITTED", "A_PARTLYSUBMITTED", "A_PREACCEPTED", "O_ACCEPTED", "A_APPROVED"];
    let mut log = "case_id,timestamp,name,transition,resource,amount_req\n".to_owned();
    for n in 0..lines {
        let (step, case) = (steps[(n / 100 % 5) as usize], n / 500 * 100 + n % 100);
        let second = n % 60;
        log.push_str(&format!("{case},2011-10-01T00:00:{second:02}.000Z,{step},COMPLETE,112,100\n"));
    }
    let path = folder.join("log.csv");
    std::fs::write(&path, log).unwrap();
    path
}

fn head(file: &Path) -> i64 {
    smol::block_on(async {
        let engine = SqliteEngine::open(file).await.unwrap();
        let store = EventStore::new(engine.clone());
        let mut query = LogQuery::after(Position::ZERO);
        let mut last = 0;
        loop {
            let page = store.read_log(&query).await.unwrap();
            for event in &page.events {
                last += 1;
                assert_eq!(event.position().get(), last, "a hole in the log");
                assert_eq!(event.reference(), Some("112"));
            }
            query.from = page.scanned;
            assert_eq!(query.direction, Direction::Forward);
            if page.scanned == page.head {
                break;
            }
        }
        engine.close().await.unwrap();
        last
    })
}

#[test]
fn a_second_run_changes_nothing_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (log, file) = (write_log(folder.path(), 2_300), folder.path().join("loans.db"));
    let first = run(&log, &file);
    let text = String::from_utf8_lossy(&first.stdout);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    assert!(text.contains("events 2300, applications 500, kinds 5, longest 5"), "{text}");
    assert!(text.contains("amounts asked for 50000"), "{text}");
    let second = run(&log, &file);
    let text = String::from_utf8_lossy(&second.stdout);
    assert!(second.status.success());
    assert!(text.contains("nothing new, 2300 events are in the store already"), "{text}");
    assert_eq!(head(&file), 2_300);
}

#[test]
fn a_line_that_does_not_read_is_named_and_nothing_before_it_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let (log, file) = (write_log(folder.path(), 1_200), folder.path().join("loans.db"));
    let mut lines: Vec<String> = std::fs::read_to_string(&log).unwrap().lines().map(str::to_owned).collect();
    lines[700] = "7,yesterday,A_SUBMITTED,COMPLETE,112,100".to_owned();
    std::fs::write(&log, lines.join("\n")).unwrap();
    let output = run(&log, &file);
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("line 701: \"yesterday\" is no time"), "{error}");
    assert_eq!(head(&file), 699);
}

#[test]
fn another_log_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (log, file) = (write_log(folder.path(), 600), folder.path().join("loans.db"));
    assert!(run(&log, &file).status.success());
    let other = std::fs::read_to_string(&log).unwrap().replace("2011-10-01", "2012-10-01");
    std::fs::write(&log, other).unwrap();
    let output = run(&log, &file);
    assert!(String::from_utf8_lossy(&output.stderr).contains("the store holds another log"));
    assert_eq!(head(&file), 600);
}

/// `EVERCORE_KILLS` says how often; `just torture` says 20.
#[test]
fn after_kill_9_everything_acknowledged_is_there_and_no_half_unit() {
    let kills: u32 = std::env::var("EVERCORE_KILLS").map_or(3, |kills| kills.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let lines = 20_000 * i64::from(kills.max(1));
    let log = write_log(folder.path(), lines);
    let (mut file, mut killed, mut files, mut beyond) = (folder.path().join("loans-0.db"), 0, 1, 0);
    while killed < kills {
        let mut child = loan_applications()
            .args([&log, &file])
            .env("EVERCORE_ACKNOWLEDGE", "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let reader = std::thread::spawn(move || {
            let (mut line, mut acknowledged, mut is_done) = (String::new(), 0, false);
            while output.read_line(&mut line).unwrap() > 0 {
                match line.trim_end().strip_prefix("acknowledged ") {
                    Some(position) if line.ends_with('\n') => acknowledged = position.parse::<i64>().unwrap(),
                    _ => is_done |= line.starts_with("import"),
                }
                line.clear();
            }
            (acknowledged, is_done)
        });
        std::thread::sleep(Duration::from_millis(fastrand::u64(20..400)));
        child.kill().unwrap();
        child.wait().unwrap();
        let (acknowledged, is_done) = reader.join().unwrap();
        if !file.exists() {
            continue; // killed before it created the file
        }
        let there = head(&file);
        assert!(there >= acknowledged, "acknowledged {acknowledged}, there {there}");
        assert!(there % UNIT == 0 || there == lines, "half a unit: {there}");
        if is_done {
            files += 1;
            file = folder.path().join(format!("loans-{files}.db"));
            continue; // it ended before it was killed; begin again
        }
        killed += 1;
        beyond += i64::from(there > acknowledged);
    }
    assert!(run(&log, &file).status.success());
    assert_eq!(head(&file), lines);
    println!(
        "{kills} kills, {files} files, {beyond} times one unit more than acknowledged, 0 lost, 0 half units"
    );
}

/// Eight writers replay the log while a subscription fills the tables. If `EVERCORE_TORTURE` is `full`,
/// `EVERCORE_LOAN_LOG` names the log; otherwise the example makes a small one.
#[test]
fn tables_built_live_are_what_the_log_says() {
    let folder = tempfile::tempdir().unwrap();
    let made_up = write_log(folder.path(), 4_300);
    let with_work = std::fs::read_to_string(&made_up).unwrap();
    let with_work = with_work.replace("A_PARTLYSUBMITTED,COMPLETE,112", "W_Nabellen offertes,START,113");
    let with_work = with_work.replace("A_PREACCEPTED,COMPLETE", "W_Nabellen offertes,COMPLETE");
    std::fs::write(&made_up, with_work).unwrap();
    let is_full = std::env::var("EVERCORE_TORTURE").is_ok_and(|size| size == "full");
    let named = std::env::var_os("EVERCORE_LOAN_LOG").filter(|_| is_full).map(PathBuf::from);
    if is_full && named.is_none() {
        eprintln!("SKIPPED: the real log of loan applications; EVERCORE_LOAN_LOG does not name one");
    }
    for log in [Some(made_up), named].into_iter().flatten() {
        let file = folder.path().join("live.db");
        let output = loan_applications().arg("--live").arg(&log).arg(&file).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        println!("{text}");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("the tables are what the log says"), "{text}");
        std::fs::remove_file(file).unwrap();
    }
}

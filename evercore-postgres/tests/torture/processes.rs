//! The same writers in four processes, one of which is killed.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::book::{Book, Fate};
use crate::load::{self, Witness};
use crate::tools::{engine, milliseconds, sized};
use crate::writers::Trial;

/// The server of a child, and the number of the child.
const CHILD: &str = "EVERCORE_TORTURE_CHILD";

/// For each process.
const WRITERS: usize = 16;

#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_skipped_doubled_or_lost_among_4_processes() {
    let seconds = sized(3, 60);
    if let Ok(task) = std::env::var(CHILD) {
        return be_child(&task, seconds).await;
    }
    let Some(trial) = Trial::begin().await else { return };
    let mut children: Vec<Process> = (0..4).map(|nth| Process::start(&trial.url, nth, &trial.book)).collect();
    tokio::time::sleep(milliseconds(seconds * 600)).await;
    let mut killed = children.remove(0);
    killed.child.kill().unwrap();
    killed.finish();
    for child in children {
        assert!(child.finish(), "a child says that it failed");
    }
    trial.end("4 processes of 16 writers, one killed").await;
}

async fn be_child(task: &str, seconds: u64) {
    let (nth, url) = task.split_once(' ').unwrap();
    let first = nth.parse::<usize>().unwrap() * WRITERS;
    let engine = engine(url).await;
    let until = Instant::now() + Duration::from_secs(seconds);
    // The line may begin with the name of the test.
    tell("\n");
    load::run(&[engine], first..first + WRITERS, until, &Arc::new(Telling)).await;
}

/// Prints for the parent, one line each; an incomplete line does not count.
struct Telling;

impl Witness for Telling {
    fn note(&self, unit: i64, fate: Fate) {
        tell(&format!("unit {unit} {fate}\n"));
    }

    fn count(&self, what: &str) {
        tell(&format!("count {what}\n"));
    }
}

fn tell(line: &str) {
    // Ends with its parent, because nothing reads its output.
    std::io::stdout().write_all(line.as_bytes()).unwrap();
}

struct Process {
    child: Child,
    listener: JoinHandle<()>,
}

impl Process {
    fn start(url: &str, nth: usize, book: &Arc<Book>) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "processes::no_event_is_skipped_doubled_or_lost_among_4_processes",
                "--nocapture",
            ])
            .env(CHILD, format!("{nth} {url}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (output, book) = (child.stdout.take().unwrap(), Arc::clone(book));
        let listener = std::thread::spawn(move || listen(BufReader::new(output), &book));
        Self { child, listener }
    }

    /// Waits for its end. Gives whether it succeeded.
    fn finish(mut self) -> bool {
        let status = self.child.wait().unwrap();
        self.listener.join().unwrap();
        status.success()
    }
}

fn listen(mut output: impl BufRead, book: &Book) {
    let mut line = String::new();
    while output.read_line(&mut line).unwrap() > 0 {
        if let Some(told) = line.strip_suffix('\n') {
            if let Some(what) = told.strip_prefix("count ") {
                book.count(what);
            } else if let Some((unit, fate)) =
                told.strip_prefix("unit ").and_then(|told| told.split_once(' '))
            {
                book.note(unit.parse().unwrap(), fate.parse().unwrap());
            }
        }
        line.clear();
    }
}

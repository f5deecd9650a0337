//! W3p: several processes with some writers each, on one store.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use evercore_postgres::{EventStore, PostgresEngine};

use crate::floor::Floor;
use crate::{append, counters, median, runtime};

const CHILD: &str = "EVERCORE_BENCH_CHILD";
const MEASURED: Duration = Duration::from_secs(3);
const ROUNDS: usize = 3;

pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// `what writers url`: gets ready, says so, writes when told to, says how many events.
pub(crate) fn child() {
    let task = std::env::var(CHILD).unwrap();
    let parts: Vec<&str> = task.split(' ').collect();
    let [what, writers, url] = parts[..] else { panic!("{task}") };
    let writers: i64 = writers.parse().unwrap();
    let runtime = runtime();
    let go = || {
        println!("ready");
        std::io::stdin().lock().read_line(&mut String::new()).unwrap();
        Instant::now() + MEASURED
    };
    let tasks: Vec<_> = if what == "ours" {
        let store = EventStore::new(runtime.block_on(PostgresEngine::connect(url)).unwrap());
        let all = runtime.block_on(counters(&store, writers as usize));
        let until = go();
        let spawn = |mut counter| {
            let store = store.clone();
            runtime.spawn(async move {
                let mut count = 0_u64;
                while Instant::now() < until {
                    append(&store, &mut counter, 1).await;
                    count += 1;
                }
                count
            })
        };
        all.into_iter().map(spawn).collect()
    } else {
        let floors: Vec<Floor> = (0..writers).map(|_| runtime.block_on(Floor::connect(url))).collect();
        let until = go();
        let first = i64::from(std::process::id()) * 1_000;
        let spawn = |(writer, floor): (i64, Floor)| {
            runtime.spawn(async move {
                let mut count = 0_u64;
                while Instant::now() < until {
                    floor.append(first + writer, count as i64, 1).await;
                    count += 1;
                }
                count
            })
        };
        (0..writers).zip(floors).map(spawn).collect()
    };
    let count: u64 = tasks.into_iter().map(|task| runtime.block_on(task).unwrap()).sum();
    println!("{count}");
}

fn start(what: &str, writers: usize, url: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .env(CHILD, format!("{what} {writers} {url}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Events per second of all processes together.
fn rate(what: &str, processes: usize, writers: usize, url: &str) -> f64 {
    let mut children: Vec<Child> = (0..processes).map(|_| start(what, writers, url)).collect();
    let mut outputs: Vec<_> =
        children.iter_mut().map(|child| BufReader::new(child.stdout.take().unwrap()).lines()).collect();
    for output in &mut outputs {
        assert_eq!(output.next().unwrap().unwrap(), "ready");
    }
    for child in &mut children {
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    }
    let counts = outputs.iter_mut().map(|output| output.next().unwrap().unwrap().parse::<f64>().unwrap());
    let sum: f64 = counts.sum();
    children.iter_mut().for_each(|child| assert!(child.wait().unwrap().success()));
    sum / MEASURED.as_secs_f64()
}

pub(crate) fn compare(url: &str, processes: usize, writers: usize, target: &str) {
    let (mut ours, mut floors, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let theirs = rate("floor", processes, writers, url);
        let our = rate("ours", processes, writers, url);
        ours.push(our);
        floors.push(theirs);
        ratios.push(our / theirs);
    }
    let [our, theirs, ratio] = [ours, floors, ratios].map(median);
    let name = format!("W3p PostgreSQL, {processes} processes × {writers}");
    println!("{name:42} {our:>12.0} {theirs:>12.0} {ratio:>7.2}  {target}");
}

//! W3p: several processes with some writers each, on one store. And the following process for W7.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evercore_postgres::{CursorState, Event, EventStore, Position, PostgresEngine, Start, Timestamp};
use hdrhistogram::Histogram;

use crate::floor::Floor;
use crate::{append, counters, median, runtime};

const CHILD: &str = "EVERCORE_BENCH_CHILD";
const MEASURED: Duration = Duration::from_secs(3);
const ROUNDS: usize = 3;

pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// `what writers url`: prepares, reports, writes on request, and reports the number of events.
pub(crate) fn child() {
    let task = std::env::var(CHILD).unwrap();
    let parts: Vec<&str> = task.split(' ').collect();
    let [what, writers, url] = parts[..] else { panic!("{task}") };
    let writers: i64 = writers.parse().unwrap();
    let runtime = runtime();
    if what == "follow" {
        return runtime.block_on(follow(url));
    }
    let go = || {
        told_after("ready");
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

/// Prints a line, and waits for one.
fn told_after(said: &str) -> String {
    println!("{said}");
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
    line
}

/// Handles events up to a position that it gets later. Then it prints the number of events and their delays in
/// microseconds, from the time in the event, which is the moment when its writer began.
async fn follow(url: &str) {
    let store = EventStore::new(PostgresEngine::connect(url).await.unwrap());
    let name = format!("follower {}", std::process::id());
    let subscription = store.subscription(&name).unwrap().starting(Start::End);
    let delays = Arc::new(Mutex::new(Histogram::<u64>::new(3).unwrap()));
    let seen = Arc::clone(&delays);
    let handler = move |delivery: evercore_postgres::Delivery| {
        let (now, mut seen) = (Timestamp::now(), seen.lock().unwrap());
        let delay = |event: &Event| u64::try_from(now.since(event.time()).as_micros()).unwrap();
        delivery.events().iter().for_each(|event| seen.record(delay(event)).unwrap());
        async { Ok(()) }
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let shutdown = async {
        let _ = stopped.await;
    };
    let runner = tokio::spawn(async move { subscription.run_batches(shutdown, handler).await.unwrap() });
    // Without its cursor it is not found.
    let has_lease = |states: Vec<CursorState>| states.iter().all(|state| state.cursor.owner.is_some());
    while !store.subscription_states(&name).await.is_ok_and(has_lease) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let told = tokio::task::spawn_blocking(|| told_after("ready")).await.unwrap();
    let head = Position::new(told.trim().parse().unwrap()).unwrap();
    store.wait_for_position(head, &name, Duration::from_secs(60)).await.unwrap();
    stop.send(()).unwrap();
    runner.await.unwrap();
    let delays = delays.lock().unwrap();
    println!("{} {} {}", delays.len(), delays.value_at_quantile(0.5), delays.value_at_quantile(0.99));
}

/// A process that follows a store with a subscription.
pub(crate) struct Follower {
    child: Child,
    output: Lines<BufReader<ChildStdout>>,
}

impl Follower {
    /// It has its lease when this returns.
    pub(crate) fn start(url: &str) -> Self {
        let mut child = start("follow", 0, url);
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(output.next().unwrap().unwrap(), "ready");
        Self { child, output }
    }

    /// Lets it run to this position and stop. Gives the number of events and their delays in microseconds, p50 and
    /// p99.
    pub(crate) fn stop(mut self, head: Position) -> [u64; 3] {
        writeln!(self.child.stdin.take().unwrap(), "{head}").unwrap();
        let line = self.output.next().unwrap().unwrap();
        assert!(self.child.wait().unwrap().success());
        let numbers: Vec<u64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
        numbers.try_into().unwrap()
    }
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

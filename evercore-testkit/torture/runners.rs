//! Six runners of the same subscription stall for longer than their lease, and crash between effect and cursor. They
//! run in threads with one engine each, which share a clock, and in processes, whose clocks may be an hour wrong.

use std::future::{Future, poll_fn};
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::pin::pin;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::evercore::{BoxFuture, CursorId, Delivery, Event, PageLimit, Position, Subscription};
use crate::ground::{Ground, HAS_ONE_CLOCK, Place, alone};
use crate::tally::{Notes, Tally, sized, write};
use crate::unfenced;
use evercore_core::engine::{Advance, Outcome, Sink, Step};

/// The variable that gives a child its task.
const RUNNER: &str = "EVERCORE_RUNNER";

const RUNNERS: usize = 6;

/// The length of a stall, and of a lease.
const PAUSE: Duration = Duration::from_millis(400);
const LEASE: Duration = Duration::from_millis(150);

/// A runner that takes longer has failed; its events then count as missed.
const LIMIT: Duration = Duration::from_secs(180);

pub(crate) const NAME: &str = "tortured";

/// How many hours the clock of each runner is wrong.
const HOURS: [i64; RUNNERS] = [0, 1, 0, -1, 1, 0];
const IN_TIME: [i64; RUNNERS] = [0; RUNNERS];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Way {
    /// The effect in a separate transaction, and then the cursor.
    AtLeastOnce,
    /// Effect and cursor together, by the engine's projection.
    ExactlyOnce,
    /// The wrong way.
    Unfenced,
}

/// The task of one runner.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    way: Way,
    pub(crate) address: String,
    /// The target of the cursor.
    pub(crate) target: i64,
    pub(crate) lease: Duration,
    trouble: Trouble,
    pub(crate) hours: i64,
    /// The time of the parent's clock, in seconds.
    now: u64,
}

/// The faults, each with its number in a thousand batches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Trouble {
    pauses: u32,
    crashes: u32,
    notes: Notes,
    /// Set when a runner in a thread crashes. The task that polls it then drops it.
    #[serde(skip)]
    has_crashed: Arc<AtomicBool>,
}

impl Trouble {
    /// Whether the fault happens now. It happens at least once, because a short run might have none.
    fn draws(&self, what: &str, in_a_thousand: u32) -> bool {
        let is_drawn = fastrand::u32(0..1_000) < in_a_thousand;
        let is_first = || in_a_thousand > 0 && self.notes.count(what) == 0;
        let is_now = is_drawn || is_first();
        if is_now {
            self.notes.note(what);
        }
        is_now
    }

    /// The whole process stops, including its renewals.
    pub(crate) fn stall(&self) {
        if self.draws("pause", self.pauses) {
            std::thread::sleep(PAUSE);
        }
    }

    /// Before the effect, or between the effect and the cursor.
    pub(crate) fn crash(&self, when: &str) {
        if self.draws(&format!("crash {when}"), self.crashes) {
            if std::env::var_os(RUNNER).is_some() {
                std::process::abort();
            }
            self.has_crashed.store(true, Ordering::SeqCst);
            // The work is not finished, including its transaction.
            resume_unwind(Box::new("a crash"));
        }
    }
}

impl Task {
    pub(crate) async fn run(self) {
        let ground = Ground::open(&self.address).await;
        let until = Instant::now() + LIMIT;
        match self.way {
            Way::AtLeastOnce => at_least_once(&ground, &self, until).await,
            Way::ExactlyOnce => exactly_once(&ground, &self, until).await,
            Way::Unfenced => unfenced::run(&ground, &self, &self.trouble, until).await,
        }
    }

    fn subscription(&self, ground: &Ground) -> Subscription {
        let named = ground.store().subscription(NAME).unwrap();
        named.with_lease(self.lease).with_batch(PageLimit::events(10).unwrap())
    }
}

async fn at_least_once(ground: &Ground, task: &Task, until: Instant) {
    let (hand, trouble) = (ground.clone(), task.trouble.clone());
    let handler = move |delivery: Delivery| {
        let (hand, trouble) = (hand.clone(), trouble.clone());
        async move {
            trouble.crash("before");
            hand.count("@applied", delivery.events().iter().map(position).collect()).await?;
            trouble.stall();
            trouble.crash("between");
            trouble.notes.note("handled");
            Ok(())
        }
    };
    let done = reached(ground, task.target, until);
    task.subscription(ground).run_batches(done, handler).await.unwrap();
}

async fn exactly_once(ground: &Ground, task: &Task, until: Instant) {
    let trouble = task.trouble.clone();
    let projection = ground.counting("@applied", position, move || trouble.crash("between"));
    let late = Late { projection, trouble: task.trouble.clone() };
    task.subscription(ground).run_sink(reached(ground, task.target, until), late).await.unwrap();
}

/// Stalls before it delivers; the lease may be lost then.
struct Late<S> {
    projection: S,
    trouble: Trouble,
}

impl<S: Sink> Sink for Late<S> {
    fn deliver<'a>(&'a self, delivery: &'a Delivery, advance: &'a Advance) -> BoxFuture<'a, Outcome> {
        Box::pin(async move {
            self.trouble.crash("before");
            self.trouble.stall();
            let outcome = self.projection.deliver(delivery, advance).await;
            if let Outcome::Refused(_) = &outcome {
                self.trouble.notes.note("refused");
            }
            outcome
        })
    }

    fn tells_which(&self) -> bool {
        self.projection.tells_which()
    }

    fn holds_cursor(&self) -> bool {
        self.projection.holds_cursor()
    }
}

fn position(event: &Event) -> i64 {
    event.position().get()
}

pub(crate) async fn reached(ground: &Ground, target: i64, until: Instant) {
    let (store, target) = (ground.store(), Position::new(target).unwrap());
    while Instant::now() < until {
        if store.wait_for_position(target, NAME, Duration::from_millis(50)).await.is_ok() {
            return;
        }
    }
}

/// A store with events, a cursor at its beginning, a table with counters, and the runners.
struct Trial {
    place: Place,
    notes: tempfile::TempDir,
    events: i64,
    way: Way,
}

impl Trial {
    fn of(way: Way, events: i64) -> Option<Self> {
        let place = Place::fresh()?;
        let notes = tempfile::tempdir().unwrap();
        alone(async {
            let ground = Ground::open(&place.address).await;
            ground
                .sql(
                    "CREATE TABLE @applied (position BIGINT PRIMARY KEY, times BIGINT NOT NULL);
                     CREATE TABLE @unfenced (position BIGINT, owner BIGINT, expires BIGINT);
                     INSERT INTO @unfenced VALUES (0, 0, 0)",
                )
                .await;
            ground.watch().await;
            let named = ground.store().subscription(NAME).unwrap();
            let id = CursorId { subscription: named.name().clone(), version: 1, partition: 0 };
            let declare = Step::declare(1, Position::ZERO, Some(Position::ZERO));
            ground.store().engine().step(&id, &declare).await.unwrap();
            write(&ground.store(), events).await;
        });
        Some(Self { place, notes, events, way })
    }

    fn notes(&self) -> Notes {
        Notes::at(&self.notes.path().join("notes"))
    }

    fn task(&self, (pauses, crashes): (u32, u32), lease: Duration) -> Task {
        let trouble = Trouble { pauses, crashes, notes: self.notes(), has_crashed: Arc::default() };
        let (address, target) = (self.place.address.clone(), self.events);
        Task { way: self.way, address, target, lease, trouble, hours: 0, now: seconds() }
    }

    /// Runs six at once until all is done. If one crashes, another one starts in its place.
    fn run(&self, task: &Task, apart: Option<&str>, hours: [i64; RUNNERS]) -> Tally {
        std::thread::scope(|scope| {
            for hours in hours {
                let task = Task { hours, ..task.clone() };
                scope.spawn(move || match apart {
                    Some(test) => while has_crashed_apart(&task, test) {},
                    None => while has_crashed(&task) {},
                });
            }
        });
        self.tally()
    }

    fn tally(&self) -> Tally {
        alone(async { Tally::of(&Ground::open(&self.place.address).await, &self.notes(), self.events).await })
    }
}

fn has_crashed(task: &Task) -> bool {
    let crashed = Arc::<AtomicBool>::default();
    let trouble = Trouble { has_crashed: Arc::clone(&crashed), ..task.trouble.clone() };
    let task = Task { trouble, ..task.clone() };
    alone(async {
        let mut run = pin!(task.run());
        poll_fn(|context| {
            let is_done = run.as_mut().poll(context).is_ready();
            let has_crashed = crashed.load(Ordering::SeqCst);
            if is_done || has_crashed { Poll::Ready(has_crashed) } else { Poll::Pending }
        })
        .await
    })
}

/// The same in another process, whose clock may be wrong.
fn has_crashed_apart(task: &Task, test: &str) -> bool {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).stdout(Stdio::null());
    child.env(RUNNER, serde_json::to_string(task).unwrap());
    if task.hours != 0 {
        child.env("LD_PRELOAD", faketime().unwrap()).env("FAKETIME", format!("{:+}h", task.hours));
        child.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("DONT_FAKE_MONOTONIC", "1");
    }
    let status = child.status().unwrap();
    assert!(status.success() || has_aborted(status), "{status}");
    has_aborted(status)
}

#[cfg(unix)]
fn has_aborted(status: ExitStatus) -> bool {
    std::os::unix::process::ExitStatusExt::signal(&status) == Some(6)
}

/// A failed test ends with code 101, an aborted one with a code of the system.
#[cfg(not(unix))]
fn has_aborted(status: ExitStatus) -> bool {
    !matches!(status.code(), Some(0 | 101))
}

/// Runs the task in a child; gives false in the parent.
fn was_child() -> bool {
    let Ok(task) = std::env::var(RUNNER) else { return false };
    let task: Task = serde_json::from_str(&task).unwrap();
    let is_off = seconds().abs_diff(task.now) / 1_800 > 0;
    assert_eq!(is_off, task.hours != 0, "the clock is not as it was to be");
    alone(task.run());
    true
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

/// The library of Debian's libfaketime, or the one in `EVERCORE_FAKETIME`. If there is none, prints that and gives
/// `None`; panics if `EVERCORE_REQUIRE` has `faketime`.
fn faketime() -> Option<PathBuf> {
    let known = ["x86_64", "aarch64"]
        .map(|machine| format!("/usr/lib/{machine}-linux-gnu/faketime/libfaketimeMT.so.1"));
    let named = std::env::var("EVERCORE_FAKETIME").ok();
    let found = named.into_iter().chain(known).map(PathBuf::from).find(|path| path.exists());
    if found.is_none() {
        eprintln!(
            "SKIPPED: runners by a wrong clock; there is no libfaketime (Debian: apt-get install libfaketime)"
        );
        let required = std::env::var("EVERCORE_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|name| name == "faketime"), "\"faketime\" is required");
    }
    found
}

/// Pauses and crashes in a thousand batches. A short run has more, because it might have none.
fn trouble() -> (u32, u32) {
    sized((80, 30), (50, 10))
}

fn events() -> i64 {
    sized(250, 10_000)
}

#[test]
fn at_least_once_six_runners_miss_nothing_and_no_cursor_goes_back() {
    let Some(trial) = Trial::of(Way::AtLeastOnce, events()) else { return };
    let tally = trial.run(&trial.task(trouble(), LEASE), None, IN_TIME);
    println!("at least once, 6 runners: {tally}");
    assert_eq!((tally.missed, tally.regressions), (0, 0));
    assert!(tally.hands > 0 && tally.pauses > 0, "nobody was disturbed");
}

#[test]
fn exactly_once_six_runners_miss_nothing_and_double_nothing() {
    let Some(trial) = Trial::of(Way::ExactlyOnce, events()) else { return };
    let tally = trial.run(&trial.task(trouble(), LEASE), None, IN_TIME);
    println!("exactly once, 6 runners: {tally}");
    assert_eq!((tally.missed, tally.doubled, tally.regressions), (0, 0, 0));
    assert!(tally.hands > 0 && tally.pauses > 0, "nobody was disturbed");
}

/// Shows what the tests above would find if the cursor were moved in the wrong way: by each runner that believes it
/// has the lease, by its own clock.
#[test]
fn without_a_fence_cursors_go_back_and_events_are_doubled() {
    let Some(trial) = Trial::of(Way::Unfenced, events()) else { return };
    let tally = trial.run(&trial.task((trouble().0, 0), LEASE), None, HOURS);
    println!("control, without a fence, 6 runners: {tally}");
    assert!(tally.regressions > 0 && tally.doubled > 0, "blind");
}

#[test]
fn six_processes_miss_nothing_and_double_nothing() {
    if was_child() {
        return;
    }
    for way in [Way::AtLeastOnce, Way::ExactlyOnce] {
        let Some(trial) = Trial::of(way, events()) else { return };
        let test = "runners::six_processes_miss_nothing_and_double_nothing";
        let tally = trial.run(&trial.task(trouble(), LEASE), Some(test), IN_TIME);
        println!("{way:?}, 6 processes: {tally}");
        assert_eq!((tally.missed, tally.regressions), (0, 0));
        assert!(way == Way::AtLeastOnce || tally.doubled == 0, "{} doubled", tally.doubled);
    }
}

/// Three of the six processes have a clock that is an hour wrong.
///
/// On PostgreSQL the server's clock counts, so no lease is stolen. On SQLite the engine uses the clock of the
/// machine, which all processes share; here they see different clocks, as after a jump. Leases then change hands too
/// early or too late. Still nothing may be missed or doubled, because every move names the epoch.
#[test]
fn six_processes_with_clocks_an_hour_off_miss_nothing_and_double_nothing() {
    if was_child() || faketime().is_none() {
        return;
    }
    let test = "runners::six_processes_with_clocks_an_hour_off_miss_nothing_and_double_nothing";
    for way in [Way::AtLeastOnce, Way::ExactlyOnce] {
        let mut hands = Vec::new();
        for hours in [IN_TIME, HOURS] {
            let Some(trial) = Trial::of(way, events()) else { return };
            let tally = trial.run(&trial.task(trouble(), LEASE), Some(test), hours);
            println!("{way:?}, 6 processes, clocks off by {hours:?} h: {tally}");
            assert_eq!((tally.missed, tally.regressions), (0, 0));
            assert!(way == Way::AtLeastOnce || tally.doubled == 0, "{} doubled", tally.doubled);
            hands.push(tally.hands);
        }
        if HAS_ONE_CLOCK {
            assert!(hands[1] <= 3 * hands[0] + 10, "leases were stolen: {hands:?}");
        }
    }
}

/// First all claim at once, and only one may get the lease. Then one after the other, with one claim for each start.
/// If all use the clock of a server, their own clocks are wrong.
#[test]
fn in_quiet_each_start_claims_once_whatever_its_clock() {
    if was_child() {
        return;
    }
    let are_off = HAS_ONE_CLOCK && faketime().is_some();
    let clocks = if are_off { HOURS } else { IN_TIME };
    let test = "runners::in_quiet_each_start_claims_once_whatever_its_clock";
    let lease = Duration::from_secs(10);
    let Some(trial) = Trial::of(Way::ExactlyOnce, events()) else { return };
    let at_once = trial.run(&trial.task((0, 0), lease), Some(test), clocks);
    println!("quiet, 6 processes at once, clocks off by {clocks:?} h: {at_once}");
    let early = alone(async {
        let ground = Ground::open(&trial.place.address).await;
        let claims = "SELECT count(*) FROM @moves WHERE epoch > old_epoch AND position < ";
        ground.rows::<1>(&format!("{claims}{}", trial.events)).await[0][0]
    });
    assert_eq!((at_once.missed, at_once.doubled, early), (0, 0, 1), "somebody stole the lease");

    let Some(mut trial) = Trial::of(Way::ExactlyOnce, 0) else { return };
    for hours in clocks {
        alone(async { write(&Ground::open(&trial.place.address).await.store(), 100).await });
        trial.events += 100;
        let task = Task { hours, ..trial.task((0, 0), lease) };
        assert!(!has_crashed_apart(&task, test));
    }
    let tally = trial.tally();
    println!("quiet, 6 processes one after the other, clocks off by {clocks:?} h: {tally}");
    assert_eq!((tally.missed, tally.doubled, tally.claims), (0, 0, RUNNERS as i64));
}

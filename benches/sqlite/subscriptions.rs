//! W7: from the commit to the handler. And a projection of the loan log from a cold start, exactly once.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use evercore_sqlite::engine::{Step, SubscriptionStorage};
use evercore_sqlite::{
    CursorId, EventCodec, EventStore, Json, PageLimit, Position, SqliteEngine, SubscriptionName,
};
use rusqlite::Connection;

use crate::application::{Application, ApplicationEvent};
use crate::floor::Floor;
use crate::{Bench, DEFAULT, counters, import, open};
use benches::{ROUNDS, append, compare, median};

/// Commits per round, and the pause between two: a live subscription with little to do.
const COMMITS: usize = 200;
const PAUSE: Duration = Duration::from_millis(2);

const MAKE: &str = "CREATE TABLE IF NOT EXISTS loan_kinds (day INTEGER, kind TEXT, events INTEGER NOT NULL,
                        PRIMARY KEY (day, kind)) STRICT, WITHOUT ROWID;
                    CREATE TABLE IF NOT EXISTS floor_cursor (position INTEGER NOT NULL) STRICT;";

const COUNT: &str =
    "INSERT INTO loan_kinds VALUES (?1, ?2, 1) ON CONFLICT (day, kind) DO UPDATE SET events = events + 1";

const READ: &str = "SELECT e.position, e.event_time, t.name, e.payload FROM events e
    JOIN event_types t ON t.id = e.event_type_id WHERE e.position > ?1 ORDER BY e.position LIMIT 1000";

const DAY: i64 = 86_400_000_000;

impl Bench {
    pub(crate) fn w7(&self) {
        if !self.wants("W7") {
            return;
        }
        let (mut ours, mut floors, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (floor, our) = (self.floor_delay(), self.our_delay());
            floors.push(floor);
            ours.push(our);
            ratios.push(our / floor);
        }
        let [ours, floor, ratio] = [ours, floors, ratios].map(median);
        println!("{:42} {ours:>12.0} {floor:>12.0} {ratio:>7.2}  <= 2", "W7 SQLite, µs to the handler, p50");
    }

    /// The median of the microseconds from the beginning of a commit to its handler.
    fn our_delay(&self) -> f64 {
        let store = self.store(DEFAULT);
        let mut counter = counters(&store, 1).remove(0);
        let (seen, handled) = mpsc::channel();
        let (stop, stopped) = futures_channel::oneshot::channel::<()>();
        let subscription = store.subscription("delay").unwrap();
        let runner = std::thread::spawn(move || {
            let shutdown = async move {
                let _ = stopped.await;
            };
            let run = subscription.run(shutdown, move |_| {
                seen.send(Instant::now()).unwrap();
                async { Ok(()) }
            });
            smol::block_on(run).unwrap();
        });
        let delay = delays(&handled, || smol::block_on(append(&store, &mut counter, 1)));
        drop(stop);
        runner.join().unwrap();
        delay
    }

    /// The floor: a condition variable and a prepared statement.
    fn floor_delay(&self) -> f64 {
        let path = self.path("floor");
        smol::block_on(open(&path, DEFAULT).close()).unwrap();
        let (writer, reader) = (Floor::open(&path, "FULL"), Floor::open(&path, "FULL"));
        writer.create(1, None);
        let head = Arc::new((Mutex::new(0_i64), Condvar::new()));
        let (seen, handled) = mpsc::channel();
        let theirs = Arc::clone(&head);
        let follower = std::thread::spawn(move || {
            let mut position = 0;
            while position < COMMITS as i64 {
                let (lock, bell) = &*theirs;
                drop(bell.wait_while(lock.lock().unwrap(), |head| *head <= position).unwrap());
                position += reader.read(position, 1_000).events;
                seen.send(Instant::now()).unwrap();
            }
        });
        let mut expected = 0;
        let delay = delays(&handled, || {
            writer.append(1, expected, 1);
            expected += 1;
            *head.0.lock().unwrap() = expected;
            head.1.notify_all();
        });
        follower.join().unwrap();
        delay
    }

    pub(crate) fn projection(&self) {
        if !self.wants("projection") {
            return;
        }
        let Some(log) = loan_log() else {
            println!("SKIPPED: projection needs the loan log; EVERCORE_LOAN_LOG says where it is");
            return;
        };
        let path = self.path("loan");
        let engine = open(&path, DEFAULT);
        let store = EventStore::new(engine.clone());
        smol::block_on(import::import(store.clone(), Some(&log))).unwrap();
        let events = smol::block_on(store.head()).unwrap();
        smol::block_on(engine.commit_with(store.begin(), |sql| Ok(sql.execute_batch(MAKE)?))).unwrap();
        let floor = Floor::open(&path, "FULL");
        floor.run("INSERT INTO floor_cursor VALUES (0)");
        let counted = |sql: &Connection| -> (i64, i64) {
            let sum = "SELECT count(*), ifnull(sum(events), 0) FROM loan_kinds";
            sql.query_row(sum, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
        };
        let expected = std::cell::Cell::new(None);
        let check = |floor: &Floor| {
            let found = counted(&floor.0);
            assert_eq!(found.1, events.get());
            assert_eq!(expected.replace(Some(found)).unwrap_or(found), found);
            floor.run("DELETE FROM loan_kinds");
        };
        compare(
            "projection SQLite, the loan log",
            "0.70",
            events.get(),
            |_| {
                smol::block_on(project(&engine, &store, events));
                check(&floor);
            },
            |_| {
                project_by_hand(&floor.0, events.get());
                check(&floor);
            },
        );
    }
}

/// The median delay of this many commits, one after the other.
fn delays(handled: &mpsc::Receiver<Instant>, mut commit: impl FnMut()) -> f64 {
    let mut delays = Vec::new();
    for _ in 0..COMMITS {
        std::thread::sleep(PAUSE);
        let began = Instant::now();
        commit();
        let seen = handled.recv_timeout(Duration::from_secs(10)).unwrap();
        delays.push(seen.duration_since(began).as_secs_f64() * 1e6);
    }
    median(delays)
}

async fn project(engine: &SqliteEngine, store: &EventStore, head: Position) {
    let projection = engine.projection(|sql, delivery| {
        let mut count = sql.prepare_cached(COUNT)?;
        for event in delivery.events() {
            event.decode::<Application>()?;
            count.execute((event.time().as_micros().div_euclid(DAY), event.event_type().as_str()))?;
        }
        Ok(())
    });
    let subscription = store.subscription("kinds").unwrap().with_batch(PageLimit::events(1_000).unwrap());
    let done = async {
        while store.wait_for_position(head, "kinds", Duration::from_secs(60)).await.is_err() {
            smol::Timer::after(Duration::from_millis(1)).await;
        }
    };
    subscription.run_sink(done, projection).await.unwrap();
    let id = CursorId { subscription: SubscriptionName::new("kinds").unwrap(), version: 1, partition: 0 };
    engine.step(&id, &Step::Remove).await.unwrap();
}

/// One transaction for each 1,000 events: read, decode, count, store the position.
fn project_by_hand(sql: &Connection, head: i64) {
    let mut position = 0;
    while position < head {
        sql.execute_batch("BEGIN IMMEDIATE").unwrap();
        let (mut read, mut count) = (sql.prepare_cached(READ).unwrap(), sql.prepare_cached(COUNT).unwrap());
        let mut rows = read.query([position]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            position = row.get(0).unwrap();
            let time: i64 = row.get(1).unwrap();
            let name = row.get_ref(2).unwrap().as_str().unwrap();
            let payload = row.get_ref(3).unwrap().as_blob().unwrap();
            let _: ApplicationEvent = Json::decode(name, payload).unwrap();
            count.execute((time.div_euclid(DAY), name)).unwrap();
        }
        sql.prepare_cached("UPDATE floor_cursor SET position = ?1").unwrap().execute([position]).unwrap();
        drop(rows);
        sql.execute_batch("COMMIT").unwrap();
    }
}

/// The path of the loan log, if it exists.
fn loan_log() -> Option<PathBuf> {
    let told = std::env::var_os("EVERCORE_LOAN_LOG").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/loan_applications.csv");
    told.or(Some(beside)).filter(|path| path.is_file())
}

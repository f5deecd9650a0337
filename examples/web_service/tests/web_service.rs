//! The example of a web service, used over HTTP on a free port, as by a browser.

#![allow(clippy::unwrap_used, reason = "a test says so by failing")]

use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use evercore_sqlite::{
    Aggregate, AggregateId, Error, ErrorKind, EventStore, Json, Result, Sequence, SqliteEngine,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

#[allow(dead_code)]
#[path = "../src/main.rs"]
mod web_service;

/// Shorter than the pause between two signs of life in live news.
const PATIENCE: Duration = Duration::from_secs(8);

/// The service, on a new store.
struct Service {
    runtime: tokio::runtime::Runtime,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<()>>,
    folder: tempfile::TempDir,
}

impl Service {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (stop, stopped) = oneshot::channel();
        let (address, served) = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let engine = SqliteEngine::open(folder.path().join("shows.db")).await.unwrap();
            let shutdown = async { drop(stopped.await) };
            (address, tokio::spawn(web_service::serve(engine, listener, shutdown)))
        });
        Self { runtime, address, stop, served, folder }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("shows.db")
    }

    /// HTTP 1.0: one request to a connection, and no chunks.
    fn open(&self, method: &str, path: &str, header: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.0\r\ncontent-type: application/json\r\n{header}\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
        stream
    }

    fn ask(&self, method: &str, path: &str, header: &str, body: &str) -> (u16, String) {
        let mut answer = String::new();
        self.open(method, path, header, body).read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn announce(&self, seats: u32) -> i64 {
        done(self.ask("PUT", "/shows/hamlet", "x: y", &format!("{{\"seats\": {seats}}}")))
    }

    fn book(&self, key: &str, seats: u32) -> (u16, String) {
        let key = format!("idempotency-key: {key}");
        self.ask("POST", "/shows/hamlet/bookings", &key, &format!("{{\"seats\": {seats}}}"))
    }

    fn free_after(&self, position: i64) -> i64 {
        let (status, body) = self.ask("GET", &format!("/shows/hamlet?after={position}"), "x: y", "");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str::<serde_json::Value>(&body).unwrap()["free"].as_i64().unwrap()
    }

    /// Live news, from the event after `last` on, or from now on.
    fn news(&self, last: Option<i64>) -> News {
        let header = last.map_or_else(|| "x: y".to_owned(), |last| format!("last-event-id: {last}"));
        let mut lines = BufReader::new(self.open("GET", "/news", &header, "")).lines();
        assert!(lines.next().unwrap().unwrap().contains(" 200 "));
        while !lines.next().unwrap().unwrap().is_empty() {} // the other headers
        let id = lines.next().unwrap().unwrap();
        News { begin: id.strip_prefix("id: ").unwrap().parse().unwrap(), lines }
    }

    fn stop(self) -> tempfile::TempDir {
        self.stop.send(()).unwrap();
        let ended = async { tokio::time::timeout(PATIENCE, self.served).await };
        self.runtime.block_on(ended).unwrap().unwrap().unwrap();
        self.folder
    }
}

/// The position in the answer to a command.
fn done((status, body): (u16, String)) -> i64 {
    assert_eq!(status, 200, "{body}");
    serde_json::from_str::<serde_json::Value>(&body).unwrap()["position"].as_i64().unwrap()
}

struct News {
    /// The id that came before all messages.
    begin: i64,
    lines: Lines<BufReader<TcpStream>>,
}

impl Iterator for News {
    type Item = (i64, String);

    /// The next message, its id and its data; `None` when the service has ended.
    fn next(&mut self) -> Option<Self::Item> {
        let mut id = None;
        loop {
            let line = self.lines.next()?.unwrap();
            if let Some(text) = line.strip_prefix("id: ") {
                id = Some(text.parse().unwrap());
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Some((id.unwrap(), data.to_owned()));
            }
        }
    }
}

#[test]
fn a_repeated_command_takes_effect_once() {
    let service = Service::start();
    service.announce(100);
    let at_once: Vec<i64> = std::thread::scope(|scope| {
        let send = || done(service.book("7f3a", 2));
        let sent: Vec<_> = (0..8).map(|_| scope.spawn(send)).collect();
        sent.into_iter().map(|sent| sent.join().unwrap()).collect()
    });
    assert_eq!(at_once, [2; 8]);
    assert_eq!(done(service.book("7f3a", 2)), 2);
    assert_eq!(service.free_after(2), 98);
    assert_eq!(done(service.book("7f3b", 2)), 3); // another key is another command
    assert_eq!(service.free_after(3), 96);
    assert_eq!(service.announce(100), 3); // nothing new
}

#[test]
fn who_has_written_reads_it() {
    let service = Service::start();
    let mut position = service.announce(100);
    for booked in 1..=100 {
        position = done(service.book(&booked.to_string(), 1));
        assert_eq!(service.free_after(position), 100 - booked);
    }
    assert_eq!(position, 101);
}

#[test]
fn errors_have_the_status_that_says_what_can_be_done() {
    let service = Service::start();
    service.announce(10);
    let (status, body) = service.book("1", 11);
    assert_eq!((status, body.as_str()), (422, r#"{"error":"only 10 seats are free"}"#));
    assert_eq!(service.ask("GET", "/shows/macbeth", "x: y", "").0, 404);
    let key = "idempotency-key: 2";
    assert_eq!(service.ask("POST", "/shows/macbeth/bookings", key, "{\"seats\": 1}").0, 404);
    assert_eq!(service.ask("POST", "/shows/hamlet/bookings", "x: y", "{\"seats\": 1}").0, 400);
    assert_eq!(service.ask("GET", "/shows/hamlet?after=-1", "x: y", "").0, 400);
    assert_eq!(service.ask("GET", "/shows/hamlet?after=99", "x: y", "").0, 503); // not in time
    assert_eq!(service.ask("GET", "/news", "last-event-id: 99", "").0, 410);
    let (one, two) = (Sequence::new(1).unwrap(), Sequence::new(2).unwrap());
    let conflict = Error::conflict(AggregateId::new(1).unwrap(), one, two);
    let status = |error: &Error| web_service::refused::status(error.kind()).as_u16();
    assert_eq!(status(&conflict), 409);
    assert_eq!(status(&Error::new(ErrorKind::Unavailable, "busy")), 503);
    assert_eq!(status(&Error::new(ErrorKind::Backend, "broken")), 500);
}

#[test]
fn live_news_go_on_where_they_were_cut_off() {
    let service = Service::start();
    service.announce(100);
    let mut news = service.news(None);
    for key in ["a", "b", "c"] {
        done(service.book(key, 1));
    }
    let first: Vec<_> = news.by_ref().take(3).collect();
    assert_eq!(first[0], (2, r#"{"show":1,"what":{"Booked":{"seats":1}}}"#.to_owned()));
    drop(news);
    for key in ["d", "e", "f", "g"] {
        done(service.book(key, 1));
    }
    let mut news = service.news(Some(first[2].0));
    for key in ["h", "i"] {
        done(service.book(key, 1));
    }
    let ids: Vec<i64> =
        first.iter().map(|(id, _)| *id).chain(news.by_ref().take(6).map(|(id, _)| id)).collect();
    assert_eq!(ids, (2..=10).collect::<Vec<_>>());
    drop(service.stop());
    assert_eq!(news.next(), None);
}

#[test]
fn live_news_that_were_cut_off_before_the_first_message_miss_nothing() {
    let service = Service::start();
    service.announce(100);
    let begin = service.news(None).begin;
    let missed = done(service.book("a", 1));
    assert_eq!(service.news(Some(begin)).next().unwrap().0, missed);
}

/// A show as another program writes it: the service cannot read its event.
#[derive(Clone, Default, Serialize, Deserialize)]
struct OddShow;

#[derive(Serialize, Deserialize)]
enum OddEvent {
    Announced { title: String },
}

impl Aggregate for OddShow {
    const TYPE: &'static str = "show";
    type Event = OddEvent;
    type Codec = Json;

    fn apply(&mut self, _: OddEvent) {}
}

#[test]
fn an_event_that_the_read_model_cannot_handle_ends_no_service() {
    let service = Service::start();
    let position = service.announce(100);
    assert_eq!(service.free_after(position), 100);
    assert_eq!(service.ask("GET", "/health", "x: y", "").0, 200);
    smol::block_on(async {
        let store = EventStore::new(SqliteEngine::open(service.file()).await.unwrap());
        let mut work = store.begin();
        let mut odd = work.load_or_create::<OddShow>("macbeth").await.unwrap();
        work.record(&mut odd, OddEvent::Announced { title: "Macbeth".to_owned() }).unwrap();
        work.commit().await.unwrap();
        store.close().await.unwrap();
    });
    let began = Instant::now();
    while service.ask("GET", "/health", "x: y", "").0 == 200 {
        assert!(began.elapsed() < PATIENCE, "nobody is told");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (status, told) = service.ask("GET", "/health", "x: y", "");
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!((status, told["failed_at"].as_i64()), (503, Some(2)));
    // By now all tries have failed.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(done(service.book("a", 1)), 3, "commands are answered on");
    assert_eq!(service.free_after(1), 100, "and so are readers that need nothing newer");
    drop(service.stop());
}

#[test]
fn the_lease_is_given_back_in_the_end() {
    let service = Service::start();
    let position = service.announce(100);
    assert_eq!(service.free_after(position), 100);
    let (news, file, began) = (service.news(None), service.file(), Instant::now());
    let folder = service.stop();
    assert!(began.elapsed() < Duration::from_secs(5), "open news hold nobody up");
    assert_eq!(news.count(), 0);
    smol::block_on(async {
        let store = EventStore::new(SqliteEngine::open(file).await.unwrap());
        let state = store.subscriptions().await.unwrap().remove(0);
        assert_eq!((state.is_owned, state.lag_events), (false, 0));
        assert_eq!(state.cursor.owner, None);
    });
    drop(folder);
}

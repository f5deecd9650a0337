//! A server with another language, sort order and other settings. The engine must give the same answers as the memory
//! engine, word for word.

use std::process::Command;
use std::sync::Arc;

use evercore_core::engine::{
    Append, Batch, Guard, History, KeyChange, KnownCommand, LoadRequest, NewAggregate, NewEvent, Payload,
    Snapshot, Target,
};
use evercore_memory::MemoryEngine;
use evercore_postgres::deadpool_postgres::{Manager, Pool};
use evercore_postgres::tokio_postgres::{self, NoTls};
use evercore_postgres::{
    AggregateId, AggregateType, CommandId, Direction, Event, EventStore, EventType, Filter, Key, LogQuery,
    Metadata, PageLimit, Position, PostgresEngine, Receipt, Result, Sequence, StorageEngine, Timestamp,
};
use evercore_testkit::postgres::Server;
use tokio::task::JoinSet;

use crate::log::Log;
use crate::tools::{Account, accounts, number, record};

/// Texts that fail if quoting, case, sorting or normal forms follow a locale.
const TEXTS: [&str; 34] = [
    "plain",
    "it's",
    "back\\slash",
    "\\'; DROP TABLE events; --",
    "\"quoted\"",
    "{curly,NULL}",
    "%s $1 ?",
    "a\nb\tc\r",
    "\u{1}\u{7f}",
    "STRASSE",
    "straße",
    "strasse",
    "é",
    "e\u{301}",
    "İ",
    "I",
    "i",
    "ı",
    "ﬁ",
    "fi",
    "日本",
    "😀",
    "a\u{200d}b",
    "\u{feff}a",
    " a",
    "a ",
    "a",
    "A",
    "ä",
    "NULL",
    "null",
    "\\x00",
    "\\N",
    "ǆ",
];

/// Settings of a database or a role that break a careless client.
const SETTINGS: [&str; 15] = [
    "standard_conforming_strings = off",
    "escape_string_warning = off",
    "timezone = 'Asia/Kathmandu'",
    "datestyle = 'German, DMY'",
    "intervalstyle = 'iso_8601'",
    "bytea_output = 'escape'",
    "extra_float_digits = -15",
    "array_nulls = off",
    "transform_null_equals = on",
    "quote_all_identifiers = on",
    "search_path = pg_catalog",
    "synchronous_commit = off",
    "default_transaction_deferrable = on",
    "jit_above_cost = 0",
    "plan_cache_mode = force_custom_plan",
];

#[tokio::test(flavor = "multi_thread")]
async fn foreign_settings_change_no_answer() {
    // Codes, because the language of messages is not known.
    let mut builder = Server::builder().language("de").setting("log_line_prefix", "%e ");
    let german = german_locale();
    if let Some(locale) = &german {
        builder = builder.initdb_arg(format!("--locale={locale}"));
    }
    let Some(server) = builder.start_or_skip() else { return };
    let surroundings = surroundings(&server, german.as_deref());
    let url = server.url_of("fremd").replace("evercore@", "fremd@");
    let expected = Scenario::play(&MemoryEngine::new()).await;
    for ((mode, engine), (_, other)) in engines(&url).await.into_iter().zip(engines(&url).await) {
        let found = Scenario::play(&engine).await;
        for (expected, found) in expected.iter().zip(&found) {
            assert_eq!(expected, found, "{mode}");
        }
        assert_eq!(expected.len(), found.len());
        many_at_once([&engine, &other]).await;
    }
    println!("foreign settings: {} answers as from memory, three times; {surroundings}", expected.len());
    let log = server.log();
    assert!(log.contains("22012"), "the division by zero is not in the log: nothing could be seen in it");
    assert!(!log.contains("40P01") && !log.contains("40001"), "{log}");
}

/// The operating system's name for it, if it has it.
fn german_locale() -> Option<String> {
    let output = Command::new("locale").arg("-a").output().ok()?;
    let names = String::from_utf8_lossy(&output.stdout).into_owned();
    names.lines().find(|name| name.to_lowercase().replace('-', "") == "de_de.utf8").map(str::to_owned)
}

/// Makes the database with all foreign settings that this machine has. Prints the missing ones.
fn surroundings(server: &Server, german: Option<&str>) -> String {
    let refusal = server.psql("postgres", "SELECT 1/0").unwrap_err();
    let language = if refusal.contains("FEHLER") { "German messages" } else { "no German messages here" };
    let locale = german.map_or("no German locale here".to_owned(), |name| format!("locale {name}"));
    server.psql("postgres", "CREATE ROLE fremd LOGIN").unwrap();
    let icu =
        server.create_database("fremd", "TEMPLATE template0 OWNER fremd LOCALE_PROVIDER icu ICU_LOCALE 'de'");
    let order = match icu {
        Ok(()) => "sorted by ICU as German",
        Err(_) => {
            server.create_database("fremd", "TEMPLATE template0 OWNER fremd").unwrap();
            "no ICU here"
        }
    };
    for setting in SETTINGS {
        server.psql("postgres", &format!("ALTER DATABASE fremd SET {setting}")).unwrap();
    }
    let role = "ALTER ROLE fremd SET default_transaction_isolation = serializable; \
                ALTER ROLE fremd SET client_encoding = 'LATIN1'; ALTER ROLE fremd SET statement_timeout = '1min'";
    server.psql("postgres", role).unwrap();
    format!("{language}, {locale}, {order}, {} settings", SETTINGS.len() + 3)
}

/// With the engine's own sessions, as with a pooler, and on a pool of the application.
async fn engines(url: &str) -> Vec<(&'static str, PostgresEngine)> {
    let builder = |schema| PostgresEngine::builder().schema(schema).unwrap();
    let config: tokio_postgres::Config = url.parse().unwrap();
    let pool = Pool::builder(Manager::new(config, NoTls)).max_size(6).build().unwrap();
    vec![
        ("direct", builder("direct").connect(url).await.unwrap()),
        ("pooler", builder("pooler").pooler(true).connect(url).await.unwrap()),
        ("handed in", builder("handed_in").with_pool(pool).await.unwrap()),
    ]
}

/// With serializable as default the server would abort most of these, although they are independent.
async fn many_at_once(engines: [&PostgresEngine; 2]) {
    let store = EventStore::new(engines[0].clone());
    let before = store.head().await.unwrap();
    let ids = accounts(&store, 6, number(0, 0)).await;
    let mut writers = JoinSet::new();
    for (writer, id) in (1..).zip(ids) {
        let engine = engines[writer % 2].clone();
        writers.spawn(async move {
            for nth in 0..10 {
                let number = number(writer, nth);
                let mut work = EventStore::new(engine.clone()).begin();
                let account = work.load::<Account>(id).await.unwrap();
                record(&mut work, &mut [account], number, 1);
                match nth % 2 {
                    0 => drop(work.commit().await.unwrap()),
                    _ => drop(engine.commit_with(work, |_| Box::pin(async { Ok(()) })).await.unwrap()),
                }
            }
        });
    }
    writers.join_all().await;
    assert_eq!(Log::read_after(&store, before).await.events(), 6 + 60);
}

/// The calls of an engine and its answers.
struct Scenario<'a> {
    engine: &'a dyn StorageEngine,
    answers: Vec<String>,
    /// The number of reserved ids; the ids themselves differ between engines.
    ids: i64,
}

impl<'a> Scenario<'a> {
    async fn play(engine: &'a dyn StorageEngine) -> Vec<String> {
        let mut scenario = Self { engine, answers: Vec::new(), ids: 0 };
        scenario.texts().await;
        scenario.refusals().await;
        scenario.commands().await;
        scenario.reading().await;
        scenario.answers
    }

    fn answer<T: std::fmt::Debug>(&mut self, what: &str, outcome: Result<T>) {
        let outcome = outcome.map_err(|error| error.kind().clone());
        self.answers.push(format!("{what}: {outcome:?}"));
    }

    async fn commit(&mut self, what: &str, batch: Batch) {
        let receipt = self.engine.commit(batch).await;
        self.answer(what, receipt.map(without_time));
    }

    fn id(&mut self) -> AggregateId {
        self.ids += 1;
        AggregateId::new(self.ids).unwrap()
    }

    /// Uses every text as key, name, header, reference and payload.
    async fn texts(&mut self) {
        for text in TEXTS {
            let id = self.id();
            let mut batch = made(id, "account", Some(text));
            batch.append(append(id, "account", 0, vec![event(text, text)])).unwrap();
            batch.snapshot(id, Snapshot { sequence: at(1), version: 3, state: payload(text) });
            batch.set_command(CommandId::new(text).unwrap(), None);
            self.commit(text, batch).await;
            let id = self.id();
            self.commit("the same key again", made(id, "account", Some(text))).await;
            let id = self.id();
            self.commit("the same key, another type", made(id, text, Some(text))).await;
        }
    }

    async fn refusals(&mut self) {
        let (a, b) = (self.id(), self.id());
        let mut batch = made(a, "user", Some("a"));
        batch.create(new(b, "user", Some("b"))).unwrap();
        batch.append(append(a, "user", 0, vec![event("Made", "1"), event("Made", "2")])).unwrap();
        self.commit("two users", batch).await;
        for expected in [0, 1, 3] {
            self.commit("stale or ahead", appended(a, "user", expected)).await;
        }
        self.commit("of another type", appended(a, "account", 2)).await;
        self.commit("of a type that is new", appended(a, "no such type", 2)).await;
        self.commit("nobody", appended(AggregateId::new(999_999).unwrap(), "user", 0)).await;
        let mut guarded = appended(a, "user", 2);
        guarded.guard(Guard { aggregate: b, expected: at(1) }).unwrap();
        self.commit("a stale guard", guarded).await;
        self.commit("an id in use", made(a, "user", None)).await;
        self.commit("a key of another", renamed(&[(a, "b")])).await;
        self.commit("a swap", renamed(&[(a, "b"), (b, "a")])).await;
        self.commit("a new key", renamed(&[(a, "Ä'\\")])).await;
        self.commit("a key set free", renamed(&[(b, "b")])).await;
    }

    async fn commands(&mut self) {
        let id = self.id();
        let mut first = made(id, "order", None);
        first.append(append(id, "order", 0, vec![event("Placed", "é\\'")])).unwrap();
        first.set_command(CommandId::new("it's \\ once").unwrap(), None);
        self.commit("a command", first.clone()).await;
        self.commit("the same again", first).await;
        let mut other = appended(id, "order", 1);
        other.set_command(CommandId::new("it's \\ once").unwrap(), None);
        self.commit("the same id for another", other.clone()).await;
        for name in ["it's \\ once", "never"] {
            let settled = self.engine.settle(&CommandId::new(name).unwrap()).await;
            self.answer("settled", settled.map(|receipt| receipt.map(without_time)));
            let known = self.engine.command(&CommandId::new(name).unwrap()).await;
            let receipt = known.map(|known| known.and_then(KnownCommand::into_receipt));
            self.answer("receipt", receipt.map(|receipt| receipt.map(without_time)));
        }
        other.set_command(CommandId::new("never").unwrap(), None);
        self.commit("settled as never", other).await;
    }

    async fn reading(&mut self) {
        for text in TEXTS {
            let key = Target::Key(AggregateType::new("account").unwrap(), Key::new(text).unwrap());
            let limit = PageLimit::default();
            let request = LoadRequest { target: key, snapshot: Some(3), up_to: Sequence::MAX, limit };
            let found = self.engine.load(request).await;
            self.answer(text, found.map(|found| found.map(|found| loaded(&found))));
            let filter = Filter::all().with_event_type(EventType::new(text).unwrap());
            let page = self.engine.read_log(&LogQuery::after(Position::ZERO).with_filter(filter)).await;
            self.answer(
                text,
                page.map(|page| {
                    (page.events.iter().map(|event| shown(&event)).collect::<Vec<_>>(), page.scanned)
                }),
            );
        }
        for query in [LogQuery::after(Position::ZERO), LogQuery::before(Position::MAX)] {
            let direction = query.direction == Direction::Forward;
            let page = self.engine.read_log(&query).await;
            let page = page.map(|page| {
                (page.events.iter().map(|event| shown(&event)).collect::<Vec<_>>(), page.scanned, page.head)
            });
            self.answer(if direction { "forward" } else { "backward" }, page);
        }
        let ahead = self.engine.read_log(&LogQuery::after(Position::new(9_999).unwrap())).await;
        self.answer("ahead", ahead.map(drop));
        let types = self.engine.types().await;
        self.answer("types", types);
        for time in [Timestamp::MIN, Timestamp::MAX] {
            let position = self.engine.position_at(time).await;
            self.answer("position at", position);
        }
    }
}

/// The parts that `Debug` does not show, too.
fn loaded(history: &History) -> String {
    let key = history.key.as_ref().map(Key::as_str);
    let kept = history.snapshot.as_ref().map(|kept| (kept.sequence, kept.version, kept.state.as_bytes()));
    format!("{} {} {key:?} {kept:?} {}", history.id, history.sequence, history.events.len())
}

/// All parts except `recorded_at`, which differs.
fn without_time(receipt: Receipt) -> (Position, Position, Vec<(AggregateId, Sequence)>) {
    (receipt.first, receipt.last, receipt.aggregates)
}

fn shown(event: &Event) -> String {
    let (aggregate_type, event_type) = (event.aggregate_type(), event.event_type());
    let texts = (event.reference(), event.correlation_id(), event.causation_id(), event.headers());
    format!(
        "{} {} {aggregate_type} {} {event_type} {} {:?} {texts:?}",
        event.position(),
        event.aggregate(),
        event.sequence(),
        event.time().as_micros(),
        event.payload()
    )
}

fn at(sequence: i64) -> Sequence {
    Sequence::new(sequence).unwrap()
}

fn payload(text: &str) -> Payload {
    Payload::new([text.as_bytes(), &[0, 255, b'\\']].concat()).unwrap()
}

fn new(id: AggregateId, of_type: &str, key: Option<&str>) -> NewAggregate {
    let key = key.map(|key| Key::new(key).unwrap());
    NewAggregate { id, aggregate_type: AggregateType::new(of_type).unwrap(), key }
}

fn made(id: AggregateId, of_type: &str, key: Option<&str>) -> Batch {
    let mut batch = Batch::new();
    batch.create(new(id, of_type, key)).unwrap();
    batch
}

fn event(name: &str, text: &str) -> NewEvent {
    let metadata = Metadata::new().with_reference(text).unwrap().with_correlation_id(text).unwrap();
    let metadata = metadata.with_causation_id(text).unwrap().with_header(text, text).unwrap();
    NewEvent {
        event_type: EventType::new(name).unwrap(),
        payload: payload(text),
        time: Timestamp::from_micros(-1_234_567_890_123_457 + i64::try_from(text.len()).unwrap()).unwrap(),
        metadata: Arc::new(metadata),
    }
}

fn append(aggregate: AggregateId, of_type: &str, expected: i64, events: Vec<NewEvent>) -> Append {
    Append { aggregate, aggregate_type: AggregateType::new(of_type).unwrap(), expected: at(expected), events }
}

fn appended(id: AggregateId, of_type: &str, expected: i64) -> Batch {
    let mut batch = Batch::new();
    batch.append(append(id, of_type, expected, vec![event("Made", "ß")])).unwrap();
    batch
}

fn renamed(keys: &[(AggregateId, &str)]) -> Batch {
    let mut batch = Batch::new();
    for (aggregate, key) in keys {
        let (aggregate_type, key) = (AggregateType::new("user").unwrap(), Key::new(key).unwrap());
        batch.change_key(KeyChange { aggregate: *aggregate, aggregate_type, key }).unwrap();
    }
    batch
}

//! The servers, proxies and poolers of the testkit work as documented.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use evercore_testkit::postgres::{self, Cut, PgBouncer, Proxy, Server, Trigger};

fn server() -> Option<Server> {
    Server::builder().start_or_skip()
}

fn psql(server: &Server, sql: &str) -> String {
    server.psql("postgres", sql).unwrap()
}

/// A shared server for harmless tests, because a start takes a second.
fn unharmed() -> Option<&'static Server> {
    static SERVER: OnceLock<Option<Server>> = OnceLock::new();
    SERVER.get_or_init(server).as_ref()
}

fn skipped(what: &str) {
    // Not hidden by the capture of test output.
    let mut stderr = std::io::stderr();
    writeln!(stderr, "SKIPPED: {what}").unwrap();
}

fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(15);
    while !is_so() {
        assert!(Instant::now() < end, "not within 15 seconds: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_was_committed_survives_a_crash() {
    let Some(server) = Server::builder().durable(true).start_or_skip() else { return };
    assert_eq!(psql(&server, "SELECT 1"), "1");
    assert_eq!(psql(&server, "SHOW fsync"), "on");
    psql(&server, "CREATE TABLE t AS SELECT 17 AS number");
    server.kill();
    assert!(server.psql("postgres", "SELECT 1").is_err());
    server.start_again().unwrap();
    assert_eq!(psql(&server, "SELECT number FROM t"), "17");
    assert!(server.log().contains("not properly shut down"), "{}", server.log());
    server.restart().unwrap();
    assert_eq!(psql(&server, "SELECT number FROM t"), "17");
}

#[test]
fn a_crash_is_one_for_clients_too_and_may_be_the_last_thing_that_happens() {
    let Some(server) = server() else { return };
    let url = server.url();
    // Busy, so that it does not notice the end of the others.
    let busy = "SELECT count(*) FROM generate_series(1, 1000000) a, generate_series(1, 1000000) b";
    let client = thread::spawn(move || postgres::psql(&url, busy));
    soon("the client is at work", || {
        psql(
            &server,
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%count(*) FROM gen%(1, 1000000) b'",
        ) == "1"
    });
    server.kill();
    client.join().unwrap().unwrap_err();
    let folder = server.folder().to_owned();
    drop(server);
    assert!(!folder.exists());
}

#[test]
fn settings_reach_the_server() {
    let server = Server::builder()
        .setting("work_mem", "7MB")
        .setting("application_name", "it's ours")
        .initdb_arg("--locale=C.UTF-8")
        .initdb_arg("--data-checksums")
        .start_or_skip();
    let Some(server) = server else { return };
    assert_eq!(psql(&server, "SHOW work_mem; SHOW data_checksums; SHOW fsync"), "7MB\non\noff");
    assert_eq!(psql(&server, "SHOW synchronous_commit; SHOW max_connections"), "on\n200");
    assert_eq!(psql(&server, "SELECT reset_val FROM pg_settings WHERE name = 'lc_messages'"), "C.UTF-8");
    assert!(psql(&server, "SHOW server_version").starts_with(&server.version()));
}

#[test]
fn a_server_speaks_another_language() {
    let Some(server) = Server::builder().language("de").start_or_skip() else { return };
    let error = server.psql("postgres", "SELECT 1/0").unwrap_err();
    if error.contains("division by zero") {
        return skipped("this package of PostgreSQL has no German");
    }
    assert!(error.contains("Division durch Null"), "{error}");
}

#[test]
fn what_fails_is_said() {
    let Some(server) = unharmed() else { return };
    let error = server.psql("postgres", "SELECT 1/0; SELECT 2").unwrap_err();
    assert!(error.contains("division by zero"), "{error}");
    let error = Server::builder().setting("no_such_setting", "1").start().unwrap_err();
    assert!(error.contains("no_such_setting"), "{error}");
    let error = Server::builder().binaries("/no/such/folder").start().unwrap_err();
    assert!(error.contains("/no/such/folder"), "{error}");
    server.start_again().unwrap_err();
    assert_eq!(psql(server, "SELECT 1"), "1");
}

#[test]
fn two_servers_know_nothing_of_each_other_and_a_dump_goes_from_one_to_the_other() {
    let (Some(one), Some(other)) = (server(), server()) else { return };
    one.create_database("be\"fore", "").unwrap();
    one.psql("be\"fore", "CREATE TABLE t AS SELECT n, 'ü|' || n AS text FROM generate_series(1, 3) n")
        .unwrap();
    other.psql("be\"fore", "SELECT 1").unwrap_err();
    let dump = match one.dump("be\"fore") {
        Err(error) if error.contains("version mismatch") || error.contains("could not be run") => {
            return skipped(&format!("dump and restore: {error}"));
        }
        dump => dump.unwrap(),
    };
    other.create_database("after", "TEMPLATE template0 LOCALE 'C.UTF-8'").unwrap();
    other.restore("after", &dump).unwrap();
    assert_eq!(other.psql("after", "TABLE t ORDER BY n").unwrap(), "1|ü|1\n2|ü|2\n3|ü|3");
}

#[test]
fn a_standby_follows_until_it_is_promoted() {
    let Some(server) = server() else { return };
    psql(&server, "CREATE TABLE t AS SELECT 1 AS number");
    let standby = match server.standby() {
        // `pg_basebackup` is missing, or older than the server.
        Err(error) if error.contains("could not be run") || error.contains("incompatible server version") => {
            return skipped(&format!("standby: {error}"));
        }
        standby => standby.unwrap(),
    };
    psql(&server, "INSERT INTO t VALUES (2)");
    soon("the standby has the row", || psql(&standby, "SELECT count(*) FROM t") == "2");
    let error = standby.psql("postgres", "INSERT INTO t VALUES (3)").unwrap_err();
    assert!(error.contains("read-only transaction"), "{error}");
    server.kill();
    standby.promote().unwrap();
    psql(&standby, "INSERT INTO t VALUES (3)");
    assert_eq!(psql(&standby, "SELECT count(*) FROM t"), "3");
    standby.promote().unwrap_err();
}

#[test]
fn the_shared_server_is_one() {
    let Some(url) = postgres::shared_url() else { return };
    assert_eq!(postgres::shared_url(), Some(url.clone()));
    assert_eq!(postgres::psql(&url, "SELECT 1").unwrap(), "1");
}

#[test]
fn tls_is_spoken_with_a_certificate_that_can_be_verified() {
    if unharmed().is_none() {
        return;
    }
    let server = match Server::builder().tls().start() {
        // `openssl` is missing, or the server was built without TLS, as in some packages.
        Err(error) if error.contains("could not be run") || error.contains("not supported by this build") => {
            return skipped(&format!("TLS: {error}"));
        }
        server => server.unwrap(),
    };
    let question = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let ca_file = server.ca_file();
    for host in ["localhost", "127.0.0.1"] {
        let url = format!("postgres://evercore@{host}:{}/postgres?sslmode=verify-full", server.port());
        let answer = postgres::psql(&format!("{url}&sslrootcert={}", ca_file.display()), question);
        assert_eq!(answer.unwrap(), "t", "{host}");
        postgres::psql(&url, question).unwrap_err();
    }
    assert_eq!(postgres::psql(&format!("{}?sslmode=disable", server.url()), question).unwrap(), "f");
    let proxy = Proxy::start(server.port()).unwrap();
    proxy.cut_next(Cut::Before, Trigger::request());
    let url = format!("{}?sslmode=require", proxy.url(&server.url()));
    assert_eq!(postgres::psql(&url, question).unwrap(), "t", "what is encrypted passes");
    assert_eq!(proxy.cuts(), 0);
}

#[test]
fn pgbouncer_passes_statements_and_refuses_unknown_startup_parameters() {
    let Some(server) = unharmed() else { return };
    let Some(pgbouncer) = PgBouncer::start(server, "transaction").unwrap() else {
        return skipped("pgbouncer is not there");
    };
    assert_eq!(postgres::psql(&pgbouncer.url(), "SELECT 1").unwrap(), "1");
    server.create_database("other", "").unwrap();
    assert_eq!(postgres::psql(&pgbouncer.url_of("other"), "SELECT current_database()").unwrap(), "other");
    let with_option = format!("{}?options=-cwork_mem%3D7MB", pgbouncer.url());
    let error = postgres::psql(&with_option, "SELECT 1").unwrap_err();
    assert!(error.contains("unsupported startup parameter"), "{error}");
    let settings = [("ignore_startup_parameters", "options")];
    let tolerant = PgBouncer::start_with(server, "session", &settings).unwrap().unwrap();
    assert_eq!(postgres::psql(&tolerant.url_of("other"), "SELECT 1").unwrap(), "1");
    let error = PgBouncer::start(server, "no_such_mode").unwrap_err();
    assert!(error.contains("no_such_mode"), "{error}");
}

#[test]
fn a_proxy_passes_what_it_gets_and_takes_its_time() {
    let Some(server) = unharmed() else { return };
    let proxy = Proxy::start(server.port()).unwrap();
    let url = proxy.url(&server.url());
    assert_eq!(url, format!("postgres://evercore@127.0.0.1:{}/postgres", proxy.port()));
    assert_eq!(postgres::psql(&url, "SELECT 1").unwrap(), "1");

    proxy.set_delay(Duration::from_millis(40));
    let start = Instant::now();
    assert_eq!(postgres::psql(&url, "SELECT 1").unwrap(), "1");
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(160), "start and query are two round trips: {took:?}");

    let start = Instant::now();
    let all = postgres::psql(&url, "SELECT repeat('x', 1000) FROM generate_series(1, 30000)").unwrap();
    assert_eq!(all.len(), 30_000 * 1001 - 1);
    let took = start.elapsed();
    assert!(
        took < Duration::from_secs(5),
        "460 chunks of 40 ms, had each waited for the one before: {took:?}"
    );
}

#[test]
fn a_proxy_cuts_around_a_request() {
    let Some(server) = unharmed() else { return };
    psql(server, "CREATE TABLE cut (number int)");
    let proxy = Proxy::start(server.port()).unwrap();
    let url = proxy.url(&server.url());
    for (count, cut) in (1..).zip([Cut::Before, Cut::During, Cut::AfterReply]) {
        proxy.cut_next(cut, Trigger::request_with(format!("VALUES ({count})")));
        let insert = |number| postgres::psql(&url, &format!("INSERT INTO cut VALUES ({number})"));
        insert(0).unwrap();
        assert_eq!(proxy.cuts(), count - 1, "{cut:?}");
        insert(count).unwrap_err();
        assert_eq!(proxy.cuts(), count, "{cut:?}");
        if cut == Cut::During {
            soon("it has taken effect", || psql(server, "SELECT count(*) FROM cut WHERE number = 2") == "1");
        }
        insert(count).unwrap();
    }
    let counts = "SELECT number, count(*) FROM cut WHERE number > 0 GROUP BY number ORDER BY number";
    assert_eq!(psql(server, counts), "1|1\n2|2\n3|2");

    proxy.cut_next(Cut::During, Trigger::request());
    let start = Instant::now();
    postgres::psql(&url, "SELECT pg_sleep(8)").unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(6), "the cut does not wait for the reply");
    proxy.cut_next(Cut::Before, Trigger::bytes("evercore"));
    postgres::psql(&url, "SELECT 'evercore'").unwrap_err();
}

#[test]
fn a_proxy_passes_what_it_does_not_understand() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let proxy = Proxy::start(listener.local_addr().unwrap().port()).unwrap();
    proxy.cut_next(Cut::Before, Trigger::bytes(""));
    let mut client = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
    // As a client of PostgreSQL 17 that begins with TLS.
    for ours in [b"\x16hello", b"Q world"] as [&[u8]; 2] {
        client.write_all(ours).unwrap();
    }
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut arrived = [0; 13];
    server.read_exact(&mut arrived).unwrap();
    assert_eq!(&arrived, b"\x16helloQ world");
    server.write_all(b"short").unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "short");
}

#[test]
fn a_proxy_cuts_around_one_of_several_requests_under_way() {
    let Some(server) = unharmed() else { return };
    psql(server, "CREATE TABLE numbers (number int)");
    let proxy = Proxy::start(server.port()).unwrap();
    for delay in [0, 5] {
        proxy.set_delay(Duration::from_millis(delay));
        for cut in [Cut::Before, Cut::During, Cut::AfterReply] {
            psql(server, "TRUNCATE numbers");
            proxy.cut_next(cut, Trigger::request_with("number 12"));
            let mut client = Client::connect(proxy.port());
            client.send(&[insert(11), insert(12), insert(13)].concat());
            let replies = client.replies_until_the_end();
            soon("the session has ended", || {
                let others = "FROM pg_stat_activity WHERE application_name = 'evercore-pipeline'";
                psql(server, &format!("SELECT count(*) {others}")) == "0"
            });
            let numbers = psql(server, "TABLE numbers ORDER BY number");
            match cut {
                // The server may notice the cut between two requests.
                Cut::Before => assert!(["", "11"].contains(&&*numbers), "{numbers}"),
                Cut::During => assert!(["", "11", "11\n12"].contains(&&*numbers), "{numbers}"),
                Cut::AfterReply => assert_eq!((replies, &*numbers), (1, "11\n12")),
            }
            assert!(replies <= 1, "{cut:?}: {replies}");
        }
    }
    assert_eq!(proxy.cuts(), 6);
}

#[test]
fn a_proxy_closes_what_is_open_and_refuses_what_is_new() {
    let Some(server) = server() else { return };
    let proxy = Proxy::start(server.port()).unwrap();
    let clients = [Client::connect(proxy.port()), Client::connect(proxy.port())];
    proxy.cut_all();
    for mut client in clients {
        assert_eq!(client.replies_until_the_end(), 0);
    }
    proxy.refuse(true);
    postgres::psql(&proxy.url(&server.url()), "SELECT 1").unwrap_err();
    proxy.refuse(false);
    assert_eq!(postgres::psql(&proxy.url(&server.url()), "SELECT 1").unwrap(), "1");
    let mut client = Client::connect(proxy.port());
    proxy.set_delay(Duration::from_secs(3600));
    client.send(&insert(1));
    drop(proxy);
    assert_eq!(client.replies_until_the_end(), 0);
    server.stop().unwrap();
    let proxy = Proxy::start(server.port()).unwrap();
    postgres::psql(&proxy.url(&server.url()), "SELECT 1").unwrap_err();
}

const KILLED: &str = "EVERCORE_TEST_IS_KILLED";

#[test]
fn nothing_stays_behind_when_the_process_is_killed() {
    if unharmed().is_none() {
        return;
    }
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "a_process_that_is_killed", "--nocapture"])
        .env(KILLED, "yes")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
    let port = lines.find_map(|line| line.split_once("port: ")?.1.parse::<u16>().ok()).unwrap();
    let folders: Vec<String> =
        lines.by_ref().filter_map(|line| Some(line.split_once("folder: ")?.1.to_owned())).take(2).collect();
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    process.kill().unwrap();
    process.wait().unwrap();
    soon("the server is gone", || TcpStream::connect(("127.0.0.1", port)).is_err());
    for folder in folders {
        soon("the folder is gone", || !Path::new(&folder).exists());
    }
}

#[test]
#[ignore = "started, and killed, by the test above"]
fn a_process_that_is_killed() {
    if std::env::var_os(KILLED).is_none() {
        return;
    }
    let server = Server::start().unwrap();
    let stopped = Server::start().unwrap();
    stopped.stop().unwrap();
    println!("\nport: {}", server.port());
    println!("folder: {}\nfolder: {}", server.folder().display(), stopped.folder().display());
    thread::sleep(Duration::from_secs(60));
}

/// A client that sends given messages and counts replies.
struct Client(TcpStream);

impl Client {
    fn connect(port: u16) -> Self {
        let mut client = Self(TcpStream::connect(("127.0.0.1", port)).unwrap());
        client.0.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.send(&message(
            None,
            b"\0\x03\0\0user\0evercore\0database\0postgres\0application_name\0evercore-pipeline\0\0",
        ));
        while client.next_kind() != Some(b'Z') {}
        client
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn replies_until_the_end(&mut self) -> usize {
        std::iter::from_fn(|| self.next_kind()).filter(|kind| *kind == b'Z').count()
    }

    fn next_kind(&mut self) -> Option<u8> {
        let mut head = [0; 5];
        self.0.read_exact(&mut head).ok()?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        self.0.read_exact(&mut vec![0; length - 4]).ok()?;
        Some(head[0])
    }
}

fn message(kind: Option<u8>, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    kind.into_iter().chain(length).chain(body.iter().copied()).collect()
}

/// Parse, Bind, Execute and Sync; the number is a parameter.
fn insert(number: u8) -> Vec<u8> {
    let parameter = format!("number {number}");
    let mut bind = b"\0\0\0\0\0\x01".to_vec();
    bind.extend(u32::try_from(parameter.len()).unwrap().to_be_bytes());
    bind.extend(parameter.as_bytes());
    bind.extend(b"\0\0");
    [
        message(Some(b'P'), b"\0INSERT INTO numbers VALUES (split_part($1, ' ', 2)::int)\0\0\0"),
        message(Some(b'B'), &bind),
        message(Some(b'E'), b"\0\0\0\0\0"),
        message(Some(b'S'), b""),
    ]
    .concat()
}

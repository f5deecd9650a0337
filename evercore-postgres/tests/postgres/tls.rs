//! TLS to a real server: verified or refused. Passwords are never shown.

#![cfg(feature = "rustls")]

use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use evercore_postgres::{Error, ErrorKind, EventStore, Position, PostgresEngine, StorageEngine};
use evercore_testkit::postgres::Server;

use crate::common::{Place, block_on};
use crate::orders::{all_of, place, skipped, soon};

/// One server with TLS for all tests of this file.
fn server() -> Option<&'static Server> {
    static SERVER: OnceLock<Option<Server>> = OnceLock::new();
    let start = || match Server::builder().tls().start() {
        Ok(server) => Some(server),
        Err(error) if error.contains("no PostgreSQL server binaries") => Server::builder().start_or_skip(),
        // `openssl` is missing, or the server was built without TLS, as in some packages.
        Err(error) if error.contains("could not be run") || error.contains("not supported by this build") => {
            skipped(&format!("TLS: {error}"));
            None
        }
        Err(error) => panic!("{error}"),
    };
    SERVER.get_or_init(start).as_ref()
}

/// The server's URL with another user and host, and its authority as trusted.
fn url(server: &Server, user: &str, host: &str) -> String {
    let ca_file = server.ca_file();
    format!("postgres://{user}@{host}:{}/postgres?sslrootcert={}", server.port(), ca_file.display())
}

/// Which connections of this name are encrypted, as the server reports.
fn encrypted(server: &Server, application: &str) -> String {
    let sql = format!(
        "SELECT coalesce(string_agg(DISTINCT s.ssl::text, ' '), '') FROM pg_stat_ssl s \
         JOIN pg_stat_activity a USING (pid) WHERE a.application_name = '{application}'"
    );
    server.psql("postgres", &sql).unwrap()
}

/// Uses the engine until it has a connection that listens.
async fn use_it(engine: &PostgresEngine) {
    let store = EventStore::new(engine.clone());
    let first = place(&store, "first").await.unwrap();
    engine.wait(first.last, Duration::from_millis(100)).await.unwrap();
    assert!(store.head().await.unwrap() > Position::ZERO);
}

/// An authority that has signed nothing in these tests.
fn another_authority(folder: &Path) -> PathBuf {
    let file = folder.join("other.crt");
    let made = Command::new("openssl")
        .args(["req", "-x509", "-days", "2", "-subj", "/CN=somebody-else", "-newkey", "ec", "-nodes"])
        .args(["-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", "other.key", "-out", "other.crt"])
        .current_dir(folder)
        .output();
    assert!(made.unwrap().status.success());
    file
}

/// Asserts that it is refused soon, and with an error that a retry does not help.
async fn refused(place: &Place, url: &str) -> Error {
    let began = Instant::now();
    let error = place.builder().connect(url).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(3), "{url}: {:?}", began.elapsed());
    assert_eq!(error.kind(), &ErrorKind::Backend, "{url}: {}", all_of(&error));
    assert!(!error.is_retryable());
    error
}

/// An address of this machine other than the loopback, at which local ports can be reached.
fn remote(port: u16) -> Option<String> {
    // Nothing is sent; this only asks the system for the route.
    let address = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.77:9")?;
        Ok(socket.local_addr()?.ip())
    });
    let Ok(address @ IpAddr::V4(_)) = address else {
        skipped("a remote host: this machine has no address but the loopback");
        return None;
    };
    let listener = TcpListener::bind((address, 0)).unwrap();
    let here = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
            for (mut from, mut to) in
                [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)]
            {
                thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Write);
                });
            }
        }
    });
    Some(here.to_string())
}

#[test]
fn a_verified_connection_is_encrypted_and_so_is_the_one_that_listens() {
    block_on(async {
        let Some(server) = server() else { return };
        for (n, host) in ["127.0.0.1", "localhost"].into_iter().enumerate() {
            let name = format!("verified_{n}");
            let place = Place::on(format!(
                "{}&sslmode=verify-full&application_name={name}",
                url(server, "evercore", host)
            ));
            let engine = place.engine().await;
            use_it(&engine).await;
            assert_eq!(encrypted(server, &name), "true");
            let by_builder = server.url().replace("127.0.0.1", host);
            let by_builder = format!("{by_builder}?sslmode=require&application_name={name}_builder");
            let engine =
                place.builder().root_certificate(server.ca_file()).connect(&by_builder).await.unwrap();
            assert_eq!(encrypted(server, &format!("{name}_builder")), "true");
            drop(engine);
        }
        // For this computer plain text is enough, unless the URL asks for more.
        let place = Place::on(format!("{}&application_name=local", url(server, "evercore", "127.0.0.1")));
        let engine = place.engine().await;
        assert_eq!(encrypted(server, "local"), "false");
        drop(engine);
    });
}

#[test]
fn a_certificate_of_another_authority_or_for_another_host_is_refused() {
    block_on(async {
        let Some(server) = server() else { return };
        let folder = tempfile::tempdir().unwrap();
        let place = Place::on(server.url());
        for mode in ["require", "verify-ca", "verify-full"] {
            let other = another_authority(folder.path());
            let url = format!("{}?sslmode={mode}&sslrootcert={}", server.url(), other.display());
            let error = refused(&place, &url).await;
            assert!(all_of(&error).contains("UnknownIssuer"), "{}", all_of(&error));
        }
        let elsewhere = format!("{}&hostaddr=127.0.0.1", url(server, "evercore", "db.example.org"));
        let error = refused(&place, &elsewhere).await;
        assert!(all_of(&error).contains("NotValidForName"), "{}", all_of(&error));
        let missing = format!("{}?sslmode=verify-full&sslrootcert=/no/such/file", server.url());
        refused(&place, &missing).await;
        // The authorities of the system do not know this server.
        refused(&place, &format!("{}?sslmode=verify-full", server.url())).await;
    });
}

#[test]
fn a_remote_host_is_encrypted_unless_plain_text_is_asked_for_by_name() {
    block_on(async {
        let Some(server) = server() else { return };
        let Some(address) = remote(server.port()) else { return };
        let (host, port) = address.split_once(':').unwrap();
        let ca_file = server.ca_file();
        // By its name, which the certificate is for. Its address is not one of this computer.
        let named = |name: &str| {
            format!(
                "postgres://evercore@localhost:{port}/postgres?hostaddr={host}&application_name={name}&sslrootcert={}",
                ca_file.display()
            )
        };
        for weaker in ["", "&sslmode=prefer", "&sslmode=allow"] {
            let place = Place::on(named("remote") + weaker);
            let engine = place.engine().await;
            use_it(&engine).await;
            assert_eq!(encrypted(server, "remote"), "true", "{weaker}");
            engine.close().await.unwrap();
            drop(engine);
            soon("its connections are gone", async || encrypted(server, "remote").is_empty()).await;
        }
        // By its address, which the certificate does not cover.
        let place = Place::on(server.url());
        let bare = format!("postgres://evercore@{address}/postgres?application_name=bare");
        refused(&place, &format!("{bare}&sslrootcert={}", ca_file.display())).await;
        refused(&place, &bare).await;
        let engine = place.builder().plain_text().connect(&bare).await.unwrap();
        assert_eq!(encrypted(server, "bare"), "false");
        drop(engine);
        place.builder().connect(&format!("{bare}&sslmode=disable")).await.unwrap();
    });
}

#[test]
fn a_remote_server_that_speaks_no_tls_is_refused() {
    block_on(async {
        let Some(place) = Place::fresh() else { return };
        if std::env::var_os("EVERCORE_POSTGRES_URL").is_some() {
            return skipped("a server without TLS: this one is not ours");
        }
        let port = place.url.rsplit(':').next().unwrap().trim_end_matches("/postgres").parse().unwrap();
        let Some(address) = remote(port) else { return };
        let url = format!("postgres://evercore@{address}/postgres");
        let error = refused(&place, &url).await;
        assert!(all_of(&error).contains("does not support TLS"), "{}", all_of(&error));
        place.builder().plain_text().connect(&url).await.unwrap();
    });
}

const PASSWORD: &str = "correct horse %26 battery";
const WRONG: &str = "hunter2-is-wrong";

/// Roles with a password, one over TLS only and one over any connection; other roles are unchanged.
fn with_passwords(server: &Server) {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| {
        let roles = "SET password_encryption = 'scram-sha-256';
                     CREATE ROLE careful LOGIN SUPERUSER PASSWORD 'correct horse & battery';
                     CREATE ROLE relaxed LOGIN SUPERUSER PASSWORD 'correct horse & battery'";
        server.psql("postgres", roles).unwrap();
        let file = server.psql("postgres", "SHOW hba_file").unwrap();
        let lines = "hostssl all careful all scram-sha-256\nhost all careful all reject\nhost all relaxed all scram-sha-256\n";
        let rest = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, lines.to_owned() + &rest).unwrap();
        server.psql("postgres", "SELECT pg_reload_conf()").unwrap();
    });
}

#[test]
fn a_password_is_asked_for_by_scram_in_plain_text_and_over_tls() {
    block_on(async {
        let Some(server) = server() else { return };
        with_passwords(server);
        let password = PASSWORD.replace(' ', "%20");
        let careful = url(server, &format!("careful:{password}"), "localhost");
        soon("the file was read again", async || {
            PostgresEngine::connect(&url(server, "relaxed", "127.0.0.1")).await.is_err()
        })
        .await;
        for binding in ["prefer", "require", "disable"] {
            let place = Place::on(format!("{careful}&sslmode=verify-full&channel_binding={binding}"));
            use_it(&place.engine().await).await;
        }
        let relaxed = Place::on(url(server, &format!("relaxed:{password}"), "127.0.0.1"));
        use_it(&relaxed.engine().await).await;
        let error = refused(&relaxed, &careful.replace("localhost", "127.0.0.1")).await;
        assert!(error.to_string().contains("28000"), "{error}");
    });
}

#[test]
fn a_password_is_never_shown() {
    block_on(async {
        let Some(server) = server() else { return };
        with_passwords(server);
        let shows = |text: &str| {
            [WRONG, "correct horse", "correct%20horse", "battery"].iter().any(|it| text.contains(it))
        };
        let wrong = url(server, &format!("relaxed:{WRONG}"), "127.0.0.1");
        soon("the file was read again", async || PostgresEngine::connect(&wrong).await.is_err()).await;
        let place = Place::on(server.url());
        for url in [wrong.clone(), format!("{}&sslmode=verify-full", wrong.replace("127.0.0.1", "localhost"))]
        {
            for builder in [place.builder(), place.builder().pooler(true)] {
                let error = builder.connect(&url).await.unwrap_err();
                assert_eq!(error.kind(), &ErrorKind::Backend, "{}", all_of(&error));
                assert_eq!(error.to_string(), "the server refused the login (SQLSTATE 28P01)");
                assert!(!shows(&all_of(&error)), "{}", all_of(&error));
            }
        }
        let password = PASSWORD.replace(' ', "%20");
        let good = url(server, &format!("relaxed:{password}"), "127.0.0.1");
        let builder = place.builder().root_certificate(server.ca_file());
        let engine = builder.clone().connect(&good).await.unwrap();
        let store = EventStore::new(engine.clone());
        for text in
            [format!("{builder:?}"), format!("{engine:?}"), format!("{engine:#?}"), format!("{store:?}")]
        {
            assert!(text.contains(&place.schema) || text.contains("EventStore"), "{text}");
            assert!(!shows(&text), "{text}");
        }
        for mangled in ["%zz", "[", "/x?sslmode=sometimes", "?port=many"] {
            let url = format!("postgres://relaxed:{WRONG}@{mangled}");
            let error = place.builder().connect(&url).await.unwrap_err();
            assert!(!shows(&all_of(&error)), "{}", all_of(&error));
        }
        let listed =
            format!("host=127.0.0.1 port={} user=relaxed password='{WRONG}' dbname=postgres", server.port());
        assert!(!shows(&all_of(&place.builder().connect(&listed).await.unwrap_err())));
    });
}

fn openssl(folder: &Path, args: &str) {
    let made = Command::new("openssl").args(args.split_whitespace()).current_dir(folder).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// Logs in by a certificate. Then the server shows a self-signed certificate with another name.
#[test]
fn certificates_of_clients_and_certificates_that_are_pinned() {
    const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    block_on(async {
        if server().is_none() {
            return;
        }
        let own = Server::builder().tls().setting("ssl_ca_file", "ca.crt").start().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (dir, ca_file) = (folder.path().display(), own.ca_file());
        own.psql("postgres", "CREATE ROLE certified LOGIN SUPERUSER").unwrap();
        let file = own.psql("postgres", "SHOW hba_file").unwrap();
        let rest = std::fs::read_to_string(&file).unwrap();
        std::fs::write(
            &file,
            "hostssl all certified all cert\nhost all certified all reject\n".to_owned() + &rest,
        )
        .unwrap();
        own.psql("postgres", "SELECT pg_reload_conf()").unwrap();
        openssl(folder.path(), &format!("req {KEY} -subj /CN=certified -keyout client.key -out client.csr"));
        let (ca, ca_key) = (ca_file.display(), ca_file.with_file_name("ca.key"));
        let sign =
            format!("x509 -req -days 2 -in client.csr -CA {ca} -CAkey {} -set_serial 7", ca_key.display());
        std::fs::write(folder.path().join("client.ext"), "extendedKeyUsage = clientAuth\n").unwrap();
        openssl(folder.path(), &format!("{sign} -extfile client.ext -out client.crt"));

        let without = url(&own, "certified", "localhost");
        soon("the file was read again", async || PostgresEngine::connect(&without).await.is_err()).await;
        let place = Place::on(without.clone());
        let by_url =
            format!("{without}&sslcert={dir}/client%2Ecrt&sslkey={dir}/client.key&application_name=by_url");
        let engine = place.builder().connect(&by_url).await.unwrap();
        use_it(&engine).await;
        assert_eq!(encrypted(&own, "by_url"), "true");
        let files = (folder.path().join("client.crt"), folder.path().join("client.key"));
        let builder = place.builder().client_certificate(&files.0, &files.1);
        use_it(&builder.connect(&without).await.unwrap()).await;
        let half = place.builder().connect(&format!("{without}&sslcert={dir}/client.crt")).await.unwrap_err();
        assert_eq!(half.kind(), &ErrorKind::Invalid);
        assert!(half.to_string().contains("sslkey"), "{half}");

        openssl(
            folder.path(),
            &format!("req -x509 -days 2 {KEY} -subj /CN=elsewhere -keyout own.key -out own.crt"),
        );
        for kind in ["crt", "key"] {
            // Written into the existing files, which keep their owner.
            let made = std::fs::read(folder.path().join(format!("own.{kind}"))).unwrap();
            std::fs::write(ca_file.with_file_name(format!("server.{kind}")), made).unwrap();
        }
        own.psql("postgres", "SELECT pg_reload_conf()").unwrap();
        let place = Place::on(own.url());
        let strict = format!("{}?sslmode=verify-full&sslrootcert=", own.url());
        let by_authority = format!("{strict}{ca}");
        soon("it shows its own", async || place.builder().connect(&by_authority).await.is_err()).await;
        let pinned = format!("{strict}{dir}/own.crt&application_name=pinned");
        let engine = place.builder().connect(&pinned).await.unwrap();
        use_it(&engine).await;
        assert_eq!(encrypted(&own, "pinned"), "true");
        let other = another_authority(folder.path());
        let error = refused(&place, &format!("{strict}{}", other.display())).await;
        assert!(all_of(&error).contains("certificate"), "{}", all_of(&error));
    });
}

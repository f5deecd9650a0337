//! Certificates for one server, made by the program `openssl`.

use std::fs;
use std::path::Path;

use super::account::{give_to_server, run_as_server};
use super::process::{command, run};

/// The settings for the certificates. Paths are relative to the data folder, so they are also right in a copy.
pub(super) const SETTINGS: [(&str, &str); 3] =
    [("ssl", "on"), ("ssl_cert_file", "server.crt"), ("ssl_key_file", "server.key")];

/// The certificate of the authority, in the data folder.
pub(super) const CA_FILE: &str = "ca.crt";

const NEW_KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];

/// The extensions of the server's certificate, in openssl's configuration language.
const EXTENSIONS: &str = "basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
";

/// Makes an authority and a server certificate in the data folder.
pub(super) fn make_certificates(data: &Path) -> Result<(), String> {
    let extensions = data.join("server.ext");
    fs::write(&extensions, EXTENSIONS).map_err(|error| format!("\"{}\": {error}", extensions.display()))?;
    give_to_server(&extensions)?;
    let openssl = |key: &[&str], args: &str| {
        let mut openssl = command("openssl");
        let args = args.split_whitespace();
        run(run_as_server(openssl.args(args).args(key).current_dir(data)))
    };
    openssl(
        &NEW_KEY,
        "req -x509 -days 30 -subj /CN=evercore-tests -addext keyUsage=critical,keyCertSign,cRLSign -keyout ca.key -out ca.crt",
    )?;
    openssl(&NEW_KEY, "req -subj /CN=localhost -keyout server.key -out server.csr")?;
    openssl(
        &[],
        "x509 -req -days 30 -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -extfile server.ext -out server.crt",
    )?;
    Ok(())
}

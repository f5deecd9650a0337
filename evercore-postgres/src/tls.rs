//! TLS by rustls: always verified.

use std::path::Path;
use std::sync::Arc;

use evercore_core::{BoxError, Error, ErrorKind, Result};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Trusts the certificates in this file, or those of the operating system.
pub(crate) fn connector(file: Option<&Path>) -> Result<MakeRustlsConnect> {
    let roots = match file {
        Some(file) => from_file(file)?,
        None => from_system()?,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| failed("TLS cannot be set up", error))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

fn from_file(file: &Path) -> Result<RootCertStore> {
    let unreadable = |error| failed("the file of root certificates does not read", error);
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(file).map_err(unreadable)? {
        let certificate = certificate.map_err(unreadable)?;
        roots.add(certificate).map_err(|error| failed("a root certificate is not valid", error))?;
    }
    checked(roots)
}

/// What the operating system has and rustls cannot read is left out, as every browser does.
fn from_system() -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    checked(roots)
}

fn checked(roots: RootCertStore) -> Result<RootCertStore> {
    if roots.is_empty() {
        return Err(Error::new(ErrorKind::Backend, "there is no root certificate to trust"));
    }
    Ok(roots)
}

fn failed(message: &str, error: impl Into<BoxError>) -> Error {
    Error::new(ErrorKind::Backend, message).with_source(error)
}

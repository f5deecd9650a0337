//! TLS with rustls. Certificates are always verified.

use std::path::Path;
use std::sync::Arc;

use evercore_core::{BoxError, Error, ErrorKind, Result};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Trusts the certificates in this file, or those of the operating system. Logs in with the client certificate and key,
/// if given.
pub(crate) fn connector(file: Option<&Path>, client: Option<(&Path, &Path)>) -> Result<MakeRustlsConnect> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| failed("TLS cannot be set up", error))?;
    let (roots, pinned) = match file {
        Some(file) => from_file(file)?,
        None => (from_system(), Vec::new()),
    };
    if roots.is_empty() {
        return Err(Error::new(ErrorKind::Backend, "there is no root certificate to trust"));
    }
    let usual = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| failed("the root certificates cannot be used", error))?;
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Verifier { usual, pinned }));
    let config = match client {
        Some((certificate, key)) => builder
            .with_client_auth_cert(certificates(certificate, "the client's certificate")?, private_key(key)?)
            .map_err(|error| failed("the client's certificate and its key cannot be used", error))?,
        None => builder.with_no_client_auth(),
    };
    Ok(MakeRustlsConnect::new(config))
}

fn certificates(file: &Path, what: &str) -> Result<Vec<CertificateDer<'static>>> {
    let unreadable = |error| failed(&format!("the file of {what} cannot be read"), error);
    let all: Vec<_> = CertificateDer::pem_file_iter(file)
        .map_err(unreadable)?
        .collect::<Result<_, _>>()
        .map_err(unreadable)?;
    if all.is_empty() {
        return Err(Error::new(ErrorKind::Backend, format!("the file of {what} holds no certificate")));
    }
    Ok(all)
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>> {
    let message = "the file of the client's key cannot be read, or the key is encrypted";
    PrivateKeyDer::from_pem_file(file).map_err(|error| failed(message, error))
}

fn from_file(file: &Path) -> Result<(RootCertStore, Vec<CertificateDer<'static>>)> {
    let all = certificates(file, "root certificates")?;
    let mut roots = RootCertStore::empty();
    for certificate in &all {
        let added = roots.add(certificate.clone());
        added.map_err(|error| failed("a root certificate is not valid", error))?;
    }
    Ok((roots, all))
}

/// The operating system's certificates. Skips those that rustls cannot parse, as browsers do.
fn from_system() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// Verifies as usual, except for pinned certificates, which were configured themselves. A server that presents a pinned
/// certificate and has its key is trusted, and the certificate's name and dates are not checked. So a self-signed
/// certificate can be pinned.
#[derive(Debug)]
struct Verifier {
    usual: Arc<WebPkiServerVerifier>,
    pinned: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.pinned.iter().any(|pinned| pinned == end_entity) {
            return Ok(ServerCertVerified::assertion());
        }
        self.usual.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

fn failed(message: &str, error: impl Into<BoxError>) -> Error {
    Error::new(ErrorKind::Backend, message).with_source(error)
}

//! An error as an answer: its kind says what the caller can do, and so does the status.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use evercore_sqlite::{Error, ErrorKind};

use super::show::No;

pub(crate) struct Refused(Error);

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        // Our own refusal may be shown. Other causes may contain internal details.
        let reason = self.0.cause::<No>().map_or_else(|| self.0.to_string(), No::to_string);
        (status(self.0.kind()), Json(serde_json::json!({ "error": reason }))).into_response()
    }
}

pub(crate) fn status(kind: &ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Invalid | ErrorKind::InvalidName => StatusCode::BAD_REQUEST,
        ErrorKind::Rejected | ErrorKind::InvalidState => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorKind::Conflict { .. } | ErrorKind::KeyTaken { .. } => StatusCode::CONFLICT,
        ErrorKind::CommandReused | ErrorKind::CommandAbandoned => StatusCode::CONFLICT,
        ErrorKind::CursorAhead { .. } => StatusCode::GONE, // another store: a browser does not connect again
        // Send it again, with the same key.
        ErrorKind::Unavailable | ErrorKind::OutcomeUnknown => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

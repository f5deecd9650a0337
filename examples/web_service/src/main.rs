//! A web service: seats for shows, with commands that take effect once, answers that include them, live news, and a health
//! check that tells how the read model is.
//!
//! ```text
//! cargo run -p web_service        until Ctrl-C; shows.db keeps the events
//!
//! curl -X PUT  localhost:3000/shows/hamlet -H 'content-type: application/json' -d '{"seats": 100}'
//! curl -X POST localhost:3000/shows/hamlet/bookings -H 'idempotency-key: 7f3a' \
//!      -H 'content-type: application/json' -d '{"seats": 2}'          answers {"position":2} each time
//! curl 'localhost:3000/shows/hamlet?after=2'                          an answer that includes position 2
//! curl localhost:3000/news                                            or the page at localhost:3000
//! curl -i localhost:3000/health                                       503 while the read model does not get on
//! ```

use std::path::PathBuf;
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Html;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::routing::{get, post};
use axum::{Json, Router};
use evercore_sqlite::{
    BoxError, CommandId, EphemeralSubscription, Error, ErrorKind, Event, EventStore, Filter, Position,
    Receipt, Result, RunEnd, SqliteEngine, Start, Subscription,
};
use futures_lite::stream::{self, Stream, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;

mod free_seats;
pub(crate) mod refused;
mod show;

use free_seats::FreeSeats;
use refused::Refused;
use show::Show;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let listener = TcpListener::bind("127.0.0.1:3000").await?;
    println!("http://{} shows what happens; Ctrl-C ends it", listener.local_addr()?);
    let engine = SqliteEngine::open("shows.db").await?;
    serve(engine, listener, async { drop(tokio::signal::ctrl_c().await) }).await?;
    println!("all requests are answered and the lease is given back");
    Ok(())
}

#[derive(Clone)]
struct App {
    store: EventStore,
    file: PathBuf,
    /// Ends live news, which have no other end.
    stopping: watch::Receiver<bool>,
}

/// Serves until the shutdown, and then answers the open requests.
pub(crate) async fn serve(
    engine: SqliteEngine,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    let store = EventStore::new(engine.clone());
    engine.commit_with(store.begin(), |sql| Ok(sql.execute_batch(&free_seats::create_table())?)).await?;
    let subscription = store
        .subscription(free_seats::NAME)?
        .with_version(free_seats::VERSION)
        .with_lease(Duration::from_secs(5));
    subscription.declare().await?; // from now on `wait_for` works

    let (stop, stopping) = watch::channel(false);
    let (served, all_served) = watch::channel(false);
    let file = engine.path().map(PathBuf::from).unwrap_or_default();
    let routes = routes(App { store: store.clone(), file, stopping });
    let server = async {
        let stopped = async move {
            shutdown.await;
            stop.send_replace(true);
        };
        let end = axum::serve(listener, routes).with_graceful_shutdown(stopped).await;
        served.send_replace(true);
        end.map_err(|error| Error::new(ErrorKind::Backend, "the web server failed").with_source(error))
    };
    // The last answers may still wait for the projector, so it stops after the server, and gives its lease back.
    let projector = project(subscription, &engine, all_served);
    let (served, ()) = tokio::join!(server, projector);
    engine.close().await?;
    served
}

/// Keeps the read model up to date. An event that fails only makes the subscription rest, and the store's errors are waited
/// out, so this ends rarely before the shutdown. If it does, the service answers on: readers get old data or a 503, and
/// `/health` tells.
async fn project(subscription: Subscription, engine: &SqliteEngine, all_served: watch::Receiver<bool>) {
    let shutdown = || {
        let mut all_served = all_served.clone();
        async move { drop(all_served.wait_for(|served| *served).await) }
    };
    loop {
        match subscription.run_sink(shutdown(), free_seats::projection(engine)).await {
            Ok(RunEnd::ShutDown) => return,
            // Another process has a newer version and keeps its table up to date.
            Ok(_) => return shutdown().await,
            // Somebody has removed the subscription. Another run would make it again, from the first event on.
            Err(error) if *error.kind() == ErrorKind::NotFound => return shutdown().await,
            Err(error) => eprintln!("the read model stands still, it is tried again: {error}"),
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            () = shutdown() => return,
        }
    }
}

fn routes(app: App) -> Router {
    Router::new()
        .route("/", get(Html(include_str!("page.html"))))
        .route("/shows/{name}", get(free_seats).put(announce))
        .route("/shows/{name}/bookings", post(book))
        .route("/news", get(news))
        .route("/health", get(health))
        .with_state(app)
}

#[derive(Deserialize)]
struct Seats {
    seats: u32,
}

/// The position of a command. A request with `after` set to it sees the effect.
#[derive(Serialize)]
struct Done {
    position: i64,
}

async fn announce(
    State(app): State<App>,
    Path(name): Path<String>,
    Json(Seats { seats }): Json<Seats>,
) -> Result<Json<Done>, Refused> {
    let receipt = app.store.update_or_create(&name, |show: &Show| show.announce(&name, seats)).await?;
    done(&app, &receipt).await
}

/// Takes effect once per key, even if it is sent again.
async fn book(
    State(app): State<App>,
    Path(name): Path<String>,
    headers: HeaderMap,
    Json(Seats { seats }): Json<Seats>,
) -> Result<Json<Done>, Refused> {
    let key =
        header(&headers, "idempotency-key").ok_or_else(|| Error::invalid("idempotency-key is missing"))?;
    let command = CommandId::new(format!("book {name:?} {key}"))?;
    let receipt = app.store.update_once(command, &name, |show: &Show| show.book(seats)).await?;
    done(&app, &receipt).await
}

async fn done(app: &App, receipt: &Receipt) -> Result<Json<Done>, Refused> {
    // A command that changed nothing has no position, so the present head is used.
    let is_nothing_new = receipt.last == Position::ZERO;
    let position = if is_nothing_new { app.store.head().await? } else { receipt.last };
    Ok(Json(Done { position: position.get() }))
}

#[derive(Deserialize)]
struct After {
    #[serde(default)]
    after: i64,
}

/// Answers from the read model, as soon as it has seen the position of the reader.
async fn free_seats(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(After { after }): Query<After>,
) -> Result<Json<FreeSeats>, Refused> {
    app.store.wait_for_position(Position::new(after)?, free_seats::NAME, Duration::from_secs(2)).await?;
    let version = app.store.live_version(free_seats::NAME).await?;
    let found = tokio::task::spawn_blocking(move || free_seats::read(&app.file, version, &name)).await;
    let found = found.map_err(broken)?.map_err(broken)?;
    Ok(Json(found.ok_or_else(|| Error::new(ErrorKind::NotFound, "there is no such show"))?))
}

/// How the read model is. For a readiness check: 503 if the handler failed at its next event, or if it is too far behind.
async fn health(State(app): State<App>) -> Result<(StatusCode, Json<serde_json::Value>), Refused> {
    let states = app.store.subscription_states(free_seats::NAME).await?;
    let live = app.store.live_version(free_seats::NAME).await?;
    let mut live = states.iter().filter(|state| state.cursor.id.version == live);
    let Some(state) = live.next() else { return Err(broken("there is no cursor").into()) };
    let failed_at = state.cursor.failure.as_ref().map(|failure| failure.position.get());
    let is_well = failed_at.is_none() && state.lag_time < Duration::from_secs(30);
    let status = if is_well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let told = serde_json::json!({
        "lag_events": state.lag_events,
        "lag_seconds": state.lag_time.as_secs(),
        "failed_at": failed_at,
    });
    Ok((status, Json(told)))
}

/// Live news: each event is a message with its position as id, so a browser that was cut off continues there.
async fn news(
    State(app): State<App>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<sse::Event, BoxError>>>, Refused> {
    let start = match header(&headers, "last-event-id") {
        Some(last) => {
            Start::After(Position::new(last.parse().map_err(|_| Error::invalid("that is no id"))?)?)
        }
        None => Start::End,
    };
    let shows = Filter::of::<Show>()?;
    let news = app.store.subscribe(shows, start).await?;
    // An id without a message: a browser that is cut off before the first event can continue, too.
    let begin = sse::Event::default().id(news.position().to_string());
    let messages = stream::unfold((news, app.stopping), next_messages).flat_map(stream::iter);
    Ok(Sse::new(stream::once(Ok(begin)).chain(messages)).keep_alive(KeepAlive::default()))
}

type News = (EphemeralSubscription, watch::Receiver<bool>);

async fn next_messages((mut news, mut stopping): News) -> Option<(Vec<Result<sse::Event, BoxError>>, News)> {
    let events = tokio::select! {
        events = news.next() => events,
        _ = stopping.wait_for(|stop| *stop) => return None,
    };
    let messages = match events {
        Ok(events) => events.iter().map(|event| message(&event)).collect(),
        Err(error) => vec![Err(error.into())], // ends the answer; the browser connects again
    };
    Some((messages, (news, stopping)))
}

fn message(event: &Event) -> Result<sse::Event, BoxError> {
    let message = sse::Event::default().id(event.position().to_string());
    let show = event.aggregate().get();
    Ok(message.json_data(serde_json::json!({ "show": show, "what": event.decode::<Show>()? }))?)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn broken(cause: impl Into<BoxError>) -> Error {
    Error::new(ErrorKind::Backend, "the read model cannot be read").with_source(cause)
}

//! The quick start on PostgreSQL: an aggregate, a unit of work, a decision and the log. Run it twice.
//!
//! ```text
//! cargo run -p postgres_quickstart -- postgres://user:password@localhost/database
//! ```

use evercore_postgres::{Aggregate, EventStore, Json, LogQuery, Position, PostgresEngine, Result};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct User {
    username: String,
    email: String,
    is_active: bool,
}

#[derive(Debug, Serialize, Deserialize)]
enum UserEvent {
    UserCreated { username: String, email: String },
    EmailChanged { email: String },
    UserDeactivated,
}

impl Aggregate for User {
    const TYPE: &'static str = "user";
    type Event = UserEvent;
    type Codec = Json;

    fn apply(&mut self, event: UserEvent) {
        match event {
            UserEvent::UserCreated { username, email } => *self = Self { username, email, is_active: true },
            UserEvent::EmailChanged { email } => self.email = email,
            UserEvent::UserDeactivated => self.is_active = false,
        }
    }
}

impl User {
    /// A decision is a pure function: it reads the state, and returns events or an error.
    fn change_email(&self, email: &str) -> Result<Option<UserEvent>, &'static str> {
        if !self.is_active {
            return Err("the user is not active");
        }
        Ok((self.email != email).then(|| UserEvent::EmailChanged { email: email.to_owned() }))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "postgres://localhost/postgres".to_owned());
    run(&url).await
}

async fn run(url: &str) -> Result<()> {
    let store = EventStore::new(PostgresEngine::connect(url).await?);

    if store.find::<User>("johndoe").await?.is_none() {
        let mut work = store.begin(); // a unit of work; nothing is written before the commit
        let mut user = work.create_with_key::<User>("johndoe").await?;
        let (username, email) = ("johndoe".to_owned(), "john@example.org".to_owned());
        work.record(&mut user, UserEvent::UserCreated { username, email })?;
        let receipt = work.commit().await?; // writes all of it or nothing
        println!("created johndoe at position {} of the log", receipt.last);
    }

    // Loads the user, decides, and commits. Does it again if another writer was faster.
    store.update("johndoe", |user: &User| user.change_email("j@example.org")).await?;

    let user = store.load::<User>("johndoe").await?;
    println!("{} <{}>, after {} events", user.username, user.email, user.sequence());

    let page = store.read_log(&LogQuery::after(Position::ZERO)).await?;
    for event in &page.events {
        let payload = String::from_utf8_lossy(event.payload());
        println!("{} {} {} {payload}", event.position(), event.time(), event.event_type());
    }
    Ok(())
}

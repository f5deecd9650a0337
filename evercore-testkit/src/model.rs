//! The simplest possible model of a store, and a random walk that compares an engine with it.

#![allow(clippy::unwrap_used, reason = "a case fails by a panic")]

use std::collections::{BTreeMap, HashMap};

use evercore_core::engine::{Batch, EventRow, KnownCommand, LoadRequest, NewEvent, Snapshot, Target};
use evercore_core::{
    AggregateId, AggregateQuery, AggregateType, CommandId, Direction, Error, ErrorKind, Event, EventType,
    Filter, LogQuery, Metadata, Position, Receipt, Result, Sequence, Timestamp, limits,
};

use crate::tools::*;

const TYPES: [&str; 3] = ["a", "b", "B"];
const EVENTS: [&str; 4] = ["X", "Y", "Z", "x"];
const REFERENCES: [&str; 3] = ["r", "R", ""];

#[derive(Clone, Default)]
struct Known {
    of_type: String,
    key: Option<String>,
    sequence: i64,
    snapshot: Option<Snapshot>,
}

/// An event.
struct Row {
    aggregate: AggregateId,
    sequence: i64,
    aggregate_type: AggregateType,
    event_type: EventType,
    payload: Vec<u8>,
    reference: Option<String>,
    correlation_id: Option<String>,
}

impl Row {
    /// The parts that a filter compares; the model ignores times.
    fn as_row(&self, position: i64) -> EventRow<'_> {
        EventRow {
            position: place(position),
            aggregate: self.aggregate,
            aggregate_type: &self.aggregate_type,
            sequence: at(self.sequence),
            event_type: &self.event_type,
            time: Timestamp::MIN,
            recorded_at: Timestamp::MIN,
            payload: &self.payload,
            reference: self.reference.as_deref(),
            correlation_id: self.correlation_id.as_deref(),
            causation_id: None,
            headers: None,
        }
    }
}

#[derive(Default)]
struct Model {
    aggregates: BTreeMap<AggregateId, Known>,
    log: Vec<Row>,
    /// The fingerprint and the receipt; `None` for a command settled as never committed.
    commands: HashMap<CommandId, Option<(Option<i64>, Receipt)>>,
}

impl Model {
    /// All faults of a batch. An engine may report any of them.
    fn faults(&self, batch: &Batch) -> Vec<&'static str> {
        let mut faults = Vec::new();
        let mut after = self.aggregates.clone();
        for new in batch.creates() {
            after.insert(
                new.id,
                Known { of_type: new.aggregate_type.as_str().to_owned(), ..Known::default() },
            );
        }
        let typed = batch.sequence_changes().iter().map(|change| (change.aggregate, &change.aggregate_type));
        let changed = batch.key_changes().iter().map(|change| (change.aggregate, &change.aggregate_type));
        for (id, of_type) in typed.chain(changed) {
            if after.get(&id).is_some_and(|known| known.of_type != of_type.as_str()) {
                faults.push("wrong type");
            }
        }
        let guards = batch.guards().iter().map(|guard| (guard.aggregate, guard.expected));
        for (id, expected) in
            batch.sequence_changes().iter().map(|change| (change.aggregate, change.expected)).chain(guards)
        {
            match after.get(&id) {
                None => faults.push("not found"),
                Some(known) if known.sequence != expected.get() => faults.push("conflict"),
                Some(_) => {}
            }
        }
        let created =
            batch.creates().iter().filter_map(|new| Some((new.id, &new.aggregate_type, new.key.as_ref()?)));
        let changed =
            batch.key_changes().iter().map(|change| (change.aggregate, &change.aggregate_type, &change.key));
        for (id, of_type, key) in created.chain(changed) {
            if !after.contains_key(&id) {
                faults.push("not found");
            }
            // Its key may be taken as well; an engine may check either first.
            let known = after.entry(id).or_default();
            (known.of_type, known.key) = (of_type.as_str().to_owned(), Some(key.as_str().to_owned()));
        }
        let mut keys: Vec<_> =
            after.values().filter_map(|it| Some((&it.of_type, it.key.as_ref()?))).collect();
        keys.sort();
        if keys.windows(2).any(|pair| pair[0] == pair[1]) {
            faults.push("key taken");
        }
        if batch.snapshots().iter().any(|(id, _)| !after.contains_key(id)) {
            faults.push("not found");
        }
        faults
    }

    /// Applies a commit to the model and compares the result. Times are taken from the receipt.
    fn commit(&mut self, batch: &Batch, answer: Result<Receipt>) {
        if let Some(known) = batch.command_id().and_then(|id| self.commands.get(id)) {
            match known {
                None => assert_eq!(kind_of(&answer), "abandoned"),
                Some((fingerprint, first)) => {
                    let (fingerprint, receipt) = (*fingerprint, first.clone());
                    match (KnownCommand::Committed { fingerprint, receipt }).answer(batch) {
                        Ok(first) => assert_eq!(answer.unwrap(), first, "the first receipt"),
                        Err(_) => assert_eq!(kind_of(&answer), "reused"),
                    }
                }
            }
            return;
        }
        let faults = self.faults(batch);
        if !faults.is_empty() {
            assert!(faults.contains(&kind_of(&answer)), "expected one of {faults:?}, was {answer:?}");
            return;
        }
        let receipt = answer.unwrap();
        let head = Position::ZERO.plus(self.log.len());
        assert_eq!(receipt, Receipt::of(batch, head, receipt.recorded_at).with_mark(receipt.mark));
        self.write(batch);
        if let Some(id) = batch.command_id() {
            self.commands.insert(id.clone(), Some((batch.fingerprint(), receipt)));
        }
    }

    fn write(&mut self, batch: &Batch) {
        for new in batch.creates() {
            let (of_type, key) = (new.aggregate_type.as_str().to_owned(), new.key.as_ref());
            let key = key.map(|key| key.as_str().to_owned());
            self.aggregates.insert(new.id, Known { of_type, key, ..Known::default() });
        }
        for change in batch.key_changes() {
            self.aggregates.get_mut(&change.aggregate).unwrap().key = Some(change.key.as_str().to_owned());
        }
        for append in batch.appends() {
            let known = self.aggregates.get_mut(&append.aggregate).unwrap();
            for event in &append.events {
                known.sequence += 1;
                self.log.push(Row {
                    aggregate: append.aggregate,
                    sequence: known.sequence,
                    aggregate_type: type_named(&known.of_type),
                    event_type: event.event_type.clone(),
                    payload: event.payload.as_bytes().to_vec(),
                    reference: event.metadata.reference().map(str::to_owned),
                    correlation_id: event.metadata.correlation_id().map(str::to_owned),
                });
            }
        }
        for (id, snapshot) in batch.snapshots() {
            let known = self.aggregates.get_mut(id).unwrap();
            let old = known.snapshot.as_ref();
            let is_earlier =
                old.is_some_and(|old| old.version == snapshot.version && old.sequence > snapshot.sequence);
            if snapshot.sequence.get() <= known.sequence && !is_earlier {
                known.snapshot = Some(snapshot.clone());
            }
        }
    }

    /// The positions that a query finds, on all pages together.
    fn found(&self, query: &LogQuery) -> Vec<i64> {
        let (from, to) = (query.from.get(), query.to.get());
        let passes =
            |position: &i64| query.filter.matches_row(&self.log[*position as usize - 1].as_row(*position));
        let all = 1..=self.log.len() as i64;
        match query.direction {
            Direction::Forward => all.filter(|it| *it > from && *it <= to).filter(passes).collect(),
            Direction::Backward => all.rev().filter(|it| *it < from && *it >= to).filter(passes).collect(),
        }
    }

    fn check(&self, event: &Event) {
        let position = event.position().get();
        let (known, found) = (self.log[position as usize - 1].as_row(position), event.as_row());
        assert_eq!((found.aggregate, found.sequence), (known.aggregate, known.sequence));
        assert_eq!((found.aggregate_type, found.event_type), (known.aggregate_type, known.event_type));
        assert_eq!(found.payload, known.payload);
        assert_eq!((found.reference, found.correlation_id), (known.reference, known.correlation_id));
    }
}

fn kind_of<T>(answer: &Result<T>) -> &'static str {
    match answer.as_ref().err().map(Error::kind) {
        None => "done",
        Some(ErrorKind::NotFound) => "not found",
        Some(ErrorKind::WrongType { .. }) => "wrong type",
        Some(ErrorKind::Conflict { .. }) => "conflict",
        Some(ErrorKind::KeyTaken { .. }) => "key taken",
        Some(ErrorKind::CommandReused) => "reused",
        Some(ErrorKind::CommandAbandoned) => "abandoned",
        Some(_) => "something else",
    }
}

/// Prints the seed if the walk panics.
struct Seed(u64, u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "the walk failed at step {}; again with EVERCORE_SEED={} and case a_random_walk_agrees_with_a_model",
                self.1, self.0
            );
        }
    }
}

/// Runs the walk on an empty store.
pub(crate) async fn walk(engine: &Engine, seed: u64, steps: u64) {
    let (mut model, mut random, mut told) = (Model::default(), Random(seed), Seed(seed, 0));
    for step in 0..steps {
        told.1 = step;
        match random.below(8) {
            0..=3 => {
                let batch = random_batch(engine, &model, &mut random, seed).await;
                model.commit(&batch, engine.commit(batch.clone()).await);
            }
            4 => settle(engine, &mut model, &mut random, seed).await,
            5 => read_log(engine, &model, &mut random).await,
            6 => load_one(engine, &model, &mut random).await,
            _ => read_one(engine, &model, &mut random).await,
        }
        assert_eq!(engine.head().await.unwrap().get(), model.log.len() as i64);
    }
    for (event, position) in log(engine).await.iter().zip(1..) {
        assert_eq!(event.position().get(), position);
        model.check(event);
    }
}

fn any_id(model: &Model, random: &mut Random) -> AggregateId {
    let count = model.aggregates.len().max(1);
    let known = model.aggregates.keys().nth(random.below(count)).copied();
    known.filter(|_| !random.one_in(20)).unwrap_or_else(|| AggregateId::new(i64::MAX - 1).unwrap())
}

fn any_command(random: &mut Random, seed: u64) -> String {
    format!("{seed} {}", random.below(12))
}

async fn random_batch(engine: &Engine, model: &Model, random: &mut Random, seed: u64) -> Batch {
    let mut batch = unit();
    let mut at_now: HashMap<AggregateId, i64> = HashMap::new();
    for _ in 0..=random.below(3) {
        let is_new = model.aggregates.len() < 3 || random.one_in(4);
        let id = if is_new { new_id(engine).await } else { any_id(model, random) };
        let known = model.aggregates.get(&id).cloned();
        let mut of_type =
            known.as_ref().map_or(TYPES[random.below(3)].to_owned(), |known| known.of_type.clone());
        if is_new {
            batch = batch.create(id, &of_type);
        } else if random.one_in(25) {
            TYPES[random.below(3)].clone_into(&mut of_type);
        }
        let sequence = *at_now.entry(id).or_insert_with(|| known.map_or(0, |known| known.sequence));
        if random.one_in(3) {
            let text = format!("key {}", random.below(8));
            if batch.0.holder_of(&type_named(&of_type), &key(&text)).is_none() {
                batch = batch.key(id, &of_type, &text);
            }
        }
        if random.one_in(8) {
            batch = batch.guard(id, (sequence - i64::from(random.one_in(4))).max(0));
        }
        if batch.0.sequence_change_of(id).is_none() && !random.one_in(5) {
            let wrong = if random.one_in(8) { 1 } else { 0 };
            let events: Vec<_> = (0..=random.below(3)).map(|_| random_event(random)).collect();
            at_now.insert(id, sequence + events.len() as i64);
            batch = batch.events(id, &of_type, sequence + wrong, events);
        }
        if random.one_in(4) {
            let (sequence, version) = (random.below(8) as i64, 1 + random.below(2) as u32);
            batch = batch.snapshot(id, sequence, version, sequence.to_string().as_bytes());
        }
    }
    if random.one_in(4) {
        let name = any_command(random, seed);
        batch = match random.below(3) {
            0 => batch.command(&name),
            fingerprint => batch.command_with(&name, fingerprint as i64),
        };
    }
    batch.0
}

fn random_event(random: &mut Random) -> NewEvent {
    let (name, payload) = (EVENTS[random.below(4)], random.below(1_000).to_string());
    let mut metadata = Metadata::new();
    if random.one_in(3) {
        metadata = metadata.with_reference(REFERENCES[random.below(3)]).unwrap();
    }
    if random.one_in(3) {
        metadata = metadata.with_correlation_id(REFERENCES[random.below(3)]).unwrap();
    }
    event_with(name, payload.as_bytes(), Timestamp::now(), metadata)
}

async fn settle(engine: &Engine, model: &mut Model, random: &mut Random, seed: u64) {
    let id = command(&any_command(random, seed));
    let known = model.commands.get(&id).cloned();
    let receipt = known.clone().flatten().map(|(_, receipt)| receipt);
    assert_eq!(receipt_of(engine, &id).await, receipt);
    if random.one_in(4) {
        assert_eq!(engine.settle(&id).await.unwrap(), receipt);
        model.commands.entry(id).or_insert(None);
    }
}

async fn read_log(engine: &Engine, model: &Model, random: &mut Random) {
    let place_in = |random: &mut Random| place(random.below(model.log.len() + 1) as i64);
    let mut query = match random.below(4) {
        0 => LogQuery::after(Position::ZERO),
        1 => LogQuery::before(Position::MAX),
        2 => LogQuery::after(place_in(random)).up_to(place_in(random)),
        _ => LogQuery::before(place_in(random)).up_to(place_in(random)),
    };
    let mut filter = Filter::all();
    for _ in 0..random.below(3) {
        filter = filter.with_aggregate_type(type_named(TYPES[random.below(3)]));
    }
    if random.one_in(4) {
        filter = filter.with_reference(REFERENCES[random.below(3)]).unwrap();
    }
    if random.one_in(4) {
        filter = filter.with_correlation_id(REFERENCES[random.below(3)]).unwrap();
    }
    for _ in 0..random.below(3) {
        filter = filter.with_event_type(event_named(EVENTS[random.below(4)]));
    }
    if random.one_in(4) {
        filter = filter.with_aggregate(any_id(model, random));
    }
    let limit = 1 + random.below(10);
    query = query.with_filter(filter).with_limit(events_per_page(limit));
    let page = engine.read_log(&query).await.unwrap();
    let expected = model.found(&query);
    let events: Vec<Event> = page.events.iter().collect();
    assert_eq!(numbers(&events), expected[..limit.min(expected.len())], "{query:?}");
    events.iter().for_each(|event| model.check(event));
    query.from = page.scanned;
    assert_eq!(model.found(&query), expected[events.len()..], "scanned is {} after {query:?}", page.scanned);
    assert_eq!(numbers(&read_all(engine, query).await), expected[events.len()..]);
}

async fn load_one(engine: &Engine, model: &Model, random: &mut Random) {
    let id = any_id(model, random);
    let known = model.aggregates.get(&id);
    let target = match known.and_then(|known| Some((type_named(&known.of_type), known.key.as_deref()?))) {
        Some((of_type, text)) if random.one_in(2) => Target::Key(of_type, key(text)),
        _ => Target::Id(id),
    };
    let up_to = if random.one_in(2) { Sequence::MAX } else { at(random.below(10) as i64) };
    let snapshot = [None, Some(1), Some(2)][random.below(3)];
    let limit = events_per_page(limits::PAGE_EVENTS);
    let found = engine.load(LoadRequest { target, snapshot, up_to, limit }).await.unwrap();
    let (Some(known), Some(found)) = (known, &found) else {
        assert_eq!((known.is_some(), found.is_some()), (false, false), "aggregate {id}");
        return;
    };
    assert_eq!((found.id, found.sequence.get()), (id, known.sequence));
    assert_eq!(found.aggregate_type.as_str(), known.of_type);
    assert_eq!(found.key.as_ref().map(AsRef::as_ref), known.key.as_deref());
    let usable = known.snapshot.as_ref().filter(|it| Some(it.version) == snapshot && it.sequence <= up_to);
    assert_eq!(found.snapshot.as_ref(), usable);
    let from = usable.map_or(0, |snapshot| snapshot.sequence.get());
    let sequences: Vec<_> = found.events.iter().map(|event| event.sequence().get()).collect();
    assert_eq!(sequences, (from + 1..=known.sequence.min(up_to.get())).collect::<Vec<_>>());
    found.events.iter().for_each(|event| model.check(&event));
}

async fn read_one(engine: &Engine, model: &Model, random: &mut Random) {
    let aggregate = any_id(model, random);
    let last = model.aggregates.get(&aggregate).map_or(0, |known| known.sequence);
    let (from, to) = (random.below(8) as i64, random.below(8) as i64);
    let direction = if random.one_in(2) { Direction::Forward } else { Direction::Backward };
    let count = random.below(6);
    let limit = events_per_page(count);
    let query = AggregateQuery { aggregate, direction, from: at(from), to: at(to), limit };
    let found = engine.read_aggregate(query).await.unwrap();
    let expected: Vec<i64> = match direction {
        Direction::Forward => (1..=last).filter(|it| *it > from && *it <= to).take(count).collect(),
        Direction::Backward => (1..=last).rev().filter(|it| *it < from && *it >= to).take(count).collect(),
    };
    let sequences: Vec<_> = found.iter().map(|event| event.sequence().get()).collect();
    assert_eq!(sequences, expected, "{query:?}");
    found.iter().for_each(|event| model.check(&event));
}

//! Command ids: a command takes effect once, however often and however late it comes.

use std::sync::Barrier;
use std::time::Duration;

use evercore_core::engine::KnownCommand;
use evercore_core::{
    AggregateId, AggregateQuery, Command, CommandId, Direction, Error, ErrorKind, LogQuery, Position,
    Sequence, Timestamp, limits,
};

use crate::fixture::Fixture;
use crate::tools::*;

fn ordered(id: AggregateId, expected: i64) -> Unit {
    unit().append(id, "order", expected, 2).command("command")
}

pub(crate) async fn a_known_id_returns_the_first_receipt(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "order", 0).await;
    let first = ordered(id, 0).commit(&engine).await.unwrap();
    let before = everything(&engine).await;
    assert_eq!(ordered(id, 0).commit(&engine).await.unwrap(), first);
    assert_eq!(everything(&engine).await, before);
    assert_eq!(sequence_of(&engine, id).await, 2);
}

pub(crate) async fn the_command_id_is_looked_at_before_everything_else(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = new_ids(&engine, 3).await;
    let make = |id| unit().create_keyed(id, "order", "4711").append(id, "order", 0, 1).command("command");
    let first = make(ids[0]).commit(&engine).await.unwrap();
    unit().append(ids[0], "order", 1, 1).commit(&engine).await.unwrap();
    // By now the key is taken, the id is in use and the sequence is stale. The command took effect before, so its
    // receipt comes back.
    assert_eq!(make(ids[0]).commit(&engine).await.unwrap(), first);
    assert_eq!(make(ids[1]).commit(&engine).await.unwrap(), first);
    assert_eq!(make(ids[2]).guard(ids[0], 77).commit(&engine).await.unwrap(), first);
    assert_eq!(log(&engine).await.len(), 2);
}

pub(crate) async fn a_known_id_with_another_fingerprint_is_command_reused(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "order", 0).await;
    let pay = |name: &str, fingerprint| unit().append(id, "order", 0, 1).command_with(name, fingerprint);
    let first = pay("command", 7).commit(&engine).await.unwrap();
    let before = everything(&engine).await;
    assert_eq!(pay("command", 7).commit(&engine).await.unwrap(), first);
    assert_kind!(pay("command", -7).commit(&engine).await, ErrorKind::CommandReused);
    // Without a word, nothing differs.
    assert_eq!(unit().command("command").commit(&engine).await.unwrap(), first);
    // The first one had no word either, so nothing differs.
    let silent = unit().command("silent").commit(&engine).await.unwrap();
    assert_eq!(pay("silent", 7).commit(&engine).await.unwrap(), silent);
    assert_eq!(unit().command("silent").commit(&engine).await.unwrap(), silent);
    // The upper half of a fingerprint is the word, the lower half the aggregates. A half that is 0 matches
    // everything.
    let said = |word: i64, targets: i64| word << 32 | targets;
    let word = unit().command_with("word", said(3, 0)).commit(&engine).await.unwrap();
    assert_eq!(pay("word", said(3, 7)).commit(&engine).await.unwrap(), word);
    assert_eq!(pay("word", said(0, 7)).commit(&engine).await.unwrap(), word);
    assert_kind!(pay("word", said(4, 7)).commit(&engine).await, ErrorKind::CommandReused);
    let known = engine.command(&command("command")).await.unwrap();
    assert_eq!(known, Some(KnownCommand::Committed { fingerprint: Some(7), receipt: first }));
    assert_eq!(everything(&engine).await, before);
}

pub(crate) async fn an_id_takes_effect_once_when_sixteen_come_at_once(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "order", 0).await;
    for round in 0..5 {
        let name = format!("command {round}");
        let make =
            || unit().events(id, "order", round, vec![event("Ordered", name.as_bytes())]).command(&name);
        let receipts = fixture.threads(16, async |_| make().commit(&engine).await.unwrap());
        assert!(receipts.iter().all(|receipt| *receipt == receipts[0]), "equal receipts");
        assert_eq!(sequence_of(&engine, id).await, round + 1);
    }
    let receipts = join_all((0..16).map(|_| ordered(id, 5).commit(&engine))).await;
    let first = receipts[0].as_ref().unwrap();
    assert!(receipts.iter().all(|receipt| receipt.as_ref().unwrap() == first), "equal receipts");
    assert_no_holes(&log(&engine).await);
    assert_eq!(log(&engine).await.len(), 7);
}

pub(crate) async fn an_id_takes_effect_once_also_after_reopening(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "order", 0).await;
    let first = ordered(id, 0).commit(&engine).await.unwrap();
    drop(engine);
    let engine = fixture.reopen().await;
    assert_eq!(receipt_of(&engine, &command("command")).await.as_ref(), Some(&first));
    assert_eq!(ordered(id, 0).commit(&engine).await.unwrap(), first);
    assert_eq!(log(&engine).await.len(), 2);
}

pub(crate) async fn an_id_takes_effect_once_on_all_engines_of_one_storage(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let other = fixture.further().await;
    let id = grown(&engine, "order", 0).await;
    let engines = [engine, other];
    let receipts =
        fixture.threads(8, async |number| ordered(id, 0).commit(&engines[number % 2]).await.unwrap());
    assert!(receipts.iter().all(|receipt| *receipt == receipts[0]));
    assert_eq!(log(&engines[0]).await.len(), 2);
}

pub(crate) async fn a_receipt_can_be_asked_for(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "order", 0).await;
    assert_eq!(receipt_of(&engine, &command("command")).await, None);
    let first = ordered(id, 0).commit(&engine).await.unwrap();
    assert_eq!(receipt_of(&engine, &command("command")).await, Some(first));
    assert_eq!(receipt_of(&engine, &command("Command")).await, None);
    assert_eq!(receipt_of(&engine, &command("command ")).await, None);
}

pub(crate) async fn a_large_receipt_comes_back_equal(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = new_ids(&engine, 1_000).await;
    let make = || {
        let made = ids.iter().fold(unit(), |batch, id| batch.create(*id, "order").append(*id, "order", 0, 1));
        made.command("command")
    };
    let first = make().commit(&engine).await.unwrap();
    assert_eq!(make().commit(&engine).await.unwrap(), first);
    assert_eq!(engine.settle(&command("command")).await.unwrap(), Some(first));
}

pub(crate) async fn a_command_that_writes_nothing_has_a_receipt_too(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let first = unit().command("command").commit(&engine).await.unwrap();
    assert_eq!((first.first, first.last), (Position::ZERO, Position::ZERO));
    assert_eq!(receipt_of(&engine, &command("command")).await, Some(first.clone()));
    assert_eq!(unit().command("command").commit(&engine).await.unwrap(), first);
}

pub(crate) async fn a_command_that_failed_can_be_tried_again(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "order", 1).await;
    assert_kind!(ordered(id, 0).commit(&engine).await, ErrorKind::Conflict { .. });
    assert_eq!(receipt_of(&engine, &command("command")).await, None);
    ordered(id, 1).commit(&engine).await.unwrap();
    assert_eq!(sequence_of(&engine, id).await, 3);
}

pub(crate) async fn settling_a_command_that_took_effect_gives_its_receipt(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "order", 0).await;
    let first = ordered(id, 0).commit(&engine).await.unwrap();
    assert_eq!(engine.settle(&command("command")).await.unwrap().as_ref(), Some(&first));
    assert_eq!(ordered(id, 0).commit(&engine).await.unwrap(), first);
}

pub(crate) async fn a_late_original_cannot_land_after_it_was_settled(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "order", 0).await;
    assert_eq!(engine.settle(&command("command")).await.unwrap(), None);
    assert_eq!(engine.settle(&command("command")).await.unwrap(), None);
    assert_eq!(receipt_of(&engine, &command("command")).await, None);
    let before = everything(&engine).await;
    assert_kind!(ordered(id, 0).commit(&engine).await, ErrorKind::CommandAbandoned);
    assert_kind!(ordered(id, 9).commit(&engine).await, ErrorKind::CommandAbandoned);
    assert_eq!(everything(&engine).await, before);
    assert_eq!(engine.settle(&command("command")).await.unwrap(), None);
}

pub(crate) async fn settled_is_settled_also_after_reopening(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "order", 0).await;
    assert_eq!(engine.settle(&command("command")).await.unwrap(), None);
    drop(engine);
    let engine = fixture.reopen().await;
    assert_kind!(ordered(id, 0).commit(&engine).await, ErrorKind::CommandAbandoned);
}

pub(crate) async fn a_race_of_commit_and_settle_ends_one_way(fixture: &mut Fixture) {
    let engine = fixture.engine();
    for round in 0..20 {
        let id = grown(&engine, "order", 0).await;
        let name = command(&format!("command {round}"));
        let outcomes = fixture.threads(2, async |number| {
            if number == 0 {
                return engine.settle(&name).await.unwrap();
            }
            match unit().append(id, "order", 0, 1).command(name.as_str()).commit(&engine).await {
                Ok(receipt) => Some(receipt),
                Err(error) => {
                    assert_eq!(error.kind(), &ErrorKind::CommandAbandoned);
                    None
                }
            }
        });
        assert_eq!(outcomes[0], outcomes[1], "both tell the same");
        assert_eq!(sequence_of(&engine, id).await, i64::from(outcomes[0].is_some()));
    }
}

pub(crate) async fn command_ids_compare_bytewise_up_to_the_longest(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let long = "c".repeat(limits::COMMAND_ID_BYTES);
    let names = ["c", "C", "c ", "\u{e9}", "e\u{301}", "'; --", long.as_str()];
    for name in names {
        let id = new_id(&engine).await;
        unit().create(id, "order").append(id, "order", 0, 1).command(name).commit(&engine).await.unwrap();
    }
    assert_eq!(log(&engine).await.len(), names.len());
    for (index, name) in names.iter().enumerate() {
        let receipt = receipt_of(&engine, &command(name)).await.unwrap();
        assert_eq!(receipt.first.get(), index as i64 + 1);
    }
    for bad in ["", "\0", &"c".repeat(limits::COMMAND_ID_BYTES + 1)] {
        assert_kind!(CommandId::new(bad), ErrorKind::InvalidName);
    }
}

pub(crate) async fn a_commit_dropped_at_any_await_is_whole_or_absent(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (first, second) = (grown(&engine, "order", 0).await, grown(&engine, "order", 0).await);
    let mut expected = 0;
    for polls in 0.. {
        let name = format!("command {polls}");
        let batch =
            unit().append(first, "order", expected, 2).append(second, "order", expected, 2).command(&name);
        let answer = poll_at_most(polls, batch.commit(&engine)).await;
        // Settled from here on, whether it committed or not. The next borrower starts clean.
        let outcome = engine.settle(&command(&name)).await.unwrap();
        if outcome.is_some() {
            expected += 2;
        }
        assert_eq!(sequence_of(&engine, first).await, expected, "dropped after {polls} polls");
        assert_eq!(sequence_of(&engine, second).await, expected, "dropped after {polls} polls");
        grown(&engine, "user", 1).await;
        if let Some(answer) = answer {
            assert_eq!(Some(answer.unwrap()), outcome);
            break;
        }
        assert!(polls < 1_000, "the commit does not end");
    }
    assert_no_holes(&log(&engine).await);
}

pub(crate) async fn every_future_may_be_dropped_at_any_await(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "order", 5).await;
    let query = LogQuery::after(Position::ZERO);
    let limit = events_per_page(10);
    let (direction, from, to) = (Direction::Forward, Sequence::ZERO, Sequence::MAX);
    let of_order = AggregateQuery { aggregate: id, direction, from, to, limit };
    for polls in 0..20 {
        let ended = [
            poll_at_most(polls, engine.reserve(3)).await.is_some(),
            poll_at_most(polls, engine.head()).await.is_some(),
            poll_at_most(polls, engine.read_log(&query)).await.is_some(),
            poll_at_most(polls, engine.read_aggregate(of_order)).await.is_some(),
            poll_at_most(polls, history(&engine, id)).await.is_some(),
            poll_at_most(polls, engine.types()).await.is_some(),
            poll_at_most(polls, engine.settle(&command("never"))).await.is_some(),
            poll_at_most(polls, engine.wait(place(5), Duration::from_millis(5))).await.is_some(),
        ];
        grown(&engine, "user", 0).await;
        assert_eq!(history(&engine, id).await.events.len(), 5);
        if ended.iter().all(|ended| *ended) {
            break;
        }
    }
    assert_kind!(unit().command("never").commit(&engine).await, ErrorKind::CommandAbandoned);
    assert_no_holes(&log(&engine).await);
}

pub(crate) async fn an_update_with_a_command_id_decides_once(fixture: &mut Fixture) {
    let store = fixture.store();
    store.load_or_create::<Account>("ann").await.unwrap();
    let first = store.update_once::<Account, _, _>(command("pay"), "ann", |_| [deposited(1)]).await.unwrap();
    let again = store.update_once::<Account, _, _>(command("pay"), "ann", |_| [deposited(9)]).await.unwrap();
    assert_eq!(again, first);
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 1);
    assert_eq!(store.receipt(&command("pay")).await.unwrap(), Some(first));
}

pub(crate) async fn without_a_command_id_a_unit_that_is_sent_twice_may_land_twice(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    // The sequence protects a decision on a state …
    let id = grown(&engine, "order", 1).await;
    unit().append(id, "order", 1, 1).commit(&engine).await.unwrap();
    assert_kind!(unit().append(id, "order", 1, 1).commit(&engine).await, ErrorKind::Conflict { .. });
    // … but nothing protects a repeated decision, or an aggregate that is created again without a key.
    for _ in 0..2 {
        store.update_or_create::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
        grown(&engine, "order", 1).await;
    }
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 2);
    assert_eq!(log(&engine).await.len(), 2 + 2 + 2);
}

pub(crate) async fn a_receipt_keeps_the_order_of_its_unit(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let ids = new_ids(&engine, 4).await;
    unit().create(ids[0], "order").create(ids[2], "order").commit(&engine).await.unwrap();
    let make = || {
        let batch =
            unit().append(ids[2], "order", 0, 2).append(ids[0], "order", 0, 1).create(ids[3], "order");
        batch.create(ids[1], "order").command("command")
    };
    let first = make().commit(&engine).await.unwrap();
    let expected = [(ids[3], at(0)), (ids[1], at(0)), (ids[2], at(2)), (ids[0], at(1))];
    assert_eq!(first.aggregates, expected);
    assert_eq!(receipt_of(&engine, &command("command")).await.as_ref(), Some(&first));
    assert_eq!(engine.settle(&command("command")).await.unwrap().as_ref(), Some(&first));
    unit().append(ids[0], "order", 1, 3).commit(&engine).await.unwrap();
    assert_eq!(make().commit(&engine).await.unwrap(), first);
}

pub(crate) async fn a_known_id_for_another_aggregate_is_command_reused(fixture: &mut Fixture) {
    let store = fixture.store();
    for name in ["ann", "bob"] {
        store.load_or_create::<Account>(name).await.unwrap();
    }
    let pay = |name| store.update_once::<Account, _, _>(command("pay"), name, |_| [deposited(1)]);
    let first = pay("ann").await.unwrap();
    assert_kind!(pay("bob").await, ErrorKind::CommandReused);
    assert_eq!(pay("ann").await.unwrap(), first);

    let unit = async |name: &str| {
        let mut work = store.begin();
        work.set_command(command("unit"));
        let mut account = work.load::<Account>(name).await?;
        work.record(&mut account, deposited(1))?;
        work.commit().await
    };
    let first = unit("ann").await.unwrap();
    assert_kind!(unit("bob").await, ErrorKind::CommandReused);
    assert_eq!(unit("ann").await.unwrap(), first);
    assert_eq!(store.load::<Account>("bob").await.unwrap().balance, 0);
}

pub(crate) async fn a_command_that_is_decided_again_may_have_other_events(fixture: &mut Fixture) {
    let store = fixture.store();
    let unit = async |amount, count: usize| {
        let mut work = store.begin();
        work.set_command(command("unit"));
        for name in ["ann", "bob"] {
            let mut account = work.load_or_create::<Account>(name).await?;
            work.record_all(&mut account, (0..count).map(|_| deposited(amount)))?;
        }
        work.commit().await
    };
    let first = unit(1, 1).await.unwrap();
    assert_eq!(unit(2, 1).await.unwrap(), first, "other bytes");
    assert_eq!(unit(1, 2).await.unwrap(), first, "other events");
    assert_eq!(log(&fixture.engine()).await.len(), 2);
}

pub(crate) async fn a_command_that_sees_its_own_effect_is_not_refused(fixture: &mut Fixture) {
    const ROUNDS: usize = 30;
    let (store, together) = (fixture.store(), Barrier::new(3));
    for round in 0..ROUNDS {
        store.load_or_create::<Account>(format!("invoice {round}")).await.unwrap();
    }
    let pay = |account: &Account| match account.balance {
        0 => Ok([deposited(1)]),
        _ => Err("paid already"),
    };
    let answers = fixture.threads(3, async |_| {
        let mut answers = Vec::new();
        for round in 0..ROUNDS {
            together.wait();
            let (id, invoice) = (command(&format!("pay {round}")), format!("invoice {round}"));
            answers.push(store.update_once::<Account, _, _>(id, &invoice, pay).await);
        }
        answers
    });
    for round in 0..ROUNDS {
        let receipts = answers.iter().map(|answers| answers[round].as_ref().unwrap());
        assert!(receipts.eq([answers[0][round].as_ref().unwrap(); 3]), "round {round}");
    }
}

pub(crate) async fn a_command_with_a_word_is_told_by_it(fixture: &mut Fixture) {
    let store = fixture.store();
    store.load_or_create::<Account>("ann").await.unwrap();
    let pay = |word: &str| {
        let command = Command::new(command("pay"), word);
        store.update_once::<Account, _, _>(command, "ann", |_| [deposited(1)])
    };
    let first = pay("one").await.unwrap();
    assert_eq!(pay("one").await.unwrap(), first);
    assert_kind!(pay("two").await, ErrorKind::CommandReused);
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 1);
}

pub(crate) async fn a_command_of_several_aggregates_takes_effect_once(fixture: &mut Fixture) {
    let store = fixture.store();
    store.update_or_create::<Account, _, _>("ann", |_| [deposited(5)]).await.unwrap();
    store.load_or_create::<Account>("bob").await.unwrap();
    let transfer = async |word: &str| {
        let work = store.once(Command::new(command("transfer"), word), async |mut work| {
            let mut from = work.load::<Account>("ann").await?;
            let mut to = work.load::<Account>("bob").await?;
            if from.balance < 5 {
                return Err(Error::rejected("too poor"));
            }
            work.record(&mut from, AccountEvent::Withdrawn { amount: 5 })?;
            work.record(&mut to, deposited(5))?;
            work.commit().await
        });
        work.await
    };
    let receipts = join_all((0..8).map(|_| transfer("5 from ann to bob"))).await;
    let first = receipts[0].as_ref().unwrap();
    assert!(receipts.iter().all(|receipt| receipt.as_ref().unwrap() == first), "{receipts:?}");
    assert_kind!(transfer("5 from ann to cid").await, ErrorKind::CommandReused);
    assert_eq!(store.load::<Account>("bob").await.unwrap().balance, 5);
    assert_eq!(store.load::<Account>("ann").await.unwrap().sequence(), at(2));
}

pub(crate) async fn an_update_that_creates_takes_effect_once(fixture: &mut Fixture) {
    let store = fixture.store();
    let open = |name: &str| {
        let (name, decide) = (name.to_owned(), |_: &Account| [deposited(1)]);
        store.update_or_create_once::<Account, _, _>(command("open"), name, decide)
    };
    let receipts = join_all((0..8).map(|_| open("ann"))).await;
    let first = receipts[0].as_ref().unwrap();
    assert!(receipts.iter().all(|receipt| receipt.as_ref().unwrap() == first), "{receipts:?}");
    assert_kind!(open("bob").await, ErrorKind::CommandReused);
    assert_eq!(store.find::<Account>("bob").await.unwrap(), None);
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 1);
}

pub(crate) async fn a_refused_command_is_not_remembered(fixture: &mut Fixture) {
    let store = fixture.store();
    store.load_or_create::<Account>("ann").await.unwrap();
    let spend = |account: &Account| match account.balance {
        0 => Err("too poor"),
        _ => Ok([AccountEvent::Withdrawn { amount: 1 }]),
    };
    assert_kind!(
        store.update_once::<Account, _, _>(command("spend"), "ann", spend).await,
        ErrorKind::Rejected
    );
    assert_eq!(store.receipt(&command("spend")).await.unwrap(), None);
    store.update::<Account, _, _>("ann", |_| [deposited(1)]).await.unwrap();
    store.update_once::<Account, _, _>(command("spend"), "ann", spend).await.unwrap();
    assert_eq!(store.load::<Account>("ann").await.unwrap().balance, 0);
}

pub(crate) async fn old_commands_are_forgotten_and_young_ones_kept(fixture: &mut Fixture) {
    let (engine, store) = (fixture.engine(), fixture.store());
    let old = unit().command("old").commit(&engine).await.unwrap();
    engine.settle(&command("old and settled")).await.unwrap();
    engine.pause(Duration::from_millis(20)).await;
    let young = unit().command("young").commit(&engine).await.unwrap();
    engine.settle(&command("young and settled")).await.unwrap();
    let before = everything(&engine).await;
    assert_eq!(store.forget_commands(old.recorded_at).await.unwrap(), 0, "what was before, not at that time");
    assert_eq!(store.forget_commands(young.recorded_at).await.unwrap(), 2);
    assert_eq!(store.forget_commands(young.recorded_at).await.unwrap(), 0);
    assert_eq!(engine.command(&command("old")).await.unwrap(), None);
    assert_eq!(store.receipt(&command("young")).await.unwrap(), Some(young));
    assert_kind!(unit().command("young and settled").commit(&engine).await, ErrorKind::CommandAbandoned);
    assert_eq!(everything(&engine).await, before);
    // A forgotten command takes effect again.
    assert_ne!(unit().command("old").commit(&engine).await.unwrap(), old);
    unit().command("old and settled").commit(&engine).await.unwrap();
}

pub(crate) async fn thousands_of_commands_are_forgotten(fixture: &mut Fixture) {
    let engine = fixture.engine();
    join_all((0..2_500).map(|n| unit().command(&format!("command {n}")).commit(&engine))).await;
    assert_eq!(engine.forget_commands(Timestamp::MAX).await.unwrap(), 2_500);
    assert_eq!(receipt_of(&engine, &command("command 2499")).await, None);
}

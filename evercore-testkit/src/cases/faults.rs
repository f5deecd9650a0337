//! A batch with several faults gets the same error from every engine: the first in the order of [`Batch::check`].
//!
//! [`Batch::check`]: evercore_core::engine::Batch::check

use evercore_core::engine::Mark;
use evercore_core::{AggregateId, ErrorKind};

use crate::fixture::Fixture;
use crate::tools::*;

/// Commits a batch, which must fail with this kind and write nothing.
macro_rules! assert_refused {
    ($engine:expr, $unit:expr, $kind:pat) => {
        let before = everything($engine).await;
        assert_kind!($unit.commit($engine).await, $kind);
        assert_eq!(everything($engine).await, before);
    };
}

/// An id that no aggregate has.
async fn nobody(engine: &Engine) -> AggregateId {
    new_id(engine).await
}

pub(crate) async fn a_settled_command_goes_before_a_stale_append(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 2).await;
    assert_eq!(engine.settle(&command("late")).await.unwrap(), None);
    let unit = unit().append(id, "user", 1, 1).command("late");
    assert_refused!(&engine, unit, ErrorKind::CommandAbandoned);
}

pub(crate) async fn a_wrong_type_goes_before_a_wrong_sequence(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let id = grown(&engine, "user", 2).await;
    assert_refused!(&engine, unit().append(id, "order", 1, 1), ErrorKind::WrongType { .. });
}

pub(crate) async fn the_first_append_goes_before_the_next(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (id, missing) = (grown(&engine, "user", 2).await, nobody(&engine).await);
    let stale_first = unit().append(id, "user", 1, 1).append(missing, "user", 0, 1);
    assert_refused!(&engine, stale_first, ErrorKind::Conflict { .. });
    let missing_first = unit().append(missing, "user", 0, 1).append(id, "user", 1, 1);
    assert_refused!(&engine, missing_first, ErrorKind::NotFound);
}

pub(crate) async fn a_stale_append_goes_before_a_guard_on_nothing(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (id, missing) = (grown(&engine, "user", 2).await, nobody(&engine).await);
    let unit = unit().guard(missing, 1).append(id, "user", 1, 1);
    assert_refused!(&engine, unit, ErrorKind::Conflict { .. });
}

pub(crate) async fn a_stale_guard_goes_before_a_snapshot_of_nothing(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (id, missing) = (grown(&engine, "user", 2).await, nobody(&engine).await);
    let unit = unit().snapshot(missing, 1, 1, b"state").guard(id, 1);
    assert_refused!(&engine, unit, ErrorKind::Conflict { .. });
}

pub(crate) async fn a_snapshot_of_nothing_goes_before_a_key_of_another_type(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (id, missing) = (grown(&engine, "user", 2).await, nobody(&engine).await);
    let unit = unit().key(id, "order", "7").snapshot(missing, 1, 1, b"state");
    assert_refused!(&engine, unit, ErrorKind::NotFound);
}

pub(crate) async fn a_key_of_another_type_goes_before_a_taken_key(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (id, _) = (grown(&engine, "user", 2).await, keyed(&engine, "order", "7").await);
    let renamed = unit().key(id, "order", "7");
    assert_refused!(&engine, renamed, ErrorKind::WrongType { .. });
    let new = nobody(&engine).await;
    let created = unit().create_keyed(new, "order", "7").key(id, "order", "8");
    assert_refused!(&engine, created, ErrorKind::WrongType { .. });
    let missing = nobody(&engine).await;
    assert_refused!(&engine, unit().key(missing, "order", "7"), ErrorKind::NotFound);
}

pub(crate) async fn a_taken_key_goes_before_an_id_in_use(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (used, _) = (grown(&engine, "user", 2).await, keyed(&engine, "user", "ann").await);
    let new = nobody(&engine).await;
    let unit = unit().create(used, "user").create_keyed(new, "user", "ann");
    assert_refused!(&engine, unit, ErrorKind::KeyTaken { .. });
}

/// An id in use comes last of all.
pub(crate) async fn a_stale_append_or_guard_goes_before_an_id_in_use(fixture: &mut Fixture) {
    let engine = fixture.engine();
    let (id, used) = (grown(&engine, "user", 2).await, grown(&engine, "user", 1).await);
    let appended = unit().create(used, "user").append(id, "user", 1, 1);
    assert_refused!(&engine, appended, ErrorKind::Conflict { .. });
    let guarded = unit().create(used, "user").guard(id, 1);
    assert_refused!(&engine, guarded, ErrorKind::Conflict { .. });
    let read = history(&engine, id).await.mark.expect("the mark of its last event");
    let wrong = Mark::new(read.get().wrapping_add(1));
    let reread = unit().create(used, "user").append(id, "user", 2, 1).read(id, 2, wrong);
    assert_refused!(&engine, reread, ErrorKind::Conflict { .. });
}

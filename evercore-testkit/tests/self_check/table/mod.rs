//! The cases that must fail for each fault. The most telling ones come first; every test run uses the first of each
//! list.

mod commits;
mod edges;
mod reads;
mod subscriptions;

use evercore_testkit::broken::Fault;

pub(crate) struct Row {
    pub(crate) fault: Fault,
    pub(crate) must_fail: &'static [&'static str],
    /// Cases that fail only with luck, because the fault shows in a race.
    pub(crate) may_fail: &'static [&'static str],
}

const fn row(fault: Fault, must_fail: &'static [&'static str], may_fail: &'static [&'static str]) -> Row {
    Row { fault, must_fail, may_fail }
}

/// All rows, in the order of [`Fault::ALL`].
pub(crate) fn table() -> impl Iterator<Item = &'static Row> {
    [commits::ROWS, reads::ROWS, subscriptions::ROWS, edges::ROWS].into_iter().flatten()
}

//! A point in time in microseconds, equal on every engine.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// A point in time, UTC, in microseconds since 1970; from year 1 to the end of year 9999.
///
/// What is finer than a microsecond is cut off towards the past, here, so that all engines store the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

const MICROS: i64 = 1_000_000;
const DAY: i64 = 86_400 * MICROS;

impl Timestamp {
    /// The first moment of year 1.
    pub const MIN: Self = Self(-62_135_596_800 * MICROS);

    /// The last microsecond of year 9999.
    pub const MAX: Self = Self(253_402_300_800 * MICROS - 1);

    /// The time of this computer's clock; outside of what a timestamp can hold it is the nearest that can.
    pub fn now() -> Self {
        Self::try_from(SystemTime::now()).unwrap_or(Self::MAX)
    }

    /// Takes microseconds since 1970-01-01 00:00 UTC; before that they are negative.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) before year 1 or after year 9999.
    pub fn from_micros(micros: i64) -> Result<Self> {
        if (Self::MIN.0..=Self::MAX.0).contains(&micros) {
            return Ok(Self(micros));
        }
        Err(Error::invalid(format!("time {micros} µs is not between the years 1 and 9999")))
    }

    /// This much later, at most [`MAX`](Self::MAX).
    #[must_use]
    pub fn plus(self, time: Duration) -> Self {
        let micros = i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
        Self(self.0.saturating_add(micros).min(Self::MAX.0))
    }

    /// The time from `earlier` to this one; zero if it lies later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// Microseconds since 1970-01-01 00:00 UTC.
    pub const fn as_micros(self) -> i64 {
        self.0
    }
}

impl TryFrom<SystemTime> for Timestamp {
    type Error = Error;

    fn try_from(time: SystemTime) -> Result<Self> {
        let micros = match time.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_micros()),
            Err(before) => i64::try_from(before.duration().as_nanos().div_ceil(1_000)).map(|micros| -micros),
        };
        Self::from_micros(micros.map_err(|_| Error::invalid("time is not between the years 1 and 9999"))?)
    }
}

impl From<Timestamp> for SystemTime {
    fn from(time: Timestamp) -> Self {
        let distance = Duration::from_micros(time.0.unsigned_abs());
        if time.0 < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
    }
}

#[cfg(feature = "time")]
impl TryFrom<time::OffsetDateTime> for Timestamp {
    type Error = Error;

    fn try_from(time: time::OffsetDateTime) -> Result<Self> {
        let micros = i64::try_from(time.unix_timestamp_nanos().div_euclid(1_000));
        Self::from_micros(micros.map_err(|_| Error::invalid("time is not between the years 1 and 9999"))?)
    }
}

#[cfg(feature = "time")]
impl From<Timestamp> for time::OffsetDateTime {
    fn from(timestamp: Timestamp) -> Self {
        Self::UNIX_EPOCH + time::Duration::microseconds(timestamp.0)
    }
}

/// RFC 3339 with six digits, such as `2011-09-30T22:38:44.546000Z`.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = civil(self.0.div_euclid(DAY));
        let of_day = self.0.rem_euclid(DAY);
        let (seconds, micros) = (of_day / MICROS, of_day % MICROS);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timestamp({self})")
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Eras of 400 years that begin on 1 March, so that the leap day is the last of its year: H. Hinnant,
/// "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil(days: i64) -> (i64, i64, i64) {
    let from_era = days + 719_468;
    let (era, day_of_era) = (from_era.div_euclid(146_097), from_era.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_time_are_the_years_1_and_9999() {
        assert_eq!(Timestamp::MIN.to_string(), "0001-01-01T00:00:00.000000Z");
        assert_eq!(Timestamp::MAX.to_string(), "9999-12-31T23:59:59.999999Z");
        assert!(Timestamp::from_micros(Timestamp::MAX.0 + 1).is_err());
        assert!(Timestamp::from_micros(Timestamp::MIN.0 - 1).is_err());
    }

    #[test]
    fn a_day_of_the_loan_log_reads_as_its_file_says() {
        let time = Timestamp::from_micros(1_317_422_324_546_000).unwrap();
        assert_eq!(time.to_string(), "2011-09-30T22:38:44.546000Z");
    }

    #[test]
    fn nanoseconds_are_cut_towards_the_past_on_both_sides_of_1970() {
        let after = UNIX_EPOCH + Duration::from_nanos(1_999);
        let before = UNIX_EPOCH - Duration::from_nanos(1_001);
        assert_eq!(Timestamp::try_from(after).unwrap().as_micros(), 1);
        assert_eq!(Timestamp::try_from(before).unwrap().as_micros(), -2);
    }

    #[test]
    fn a_time_goes_to_std_and_back() {
        for micros in [-62_135_596_800_000_000, -1, 0, 1, 253_402_300_799_999_999] {
            let time = Timestamp::from_micros(micros).unwrap();
            assert_eq!(Timestamp::try_from(SystemTime::from(time)).unwrap(), time);
        }
    }

    #[cfg(feature = "time")]
    #[test]
    fn a_time_goes_to_the_time_crate_and_back() {
        for micros in [-62_135_596_800_000_000, -1, 0, 1, 253_402_300_799_999_999] {
            let time = Timestamp::from_micros(micros).unwrap();
            assert_eq!(Timestamp::try_from(time::OffsetDateTime::from(time)).unwrap(), time);
        }
    }
}

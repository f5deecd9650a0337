//! A point in time in microseconds, equal on every engine.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// A point in time, UTC, in microseconds since 1970; from year 1 to the end of year 9999.
///
/// Fractions of a microsecond are cut off towards the past. So all engines store the same time.
///
/// `Display` writes RFC 3339 in UTC with six digits, and `FromStr` reads RFC 3339 with any offset. With the feature
/// `json`, serde uses the same text.
///
/// ```
/// # use evercore_core::Timestamp;
/// let time: Timestamp = "2011-10-01T00:38:44.546+02:00".parse()?;
/// assert_eq!(time.to_string(), "2011-09-30T22:38:44.546000Z");
/// # Ok::<(), evercore_core::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

const MICROS: i64 = 1_000_000;
const DAY: i64 = 86_400 * MICROS;

impl Timestamp {
    /// The first moment of year 1.
    pub const MIN: Self = Self(-62_135_596_800 * MICROS);

    /// The last microsecond of year 9999.
    pub const MAX: Self = Self(253_402_300_800 * MICROS - 1);

    /// The time of this computer's clock, or the nearest time that a timestamp can hold.
    pub fn now() -> Self {
        Self::try_from(SystemTime::now()).unwrap_or(Self::MAX)
    }

    /// Makes a time from microseconds since 1970-01-01 00:00 UTC. Earlier times are negative.
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

    /// This much earlier, at least [`MIN`](Self::MIN).
    #[must_use]
    pub fn minus(self, time: Duration) -> Self {
        let micros = i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
        Self(self.0.saturating_sub(micros).max(Self::MIN.0))
    }

    /// The time from `earlier` to this one; zero if `earlier` is later.
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

/// RFC 3339 with a date, a time and an offset, such as `2011-09-30T22:38:44Z`.
impl FromStr for Timestamp {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let micros = Rfc3339(text).micros();
        Self::from_micros(micros.ok_or_else(|| Error::invalid("the text is not a time in RFC 3339"))?)
    }
}

/// The rest of a text.
struct Rfc3339<'a>(&'a str);

impl Rfc3339<'_> {
    fn micros(mut self) -> Option<i64> {
        let (year, month, day) = (self.number(4)?, self.after("-")?.number(2)?, self.after("-")?.number(2)?);
        let (hour, minute) = (self.after("Tt ")?.number(2)?, self.after(":")?.number(2)?);
        let second = self.after(":")?.number(2)?;
        let fraction = if self.after(".").is_some() { self.fraction()? } else { 0 };
        let is_time = hour < 24 && minute < 60 && second < 60;
        let days = days_from_civil(year, month, day);
        // Only a valid day is the same after the conversion to days and back.
        if !is_time || !(1..=12).contains(&month) || civil(days) != (year, month, day) {
            return None;
        }
        let seconds = days * 86_400 + hour * 3_600 + minute * 60 + second - self.offset()?;
        self.0.is_empty().then_some(seconds * MICROS + fraction)
    }

    /// The offset from UTC in seconds.
    fn offset(&mut self) -> Option<i64> {
        if self.after("Zz").is_some() {
            return Some(0);
        }
        let sign = if self.after("+").is_some() { 1 } else { self.after("-").map(|_| -1)? };
        let (hours, minutes) = (self.number(2)?, self.after(":")?.number(2)?);
        (hours < 24 && minutes < 60).then_some(sign * (hours * 3_600 + minutes * 60))
    }

    /// Skips one of these letters.
    fn after(&mut self, letters: &str) -> Option<&mut Self> {
        self.0 = self.0.strip_prefix(|letter: char| letters.contains(letter))?;
        Some(self)
    }

    fn number(&mut self, digits: usize) -> Option<i64> {
        let (number, rest) = self.0.split_at_checked(digits)?;
        self.0 = rest;
        number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse().ok())?
    }

    /// Microseconds; further digits are cut off.
    fn fraction(&mut self) -> Option<i64> {
        let end = self.0.bytes().position(|byte| !byte.is_ascii_digit()).unwrap_or(self.0.len());
        let (digits, rest) = self.0.split_at(end);
        self.0 = rest;
        let six = digits.bytes().chain(std::iter::repeat(b'0')).take(6);
        (!digits.is_empty()).then(|| six.fold(0, |micros, digit| micros * 10 + i64::from(digit - b'0')))
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timestamp({self})")
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Uses eras of 400 years that begin on 1 March, so that the leap day is the last day of its year. From H. Hinnant,
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

/// The inverse of [`civil`], from the same source (`days_from_civil`).
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let shifted_month = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * shifted_month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
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

    #[test]
    fn a_time_is_read_from_its_text() {
        for micros in
            [Timestamp::MIN.0, -1, 0, 1, 951_782_400_000_000, 1_317_422_324_546_000, Timestamp::MAX.0]
        {
            let time = Timestamp::from_micros(micros).unwrap();
            assert_eq!(time.to_string().parse::<Timestamp>().unwrap(), time);
        }
        for (text, micros) in [
            ("1970-01-01T00:00:00Z", 0),
            ("1970-01-01 00:00:00.1z", 100_000),
            ("1970-01-01t01:00:00.0000019+01:00", 1),
            ("1969-12-31T23:59:59.9999999-00:00", -1),
            ("2000-02-29T00:00:00Z", 951_782_400_000_000),
        ] {
            assert_eq!(text.parse::<Timestamp>().unwrap().as_micros(), micros, "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "1970-01-01",
            "1970-01-01T00:00:00",
            "1970-01-01T00:00:00.Z",
            "1970-01-01T00:00:00Zx",
            "1970-13-01T00:00:00Z",
            "1970-00-01T00:00:00Z",
            "1970-02-29T00:00:00Z",
            "1970-01-00T00:00:00Z",
            "1970-01-01T24:00:00Z",
            "1970-01-01T00:00:60Z",
            "1970-01-01T00:00:00+24:00",
            "+970-01-01T00:00:00Z",
            "0000-12-31T23:59:59Z",
            "9999-12-31T23:59:59-00:01",
            "197\u{e9}-01-01T00:00:00Z",
        ] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }
}

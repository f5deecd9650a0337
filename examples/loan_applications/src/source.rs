//! The lines of the log: from a CSV file, or made here if there is none.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::evercore::{BoxError, Timestamp};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::application::ApplicationEvent;

/// One line: what happened to which application, when, and who did it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Line {
    pub(crate) case: String,
    pub(crate) time: Timestamp,
    pub(crate) event: ApplicationEvent,
    pub(crate) resource: String,
}

/// The lines of a file, in the file's order. A line that does not read is an error that names its number.
pub(crate) fn lines(
    path: Option<&Path>,
) -> Result<Box<dyn Iterator<Item = Result<Line, BoxError>>>, BoxError> {
    match path {
        Some(path) => {
            let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
            Ok(Box::new(read(file)?))
        }
        None => Ok(Box::new(read(std::io::Cursor::new(made_up()))?)),
    }
}

fn read(source: impl Read) -> Result<impl Iterator<Item = Result<Line, BoxError>>, BoxError> {
    let mut reader = csv::Reader::from_reader(source);
    let header = reader.headers()?.iter().collect::<Vec<_>>().join(",");
    if header != "case_id,timestamp,name,transition,resource,amount_req" {
        return Err("line 1: not the header of a log of loan applications".into());
    }
    Ok(reader.into_records().enumerate().map(|(index, record)| {
        let record = record.map_err(|error| format!("line {}: {error}", index + 2))?;
        let number = record.position().map_or(index as u64 + 2, csv::Position::line);
        parse(&record).map_err(|reason| format!("line {number}: {reason}").into())
    }))
}

fn parse(record: &csv::StringRecord) -> Result<Line, String> {
    let [case, time, name, transition, resource, amount] =
        std::array::from_fn(|at| record.get(at).unwrap_or(""));
    let time = OffsetDateTime::parse(time, &Rfc3339).map_err(|_| format!("\"{time}\" is no time"))?;
    let time = Timestamp::try_from(std::time::SystemTime::from(time)).map_err(|error| error.to_string())?;
    let amount = amount.parse().map_err(|_| format!("\"{amount}\" is no amount"))?;
    let event = ApplicationEvent::from_source(name, transition, amount)
        .ok_or_else(|| format!("\"{name}\" with \"{transition}\" is no event of an application"))?;
    if case.is_empty() {
        return Err("the case id is empty".to_owned());
    }
    Ok(Line { case: case.to_owned(), time, event, resource: resource.to_owned() })
}

/// A small log of the same shape: 200 applications, one begun each hour, three steps an hour apart and an end.
fn made_up() -> String {
    let mut lines = Vec::new();
    for case in 0..200_i64 {
        let end = ["A_DECLINED,COMPLETE", "A_CANCELLED,COMPLETE", "A_APPROVED,COMPLETE"][case as usize % 3];
        let steps = ["A_SUBMITTED,COMPLETE", "A_PARTLYSUBMITTED,COMPLETE", "W_Afhandelen leads,START", end];
        for (hour, step) in steps.iter().enumerate() {
            let moment = OffsetDateTime::UNIX_EPOCH + time::Duration::hours(case + hour as i64);
            let time = moment.format(&Rfc3339).unwrap_or_default();
            lines.push((
                moment,
                format!("{},{time},{step},11{},{}", 1000 + case, case % 10, 5_000 + 10 * case),
            ));
        }
    }
    lines.sort_by_key(|(moment, _)| *moment);
    let mut log = "case_id,timestamp,name,transition,resource,amount_req\n".to_owned();
    for (_, line) in lines {
        log.push_str(&line);
        log.push('\n');
    }
    log
}

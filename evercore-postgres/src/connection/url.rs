//! Parses a URL or a `name=value` list as psql does. Errors show only the names of parameters, never their values.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use evercore_core::{Error, Result};
use percent_encoding::percent_decode_str;
use tokio_postgres::Config;

/// The parameters that are passed to the driver.
const OF_THE_DRIVER: [&str; 13] = [
    "user",
    "password",
    "dbname",
    "options",
    "application_name",
    "sslnegotiation",
    "tcp_user_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "target_session_attrs",
    "channel_binding",
];

/// The parsed URL: one driver configuration per host, and the parameters that the driver does not support.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) hosts: Vec<Config>,
    pub(crate) ssl_mode: Option<String>,
    pub(crate) root_certificate: Option<PathBuf>,
    pub(crate) client_certificate: Option<PathBuf>,
    pub(crate) client_key: Option<PathBuf>,
    pub(crate) has_target: bool,
    /// For each host, as in psql.
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) in_any_order: bool,
}

impl Asked {
    pub(crate) fn parse(url: &str) -> Result<Self> {
        let pairs = match url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://")) {
            Some(rest) => of_url(rest)?,
            None => of_list(url)?,
        };
        let mut asked = Self::default();
        let (mut driver, mut hosts) = (String::new(), Hosts::default());
        for Pair { name, value, is_shown } in pairs {
            match name.as_str() {
                "host" => hosts.names = list(&value),
                "hostaddr" => hosts.addresses = list(&value),
                "port" => hosts.ports = list(&value),
                "sslmode" => asked.ssl_mode = Some(value),
                "sslrootcert" => asked.root_certificate = Some(PathBuf::from(value)),
                "sslcert" => asked.client_certificate = Some(PathBuf::from(value)),
                "sslkey" => asked.client_key = Some(PathBuf::from(value)),
                "connect_timeout" => {
                    let seconds = i64::from_str(&value).map_err(|_| bad_value(&name))?;
                    asked.connect_timeout =
                        u64::try_from(seconds).ok().filter(|it| *it > 0).map(Duration::from_secs);
                }
                "load_balance_hosts" => {
                    asked.in_any_order = match value.as_str() {
                        "disable" => false,
                        "random" => true,
                        _ => return Err(bad_value(&name)),
                    };
                }
                known if OF_THE_DRIVER.contains(&known) => {
                    asked.has_target |= known == "target_session_attrs";
                    let pair = format!("{name}={} ", quoted(&value));
                    Config::from_str(&pair).map_err(|_| bad_value(&name))?;
                    driver.push_str(&pair);
                }
                _ if is_shown => {
                    return Err(Error::invalid(format!("the URL's parameter \"{name}\" is not supported")));
                }
                _ => {
                    let message = "a parameter after the password is not supported, and may be part of the \
                                   password: put a password with spaces in quotes";
                    return Err(Error::invalid(message));
                }
            }
        }
        asked.hosts = hosts.configs(&driver)?;
        Ok(asked)
    }
}

/// A parameter, and whether its name may be shown.
struct Pair {
    name: String,
    value: String,
    is_shown: bool,
}

impl Pair {
    fn new(name: &str, value: String) -> Self {
        Self { name: name.to_owned(), value, is_shown: true }
    }
}

fn bad_value(name: &str) -> Error {
    Error::invalid(format!("the value of \"{name}\" in the URL is not valid (it is not shown here)"))
}

fn unreadable(what: &str) -> Error {
    Error::invalid(format!("the URL of the server cannot be parsed (it is not shown here): {what}"))
}

fn list(value: &str) -> Vec<String> {
    value.split(',').map(str::to_owned).collect()
}

fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// The hosts, by their names, their addresses or both.
#[derive(Default)]
struct Hosts {
    names: Vec<String>,
    addresses: Vec<String>,
    ports: Vec<String>,
}

impl Hosts {
    fn configs(&self, driver: &str) -> Result<Vec<Config>> {
        let count = self.names.len().max(self.addresses.len());
        if count == 0 {
            return Err(Error::invalid("the URL names no host"));
        }
        let fits = |list: &[String]| list.is_empty() || list.len() == count;
        if !fits(&self.names) || !fits(&self.addresses) || !(fits(&self.ports) || self.ports.len() == 1) {
            let message = "the URL must list as many of \"host\" as of \"hostaddr\" and \"port\"";
            return Err(Error::invalid(message));
        }
        (0..count).map(|index| self.config(driver, index)).collect()
    }

    fn config(&self, driver: &str, index: usize) -> Result<Config> {
        let mut config = Config::from_str(driver).map_err(|_| unreadable("a parameter"))?;
        if let Some(name) = self.names.get(index) {
            if name.is_empty() {
                return Err(Error::invalid("the URL has a \"host\" without a name"));
            }
            config.host(name);
        }
        if let Some(address) = self.addresses.get(index) {
            config.hostaddr(IpAddr::from_str(address).map_err(|_| bad_value("hostaddr"))?);
        }
        let port = self.ports.get(index).or(self.ports.first()).filter(|port| !port.is_empty());
        let port = port.map(|port| u16::from_str(port)).transpose().map_err(|_| bad_value("port"))?;
        config.port(port.unwrap_or(5432));
        Ok(config)
    }
}

/// The parts of `user:password@host:port,host:port/dbname?name=value&…`.
fn of_url(rest: &str) -> Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    let rest = match rest.find(['@', '/']) {
        Some(end) if rest[end..].starts_with('@') => {
            let (user, password) =
                rest[..end].split_once(':').map_or((&rest[..end], None), |(user, it)| (user, Some(it)));
            pairs.push(Pair::new("user", decoded("user", user)?));
            if let Some(password) = password {
                pairs.push(Pair::new("password", decoded("password", password)?));
            }
            &rest[end + 1..]
        }
        _ => rest,
    };
    // A password with an unescaped "/" or "@" would be parsed as a host or a database, and shown in errors.
    if rest.split('?').next().is_some_and(|before| before.contains('@')) {
        let message = "unexpected \"@\": in a name or a password, write \"/\" as %2F and \"@\" as %40";
        return Err(unreadable(message));
    }
    let (hosts, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    if !hosts.is_empty() {
        let (names, ports): (Vec<_>, Vec<_>) =
            hosts.split(',').map(host_and_port).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        pairs.push(Pair::new("host", names.join(",")));
        pairs.push(Pair::new("port", ports.join(",")));
    }
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if let Some(database) = path.strip_prefix('/').filter(|name| !name.is_empty()) {
        pairs.push(Pair::new("dbname", decoded("dbname", database)?));
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or_else(|| unreadable("a parameter without \"=\""))?;
        let name = decoded("name of a parameter", name)?;
        pairs.push(Pair { value: decoded(&name, value)?, name, is_shown: true });
    }
    Ok(pairs)
}

fn host_and_port(text: &str) -> Result<(String, String)> {
    let (name, port) = match text.strip_prefix('[') {
        Some(rest) => {
            rest.split_once(']').ok_or_else(|| unreadable("a host with \"[\" but without \"]\""))?
        }
        None => text.find(':').map_or((text, ""), |colon| text.split_at(colon)),
    };
    let port = match port.strip_prefix(':') {
        Some(port) => port,
        None if port.is_empty() => "",
        None => return Err(unreadable("the text after \"]\" is not a port")),
    };
    Ok((decoded("host", name)?, decoded("port", port)?))
}

fn decoded(what: &str, text: &str) -> Result<String> {
    let decoded = percent_decode_str(text).decode_utf8();
    Ok(decoded.map_err(|_| unreadable(&format!("\"{what}\" is not in UTF-8")))?.into_owned())
}

/// The pairs of a `name = value` list. In a value, quoted or not, `\` escapes the next character.
fn of_list(text: &str) -> Result<Vec<Pair>> {
    let mut letters = text.chars().peekable();
    let (mut pairs, mut is_shown) = (Vec::new(), true);
    loop {
        while letters.next_if(|letter| letter.is_whitespace()).is_some() {}
        if letters.peek().is_none() {
            return Ok(pairs);
        }
        let mut name = String::new();
        while let Some(letter) = letters.next_if(|letter| *letter != '=' && !letter.is_whitespace()) {
            name.push(letter);
        }
        while letters.next_if(|letter| letter.is_whitespace()).is_some() {}
        if letters.next() != Some('=') {
            return Err(unreadable("a parameter without \"=\""));
        }
        while letters.next_if(|letter| letter.is_whitespace()).is_some() {}
        let is_quoted = letters.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match letters.next() {
                Some('\'') if is_quoted => break,
                Some(letter) if letter.is_whitespace() && !is_quoted => break,
                Some('\\') => value.extend(letters.next()),
                Some(letter) => value.push(letter),
                None if is_quoted => return Err(unreadable("a quote that is not closed")),
                None => break,
            }
        }
        let may_go_on = name == "password" && !is_quoted;
        pairs.push(Pair { name, value, is_shown });
        is_shown &= !may_go_on;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> Vec<(String, String)> {
        let pairs = match text.strip_prefix("postgres://") {
            Some(rest) => of_url(rest),
            None => of_list(text),
        };
        pairs.unwrap().into_iter().map(|pair| (pair.name, pair.value)).collect()
    }

    fn texts(pairs: &[(String, String)]) -> Vec<(&str, &str)> {
        pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    #[test]
    fn a_url_is_read_as_psql_reads_it() {
        let read = all(
            "postgres://us%40er:pa%2Fs?s:w@one:1,[::1]:2,%2Ftmp/d%20b?sslrootcert=/a%20b&sslmode=verify%2Dfull",
        );
        let expected = [
            ("user", "us@er"),
            ("password", "pa/s?s:w"),
            ("host", "one,::1,/tmp"),
            ("port", "1,2,"),
            ("dbname", "d b"),
            ("sslrootcert", "/a b"),
            ("sslmode", "verify-full"),
        ];
        assert_eq!(texts(&read), expected);
        assert_eq!(
            texts(&all("postgres:///x?application_name=a@b")),
            [("dbname", "x"), ("application_name", "a@b")]
        );
    }

    #[test]
    fn a_list_is_read_as_psql_reads_it() {
        let read = all(r"user=a  password='b \' c' sslmode = require host= x\ y empty='' ");
        let expected =
            [("user", "a"), ("password", "b ' c"), ("sslmode", "require"), ("host", "x y"), ("empty", "")];
        assert_eq!(texts(&read), expected);
    }

    #[test]
    fn each_host_has_its_address_and_port() {
        let asked =
            Asked::parse("postgres://one:1,two/x?hostaddr=10.0.0.1,10.0.0.2&connect_timeout=2").unwrap();
        let ports: Vec<_> = asked.hosts.iter().map(|host| host.get_ports().to_vec()).collect();
        assert_eq!((ports, asked.connect_timeout), (vec![vec![1], vec![5432]], Some(Duration::from_secs(2))));
        assert!(
            asked.hosts.iter().all(|host| host.get_hosts().len() == 1 && host.get_hostaddrs().len() == 1)
        );
        let asked = Asked::parse("host=one,two port=7 user=a").unwrap();
        assert!(asked.hosts.iter().all(|host| host.get_ports() == [7] && host.get_user() == Some("a")));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (url, named) in [
            ("postgres://u:hunter2@h/x?ssl_mode=require", "\"ssl_mode\""),
            ("postgres://u:hunter2@h/x?port=many", "\"port\""),
            ("postgres://u:hunter2@h/x?target_session_attrs=hunter2", "\"target_session_attrs\""),
            ("postgres://u:hunter2@h/x?connect_timeout=soon", "\"connect_timeout\""),
            ("postgres://u:hunter2@one,two/x?hostaddr=10.0.0.1", "\"hostaddr\""),
            ("postgres://u:hunter2@:5432/x", "\"host\""),
            ("postgres:///x?user=hunter2", "names no host"),
            ("user=a password=hunter2", "names no host"),
            ("host=h passwrd=hunter2", "\"passwrd\""),
            ("host=h password=my hunter2=x", "after the password"),
            ("host=h password='hunter2", "a quote"),
            ("postgres://u:hunter2@[bad", "a host"),
        ] {
            let error = Asked::parse(url).unwrap_err();
            assert_eq!(*error.kind(), evercore_core::ErrorKind::Invalid);
            assert!(error.to_string().contains(named), "{url}: {error}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
    }
}

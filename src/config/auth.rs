//! Settings of authentication: the kind of tokens, the cost of passwords.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use super::{duration, parse::FlagValues, value::count};
use crate::{
    logging::{Level, Notice},
    version::CAPABILITY_LEVEL,
};

/// etcd's error text for a value of `--auth-token` that cannot be used.
pub const INVALID_OPTIONS: &str = "auth: invalid auth options";

const DEFAULT_JWT_TTL: Duration = Duration::from_mins(5);
const DEFAULT_SIMPLE_TTL_SECONDS: u64 = 300;
const BCRYPT_COSTS: std::ops::RangeInclusive<u32> = 4..=31;
const DEFAULT_BCRYPT_COST: u32 = 10;

/// The options of a JSON web token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtConfig {
    /// The signature algorithm, by its name in RFC 7518: `RS256`.
    pub method: String,
    pub public_key: Option<PathBuf>,
    pub private_key: Option<PathBuf>,
    pub ttl: Duration,
}

/// The kind of tokens that clients are given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenKind {
    Simple,
    Jwt(JwtConfig),
    /// No token is issued, and none is valid.
    None,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthConfig {
    pub tokens: TokenKind,
    /// How long a simple token is valid after its last use.
    pub simple_token_ttl: Duration,
    pub bcrypt_cost: u32,
    /// How many logins may wait for their password to be checked.
    pub max_waiting_logins: usize,
    /// The capability level that this member knows, at most.
    pub max_capability_level: u64,
}

impl AuthConfig {
    pub fn read(values: &FlagValues, notices: &mut Vec<Notice>) -> Result<Self, String> {
        let max_capability_level: u64 = values.get("max-capability-level");
        if max_capability_level > CAPABILITY_LEVEL {
            return Err(format!(
                "--max-capability-level must be at most {CAPABILITY_LEVEL}, which this version knows (set to \
                 {max_capability_level})"
            ));
        }
        let max_waiting_logins = match values.get("max-waiting-logins") {
            0_u64 => return Err("--max-waiting-logins must be at least 1 (set to 0)".to_owned()),
            logins => count(logins),
        };
        let ttl_seconds = match values.get("auth-token-ttl") {
            0_u64 => DEFAULT_SIMPLE_TTL_SECONDS,
            seconds => seconds,
        };
        Ok(Self {
            tokens: token_kind(values.text("auth-token"), notices)?,
            simple_token_ttl: Duration::from_secs(ttl_seconds),
            bcrypt_cost: bcrypt_cost(values.get("bcrypt-cost"), notices),
            max_waiting_logins,
            max_capability_level,
        })
    }
}

/// As in etcd, a cost that bcrypt does not allow is replaced by the default.
fn bcrypt_cost(given: u64, notices: &mut Vec<Notice>) -> u32 {
    match u32::try_from(given) {
        Ok(cost) if BCRYPT_COSTS.contains(&cost) => cost,
        _ => {
            let notice = Notice::new(Level::Warn, "use default bcrypt cost instead of the invalid given cost");
            notices.push(
                notice
                    .with("min-cost", *BCRYPT_COSTS.start())
                    .with("max-cost", *BCRYPT_COSTS.end())
                    .with("default-cost", DEFAULT_BCRYPT_COST)
                    .with("given-cost", given),
            );
            DEFAULT_BCRYPT_COST
        }
    }
}

/// Reads `simple`, or `jwt,sign-method=RS256,pub-key=…,priv-key=…,ttl=10m`.
fn token_kind(text: &str, notices: &mut Vec<Notice>) -> Result<TokenKind, String> {
    let invalid = |why: String| format!("{INVALID_OPTIONS}: {why}");
    let mut parts = text.split(',');
    let kind = parts.next().unwrap_or_default();
    let mut options = BTreeMap::new();
    for part in parts {
        match part.split_once('=') {
            Some((name, value)) if !value.contains('=') => {
                if options.insert(name, value).is_some() {
                    return Err(invalid(format!("{name} is given twice")));
                }
            }
            _ => return Err(invalid(format!("{part:?} is not name=value"))),
        }
    }
    match kind {
        "simple" => Ok(TokenKind::Simple),
        "" => Ok(TokenKind::None),
        "jwt" => jwt(&mut options, notices).map(TokenKind::Jwt).map_err(invalid),
        other => Err(invalid(format!("unknown kind of token {other:?}: simple and jwt are known"))),
    }
}

fn jwt(options: &mut BTreeMap<&str, &str>, notices: &mut Vec<Notice>) -> Result<JwtConfig, String> {
    let mut file = |name| options.remove(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let (public_key, private_key) = (file("pub-key"), file("priv-key"));
    let method = options.remove("sign-method").unwrap_or_default().to_owned();
    let ttl = match options.remove("ttl") {
        None | Some("") => DEFAULT_JWT_TTL,
        Some(text) => match duration::parse(text).map(u64::try_from) {
            Ok(Ok(nanos)) if nanos > 0 => Duration::from_nanos(nanos),
            Ok(_) => return Err(format!("ttl: {text:?} is not above zero")),
            Err(error) => return Err(format!("ttl: {error}")),
        },
    };
    for name in options.keys() {
        notices.push(Notice::new(Level::Warn, "unknown option of a JSON web token is ignored").with("option", *name));
    }
    Ok(JwtConfig { method, public_key, private_key, ttl })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<TokenKind, String> {
        token_kind(text, &mut Vec::new())
    }

    #[test]
    fn the_kind_of_token_has_options() {
        assert_eq!((read("simple"), read("")), (Ok(TokenKind::Simple), Ok(TokenKind::None)));
        let expected = JwtConfig {
            method: "RS256".to_owned(),
            public_key: Some("a.pub".into()),
            private_key: Some("a.key".into()),
            ttl: Duration::from_mins(10),
        };
        let text = "jwt,pub-key=a.pub,priv-key=a.key,sign-method=RS256,ttl=10m";
        assert_eq!(read(text), Ok(TokenKind::Jwt(expected)));
        let Ok(TokenKind::Jwt(plain)) = read("jwt,sign-method=HS256") else { panic!("it is one") };
        assert_eq!((plain.ttl, plain.public_key), (Duration::from_mins(5), None));
    }

    #[test]
    fn options_that_cannot_be_used_are_refused_with_etcds_text() {
        for text in ["paseto", "jwt,a", "jwt,a=b=c", "jwt,ttl=1s,ttl=2s", "jwt,ttl=x", "jwt,ttl=0s", "jwt,ttl=-1s"] {
            let refused = read(text).unwrap_err();
            assert!(refused.starts_with("auth: invalid auth options: "), "{text}: {refused}");
        }
    }

    #[test]
    fn an_unknown_option_and_an_impossible_cost_are_warnings() {
        let mut notices = Vec::new();
        token_kind("jwt,sign-method=HS256,color=red", &mut notices).unwrap();
        assert_eq!(
            [bcrypt_cost(3, &mut notices), bcrypt_cost(32, &mut notices), bcrypt_cost(4, &mut notices)],
            [10, 10, 4]
        );
        assert_eq!(notices.len(), 3);
    }
}

//! One flag: its name, the kind of its value, its default, and whether it is implemented.

use super::{
    duration,
    gates::FeatureGates,
    value::{self, Value},
};
use crate::net::url;

#[derive(Debug, Clone, Copy)]
pub struct Flag {
    /// The name, without dashes.
    pub name: &'static str,
    pub kind: Kind,
    /// The default, in the form in which a value is given.
    pub default: &'static str,
    /// One line of help text.
    pub help: &'static str,
    pub status: Status,
}

/// The kind of value that a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    /// `true` or `false`; the bare flag means `true`.
    Bool,
    Unsigned,
    Unsigned32,
    Signed,
    /// Go's notation: `100ms`, `1h30m`.
    Duration,
    /// A comma-separated list of URLs.
    Urls,
    /// `*`, or a comma-separated list of URLs.
    Origins,
    /// A comma-separated list of strings.
    Strings,
    /// `Gate=true,Other=false`.
    Gates,
    /// One of these.
    Choice(&'static [&'static str]),
    /// The value is not read: the flag is obsolete in etcd too, but old start commands still contain it.
    Ignored,
}

/// Whether a flag is implemented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Supported,
    /// Accepted without effect. A warning at startup gives the reason, unless the value is the default.
    NoEffect(&'static str),
    /// Any value but the default stops the start; the text says why.
    Refused(&'static str),
}

pub(super) const fn flag(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Flag {
    Flag { name, kind, default, help, status: Status::Supported }
}

impl Flag {
    pub(super) const fn no_effect(mut self, reason: &'static str) -> Self {
        self.status = Status::NoEffect(reason);
        self
    }

    pub(super) const fn refused(mut self, reason: &'static str) -> Self {
        self.status = Status::Refused(reason);
        self
    }

    /// The environment variable for the flag.
    #[must_use]
    pub fn variable(&self) -> String {
        variable(self.name)
    }

    /// Whether two texts mean the same value.
    #[must_use]
    pub fn same_value(&self, a: &str, b: &str) -> bool {
        match self.kind {
            Kind::Bool => bool::read(a) == bool::read(b),
            Kind::Unsigned | Kind::Unsigned32 => u64::read(a) == u64::read(b),
            Kind::Signed => i64::read(a) == i64::read(b),
            Kind::Duration => duration::parse(a) == duration::parse(b),
            Kind::Urls => url::parse_list(a) == url::parse_list(b),
            Kind::Text | Kind::Origins | Kind::Strings | Kind::Gates | Kind::Choice(_) | Kind::Ignored => a == b,
        }
    }
}

impl Kind {
    /// Whether the bare flag means `true` and never takes the next argument.
    #[must_use]
    pub fn value_is_optional(self) -> bool {
        matches!(self, Self::Bool | Self::Ignored)
    }

    /// Checks that `text` is a value of this kind.
    ///
    /// # Errors
    /// With the text of Go's flag package, or of etcd for etcd's own kinds.
    pub fn check(self, text: &str) -> Result<(), String> {
        match self {
            Self::Text | Self::Strings | Self::Ignored => Ok(()),
            Self::Bool => bool::read(text).map(drop),
            Self::Unsigned => u64::read(text).map(drop),
            Self::Unsigned32 => value::unsigned_32(text).map(drop),
            Self::Signed => i64::read(text).map(drop),
            Self::Duration => duration::parse(text).map(drop).map_err(|_| value::PARSE_ERROR.to_owned()),
            Self::Urls => url::parse_list(text).map(drop),
            Self::Origins if text == "*" => Ok(()),
            Self::Origins => url::parse_each(text).map(drop),
            Self::Gates => FeatureGates::parse(text).map(drop),
            Self::Choice(values) if values.contains(&text) => Ok(()),
            Self::Choice(_) => Err("invalid value".to_owned()),
        }
    }
}

/// The environment variable for a flag.
#[must_use]
pub fn variable(flag: &str) -> String {
    format!("ETCD_{}", flag.replace(['-', '.'], "_").to_uppercase())
}

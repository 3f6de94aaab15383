//! Parses arguments and environment into one text per flag, by the rules of Go's flag package and of etcd's variables.
//!
//! * One dash or two; `--flag=value` or `--flag value`. A boolean flag takes `=value` or no value, never the next argument.
//! * The last occurrence wins. A lone `--`, or the first argument that is not a flag, ends the flags.
//! * A flag that is set both on the command line and by its variable stops the start, even if the values agree.
//! * An empty variable counts as unset; an unknown `ETCD_` variable causes a warning.
//!
//! Every text is checked against the kind of its flag when it is set, so reading it later cannot fail.

use std::{collections::BTreeMap, time::Duration};

use super::{
    duration,
    flag::{self, Flag, Kind},
    flags,
    gates::{self, Gate},
    value::Value,
};
use crate::logging::{Level, Notice};

/// The flags that were set, each with its text.
#[derive(Debug, Default)]
pub struct FlagValues {
    texts: BTreeMap<&'static str, String>,
    gates: Vec<(Gate, bool)>,
    /// Old spellings that were used, each with the current name.
    pub old_spellings: Vec<(String, String)>,
}

/// Why parsing stops.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop {
    /// Help was requested.
    Help,
    /// An argument is invalid; the text is Go's.
    Invalid(String),
}

/// What the name of a flag refers to.
#[derive(Clone, Copy)]
enum Target {
    Flag(&'static Flag),
    /// An old flag that has become a gate.
    Gate(Gate),
    Ignored,
}

impl Target {
    fn find(name: &str) -> Option<Self> {
        if let Some(flag) = flags::find(name).or_else(|| flags::find_experimental(name)) {
            return Some(Self::Flag(flag));
        }
        if let Some((_, gate)) = gates::former_flags().find(|(flag, _)| *flag == name) {
            return Some(Self::Gate(gate));
        }
        flags::IGNORED.contains(&name).then_some(Self::Ignored)
    }

    fn kind(self) -> Kind {
        match self {
            Self::Flag(flag) => flag.kind,
            Self::Gate(_) => Kind::Bool,
            Self::Ignored => Kind::Ignored,
        }
    }
}

impl FlagValues {
    /// Parses the arguments (without the program name); also returns the arguments after the flags.
    ///
    /// # Errors
    /// At the first argument that is invalid or asks for help.
    pub fn from_arguments(arguments: &[String]) -> Result<(Self, &[String]), Stop> {
        let mut values = Self::default();
        let mut rest = arguments;
        while let Some((argument, following)) = rest.split_first() {
            let Some(flag) = undashed(argument) else {
                break;
            };
            rest = following;
            if flag.is_empty() {
                break; // The lone `--`.
            }
            if flag.starts_with(['-', '=']) {
                return Err(Stop::Invalid(format!("bad flag syntax: {argument}")));
            }
            let (name, value) = flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
            let target = Target::find(name).ok_or_else(|| unknown(name))?;
            let value = match value {
                Some(value) => value,
                None if target.kind().value_is_optional() => "true",
                None => {
                    let (value, following) =
                        rest.split_first().ok_or_else(|| Stop::Invalid(format!("flag needs an argument: -{name}")))?;
                    rest = following;
                    value
                }
            };
            values.set(name, target, value).map_err(|why| invalid_value(name, target, value, &why))?;
        }
        Ok((values, rest))
    }

    /// Adds the values of environment variables; only those that begin with `ETCD_` matter.
    ///
    /// # Errors
    /// The log line that ends the start, if a variable conflicts with a flag or has an invalid value.
    pub fn add_environment(
        &mut self,
        environment: &[(String, String)],
        notices: &mut Vec<Notice>,
    ) -> Result<(), Notice> {
        let names = names_by_variable();
        let mut used = Vec::new();
        for (variable, value) in environment.iter().filter(|(variable, _)| variable.starts_with("ETCD_")) {
            match names.get(variable) {
                _ if variable == "ETCD_VERSION" && !value.is_empty() => notices.push(
                    Notice::new(Level::Warn, "cannot set special environment variable")
                        .with("key", "ETCD_VERSION")
                        .with("value", value.clone()),
                ),
                Some(name) if self.is_given(name) => return Err(conflict(variable)),
                Some(name) if !value.is_empty() => used.push((flags::find(name).is_some(), name, variable, value)),
                _ => notices.push(unrecognized(variable, value)),
            }
        }
        used.sort_unstable(); // Old spellings first, so that the current names win.
        for (_, name, variable, value) in used {
            let target = Target::find(name).expect("the name comes from the tables");
            self.set(name, target, value).map_err(|why| {
                Notice::new(Level::Warn, super::NOT_VERIFIED)
                    .with("error", format!("invalid value {value:?} for {variable}: {why}"))
            })?;
            notices.push(
                Notice::new(Level::Info, "recognized and used environment variable")
                    .with("variable-name", variable.clone())
                    .with("variable-value", redacted(variable, value)),
            );
        }
        Ok(())
    }

    fn set(&mut self, name: &str, target: Target, value: &str) -> Result<(), String> {
        target.kind().check(value)?;
        match target {
            Target::Flag(flag) => {
                if flag.name != name {
                    self.old_spellings.push((name.to_owned(), flag.name.to_owned()));
                }
                self.texts.insert(flag.name, value.to_owned());
            }
            Target::Gate(gate) => {
                self.old_spellings.push((name.to_owned(), format!("feature-gates={gate:?}=…")));
                self.gates.push((gate, bool::read(value)?));
            }
            Target::Ignored => {}
        }
        Ok(())
    }

    /// Sets a flag that was not given, because another flag implies it.
    pub(super) fn imply(&mut self, flag: &'static Flag, value: String) -> Result<(), String> {
        flag.kind.check(&value)?;
        self.texts.insert(flag.name, value);
        Ok(())
    }

    fn is_given(&self, name: &str) -> bool {
        match Target::find(name) {
            Some(Target::Flag(flag)) => self.is_set(flag.name),
            Some(Target::Gate(gate)) => self.gates.iter().any(|(set, _)| *set == gate),
            Some(Target::Ignored) | None => false,
        }
    }

    /// Whether the flag was set, by the command line, a variable, or implication.
    #[must_use]
    pub fn is_set(&self, name: &str) -> bool {
        self.texts.contains_key(name)
    }

    /// The text of the flag: the one that was set, or the default.
    #[must_use]
    pub fn text(&self, name: &str) -> &str {
        let flag = flags::find(name).expect("the flag is in the table");
        self.texts.get(name).map_or(flag.default, String::as_str)
    }

    #[must_use]
    pub fn get<T: Value>(&self, name: &str) -> T {
        T::read(self.text(name)).expect("a text is checked when it is set")
    }

    /// The signed nanoseconds of a duration flag.
    pub(super) fn nanoseconds(&self, name: &str) -> i64 {
        duration::parse(self.text(name)).expect("a text is checked when it is set")
    }

    /// The value of a duration flag; a negative one counts as zero.
    pub(super) fn duration(&self, name: &str) -> Duration {
        Duration::from_nanos(u64::try_from(self.nanoseconds(name)).unwrap_or(0))
    }

    /// The gates that were set by old flags.
    #[must_use]
    pub fn gates(&self) -> &[(Gate, bool)] {
        &self.gates
    }
}

/// The argument without its one or two dashes; None if it is not a flag.
fn undashed(argument: &str) -> Option<&str> {
    let name = argument.strip_prefix('-')?;
    match name.strip_prefix('-') {
        Some(name) => Some(name),
        None if name.is_empty() => None,
        None => Some(name),
    }
}

fn unknown(name: &str) -> Stop {
    match name {
        "help" | "h" => Stop::Help,
        _ => Stop::Invalid(format!("flag provided but not defined: -{name}")),
    }
}

fn invalid_value(name: &str, target: Target, value: &str, why: &str) -> Stop {
    Stop::Invalid(if target.kind() == Kind::Bool {
        format!("invalid boolean value {value:?} for -{name}: {why}")
    } else {
        format!("invalid value {value:?} for flag -{name}: {why}")
    })
}

fn names_by_variable() -> BTreeMap<String, String> {
    let has_variable = |flag: &&Flag| flags::QUICKSTART.iter().all(|short| short.name != flag.name);
    let current = flags::all().filter(has_variable).map(|flag| flag.name.to_owned());
    let experimental = flags::FORMERLY_EXPERIMENTAL.iter().map(|name| format!("experimental-{name}"));
    let gates = gates::former_flags().map(|(name, _)| name.to_owned());
    let ignored = flags::IGNORED.iter().map(|name| (*name).to_owned());
    current.chain(experimental).chain(gates).chain(ignored).map(|name| (flag::variable(&name), name)).collect()
}

fn conflict(variable: &str) -> Notice {
    let message = "conflicting environment variable is shadowed by corresponding command-line flag \
                   (either unset environment variable or disable flag))";
    Notice::new(Level::Fatal, message).with("environment-variable", variable)
}

fn unrecognized(variable: &str, value: &str) -> Notice {
    Notice::new(Level::Warn, "unrecognized environment variable")
        .with("environment-variable", format!("{variable}={}", redacted(variable, value)))
}

/// Secrets are not logged, though etcd logs them.
fn redacted(variable: &str, value: &str) -> String {
    let secret = !value.is_empty() && (variable.contains("PASSWORD") || variable.contains("SECRET"));
    if secret { "<hidden>".to_owned() } else { value.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<(FlagValues, Vec<String>), Stop> {
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        FlagValues::from_arguments(&arguments).map(|(values, rest)| (values, rest.to_vec()))
    }

    fn texts(arguments: &[&str], name: &str) -> String {
        parse(arguments).unwrap().0.text(name).to_owned()
    }

    fn environment(values: &mut FlagValues, variables: &[(&str, &str)]) -> Result<Vec<Notice>, Notice> {
        let variables: Vec<_> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut notices = Vec::new();
        values.add_environment(&variables, &mut notices).map(|()| notices)
    }

    fn field(notice: &Notice, name: &str) -> String {
        let value = &notice.fields.iter().find(|(field, _)| field == name).unwrap().1;
        value.as_str().unwrap().to_owned()
    }

    #[test]
    fn a_flag_has_one_dash_or_two_and_its_value_after_an_equals_sign_or_a_space() {
        for arguments in
            [&["--name=a"][..], &["-name=a"], &["--name", "a"], &["-name", "a"], &["--name=b", "-name", "a"]]
        {
            assert_eq!(texts(arguments, "name"), "a", "{arguments:?}");
        }
        assert_eq!(texts(&["--name", "--name"], "name"), "--name", "a value may look like a flag");
        assert_eq!(texts(&["--name="], "name"), "");
        assert_eq!(texts(&["--initial-cluster=a=b"], "initial-cluster"), "a=b");
        assert_eq!(texts(&[], "name"), "default");
    }

    #[test]
    fn a_boolean_never_takes_the_next_argument() {
        let (values, rest) = parse(&["--pre-vote=f", "--unsafe-no-fsync", "false", "--name=x"]).unwrap();
        assert!(!values.get::<bool>("pre-vote"));
        assert!(values.get::<bool>("unsafe-no-fsync"));
        assert_eq!(rest, ["false", "--name=x"]);
        assert!(!values.is_set("name"));
    }

    #[test]
    fn a_lone_double_dash_ends_the_flags() {
        let (values, rest) = parse(&["--name=a", "--", "--name=b"]).unwrap();
        assert_eq!((values.text("name"), rest), ("a", vec!["--name=b".to_owned()]));
        assert_eq!(parse(&["-", "x"]).unwrap().1, ["-", "x"]);
    }

    #[test]
    fn errors_have_gos_texts() {
        for (arguments, error) in [
            (&["-x"][..], "flag provided but not defined: -x"),
            (&["--enable-v2"], "flag provided but not defined: -enable-v2"),
            (&["--experimental-name=a"], "flag provided but not defined: -experimental-name"),
            (&["--name"], "flag needs an argument: -name"),
            (&["---x"], "bad flag syntax: ---x"),
            (&["-=5"], "bad flag syntax: -=5"),
            (&["--=5"], "bad flag syntax: --=5"),
            (&["--heartbeat-interval=abc"], "invalid value \"abc\" for flag -heartbeat-interval: parse error"),
            (&["--corrupt-check-time=5"], "invalid value \"5\" for flag -corrupt-check-time: parse error"),
            (&["--pre-vote=maybe"], "invalid boolean value \"maybe\" for -pre-vote: parse error"),
            (&["--initial-cluster-state=foo"], "invalid value \"foo\" for flag -initial-cluster-state: invalid value"),
            (
                &["--feature-gates=Foo=true"],
                "invalid value \"Foo=true\" for flag -feature-gates: unrecognized feature gate: Foo",
            ),
            (
                &["--listen-client-urls=foo"],
                "invalid value \"foo\" for flag -listen-client-urls: URL scheme must be http, https, unix, or unixs: foo",
            ),
            (
                &["--max-concurrent-streams=99999999999"],
                "invalid value \"99999999999\" for flag -max-concurrent-streams: \
                 strconv.ParseUint: parsing \"99999999999\": value out of range",
            ),
            (&["--cors="], "invalid value \"\" for flag -cors: URL scheme must be http, https, unix, or unixs: "),
        ] {
            assert_eq!(parse(arguments).unwrap_err(), Stop::Invalid(error.to_owned()));
        }
    }

    #[test]
    fn help_is_shown_unless_an_earlier_argument_is_invalid() {
        assert_eq!(parse(&["--name=a", "-h", "-x"]).unwrap_err(), Stop::Help);
        assert_eq!(parse(&["--help"]).unwrap_err(), Stop::Help);
        assert!(matches!(parse(&["-x", "-h"]).unwrap_err(), Stop::Invalid(_)));
    }

    #[test]
    fn obsolete_flags_are_ignored() {
        let (_, rest) = parse(&["--config=x", "-v=3", "--test.coverprofile", "-vv"]).unwrap();
        assert_eq!(rest, [] as [String; 0]);
    }

    #[test]
    fn an_old_spelling_sets_the_current_flag() {
        let (values, _) =
            parse(&["--experimental-watch-progress-notify-interval=5s", "--experimental-initial-corrupt-check"])
                .unwrap();
        assert_eq!(values.text("watch-progress-notify-interval"), "5s");
        assert_eq!(values.gates(), [(Gate::InitialCorruptCheck, true)]);
        assert_eq!(values.old_spellings.len(), 2);
    }

    #[test]
    fn a_variable_sets_a_flag_that_was_not_given() {
        let (mut values, _) = parse(&["--name=a"]).unwrap();
        let notices = environment(
            &mut values,
            &[
                ("PATH", "x"),
                ("ETCD_DATA_DIR", "d"),
                ("ETCD_EXPERIMENTAL_MAX_LEARNERS", "2"),
                ("ETCD_MAX_LEARNERS", "3"),
            ],
        )
        .unwrap();
        assert_eq!(values.text("data-dir"), "d");
        assert_eq!(values.text("max-learners"), "3", "the current name wins");
        assert_eq!(notices.len(), 3);
        assert!(notices.iter().all(|notice| notice.message == "recognized and used environment variable"));
    }

    #[test]
    fn a_flag_and_its_variable_conflict_even_if_they_agree() {
        for value in ["a", "b", ""] {
            let (mut values, _) = parse(&["--name=a"]).unwrap();
            let notice = environment(&mut values, &[("ETCD_NAME", value)]).unwrap_err();
            assert_eq!(notice.level, Level::Fatal);
            assert_eq!(field(&notice, "environment-variable"), "ETCD_NAME");
        }
        let (mut values, _) = parse(&["--experimental-max-learners=1"]).unwrap();
        assert!(environment(&mut values, &[("ETCD_MAX_LEARNERS", "1")]).is_err());
    }

    #[test]
    fn an_empty_variable_is_unset_and_an_unknown_one_causes_a_warning() {
        let mut values = FlagValues::default();
        let notices = environment(
            &mut values,
            &[
                ("ETCD_HEARTBEAT_INTERVAL", ""),
                ("ETCD_ON_K8S", "yes"),
                ("ETCD_ROOT_PASSWORD", "p"),
                ("ETCD_VERSION", "2"),
            ],
        )
        .unwrap();
        assert!(!values.is_set("heartbeat-interval"));
        assert!(!values.is_set("version"));
        let logged: Vec<_> = notices[..3].iter().map(|notice| field(notice, "environment-variable")).collect();
        assert_eq!(logged, ["ETCD_HEARTBEAT_INTERVAL=", "ETCD_ON_K8S=yes", "ETCD_ROOT_PASSWORD=<hidden>"]);
        assert_eq!(notices[3].message, "cannot set special environment variable");
    }

    #[test]
    fn an_invalid_variable_is_reported_in_the_log() {
        for (variable, value, error) in [
            ("ETCD_HEARTBEAT_INTERVAL", "abc", "invalid value \"abc\" for ETCD_HEARTBEAT_INTERVAL: parse error"),
            ("ETCD_PRE_VOTE", "maybe", "invalid value \"maybe\" for ETCD_PRE_VOTE: parse error"),
            (
                "ETCD_INITIAL_CLUSTER_STATE",
                "foo",
                "invalid value \"foo\" for ETCD_INITIAL_CLUSTER_STATE: invalid value",
            ),
        ] {
            let notice = environment(&mut FlagValues::default(), &[(variable, value)]).unwrap_err();
            assert_eq!((notice.level, notice.message.as_ref()), (Level::Warn, "failed to verify flags"));
            assert_eq!(field(&notice, "error"), error);
        }
    }
}

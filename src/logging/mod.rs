//! Logging: one line per event, in the format of etcd's logs, so that tools for these can parse them.
//!
//! ```text
//! {"level":"info","ts":"2026-11-21T05:20:44.922678Z","caller":"node/mod.rs:51","msg":"…","local-member-id":"8e9e05c52164694d"}
//! ```
//!
//! Code logs with `tracing`. Field names that are not identifiers are quoted, and all fields are then enclosed in braces:
//! `info!({ "local-member-id" = %id, term }, "…")`. A field given as **bytes is taken as JSON** and written unchanged, which is
//! how lists are logged: see [`list`]. What tracing does not support (the levels `panic` and `fatal`, fields that are known
//! only at run time, the lines of raft-rs) is logged as a [`Notice`], to the same outputs.
//!
//! Times are in UTC, so that the logs of several members can be compared. etcd adds a `stacktrace` to every line from `error`
//! up; here only a panic has one, because its cause is unknown. Elsewhere the caller and the error are more useful than fifty
//! frames of an event loop.
//!
//! Of other crates only warnings and errors are logged: at `debug`, the HTTP library alone logs several lines per request.
//!
//! INVARIANTS
//! * A line is one `write`, and lines do not interleave. A line that cannot be written is dropped; logging never fails.
//! * A disabled level costs one comparison at the call site; nothing is formatted.

mod events;
mod line;
mod raft;
mod sink;

use std::{borrow::Cow, fmt, io, panic::Location, path::PathBuf, process::ExitCode};

use serde_json::Value;

pub use raft::raft_logger;

/// Zap's log levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Level {
    Debug,
    #[default]
    Info,
    Warn,
    Error,
    Panic,
    Fatal,
}

impl Level {
    /// Parses a level as zap does; the empty text is `info`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text.to_ascii_lowercase().as_str() {
            "debug" => Self::Debug,
            "info" | "" => Self::Info,
            "warn" => Self::Warn,
            "error" => Self::Error,
            "panic" | "dpanic" => Self::Panic,
            "fatal" => Self::Fatal,
            _ => return None,
        })
    }

    /// The level as it is written in a line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
            Self::Panic => "panic",
            Self::Fatal => "fatal",
        }
    }
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    #[default]
    Json,
    /// Human-readable, with columns separated by tabs.
    Console,
}

/// Where lines are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    Stderr,
    Stdout,
    /// Appended to this file.
    File(PathBuf),
}

/// Configuration of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The lowest level that is logged.
    pub level: Level,
    pub format: Format,
    /// Every line is written to each of these.
    pub outputs: Vec<Output>,
    /// The file that audit lines are appended to, instead of the outputs.
    pub audit: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { level: Level::default(), format: Format::default(), outputs: vec![Output::Stderr], audit: None }
    }
}

/// Starts logging for the whole process. Only the first call has an effect; before it, nothing is logged.
///
/// From then on panics are logged too, with a stack trace.
///
/// # Errors
/// If an output cannot be opened, with etcd's text. Logging has not started then.
pub fn start(settings: &Settings) -> Result<(), String> {
    let sink = sink::Sink::open(settings)?;
    sink::install(sink);
    events::subscribe(settings.level);
    std::panic::set_hook(Box::new(report_panic));
    Ok(())
}

/// A value as JSON text, for fields of a type that tracing does not support.
#[must_use]
pub fn json(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// A list as a JSON field: `info!({ "listen-client-urls" = list(&urls).as_slice() }, "…")`.
#[must_use]
pub fn list<T: fmt::Display>(items: &[T]) -> Vec<u8> {
    json(&items.iter().map(ToString::to_string).collect())
}

/// A log line as a value: for use before logging has started, and for what tracing does not support.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    pub level: Level,
    pub message: Cow<'static, str>,
    pub fields: Vec<(Cow<'static, str>, Value)>,
    /// The name of the logger, for lines of another library.
    pub logger: Option<&'static str>,
    file: Cow<'static, str>,
    line: u32,
}

impl Notice {
    /// A notice whose `caller` is the code that calls this.
    #[track_caller]
    #[must_use]
    pub fn new(level: Level, message: impl Into<Cow<'static, str>>) -> Self {
        let location = Location::caller();
        Self::at(location.file(), location.line(), level, message)
    }

    fn at(file: impl Into<Cow<'static, str>>, line: u32, level: Level, message: impl Into<Cow<'static, str>>) -> Self {
        Self { level, message: message.into(), fields: Vec::new(), logger: None, file: file.into(), line }
    }

    /// Adds a field.
    #[must_use]
    pub fn with(mut self, name: impl Into<Cow<'static, str>>, value: impl Into<Value>) -> Self {
        self.fields.push((name.into(), value.into()));
        self
    }

    /// Writes the line, if its level is enabled.
    pub fn log(&self) {
        if let Some(sink) = sink::installed().filter(|sink| sink.is_on(self.level)) {
            sink.write(self.header(), &self.message, |fields| self.write_fields(fields));
        }
    }

    /// Writes the line to the audit log, from the logger `audit`.
    pub fn log_audit(mut self) {
        self.logger = Some("audit");
        if let Some(sink) = sink::installed() {
            sink.write_audit(self.header(), &self.message, |fields| self.write_fields(fields));
        }
    }

    fn header(&self) -> line::LineHeader<'_> {
        line::LineHeader { level: self.level, logger: self.logger, file: &self.file, line: self.line }
    }

    fn write_fields(&self, fields: &mut line::Fields<'_>) {
        for (name, value) in &self.fields {
            fields.json(name, value.to_string().as_bytes());
        }
    }
}

/// Logs why the process ends, and returns its exit code.
#[track_caller]
pub fn fatal(message: &'static str, error: impl fmt::Display) -> ExitCode {
    Notice::new(Level::Fatal, message).with("error", error.to_string()).log();
    ExitCode::FAILURE
}

fn report_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let message = panic.payload_as_str().unwrap_or("panic without a message").to_owned();
    let (file, line) = panic.location().map_or(("unknown", 0), |location| (location.file(), location.line()));
    let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
    let stack = std::backtrace::Backtrace::force_capture().to_string();
    Notice::at(file.to_owned(), line, Level::Panic, message).with("thread", thread).with("stacktrace", stack).log();
}

/// Zap's error text.
fn cannot_open(path: &std::path::Path, error: &io::Error) -> String {
    format!("open sink {:?}: open {}: {error}", path.display().to_string(), path.display())
}

//! What the server says about itself: one line per event, in the form etcd's readers know.
//!
//! ```text
//! {"level":"info","ts":"2026-11-21T05:20:44.922678Z","caller":"node/driver.rs:51","msg":"…","local-member-id":"8e9e05c52164694d"}
//! ```
//!
//! Code says things with `tracing`. Field names that are no identifiers are quoted, and then all fields stand in braces:
//! `info!({ "local-member-id" = %id, term }, "…")`. A field given as **bytes is JSON already** and goes into the line as it is,
//! which is how lists get in: see [`list`]. What tracing cannot say (levels `panic` and `fatal`, fields that are known only at
//! run time, the lines of raft-rs) is a [`Notice`] and takes the same way out.
//!
//! Times are UTC, so that the lines of several members can be laid side by side. etcd puts a `stacktrace` into every line from
//! `error` up; here only a panic has one, because there nobody knows how we got there. Elsewhere the caller and the error say
//! more than fifty frames of an event loop.
//!
//! Of other crates only warnings and errors are let through: at `debug` the HTTP library alone says several lines per request.
//!
//! INVARIANTS
//! * A line is one `write`, and no two lines mix. A line that cannot be written is lost and stops nobody.
//! * A level that is off costs one comparison where it is said, and nothing is formatted.

mod events;
mod line;
mod raft;
mod sink;

use std::{borrow::Cow, fmt, io, panic::Location, path::PathBuf, process::ExitCode};

use serde_json::Value;

pub use raft::raft_logger;

/// How much an event matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[allow(missing_docs, reason = "zap names them")]
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
    /// Reads a level as zap does; nothing typed is `info`.
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

    /// As it stands in a line.
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

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For machines.
    #[default]
    Json,
    /// For eyes: columns with tabs between them.
    Console,
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// The standard error stream.
    Stderr,
    /// The standard output stream.
    Stdout,
    /// The end of a file.
    File(PathBuf),
}

/// What is logged, how, and where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The least level that is logged.
    pub level: Level,
    /// How a line looks.
    pub format: Format,
    /// Where each line goes.
    pub outputs: Vec<Output>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { level: Level::default(), format: Format::default(), outputs: vec![Output::Stderr] }
    }
}

/// Starts logging for the whole process. Only the first call counts; before it, nothing is logged.
///
/// From then on a panic, too, is a line of the log, with its stack.
///
/// # Errors
/// If an output cannot be opened, in etcd's words. Logging has not started then.
pub fn start(settings: &Settings) -> Result<(), String> {
    let sink = sink::Sink::open(settings)?;
    sink::install(sink);
    events::subscribe(settings.level);
    std::panic::set_hook(Box::new(report_panic));
    Ok(())
}

/// Text that is JSON already, for a field that tracing has no type for.
#[must_use]
pub fn json(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// A list as a JSON field: `info!({ "listen-client-urls" = list(&urls).as_slice() }, "…")`.
#[must_use]
pub fn list<T: fmt::Display>(items: &[T]) -> Vec<u8> {
    json(&items.iter().map(ToString::to_string).collect())
}

/// Something to be logged, as a value: for when logging has not started yet, and for what tracing cannot say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// How much it matters.
    pub level: Level,
    /// What happened.
    pub message: Cow<'static, str>,
    /// With whom and what.
    pub fields: Vec<(Cow<'static, str>, Value)>,
    /// Whose words these are, if not ours.
    pub logger: Option<&'static str>,
    file: Cow<'static, str>,
    line: u32,
}

impl Notice {
    /// A notice of this place in the code.
    #[track_caller]
    #[must_use]
    pub fn new(level: Level, message: impl Into<Cow<'static, str>>) -> Self {
        let place = Location::caller();
        Self::at(place.file(), place.line(), level, message)
    }

    fn at(file: impl Into<Cow<'static, str>>, line: u32, level: Level, message: impl Into<Cow<'static, str>>) -> Self {
        Self { level, message: message.into(), fields: Vec::new(), logger: None, file: file.into(), line }
    }

    /// The same, with one more field.
    #[must_use]
    pub fn with(mut self, name: impl Into<Cow<'static, str>>, value: impl Into<Value>) -> Self {
        self.fields.push((name.into(), value.into()));
        self
    }

    /// Writes it.
    pub fn log(&self) {
        let Some(sink) = sink::installed().filter(|sink| sink.is_on(self.level)) else {
            return;
        };
        let head = line::Head { level: self.level, logger: self.logger, file: &self.file, line: self.line };
        sink.write(head, &self.message, |fields| {
            for (name, value) in &self.fields {
                fields.json(name, value.to_string().as_bytes());
            }
        });
    }
}

/// Says why the process ends, and gives the code to end with.
#[track_caller]
pub fn fatal(message: &'static str, error: impl fmt::Display) -> ExitCode {
    Notice::new(Level::Fatal, message).with("error", error.to_string()).log();
    ExitCode::FAILURE
}

fn report_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let message = panic.payload_as_str().unwrap_or("a panic without words").to_owned();
    let (file, line) = panic.location().map_or(("unknown", 0), |place| (place.file(), place.line()));
    let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
    let stack = std::backtrace::Backtrace::force_capture().to_string();
    Notice::at(file.to_owned(), line, Level::Panic, message).with("thread", thread).with("stacktrace", stack).log();
}

/// In zap's words.
fn cannot_open(path: &std::path::Path, error: &io::Error) -> String {
    format!("open sink {:?}: open {}: {error}", path.display().to_string(), path.display())
}

//! Writes lines to streams and files, each line with one write.

use std::{
    cell::Cell,
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::OnceLock,
    time::SystemTime,
};

use parking_lot::Mutex;

use super::{
    Format, Level, Output, Settings,
    line::{Fields, LineHeader, LogLine},
};

/// The open outputs of the log.
pub struct Sink {
    threshold: Level,
    format: Format,
    /// One lock for all outputs, so that lines of several threads have the same order in each.
    outputs: Mutex<Vec<OpenOutput>>,
    /// A file of its own for audit lines.
    audit: Option<Mutex<OpenOutput>>,
}

enum OpenOutput {
    Stderr,
    Stdout,
    File(File),
}

static INSTALLED: OnceLock<Sink> = OnceLock::new();

/// Makes `sink` the sink of this process, unless there is one.
pub fn install(sink: Sink) {
    // The first sink stays: other threads may hold a reference to it.
    let _ = INSTALLED.set(sink);
}

/// The sink of this process, if one is installed.
pub fn installed() -> Option<&'static Sink> {
    INSTALLED.get()
}

thread_local! {
    /// A buffer for one line, reused for the next.
    static LINE_BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Sink {
    /// Opens every output.
    pub fn open(settings: &Settings) -> Result<Self, String> {
        let outputs = settings.outputs.iter().map(OpenOutput::new).collect::<Result<_, _>>()?;
        let audit =
            settings.audit.clone().map(|path| OpenOutput::new(&Output::File(path)).map(Mutex::new)).transpose()?;
        Ok(Self { threshold: settings.level, format: settings.format, outputs: Mutex::new(outputs), audit })
    }

    /// Whether lines of this level are written.
    pub fn is_on(&self, level: Level) -> bool {
        level >= self.threshold
    }

    /// Writes one line. Nothing is locked while `fill` runs, so a value that itself logs while it is formatted cannot deadlock.
    pub fn write(&self, header: LineHeader<'_>, message: &str, fill: impl FnOnce(&mut Fields<'_>)) {
        let bytes = self.format_line(header, message, fill);
        for output in self.outputs.lock().iter_mut() {
            // A full disk or a closed pipe must not stop the server, and there is no other place to report it.
            let _ = output.write(&bytes);
        }
        LINE_BUFFER.set(bytes);
    }

    /// Writes one audit line: to the file for those, whatever the level of the log, or else like any other line.
    pub fn write_audit(&self, header: LineHeader<'_>, message: &str, fill: impl FnOnce(&mut Fields<'_>)) {
        let Some(file) = &self.audit else {
            if self.is_on(header.level) {
                self.write(header, message, fill);
            }
            return;
        };
        let bytes = self.format_line(header, message, fill);
        let _ = file.lock().write(&bytes);
        LINE_BUFFER.set(bytes);
    }

    fn format_line(&self, header: LineHeader<'_>, message: &str, fill: impl FnOnce(&mut Fields<'_>)) -> Vec<u8> {
        let mut line = LogLine::begin(LINE_BUFFER.take(), self.format, SystemTime::now(), header, message);
        fill(&mut line.fields());
        line.end()
    }
}

impl OpenOutput {
    fn new(output: &Output) -> Result<Self, String> {
        match output {
            Output::Stderr => Ok(Self::Stderr),
            Output::Stdout => Ok(Self::Stdout),
            Output::File(path) => append(path).map(Self::File).map_err(|error| super::cannot_open(path, &error)),
        }
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr => io::stderr().lock().write_all(line),
            // Stdout is line-buffered, and what is written ends with a newline.
            Self::Stdout => io::stdout().lock().write_all(line),
            Self::File(file) => file.write_all(line),
        }
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

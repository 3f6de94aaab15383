//! Where lines go out: streams and files, each line with one write.

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
    line::{Fields, Head, Line},
};

/// The outputs, opened.
pub struct Sink {
    threshold: Level,
    format: Format,
    /// One lock for all outputs: two threads' lines come in the same order everywhere.
    outputs: Mutex<Vec<Open>>,
}

enum Open {
    Stderr,
    Stdout,
    File(File),
}

static INSTALLED: OnceLock<Sink> = OnceLock::new();

/// Makes `sink` the one of this process, unless there is one.
pub fn install(sink: Sink) {
    // A second start keeps the first sink: whoever holds it goes on writing to it.
    let _ = INSTALLED.set(sink);
}

/// The sink of this process, once there is one.
pub fn installed() -> Option<&'static Sink> {
    INSTALLED.get()
}

thread_local! {
    /// Room for a line, kept from one to the next.
    static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Sink {
    /// Opens every output.
    pub fn open(settings: &Settings) -> Result<Self, String> {
        let outputs = settings.outputs.iter().map(Open::new).collect::<Result<_, _>>()?;
        Ok(Self { threshold: settings.level, format: settings.format, outputs: Mutex::new(outputs) })
    }

    /// Whether lines of this level are written.
    pub fn is_on(&self, level: Level) -> bool {
        level >= self.threshold
    }

    /// Writes one line. While `fill` runs nothing is locked, so a value that logs while it is printed harms nobody.
    pub fn write(&self, head: Head<'_>, message: &str, fill: impl FnOnce(&mut Fields<'_>)) {
        let mut line = Line::begin(ROOM.take(), self.format, SystemTime::now(), head, message);
        fill(&mut line.fields());
        let bytes = line.end();
        for output in self.outputs.lock().iter_mut() {
            // A full disk or a closed pipe must not end the service, and there is nowhere left to say so.
            let _ = output.write(&bytes);
        }
        ROOM.set(bytes);
    }
}

impl Open {
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
            // Buffered up to the line's end, which is the end of what we write.
            Self::Stdout => io::stdout().lock().write_all(line),
            Self::File(file) => file.write_all(line),
        }
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

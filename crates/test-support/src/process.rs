//! One process, whose stderr is kept as its log, and which does not outlive the test.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::wait::time_limit;

/// A running process. Killed on drop.
pub struct Process {
    child: Child,
    log: Arc<Log>,
}

impl Process {
    /// Starts a program. Its stderr is read all the time, because a full pipe would block it.
    pub fn start(command: &mut Command) -> Self {
        let started = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = started.unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
        let log = Arc::new(Log::default());
        let (errors, reader) = (child.stderr.take().unwrap(), log.clone());
        thread::spawn(move || reader.read(errors));
        Self { child, log }
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The log so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.lines.lock().unwrap().lines.join("\n")
    }

    /// Waits for a log line that contains `text`; returns the first one. Fails if the process ends without it.
    pub fn wait_for_log(&self, text: &str) -> String {
        self.log.wait_for(text)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits until the process ends by itself, and all of its log is read.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        self.log.wait_for_end();
        self.child.wait().unwrap()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails if the process has ended already, which is no error here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process has written to stderr so far.
#[derive(Default)]
struct Log {
    lines: Mutex<Lines>,
    grown: Condvar,
}

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    ended: bool,
}

impl Log {
    fn read(&self, from: impl Read) {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            self.lines.lock().unwrap().lines.push(line);
            self.grown.notify_all();
        }
        self.lines.lock().unwrap().ended = true;
        self.grown.notify_all();
    }

    fn wait_for(&self, text: &str) -> String {
        self.wait_until(&format!("a log line contains {text:?}"), |log| {
            let line = log.lines.iter().find(|line| line.contains(text));
            assert!(line.is_some() || !log.ended, "no line contains {text:?}; the log is\n{}", log.lines.join("\n"));
            line.cloned()
        })
    }

    /// Waits for the end of stderr, that is, of the process.
    fn wait_for_end(&self) {
        self.wait_until("the process ends", |log| log.ended.then_some(()));
    }

    /// [`crate::eventually`], but woken by new lines.
    fn wait_until<T>(&self, what: &str, check: impl Fn(&Lines) -> Option<T>) -> T {
        let (limit, started) = (time_limit(), Instant::now());
        let mut lines = self.lines.lock().unwrap();
        loop {
            if let Some(found) = check(&lines) {
                return found;
            }
            let left = limit.saturating_sub(started.elapsed());
            assert!(left > Duration::ZERO, "waited {limit:?} until {what}; the log is\n{}", lines.lines.join("\n"));
            lines = self.grown.wait_timeout(lines, left).unwrap().0;
        }
    }
}

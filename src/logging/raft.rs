//! The lines of raft-rs, which logs with `slog`.
//!
//! They go to the sink directly: on the way through tracing they would lose their place in the code and the names of their
//! fields.

use std::fmt;

use serde_json::Value;
use slog::{Drain, KV, Key, Never, OwnedKVList, Record, Serializer};

use super::{Level, Notice, sink};

/// A logger for raft-rs, whose lines carry `"logger":"raft"`.
pub fn raft_logger() -> slog::Logger {
    slog::Logger::root(ToSink, slog::o!())
}

struct ToSink;

impl Drain for ToSink {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        notice(record, values).log();
        Ok(())
    }

    fn is_enabled(&self, level: slog::Level) -> bool {
        sink::installed().is_some_and(|sink| sink.is_on(level_of(level)))
    }
}

fn level_of(level: slog::Level) -> Level {
    match level {
        // raft-rs says critically what it panics about in the next line.
        slog::Level::Critical | slog::Level::Error => Level::Error,
        slog::Level::Warning => Level::Warn,
        slog::Level::Info => Level::Info,
        slog::Level::Debug | slog::Level::Trace => Level::Debug,
    }
}

fn notice(record: &Record<'_>, values: &OwnedKVList) -> Notice {
    let mut notice = Notice::at(record.file(), record.line(), level_of(record.level()), record.msg().to_string());
    notice.logger = Some("raft");
    let mut fields = Collected(Vec::new());
    // Collecting cannot fail, and a line without its fields is better than none.
    let _ = record.kv().serialize(record, &mut fields);
    let _ = values.serialize(record, &mut fields);
    // slog hands fields over last first.
    notice.fields = fields.0.into_iter().rev().map(|(name, value)| (name.into(), value)).collect();
    notice
}

struct Collected(Vec<(String, Value)>);

impl Collected {
    fn add(&mut self, key: Key, value: impl Into<Value>) {
        self.0.push((key.to_string(), value.into()));
    }
}

impl Serializer for Collected {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        self.add(key, value.to_string());
        Ok(())
    }

    fn emit_u32(&mut self, key: Key, value: u32) -> slog::Result {
        self.add(key, value);
        Ok(())
    }

    fn emit_i32(&mut self, key: Key, value: i32) -> slog::Result {
        self.add(key, value);
        Ok(())
    }

    fn emit_u64(&mut self, key: Key, value: u64) -> slog::Result {
        self.add(key, value);
        Ok(())
    }

    fn emit_i64(&mut self, key: Key, value: i64) -> slog::Result {
        self.add(key, value);
        Ok(())
    }

    fn emit_usize(&mut self, key: Key, value: usize) -> slog::Result {
        self.add(key, value);
        Ok(())
    }

    fn emit_bool(&mut self, key: Key, value: bool) -> slog::Result {
        self.add(key, value);
        Ok(())
    }

    fn emit_str(&mut self, key: Key, value: &str) -> slog::Result {
        self.add(key, value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use slog::{Logger, info, o};

    use super::*;

    /// Hands each record over as the notice that would be logged.
    struct ToChannel(std::sync::mpsc::Sender<Notice>);

    impl Drain for ToChannel {
        type Ok = ();
        type Err = Never;

        fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
            self.0.send(notice(record, values)).expect("the test listens");
            Ok(())
        }
    }

    #[test]
    fn a_line_of_raft_keeps_its_words_fields_and_place() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let drain = std::sync::Mutex::new(ToChannel(sender)).map(slog::Fuse);
        let logger = Logger::root(drain, o!("raft_id" => 1_u64));
        info!(logger, "became {}", "leader"; "term" => 2_u64, "from" => "x", "ready" => true);

        let notice = receiver.recv().unwrap();
        assert_eq!((notice.level, notice.logger), (Level::Info, Some("raft")));
        assert_eq!(notice.message, "became leader");
        assert!(notice.file.ends_with("raft.rs"));
        let fields: Vec<_> = notice.fields.iter().map(|(name, value)| (name.as_ref(), value.clone())).collect();
        assert_eq!(
            fields,
            [("raft_id", Value::from(1)), ("term", 2.into()), ("from", "x".into()), ("ready", true.into())]
        );
    }
}

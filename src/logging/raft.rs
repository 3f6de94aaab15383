//! The log lines of raft-rs, which logs with `slog`.
//!
//! They are written to the sink directly: passing them through tracing would lose the source location and the field names.

use std::fmt;

use serde_json::Value;
use slog::{Drain, KV, Key, Never, OwnedKVList, Record, Serializer};

use super::{Level, Notice, sink};

/// The logger for raft-rs; its lines have the field `"logger":"raft"`.
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
        // raft-rs logs at this level just before it panics, and the panic is logged as well.
        slog::Level::Critical | slog::Level::Error => Level::Error,
        slog::Level::Warning => Level::Warn,
        slog::Level::Info => Level::Info,
        slog::Level::Debug | slog::Level::Trace => Level::Debug,
    }
}

fn notice(record: &Record<'_>, values: &OwnedKVList) -> Notice {
    let mut notice = Notice::at(record.file(), record.line(), level_of(record.level()), record.msg().to_string());
    notice.logger = Some("raft");
    let mut fields = CollectedFields(Vec::new());
    // Collecting cannot fail; if it did, a line without its fields would be better than none.
    let _ = record.kv().serialize(record, &mut fields);
    let _ = values.serialize(record, &mut fields);
    // slog passes the fields in reverse order.
    notice.fields = fields.0.into_iter().rev().map(|(name, value)| (name.into(), value)).collect();
    notice
}

struct CollectedFields(Vec<(String, Value)>);

impl CollectedFields {
    fn add(&mut self, key: Key, value: impl Into<Value>) {
        self.0.push((key.to_string(), value.into()));
    }
}

impl Serializer for CollectedFields {
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

    /// Sends the notice that would be logged for each record.
    struct ToChannel(std::sync::mpsc::Sender<Notice>);

    impl Drain for ToChannel {
        type Ok = ();
        type Err = Never;

        fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
            self.0.send(notice(record, values)).expect("the test holds the receiver");
            Ok(())
        }
    }

    #[test]
    fn a_raft_line_keeps_its_message_fields_and_location() {
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

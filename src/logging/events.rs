//! Turns tracing events into log lines.

use std::fmt;

use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    subscriber::Interest,
};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use super::{
    Level,
    line::{Fields, LineHeader},
    sink::{self, Sink},
};

/// From now on, sends all events to the sink of this process.
pub fn subscribe(threshold: Level) {
    let filter = match threshold {
        Level::Debug => LevelFilter::DEBUG,
        Level::Info => LevelFilter::INFO,
        Level::Warn => LevelFilter::WARN,
        Level::Error => LevelFilter::ERROR,
        Level::Panic | Level::Fatal => LevelFilter::OFF,
    };
    let subscriber = tracing_subscriber::registry().with(filter).with(LineLayer);
    // A subscriber that was installed before, for example by a test, stays.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Writes all events of this crate, and the warnings and errors of others.
struct LineLayer;

impl<S: Subscriber> Layer<S> for LineLayer {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if is_wanted(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        is_wanted(metadata)
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if let Some(sink) = sink::installed() {
            write(sink, event);
        }
    }
}

fn is_wanted(metadata: &Metadata<'_>) -> bool {
    let is_own = metadata.target().split("::").next() == Some(env!("CARGO_CRATE_NAME"));
    is_own || *metadata.level() <= tracing::Level::WARN
}

fn write(sink: &Sink, event: &Event<'_>) {
    let metadata = event.metadata();
    let header = LineHeader {
        level: level_of(*metadata.level()),
        logger: None,
        file: metadata.file().unwrap_or("unknown"),
        line: metadata.line().unwrap_or(0),
    };
    let mut message = MessageVisitor::default();
    event.record(&mut message);
    sink.write(header, &message.0, |fields| event.record(&mut FieldVisitor(fields)));
}

fn level_of(level: tracing::Level) -> Level {
    match level {
        tracing::Level::ERROR => Level::Error,
        tracing::Level::WARN => Level::Warn,
        tracing::Level::INFO => Level::Info,
        _ => Level::Debug,
    }
}

/// The field in which tracing stores the message of an event.
const MESSAGE: &str = "message";

/// Extracts the message, which is written before the fields.
#[derive(Default)]
struct MessageVisitor(String);

impl Visit for MessageVisitor {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == MESSAGE {
            self.0 = format!("{value:?}");
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == MESSAGE {
            value.clone_into(&mut self.0);
        }
    }
}

/// Writes all fields but the message.
struct FieldVisitor<'a, 'b>(&'a mut Fields<'b>);

impl Visit for FieldVisitor<'_, '_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() != MESSAGE {
            self.0.print(field.name(), value);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != MESSAGE {
            self.0.text(field.name(), value);
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.0.print(field.name(), &format_args!("{value}"));
    }

    fn record_bytes(&mut self, field: &Field, value: &[u8]) {
        self.0.json(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.plain(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.plain(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.plain(field.name(), value);
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.0.plain(field.name(), value);
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.0.plain(field.name(), value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON cannot represent infinity or NaN as a number, so such a value is quoted.
        if value.is_finite() {
            self.0.plain(field.name(), value);
        } else {
            self.0.print(field.name(), &value);
        }
    }
}

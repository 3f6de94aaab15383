//! Formats one log line, as JSON or for the console.

use std::{fmt, io::Write, time::SystemTime};

use super::{Format, Level};

/// What every line begins with.
#[derive(Debug, Clone, Copy)]
pub struct LineHeader<'a> {
    pub level: Level,
    /// The name of the logger, for lines of another library.
    pub logger: Option<&'a str>,
    /// The source file, and the line in it.
    pub file: &'a str,
    pub line: u32,
}

/// A line being written.
pub struct LogLine {
    bytes: Vec<u8>,
    format: Format,
    /// Whether a field was written; the console format has braces only if there are fields.
    has_fields: bool,
}

/// Appends fields to a line, in the order of the calls.
pub struct Fields<'a>(&'a mut LogLine);

impl LogLine {
    /// Writes everything up to the message, into `buffer`, whose contents are discarded.
    pub fn begin(mut buffer: Vec<u8>, format: Format, now: SystemTime, header: LineHeader<'_>, message: &str) -> Self {
        buffer.clear();
        let mut line = Self { bytes: buffer, format, has_fields: false };
        let caller = short_path(header.file);
        match format {
            Format::Json => {
                line.put(format_args!(r#"{{"level":"{}","ts":"{}""#, header.level.as_str(), Timestamp(now)));
                if let Some(logger) = header.logger {
                    line.put(format_args!(r#","logger":"{logger}""#));
                }
                line.put(format_args!(r#","caller":"{caller}:{}","msg":"#, header.line));
                line.text(message);
            }
            Format::Console => {
                line.put(format_args!("{}\t{}\t", Timestamp(now), header.level.as_str()));
                if let Some(logger) = header.logger {
                    line.put(format_args!("{logger}\t"));
                }
                line.put(format_args!("{caller}:{}\t{message}", header.line));
            }
        }
        line
    }

    pub fn fields(&mut self) -> Fields<'_> {
        Fields(self)
    }

    /// Completes the line and returns its bytes.
    pub fn end(mut self) -> Vec<u8> {
        match self.format {
            Format::Json => self.bytes.extend_from_slice(b"}\n"),
            Format::Console if self.has_fields => self.bytes.extend_from_slice(b"}\n"),
            Format::Console => self.bytes.push(b'\n'),
        }
        self.bytes
    }

    fn put(&mut self, text: fmt::Arguments<'_>) {
        self.bytes.write_fmt(text).expect("writing to a vector cannot fail");
    }

    /// Writes a JSON string.
    fn text(&mut self, text: &str) {
        serde_json::to_writer(&mut self.bytes, text).expect("writing to a vector cannot fail");
    }
}

impl Fields<'_> {
    /// Adds a field whose value is a string.
    pub fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        self.0.text(value);
    }

    /// Adds a field whose value is already JSON.
    pub fn json(&mut self, name: &str, value: &[u8]) {
        self.name(name);
        self.0.bytes.extend_from_slice(value);
    }

    /// Adds a field whose value is the `Debug` output of `value`, as a string.
    pub fn print(&mut self, name: &str, value: &dyn fmt::Debug) {
        self.name(name);
        self.0.bytes.push(b'"');
        write!(Escaped(&mut self.0.bytes), "{value:?}").expect("writing to a vector cannot fail");
        self.0.bytes.push(b'"');
    }

    /// Adds a field whose value is displayed as a JSON number or boolean.
    pub fn plain(&mut self, name: &str, value: impl fmt::Display) {
        self.name(name);
        self.0.put(format_args!("{value}"));
    }

    fn name(&mut self, name: &str) {
        let (first, next, colon): (&[u8], &[u8], &[u8]) = match self.0.format {
            Format::Json => (b",", b",", b":"),
            Format::Console => (b"\t{", b", ", b": "),
        };
        self.0.bytes.extend_from_slice(if self.0.has_fields { next } else { first });
        self.0.has_fields = true;
        self.0.text(name);
        self.0.bytes.extend_from_slice(colon);
    }
}

/// Escapes what is written to it as the contents of a JSON string, without an intermediate copy of the whole value.
struct Escaped<'a>(&'a mut Vec<u8>);

impl Escaped<'_> {
    fn write_fmt(&mut self, text: fmt::Arguments<'_>) -> fmt::Result {
        fmt::Write::write_fmt(self, text)
    }
}

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let start = self.0.len();
        serde_json::to_writer(&mut *self.0, text).map_err(|_| fmt::Error)?;
        // The quotes enclose the whole value, not each piece.
        self.0.pop();
        self.0.remove(start);
        Ok(())
    }
}

/// Directory and file, as zap shortens paths; for a file directly in `src`, the directory is the name of the crate.
fn short_path(file: &str) -> ShortPath<'_> {
    let mut parts = file.rsplit(['/', '\\']);
    let name = parts.next().unwrap_or(file);
    let directory = parts.next().map_or("", |directory| if directory == "src" { "metastore" } else { directory });
    ShortPath { directory, name }
}

struct ShortPath<'a> {
    directory: &'a str,
    name: &'a str,
}

impl fmt::Display for ShortPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.directory.is_empty() { "" } else { "/" };
        write!(f, "{}{slash}{}", self.directory, self.name)
    }
}

/// A point in time, in UTC, to the microsecond.
struct Timestamp(SystemTime);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = time::OffsetDateTime::from(self.0);
        let ((year, month, day), (hour, minute, second, micros)) = (at.to_calendar_date(), at.to_hms_micro());
        let month = u8::from(month);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn line(format: Format, logger: Option<&str>, message: &str, fill: impl FnOnce(&mut Fields<'_>)) -> String {
        let now = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_042);
        let header = LineHeader { level: Level::Warn, logger, file: "src/node/raft_thread.rs", line: 7 };
        let mut line = LogLine::begin(b"left over".to_vec(), format, now, header, message);
        fill(&mut line.fields());
        String::from_utf8(line.end()).unwrap()
    }

    #[test]
    fn a_json_line_has_zaps_fields_in_zaps_order() {
        let text = line(Format::Json, Some("raft"), "a \"b\"\n", |fields| {
            fields.text("local-member-id", "8e9e");
            fields.json("urls", br#"["x"]"#);
            fields.plain("count", 3);
            fields.print("took", &format_args!("1.5ms"));
        });
        assert_eq!(
            text,
            concat!(
                r#"{"level":"warn","ts":"2023-11-14T22:13:20.000042Z","logger":"raft","caller":"node/raft_thread.rs:7","#,
                r#""msg":"a \"b\"\n","local-member-id":"8e9e","urls":["x"],"count":3,"took":"1.5ms"}"#,
                "\n"
            )
        );
    }

    #[test]
    fn a_console_line_has_tabs_and_braces_only_around_fields() {
        assert_eq!(
            line(Format::Console, None, "hello", |_| ()),
            "2023-11-14T22:13:20.000042Z\twarn\tnode/raft_thread.rs:7\thello\n"
        );
        let text = line(Format::Console, Some("raft"), "hello", |fields| {
            fields.text("a", "b");
            fields.plain("c", true);
        });
        assert!(text.ends_with("warn\traft\tnode/raft_thread.rs:7\thello\t{\"a\": \"b\", \"c\": true}\n"), "{text}");
    }

    #[test]
    fn special_characters_are_escaped() {
        let text = line(Format::Json, None, "\u{1}\t\\", |fields| {
            fields.print("debug", &("a\"b", '\n', "\u{7f}é"));
            fields.text("na\"me", "x\ny");
        });
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["msg"], "\u{1}\t\\");
        assert_eq!(value["debug"], format!("{:?}", ("a\"b", '\n', "\u{7f}é")));
        assert_eq!(value["na\"me"], "x\ny");
        assert_eq!(text.matches('\n').count(), 1);
    }

    #[test]
    fn a_caller_is_directory_and_file() {
        for (file, expected) in [
            ("src/node/raft_thread.rs", "node/raft_thread.rs"),
            ("src/main.rs", "metastore/main.rs"),
            ("/registry/raft-0.7.0/src/raft.rs", "metastore/raft.rs"),
            ("main.rs", "main.rs"),
        ] {
            assert_eq!(short_path(file).to_string(), expected);
        }
    }
}

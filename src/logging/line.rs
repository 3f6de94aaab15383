//! One line, from its level to its last field, in either format.

use std::{fmt, io::Write, time::SystemTime};

use super::{Format, Level};

/// What every line begins with.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// How much it matters.
    pub level: Level,
    /// Whose words these are, if not ours.
    pub logger: Option<&'a str>,
    /// The source file.
    pub file: &'a str,
    /// The line in it.
    pub line: u32,
}

/// A line being written.
pub struct Line {
    bytes: Vec<u8>,
    format: Format,
    /// Whether a field was written; the console's braces stand only around fields.
    any: bool,
}

/// The fields of a line being written, in the order they are added.
pub struct Fields<'a>(&'a mut Line);

impl Line {
    /// Everything up to the message. Reuses `room`.
    pub fn begin(mut room: Vec<u8>, format: Format, now: SystemTime, head: Head<'_>, message: &str) -> Self {
        room.clear();
        let mut line = Self { bytes: room, format, any: false };
        let caller = short(head.file);
        match format {
            Format::Json => {
                line.put(format_args!(r#"{{"level":"{}","ts":"{}""#, head.level.as_str(), Timestamp(now)));
                if let Some(logger) = head.logger {
                    line.put(format_args!(r#","logger":"{logger}""#));
                }
                line.put(format_args!(r#","caller":"{caller}:{}","msg":"#, head.line));
                line.text(message);
            }
            Format::Console => {
                line.put(format_args!("{}\t{}\t", Timestamp(now), head.level.as_str()));
                if let Some(logger) = head.logger {
                    line.put(format_args!("{logger}\t"));
                }
                line.put(format_args!("{caller}:{}\t{message}", head.line));
            }
        }
        line
    }

    /// The place for fields.
    pub fn fields(&mut self) -> Fields<'_> {
        Fields(self)
    }

    /// Closes the line and gives its bytes.
    pub fn end(mut self) -> Vec<u8> {
        match self.format {
            Format::Json => self.bytes.extend_from_slice(b"}\n"),
            Format::Console if self.any => self.bytes.extend_from_slice(b"}\n"),
            Format::Console => self.bytes.push(b'\n'),
        }
        self.bytes
    }

    fn put(&mut self, text: fmt::Arguments<'_>) {
        self.bytes.write_fmt(text).expect("a vector takes everything");
    }

    /// A JSON string.
    fn text(&mut self, text: &str) {
        serde_json::to_writer(&mut self.bytes, text).expect("a vector takes everything");
    }
}

impl Fields<'_> {
    /// A field whose value is a text.
    pub fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        self.0.text(value);
    }

    /// A field whose value is JSON already.
    pub fn json(&mut self, name: &str, value: &[u8]) {
        self.name(name);
        self.0.bytes.extend_from_slice(value);
    }

    /// A field whose value is a text as it prints.
    pub fn print(&mut self, name: &str, value: &dyn fmt::Debug) {
        self.name(name);
        self.0.bytes.push(b'"');
        write!(Escaped(&mut self.0.bytes), "{value:?}").expect("a vector takes everything");
        self.0.bytes.push(b'"');
    }

    /// A field whose value prints as a JSON number or boolean.
    pub fn plain(&mut self, name: &str, value: impl fmt::Display) {
        self.name(name);
        self.0.put(format_args!("{value}"));
    }

    fn name(&mut self, name: &str) {
        let (first, next, colon): (&[u8], &[u8], &[u8]) = match self.0.format {
            Format::Json => (b",", b",", b":"),
            Format::Console => (b"\t{", b", ", b": "),
        };
        self.0.bytes.extend_from_slice(if self.0.any { next } else { first });
        self.0.any = true;
        self.0.text(name);
        self.0.bytes.extend_from_slice(colon);
    }
}

/// Escapes what is printed into it as the inside of a JSON string, without a copy of the whole in between.
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
        // The quotes belong to the whole, not to each piece.
        self.0.pop();
        self.0.remove(start);
        Ok(())
    }
}

/// Folder and file, as zap shortens it; a file directly in the source folder is named after the crate.
fn short(file: &str) -> Shortened<'_> {
    let mut parts = file.rsplit(['/', '\\']);
    let name = parts.next().unwrap_or(file);
    let folder = parts.next().map_or("", |folder| if folder == "src" { "metastore" } else { folder });
    Shortened { folder, name }
}

struct Shortened<'a> {
    folder: &'a str,
    name: &'a str,
}

impl fmt::Display for Shortened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.folder.is_empty() { "" } else { "/" };
        write!(f, "{}{slash}{}", self.folder, self.name)
    }
}

/// A moment, in UTC, to the microsecond.
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
        let head = Head { level: Level::Warn, logger, file: "src/node/driver.rs", line: 7 };
        let mut line = Line::begin(b"left over".to_vec(), format, now, head, message);
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
                r#"{"level":"warn","ts":"2023-11-14T22:13:20.000042Z","logger":"raft","caller":"node/driver.rs:7","#,
                r#""msg":"a \"b\"\n","local-member-id":"8e9e","urls":["x"],"count":3,"took":"1.5ms"}"#,
                "\n"
            )
        );
    }

    #[test]
    fn a_console_line_has_tabs_and_braces_only_around_fields() {
        assert_eq!(
            line(Format::Console, None, "hello", |_| ()),
            "2023-11-14T22:13:20.000042Z\twarn\tnode/driver.rs:7\thello\n"
        );
        let text = line(Format::Console, Some("raft"), "hello", |fields| {
            fields.text("a", "b");
            fields.plain("c", true);
        });
        assert!(text.ends_with("warn\traft\tnode/driver.rs:7\thello\t{\"a\": \"b\", \"c\": true}\n"), "{text}");
    }

    #[test]
    fn whatever_is_printed_the_line_stays_json() {
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
    fn a_caller_is_folder_and_file() {
        for (file, expected) in [
            ("src/node/driver.rs", "node/driver.rs"),
            ("src/main.rs", "metastore/main.rs"),
            ("/registry/raft-0.7.0/src/raft.rs", "metastore/raft.rs"),
            ("main.rs", "main.rs"),
        ] {
            assert_eq!(short(file).to_string(), expected);
        }
    }
}

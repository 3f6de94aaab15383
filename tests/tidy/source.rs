//! Source files, with comments and the contents of literals blanked, so that only code is left to be looked at.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// What stands in front of an item that only tests are built with.
const FOR_TESTS: &str = "#[cfg(test)]";

/// One file.
pub struct Source {
    /// Its path from the root of the project.
    pub path: String,
    /// Its code: as long as the file, line by line.
    code: String,
}

/// All Rust files under a path of the project, in order.
pub fn sources(under: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: PathBuf| Source {
        code: blank(&fs::read_to_string(&path).unwrap()),
        path: path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(),
    };
    paths(&root.join(under)).into_iter().map(read).collect()
}

/// Where all Rust files under a path are, in order.
pub fn paths(under: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    collect(under, &mut paths);
    paths.sort();
    assert!(!paths.is_empty(), "{} holds no source", under.display());
    paths
}

fn collect(path: &Path, paths: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            collect(&entry.unwrap().path(), paths);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        paths.push(path.to_owned());
    }
}

/// The names and keywords in a piece of code.
pub fn words(code: &str) -> BTreeSet<&str> {
    code.split(is_no_letter).filter(|word| !word.is_empty()).collect()
}

impl Source {
    /// The room of the house that this file belongs to.
    pub fn room(&self) -> &str {
        let inside = self.path.strip_prefix("src/").expect("rooms are in src");
        let room = inside.split('/').next().expect("a path has a first part");
        room.strip_suffix(".rs").unwrap_or(room)
    }

    /// Line numbers and code.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.code.lines())
    }

    /// The same without what only tests are built with: files called `tests.rs`, modules, and single items.
    pub fn lines_without_tests(&self) -> impl Iterator<Item = (usize, &str)> {
        let mut hidden_until = if self.path.ends_with("/tests.rs") { self.code.len() } else { 0 };
        let mut at = 0;
        self.lines().filter(move |(_, line)| {
            if at >= hidden_until && line.trim() == FOR_TESTS {
                hidden_until = at + line.len() + item_len(&self.code[at + line.len()..]);
            }
            let is_hidden = at < hidden_until;
            at += line.len() + 1;
            !is_hidden
        })
    }

    /// All words of the file.
    pub fn words(&self) -> BTreeSet<&str> {
        words(&self.code)
    }

    /// The rooms behind every `crate::`, and every `metastore::` (which is what `main` calls the house), with the line that
    /// names them.
    pub fn rooms_used(&self) -> Vec<(usize, String)> {
        let mut used = Vec::new();
        for (at, _) in self.code.match_indices("::") {
            let (before, path) = (&self.code[..at], &self.code[at + "::".len()..]);
            if !["crate", "metastore"].contains(&last_name(before)) {
                continue;
            }
            let line = before.matches('\n').count() + 1;
            let names = path.strip_prefix('{').map_or_else(|| vec![first_name(path)], names_of_group);
            used.extend(names.into_iter().filter(|name| !name.is_empty()).map(|name| (line, name.to_owned())));
        }
        used
    }
}

fn first_name(path: &str) -> &str {
    path.split(is_no_letter).next().unwrap_or_default()
}

fn last_name(path: &str) -> &str {
    path.rsplit(is_no_letter).next().unwrap_or_default()
}

fn is_no_letter(c: char) -> bool {
    !c.is_alphanumeric() && c != '_'
}

/// How long the item is that comes next: up to its closing brace, or to a semicolon outside of all brackets.
fn item_len(code: &str) -> usize {
    let mut depth = 0;
    for (at, c) in code.char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => depth -= 1,
            _ => (),
        }
        if depth == 0 && (c == '}' || c == ';') {
            return at + 1;
        }
    }
    code.len()
}

/// The first name of each path in a `{…}` of a `use`, nested braces skipped.
fn names_of_group(group: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                names.push(first_name(group[start..at].trim_start()));
                return names;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                names.push(first_name(group[start..at].trim_start()));
                start = at + 1;
            }
            _ => (),
        }
    }
    names
}

/// Replaces comments and the contents of literals by blanks; lines stay lines.
fn blank(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let hidden = hidden_len(rest, out.chars().next_back());
        let len = if hidden > 0 { hidden } else { c.len_utf8() };
        let (piece, later) = rest.split_at(len);
        if hidden > 0 {
            out.extend(piece.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        } else {
            out.push(c);
        }
        rest = later;
    }
    out
}

/// How many bytes of a comment or literal start here; zero if this is code.
fn hidden_len(rest: &str, before: Option<char>) -> usize {
    let bytes = rest.as_bytes();
    let starts_word = !before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    match bytes {
        [b'/', b'/', ..] => rest.find('\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => rest.find("*/").map_or(rest.len(), |end| end + 2),
        [b'"', ..] => quoted_len(bytes, b'"'),
        [b'r', b'"' | b'#', ..] if starts_word => raw_len(rest),
        [b'b', b'"', ..] if starts_word => 1 + quoted_len(&bytes[1..], b'"'),
        [b'\'', b'\\', ..] => quoted_len(bytes, b'\''),
        [b'\'', ..] => {
            let mut chars = rest.char_indices().skip(2);
            // A quote right behind one character closes a literal; otherwise this is a lifetime.
            chars.next().filter(|(_, c)| *c == '\'').map_or(0, |(at, _)| at + 1)
        }
        _ => 0,
    }
}

fn quoted_len(bytes: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

fn raw_len(rest: &str) -> usize {
    let hashes = rest[1..].bytes().take_while(|byte| *byte == b'#').count();
    if rest.as_bytes().get(1 + hashes) != Some(&b'"') {
        return 0; // A raw name.
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let start = 2 + hashes;
    rest[start..].find(&end).map_or(rest.len(), |at| start + at + end.len())
}

#[test]
fn only_code_is_left_of_a_file() {
    let text = "use a; // tokio\nlet x = \"tonic \\\" {\"; /* rand\n*/ let c = '\"'; f::<'a>(r#\"un\"safe\"#, b\"x\", '\\'');\n";
    let code = blank(text);
    assert_eq!(code.lines().count(), text.lines().count());
    let left: Vec<_> = words(&code).into_iter().collect();
    assert_eq!(left, ["a", "c", "f", "let", "use", "x"]);
}

fn source(code: &str) -> Source {
    Source { path: "src/server/mod.rs".to_owned(), code: blank(code) }
}

#[test]
fn every_room_behind_the_name_of_the_house_is_found() {
    let code = "use crate::{\n  api::{self, kv},\n  node,\n};\nuse crate::error::Halt;\nlet x = crate::state::Kind;\n\
                metastore::bench::run();\nuse metastore::{config, peer::Client};\nlet x = my_crate::http2::X;";
    let source = source(code);
    let used = source.rooms_used();
    let names: Vec<_> = used.iter().map(|(line, name)| (*line, name.as_str())).collect();
    let expected = [(1, "api"), (1, "node"), (5, "error"), (6, "state"), (7, "bench"), (8, "config"), (8, "peer")];
    assert_eq!(names, expected);
}

#[test]
fn only_what_is_for_tests_is_left_out() {
    let code = "mod a;\n#[cfg(test)]\nmod tests;\nimpl X {\n    #[cfg(test)]\n    #[allow(b)]\n    fn len(&self) -> [u8; 4] {\n        \
                c('}', \"}\")\n    }\n    fn d() {}\n}\n#[cfg(test)]\nuse e::{f};\nfn g() {}\n#[cfg(test)]\nmod tests {\n    \
                #[cfg(test)]\n    fn h() {}\n    fn i() {}\n}\nfn j() {}\n";
    let left: Vec<_> =
        source(code).lines_without_tests().map(|(line, text)| format!("{line}: {}", text.trim())).collect();
    assert_eq!(left, ["1: mod a;", "4: impl X {", "10: fn d() {}", "11: }", "14: fn g() {}", "21: fn j() {}"]);
}

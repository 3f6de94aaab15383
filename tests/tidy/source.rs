//! Source files with comments and literals blanked, so that checks see only code.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The line before an item that is compiled only for tests.
const FOR_TESTS: &str = "#[cfg(test)]";

/// A source file.
pub struct Source {
    /// The path relative to the root of the project.
    pub path: String,
    /// The code, with the same line breaks as the file.
    code: String,
}

/// All Rust files under a path of the project, sorted by path.
pub fn sources(under: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: PathBuf| Source {
        code: blank(&fs::read_to_string(&path).unwrap()),
        path: path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(),
    };
    paths(&root.join(under)).into_iter().map(read).collect()
}

/// The paths of all Rust files under `under`, sorted.
pub fn paths(under: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    collect(under, &mut paths);
    paths.sort();
    assert!(!paths.is_empty(), "{} contains no source files", under.display());
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

/// The identifiers and keywords in a piece of code.
pub fn names(code: &str) -> BTreeSet<&str> {
    code.split(ends_name).filter(|name| !name.is_empty()).collect()
}

impl Source {
    /// The top-level module that this file belongs to.
    pub fn module(&self) -> &str {
        let inside = self.path.strip_prefix("src/").expect("modules are in src");
        let module = inside.split('/').next().expect("a path has a first part");
        module.strip_suffix(".rs").unwrap_or(module)
    }

    /// The path of the module in this file, like `node::log_thread`.
    pub fn module_path(&self) -> String {
        let inside = self.path.split_once("src/").expect("modules are in src").1;
        let inside = inside.strip_suffix(".rs").expect("it is a source file");
        inside.strip_suffix("/mod").unwrap_or(inside).replace('/', "::")
    }

    /// The full paths that `use` declarations outside of tests name, resolved against this module.
    pub fn paths_used(&self) -> Vec<String> {
        let code: String = self.lines_without_tests().flat_map(|(_, line)| [line, "\n"]).collect();
        let own = self.module_path();
        let is_file_of_directory = self.path.ends_with("/mod.rs");
        let mut used = Vec::new();
        for declaration in code.split("use ").skip(1) {
            let Some((tree, _)) = declaration.split_once(';') else { continue };
            for path in leaves(tree) {
                let mut parts: Vec<&str> = path.split("::").collect();
                let mut base: Vec<&str> = match parts[0] {
                    "crate" => Vec::new(),
                    "self" => own.split("::").collect(),
                    "super" => {
                        let mut base: Vec<&str> = own.split("::").collect();
                        base.pop();
                        base
                    }
                    // A child of this module, or a crate.
                    name if is_file_of_directory || Path::new(&self.path).with_extension("").is_dir() => {
                        let mut base: Vec<&str> = own.split("::").collect();
                        base.push(name);
                        base
                    }
                    _ => continue,
                };
                parts.remove(0);
                while parts.first() == Some(&"super") {
                    parts.remove(0);
                    base.pop();
                }
                base.extend(parts);
                used.push(base.join("::"));
            }
        }
        used
    }

    /// The paths behind every `name::` in a `use` declaration or an expression, outside of tests.
    pub fn crate_paths(&self, name: &str) -> Vec<String> {
        let code: String = self.lines_without_tests().flat_map(|(_, line)| [line, "\n"]).collect();
        let mut used = Vec::new();
        for (at, _) in code.match_indices("::") {
            if last_name(&code[..at]) == name && !code[..at - name.len()].ends_with("::") {
                let path = &code[at + "::".len()..];
                let names = path.strip_prefix('{').map_or_else(|| vec![first_name(path)], names_of_group);
                used.extend(names.into_iter().filter(|name| !name.is_empty()).map(ToOwned::to_owned));
            }
        }
        used
    }

    /// Line numbers and code.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.code.lines())
    }

    /// Like [`lines`](Self::lines), without code that is compiled only for tests: files named `tests.rs`, modules, single items.
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

    /// The identifiers and keywords of the file.
    pub fn names(&self) -> BTreeSet<&str> {
        names(&self.code)
    }

    /// The modules named after every `crate::` and every `metastore::` (the name of the library in `main.rs`), with line numbers.
    pub fn modules_used(&self) -> Vec<(usize, String)> {
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

/// The paths of a `use` tree, without renames.
fn leaves(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, group)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default().trim();
        return if path.is_empty() { Vec::new() } else { vec![path.to_owned()] };
    };
    let group = group.rsplit_once('}').map_or(group, |(group, _)| group);
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&group[start..at]);
                start = at + 1;
            }
            _ => (),
        }
    }
    parts.push(&group[start..]);
    parts.into_iter().flat_map(leaves).map(|leaf| format!("{}{leaf}", prefix.trim())).collect()
}

fn first_name(path: &str) -> &str {
    path.split(ends_name).next().unwrap_or_default()
}

fn last_name(path: &str) -> &str {
    path.rsplit(ends_name).next().unwrap_or_default()
}

fn ends_name(c: char) -> bool {
    !c.is_alphanumeric() && c != '_'
}

/// The length of the next item: up to its closing brace, or to a semicolon outside all brackets.
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

/// The first name of each path in the braces of a `use`, skipping nested braces.
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

/// Replaces comments and literals by spaces, keeping line breaks.
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

/// The length of the comment or literal that starts here; zero if none does.
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
            // A quote right after one character closes a literal; otherwise this is a lifetime.
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
        return 0; // A raw identifier.
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let start = 2 + hashes;
    rest[start..].find(&end).map_or(rest.len(), |at| start + at + end.len())
}

#[test]
fn comments_and_literals_are_blanked() {
    let text = "use a; // tokio\nlet x = \"tonic \\\" {\"; /* rand\n*/ let c = '\"'; f::<'a>(r#\"un\"safe\"#, b\"x\", '\\'');\n";
    let code = blank(text);
    assert_eq!(code.lines().count(), text.lines().count());
    let left: Vec<_> = names(&code).into_iter().collect();
    assert_eq!(left, ["a", "c", "f", "let", "use", "x"]);
}

fn source(code: &str) -> Source {
    Source { path: "src/server/mod.rs".to_owned(), code: blank(code) }
}

#[test]
fn every_module_named_in_a_path_is_found() {
    let code = "use crate::{\n  api::{self, kv},\n  node,\n};\nuse crate::error::Halt;\nlet x = crate::state::Kind;\n\
                metastore::cli::bench::run();\nuse metastore::{config, peer::Client};\nlet x = my_crate::http2::X;";
    let source = source(code);
    let used = source.modules_used();
    let names: Vec<_> = used.iter().map(|(line, name)| (*line, name.as_str())).collect();
    let expected = [(1, "api"), (1, "node"), (5, "error"), (6, "state"), (7, "cli"), (8, "config"), (8, "peer")];
    assert_eq!(names, expected);
}

#[test]
fn only_code_for_tests_is_left_out() {
    let code = "mod a;\n#[cfg(test)]\nmod tests;\nimpl X {\n    #[cfg(test)]\n    #[allow(b)]\n    fn len(&self) -> [u8; 4] {\n        \
                c('}', \"}\")\n    }\n    fn d() {}\n}\n#[cfg(test)]\nuse e::{f};\nfn g() {}\n#[cfg(test)]\nmod tests {\n    \
                #[cfg(test)]\n    fn h() {}\n    fn i() {}\n}\nfn j() {}\n";
    let left: Vec<_> =
        source(code).lines_without_tests().map(|(line, text)| format!("{line}: {}", text.trim())).collect();
    assert_eq!(left, ["1: mod a;", "4: impl X {", "10: fn d() {}", "11: }", "14: fn g() {}", "21: fn j() {}"]);
}

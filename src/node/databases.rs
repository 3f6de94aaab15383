//! Which directory of a member holds its database.
//!
//! ```text
//! member/
//! ├── DB           the name of the database's directory; absent as long as that is `db`
//! ├── db/          the database that the first start made
//! ├── db.57/       one that was received as a snapshot of index 57
//! └── copies/      copies for other members
//! ```
//!
//! A snapshot is received beside the database and replaces it with one rename, that of the file `DB`. Databases that it does not
//! name are removed: at the next start, or when the last reader drops them.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use super::snapshot::Scratch;
use crate::error::Halt;

const POINTER: &str = "DB";
const POINTER_DRAFT: &str = "DB.tmp";
const FIRST: &str = "db";
const COPIES: &str = "copies";

/// The directories of one member's databases.
#[derive(Debug, Clone)]
pub struct Databases {
    member: PathBuf,
}

impl Databases {
    /// For this member's directory.
    #[must_use]
    pub fn new(member: PathBuf) -> Self {
        Self { member }
    }

    /// The path of the current database.
    pub fn current(&self) -> Result<PathBuf, Halt> {
        let pointer = self.member.join(POINTER);
        match fs::read_to_string(&pointer) {
            Ok(name) if is_database_name(name.trim_end()) => Ok(self.member.join(name.trim_end())),
            Ok(name) => Err(Halt::InvalidData(format!("{} names no database: {name:?}", pointer.display()))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(self.member.join(FIRST)),
            Err(error) => Err(Halt::io("read", &pointer)(error)),
        }
    }

    /// The path of the current database; an error if it does not exist.
    pub fn current_existing(&self) -> Result<PathBuf, Halt> {
        let path = self.current()?;
        if path.is_dir() {
            return Ok(path);
        }
        Err(Halt::InvalidData(format!(
            "the database {} is not there, although its log is. Nothing was changed. Put it back; or remove this member from \
             its cluster and add it again with an empty data directory",
            path.display()
        )))
    }

    /// The directory that contains them all.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.member
    }

    /// A path for a database that will be received as a snapshot of this index.
    #[must_use]
    pub fn incoming(&self, index: u64) -> Scratch {
        let names =
            (0..).map(|nth| if nth == 0 { format!("{FIRST}.{index}") } else { format!("{FIRST}.{index}.{nth}") });
        let mut free = names.map(|name| self.member.join(name)).filter(|path| !path.exists());
        Scratch::new(free.next().expect("there is always an unused number"))
    }

    /// The directory in which copies for other members are made.
    #[must_use]
    pub fn copies(&self) -> PathBuf {
        self.member.join(COPIES)
    }

    /// Makes this the current database, durably. It must be in the member's directory, and durable itself.
    pub fn adopt(&self, path: &Path) -> Result<(), Halt> {
        let name = path.file_name().and_then(|name| name.to_str()).filter(|name| is_database_name(name));
        let name = name.ok_or_else(|| Halt::InvalidData(format!("{} cannot be a database's name", path.display())))?;
        let draft = self.member.join(POINTER_DRAFT);
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&draft)?;
            writeln!(file, "{name}")?;
            file.sync_all()?;
            fs::rename(&draft, self.member.join(POINTER))?;
            File::open(&self.member)?.sync_all()
        };
        write().map_err(Halt::io("write", &draft))
    }

    /// Removes all databases except the current one, and all copies. Only for the start, before there are readers.
    pub fn remove_unused(&self) -> Result<(), Halt> {
        let current = self.current()?;
        for entry in fs::read_dir(&self.member).map_err(Halt::io("list", &self.member))? {
            let path = entry.map_err(Halt::io("list", &self.member))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path != current && (is_database_name(&name) || name == COPIES) {
                tracing::info!(path = %path.display(), "removing a database that is not in use");
                fs::remove_dir_all(&path).map_err(Halt::io("remove", &path))?;
            }
        }
        let copies = self.copies();
        fs::create_dir(&copies).map_err(Halt::io("create", &copies))
    }
}

fn is_database_name(name: &str) -> bool {
    let suffix = name.strip_prefix(FIRST);
    suffix.is_some_and(|suffix| suffix.is_empty() || suffix.starts_with('.') && !suffix.contains('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_replaces_the_database_and_the_rest_is_removed() {
        let temp = tempfile::tempdir().unwrap();
        let databases = Databases::new(temp.path().to_path_buf());
        let first = databases.current().unwrap();
        assert_eq!(first, temp.path().join("db"));
        fs::create_dir(&first).unwrap();
        fs::create_dir(temp.path().join("log")).unwrap();
        databases.remove_unused().unwrap();
        let incoming = databases.incoming(57);
        fs::create_dir(incoming.path()).unwrap();
        assert_ne!(databases.incoming(57).path(), incoming.path(), "a second one of the same index gets its own path");
        let second = incoming.keep();
        databases.adopt(&second).unwrap();
        assert_eq!(databases.current().unwrap(), second);
        fs::create_dir(databases.copies().join("1")).unwrap();
        databases.remove_unused().unwrap();
        let mut left: Vec<_> = fs::read_dir(temp.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["DB", "copies", "db.57", "log"]);
        assert_eq!(fs::read_dir(databases.copies()).unwrap().count(), 0);
    }

    #[test]
    fn a_pointer_to_something_else_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let databases = Databases::new(temp.path().to_path_buf());
        for name in ["", "photos", "../db", "db/.."] {
            fs::write(temp.path().join(POINTER), name).unwrap();
            assert!(databases.current().is_err(), "{name:?}");
        }
        assert!(databases.adopt(Path::new("/tmp/photos")).is_err());
    }
}

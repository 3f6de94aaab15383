//! The data directory, which holds everything that a member persists.
//!
//! ```text
//! <data-dir>/          mode 0700
//! ├── LOCK             locked while a process uses the directory; the file stays when it ends
//! ├── member/          complete, or absent
//! │   ├── VERSION      the name and number of the format
//! │   ├── log/         the raft log
//! │   └── db/          the database
//! └── member.tmp/      a first start that was not finished; the next start discards it
//! ```
//!
//! The first start builds `member.tmp`, makes every file and directory in it durable, and renames it. So a crash at any moment
//! leaves either no member, and the next start is the first one again, or a complete one. `VERSION` is inside, so that it
//! appears with the rename, too.
//!
//! A directory whose content is not metastore's is refused before anything in it is touched: one of etcd's, one with other
//! files, one of a newer format. `lost+found` and `fixtures` are allowed: file systems and etcd's certificates put them there.
//!
//! INVARIANTS
//! * `member` exists only complete, with its `VERSION`.
//! * Everything is written under the lock, except a probe that is removed at once.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use tracing::{info, warn};

use super::databases::Databases;
use crate::error::Halt;

const LOCK: &str = "LOCK";
const MEMBER: &str = "member";
const DRAFT: &str = "member.tmp";
const VERSION: &str = "VERSION";
const PROBE: &str = ".touch";
const LOG: &str = "log";
const DB: &str = "db";

/// Entries that file systems and etcd's certificates put into a data directory.
const IGNORED: &[&str] = &["lost+found", "fixtures"];

const FORMAT_NAME: &str = "metastore";
const FORMAT_NUMBER: u32 = 1;
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// A data directory that this process has locked, until the value is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// Closing the file releases the lock.
    _lock: File,
}

impl DataDir {
    /// Opens the directory, which is created if it does not exist. If another process uses it, waits until that ends.
    ///
    /// # Errors
    /// If it cannot be read or written, or is not a metastore data directory: then nothing in it has been touched.
    pub fn open(path: &Path) -> Result<Self, Halt> {
        create(path).map_err(|error| inaccessible("mkdir", path, &error))?;
        check_content(path)?;
        probe(path)?;
        warn_of_wide_mode(path)?;
        let lock = lock(&path.join(LOCK))?;
        check_content(path)?; // The process that held the lock may have written since.
        let dir = Self { path: path.to_path_buf(), _lock: lock };
        dir.discard_draft()?;
        Ok(dir)
    }

    /// Whether a first start has been finished here.
    #[must_use]
    pub fn is_initialised(&self) -> bool {
        Self::looks_initialised(&self.path)
    }

    /// The same without opening, locking or creating anything: for checks that must come before anything is created.
    #[must_use]
    pub fn looks_initialised(path: &Path) -> bool {
        path.join(MEMBER).exists()
    }

    /// Performs the first start: `fill` writes a member's first files into the directory that it is given, at the paths of
    /// [`log_in`] and [`db_in`], and closes them. They appear atomically and durably.
    ///
    /// # Errors
    /// If `fill` or the disk fails. Then the next start is the first one again.
    ///
    /// # Panics
    /// If there has been a first start: check [`DataDir::is_initialised`] before.
    pub fn initialise(&self, fill: impl FnOnce(&Path) -> Result<(), Halt>) -> Result<(), Halt> {
        assert!(!self.is_initialised(), "a member starts for the first time only once");
        let draft = self.path.join(DRAFT);
        self.discard_draft()?;
        create(&draft).map_err(Halt::io("create", &draft))?;
        fill(&draft)?;
        let version = draft.join(VERSION);
        write_new(&version, &format!("{FORMAT_NAME} {FORMAT_NUMBER}\n")).map_err(Halt::io("write", &version))?;
        sync_tree(&draft)?;
        fs::rename(&draft, self.member_dir()).map_err(Halt::io("rename", &draft))?;
        sync(&self.path)
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of the member's files.
    #[must_use]
    pub fn member_dir(&self) -> PathBuf {
        self.path.join(MEMBER)
    }

    /// The directory of the raft log.
    #[must_use]
    pub fn log_dir(&self) -> PathBuf {
        log_in(&self.member_dir())
    }

    /// The directories of the member's databases.
    #[must_use]
    pub fn databases(&self) -> Databases {
        Databases::new(self.member_dir())
    }

    fn discard_draft(&self) -> Result<(), Halt> {
        let draft = self.path.join(DRAFT);
        match fs::remove_dir_all(&draft) {
            Ok(()) => {
                info!(path = %draft.display(), "discarded the files of a first start that was not finished");
                sync(&self.path)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Halt::io("remove", &draft)(error)),
        }
    }
}

/// The path of the raft log in a member's directory.
#[must_use]
pub fn log_in(member: &Path) -> PathBuf {
    member.join(LOG)
}

/// The path of the first database in a member's directory.
#[must_use]
pub fn db_in(member: &Path) -> PathBuf {
    member.join(DB)
}

/// Creates the directory and its missing parents, each durably.
fn create(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let above = match path.parent() {
        Some(above) if above.as_os_str().is_empty() => Path::new("."),
        Some(above) => above,
        None => Path::new("/"),
    };
    if !above.exists() {
        create(above)?;
    }
    match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
        // Another process was faster, or something else is there, which the next step will find.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(()),
        created => created?,
    }
    match File::open(above) {
        Ok(above) => above.sync_all(),
        // A directory may be writable but not readable; then its durability is left to the system.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(error),
    }
}

/// Refuses a directory that is not metastore's. Only reads.
fn check_content(path: &Path) -> Result<(), Halt> {
    let unlisted =
        |error: io::Error| Halt::InvalidData(format!("failed to list data directory: {}: {error}", path.display()));
    for entry in fs::read_dir(path).map_err(unlisted)? {
        let name = entry.map_err(unlisted)?.file_name();
        let name = name.to_string_lossy();
        if name == MEMBER {
            check_version(&path.join(MEMBER))?;
        } else if ![LOCK, DRAFT, PROBE].contains(&name.as_ref()) && !IGNORED.contains(&name.as_ref()) {
            let path = path.display();
            return Err(Halt::InvalidData(format!("data directory {path} is not metastore's: it contains {name:?}")));
        }
    }
    Ok(())
}

fn check_version(member: &Path) -> Result<(), Halt> {
    let path = member.join(VERSION);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => {
            let etcds = if member.join("wal").exists() || member.join("snap").exists() { ", but etcd's" } else { "" };
            return Err(Halt::InvalidData(format!(
                "{} is not metastore's{etcds}: it has no file {VERSION}",
                member.display()
            )));
        }
        Err(error) => return Err(Halt::io("read", &path)(error)),
    };
    let number = text.strip_prefix(FORMAT_NAME).and_then(|number| number.trim().parse::<u32>().ok());
    match number {
        Some(FORMAT_NUMBER) => Ok(()),
        Some(number) if number > FORMAT_NUMBER => Err(Halt::InvalidData(format!(
            "{} says format {number}: it was written by a newer metastore, and this one reads format {FORMAT_NUMBER}",
            path.display()
        ))),
        _ => Err(Halt::InvalidData(format!(
            "{} does not name a metastore format: {:?}",
            path.display(),
            text.trim_end()
        ))),
    }
}

/// Finds out whether the directory is writable, by writing a file.
fn probe(path: &Path) -> Result<(), Halt> {
    let probe = path.join(PROBE);
    let written = OpenOptions::new().write(true).create(true).truncate(true).mode(FILE_MODE).open(&probe);
    written.map_err(|error| inaccessible("open", &probe, &error))?;
    match fs::remove_file(&probe) {
        // Another process that is starting at the same time may have removed it.
        Err(error) if error.kind() != ErrorKind::NotFound => Err(inaccessible("remove", &probe, &error)),
        _ => Ok(()),
    }
}

fn inaccessible(action: &str, path: &Path, error: &io::Error) -> Halt {
    Halt::InvalidData(format!("cannot access data directory: {action} {}: {error}", path.display()))
}

fn warn_of_wide_mode(path: &Path) -> Result<(), Halt> {
    let mode = fs::metadata(path).map_err(Halt::io("stat", path))?.permissions().mode() & 0o777;
    if mode != DIRECTORY_MODE {
        let error = format!(
            "directory {:?} exist, but the permission is {mode:04o}. The recommended permission is {DIRECTORY_MODE:04o} \
             to prevent possible unprivileged access to the data",
            path.display().to_string()
        );
        warn!(error, "check file permission");
    }
    Ok(())
}

/// Takes the lock. Logs a line if another process holds it, and waits until it is released.
fn lock(path: &Path) -> Result<File, Halt> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .open(path)
        .map_err(Halt::io("open", path))?;
    let mut attempt = flock(&file, FlockOperation::NonBlockingLockExclusive);
    if attempt == Err(Errno::WOULDBLOCK) {
        let path = path.display();
        warn!(%path, "db file is flocked by another process, or taking too long");
        attempt = Err(Errno::INTR);
        while attempt == Err(Errno::INTR) {
            attempt = flock(&file, FlockOperation::LockExclusive);
        }
        info!(%path, "the other process has released the lock");
    }
    attempt.map_err(|error| Halt::io("lock", path)(error.into()))?;
    Ok(file)
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())
}

/// Makes a directory and everything in it durable, children before parents.
fn sync_tree(path: &Path) -> Result<(), Halt> {
    for entry in fs::read_dir(path).map_err(Halt::io("list", path))? {
        let entry = entry.map_err(Halt::io("list", path))?;
        let kind = entry.file_type().map_err(Halt::io("stat", &entry.path()))?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            sync(&entry.path())?;
        }
    }
    sync(path)
}

fn sync(path: &Path) -> Result<(), Halt> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Halt::io("sync", path))
}

#[cfg(test)]
mod tests {
    use std::{fs::Permissions, sync::mpsc};

    use super::*;

    fn fill(draft: &Path) -> Result<(), Halt> {
        for dir in [log_in(draft), db_in(draft)] {
            fs::create_dir(&dir).map_err(Halt::io("create", &dir))?;
            let file = dir.join("data");
            fs::write(&file, "first").map_err(Halt::io("write", &file))?;
        }
        Ok(())
    }

    fn refusal(path: &Path) -> String {
        let halt = DataDir::open(path).unwrap_err();
        assert!(matches!(halt, Halt::InvalidData(_)), "{halt}");
        halt.to_string()
    }

    /// Every path below, with the content of files.
    fn content(path: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
        let mut all = Vec::new();
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            all.push((path.clone(), fs::read(&path).ok()));
            if path.is_dir() {
                all.extend(content(&path));
            }
        }
        all.sort();
        all
    }

    #[test]
    fn a_first_start_appears_at_once_and_stays() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("a/b/data");
        assert!(!DataDir::looks_initialised(&path) && !path.exists());
        let dir = DataDir::open(&path).unwrap();
        assert!(!dir.is_initialised());
        dir.initialise(|draft| {
            assert!(!path.join(MEMBER).exists(), "it appears only when it is complete");
            fill(draft)
        })
        .unwrap();
        assert!(dir.is_initialised());
        drop(dir);

        let dir = DataDir::open(&path).unwrap();
        assert!(dir.is_initialised());
        assert_eq!(fs::read(dir.log_dir().join("data")).unwrap(), b"first");
        assert_eq!(fs::read(dir.databases().current().unwrap().join("data")).unwrap(), b"first");
        assert_eq!(fs::read_to_string(dir.member_dir().join(VERSION)).unwrap(), "metastore 1\n");
        for made in [temp.path().join("a"), path.clone(), dir.member_dir()] {
            assert_eq!(fs::metadata(made).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }

    /// FAULT-15.
    #[test]
    fn a_crash_at_any_step_of_the_first_start_leaves_a_first_start_to_the_next_process() {
        type LeaveBehind = fn(&Path);
        let steps: [(&str, LeaveBehind); 8] = [
            ("before the directory", |_| ()),
            ("before the lock", |path| fs::create_dir(path).unwrap()),
            ("after the probe", |path| {
                fs::create_dir(path).unwrap();
                fs::write(path.join(PROBE), "").unwrap();
            }),
            ("after the lock", |path| {
                fs::create_dir(path).unwrap();
                fs::write(path.join(LOCK), "").unwrap();
            }),
            ("after the draft was begun", |path| fs::create_dir_all(path.join(DRAFT)).unwrap()),
            ("amid filling", |path| {
                fs::create_dir_all(path.join(DRAFT).join(LOG)).unwrap();
                fs::write(path.join(DRAFT).join(LOG).join("data"), "fi").unwrap();
            }),
            ("amid the version", |path| {
                fs::create_dir_all(path.join(DRAFT)).unwrap();
                fill(&path.join(DRAFT)).unwrap();
                fs::write(path.join(DRAFT).join(VERSION), "meta").unwrap();
            }),
            ("before the rename", |path| {
                fs::create_dir_all(path.join(DRAFT)).unwrap();
                fill(&path.join(DRAFT)).unwrap();
                fs::write(path.join(DRAFT).join(VERSION), "metastore 1\n").unwrap();
            }),
        ];
        for (moment, leave_behind) in steps {
            let temp = tempfile::tempdir().unwrap();
            let path = temp.path().join("data");
            leave_behind(&path);
            let dir = DataDir::open(&path).unwrap();
            assert!(!dir.is_initialised(), "{moment}");
            assert!(!path.join(DRAFT).exists(), "{moment}");
            dir.initialise(fill).unwrap();
            assert_eq!(fs::read(dir.log_dir().join("data")).unwrap(), b"first", "{moment}");
        }
    }

    #[test]
    fn a_first_start_that_fails_is_a_first_start_again() {
        let temp = tempfile::tempdir().unwrap();
        let dir = DataDir::open(temp.path()).unwrap();
        let failed = dir.initialise(|draft| {
            fill(draft)?;
            Err(Halt::InvalidData("no".to_owned()))
        });
        assert!(failed.is_err() && !dir.is_initialised());
        dir.initialise(fill).unwrap();
        assert!(dir.is_initialised());
    }

    #[test]
    fn a_directory_that_is_not_metastores_is_refused_untouched() {
        let cases: [(&str, &[(&str, &str)]); 5] = [
            (
                "is not metastore's, but etcd's: it has no file VERSION",
                &[("member/wal/0.wal", ""), ("member/snap/db", "")],
            ),
            ("is not metastore's: it contains \"photos\"", &[("photos", "x")]),
            ("was written by a newer metastore, and this one reads format 1", &[("member/VERSION", "metastore 2\n")]),
            ("does not name a metastore format: \"something\"", &[("member/VERSION", "something\n")]),
            ("is not metastore's: it has no file VERSION", &[("member", "a file")]),
        ];
        for (expected, files) in cases {
            let temp = tempfile::tempdir().unwrap();
            for (name, text) in files {
                let file = temp.path().join(name);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, text).unwrap();
            }
            let before = content(temp.path());
            let message = refusal(temp.path());
            assert!(message.contains(expected), "{message}");
            assert_eq!(content(temp.path()), before);
        }
    }

    #[test]
    fn entries_made_by_file_systems_are_ignored() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir(temp.path().join("lost+found")).unwrap();
        DataDir::open(temp.path()).unwrap().initialise(fill).unwrap();
        assert!(DataDir::open(temp.path()).unwrap().is_initialised());
    }

    #[test]
    fn a_path_that_cannot_be_a_directory_is_refused_with_etcds_message() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(refusal(&file).starts_with("failed to list data directory: "));
        assert!(refusal(&file.join("below")).starts_with("cannot access data directory: mkdir "));
        assert_eq!(fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn a_directory_with_wide_permissions_is_opened_nevertheless() {
        let temp = tempfile::tempdir().unwrap();
        fs::set_permissions(temp.path(), Permissions::from_mode(0o755)).unwrap();
        assert!(DataDir::open(temp.path()).is_ok());
    }

    #[test]
    fn a_second_owner_waits_for_the_first() {
        let temp = tempfile::tempdir().unwrap();
        let first = DataDir::open(temp.path()).unwrap();
        let path = temp.path().to_path_buf();
        let (sender, receiver) = mpsc::channel();
        let second = std::thread::spawn(move || {
            let dir = DataDir::open(&path).unwrap();
            sender.send(dir.is_initialised()).unwrap();
        });
        // The second must see what the first did last: if it had not waited, it would see an empty directory.
        first.initialise(fill).unwrap();
        assert_eq!(receiver.try_recv(), Err(mpsc::TryRecvError::Empty));
        drop(first);
        assert_eq!(receiver.recv(), Ok(true));
        second.join().unwrap();
    }
}

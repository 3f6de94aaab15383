//! Receives snapshots, which are copies of another member's database, and opens them.

use std::{io, sync::Arc};

use super::{
    databases::Databases,
    snapshot::{InboundSnapshot, Scratch},
    transport,
};
use crate::{
    error::Halt,
    state::Machine,
    storage::{
        Engine,
        rocks::{MemoryLimits, Rocks},
    },
};

/// Stores received snapshots beside the databases of this member.
pub struct SnapshotReceiver {
    pub databases: Databases,
    pub value_cache_bytes: u64,
    pub caches: MemoryLimits,
    /// The capability level that this member knows.
    pub known_level: u64,
}

impl transport::SnapshotStore for SnapshotReceiver {
    fn new_directory(&self, index: u64) -> Scratch {
        self.databases.incoming(index)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let disk = rustix::fs::statvfs(self.databases.directory())?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    fn open(&self, files: Scratch) -> Result<InboundSnapshot, Halt> {
        let engine: Arc<dyn Engine> = Arc::new(Rocks::open_with(files.path(), self.caches)?);
        let mut machine = Machine::open(engine, self.value_cache_bytes)?;
        machine.limit_level(self.known_level)?;
        let databases = self.databases.clone();
        let adopt = Box::new(move || {
            databases.adopt(files.path())?;
            _ = files.keep();
            Ok(())
        });
        Ok(InboundSnapshot { machine, adopt })
    }
}

//! Where copies of other members' databases go, and how they become states.

use std::{io, sync::Arc};

use crate::{
    error::Halt,
    node::{
        databases::Databases,
        snapshot::{Incoming, Scratch},
        transport,
    },
    state::Machine,
    storage::{
        Engine,
        rocks::{Caches, Rocks},
    },
};

/// The databases of this member, and how they are opened.
pub struct Depot {
    pub databases: Databases,
    pub value_cache_bytes: u64,
    pub caches: Caches,
}

impl transport::Depot for Depot {
    fn place(&self, index: u64) -> Scratch {
        self.databases.incoming(index)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let disk = rustix::fs::statvfs(self.databases.directory())?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    fn open(&self, files: Scratch) -> Result<Incoming, Halt> {
        let engine: Arc<dyn Engine> = Arc::new(Rocks::open_with(files.path(), self.caches)?);
        let machine = Machine::open(engine, self.value_cache_bytes)?;
        let databases = self.databases.clone();
        let adopt = Box::new(move || {
            databases.adopt(files.path())?;
            _ = files.keep();
            Ok(())
        });
        Ok(Incoming { machine, adopt })
    }
}

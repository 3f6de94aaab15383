//! The bytes of one file on a disk that can lose power: the durable ones, and those that a crash may lose.

/// A file's content, independent of its name.
#[derive(Debug, Default, Clone)]
pub(super) struct Inode {
    /// What survives every power failure.
    pub durable: Vec<u8>,
    /// The offset and the bytes of each write.
    pub unsynced_writes: Vec<(usize, Vec<u8>)>,
    /// Whether a sync failed. The system may then treat the writes as done, so that no later sync writes them.
    pub sync_failed: bool,
}

impl Inode {
    /// Reads the content with all unsynced writes.
    pub fn read(&self, from: usize, bytes: &mut [u8]) {
        let whole = (0, &self.durable);
        let writes = self.unsynced_writes.iter().map(|(offset, bytes)| (*offset, bytes));
        bytes.fill(0);
        for (offset, written) in std::iter::once(whole).chain(writes) {
            let (start, end) = (offset.max(from), (offset + written.len()).min(from + bytes.len()));
            if start < end {
                bytes[start - from..end - from].copy_from_slice(&written[start - offset..end - offset]);
            }
        }
    }

    /// Overwrites a part of the content durably, including earlier unsynced writes to it.
    pub fn put_durably(&mut self, from: usize, bytes: &[u8]) {
        let to = from + bytes.len();
        for (offset, written) in std::mem::take(&mut self.unsynced_writes) {
            let end = offset + written.len();
            let (before, after) = (from.clamp(offset, end), to.clamp(offset, end));
            let rest = [(offset, &written[..before - offset]), (after, &written[after - offset..])];
            let rest = rest.into_iter().filter(|(_, bytes)| !bytes.is_empty());
            self.unsynced_writes.extend(rest.map(|(offset, bytes)| (offset, bytes.to_vec())));
        }
        self.put(from, bytes);
    }

    /// Makes all writes durable.
    pub fn sync(&mut self) {
        for (offset, bytes) in std::mem::take(&mut self.unsynced_writes) {
            self.put(offset, &bytes);
        }
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        self.durable.resize(self.durable.len().max(end), 0);
        self.durable[offset..end].copy_from_slice(bytes);
    }

    /// Simulates a crash of the process: the next one finds all bytes, except that those of a failed sync are only in the page
    /// cache.
    pub fn restart(&mut self) {
        if std::mem::take(&mut self.sync_failed) {
            self.unsynced_writes.clear();
        }
    }

    /// Simulates a power failure: of each unsynced write nothing, all, a prefix, or some of the sectors survive, at random.
    pub fn lose(&mut self, random: Option<&mut SplitMix64>) {
        let writes = std::mem::take(&mut self.unsynced_writes);
        self.sync_failed = false;
        let Some(random) = random else { return };
        for (offset, bytes) in writes {
            match random.below(4) {
                0 => {}
                1 => self.put(offset, &bytes),
                2 => self.put(offset, &bytes[..random.below(bytes.len() + 1)]),
                _ => self.put_sectors(offset, &bytes, random),
            }
        }
    }

    fn put_sectors(&mut self, offset: usize, bytes: &[u8], random: &mut SplitMix64) {
        const SECTOR: usize = 512;
        let end = offset + bytes.len();
        let mut from = offset;
        while from < end {
            let to = (from / SECTOR * SECTOR + SECTOR).min(end);
            if random.below(2) == 0 {
                self.put(from, &bytes[from - offset..to - offset]);
            }
            from = to;
        }
    }
}

/// Pseudorandom numbers from a seed, by the splitmix64 algorithm.
#[derive(Debug)]
pub(super) struct SplitMix64(pub u64);

impl SplitMix64 {
    /// A number below the limit.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        usize::try_from(mixed % limit as u64).expect("below a usize")
    }
}

//! The bytes of one file on a disk that can lose power: those that stay, and those that may go.

/// A file's bytes, whatever it is called.
#[derive(Debug, Default, Clone)]
pub(super) struct Inode {
    /// What a power cut leaves in any case.
    pub durable: Vec<u8>,
    /// Where each was written, and what.
    pub unsynced_writes: Vec<(usize, Vec<u8>)>,
    /// Whether a sync failed. The system may then take the writes for done, so that no later sync writes them.
    pub sync_failed: bool,
}

impl Inode {
    /// What lies on the disk and in its cache.
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

    /// What was written here before, and is not synced, is overwritten by it.
    pub fn put_durably(&mut self, from: usize, bytes: &[u8]) {
        let to = from + bytes.len();
        for (offset, written) in std::mem::take(&mut self.unsynced_writes) {
            let end = offset + written.len();
            let (before, behind) = (from.clamp(offset, end), to.clamp(offset, end));
            let rest = [(offset, &written[..before - offset]), (behind, &written[behind - offset..])];
            let rest = rest.into_iter().filter(|(_, bytes)| !bytes.is_empty());
            self.unsynced_writes.extend(rest.map(|(offset, bytes)| (offset, bytes.to_vec())));
        }
        self.put(from, bytes);
    }

    /// All that was written stays.
    pub fn settle(&mut self) {
        for (offset, bytes) in std::mem::take(&mut self.unsynced_writes) {
            self.put(offset, &bytes);
        }
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        self.durable.resize(self.durable.len().max(end), 0);
        self.durable[offset..end].copy_from_slice(bytes);
    }

    /// The next process finds all bytes, but those of a failed sync only in the page cache.
    pub fn restart(&mut self) {
        if std::mem::take(&mut self.sync_failed) {
            self.unsynced_writes.clear();
        }
    }

    /// Of each write there survives, as the dice fall, nothing, all, a beginning, or any of the sectors.
    pub fn lose(&mut self, dice: Option<&mut Dice>) {
        let writes = std::mem::take(&mut self.unsynced_writes);
        self.sync_failed = false;
        let Some(dice) = dice else { return };
        for (offset, bytes) in writes {
            match dice.below(4) {
                0 => {}
                1 => self.put(offset, &bytes),
                2 => self.put(offset, &bytes[..dice.below(bytes.len() + 1)]),
                _ => self.put_sectors(offset, &bytes, dice),
            }
        }
    }

    fn put_sectors(&mut self, offset: usize, bytes: &[u8], dice: &mut Dice) {
        const SECTOR: usize = 512;
        let end = offset + bytes.len();
        let mut from = offset;
        while from < end {
            let to = (from / SECTOR * SECTOR + SECTOR).min(end);
            if dice.below(2) == 0 {
                self.put(from, &bytes[from - offset..to - offset]);
            }
            from = to;
        }
    }
}

/// Numbers from a seed, by the splitmix64 sequence.
#[derive(Debug)]
pub(super) struct Dice(pub u64);

impl Dice {
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

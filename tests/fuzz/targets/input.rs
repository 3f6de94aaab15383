//! Arbitrary bytes, read as a sequence of decisions. When the bytes run out, every decision is the first alternative.

/// The bytes that have not been consumed yet.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// A two-byte number.
    pub fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// A four-byte number.
    pub fn long(&mut self) -> u32 {
        u32::from(self.short()) << 16 | u32::from(self.short())
    }

    /// A number below `bound`, which must be at most 256.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound
    }

    /// One element of `among`.
    pub fn pick<T: Copy>(&mut self, among: &[T]) -> T {
        among[self.below(among.len())]
    }

    /// `length` bytes, or all that are left.
    pub fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A length of one byte, then that many bytes.
    pub fn piece(&mut self) -> &'a [u8] {
        let length = self.byte();
        self.take(usize::from(length))
    }
}

/// Splits bytes into pieces. The lengths depend only on the seed.
pub struct Splitter(u64);

impl Splitter {
    /// With seed zero every piece is one byte long.
    pub fn new(seed: u16) -> Self {
        Self(u64::from(seed))
    }

    /// The next piece of what is left.
    pub fn next<'a>(&mut self, rest: &mut &'a [u8]) -> &'a [u8] {
        // Xorshift; mostly short pieces, sometimes long ones.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let most = if self.0 & 0x300 == 0x300 { 4096 } else { 24 };
        let length = usize::try_from(self.0 >> 32).unwrap_or(0) % most + 1;
        let (piece, tail) = rest.split_at(length.min(rest.len()));
        *rest = tail;
        piece
    }
}

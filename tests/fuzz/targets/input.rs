//! Arbitrary bytes, taken as decisions. Where they end, every decision is the first one.

/// Bytes that nobody has decided with yet.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// A number of two bytes.
    pub fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// A number of four bytes.
    pub fn long(&mut self) -> u32 {
        u32::from(self.short()) << 16 | u32::from(self.short())
    }

    /// A number below `bound`, which is small.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound
    }

    /// One of some.
    pub fn pick<T: Copy>(&mut self, among: &[T]) -> T {
        among[self.below(among.len())]
    }

    /// So many bytes, or what is left.
    pub fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A length of one byte, and so many bytes.
    pub fn piece(&mut self) -> &'a [u8] {
        let length = self.byte();
        self.take(usize::from(length))
    }
}

/// Lengths of pieces that something is cut into: always the same ones for the same seed.
pub struct Cuts(u64);

impl Cuts {
    /// The cuts of a seed. Of the seed zero all are one byte long.
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
        let (piece, behind) = rest.split_at(length.min(rest.len()));
        *rest = behind;
        piece
    }
}

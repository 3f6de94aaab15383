//! Values with small numbers for names; a number is used again once its value is gone.

use std::ops::{Index, IndexMut};

/// The values.
pub struct Slots<T> {
    values: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { values: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    /// Takes a value; returns its number.
    pub fn insert(&mut self, value: T) -> u32 {
        if let Some(free) = self.free.pop() {
            self.values[free as usize] = Some(value);
            return free;
        }
        self.values.push(Some(value));
        u32::try_from(self.values.len() - 1).expect("values are counted in 32 bits")
    }

    /// Gives a value back, and its number to the next one.
    pub fn remove(&mut self, slot: u32) -> T {
        let value = self.values[slot as usize].take().expect("only what is there is removed");
        self.free.push(slot);
        if self.free.len() == self.values.len() {
            *self = Self::default(); // Nobody is left: neither shall the memory of a crowd be.
        }
        value
    }

    /// A value, if it is still there.
    #[must_use]
    pub fn get(&self, slot: u32) -> Option<&T> {
        self.values.get(slot as usize)?.as_ref()
    }

    /// All values, by number.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..).zip(&self.values).filter_map(|(slot, value)| Some((slot, value.as_ref()?)))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len() - self.free.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Index<u32> for Slots<T> {
    type Output = T;

    fn index(&self, slot: u32) -> &T {
        self.get(slot).expect("a number names a value for as long as it is known")
    }
}

impl<T> IndexMut<u32> for Slots<T> {
    fn index_mut(&mut self, slot: u32) -> &mut T {
        self.values[slot as usize].as_mut().expect("a number names a value for as long as it is known")
    }
}

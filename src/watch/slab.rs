//! A slab: a collection that assigns small numbers to its values, and reuses the numbers of removed values.

use std::ops::{Index, IndexMut};

/// A collection of values, numbered from zero.
pub struct Slab<T> {
    values: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { values: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Adds a value; returns its number.
    pub fn insert(&mut self, value: T) -> u32 {
        if let Some(free) = self.free.pop() {
            self.values[free as usize] = Some(value);
            return free;
        }
        self.values.push(Some(value));
        u32::try_from(self.values.len() - 1).expect("values are counted in 32 bits")
    }

    /// Removes a value; its number can be used again. Panics if there is no such value.
    pub fn remove(&mut self, slot: u32) -> T {
        let value = self.values[slot as usize].take().expect("only existing values are removed");
        self.free.push(slot);
        if self.free.len() == self.values.len() {
            *self = Self::default(); // Release the memory that many values needed.
        }
        value
    }

    #[must_use]
    pub fn get(&self, slot: u32) -> Option<&T> {
        self.values.get(slot as usize)?.as_ref()
    }

    /// All values, by number.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..).zip(&self.values).filter_map(|(slot, value)| Some((slot, value.as_ref()?)))
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len() - self.free.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Index<u32> for Slab<T> {
    type Output = T;

    fn index(&self, slot: u32) -> &T {
        self.get(slot).expect("a number is valid until its value is removed")
    }
}

impl<T> IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, slot: u32) -> &mut T {
        self.values[slot as usize].as_mut().expect("a number is valid until its value is removed")
    }
}

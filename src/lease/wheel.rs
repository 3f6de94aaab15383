//! A timing wheel: a ring of slots, one per tick, that tells roughly when each lease is due.
//!
//! ```text
//!   ticks     ... 41   42   43   44 ...  41 + SLOTS - 1
//!                 ^cursor                ^ leases due later are kept here and inserted again when it comes up
//! ```
//!
//! When the tick of a slot has come, all leases in it are removed and returned. A lease may be in a slot before its deadline:
//! the caller checks the exact deadline and inserts the lease again if it is not due yet. So a wheel of half an hour serves
//! deadlines of any length, and a lease whose deadline moves into the future need not move in the wheel.
//!
//! Each lease stores its own [`WheelPosition`], so removal takes constant time too: the last lease of the slot is moved into
//! the free position. A revoked lease leaves nothing behind.
//!
//! INVARIANTS
//! * Every lease in the wheel is in exactly one slot, for a tick from `cursor` to `cursor + SLOTS - 1`.

use super::LeaseId;

/// At a quarter of a second per slot: 34 minutes.
const SLOTS: usize = 8192;

/// The position of a lease in the wheel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WheelPosition {
    slot: u32,
    at: u32,
}

#[derive(Debug)]
pub(super) struct Wheel {
    slots: Box<[Vec<LeaseId>]>,
    /// The first tick whose slot may hold leases.
    cursor: u64,
}

impl Wheel {
    /// An empty wheel whose first slot is for `tick`.
    pub(super) fn starting_at(tick: u64) -> Self {
        Self { slots: vec![Vec::new(); SLOTS].into_boxed_slice(), cursor: tick }
    }

    /// Inserts a lease into the slot of a tick, or of the nearest tick that the wheel covers.
    pub(super) fn insert(&mut self, id: LeaseId, tick: u64) -> WheelPosition {
        let slot = slot_of(self.cursor + self.steps_to(tick));
        let at = u32::try_from(self.slots[slot].len()).expect("fewer than 2^32 leases end in one tick");
        self.slots[slot].push(id);
        WheelPosition { slot: u32::try_from(slot).expect("the number of slots is small"), at }
    }

    /// Removes the lease at a position. Returns the lease that was moved to that position, if any.
    #[must_use]
    pub(super) fn remove(&mut self, position: WheelPosition) -> Option<LeaseId> {
        let (slot, at) = (&mut self.slots[position.slot as usize], position.at as usize);
        slot.swap_remove(at);
        let moved = slot.get(at).copied();
        if slot.is_empty() {
            *slot = Vec::new();
        }
        moved
    }

    /// Removes and returns a lease whose tick has come, if there is one.
    pub(super) fn pop_due(&mut self, now: u64) -> Option<LeaseId> {
        while self.cursor <= now {
            let slot = &mut self.slots[slot_of(self.cursor)];
            if let Some(id) = slot.pop() {
                return Some(id);
            }
            *slot = Vec::new(); // Frees the memory: the slot may stay empty in the next round.
            if self.cursor == now {
                break;
            }
            self.cursor += 1;
        }
        None
    }

    /// Whether a tick is before the tick of a position's slot.
    pub(super) fn is_sooner(&self, tick: u64, position: WheelPosition) -> bool {
        self.steps_to(tick) < self.steps_to_slot(position.slot as usize)
    }

    /// Whether [`Wheel::pop_due`] was not called for so long that the wheel has no slot for ticks after `now`.
    pub(super) fn is_overrun(&self, now: u64) -> bool {
        now + 1 > self.cursor + LAST_STEP
    }

    /// The first tick that has leases. None is due before; those in the slot may be due later.
    pub(super) fn next_tick(&self) -> Option<u64> {
        (0..=LAST_STEP).map(|step| self.cursor + step).find(|&tick| !self.slots[slot_of(tick)].is_empty())
    }

    /// All leases, in the order of their slots.
    pub(super) fn into_ids(mut self) -> impl Iterator<Item = LeaseId> {
        let first = slot_of(self.cursor);
        self.slots.rotate_left(first);
        self.slots.into_iter().flatten()
    }

    #[cfg(test)]
    pub(super) fn at(&self, position: WheelPosition) -> Option<LeaseId> {
        self.slots[position.slot as usize].get(position.at as usize).copied()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.slots.iter().map(Vec::len).sum()
    }

    fn steps_to(&self, tick: u64) -> u64 {
        tick.saturating_sub(self.cursor).min(LAST_STEP)
    }

    fn steps_to_slot(&self, slot: usize) -> u64 {
        ((slot + SLOTS - slot_of(self.cursor)) % SLOTS) as u64
    }
}

const LAST_STEP: u64 = SLOTS as u64 - 1;

fn slot_of(tick: u64) -> usize {
    usize::try_from(tick % SLOTS as u64).expect("the number of slots is small")
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: LeaseId = LeaseId(1);
    const B: LeaseId = LeaseId(2);
    const C: LeaseId = LeaseId(3);

    #[test]
    fn a_lease_is_returned_at_its_tick_and_not_before() {
        let mut wheel = Wheel::starting_at(100);
        wheel.insert(A, 103);
        wheel.insert(B, 101);
        wheel.insert(C, 7); // In the past: as soon as possible.
        assert_eq!(wheel.next_tick(), Some(100));
        assert_eq!(wheel.pop_due(99), None);
        assert_eq!(wheel.pop_due(100), Some(C));
        assert_eq!(wheel.pop_due(100), None);
        assert_eq!(wheel.pop_due(102), Some(B));
        assert_eq!(wheel.next_tick(), Some(103));
        assert_eq!(wheel.pop_due(102), None);
        assert_eq!(wheel.pop_due(200), Some(A));
        assert_eq!(wheel.pop_due(200), None);
        assert_eq!(wheel.next_tick(), None);
    }

    #[test]
    fn a_lease_due_beyond_the_wheel_is_returned_at_the_last_slot() {
        let mut wheel = Wheel::starting_at(100);
        wheel.insert(A, 1_000_000);
        assert_eq!(wheel.next_tick(), Some(100 + LAST_STEP));
        assert_eq!(wheel.pop_due(99 + LAST_STEP), None);
        assert_eq!(wheel.pop_due(100 + LAST_STEP), Some(A));
    }

    #[test]
    fn a_removed_lease_is_replaced_by_the_last_of_its_slot() {
        let mut wheel = Wheel::starting_at(0);
        let position = wheel.insert(A, 5);
        wheel.insert(B, 5);
        let last = wheel.insert(C, 5);
        assert_eq!(wheel.remove(position), Some(C));
        assert_eq!(
            wheel.remove(WheelPosition { at: 1, ..last }),
            None,
            "nothing is moved for the last lease of a slot"
        );
        assert_eq!(wheel.remove(position), None);
        assert_eq!(wheel.next_tick(), None);
    }

    #[test]
    fn is_sooner_counts_from_the_cursor_and_wraps_around() {
        let mut wheel = Wheel::starting_at(SLOTS as u64 - 2);
        let position = wheel.insert(A, SLOTS as u64 + 3);
        assert!(wheel.is_sooner(SLOTS as u64 + 2, position));
        assert!(!wheel.is_sooner(SLOTS as u64 + 3, position));
        assert!(!wheel.is_sooner(SLOTS as u64 + 4, position));
    }

    #[test]
    fn an_overrun_wheel_still_returns_all_leases_in_order() {
        let mut wheel = Wheel::starting_at(10);
        wheel.insert(B, 10 + LAST_STEP);
        wheel.insert(A, 11);
        assert!(!wheel.is_overrun(9 + LAST_STEP));
        assert!(wheel.is_overrun(10 + LAST_STEP));
        assert_eq!(wheel.into_ids().collect::<Vec<_>>(), [A, B]);
    }
}

//! A ring of slots, one per tick of time: who is due when, roughly.
//!
//! ```text
//!   ticks     ... 41   42   43   44 ...  41 + SLOTS - 1
//!                 ^cursor                ^ whoever is due later waits here, and is put back again then
//! ```
//!
//! A slot comes up once its tick has come, and then gives up everyone in it. Being there early does no harm, since whoever
//! asks looks at the true deadline and puts back who still has time. So a ring of half an hour serves deadlines of any
//! length, and a deadline that moves away need not move in the ring.
//!
//! Everyone knows their own [`Place`], so that leaving takes one step too: the last of the slot takes the empty place.
//! Leases that were revoked leave nothing behind.
//!
//! INVARIANTS
//! * Everyone in the ring is in exactly one slot, for a tick from `cursor` to `cursor + SLOTS - 1`.

use super::LeaseId;

/// Of a quarter of a second each: 34 minutes.
const SLOTS: usize = 8192;

/// Where somebody is in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    slot: u32,
    at: u32,
}

/// The ring.
#[derive(Debug)]
pub(super) struct Wheel {
    slots: Box<[Vec<LeaseId>]>,
    /// The first tick whose slot may hold someone.
    cursor: u64,
}

impl Wheel {
    /// An empty ring, at a tick.
    pub(super) fn starting_at(tick: u64) -> Self {
        Self { slots: vec![Vec::new(); SLOTS].into_boxed_slice(), cursor: tick }
    }

    /// Puts somebody into the slot of a tick, or of the nearest one that the ring has.
    pub(super) fn insert(&mut self, id: LeaseId, tick: u64) -> Place {
        let slot = slot_of(self.cursor + self.steps_to(tick));
        let at = u32::try_from(self.slots[slot].len()).expect("fewer than 2^32 leases end in one tick");
        self.slots[slot].push(id);
        Place { slot: u32::try_from(slot).expect("the ring is small"), at }
    }

    /// Takes whoever is there out of a place. The one who is returned, if any, is now in that place.
    #[must_use]
    pub(super) fn remove(&mut self, place: Place) -> Option<LeaseId> {
        let (slot, at) = (&mut self.slots[place.slot as usize], place.at as usize);
        slot.swap_remove(at);
        let moved = slot.get(at).copied();
        if slot.is_empty() {
            *slot = Vec::new();
        }
        moved
    }

    /// Takes out someone whose tick has come, if there is anyone.
    pub(super) fn pop_due(&mut self, now: u64) -> Option<LeaseId> {
        while self.cursor <= now {
            let slot = &mut self.slots[slot_of(self.cursor)];
            if let Some(id) = slot.pop() {
                return Some(id);
            }
            *slot = Vec::new(); // Gives the memory back: the next round may put nobody here.
            if self.cursor == now {
                break;
            }
            self.cursor += 1;
        }
        None
    }

    /// Whether a tick comes before that of a place.
    pub(super) fn is_sooner(&self, tick: u64, place: Place) -> bool {
        self.steps_to(tick) < self.steps_to_slot(place.slot as usize)
    }

    /// Whether so much time went by without [`Wheel::pop_due`] that there is no slot left for what is due after `now`.
    pub(super) fn is_overrun(&self, now: u64) -> bool {
        now + 1 > self.cursor + LAST_STEP
    }

    /// The first tick that has someone. They may have more time than that, but nobody has less.
    pub(super) fn next_tick(&self) -> Option<u64> {
        (0..=LAST_STEP).map(|step| self.cursor + step).find(|&tick| !self.slots[slot_of(tick)].is_empty())
    }

    /// Everyone, in the order of their slots.
    pub(super) fn into_ids(mut self) -> impl Iterator<Item = LeaseId> {
        let first = slot_of(self.cursor);
        self.slots.rotate_left(first);
        self.slots.into_iter().flatten()
    }

    /// Who is in a place, for tests.
    #[cfg(test)]
    pub(super) fn at(&self, place: Place) -> Option<LeaseId> {
        self.slots[place.slot as usize].get(place.at as usize).copied()
    }

    /// How many are in the ring, for tests.
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
    usize::try_from(tick % SLOTS as u64).expect("the ring is small")
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: LeaseId = LeaseId(1);
    const B: LeaseId = LeaseId(2);
    const C: LeaseId = LeaseId(3);

    #[test]
    fn everyone_comes_up_at_their_tick_and_not_before() {
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
    fn whoever_is_due_beyond_the_ring_comes_up_at_its_last_slot() {
        let mut wheel = Wheel::starting_at(100);
        wheel.insert(A, 1_000_000);
        assert_eq!(wheel.next_tick(), Some(100 + LAST_STEP));
        assert_eq!(wheel.pop_due(99 + LAST_STEP), None);
        assert_eq!(wheel.pop_due(100 + LAST_STEP), Some(A));
    }

    #[test]
    fn who_leaves_is_replaced_by_the_last_of_the_slot() {
        let mut wheel = Wheel::starting_at(0);
        let place = wheel.insert(A, 5);
        wheel.insert(B, 5);
        let last = wheel.insert(C, 5);
        assert_eq!(wheel.remove(place), Some(C));
        assert_eq!(wheel.remove(Place { at: 1, ..last }), None, "the last one leaves nobody to move");
        assert_eq!(wheel.remove(place), None);
        assert_eq!(wheel.next_tick(), None);
    }

    #[test]
    fn sooner_is_counted_from_the_present_around_the_ring() {
        let mut wheel = Wheel::starting_at(SLOTS as u64 - 2);
        let place = wheel.insert(A, SLOTS as u64 + 3);
        assert!(wheel.is_sooner(SLOTS as u64 + 2, place));
        assert!(!wheel.is_sooner(SLOTS as u64 + 3, place));
        assert!(!wheel.is_sooner(SLOTS as u64 + 4, place));
    }

    #[test]
    fn an_overrun_ring_still_gives_everyone_back_in_order() {
        let mut wheel = Wheel::starting_at(10);
        wheel.insert(B, 10 + LAST_STEP);
        wheel.insert(A, 11);
        assert!(!wheel.is_overrun(9 + LAST_STEP));
        assert!(wheel.is_overrun(10 + LAST_STEP));
        assert_eq!(wheel.into_ids().collect::<Vec<_>>(), [A, B]);
    }
}

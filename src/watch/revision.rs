//! A revision with several events on its way to watches: which of the events each watch hears, and their frames.
//!
//! A deletion of a range can have a million events, and a thousand watches may overlap it. So nothing here is done per event
//! *and* watch. By key, the events of an interval lie next to each other; each watch is matched once, with a range of them.
//! Watches that hear most of a large revision share one list of all its frames, and watches that hear the same share a list
//! of those.

use std::{collections::HashMap, ops::Range, sync::Arc};

use bytes::Bytes;

use super::{
    frame,
    interest::Interest,
    outbox::{Frames, frame_cost},
    stream::Wishes,
};
use crate::{
    error::Halt,
    mvcc::{Event, Reader},
};

/// Only the frames of a revision with so many events are all put into one list.
const WHOLE_EVENTS: usize = 64;
/// A watch keeps the whole list if what it hears is at least this part of it, so what is kept is no more than four times what
/// is counted.
const WHOLE_PART: usize = 4;

/// A watch, and which of a revision's events are about its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    /// Its number.
    pub watch: u32,
    /// The events, as they are numbered by key.
    pub events: Range<usize>,
}

/// Which frames: some events by key, and what a watch wishes of them.
type Selection = (usize, usize, [bool; 3]);

/// A list of frames.
struct List {
    frames: Arc<[Bytes]>,
    /// What all frames before each of them cost, and all together.
    costs: Vec<usize>,
}

/// The events of one revision.
pub struct Revision<'a> {
    events: &'a [Event],
    reader: &'a Reader,
    /// The events in the order of their keys; empty if they come in it.
    by_key: Vec<u32>,
    deletions: usize,
    /// The frames made so far, without and with what was there before. Empty where there is none yet.
    frames: [Vec<Bytes>; 2],
    whole: [Option<List>; 2],
    selections: HashMap<Selection, (Arc<[Bytes]>, usize)>,
}

impl<'a> Revision<'a> {
    /// A revision of which nothing is encoded yet.
    #[must_use]
    pub fn new(events: &'a [Event], reader: &'a Reader) -> Self {
        let count = u32::try_from(events.len()).expect("the events of a revision are numbered in 32 bits");
        let mut by_key = Vec::new();
        if !events.is_sorted_by(|a, b| a.key <= b.key) {
            by_key = (0..count).collect();
            by_key.sort_by(|&a, &b| events[a as usize].key.cmp(&events[b as usize].key));
        }
        Self {
            events,
            reader,
            by_key,
            deletions: events.iter().filter(|event| event.deletion).count(),
            frames: [Vec::new(), Vec::new()],
            whole: [None, None],
            selections: HashMap::new(),
        }
    }

    /// Which watches are concerned; each once.
    pub fn matches(&self, interest: &Interest, into: &mut Vec<Match>) {
        let key = |nth: usize| &self.events[self.place(nth)].key[..];
        interest.visit_all(0..self.events.len(), key, &mut |group, events| {
            into.extend(group.iter().map(|&watch| Match { watch, events: events.clone() }));
        });
    }

    /// Whether a watch wants one of the events that are about its keys.
    #[must_use]
    pub fn concerns(&self, events: &Range<usize>, wishes: Wishes) -> bool {
        self.is_wanted_whole(wishes) || events.clone().any(|nth| wishes.admit(self.events[self.place(nth)].deletion))
    }

    /// Whether a watch that hears these events keeps the list of all frames, instead of one of its own.
    pub fn is_whole(&mut self, events: &Range<usize>, wishes: Wishes) -> Result<bool, Halt> {
        let is_candidate = self.events.len() >= WHOLE_EVENTS && self.by_key.is_empty() && self.is_wanted_whole(wishes);
        // What is not worth encoding the other events for is not looked at any closer.
        if !is_candidate || events.len() * WHOLE_PART < self.events.len() {
            return Ok(false);
        }
        let costs = &self.whole(wishes.previous)?.costs;
        Ok((costs[events.end] - costs[events.start]) * WHOLE_PART >= costs[costs.len() - 1])
    }

    /// The frames of these events, as far as a watch wants them, in the order in which they happened.
    pub fn frames(&mut self, events: &Range<usize>, wishes: Wishes) -> Result<Frames, Halt> {
        if self.is_whole(events, wishes)? {
            let whole = self.whole(wishes.previous)?;
            let cost = whole.costs[events.end] - whole.costs[events.start];
            return Ok(Frames::Shared { list: whole.frames.clone(), range: events.clone(), cost });
        }
        let selection = (events.start, events.end, [wishes.no_put, wishes.no_delete, wishes.previous]);
        if let Some((list, cost)) = self.selections.get(&selection) {
            return Ok(Frames::Shared { list: list.clone(), range: 0..list.len(), cost: *cost });
        }
        let places = events.clone().map(|nth| self.place(nth));
        let mut wanted: Vec<usize> = places.filter(|&place| wishes.admit(self.events[place].deletion)).collect();
        wanted.sort_unstable();
        if let [only] = wanted[..] {
            return Ok(Frames::One(self.frame(only, wishes.previous)?));
        }
        let list =
            wanted.into_iter().map(|place| self.frame(place, wishes.previous)).collect::<Result<Arc<[_]>, _>>()?;
        let cost = list.iter().map(frame_cost).sum();
        self.selections.insert(selection, (list.clone(), cost));
        Ok(Frames::Shared { range: 0..list.len(), list, cost })
    }

    /// Where in the revision the event is that is the `nth` by key.
    fn place(&self, nth: usize) -> usize {
        self.by_key.get(nth).map_or(nth, |&place| place as usize)
    }

    /// Whether a watch with these wishes wants every event that is about its keys.
    fn is_wanted_whole(&self, wishes: Wishes) -> bool {
        (!wishes.no_delete || self.deletions == 0) && (!wishes.no_put || self.deletions == self.events.len())
    }

    fn frame(&mut self, place: usize, with_previous: bool) -> Result<Bytes, Halt> {
        let event = &self.events[place];
        let with_previous = with_previous && event.previous.is_some();
        let frames = &mut self.frames[usize::from(with_previous)];
        if frames.is_empty() {
            frames.resize(self.events.len(), Bytes::new());
        }
        if frames[place].is_empty() {
            frames[place] = frame::encode(event, with_previous, self.reader)?;
        }
        Ok(frames[place].clone())
    }

    /// The list of all frames.
    fn whole(&mut self, with_previous: bool) -> Result<&List, Halt> {
        let variant = usize::from(with_previous);
        if self.whole[variant].is_none() {
            let all = (0..self.events.len()).map(|place| self.frame(place, with_previous));
            let frames = all.collect::<Result<Vec<_>, _>>()?;
            let mut costs = Vec::with_capacity(frames.len() + 1);
            costs.push(0);
            costs.extend(frames.iter().scan(0, |sum, frame| {
                *sum += frame_cost(frame);
                Some(*sum)
            }));
            self.whole[variant] = Some(List { frames: frames.into(), costs });
        }
        Ok(self.whole[variant].as_ref().expect("it was just made"))
    }
}

//! The delivery of a revision that has several events: which of them each watch receives, and their frames.
//!
//! The deletion of a range can have a million events, and a thousand watches may overlap it, so nothing here is done per event
//! *and* watch. Sorted by key, the events of an interval are adjacent; each watch is matched once, with a range of them. Watches
//! that receive most of a large revision share one list of all its frames, and watches that receive the same events share a list
//! of those.

use std::{collections::HashMap, ops::Range, sync::Arc};

use bytes::Bytes;

use super::{
    frame,
    matcher::Matcher,
    outbox::{Frames, frame_cost},
    stream::WatchOptions,
};
use crate::{
    error::Halt,
    mvcc::{Event, Reader},
};

/// The minimum number of events of a revision for which a list of all frames is made.
const SHARED_LIST_MIN_EVENTS: usize = 64;
/// A watch shares the list of all frames if it receives at least one in this many of its bytes. So the memory that is held is at
/// most four times what is charged.
const SHARED_LIST_DIVISOR: usize = 4;

/// A watch, and the events of a revision that match its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    /// The number of the watch.
    pub watch: u32,
    /// The events, numbered in key order.
    pub events: Range<usize>,
}

/// Identifies a list of frames: a range of events in key order, and the options of the watch that affect its frames.
type Selection = (usize, usize, [bool; 3]);

/// A list of frames.
struct List {
    frames: Arc<[Bytes]>,
    /// The total cost of all frames before each of them; the last element is the cost of the whole list.
    costs: Vec<usize>,
}

/// The events of one revision.
pub struct Revision<'a> {
    events: &'a [Event],
    reader: &'a Reader,
    /// The positions of the events, sorted by key; empty if the events are in key order.
    by_key: Vec<u32>,
    deletions: usize,
    /// The frames encoded so far, without and with the previous value. Not encoded yet: empty.
    frames: [Vec<Bytes>; 2],
    whole: [Option<List>; 2],
    selections: HashMap<Selection, (Arc<[Bytes]>, usize)>,
}

impl<'a> Revision<'a> {
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

    /// Appends all watches that match any event, each once.
    pub fn matches(&self, matcher: &Matcher, into: &mut Vec<Match>) {
        let key = |nth: usize| &self.events[self.position(nth)].key[..];
        matcher.visit_all(0..self.events.len(), key, &mut |group, events| {
            into.extend(group.iter().map(|&watch| Match { watch, events: events.clone() }));
        });
    }

    /// Whether a watch selects any of the events that match its keys.
    #[must_use]
    pub fn concerns(&self, events: &Range<usize>, options: WatchOptions) -> bool {
        self.is_wanted_whole(options)
            || events.clone().any(|nth| options.includes(self.events[self.position(nth)].deletion))
    }

    /// Whether a watch that receives these events shares the list of all frames, instead of having its own.
    pub fn is_whole(&mut self, events: &Range<usize>, options: WatchOptions) -> Result<bool, Halt> {
        let is_candidate =
            self.events.len() >= SHARED_LIST_MIN_EVENTS && self.by_key.is_empty() && self.is_wanted_whole(options);
        // Do not encode all events only to find out that this watch receives few of them.
        if !is_candidate || events.len() * SHARED_LIST_DIVISOR < self.events.len() {
            return Ok(false);
        }
        let costs = &self.whole(options.previous)?.costs;
        Ok((costs[events.end] - costs[events.start]) * SHARED_LIST_DIVISOR >= costs[costs.len() - 1])
    }

    /// The frames of those of the events that a watch selects, in the order in which they happened.
    pub fn frames(&mut self, events: &Range<usize>, options: WatchOptions) -> Result<Frames, Halt> {
        if self.is_whole(events, options)? {
            let whole = self.whole(options.previous)?;
            let cost = whole.costs[events.end] - whole.costs[events.start];
            return Ok(Frames::Shared { list: whole.frames.clone(), range: events.clone(), cost });
        }
        let selection = (events.start, events.end, [options.no_put, options.no_delete, options.previous]);
        if let Some((list, cost)) = self.selections.get(&selection) {
            return Ok(Frames::Shared { list: list.clone(), range: 0..list.len(), cost: *cost });
        }
        let positions = events.clone().map(|nth| self.position(nth));
        let mut wanted: Vec<usize> =
            positions.filter(|&position| options.includes(self.events[position].deletion)).collect();
        wanted.sort_unstable();
        if let [only] = wanted[..] {
            return Ok(Frames::One(self.frame(only, options.previous)?));
        }
        let list = wanted
            .into_iter()
            .map(|position| self.frame(position, options.previous))
            .collect::<Result<Arc<[_]>, _>>()?;
        let cost = list.iter().map(frame_cost).sum();
        self.selections.insert(selection, (list.clone(), cost));
        Ok(Frames::Shared { range: 0..list.len(), list, cost })
    }

    /// The position in the revision of the event that is the `nth` in key order.
    fn position(&self, nth: usize) -> usize {
        self.by_key.get(nth).map_or(nth, |&position| position as usize)
    }

    /// Whether a watch with these options selects every event that matches its keys.
    fn is_wanted_whole(&self, options: WatchOptions) -> bool {
        (!options.no_delete || self.deletions == 0) && (!options.no_put || self.deletions == self.events.len())
    }

    fn frame(&mut self, position: usize, with_previous: bool) -> Result<Bytes, Halt> {
        let event = &self.events[position];
        let with_previous = with_previous && event.previous.is_some();
        let frames = &mut self.frames[usize::from(with_previous)];
        if frames.is_empty() {
            frames.resize(self.events.len(), Bytes::new());
        }
        if frames[position].is_empty() {
            frames[position] = frame::encode(event, with_previous, self.reader)?;
        }
        Ok(frames[position].clone())
    }

    /// The list of all frames.
    fn whole(&mut self, with_previous: bool) -> Result<&List, Halt> {
        let variant = usize::from(with_previous);
        if self.whole[variant].is_none() {
            let all = (0..self.events.len()).map(|position| self.frame(position, with_previous));
            let frames = all.collect::<Result<Vec<_>, _>>()?;
            let mut costs = Vec::with_capacity(frames.len() + 1);
            costs.push(0);
            costs.extend(frames.iter().scan(0, |sum, frame| {
                *sum += frame_cost(frame);
                Some(*sum)
            }));
            self.whole[variant] = Some(List { frames: frames.into(), costs });
        }
        Ok(self.whole[variant].as_ref().expect("the list was just made"))
    }
}

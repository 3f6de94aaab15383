//! What waits to be sent to one member.
//!
//! Two lanes: what keeps leaders and elections alive goes ahead of what carries data, so that a backlog of appends cannot
//! make a leader look dead. For the same reason the backlog is taken out in pieces. Nothing waits for a member that is not
//! connected, and what waits is bounded, in either lane: raft sends again what was lost, once it hears that something was. Of
//! heartbeats only the newest waits, unless reads want an answer to them.

use std::{
    collections::VecDeque,
    mem,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use raft::eraftpb::{Message, MessageType};

/// What a message costs beside the data of its entries.
const MESSAGE_BYTES: usize = 128;
/// Of the backlog, so much is taken out at once; the first message always.
const PIECE_BYTES: usize = 1 << 20;
/// So many messages wait at most that are urgent, all of which are small.
const MOST_URGENT: usize = 4096;

/// A member's outbox: many senders, one who takes.
#[derive(Debug)]
pub(super) struct Outbox {
    max_bytes: usize,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "they have nothing to do with each other")]
struct State {
    urgent: Vec<Message>,
    ordinary: VecDeque<Message>,
    bytes: usize,
    connected: bool,
    /// Something did not fit.
    lost: bool,
    asleep: bool,
    closed: bool,
}

/// What was taken out.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// In the order in which they shall go.
    pub messages: Vec<Message>,
    /// Something was lost that raft should send again.
    pub lost: bool,
    /// Nothing will come any more.
    pub closed: bool,
}

fn is_urgent(message: &Message) -> bool {
    !matches!(
        message.msg_type,
        MessageType::MsgAppend | MessageType::MsgAppendResponse | MessageType::MsgPropose | MessageType::MsgSnapshot
    )
}

fn cost(message: &Message) -> usize {
    MESSAGE_BYTES + message.entries.iter().map(|entry| entry.data.len() + MESSAGE_BYTES).sum::<usize>()
}

impl Outbox {
    /// An empty one; more bytes than this do not wait.
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, state: Mutex::default(), arrived: Condvar::new() }
    }

    /// Takes messages, unless nobody would carry them.
    pub fn push(&self, messages: Vec<Message>) {
        let mut state = self.state.lock();
        if !state.connected || state.closed {
            return;
        }
        for message in messages {
            if is_urgent(&message) {
                state.push_urgent(message);
                continue;
            }
            let cost = cost(&message);
            // The first always fits, however large it is.
            if state.bytes > 0 && state.bytes + cost > self.max_bytes {
                state.lost = true;
                continue;
            }
            state.bytes += cost;
            state.ordinary.push_back(message);
        }
        if mem::take(&mut state.asleep) {
            drop(state);
            self.arrived.notify_one();
        }
    }

    /// Waits until there is something, or for so long.
    pub fn take(&self, patience: Duration) -> Batch {
        let until = Instant::now() + patience;
        let mut state = self.state.lock();
        while state.urgent.is_empty() && state.ordinary.is_empty() && !state.closed {
            state.asleep = true;
            if self.arrived.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.asleep = false;
        let mut messages = mem::take(&mut state.urgent);
        state.take_piece(&mut messages);
        Batch { messages, lost: mem::take(&mut state.lost), closed: state.closed }
    }

    /// Waits for so long, or until nothing will come any more; says whether that is so.
    pub fn rest(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut state = self.state.lock();
        while !state.closed && !self.arrived.wait_until(&mut state, until).timed_out() {}
        state.closed
    }

    /// Somebody carries what is put here from now on, or does not any more.
    pub fn set_connected(&self, connected: bool) {
        let mut state = self.state.lock();
        *state = State { connected, closed: state.closed, ..State::default() };
    }

    /// Nothing will come any more. Says whether anybody carried what came until now.
    pub fn close(&self) -> bool {
        let mut state = self.state.lock();
        state.closed = true;
        self.arrived.notify_all();
        state.connected
    }

    /// Does this unless it was closed, and so that whoever closes it comes after; says whether it was done.
    pub fn while_open(&self, act: impl FnOnce()) -> bool {
        let state = self.state.lock();
        if !state.closed {
            act();
        }
        !state.closed
    }
}

impl State {
    fn push_urgent(&mut self, message: Message) {
        let is_plain = |it: &Message| it.msg_type == MessageType::MsgHeartbeat && it.context.is_empty();
        if message.msg_type == MessageType::MsgHeartbeat
            && let Some(older) = self.urgent.iter_mut().find(|older| is_plain(older) && older.term <= message.term)
        {
            *older = message;
        } else if self.urgent.len() < MOST_URGENT {
            self.urgent.push(message);
        } else {
            self.lost = true;
        }
    }

    fn take_piece(&mut self, into: &mut Vec<Message>) {
        let mut bytes = 0;
        while let Some(cost) = self.ordinary.front().map(cost) {
            if bytes > 0 && bytes + cost > PIECE_BYTES {
                return;
            }
            bytes += cost;
            self.bytes -= cost;
            into.extend(self.ordinary.pop_front());
        }
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;

    fn append(bytes: usize) -> Message {
        let entry = Entry { data: vec![0; bytes].into(), ..Entry::default() };
        Message { msg_type: MessageType::MsgAppend, entries: vec![entry].into(), ..Message::default() }
    }

    #[test]
    fn heartbeats_overtake_and_nothing_waits_for_who_is_gone() {
        let outbox = Outbox::new(1000);
        let heartbeat = Message { msg_type: MessageType::MsgHeartbeat, ..Message::default() };
        outbox.push(vec![heartbeat.clone()]);
        assert!(outbox.take(Duration::ZERO).messages.is_empty(), "nobody is connected");
        outbox.set_connected(true);
        outbox.push(vec![append(1), heartbeat.clone()]);
        assert_eq!(outbox.take(Duration::ZERO).messages, [heartbeat.clone(), append(1)]);
        outbox.push(vec![heartbeat]);
        outbox.set_connected(false);
        assert!(outbox.take(Duration::ZERO).messages.is_empty(), "what was meant for the old connection is lost");
    }

    #[test]
    fn what_waits_is_bounded_and_the_loss_is_told_once() {
        let outbox = Outbox::new(1000);
        outbox.set_connected(true);
        outbox.push(vec![append(2000), append(1), append(1)]);
        let batch = outbox.take(Duration::ZERO);
        assert_eq!((batch.messages.len(), batch.lost), (1, true), "one always fits");
        outbox.push(vec![append(1)]);
        let batch = outbox.take(Duration::ZERO);
        assert_eq!((batch.messages.len(), batch.lost), (1, false));
        assert!(outbox.while_open(|| ()));
        assert!(outbox.close(), "somebody carried it");
        assert!(!outbox.while_open(|| panic!("it is closed")));
        assert!(outbox.take(Duration::from_secs(100)).closed && outbox.rest(Duration::from_secs(100)));
    }

    #[test]
    fn a_heartbeat_overtakes_a_backlog_that_is_on_its_way() {
        let outbox = Outbox::new(64 << 20);
        outbox.set_connected(true);
        outbox.push((0..8).map(|_| append(PIECE_BYTES / 2)).collect());
        let beat = |term, commit, context: &'static [u8]| Message {
            msg_type: MessageType::MsgHeartbeat,
            term,
            commit,
            context: context.into(),
            ..Message::default()
        };
        assert_eq!(outbox.take(Duration::ZERO).messages, [append(PIECE_BYTES / 2)]);
        outbox.push(vec![beat(1, 1, b""), beat(1, 2, b""), beat(1, 2, b"read"), beat(1, 3, b"")]);
        let taken = outbox.take(Duration::ZERO).messages;
        assert_eq!(taken, [beat(1, 2, b"read"), beat(1, 3, b""), append(PIECE_BYTES / 2)]);
        assert_eq!((0..).find(|_| outbox.take(Duration::ZERO).messages.is_empty()), Some(6), "nothing is lost");
    }

    #[test]
    fn what_is_urgent_is_bounded_too() {
        let outbox = Outbox::new(1000);
        outbox.set_connected(true);
        let asks = Message { msg_type: MessageType::MsgReadIndex, ..Message::default() };
        outbox.push(vec![asks; MOST_URGENT + 1]);
        let batch = outbox.take(Duration::ZERO);
        assert_eq!((batch.messages.len(), batch.lost), (MOST_URGENT, true));
    }
}

//! The queue of messages to one member.
//!
//! There are two queues: heartbeats, votes and the like are urgent and overtake messages with data, so that a backlog of appends
//! cannot make a leader look dead. For the same reason the backlog is taken out in batches of a limited size. Nothing is queued
//! for a member that is not connected, and both queues are bounded: raft resends what was dropped, once it is told that something
//! was. Of the heartbeats only the newest is kept, unless they carry a read context.

use std::{
    collections::VecDeque,
    mem,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use raft::eraftpb::{Message, MessageType};

/// The assumed overhead of a message or an entry, in addition to the data of the entries.
const MESSAGE_BYTES: usize = 128;
/// At most this much of the backlog is taken out at once, but at least one message.
const BATCH_BYTES: usize = 1 << 20;
/// The limit for queued urgent messages, all of which are small.
const MAX_URGENT: usize = 4096;

/// The queue of messages to a member, with many producers and one consumer.
#[derive(Debug)]
pub(super) struct Outbox {
    max_bytes: usize,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "they are independent of each other")]
struct State {
    urgent: Vec<Message>,
    ordinary: VecDeque<Message>,
    bytes: usize,
    connected: bool,
    /// A message was dropped because a queue was full.
    lost: bool,
    is_waiting: bool,
    closed: bool,
}

/// Messages taken out of the queue.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// In the order in which they are to be sent.
    pub messages: Vec<Message>,
    /// Messages were dropped since the last batch; raft should resend them.
    pub lost: bool,
    /// The outbox is closed.
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
    /// An empty outbox with a limit for the bytes of the messages that are not urgent.
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, state: Mutex::default(), arrived: Condvar::new() }
    }

    /// Queues messages. They are dropped if the member is not connected.
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
            // The first one is always queued, however large it is.
            if state.bytes > 0 && state.bytes + cost > self.max_bytes {
                state.lost = true;
                continue;
            }
            state.bytes += cost;
            state.ordinary.push_back(message);
        }
        if mem::take(&mut state.is_waiting) {
            drop(state);
            self.arrived.notify_one();
        }
    }

    /// Waits for messages, up to the timeout.
    pub fn take(&self, timeout: Duration) -> Batch {
        let until = Instant::now() + timeout;
        let mut state = self.state.lock();
        while state.urgent.is_empty() && state.ordinary.is_empty() && !state.closed {
            state.is_waiting = true;
            if self.arrived.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.is_waiting = false;
        let mut messages = mem::take(&mut state.urgent);
        state.take_batch(&mut messages);
        Batch { messages, lost: mem::take(&mut state.lost), closed: state.closed }
    }

    /// Waits until the outbox is closed, up to the timeout; returns whether it is.
    pub fn wait_closed(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let mut state = self.state.lock();
        while !state.closed && !self.arrived.wait_until(&mut state, until).timed_out() {}
        state.closed
    }

    /// Notes that the connection is established or lost. Messages from before are dropped.
    pub fn set_connected(&self, connected: bool) {
        let mut state = self.state.lock();
        *state = State { connected, closed: state.closed, ..State::default() };
    }

    /// Closes the outbox. Returns whether the member was connected.
    pub fn close(&self) -> bool {
        let mut state = self.state.lock();
        state.closed = true;
        self.arrived.notify_all();
        state.connected
    }

    /// Calls `act` unless the outbox is closed, and returns whether it did. [`close`](Self::close) waits for the call to return.
    pub fn run_if_open(&self, act: impl FnOnce()) -> bool {
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
        } else if self.urgent.len() < MAX_URGENT {
            self.urgent.push(message);
        } else {
            self.lost = true;
        }
    }

    fn take_batch(&mut self, into: &mut Vec<Message>) {
        let mut bytes = 0;
        while let Some(cost) = self.ordinary.front().map(cost) {
            if bytes > 0 && bytes + cost > BATCH_BYTES {
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
    fn heartbeats_overtake_appends_and_nothing_is_queued_without_a_connection() {
        let outbox = Outbox::new(1000);
        let heartbeat = Message { msg_type: MessageType::MsgHeartbeat, ..Message::default() };
        outbox.push(vec![heartbeat.clone()]);
        assert!(outbox.take(Duration::ZERO).messages.is_empty(), "it is not connected");
        outbox.set_connected(true);
        outbox.push(vec![append(1), heartbeat.clone()]);
        assert_eq!(outbox.take(Duration::ZERO).messages, [heartbeat.clone(), append(1)]);
        outbox.push(vec![heartbeat]);
        outbox.set_connected(false);
        assert!(outbox.take(Duration::ZERO).messages.is_empty(), "messages for the old connection are dropped");
    }

    #[test]
    fn queued_bytes_are_bounded_and_a_loss_is_reported_once() {
        let outbox = Outbox::new(1000);
        outbox.set_connected(true);
        outbox.push(vec![append(2000), append(1), append(1)]);
        let batch = outbox.take(Duration::ZERO);
        assert_eq!((batch.messages.len(), batch.lost), (1, true), "one is always queued");
        outbox.push(vec![append(1)]);
        let batch = outbox.take(Duration::ZERO);
        assert_eq!((batch.messages.len(), batch.lost), (1, false));
        assert!(outbox.run_if_open(|| ()));
        assert!(outbox.close(), "it was connected");
        assert!(!outbox.run_if_open(|| panic!("it is closed")));
        assert!(outbox.take(Duration::from_secs(100)).closed && outbox.wait_closed(Duration::from_secs(100)));
    }

    #[test]
    fn a_heartbeat_overtakes_a_backlog_that_is_being_sent() {
        let outbox = Outbox::new(64 << 20);
        outbox.set_connected(true);
        outbox.push((0..8).map(|_| append(BATCH_BYTES / 2)).collect());
        let beat = |term, commit, context: &'static [u8]| Message {
            msg_type: MessageType::MsgHeartbeat,
            term,
            commit,
            context: context.into(),
            ..Message::default()
        };
        assert_eq!(outbox.take(Duration::ZERO).messages, [append(BATCH_BYTES / 2)]);
        outbox.push(vec![beat(1, 1, b""), beat(1, 2, b""), beat(1, 2, b"read"), beat(1, 3, b"")]);
        let taken = outbox.take(Duration::ZERO).messages;
        assert_eq!(taken, [beat(1, 2, b"read"), beat(1, 3, b""), append(BATCH_BYTES / 2)]);
        let left: usize = (0..8).map(|_| outbox.take(Duration::ZERO).messages.len()).sum();
        assert_eq!(left, 6, "nothing is lost");
    }

    #[test]
    fn the_number_of_urgent_messages_is_bounded() {
        let outbox = Outbox::new(1000);
        outbox.set_connected(true);
        let read_index = Message { msg_type: MessageType::MsgReadIndex, ..Message::default() };
        outbox.push(vec![read_index; MAX_URGENT + 1]);
        let batch = outbox.take(Duration::ZERO);
        assert_eq!((batch.messages.len(), batch.lost), (MAX_URGENT, true));
    }
}

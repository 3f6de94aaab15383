//! What waits to be sent to one member.
//!
//! Two lanes: what keeps leaders and elections alive goes ahead of what carries data, so that a backlog of appends cannot
//! make a leader look dead. Nothing waits for a member that is not connected, and what waits is bounded in bytes: raft sends
//! again what was lost, once it hears that something was.

use std::{
    mem,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use raft::eraftpb::{Message, MessageType};

/// What a message costs beside the data of its entries.
const MESSAGE_BYTES: usize = 128;

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
    ordinary: Vec<Message>,
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
                state.urgent.push(message);
                continue;
            }
            let cost = cost(&message);
            // The first always fits, however large it is.
            if state.bytes > 0 && state.bytes + cost > self.max_bytes {
                state.lost = true;
                continue;
            }
            state.bytes += cost;
            state.ordinary.push(message);
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
        state.bytes = 0;
        let mut messages = mem::take(&mut state.urgent);
        messages.append(&mut state.ordinary);
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

    /// Nothing will come any more.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.arrived.notify_all();
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
        outbox.close();
        assert!(outbox.take(Duration::from_secs(100)).closed && outbox.rest(Duration::from_secs(100)));
    }
}

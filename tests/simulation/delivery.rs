//! The delivery of messages and snapshots between members, as the transport does it.

use std::time::Duration;

use metastore::{
    node::{messages::Input, transport},
    storage::memory::Memory,
};
use raft::eraftpb::{Message, MessageType};

use super::{
    clients::Completion,
    raft_checks::{check_durability, is_sent_by_leader},
    world::{Event, World},
};

/// A snapshot that is being sent: a message and a copy of the sender's database.
pub struct SnapshotTransfer {
    message: Message,
    from_incarnation: u64,
    /// The incarnation of the receiver at which it arrived.
    to_incarnation: Option<u64>,
    copy: Option<Memory>,
}

impl World {
    /// Checks the messages that a member sends, and puts them on the network.
    pub fn send_messages(&mut self, from: u64, messages: Vec<Message>) {
        let Some(member) = self.member(from) else { return };
        let durable = member.durable();
        for message in messages {
            if self.fault.is_none() {
                check_durability(&message, durable);
            }
            if is_sent_by_leader(&message) {
                self.raft_checks.record_leader(from, message.term);
                self.ledger.lock().note_all(&message.entries, message.log_term);
            }
            if message.msg_type == MessageType::MsgSnapshot {
                self.send_snapshot(message);
            } else {
                self.send_message(from, message);
            }
        }
    }

    /// Sends a message over a connection of `via`, which may forward another member's proposal or read.
    fn send_message(&mut self, via: u64, mut message: Message) {
        let now = self.events.now();
        if let Some(context_reuse) = &mut self.context_reuse {
            context_reuse.outgoing(&mut message, now);
        }
        let delays = self.network.transmit(via, &message, now, &self.config, &mut self.rng);
        if delays.is_empty() {
            self.maybe_report_loss(via, message.to);
        }
        for delay in delays {
            self.events.schedule(delay, Event::Arrival { via, message: Box::new(message.clone()) });
        }
    }

    /// The sender may notice that a message was lost.
    fn maybe_report_loss(&mut self, from: u64, to: u64) {
        if self.rng.percent(30) {
            let delay = self.rng.millis(0, 500);
            self.events.schedule(delay, Event::ConnectionBroken { from, to });
        }
    }

    /// A connection breaks, or a message queued for it was dropped.
    pub fn connection_broken(&mut self, from: u64, to: u64) {
        let is_broken = self.rng.percent(50);
        let Some(member) = self.member(from) else { return };
        let input = if is_broken { Input::Unreachable(to) } else { Input::Lost(to) };
        let _ = member.inbox.send(input);
        let incarnation = member.incarnation;
        self.note(|_| format!("{from}: message to {to} lost, connection broken: {is_broken}"));
        if is_broken {
            let delay = self.rng.millis(0, 500);
            self.events.schedule(delay, Event::Reconnect { from, incarnation, to });
        }
        self.schedule_threads(from);
    }

    /// Restores a connection, or tries again later.
    pub fn try_reconnect(&mut self, from: u64, incarnation: u64, to: u64) {
        let is_connected = !self.network.is_blocked(from, to) && self.member(to).is_some();
        let Some(member) = self.member_in(from, incarnation) else { return };
        if is_connected {
            let _ = member.inbox.send(Input::Reachable(to));
            self.note(|_| format!("{from}: {to} is reachable"));
            self.schedule_threads(from);
        } else if !self.slots[&to].gone {
            self.events.schedule(Duration::from_millis(200), Event::Reconnect { from, incarnation, to });
        }
    }

    pub fn receive_message(&mut self, from: u64, mut message: Message) {
        let to = message.to;
        if let Some(context_reuse) = &mut self.context_reuse {
            context_reuse.incoming(&mut message);
        }
        let Some(member) = self.member(to) else { return self.maybe_report_loss(from, to) };
        if member.outbox.refuses(from) {
            if let Some(removed) = self.member(from) {
                removed.outbox.notice_removal();
                self.process_output(from);
            }
            return;
        }
        member.outbox.note_caller(from);
        transport::check(&message, from, to).expect("members send only messages that the transport accepts");
        let text = self.trace.is_some().then(|| summary(&message));
        self.member(to).expect("it is running").receive(message);
        self.note(|_| text.unwrap_or_default());
        self.schedule_threads(to);
    }

    /// Starts to send a snapshot, if the copy still exists.
    fn send_snapshot(&mut self, message: Message) {
        let (from, to) = (message.from, message.to);
        let index = message.get_snapshot().get_metadata().index;
        let number = self.next_id;
        self.next_id += 1;
        let member = self.member(from).expect("it is running");
        let transfer = SnapshotTransfer {
            copy: member.copy(index),
            from_incarnation: member.incarnation,
            to_incarnation: None,
            message,
        };
        let exists = transfer.copy.is_some();
        self.note(|_| {
            format!("{from}: sends {to} a snapshot of index {index}, transfer {number}, copy exists: {exists}")
        });
        self.transfers.insert(number, transfer);
        if exists {
            let delay = self.rng.millis(5, 1000);
            self.events.schedule(delay, Event::SnapshotArrived(number));
        } else {
            self.events.schedule(Duration::ZERO, Event::SnapshotReported { transfer: number, arrived: false });
        }
    }

    /// A snapshot has arrived completely, unless something prevented it.
    pub fn snapshot_arrived(&mut self, number: u64) {
        let transfer = &self.transfers[&number];
        let (from, to, from_incarnation) = (transfer.message.from, transfer.message.to, transfer.from_incarnation);
        let others = self.transfers.values().filter(|other| other.message.to == to);
        let busy = others.filter(|other| other.to_incarnation.is_some()).count() > 0;
        let lost = self.network.is_blocked(from, to)
            || self.rng.percent(10)
            || busy
            || self.member_in(from, from_incarnation).is_none()
            || self.member(to).is_none_or(|member| member.outbox.refuses(from));
        if lost {
            self.note(|_| format!("{to}: snapshot transfer {number} is lost"));
            return self.schedule_report(number, false);
        }
        let transfer = self.transfers.get_mut(&number).expect("it exists");
        let (message, copy) = (transfer.message.clone(), transfer.copy.take().expect("it is sent once"));
        let member = self.slots.get_mut(&to).and_then(|slot| slot.member.as_mut()).expect("it is running");
        transfer.to_incarnation = Some(member.incarnation);
        let incoming = Box::new(member.open_copy(copy).expect("the copy is complete"));
        let completions = self.completions.clone();
        let done =
            Box::new(move |installed| completions.lock().push(Completion::Installed { transfer: number, installed }));
        let _ = member.inbox.send(Input::Snapshot { message, incoming, done });
        self.note(|_| format!("{to}: snapshot transfer {number} has arrived"));
        self.schedule_threads(to);
    }

    /// The receiver has installed or rejected a snapshot: the sender gets the report, or notices that none arrives.
    pub fn schedule_report(&mut self, number: u64, arrived: bool) {
        let Some(transfer) = self.transfers.get_mut(&number) else { return };
        transfer.to_incarnation = None;
        let (from, to) = (transfer.message.from, transfer.message.to);
        let arrived = arrived && !self.network.is_blocked(to, from);
        let delay = self.rng.millis(0, 200);
        self.events.schedule(delay, Event::SnapshotReported { transfer: number, arrived });
    }

    pub fn snapshot_reported(&mut self, number: u64, arrived: bool) {
        let transfer = self.transfers.remove(&number).expect("a transfer is reported once");
        let (from, to) = (transfer.message.from, transfer.message.to);
        self.note(|_| format!("{from}: snapshot transfer {number} to {to} reported, arrived: {arrived}"));
        if let Some(member) = self.member_in(from, transfer.from_incarnation) {
            let _ = member.inbox.send(Input::SnapshotSent { to, arrived });
            self.schedule_threads(from);
        }
    }

    /// A member has crashed: the snapshots that it was installing are reported as failed.
    pub fn fail_transfers(&mut self, to: u64) {
        let lost = self.transfers.iter().filter(|(_, it)| it.message.to == to && it.to_incarnation.is_some());
        let lost: Vec<u64> = lost.map(|(number, _)| *number).collect();
        for number in lost {
            self.schedule_report(number, false);
        }
    }
}

/// A message in one line, for the trace.
fn summary(message: &Message) -> String {
    let Message { from, to, msg_type, term, log_term, index, commit, reject, .. } = message;
    let entries: Vec<(u64, u64)> = message.entries.iter().map(|entry| (entry.index, entry.term)).collect();
    let reject = if *reject { " rejected" } else { "" };
    format!(
        "{to}: receives {msg_type:?} from {from}, term {term}, at ({index}, {log_term}), commit {commit}{reject} {entries:?}"
    )
}

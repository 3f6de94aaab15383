//! Messages and copies of databases on their way, as the transport carries them.

use std::time::Duration;

use metastore::{
    node::{driver::Input, transport},
    storage::memory::Memory,
};
use raft::eraftpb::{Message, MessageType};

use super::{
    clients::Told,
    oaths::{check_promise, shows_leadership},
    world::{Event, World},
};

/// A copy of a database on its way.
pub struct Shipment {
    message: Message,
    from_life: u64,
    /// The life of the receiver in which it came.
    to_life: Option<u64>,
    copy: Option<Memory>,
}

impl World {
    /// Carries what a member has said.
    pub fn carry(&mut self, from: u64, messages: Vec<Message>) {
        let Some(member) = self.member(from) else { return };
        let durable = member.durable();
        for message in messages {
            if self.fault.is_none() {
                check_promise(&message, durable);
            }
            if shows_leadership(&message) {
                self.oaths.leads(from, message.term);
                self.ledger.lock().note_all(&message.entries, message.log_term);
            }
            if message.msg_type == MessageType::MsgSnapshot {
                self.ship(message);
            } else {
                self.dispatch(from, message);
            }
        }
    }

    /// `via` says it, though a proposal or a read may be somebody else's.
    fn dispatch(&mut self, via: u64, mut message: Message) {
        let now = self.agenda.now();
        if let Some(forger) = &mut self.forger {
            forger.outgoing(&mut message, now);
        }
        let delays = self.network.carry(via, &message, now, &self.climate, &mut self.dice);
        if delays.is_empty() {
            self.may_notice(via, message.to);
        }
        for delay in delays {
            self.agenda.after(delay, Event::Arrival { via, message: Box::new(message.clone()) });
        }
    }

    /// What was lost may be noticed, or not.
    fn may_notice(&mut self, from: u64, to: u64) {
        if self.dice.percent(30) {
            let delay = self.dice.millis(0, 500);
            self.agenda.after(delay, Event::Broken { from, to });
        }
    }

    /// A connection breaks, or something that waited to be sent over it was dropped.
    pub fn broken(&mut self, from: u64, to: u64) {
        let breaks = self.dice.percent(50);
        let Some(member) = self.member(from) else { return };
        let input = if breaks { Input::Unreachable(to) } else { Input::Lost(to) };
        let _ = member.inbox.send(input);
        let life = member.life;
        self.note(|_| format!("{from}: {to} is unreachable, breaks: {breaks}"));
        if breaks {
            let delay = self.dice.millis(0, 500);
            self.agenda.after(delay, Event::Mended { from, life, to });
        }
        self.arrange(from);
    }

    /// A connection stands again, as soon as it can.
    pub fn mended(&mut self, from: u64, life: u64, to: u64) {
        let comes_through = !self.network.is_cut(from, to) && self.member(to).is_some();
        let Some(member) = self.member_in(from, life) else { return };
        if comes_through {
            let _ = member.inbox.send(Input::Reachable(to));
            self.note(|_| format!("{from}: {to} is reachable"));
            self.arrange(from);
        } else if !self.seats[&to].gone {
            self.agenda.after(Duration::from_millis(200), Event::Mended { from, life, to });
        }
    }

    pub fn arrive(&mut self, from: u64, mut message: Message) {
        let to = message.to;
        if let Some(forger) = &mut self.forger {
            forger.incoming(&mut message);
        }
        let Some(member) = self.member(to) else { return self.may_notice(from, to) };
        if member.mailroom.refuses(from) {
            if let Some(removed) = self.member(from) {
                removed.mailroom.say_farewell();
                self.afterwards(from);
            }
            return;
        }
        member.mailroom.note_caller(from);
        transport::check(&message, from, to).expect("members say what the transport lets through");
        let text = self.trace.is_some().then(|| short(&message));
        self.member(to).expect("it runs").receive(message);
        self.note(|_| text.unwrap_or_default());
        self.arrange(to);
    }

    /// A copy leaves, if it is still there.
    fn ship(&mut self, message: Message) {
        let (from, to) = (message.from, message.to);
        let index = message.get_snapshot().get_metadata().index;
        let number = self.next_id;
        self.next_id += 1;
        let member = self.member(from).expect("it runs");
        let shipment = Shipment { copy: member.copy(index), from_life: member.life, to_life: None, message };
        let there = shipment.copy.is_some();
        self.note(|_| format!("{from}: sends {to} a snapshot of index {index}, shipment {number}, there: {there}"));
        self.shipments.insert(number, shipment);
        if there {
            let delay = self.dice.millis(5, 1000);
            self.agenda.after(delay, Event::Shipped(number));
        } else {
            self.agenda.after(Duration::ZERO, Event::Reported { shipment: number, arrived: false });
        }
    }

    /// All of a copy is here, unless something came in between.
    pub fn shipped(&mut self, number: u64) {
        let shipment = &self.shipments[&number];
        let (from, to, from_life) = (shipment.message.from, shipment.message.to, shipment.from_life);
        let others = self.shipments.values().filter(|other| other.message.to == to);
        let busy = others.filter(|other| other.to_life.is_some()).count() > 0;
        let lost = self.network.is_cut(from, to)
            || self.dice.percent(10)
            || busy
            || self.member_in(from, from_life).is_none()
            || self.member(to).is_none_or(|member| member.mailroom.refuses(from));
        if lost {
            self.note(|_| format!("{to}: shipment {number} is lost"));
            return self.report_later(number, false);
        }
        let shipment = self.shipments.get_mut(&number).expect("it was there");
        let (message, copy) = (shipment.message.clone(), shipment.copy.take().expect("it is sent once"));
        let member = self.seats.get_mut(&to).and_then(|seat| seat.member.as_mut()).expect("it runs");
        shipment.to_life = Some(member.life);
        let incoming = Box::new(member.open_copy(copy).expect("the copy is whole"));
        let mailbox = self.mailbox.clone();
        let done = Box::new(move |installed| mailbox.lock().push(Told::Installed { shipment: number, installed }));
        let _ = member.inbox.send(Input::Snapshot { message, incoming, done });
        self.note(|_| format!("{to}: shipment {number} is here"));
        self.arrange(to);
    }

    /// The receiver has said what became of a copy: the sender may hear it, or find out that it hears nothing.
    pub fn report_later(&mut self, number: u64, arrived: bool) {
        let Some(shipment) = self.shipments.get_mut(&number) else { return };
        shipment.to_life = None;
        let (from, to) = (shipment.message.from, shipment.message.to);
        let arrived = arrived && !self.network.is_cut(to, from);
        let delay = self.dice.millis(0, 200);
        self.agenda.after(delay, Event::Reported { shipment: number, arrived });
    }

    pub fn reported(&mut self, number: u64, arrived: bool) {
        let shipment = self.shipments.remove(&number).expect("a shipment is reported once");
        let (from, to) = (shipment.message.from, shipment.message.to);
        self.note(|_| format!("{from}: hears that shipment {number} to {to} arrived: {arrived}"));
        if let Some(member) = self.member_in(from, shipment.from_life) {
            let _ = member.inbox.send(Input::SnapshotSent { to, arrived });
            self.arrange(from);
        }
    }

    /// A member is gone, and with it what it was about to say of copies.
    pub fn lose_shipments(&mut self, to: u64) {
        let lost = self.shipments.iter().filter(|(_, it)| it.message.to == to && it.to_life.is_some());
        let lost: Vec<u64> = lost.map(|(number, _)| *number).collect();
        for number in lost {
            self.report_later(number, false);
        }
    }
}

/// A message in one line.
fn short(message: &Message) -> String {
    let Message { from, to, msg_type, term, log_term, index, commit, reject, .. } = message;
    let entries: Vec<(u64, u64)> = message.entries.iter().map(|entry| (entry.index, entry.term)).collect();
    let reject = if *reject { " rejected" } else { "" };
    format!(
        "{to}: hears {msg_type:?} of {from}, term {term}, at ({index}, {log_term}), commit {commit}{reject} {entries:?}"
    )
}

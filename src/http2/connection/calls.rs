//! Calls, their answers, and conversations: what happens between reading and writing.

use std::time::Instant;

use super::{CALLS_WAIT_BYTES, Connection};
use crate::{
    call::{Answer, Call, Code as Status, Metadata, Parcel, Refusal, Reply},
    http2::{
        request::Target,
        sender::{Ending, ROOM_BYTES},
        streams::Role,
    },
};

/// So many calls, and so many steps, and then it is another connection's turn.
const BUDGET: usize = 256;

impl Connection {
    /// Does what is waiting to be done. True if there is more, and it is only somebody else's turn.
    pub fn run(&mut self, now: Instant) -> bool {
        self.now = now;
        self.collect();
        self.begin_calls();
        self.step_streams();
        self.pump();
        self.count_crumbs(now);
        self.tell_held();
        !self.due.is_empty() || (!self.ready.is_empty() && !self.is_backlogged())
    }

    /// Takes the answers that have come from elsewhere, and sees who was woken.
    fn collect(&mut self) {
        let (mut parcels, mut woken) = (std::mem::take(&mut self.parcels), std::mem::take(&mut self.woken));
        self.outbox.take(&mut parcels, &mut woken);
        for slot in woken.drain(..) {
            self.make_due(slot);
        }
        self.woken = woken;
        self.parcels = parcels;
        self.deliver();
        if !self.sender.is_saturated() {
            for slot in std::mem::take(&mut self.stalled) {
                self.make_due(slot);
            }
        }
    }

    /// Delivers what lies in `parcels`. Work that leads to further parcels is run here.
    fn deliver(&mut self) {
        let mut parcels = std::mem::take(&mut self.parcels);
        while !parcels.is_empty() {
            let mut more = std::mem::take(&mut self.parcels);
            for (slot, parcel) in parcels.drain(..) {
                match parcel {
                    Parcel::Answer(answer) => self.respond(slot, answer),
                    Parcel::Work(work) if self.streams.get(slot).is_some() => {
                        let reply = Reply::new(self.outbox.clone(), slot);
                        self.outbox.at_home(&mut more, || work(reply));
                    }
                    Parcel::Work(_) => (), // Nobody waits for it any more.
                }
            }
            self.parcels = std::mem::replace(&mut parcels, more);
        }
        self.parcels = parcels;
    }

    /// Hands calls out, while the other side reads what it is answered.
    fn begin_calls(&mut self) {
        for _ in 0..BUDGET {
            if self.is_backlogged() {
                return;
            }
            let Some((slot, message)) = self.ready.pop_front() else { return };
            self.ready_bytes -= message.len();
            let Some(stream) = self.streams.get(slot) else { continue };
            let Target::Method(method) = &stream.request.target else { continue };
            method.received(message.len());
            let metadata = Metadata { deadline: stream.deadline, ..stream.request.metadata.clone() };
            let reply = Reply::new(self.outbox.clone(), slot);
            self.outbox.at_home(&mut self.parcels, || method.call(Call { metadata, message }, reply));
            self.deliver();
        }
    }

    fn is_backlogged(&self) -> bool {
        self.sender.held + self.sender.output.len() > CALLS_WAIT_BYTES
    }

    /// Ends a unary call.
    fn respond(&mut self, slot: u64, answer: Answer) {
        let is_full = answer.as_ref().is_ok_and(|message| self.is_full(message.len()));
        let Some(stream) = self.streams.get(slot) else { return };
        let (Target::Method(method), &Role::Called { since, bytes }) = (&stream.request.target, &stream.role) else {
            return;
        };
        let answer = if is_full { Err(unread()) } else { answer };
        method.answered(self.now.saturating_duration_since(since), bytes, &answer);
        let (id, out) = (stream.id, &mut stream.outbound);
        let status = answer.map(|message| self.sender.message(slot, id, out, message));
        self.sender.end(slot, id, out, Ending::Status(status));
        stream.role = Role::Answered;
        self.finish(slot);
    }

    /// Whether another answer is more than may be kept for those who do not read.
    fn is_full(&self, bytes: usize) -> bool {
        let limits = self.limits();
        self.sender.held > 0
            && (self.held() + bytes > limits.max_held || self.shared.held() + bytes > limits.max_held_in_all)
    }

    /// Ends a call of the table from this side.
    pub(super) fn refuse(&mut self, slot: u64, refusal: Refusal) {
        let Some(stream) = self.streams.get(slot) else { return };
        match (&stream.request.target, std::mem::replace(&mut stream.role, Role::Answered)) {
            (_, Role::Answered) => return,
            (Target::Method(method), _) => {
                method.handled(refusal.code);
                self.sender.end(slot, stream.id, &mut stream.outbound, Ending::Status(Err(refusal)));
            }
            _ => self.sender.end(slot, stream.id, &mut stream.outbound, Ending::Broken),
        }
        // Its end may come in the same read: then there is nobody to be told to stop.
        self.due.push_back(slot);
    }

    /// Steps the streams that were due when this began: those that become due meanwhile have their turn later.
    fn step_streams(&mut self) {
        for _ in 0..self.due.len().min(BUDGET) {
            let Some(slot) = self.due.pop_front() else { return };
            self.step(slot);
        }
    }

    fn step(&mut self, slot: u64) {
        let max_bytes = self.limits().max_message;
        let Some(stream) = self.streams.get(slot) else { return };
        stream.is_due = false;
        let mut role = std::mem::replace(&mut stream.role, Role::Answered);
        let outcome = match &mut role {
            Role::Talk(talk) => talk.step(slot, stream, &mut self.sender, max_bytes),
            Role::Guest(guest) => guest.step(slot, stream, &mut self.sender),
            Role::Listening | Role::Called { .. } => {
                stream.role = role;
                return;
            }
            Role::Answered => return self.finish(slot), // For the streams that were refused.
        };
        if !stream.outbound.is_ending() {
            stream.role = role;
        }
        if outcome.is_stalled {
            self.stalled.push(slot);
        }
        if outcome.consumed > 0 {
            self.give_back(slot, outcome.consumed);
        }
        self.finish(slot);
    }

    /// Sends what waited for a window, one frame of each stream in turn.
    fn pump(&mut self) {
        while let Some(slot) = self.sender.next_in_line() {
            let Some(stream) = self.streams.get(slot) else { continue };
            self.sender.take_turn(slot, stream.id, &mut stream.outbound);
            if stream.outbound.is_over() {
                self.finish(slot);
            } else if matches!(stream.role, Role::Talk(_) | Role::Guest(_)) && stream.outbound.queued() < ROOM_BYTES {
                self.make_due(slot);
            }
        }
    }
}

fn unread() -> Refusal {
    let message = "grpc: too many bytes of answers wait to be read".into();
    Refusal { code: Status::ResourceExhausted, message }
}

//! Calls, their answers, and conversations: what happens between reading and writing.

use std::time::Instant;

use bytes::Bytes;

use super::{CALLS_WAIT_BYTES, Connection};
use crate::{
    call::{Answer, Call, Metadata, Parcel, Refusal, Reply},
    http2::{
        message,
        request::Target,
        sender::{Ending, ROOM_BYTES},
        streams::{Role, Waiting},
        talk::Account,
    },
    ledger,
};

/// So many answers, calls and steps, or so many bytes of them, and then it is another connection's turn.
const BUDGET: usize = 256;
const BUDGET_BYTES: usize = 64 << 10;

/// What a part of a turn has cost so far.
#[derive(Default)]
pub struct Work {
    steps: usize,
    bytes: usize,
}

impl Work {
    fn spend(&mut self, bytes: usize) {
        self.steps += 1;
        self.bytes += bytes;
    }

    fn is_spent(&self) -> bool {
        self.steps >= BUDGET || self.bytes >= BUDGET_BYTES
    }
}

impl Connection {
    /// Does what is waiting to be done. True if there is more, and it is only somebody else's turn.
    pub fn run(&mut self, now: Instant) -> bool {
        self.now = now;
        self.collect();
        self.was_long = self.work.is_spent();
        self.begin_calls();
        self.was_long |= self.work.is_spent();
        self.step_streams();
        self.was_long |= self.work.is_spent();
        self.pump();
        self.count_crumbs(now);
        self.reads.forget_unused();
        self.tell_held();
        let may_go_on = self.may_go_on();
        self.clock.wait_for_room(!self.stalled.is_empty() && !may_go_on && !self.sender.is_saturated(), now);
        let has_calls = !self.ready.is_empty() && !self.is_backlogged();
        !self.parcels.is_empty() || !self.due.is_empty() || has_calls || (!self.stalled.is_empty() && may_go_on)
    }

    /// Whether the last turn has cost so much that another connection should have the next one.
    #[must_use]
    pub fn was_long(&self) -> bool {
        self.was_long
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
        self.work = Work::default();
        self.deliver();
        if self.stalled.is_empty() || !self.may_go_on() {
            return;
        }
        for slot in self.stalled.drain(..self.stalled.len().min(BUDGET)) {
            if let Some(stream) = self.streams.get(slot) {
                stream.is_stalled = false;
                if !std::mem::replace(&mut stream.is_due, true) {
                    self.due.push_back(slot);
                }
            }
        }
    }

    /// Delivers what lies in `parcels`, as far as this turn may go. Work that leads to further parcels is run here.
    fn deliver(&mut self) {
        while !self.parcels.is_empty() && !self.work.is_spent() {
            let mut parcels = std::mem::replace(&mut self.parcels, std::mem::take(&mut self.spare));
            let mut waiting = parcels.drain(..);
            while !self.work.is_spent()
                && let Some((slot, parcel)) = waiting.next()
            {
                self.deliver_one(slot, parcel);
            }
            if waiting.len() > 0 {
                let further = std::mem::take(&mut self.parcels);
                self.parcels = waiting.chain(further).collect();
            } else {
                drop(waiting);
                self.spare = parcels;
            }
        }
    }

    fn deliver_one(&mut self, slot: u64, parcel: Parcel) {
        match parcel {
            Parcel::Answer(answer) => {
                self.work.spend(answer.as_ref().map_or(0, Bytes::len));
                self.respond(slot, answer);
            }
            Parcel::Work(work) if self.streams.get(slot).is_some() => {
                self.work.spend(0);
                let reply = Reply::new(self.outbox.clone(), slot);
                self.outbox.at_home(&mut self.parcels, || work(reply));
            }
            Parcel::Work(_) => self.release_orphan(slot), // The stream has gone.
        }
    }

    /// Hands calls out, while the other side reads what it is answered.
    fn begin_calls(&mut self) {
        self.work = Work::default();
        while !self.work.is_spent() {
            if self.is_backlogged() {
                return self.keep_ready();
            }
            let Some(slot) = self.ready.pop_front() else { return };
            self.begin_call(slot);
            self.deliver();
        }
    }

    fn begin_call(&mut self, slot: u64) {
        let max_bytes = self.limits().max_message;
        let Some(stream) = self.streams.get(slot) else { return };
        let Role::Ready(Waiting { message, is_packed, since, .. }) = &mut stream.role else { return };
        let (mut message, is_packed, since) = (std::mem::take(message), *is_packed, *since);
        // What it does would be done, and nobody would hear of it.
        if self.sender.held > 0 && !self.shared.admits(self.held_told, self.held(), 0) {
            return self.refuse(slot, ledger::unread());
        }
        if is_packed {
            match message::unpack(&message, max_bytes) {
                Ok(unpacked) => message = unpacked,
                Err(refusal) => return self.refuse(slot, refusal),
            }
        }
        let Some(stream) = self.streams.get(slot) else { return };
        let Target::Method(method) = &stream.request.target else { return };
        stream.role = Role::Called { since, bytes: message.len() };
        // It stays counted until the call is answered: whatever waits for something keeps it, or a copy.
        self.held_in = self.held_in - std::mem::replace(&mut stream.inbound.held, message.len()) + message.len();
        self.work.spend(message.len());
        method.received(message.len());
        let metadata = Metadata { deadline: stream.deadline, ..stream.request.metadata.clone() };
        let reply = Reply::new(self.outbox.clone(), slot);
        self.outbox.at_home(&mut self.parcels, || method.call(Call { metadata, message }, reply));
    }

    /// Calls that have to wait keep their own messages, not the whole reads that these came in. Those whose streams have
    /// ended meanwhile go.
    fn keep_ready(&mut self) {
        if self.ready.len() > 2 * self.streams.len() + BUDGET {
            self.ready.retain(|&slot| self.streams.get(slot).is_some());
        }
        for &slot in self.ready.iter().rev() {
            match self.streams.get(slot).map(|stream| &mut stream.role) {
                Some(Role::Ready(waiting)) if waiting.is_copy => return,
                Some(Role::Ready(waiting)) => {
                    waiting.is_copy = true;
                    waiting.message = Bytes::copy_from_slice(&waiting.message);
                }
                _ => (), // It was taken back.
            }
        }
    }

    fn is_backlogged(&self) -> bool {
        self.sender.held_of_calls + self.sender.output.len() > CALLS_WAIT_BYTES
    }

    /// Whether conversations and guests may add to what waits. They leave half of what may be held to calls; and who has
    /// nothing waiting may always send.
    fn may_go_on(&mut self) -> bool {
        let limits = &self.shared.limits;
        let (held, half) = (self.held(), limits.max_held / 2);
        let has_room = held <= half && self.shared.admits(self.held_told, held, 0);
        self.sender.allowed = if has_room { self.sender.held + (half - held) } else { 0 }.max(1);
        !self.sender.is_saturated() && !self.sender.is_full()
    }

    /// Ends a unary call.
    fn respond(&mut self, slot: u64, answer: Answer) {
        let is_full = answer.as_ref().is_ok_and(|message| !self.admits_answer(message.len()));
        let Some(stream) = self.streams.get(slot) else { return self.release_orphan(slot) };
        if let Role::Packing = stream.role {
            return self.respond_packed(slot, if is_full { Err(ledger::unread()) } else { answer });
        }
        let (Target::Method(method), &Role::Called { since, bytes }) = (&stream.request.target, &stream.role) else {
            return;
        };
        let answer = if is_full { Err(ledger::unread()) } else { answer };
        method.answered(self.now.saturating_duration_since(since), bytes, &answer);
        let answer = match answer {
            Ok(message) if stream.outbound.takes_long_to_pack(&message) => return self.pack_elsewhere(slot, message),
            answer => answer,
        };
        self.held_in -= std::mem::take(&mut stream.inbound.held);
        let (id, out) = (stream.id, &mut stream.outbound);
        let status = answer.map(|message| self.sender.message(slot, id, out, message));
        self.sender.end(slot, id, out, Ending::Status(status));
        stream.role = Role::Answered;
        self.finish(slot);
    }

    /// Packs a large answer where that holds up no connection. It comes back through another reply.
    fn pack_elsewhere(&mut self, slot: u64, message: Bytes) {
        let Some(stream) = self.streams.get(slot) else { return };
        stream.role = Role::Packing;
        self.held_in = self.held_in - std::mem::replace(&mut stream.inbound.held, message.len()) + message.len();
        let reply = Reply::new(self.outbox.clone(), slot);
        self.service.run_elsewhere(Box::new(move || {
            if reply.is_wanted() {
                reply.answer(Ok(message::pack(&message)));
            }
        }));
    }

    /// Ends a call whose answer was packed, and counted before.
    fn respond_packed(&mut self, slot: u64, answer: Answer) {
        let Some(stream) = self.streams.get(slot) else { return };
        self.held_in -= std::mem::take(&mut stream.inbound.held);
        let (id, out) = (stream.id, &mut stream.outbound);
        let status = answer.map(|message| self.sender.message_as_it_is(slot, id, out, message, true));
        self.sender.end(slot, id, out, Ending::Status(status));
        stream.role = Role::Answered;
        self.finish(slot);
    }

    /// Whether an answer of so many bytes may wait here. A connection that has none waiting may have a larger one.
    fn admits_answer(&self, bytes: usize) -> bool {
        let (told, held) = (self.held_told, self.held());
        if self.sender.held > 0 {
            self.shared.admits(told, held, bytes)
        } else {
            self.shared.admits_first(told, held, bytes)
        }
    }

    /// The handler of a call whose stream has gone is done with it.
    fn release_orphan(&mut self, slot: u64) {
        if let Some(held) = self.orphans.remove(&slot) {
            self.held_in -= held;
        }
    }

    /// Ends a call of the table from this side.
    pub(super) fn refuse(&mut self, slot: u64, refusal: Refusal) {
        let Some(stream) = self.streams.get(slot) else { return };
        // What is kept of a call that waits goes with it.
        if let Role::Ready(_) = stream.role {
            self.held_in -= std::mem::take(&mut stream.inbound.held);
        }
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
        self.work = Work::default();
        for _ in 0..self.due.len() {
            if self.work.is_spent() {
                return;
            }
            let Some(slot) = self.due.pop_front() else { return };
            let before = self.sender.backlog();
            self.step(slot);
            self.work.spend(self.sender.backlog().saturating_sub(before));
        }
    }

    fn step(&mut self, slot: u64) {
        let max_bytes = self.limits().max_message;
        self.may_go_on();
        let held_beside_answers = self.held_beside_answers();
        let Some(stream) = self.streams.get(slot) else { return };
        stream.is_due = false;
        let mut role = std::mem::replace(&mut stream.role, Role::Answered);
        let kept = stream.kept;
        let outcome = match &mut role {
            Role::Talk(talk) => {
                let account = Account { shared: &self.shared, told: self.held_told, beside: held_beside_answers };
                talk.step(slot, stream, &mut self.sender, &account, max_bytes)
            }
            Role::Guest(guest) => guest.step(slot, stream, &mut self.sender),
            Role::Listening | Role::Ready(_) | Role::Called { .. } | Role::Packing => {
                stream.role = role;
                return;
            }
            Role::Answered => return self.finish(slot), // For the streams that were refused.
        };
        self.work.bytes += outcome.received;
        self.held_in = self.held_in - kept + stream.kept;
        if !stream.outbound.is_ending() {
            stream.role = role;
            if outcome.is_stalled && !std::mem::replace(&mut stream.is_stalled, true) {
                self.stalled.push_back(slot);
            }
            if outcome.goes_on && !outcome.is_stalled {
                self.make_due(slot);
            }
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

//! How streams open: header blocks, in one frame or several, and who is asked.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;

use super::{Block, Connection, Phase};
use crate::{
    call::{Code as Status, Metadata},
    http2::{
        fault::{Code, Fault},
        guest::{Feed, Guest},
        limits::{self, MAX_BLOCK_FRAMES, MOST_STREAMS, Nuisance, STREAM_BYTES},
        outbox::Bell,
        past::End,
        request::{self, Refused, Request, Target},
        sender::{Ending, Outbound},
        service::{Method, Shape},
        streams::{Inbound, Role, Stream},
        talk::Talk,
    },
    ledger,
};

/// How long a client may take to end a stream that we have ended.
const LINGER: Duration = Duration::from_secs(1);

/// A call that gives less time than this is late when it comes.
const AT_ONCE: Duration = Duration::from_micros(1);

impl Connection {
    /// The first frame of a header block, and mostly all of it.
    pub(super) fn headers(
        &mut self,
        stream: u32,
        block: &[u8],
        end: bool,
        complete: bool,
        own_parent: bool,
        now: Instant,
    ) -> Result<(), Fault> {
        if complete {
            return self.block(stream, block, end, own_parent, now);
        }
        self.clock.begin_block(now);
        self.block = Some(Block { stream, end, own_parent, bytes: BytesMut::from(block), frames: 1 });
        Ok(())
    }

    /// A further frame of a header block.
    pub(super) fn continuation(&mut self, more: &[u8], complete: bool, now: Instant) -> Result<(), Fault> {
        let max_bytes = self.limits().max_header_list;
        let Some(block) = &mut self.block else {
            return Err(Fault::connection(Code::Protocol, "a continuation of nothing"));
        };
        block.frames += 1;
        block.bytes.extend_from_slice(more);
        if block.bytes.len() > max_bytes || block.frames > MAX_BLOCK_FRAMES {
            limits::note("continuation");
            return Err(Fault::connection(Code::EnhanceYourCalm, "a header block that does not end"));
        }
        if complete && let Some(block) = self.block.take() {
            self.clock.end_block();
            return self.block(block.stream, &block.bytes, block.end, block.own_parent, now);
        }
        Ok(())
    }

    /// A whole block: a new stream, or what comes behind the body of an open one.
    fn block(&mut self, id: u32, block: &[u8], end: bool, own_parent: bool, now: Instant) -> Result<(), Fault> {
        if id.is_multiple_of(2) {
            return Err(Fault::connection(Code::Protocol, "a client's stream has an odd number"));
        }
        if id <= self.highest {
            return self.late_block(id, block, end);
        }
        self.highest = id;
        if !self.takes(id) {
            return self.decode(block); // The table of fields has to stay right.
        }
        let request = self.understand(id, block)?;
        if own_parent {
            return Err(Fault::stream(id, Code::Protocol, "a stream that depends on itself"));
        }
        if self.streams.len() >= self.limits().max_streams.min(MOST_STREAMS) as usize {
            limits::note("streams");
            return Err(Fault::stream(id, Code::RefusedStream, "too many streams"));
        }
        if !self.admits(STREAM_BYTES + request.weight) {
            self.refuse_unopened(id, end);
            return Ok(());
        }
        let slot = self.open(id, request, now);
        if end { self.ended(slot, id) } else { Ok(()) }
    }

    /// What the block asks for. It is read even if nobody will answer: the table of fields has to stay right.
    fn understand(&mut self, id: u32, block: &[u8]) -> Result<Arc<Request>, Fault> {
        if let Some(request) = self.memory.recall(block, self.decoder.table_changes()) {
            return Ok(request.clone());
        }
        self.decode(block)?;
        let request = request::read(&self.fields, &*self.service)
            .map_err(|request::Malformed(why)| Fault::stream(id, Code::Protocol, why))?;
        let request = Arc::new(request);
        if self.fields.only_indexed() {
            self.memory.keep(block, &request, self.decoder.table_changes());
        }
        Ok(request)
    }

    fn decode(&mut self, block: &[u8]) -> Result<(), Fault> {
        let max_list = self.shared.limits.max_header_list;
        let read = self.decoder.decode(block, max_list, &mut self.fields);
        read.map_err(|malformed| Fault::connection(Code::Compression, malformed.0))
    }

    /// A block for a stream that was opened before.
    fn late_block(&mut self, id: u32, block: &[u8], end: bool) -> Result<(), Fault> {
        self.decode(block)?;
        let Some(slot) = self.streams.find(id) else {
            return match self.past.find(id) {
                Some(End::Ours) => self.count(Nuisance::Stray, self.now),
                _ if !self.takes(id) => self.count(Nuisance::Stray, self.now),
                Some(End::Theirs) => Err(Fault::connection(Code::StreamClosed, "headers on a stream that is closed")),
                None => Err(Fault::connection(Code::Protocol, "a stream with a number below earlier ones")),
            };
        };
        let stream = self.streams.get(slot).expect("it was found a moment ago");
        if stream.inbound.ended {
            return Err(Fault::stream(id, Code::StreamClosed, "headers behind the end of their stream"));
        }
        if !end {
            return Err(Fault::stream(id, Code::Protocol, "trailers that do not end their stream"));
        }
        request::check_trailers(&self.fields)
            .map_err(|request::Malformed(why)| Fault::stream(id, Code::Protocol, why))?;
        if let Role::Guest(_) = stream.role {
            self.hand_on_trailers(slot, id)?;
        }
        self.ended(slot, id)
    }

    /// Whoever answers an ordinary request gets what came behind its body.
    fn hand_on_trailers(&mut self, slot: u64, id: u32) -> Result<(), Fault> {
        let read = request::trailers(&self.fields);
        let (trailers, weight) = read.map_err(|request::Malformed(why)| Fault::stream(id, Code::Protocol, why))?;
        if !self.admits(weight) {
            limits::note("held_bytes");
            return Err(Fault::stream(id, Code::EnhanceYourCalm, "trailers that there is no room for"));
        }
        if let Some(stream) = self.streams.get(slot)
            && let Role::Guest(guest) = &stream.role
        {
            guest.feed().set_trailers(trailers);
            stream.weight += weight;
            self.held_in += weight;
        }
        Ok(())
    }

    /// Opens a stream and asks whoever answers it.
    fn open(&mut self, id: u32, request: Arc<Request>, now: Instant) -> u64 {
        let deadline = request.timeout.and_then(|timeout| now.checked_add(timeout));
        if let Some(deadline) = deadline {
            self.clock.expect(deadline);
        }
        let is_packed = request.packs_answers;
        let is_call = matches!(&request.target, Target::Method(method) if method.shape() == Shape::Unary);
        let weight = STREAM_BYTES + request.weight;
        let mut outbound = Outbound::new(self.first_window, is_packed, is_call);
        outbound.content_type.clone_from(&request.content_type);
        let slot = self.streams.insert(Stream {
            id,
            request: request.clone(),
            deadline,
            inbound: Inbound::default(),
            outbound,
            role: Role::Listening,
            is_due: false,
            is_stalled: false,
            weight,
            kept: 0,
        });
        self.held_in += weight;
        match &request.target {
            _ if request.timeout.is_some_and(|timeout| timeout < AT_ONCE) => self.turn_away(slot, &Refused::late()),
            Target::Method(method) => {
                method.started();
                if method.shape() == Shape::Stream {
                    self.converse(slot, method, Metadata { deadline, ..request.metadata.clone() });
                }
            }
            Target::Guest(parts) => self.invite(slot, (**parts).clone()),
            Target::Refused(refused) => self.turn_away(slot, refused),
        }
        slot
    }

    /// Answers a request for which there is no room, and keeps nothing of it.
    fn refuse_unopened(&mut self, id: u32, end: bool) {
        let mut out = Outbound::new(0, false, false);
        self.sender.refuse(id, &mut out, 200, &ledger::too_much(), false);
        if !end {
            self.sender.reset(id, Code::NoError);
        }
        self.past.remember(id, if end { End::Theirs } else { End::Ours }, self.now);
    }

    /// Answers a request by its head alone.
    fn turn_away(&mut self, slot: u64, refused: &Refused) {
        let stream = self.streams.get(slot).expect("it was just added");
        limits::note(refused.reason);
        stream.role = Role::Answered;
        let is_for_packing = refused.reason == "encoding";
        self.sender.refuse(stream.id, &mut stream.outbound, refused.status, &refused.refusal, is_for_packing);
        self.due.push_back(slot); // Its end is known when this read is over.
    }

    fn converse(&mut self, slot: u64, method: &Arc<dyn Method>, metadata: Metadata) {
        let opened = method.open(metadata);
        let stream = self.streams.get(slot).expect("it was just added");
        match opened {
            Ok(conversation) => {
                let bell = Bell::new(self.outbox.clone(), slot);
                stream.role = Role::Talk(Box::new(Talk::new(conversation, method.clone(), bell)));
                self.make_due(slot);
            }
            Err(refusal) => {
                method.handled(refusal.code);
                stream.role = Role::Answered;
                self.sender.end(slot, stream.id, &mut stream.outbound, Ending::Status(Err(refusal)));
                self.due.push_back(slot);
            }
        }
    }

    fn invite(&mut self, slot: u64, parts: http::request::Parts) {
        let (feed, body) = Feed::new();
        let response = self.service.guest(http::Request::from_parts(parts, body));
        let bell = Bell::new(self.outbox.clone(), slot);
        let stream = self.streams.get(slot).expect("it was just added");
        stream.role = Role::Guest(Box::new(Guest::new(response, feed, bell)));
        self.make_due(slot);
    }

    /// Forgets a stream: nobody waits for its answer any more.
    pub(super) fn abandon(&mut self, slot: u64, end: End) {
        let Some(mut stream) = self.streams.remove(slot) else { return };
        if let (Target::Method(method), Role::Listening | Role::Ready(_) | Role::Called { .. } | Role::Talk(_)) =
            (&stream.request.target, &stream.role)
        {
            method.handled(Status::Canceled);
        }
        self.sender.abandon(&mut stream.outbound);
        let held = stream.inbound.held + stream.weight + stream.kept;
        if let Role::Called { .. } | Role::Packing = stream.role {
            self.orphans.insert(slot, held); // What keeps it has the reply, and will use it.
        } else {
            self.held_in -= held;
        }
        self.past.remember(stream.id, end, self.now);
    }

    /// Forgets a stream whose end is out. If the other side has not ended it, it gets a moment to do so, because mostly its
    /// end is on its way; whoever goes on is told to stop.
    pub(super) fn finish(&mut self, slot: u64) {
        let Some(stream) = self.streams.get(slot) else { return };
        if !stream.outbound.is_over() {
            return;
        }
        if !stream.inbound.ended && !stream.outbound.is_reset() {
            let until = self.now + LINGER;
            stream.deadline = Some(until);
            return self.clock.expect(until);
        }
        let end = if stream.outbound.is_reset() { End::Ours } else { End::Theirs };
        self.forget(slot, end);
    }

    /// Tells the other side that nobody listens on a stream any more.
    pub(super) fn stop_listening(&mut self, slot: u64) {
        let Some(stream) = self.streams.get(slot) else { return };
        self.sender.reset(stream.id, Code::NoError);
        self.forget(slot, End::Ours);
    }

    /// Forgets a stream, and leaves if it was the last one that kept us.
    pub(super) fn forget(&mut self, slot: u64, end: End) {
        self.abandon(slot, end);
        self.leave_if_done();
    }

    /// Leaves if that is wanted, from either side, and no stream keeps us.
    pub(super) fn leave_if_done(&mut self) {
        if !self.streams.is_empty() {
            return;
        }
        self.clock.begin_idling(self.now);
        match self.phase {
            Phase::Leaving(last) if last != u32::MAX => self.end(),
            Phase::Settings | Phase::Open if self.clock.is_peer_leaving() => {
                self.go_away(self.highest, Code::NoError, "");
                self.end();
            }
            Phase::Preface(_) | Phase::Settings | Phase::Open | Phase::Leaving(_) | Phase::Over => (),
        }
    }

    /// Has a stream stepped soon.
    pub(super) fn make_due(&mut self, slot: u64) {
        if let Some(stream) = self.streams.get(slot)
            && !std::mem::replace(&mut stream.is_due, true)
        {
            self.due.push_back(slot);
        }
    }

    /// Unused limits are counted for what they are worth.
    pub(super) fn count_crumbs(&mut self, now: Instant) {
        let crumbs = std::mem::take(&mut self.sender.crumbs);
        if crumbs > 0
            && let Err(fault) = self.counter.add(Nuisance::Crumb, crumbs, &self.shared.limits, now)
        {
            self.fail(fault);
        }
    }
}

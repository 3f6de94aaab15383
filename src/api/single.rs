//! Server-streaming calls: the conversation gets the request once the client has half-closed.
//!
//! As in grpc-go, a call that sends no message, or more than one, fails before its handler sees anything.

use std::task::Waker;

use bytes::Bytes;

use crate::{
    call::{CallError, Code, Conversation, Step, StreamIo},
    ledger,
};

/// A conversation that receives exactly one message.
pub struct SingleRequest {
    conversation: Box<dyn Conversation>,
    /// The request, until the conversation has received it.
    message: Option<Bytes>,
    is_started: bool,
}

impl SingleRequest {
    /// Wraps a new conversation.
    #[must_use]
    pub fn new(conversation: Box<dyn Conversation>) -> Self {
        Self { conversation, message: None, is_started: false }
    }

    /// Waits for the only message and for the half-close. Returns None when both have arrived.
    fn receive_request(&mut self, line: &mut dyn StreamIo) -> Option<Step> {
        while let Some(message) = line.receive() {
            if message.len() > line.spare_bytes() {
                return Some(Step::End(Err(ledger::request_over_limit())));
            }
            if self.message.replace(message).is_some() {
                return Some(refuse("received multiple request messages for non-client-streaming RPC"));
            }
        }
        match &self.message {
            _ if !line.is_half_closed() => Some(Step::Wait),
            None => Some(refuse("received no request message from non-client-streaming RPC")),
            Some(_) => None,
        }
    }
}

fn refuse(what: &str) -> Step {
    Step::End(Err(CallError { code: Code::Internal, message: format!("cardinality violation: {what}").into() }))
}

impl Conversation for SingleRequest {
    fn step(&mut self, line: &mut dyn StreamIo) -> Step {
        if !self.is_started {
            if let Some(step) = self.receive_request(line) {
                return step;
            }
            self.is_started = true;
        }
        self.conversation.step(&mut SingleRequestLine { line, message: &mut self.message })
    }

    fn held_bytes(&self) -> usize {
        self.message.as_ref().map_or(0, Bytes::len) + self.conversation.held_bytes()
    }
}

/// The line of a call whose only message has been received.
struct SingleRequestLine<'a> {
    line: &'a mut dyn StreamIo,
    message: &'a mut Option<Bytes>,
}

impl StreamIo for SingleRequestLine<'_> {
    fn receive(&mut self) -> Option<Bytes> {
        self.message.take()
    }

    fn is_half_closed(&self) -> bool {
        self.message.is_none()
    }

    fn can_send(&self) -> bool {
        self.line.can_send()
    }

    fn send(&mut self, message: Bytes) {
        self.line.send(message);
    }

    fn spare_bytes(&self) -> usize {
        self.line.spare_bytes()
    }

    fn waker(&self) -> &Waker {
        self.line.waker()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A line with the messages that the client has sent so far.
    #[derive(Default)]
    struct TestLine {
        messages: VecDeque<Bytes>,
        ended: bool,
        answers: Vec<Bytes>,
    }

    impl StreamIo for TestLine {
        fn receive(&mut self) -> Option<Bytes> {
            self.messages.pop_front()
        }

        fn is_half_closed(&self) -> bool {
            self.ended && self.messages.is_empty()
        }

        fn can_send(&self) -> bool {
            true
        }

        fn send(&mut self, message: Bytes) {
            self.answers.push(message);
        }

        fn waker(&self) -> &Waker {
            Waker::noop()
        }
    }

    /// Sends each message back, and then ends.
    struct Echo;

    impl Conversation for Echo {
        fn step(&mut self, line: &mut dyn StreamIo) -> Step {
            while let Some(message) = line.receive() {
                line.send(message);
            }
            if line.is_half_closed() { Step::End(Ok(())) } else { Step::Wait }
        }
    }

    #[test]
    fn the_request_is_passed_on_after_the_half_close() {
        let (mut single, mut line) = (SingleRequest::new(Box::new(Echo)), TestLine::default());
        assert_eq!(single.step(&mut line), Step::Wait);
        line.messages.push_back("a".into());
        assert_eq!((single.step(&mut line), line.answers.len()), (Step::Wait, 0));
        line.ended = true;
        assert_eq!(single.step(&mut line), Step::End(Ok(())));
        assert_eq!(line.answers, ["a"]);
    }

    #[test]
    fn no_message_and_two_messages_are_errors() {
        for (messages, word) in [(&[][..], "no request message"), (&["a", "b"], "multiple request messages")] {
            let messages = messages.iter().map(|message| Bytes::from_static(message.as_bytes())).collect();
            let mut line = TestLine { messages, ended: true, answers: Vec::new() };
            let Step::End(Err(refusal)) = SingleRequest::new(Box::new(Echo)).step(&mut line) else {
                panic!("the call started")
            };
            assert_eq!(refusal.code, Code::Internal);
            assert!(refusal.message.contains(word), "{refusal:?}");
            assert!(line.answers.is_empty());
        }
    }
}

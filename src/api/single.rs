//! Calls that take one message and stream their answers: the message is handed on when the client has said that it is all.
//!
//! So it is in grpc-go, which lets no such call begin that brings no message, or two.

use std::task::Waker;

use bytes::Bytes;

use crate::{
    call::{Code, Conversation, Line, Refusal, Step},
    ledger,
};

/// A conversation that hears exactly one message.
pub struct Single {
    conversation: Box<dyn Conversation>,
    /// The message, until it is handed on.
    message: Option<Bytes>,
    has_begun: bool,
}

impl Single {
    /// Around a conversation that has just begun.
    #[must_use]
    pub fn new(conversation: Box<dyn Conversation>) -> Self {
        Self { conversation, message: None, has_begun: false }
    }

    /// Waits for the only message and for the client's end. None: they have come.
    fn listen(&mut self, line: &mut dyn Line) -> Option<Step> {
        while let Some(message) = line.receive() {
            if message.len() > line.spare() {
                return Some(Step::End(Err(ledger::too_much())));
            }
            if self.message.replace(message).is_some() {
                return Some(refuse("received multiple request messages for non-client-streaming RPC"));
            }
        }
        match &self.message {
            _ if !line.ended() => Some(Step::Wait),
            None => Some(refuse("received no request message from non-client-streaming RPC")),
            Some(_) => None,
        }
    }
}

fn refuse(what: &str) -> Step {
    Step::End(Err(Refusal { code: Code::Internal, message: format!("cardinality violation: {what}").into() }))
}

impl Conversation for Single {
    fn step(&mut self, line: &mut dyn Line) -> Step {
        if !self.has_begun {
            if let Some(step) = self.listen(line) {
                return step;
            }
            self.has_begun = true;
        }
        self.conversation.step(&mut Begun { line, message: &mut self.message })
    }

    fn held(&self) -> usize {
        self.message.as_ref().map_or(0, Bytes::len) + self.conversation.held()
    }
}

/// The line of a call whose only message has come.
struct Begun<'a> {
    line: &'a mut dyn Line,
    message: &'a mut Option<Bytes>,
}

impl Line for Begun<'_> {
    fn receive(&mut self) -> Option<Bytes> {
        self.message.take()
    }

    fn ended(&self) -> bool {
        self.message.is_none()
    }

    fn has_room(&self) -> bool {
        self.line.has_room()
    }

    fn send(&mut self, message: Bytes) {
        self.line.send(message);
    }

    fn spare(&self) -> usize {
        self.line.spare()
    }

    fn waker(&self) -> &Waker {
        self.line.waker()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A line with what the client has sent so far.
    #[derive(Default)]
    struct Sent {
        messages: VecDeque<Bytes>,
        ended: bool,
        answers: Vec<Bytes>,
    }

    impl Line for Sent {
        fn receive(&mut self) -> Option<Bytes> {
            self.messages.pop_front()
        }

        fn ended(&self) -> bool {
            self.ended && self.messages.is_empty()
        }

        fn has_room(&self) -> bool {
            true
        }

        fn send(&mut self, message: Bytes) {
            self.answers.push(message);
        }

        fn waker(&self) -> &Waker {
            Waker::noop()
        }
    }

    /// Answers what it hears with the same, and then ends.
    struct Echo;

    impl Conversation for Echo {
        fn step(&mut self, line: &mut dyn Line) -> Step {
            while let Some(message) = line.receive() {
                line.send(message);
            }
            if line.ended() { Step::End(Ok(())) } else { Step::Wait }
        }
    }

    #[test]
    fn the_message_is_handed_on_once_it_is_known_to_be_the_only_one() {
        let (mut single, mut line) = (Single::new(Box::new(Echo)), Sent::default());
        assert_eq!(single.step(&mut line), Step::Wait);
        line.messages.push_back("a".into());
        assert_eq!((single.step(&mut line), line.answers.len()), (Step::Wait, 0));
        line.ended = true;
        assert_eq!(single.step(&mut line), Step::End(Ok(())));
        assert_eq!(line.answers, ["a"]);
    }

    #[test]
    fn no_message_and_two_are_refused() {
        for (messages, word) in [(&[][..], "no request message"), (&["a", "b"], "multiple request messages")] {
            let messages = messages.iter().map(|message| Bytes::from_static(message.as_bytes())).collect();
            let mut line = Sent { messages, ended: true, answers: Vec::new() };
            let Step::End(Err(refusal)) = Single::new(Box::new(Echo)).step(&mut line) else { panic!("it begins") };
            assert_eq!(refusal.code, Code::Internal);
            assert!(refusal.message.contains(word), "{refusal:?}");
            assert!(line.answers.is_empty());
        }
    }
}

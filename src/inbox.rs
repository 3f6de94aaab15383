//! A queue of messages to one thread from any number of others, plus a notification without a message.
//!
//! The queue is a list behind a lock; the receiver takes the whole list at once. Waking the receiver costs the sender a system
//! call, so it is woken only if it is waiting, and only for what it waits for: messages always wake it, a notification only if
//! it asked for notifications. For example, as long as there are no watchers, writes do not wake the watch hub.

use std::time::Instant;

use parking_lot::{Condvar, Mutex};

/// A queue with many senders and one receiver. It has no bound of its own: for every kind of message the number in flight is
/// limited by something that its sender waits for.
#[derive(Debug)]
pub struct Inbox<T> {
    state: Mutex<State<T>>,
    wakeup: Condvar,
}

#[derive(Debug)]
struct State<T> {
    messages: Vec<T>,
    waiting: Waiting,
    closed: bool,
}

/// Whether the receiver waits, and what wakes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    No,
    ForMessages,
    ForMessagesOrNotification,
}

impl<T> Default for Inbox<T> {
    fn default() -> Self {
        let state = State { messages: Vec::new(), waiting: Waiting::No, closed: false };
        Self { state: Mutex::new(state), wakeup: Condvar::new() }
    }
}

impl<T> Inbox<T> {
    /// Sends a message; returns it if the inbox is closed.
    pub fn send(&self, message: T) -> Result<(), T> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(message);
        }
        state.messages.push(message);
        if std::mem::replace(&mut state.waiting, Waiting::No) != Waiting::No {
            drop(state);
            self.wakeup.notify_one();
        }
        Ok(())
    }

    /// Notifies the receiver without a message.
    pub fn notify(&self) {
        let mut state = self.state.lock();
        if state.waiting == Waiting::ForMessagesOrNotification {
            state.waiting = Waiting::No;
            drop(state);
            self.wakeup.notify_one();
        }
    }

    /// Waits until there are messages or until `until`, then appends all messages to `into`. False once the inbox is closed and
    /// empty.
    pub fn receive(&self, into: &mut Vec<T>, until: Option<Instant>) -> bool {
        self.wait(into, Waiting::ForMessages, || false, until)
    }

    /// The same, but a notification ends the wait too. `has_notification` must return whether there was a notification that the
    /// receiver has not handled yet. It is called under the lock that [`Inbox::notify`] takes, so no notification is lost.
    pub fn receive_or_notified(
        &self,
        into: &mut Vec<T>,
        has_notification: impl FnOnce() -> bool,
        until: Option<Instant>,
    ) -> bool {
        self.wait(into, Waiting::ForMessagesOrNotification, has_notification, until)
    }

    fn wait(
        &self,
        into: &mut Vec<T>,
        waiting: Waiting,
        has_notification: impl FnOnce() -> bool,
        until: Option<Instant>,
    ) -> bool {
        let mut state = self.state.lock();
        if state.messages.is_empty() && !state.closed && !has_notification() {
            state.waiting = waiting;
        }
        while state.waiting != Waiting::No && !state.closed {
            match until {
                Some(until) if self.wakeup.wait_until(&mut state, until).timed_out() => break,
                Some(_) => (),
                None => self.wakeup.wait(&mut state),
            }
        }
        state.waiting = Waiting::No;
        let open = !state.closed || !state.messages.is_empty();
        if into.is_empty() {
            std::mem::swap(into, &mut state.messages);
        } else {
            into.append(&mut state.messages);
        }
        open
    }

    /// Appends all messages to `into` without waiting for any.
    pub fn drain(&self, into: &mut Vec<T>) {
        into.append(&mut self.state.lock().messages);
    }

    /// How many messages wait to be received.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.state.lock().messages.len()
    }

    #[must_use]
    pub fn has_messages(&self) -> bool {
        !self.state.lock().messages.is_empty()
    }

    /// Whether it accepts no more messages.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// Accepts no more messages; those in the queue can still be received.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.wakeup.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;

    #[test]
    fn messages_arrive_in_order_and_a_closed_inbox_is_emptied_first() {
        let inbox = Arc::new(Inbox::default());
        let sender = inbox.clone();
        let thread = thread::spawn(move || {
            for message in 0..1000 {
                sender.send(message).unwrap();
            }
            sender.close();
        });
        let (mut all, mut some) = (Vec::new(), Vec::new());
        while inbox.receive(&mut some, None) {
            all.append(&mut some);
        }
        thread.join().unwrap();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
        assert_eq!(inbox.send(1), Err(1));
    }

    #[test]
    fn waiting_ends_at_its_deadline() {
        let inbox = Inbox::<u8>::default();
        let mut messages = Vec::new();
        assert!(inbox.receive(&mut messages, Some(Instant::now())));
        assert!(inbox.receive_or_notified(&mut messages, || false, Some(Instant::now())));
        assert!(messages.is_empty());
    }

    #[test]
    fn a_notification_wakes_only_a_receiver_that_waits_for_it() {
        let inbox = Arc::new(Inbox::<u8>::default());
        let receiver = inbox.clone();
        let thread = thread::spawn(move || receiver.receive_or_notified(&mut Vec::new(), || false, None));
        while inbox.state.lock().waiting != Waiting::ForMessagesOrNotification {
            thread::yield_now();
        }
        inbox.notify();
        assert!(thread.join().unwrap(), "the receiver is woken, and the inbox is open");

        let receiver = inbox.clone();
        let thread = thread::spawn(move || {
            let mut messages = Vec::new();
            receiver.receive(&mut messages, None);
            messages
        });
        while inbox.state.lock().waiting != Waiting::ForMessages {
            thread::yield_now();
        }
        inbox.notify();
        assert_eq!(inbox.state.lock().waiting, Waiting::ForMessages, "the receiver still waits");
        inbox.send(7).unwrap();
        assert_eq!(thread.join().unwrap(), [7]);
    }

    #[test]
    fn an_unhandled_notification_prevents_waiting() {
        let inbox = Inbox::<u8>::default();
        assert!(inbox.receive_or_notified(&mut Vec::new(), || true, None));
    }
}

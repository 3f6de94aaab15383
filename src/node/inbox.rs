//! What one thread hears from all others: a list behind a lock, taken whole.

use std::time::Instant;

use parking_lot::{Condvar, Mutex};

/// A mailbox with many senders and one receiver. The bound is the senders' business: every kind of letter is bounded by
/// something that its sender waits for.
#[derive(Debug)]
pub struct Inbox<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
}

#[derive(Debug)]
struct State<T> {
    letters: Vec<T>,
    asleep: bool,
    closed: bool,
}

impl<T> Default for Inbox<T> {
    fn default() -> Self {
        let state = State { letters: Vec::new(), asleep: false, closed: false };
        Self { state: Mutex::new(state), arrived: Condvar::new() }
    }
}

impl<T> Inbox<T> {
    /// Leaves a letter; gives it back if nobody will ever read it.
    pub fn send(&self, letter: T) -> Result<(), T> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(letter);
        }
        state.letters.push(letter);
        if std::mem::take(&mut state.asleep) {
            drop(state);
            self.arrived.notify_one(); // Only a sleeping receiver costs a system call.
        }
        Ok(())
    }

    /// Waits until there are letters or the time has come, then appends all letters to `into`. False once closed and empty.
    pub fn receive(&self, into: &mut Vec<T>, until: Option<Instant>) -> bool {
        let mut state = self.state.lock();
        while state.letters.is_empty() && !state.closed {
            state.asleep = true;
            match until {
                Some(until) if self.arrived.wait_until(&mut state, until).timed_out() => break,
                Some(_) => (),
                None => self.arrived.wait(&mut state),
            }
        }
        state.asleep = false;
        let open = !state.closed || !state.letters.is_empty();
        if into.is_empty() {
            std::mem::swap(into, &mut state.letters);
        } else {
            into.append(&mut state.letters);
        }
        open
    }

    /// Appends all letters to `into` without waiting for any.
    pub fn drain(&self, into: &mut Vec<T>) {
        into.append(&mut self.state.lock().letters);
    }

    /// Takes no more letters; those that lie there can still be received.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.arrived.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn letters_arrive_in_order_and_a_closed_inbox_empties_first() {
        let inbox = Arc::new(Inbox::default());
        let sender = inbox.clone();
        let thread = std::thread::spawn(move || {
            for letter in 0..1000 {
                sender.send(letter).unwrap();
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
    fn waiting_ends_when_the_time_has_come() {
        let inbox = Inbox::<u8>::default();
        let mut letters = Vec::new();
        assert!(inbox.receive(&mut letters, Some(Instant::now())));
        assert!(letters.is_empty());
    }
}

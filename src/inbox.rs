//! What one thread hears from all others: a list behind a lock, taken whole, and a bell.
//!
//! Only a sleeping receiver costs whoever wakes it a system call, and it is woken only for what it sleeps for: letters wake it
//! always, the bell only if it listens for it. While nobody watches anything, for one, writes do not wake the watch hub.

use std::time::Instant;

use parking_lot::{Condvar, Mutex};

/// A mailbox with many senders and one receiver. The bound is the senders' business: every kind of letter is bounded by
/// something that its sender waits for.
#[derive(Debug)]
pub struct Inbox<T> {
    state: Mutex<State<T>>,
    roused: Condvar,
}

#[derive(Debug)]
struct State<T> {
    letters: Vec<T>,
    sleep: Sleep,
    closed: bool,
}

/// What the receiver can be woken by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sleep {
    Awake,
    /// By letters.
    Deep,
    /// By the bell, too.
    Light,
}

impl<T> Default for Inbox<T> {
    fn default() -> Self {
        let state = State { letters: Vec::new(), sleep: Sleep::Awake, closed: false };
        Self { state: Mutex::new(state), roused: Condvar::new() }
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
        if std::mem::replace(&mut state.sleep, Sleep::Awake) != Sleep::Awake {
            drop(state);
            self.roused.notify_one();
        }
        Ok(())
    }

    /// Rings the bell: there is news, though no letter.
    pub fn ring(&self) {
        let mut state = self.state.lock();
        if state.sleep == Sleep::Light {
            state.sleep = Sleep::Awake;
            drop(state);
            self.roused.notify_one();
        }
    }

    /// Waits until there are letters or the time has come, then appends all letters to `into`. False once closed and empty.
    pub fn receive(&self, into: &mut Vec<T>, until: Option<Instant>) -> bool {
        self.wait(into, Sleep::Deep, || false, until)
    }

    /// The same, but the bell ends the waiting too. `has_news` tells whether it rang for something that was not seen yet; it
    /// is looked at under the lock that [`Inbox::ring`] takes, so one of the two sees the other.
    pub fn receive_or_hear(&self, into: &mut Vec<T>, has_news: impl FnOnce() -> bool, until: Option<Instant>) -> bool {
        self.wait(into, Sleep::Light, has_news, until)
    }

    fn wait(&self, into: &mut Vec<T>, sleep: Sleep, has_news: impl FnOnce() -> bool, until: Option<Instant>) -> bool {
        let mut state = self.state.lock();
        if state.letters.is_empty() && !state.closed && !has_news() {
            state.sleep = sleep;
        }
        while state.sleep != Sleep::Awake && !state.closed {
            match until {
                Some(until) if self.roused.wait_until(&mut state, until).timed_out() => break,
                Some(_) => (),
                None => self.roused.wait(&mut state),
            }
        }
        state.sleep = Sleep::Awake;
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

    /// Whether letters lie there.
    #[must_use]
    pub fn has_letters(&self) -> bool {
        !self.state.lock().letters.is_empty()
    }

    /// Whether it takes no more letters.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// Takes no more letters; those that lie there can still be received.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.roused.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;

    #[test]
    fn letters_arrive_in_order_and_a_closed_inbox_empties_first() {
        let inbox = Arc::new(Inbox::default());
        let sender = inbox.clone();
        let thread = thread::spawn(move || {
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
        assert!(inbox.receive_or_hear(&mut letters, || false, Some(Instant::now())));
        assert!(letters.is_empty());
    }

    #[test]
    fn the_bell_wakes_who_listens_and_nobody_else() {
        let inbox = Arc::new(Inbox::<u8>::default());
        let listener = inbox.clone();
        let thread = thread::spawn(move || listener.receive_or_hear(&mut Vec::new(), || false, None));
        while inbox.state.lock().sleep != Sleep::Light {
            thread::yield_now();
        }
        inbox.ring();
        assert!(thread.join().unwrap(), "it is woken, and open");

        let listener = inbox.clone();
        let thread = thread::spawn(move || {
            let mut letters = Vec::new();
            listener.receive(&mut letters, None);
            letters
        });
        while inbox.state.lock().sleep != Sleep::Deep {
            thread::yield_now();
        }
        inbox.ring();
        assert_eq!(inbox.state.lock().sleep, Sleep::Deep, "it sleeps on");
        inbox.send(7).unwrap();
        assert_eq!(thread.join().unwrap(), [7]);
    }

    #[test]
    fn news_that_was_not_seen_keeps_awake() {
        let inbox = Inbox::<u8>::default();
        assert!(inbox.receive_or_hear(&mut Vec::new(), || true, None));
    }
}

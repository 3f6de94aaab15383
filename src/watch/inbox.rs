//! What the hub hears: inputs from streams, and a bell that rings when something was published.
//!
//! A sleeping hub is woken only for what it sleeps for. While nobody watches anything, writes do not wake it.

use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::hub::Input;

/// The hub's ear.
#[derive(Default)]
pub struct Inbox {
    state: Mutex<State>,
    rung: Condvar,
}

#[derive(Default)]
struct State {
    inputs: Vec<Input>,
    sleep: Sleep,
    closed: bool,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Sleep {
    #[default]
    Awake,
    /// Woken by inputs only.
    Deep,
    /// Woken by writes too.
    Light,
}

impl Inbox {
    /// Leaves an input. Once the hub has stopped nobody hears it: a stream that is opened then has ended already.
    pub fn send(&self, input: Input) {
        let mut state = self.state.lock();
        if state.closed {
            drop(state);
            if let Input::Open { outbox, .. } = input {
                outbox.close();
            }
            return;
        }
        state.inputs.push(input);
        if std::mem::take(&mut state.sleep) != Sleep::Awake {
            drop(state);
            self.rung.notify_one(); // Only a sleeping hub costs a system call.
        }
    }

    /// Something was published.
    pub fn ring(&self) {
        let mut state = self.state.lock();
        if state.sleep == Sleep::Light {
            state.sleep = Sleep::Awake;
            drop(state);
            self.rung.notify_one();
        }
    }

    /// Takes all inputs, without waiting.
    pub fn take(&self, into: &mut Vec<Input>) {
        into.append(&mut self.state.lock().inputs);
    }

    /// Whether there are inputs to be taken.
    #[must_use]
    pub fn has_inputs(&self) -> bool {
        !self.state.lock().inputs.is_empty()
    }

    /// Sleeps until there is an input, something is published (if anybody `listens`), or the time has come; then takes all
    /// inputs. `news` tells whether something was published that the hub has not seen. False once closed.
    pub fn receive(
        &self,
        into: &mut Vec<Input>,
        listens: bool,
        news: impl FnOnce() -> bool,
        until: Option<Instant>,
    ) -> bool {
        let mut state = self.state.lock();
        // Looked at under the lock that `ring` takes behind a publication, so one of the two sees the other.
        if state.inputs.is_empty() && !state.closed && !(listens && news()) {
            state.sleep = if listens { Sleep::Light } else { Sleep::Deep };
            match until {
                Some(until) => _ = self.rung.wait_until(&mut state, until),
                None => self.rung.wait(&mut state),
            }
            state.sleep = Sleep::Awake;
        }
        into.append(&mut state.inputs);
        !state.closed
    }

    /// Takes no more inputs; those that lie there can still be received.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.rung.notify_all();
    }
}

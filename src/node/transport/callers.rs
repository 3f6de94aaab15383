//! Which process speaks for a member: one at a time.
//!
//! Two processes with copies of one data directory would both vote in one term, and acknowledge entries that only one of them
//! has. So whoever calls in the name of a member whose stream still stands has to wait until that has ended, as it soon does
//! when a process was killed; if it goes on speaking, the caller is refused.

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{frame, line::SILENCE};

/// Who has said nothing for so long has gone, or may as well have.
const GONE: Duration = SILENCE.saturating_mul(3);
/// What was on its way when a process was killed has come by then.
const TRAILING: Duration = Duration::from_millis(300);

/// All who speak.
#[derive(Debug, Default)]
pub(super) struct Callers {
    speakers: Mutex<BTreeMap<u64, Speaker>>,
    left: Condvar,
}

#[derive(Debug)]
struct Speaker {
    life: u64,
    address: String,
    /// Which of its streams.
    number: u64,
    heard: Instant,
}

/// The right to speak for a member on one stream, until this is dropped.
#[derive(Debug)]
pub(super) struct Floor<'a> {
    callers: &'a Callers,
    member: u64,
    number: u64,
}

impl Callers {
    /// Gives the floor to the process that calls itself `life`; or says why it does not get it, after having waited for the
    /// one that has it. A process may call again while its old stream ends.
    pub fn enter(&self, member: u64, life: u64, address: &str) -> Result<Floor<'_>, String> {
        let arrived = Instant::now();
        let mut speakers = self.speakers.lock();
        while let Some(speaker) = speakers.get(&member).filter(|speaker| speaker.life != life) {
            if speaker.heard >= arrived + TRAILING {
                let address = &speaker.address;
                return Err(format!(
                    "another process speaks for member {member:x} already, from {address}: is its data directory used twice?"
                ));
            }
            let gone = speaker.heard + GONE;
            if gone <= Instant::now() {
                break;
            }
            self.left.wait_until(&mut speakers, gone);
        }
        let number = speakers.get(&member).map_or(0, |speaker| speaker.number + 1);
        let speaker = Speaker { life, address: address.to_owned(), number, heard: Instant::now() };
        speakers.insert(member, speaker);
        Ok(Floor { callers: self, member, number })
    }
}

impl Floor<'_> {
    /// Something came on the stream. An error if another process speaks by now.
    pub fn heard(&self) -> io::Result<()> {
        let mut speakers = self.callers.speakers.lock();
        match speakers.get_mut(&self.member) {
            Some(speaker) if speaker.number == self.number => speaker.heard = Instant::now(),
            _ => return Err(frame::invalid("this member speaks on another stream by now".to_owned())),
        }
        drop(speakers);
        self.callers.left.notify_all(); // Whoever waits can see that it waits in vain.
        Ok(())
    }
}

impl Drop for Floor<'_> {
    fn drop(&mut self) {
        let mut speakers = self.callers.speakers.lock();
        if speakers.get(&self.member).is_some_and(|speaker| speaker.number == self.number) {
            speakers.remove(&self.member);
        }
        drop(speakers);
        self.callers.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    #[test]
    fn a_process_may_call_again_and_its_old_stream_ends() {
        let callers = Callers::default();
        let old = callers.enter(1, 7, "a:1").unwrap();
        old.heard().unwrap();
        let new = callers.enter(1, 7, "a:2").unwrap();
        assert!(old.heard().is_err());
        drop(old);
        new.heard().unwrap();
        let _other = callers.enter(2, 7, "b:1").unwrap();
    }

    #[test]
    fn a_second_process_waits_for_the_first_to_end() {
        let callers = Callers::default();
        let old = callers.enter(1, 7, "a:1").unwrap();
        let (told, tells) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                told.send(()).unwrap();
                callers.enter(1, 8, "b:1").unwrap().heard().unwrap();
            });
            tells.recv().unwrap();
            drop(old);
        });
        assert!(callers.speakers.lock().is_empty());
    }

    #[test]
    fn a_second_process_is_refused_while_the_first_speaks_and_heard_when_that_is_silent() {
        let callers = Callers::default();
        let old = callers.enter(1, 7, "a:1").unwrap();
        thread::scope(|scope| {
            let second = scope.spawn(|| callers.enter(1, 8, "b:1").map(drop));
            while !second.is_finished() {
                old.heard().unwrap();
                thread::park_timeout(Duration::from_millis(1));
            }
            assert!(second.join().unwrap().unwrap_err().contains("already, from a:1"));
        });
        callers.speakers.lock().get_mut(&1).unwrap().heard = Instant::now().checked_sub(GONE).unwrap();
        let new = callers.enter(1, 8, "b:1").unwrap();
        assert!(old.heard().is_err());
        drop(old);
        new.heard().unwrap();
    }
}

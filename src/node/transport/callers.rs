//! Which process speaks for a member: one at a time.
//!
//! Two processes with copies of one data directory would both vote in one term, and acknowledge entries that only one of them
//! has. So whoever calls in the name of a member whose stream still stands has to wait until that has ended, as it soon does
//! when a process was killed; if it goes on speaking, the caller is refused. Each member decides for itself to whom it listens.

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{frame, line::SILENCE};

/// Who has said nothing for so long has gone, or may as well have.
const GONE: Duration = SILENCE.saturating_mul(3);
/// A caller that has not been answered by then may have given up, and calls again.
const LONGEST_WAIT: Duration = Duration::from_millis(1400);
/// What was on its way when a process was killed has come by then.
const TRAILING: Duration = Duration::from_millis(300);

/// All who speak.
#[derive(Debug, Default)]
pub(super) struct Callers {
    state: Mutex<State>,
    /// Somebody has left, or has been heard.
    news: Condvar,
}

#[derive(Debug, Default)]
struct State {
    speakers: BTreeMap<u64, Speaker>,
    /// How many streams there have been.
    streams: u64,
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
        let mut state = self.state.lock();
        while let Some(speaker) = state.speakers.get(&member).filter(|speaker| speaker.life != life) {
            let from = speaker.address.clone();
            if speaker.heard >= arrived + TRAILING {
                return Err(format!(
                    "another process speaks for member {member:x} already, from {from}: is its data directory used twice?"
                ));
            }
            let gone = speaker.heard + GONE;
            if gone <= Instant::now() {
                break;
            }
            if self.news.wait_until(&mut state, gone.min(arrived + LONGEST_WAIT)).timed_out()
                && arrived.elapsed() >= LONGEST_WAIT
            {
                return Err(format!("member {member:x} has another stream, from {from}, that has not ended yet"));
            }
        }
        state.streams += 1;
        let number = state.streams;
        let speaker = Speaker { life, address: address.to_owned(), number, heard: Instant::now() };
        state.speakers.insert(member, speaker);
        Ok(Floor { callers: self, member, number })
    }
}

impl Callers {
    /// Whether a member has a stream.
    pub fn speaks(&self, member: u64) -> bool {
        self.state.lock().speakers.contains_key(&member)
    }
}

impl Floor<'_> {
    /// Something came on the stream. An error if another stream of this member has taken its place.
    pub fn heard(&self) -> io::Result<()> {
        match self.callers.state.lock().speakers.get_mut(&self.member) {
            Some(speaker) if speaker.number == self.number => speaker.heard = Instant::now(),
            _ => return Err(frame::invalid("this member speaks on another stream by now".to_owned())),
        }
        self.callers.news.notify_all();
        Ok(())
    }
}

impl Drop for Floor<'_> {
    fn drop(&mut self) {
        let is_own = |_: &u64, speaker: &mut Speaker| speaker.number == self.number;
        self.callers.state.lock().speakers.extract_if(self.member..=self.member, is_own).for_each(drop);
        self.callers.news.notify_all();
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
    fn an_old_stream_that_ends_late_takes_nothing_from_a_new_one() {
        let callers = Callers::default();
        let oldest = callers.enter(1, 7, "a:1").unwrap();
        drop(callers.enter(1, 7, "a:2").unwrap());
        assert!(oldest.heard().is_err());
        let newest = callers.enter(1, 7, "a:3").unwrap();
        assert!(oldest.heard().is_err());
        drop(oldest);
        newest.heard().unwrap();
    }

    #[test]
    fn nobody_waits_longer_than_he_is_waited_for() {
        let callers = Callers::default();
        let _stuck = callers.enter(1, 7, "a:1").unwrap();
        assert!(callers.enter(1, 8, "b:1").unwrap_err().contains("from a:1, that has not ended yet"));
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
        assert!(callers.state.lock().speakers.is_empty());
    }

    #[test]
    fn a_second_process_is_refused_while_the_first_speaks_and_heard_when_that_is_silent() {
        let callers = Callers::default();
        let old = callers.enter(1, 7, "a:1").unwrap();
        thread::scope(|scope| {
            let second = scope.spawn(|| {
                // On a machine that is too busy for the first to be heard in time the second is told to come again.
                while callers.enter(1, 8, "b:1").map(drop).unwrap_err().contains("not ended yet") {}
                callers.enter(1, 8, "b:1").map(drop)
            });
            while !second.is_finished() {
                old.heard().unwrap();
                thread::park_timeout(Duration::from_millis(1));
            }
            assert!(second.join().unwrap().unwrap_err().contains("already, from a:1"));
        });
        callers.state.lock().speakers.get_mut(&1).unwrap().heard = Instant::now().checked_sub(GONE).unwrap();
        let new = callers.enter(1, 8, "b:1").unwrap();
        assert!(old.heard().is_err());
        drop(old);
        new.heard().unwrap();
    }
}

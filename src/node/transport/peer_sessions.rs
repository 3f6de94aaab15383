//! Ensures that messages of a member are accepted from one process at a time.
//!
//! Two processes with copies of one data directory would both vote in one term, and acknowledge entries that only one of them
//! has. So a process that connects as a member which still has an open stream has to wait until that stream has ended, which
//! happens soon if the other process was killed. If frames keep arriving on the open stream, the new connection is refused. Each
//! member decides independently which process it accepts.

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{connection::KEEPALIVE_INTERVAL, frame};

/// A session without frames for this long is considered dead: even an idle process sends keep-alives.
const SESSION_TIMEOUT: Duration = KEEPALIVE_INTERVAL.saturating_mul(3);
/// The longest time that a new process waits: after it, its handshake may have timed out. It connects again.
const MAX_WAIT: Duration = Duration::from_millis(1400);
/// Frames that were in flight when a process was killed have arrived within this time.
const IN_FLIGHT_TIME: Duration = Duration::from_millis(300);

/// The sessions of all members that have a stream to this one.
#[derive(Debug, Default)]
pub(super) struct PeerSessions {
    state: Mutex<State>,
    /// Notified when a session ends or a frame is received.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    sessions: BTreeMap<u64, Session>,
    /// The number of streams so far.
    streams: u64,
}

#[derive(Debug)]
struct Session {
    incarnation: u64,
    address: String,
    /// The number of its stream.
    number: u64,
    last_received: Instant,
}

/// A stream's session, until this is dropped: frames on the stream are accepted as those of the member.
#[derive(Debug)]
pub(super) struct SessionGuard<'a> {
    all: &'a PeerSessions,
    member: u64,
    number: u64,
}

impl PeerSessions {
    /// Opens a session for the process that is identified by `incarnation`. Waits for a session of another process to end, and
    /// returns the reason if it does not. A process may open a new session while its old stream is ending.
    pub fn open(&self, member: u64, incarnation: u64, address: &str) -> Result<SessionGuard<'_>, String> {
        let started = Instant::now();
        let mut state = self.state.lock();
        while let Some(session) = state.sessions.get(&member).filter(|session| session.incarnation != incarnation) {
            let from = session.address.clone();
            if session.last_received >= started + IN_FLIGHT_TIME {
                return Err(format!(
                    "another process runs as member {member:x}, at {from}: is its data directory in use twice?"
                ));
            }
            let expiry = session.last_received + SESSION_TIMEOUT;
            if expiry <= Instant::now() {
                break;
            }
            if self.changed.wait_until(&mut state, expiry.min(started + MAX_WAIT)).timed_out()
                && started.elapsed() >= MAX_WAIT
            {
                return Err(format!("member {member:x} has another stream, from {from}, that has not ended yet"));
            }
        }
        state.streams += 1;
        let number = state.streams;
        let session = Session { incarnation, address: address.to_owned(), number, last_received: Instant::now() };
        state.sessions.insert(member, session);
        Ok(SessionGuard { all: self, member, number })
    }
}

impl PeerSessions {
    /// Whether the member has a stream.
    pub fn is_open(&self, member: u64) -> bool {
        self.state.lock().sessions.contains_key(&member)
    }
}

impl SessionGuard<'_> {
    /// Notes that a frame was received on the stream. An error if the member has a newer stream.
    pub fn touch(&self) -> io::Result<()> {
        match self.all.state.lock().sessions.get_mut(&self.member) {
            Some(session) if session.number == self.number => session.last_received = Instant::now(),
            _ => return Err(frame::invalid("the member has a newer stream".to_owned())),
        }
        self.all.changed.notify_all();
        Ok(())
    }
}

impl Drop for SessionGuard<'_> {
    fn drop(&mut self) {
        let is_own = |_: &u64, session: &mut Session| session.number == self.number;
        self.all.state.lock().sessions.extract_if(self.member..=self.member, is_own).for_each(drop);
        self.all.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    #[test]
    fn a_process_may_reconnect_and_its_old_stream_ends() {
        let sessions = PeerSessions::default();
        let old = sessions.open(1, 7, "a:1").unwrap();
        old.touch().unwrap();
        let new = sessions.open(1, 7, "a:2").unwrap();
        assert!(old.touch().is_err());
        drop(old);
        new.touch().unwrap();
        let _other = sessions.open(2, 7, "b:1").unwrap();
    }

    #[test]
    fn an_old_stream_that_ends_late_does_not_end_the_new_session() {
        let sessions = PeerSessions::default();
        let oldest = sessions.open(1, 7, "a:1").unwrap();
        drop(sessions.open(1, 7, "a:2").unwrap());
        assert!(oldest.touch().is_err());
        let newest = sessions.open(1, 7, "a:3").unwrap();
        assert!(oldest.touch().is_err());
        drop(oldest);
        newest.touch().unwrap();
    }

    #[test]
    fn a_wait_for_an_open_session_is_bounded() {
        let sessions = PeerSessions::default();
        let _stuck = sessions.open(1, 7, "a:1").unwrap();
        assert!(sessions.open(1, 8, "b:1").unwrap_err().contains("from a:1, that has not ended yet"));
    }

    #[test]
    fn a_second_process_waits_for_the_first_to_end() {
        let sessions = PeerSessions::default();
        let old = sessions.open(1, 7, "a:1").unwrap();
        let (started, starts) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                started.send(()).unwrap();
                sessions.open(1, 8, "b:1").unwrap().touch().unwrap();
            });
            starts.recv().unwrap();
            drop(old);
        });
        assert!(sessions.state.lock().sessions.is_empty());
    }

    #[test]
    fn a_second_process_is_refused_while_the_first_is_active_and_accepted_when_it_is_not() {
        let sessions = PeerSessions::default();
        let old = sessions.open(1, 7, "a:1").unwrap();
        thread::scope(|scope| {
            let second = scope.spawn(|| {
                // If the machine is too busy for the first process to send in time, the second one is told to try again.
                while sessions.open(1, 8, "b:1").map(drop).unwrap_err().contains("not ended yet") {}
                sessions.open(1, 8, "b:1").map(drop)
            });
            while !second.is_finished() {
                old.touch().unwrap();
                thread::park_timeout(Duration::from_millis(1));
            }
            assert!(second.join().unwrap().unwrap_err().contains("another process runs as member 1, at a:1"));
        });
        sessions.state.lock().sessions.get_mut(&1).unwrap().last_received =
            Instant::now().checked_sub(SESSION_TIMEOUT).unwrap();
        let new = sessions.open(1, 8, "b:1").unwrap();
        assert!(old.touch().is_err());
        drop(old);
        new.touch().unwrap();
    }
}

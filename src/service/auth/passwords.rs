//! Passwords: hashing and checking them.
//!
//! bcrypt is slow on purpose: tens of milliseconds of processor time for each login. So it runs on threads of its own, with a low
//! priority, and a bounded number of logins wait for them; more are refused at once. A password that was checked is remembered
//! for a short time, as a keyed hash, so that a thousand clients of one user that log in together cost one check. What is
//! remembered contains the stored hash, so a changed password is not found, and the key is new in every process.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use quick_cache::sync::Cache;
use sha2::Sha256;

use crate::{
    error::Error,
    metrics::{self, METRICS},
    node::low_priority::LowPriorityThreads,
};

/// How long a password that was checked is remembered.
const REMEMBERED: Duration = Duration::from_mins(1);
/// How many of them are remembered.
const REMEMBERED_LOGINS: usize = 10_000;
/// Longer passwords cannot be hashed.
pub const MAX_PASSWORD_BYTES: usize = 72;

/// A keyed hash of a user, the stored hash and the password.
type LoginHash = [u8; 32];

/// Threads that hash and check passwords.
pub struct Passwords {
    cost: u32,
    threads: LowPriorityThreads,
    key: [u8; 32],
    remembered: Cache<LoginHash, Instant>,
}

impl Passwords {
    /// Starts the threads.
    pub fn start(cost: u32, max_waiting: usize, threads: usize) -> io::Result<Self> {
        let threads = LowPriorityThreads::start("passwords", threads, max_waiting)?;
        Ok(Self { cost, threads, key: rand::random(), remembered: Cache::new(REMEMBERED_LOGINS) })
    }

    /// How many passwords wait to be hashed or checked.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.threads.waiting()
    }

    /// Hashes a new password, and passes the hash on.
    pub fn hash(&self, password: String, then: impl FnOnce(Result<Vec<u8>, Error>) + Send + 'static) {
        if password.len() > MAX_PASSWORD_BYTES {
            let text = format!("bcrypt: password length exceeds {MAX_PASSWORD_BYTES} bytes");
            return then(Err(Error::Unknown(text)));
        }
        let cost = self.cost;
        self.run(then, move || Ok(hash(password.as_bytes(), cost)));
    }

    /// Whether a password is the one of a stored hash.
    pub fn check(
        self: &Arc<Self>,
        user: &str,
        password: String,
        stored: Bytes,
        then: impl FnOnce(Result<bool, Error>) + Send + 'static,
    ) {
        let login = self.login_hash(user, &password, &stored);
        let is_remembered = self.is_remembered(&login);
        let outcome = if is_remembered { "hit" } else { "miss" };
        METRICS.cache_lookups.with_label_values(&["passwords", outcome]).inc();
        if is_remembered {
            return then(Ok(true));
        }
        let this = self.clone();
        self.run(then, move || {
            // Another login of the same user may have been checked while this one waited.
            if this.is_remembered(&login) {
                return Ok(true);
            }
            let is_right = matches(password.as_bytes(), &stored);
            if is_right {
                this.remembered.insert(login, Instant::now());
            }
            Ok(is_right)
        });
    }

    /// Runs a job on one of the threads, or refuses it if too many wait already.
    fn run<T: 'static>(
        &self,
        then: impl FnOnce(Result<T, Error>) + Send + 'static,
        job: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) {
        if let Err(then) = self.threads.run(then, move |then| then(job())) {
            metrics::refused("logins");
            then(Err(Error::LimitReached {
                what: "too many logins wait for their password to be checked",
                flag: "max-waiting-logins",
                value: self.threads.max_waiting(),
            }));
        }
    }

    fn is_remembered(&self, login: &LoginHash) -> bool {
        self.remembered.get(login).is_some_and(|checked| checked.elapsed() < REMEMBERED)
    }

    fn login_hash(&self, user: &str, password: &str, stored: &[u8]) -> LoginHash {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("a key may have any length");
        for part in [user.as_bytes(), stored, password.as_bytes()] {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

/// A hash in the form that etcd stores: `$2a$10$…`.
fn hash(password: &[u8], cost: u32) -> Vec<u8> {
    let parts = bcrypt::hash_with_salt(password, cost, rand::random()).expect("the cost was checked");
    parts.format_for_version(bcrypt::Version::TwoA).into_bytes()
}

/// Whether a password is the one of a stored hash. A stored text that is no hash is of a user that cannot log in.
fn matches(password: &[u8], stored: &[u8]) -> bool {
    std::str::from_utf8(stored).is_ok_and(|stored| bcrypt::verify(password, stored).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn passwords(max_waiting: usize) -> Arc<Passwords> {
        Arc::new(Passwords::start(4, max_waiting, 1).unwrap())
    }

    fn hashed(passwords: &Passwords, password: &str) -> Result<Vec<u8>, Error> {
        let (sender, receiver) = mpsc::channel();
        passwords.hash(password.to_owned(), move |hash| sender.send(hash).unwrap());
        receiver.recv().unwrap()
    }

    fn checked(passwords: &Arc<Passwords>, password: &str, stored: &[u8]) -> bool {
        let (sender, receiver) = mpsc::channel();
        let stored = Bytes::copy_from_slice(stored);
        passwords.check("ann", password.to_owned(), stored, move |is_right| sender.send(is_right).unwrap());
        receiver.recv().unwrap().unwrap()
    }

    #[test]
    fn a_password_is_checked_against_its_hash() {
        let passwords = passwords(8);
        let stored = hashed(&passwords, "secret").unwrap();
        assert!(stored.starts_with(b"$2a$04$"));
        assert!(checked(&passwords, "secret", &stored) && checked(&passwords, "secret", &stored));
        assert!(!checked(&passwords, "Secret", &stored) && !checked(&passwords, "", &stored));
        assert!(!checked(&passwords, "", b"") && !checked(&passwords, "x", b"not a hash"));
        assert_eq!(passwords.remembered.len(), 1, "only what was right is remembered");
    }

    /// Made by Go's bcrypt, with its prefix, and by others.
    #[test]
    fn hashes_of_other_programs_are_understood() {
        let stored = b"$2a$04$4Kx6v8YV5YVYtJ1uYZb1UuQ0M3bqZ2yJ0b7Zp7m7d1b0k3Yk5n1eG";
        assert!(!matches(b"secret", stored));
        for version in [bcrypt::Version::TwoA, bcrypt::Version::TwoB, bcrypt::Version::TwoX, bcrypt::Version::TwoY] {
            let parts = bcrypt::hash_with_salt(b"secret", 4, [7; 16]).unwrap();
            assert!(matches(b"secret", parts.format_for_version(version).as_bytes()));
        }
    }

    #[test]
    fn a_password_that_is_too_long_is_refused_as_by_go() {
        let passwords = passwords(8);
        assert!(hashed(&passwords, &"x".repeat(72)).is_ok());
        let refused = hashed(&passwords, &"x".repeat(73)).unwrap_err();
        assert_eq!(refused.to_string(), "bcrypt: password length exceeds 72 bytes");
    }

    #[test]
    fn logins_beyond_the_queue_are_refused_at_once() {
        let passwords = passwords(2);
        let (inside, outside) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        passwords.run(
            |_: Result<(), Error>| (),
            move || {
                inside.send(()).unwrap();
                released.recv().unwrap();
                Ok(())
            },
        );
        outside.recv().unwrap(); // The only thread is busy.
        let (sender, outcomes) = mpsc::channel();
        for _ in 0..3 {
            let sender = sender.clone();
            passwords.run(move |outcome: Result<(), Error>| sender.send(outcome).unwrap(), || Ok(()));
        }
        let refused = outcomes.recv().unwrap().unwrap_err().to_string();
        assert!(refused.ends_with("(--max-waiting-logins=2)"), "{refused}");
        release.send(()).unwrap();
        assert_eq!([outcomes.recv().unwrap(), outcomes.recv().unwrap()], [Ok(()), Ok(())]);
    }
}

//! Simple tokens: what a client shows after it has logged in.
//!
//! Each member keeps them in memory. A token is issued where the entry of the login is applied, so every member knows it once it
//! has applied that entry, whose index is part of the token. It ends when it was not used on this member for a while, when the
//! user's password changes, when authentication is disabled, and when the process ends.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::RwLock;

use crate::{auth::TokenEffect, state::Effect};

/// Expired tokens are removed at most this often.
const SWEEP_INTERVAL_MS: u64 = 1000;

#[derive(Debug)]
struct Token {
    user: Arc<str>,
    /// When it was last used, in milliseconds since the start.
    used: AtomicU64,
}

/// The simple tokens that are valid on this member.
#[derive(Debug)]
pub struct SimpleTokens {
    /// How long a token is valid after its last use.
    ttl_ms: u64,
    started: Instant,
    /// The last index of the log when the process started.
    index_at_start: u64,
    swept: AtomicU64,
    tokens: RwLock<HashMap<String, Token>>,
}

impl SimpleTokens {
    #[must_use]
    pub fn new(ttl: Duration, index_at_start: u64) -> Self {
        Self {
            ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
            started: Instant::now(),
            index_at_start,
            swept: AtomicU64::new(0),
            tokens: RwLock::default(),
        }
    }

    /// The user of a token, if it is valid; this counts as a use.
    #[must_use]
    pub fn user(&self, token: &str) -> Option<Arc<str>> {
        self.user_at(token, self.now())
    }

    fn user_at(&self, token: &str, now: u64) -> Option<Arc<str>> {
        let tokens = self.tokens.read();
        let found = tokens.get(token).filter(|found| !self.is_expired(found, now))?;
        found.used.fetch_max(now, Ordering::Relaxed);
        Some(found.user.clone())
    }

    /// Takes in what the entries that were applied require.
    pub fn note(&self, effects: &[Effect]) {
        for effect in effects {
            if let Effect::Tokens(effect) = effect {
                self.note_at(effect, self.now());
            }
        }
    }

    fn note_at(&self, effect: &TokenEffect, now: u64) {
        let mut tokens = self.tokens.write();
        match effect {
            // An entry that is applied again after a restart: its token may have ended long ago.
            TokenEffect::Issued { token, .. } if index_of(token).is_some_and(|index| index <= self.index_at_start) => {}
            TokenEffect::Issued { user, token } => {
                tokens.insert(token.clone(), Token { user: user.as_str().into(), used: AtomicU64::new(now) });
            }
            TokenEffect::RevokedOf(user) => tokens.retain(|_, token| *token.user != **user),
            TokenEffect::AllRevoked => tokens.clear(),
        }
        // Only logins make the table grow, so it is enough to look for expired tokens then.
        if now >= self.swept.load(Ordering::Relaxed) + SWEEP_INTERVAL_MS {
            self.swept.store(now, Ordering::Relaxed);
            tokens.retain(|_, token| !self.is_expired(token, now));
        }
    }

    /// Ends all tokens.
    pub fn clear(&self) {
        self.tokens.write().clear();
    }

    fn is_expired(&self, token: &Token, now: u64) -> bool {
        now.saturating_sub(token.used.load(Ordering::Relaxed)) >= self.ttl_ms
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The index of the entry that issued a token, which is part of the token; None if it is no simple token.
#[must_use]
pub fn index_of(token: &str) -> Option<u64> {
    token.split_once('.')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issued(user: &str, token: &str) -> TokenEffect {
        TokenEffect::Issued { user: user.to_owned(), token: token.to_owned() }
    }

    #[test]
    fn a_token_ends_when_it_was_not_used_for_its_ttl() {
        let tokens = SimpleTokens::new(Duration::from_secs(10), 0);
        tokens.note_at(&issued("ann", "a.1"), 0);
        tokens.note_at(&issued("bob", "b.2"), 0);
        assert_eq!(tokens.user_at("a.1", 9_999).as_deref(), Some("ann"));
        assert_eq!(tokens.user_at("b.2", 10_000), None);
        assert_eq!(tokens.user_at("a.1", 19_998).as_deref(), Some("ann"), "it was used meanwhile");
        tokens.note_at(&issued("cid", "c.3"), 25_000);
        let mut left: Vec<String> = tokens.tokens.read().keys().cloned().collect();
        left.sort_unstable();
        assert_eq!(left, ["a.1", "c.3"], "an expired token takes no memory");
    }

    #[test]
    fn tokens_are_revoked_by_user_or_all_together() {
        let tokens = SimpleTokens::new(Duration::from_secs(10), 0);
        let is_valid = |token| tokens.user_at(token, 1).is_some();
        for (user, token) in [("ann", "a.1"), ("ann", "a.2"), ("bob", "b.3")] {
            tokens.note_at(&issued(user, token), 0);
        }
        tokens.note_at(&TokenEffect::RevokedOf("ann".into()), 1);
        assert!(!is_valid("a.1") && !is_valid("a.2") && is_valid("b.3"));
        tokens.note_at(&TokenEffect::AllRevoked, 1);
        assert!(!is_valid("b.3"));
    }

    #[test]
    fn tokens_of_an_earlier_run_are_not_valid() {
        let tokens = SimpleTokens::new(Duration::from_secs(10), 5);
        tokens.note_at(&issued("ann", "a.5"), 0);
        tokens.note_at(&issued("ann", "a.6"), 0);
        assert_eq!((tokens.user_at("a.5", 1), tokens.user_at("a.6", 1).as_deref()), (None, Some("ann")));
    }

    #[test]
    fn a_token_names_the_entry_that_issued_it() {
        assert_eq!(index_of("abcdefghijklmnop.17"), Some(17));
        assert_eq!([index_of("abc"), index_of("a.b"), index_of("a.b.c"), index_of("")], [None; 4]);
    }
}

//! What a Range asks for.

use super::Interval;

/// What a sort looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The key.
    Key,
    /// How often it was put.
    Version,
    /// The revision that created it.
    Create,
    /// The revision of its newest put.
    Mod,
    /// Its value.
    Value,
}

/// Which way a sort goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Not asked for. With a target other than the key, what the limit let through is sorted nevertheless.
    None,
    /// Smallest first.
    Ascend,
    /// Largest first; equal ones stay in key order.
    Descend,
}

/// Inclusive bounds on revisions; zero is no bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filters {
    /// Smallest revision of the newest put.
    pub min_mod: i64,
    /// Largest revision of the newest put.
    pub max_mod: i64,
    /// Smallest revision of creation.
    pub min_create: i64,
    /// Largest revision of creation.
    pub max_create: i64,
}

impl Filters {
    /// Whether nothing is filtered.
    #[must_use]
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a key is let through.
    pub(super) fn admit(&self, modified: i64, create: impl FnOnce() -> i64) -> bool {
        let within = |at: i64, min: i64, max: i64| (min == 0 || at >= min) && (max == 0 || at <= max);
        within(modified, self.min_mod, self.max_mod)
            && (self.min_create == 0 && self.max_create == 0 || within(create(), self.min_create, self.max_create))
    }
}

/// A Range request, validated.
#[derive(Debug, Clone)]
pub struct Query {
    /// Which keys.
    pub interval: Interval,
    /// At most so many; zero or less is all.
    pub limit: i64,
    /// As of when; zero or less is now.
    pub revision: i64,
    /// Which way to sort.
    pub order: Order,
    /// What to sort by.
    pub target: Target,
    /// Leave values (and leases) out.
    pub keys_only: bool,
    /// Only count.
    pub count_only: bool,
    /// Whether what the limit cuts off is to be counted.
    pub counts_rest: bool,
    /// Which revisions to let through.
    pub filters: Filters,
}

impl Query {
    /// All of an interval, now, in key order.
    #[must_use]
    pub fn all(interval: Interval) -> Self {
        Self {
            interval,
            limit: 0,
            revision: 0,
            order: Order::None,
            target: Target::Key,
            keys_only: false,
            count_only: false,
            counts_rest: true,
            filters: Filters::default(),
        }
    }

    /// The number of keys that have to be looked at, where the index can stop early.
    pub(super) fn fetch_limit(&self) -> usize {
        let default_order = self.order == Order::None || (self.order == Order::Ascend && self.target == Target::Key);
        if self.limit > 0 && default_order && self.filters.is_off() {
            usize::try_from(self.limit).unwrap_or(usize::MAX).saturating_add(1)
        } else {
            usize::MAX
        }
    }

    /// Whether the answer is in another order than the keys are. What is only counted has none.
    #[must_use]
    pub fn is_sorted(&self) -> bool {
        !self.count_only && (self.target != Target::Key || self.order == Order::Descend)
    }

    /// Whether it asks for what the index forgets of keys that have changed since.
    pub(super) fn needs_lives(&self) -> bool {
        self.keys_only
            || self.filters.min_create != 0
            || self.filters.max_create != 0
            || matches!(self.target, Target::Version | Target::Create)
    }
}

//! The parameters of a Range.

use super::Interval;

/// What to sort by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Key,
    Version,
    /// The create revision.
    Create,
    /// The mod revision.
    Mod,
    Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// No order requested. With a target other than the key, the first `limit + 1` keys are still sorted, ascending.
    None,
    Ascend,
    /// Rows with equal targets stay in ascending key order.
    Descend,
}

/// Inclusive bounds on revisions; zero means no bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filters {
    pub min_mod: i64,
    pub max_mod: i64,
    pub min_create: i64,
    pub max_create: i64,
}

impl Filters {
    #[must_use]
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a key with these revisions passes the filters. `create` is called only if it is needed.
    pub(super) fn matches(&self, modified: i64, create: impl FnOnce() -> i64) -> bool {
        let within = |at: i64, min: i64, max: i64| (min == 0 || at >= min) && (max == 0 || at <= max);
        within(modified, self.min_mod, self.max_mod)
            && (self.min_create == 0 && self.max_create == 0 || within(create(), self.min_create, self.max_create))
    }
}

/// A validated Range request.
#[derive(Debug, Clone)]
pub struct Query {
    pub interval: Interval,
    /// Maximum number of keys; zero or less means no limit.
    pub limit: i64,
    /// The revision to read at; zero or less means the head.
    pub revision: i64,
    pub order: Order,
    pub target: Target,
    /// Leave out values, and leases too.
    pub keys_only: bool,
    pub count_only: bool,
    /// Whether keys beyond the limit are counted.
    pub counts_rest: bool,
    pub filters: Filters,
}

impl Query {
    /// All keys of an interval at the head, in key order.
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

    /// How many keys have to be visited; `usize::MAX` unless the index can stop early.
    pub(super) fn fetch_limit(&self) -> usize {
        let default_order = self.order == Order::None || (self.order == Order::Ascend && self.target == Target::Key);
        if self.limit > 0 && default_order && self.filters.is_off() {
            usize::try_from(self.limit).unwrap_or(usize::MAX).saturating_add(1)
        } else {
            usize::MAX
        }
    }

    /// Whether the response is in another order than the keys. A count has no order.
    #[must_use]
    pub fn is_sorted(&self) -> bool {
        !self.count_only && (self.target != Target::Key || self.order == Order::Descend)
    }

    /// Whether it needs metadata, which the index keeps only for the newest change of a key.
    pub(super) fn needs_metadata(&self) -> bool {
        self.keys_only
            || self.filters.min_create != 0
            || self.filters.max_create != 0
            || matches!(self.target, Target::Version | Target::Create)
    }
}

//! A writer with keys of its own that remembers what was acknowledged.
//!
//! It has one transaction in flight at a time, writes unique values, and often two keys at once. So after a crash its keys may
//! be in exactly two states: that of its last acknowledged transaction, or that of the transaction in flight. Anything else is
//! an error: a lost write, half a transaction, or old data that has reappeared.

use std::collections::BTreeMap;

use bytes::Bytes;
use metastore::proto::{
    etcdserverpb::{DeleteRangeRequest, PutRequest, RequestOp, TxnRequest, request_op::Request},
    mvccpb::KeyValue,
};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

/// Few keys, so that each is written, deleted and written again within a round.
const KEYS: usize = 8;
const DELETIONS_PERCENT: u32 = 15;
const LONG_VALUES_PERCENT: u32 = 5;
const LONG_VALUE_BYTES: usize = 16 << 10;

/// The value of each key, and the revision at which it was written.
type State = BTreeMap<Bytes, (Bytes, i64)>;

pub struct Writer {
    name: usize,
    rng: StdRng,
    serial: u64,
    /// The acknowledged state.
    state: State,
    /// The transaction in flight: each key with its value, or None to delete it.
    in_flight: Option<Vec<(Bytes, Option<Bytes>)>>,
    pub acknowledged: u64,
}

/// What happened to the transaction in flight at a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    NoneInFlight,
    Done,
    NotDone,
}

impl Writer {
    pub fn new(name: usize, seed: u64) -> Self {
        let rng = StdRng::seed_from_u64(seed ^ (name as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self { name, rng, serial: 0, state: State::new(), in_flight: None, acknowledged: 0 }
    }

    /// The range of its keys, excluding the end.
    pub fn range(&self) -> (Bytes, Bytes) {
        (Bytes::from(format!("w{:04}/", self.name)), Bytes::from(format!("w{:04}0", self.name)))
    }

    /// The next transaction.
    pub fn next(&mut self) -> TxnRequest {
        assert!(self.in_flight.is_none(), "one transaction at a time");
        self.serial += 1;
        let (first, second) = (self.rng.random_range(0..KEYS), self.rng.random_range(0..KEYS));
        let mut keys = vec![self.key(first)];
        if first != second {
            keys.push(self.key(second));
        }
        let deletes =
            self.rng.random_ratio(DELETIONS_PERCENT, 100) && keys.iter().any(|key| self.state.contains_key(key));
        let value = self.value();
        let changes: Vec<_> = keys.into_iter().map(|key| (key, (!deletes).then(|| value.clone()))).collect();
        let success = changes.iter().map(|(key, value)| op(key, value.as_ref())).collect();
        self.in_flight = Some(changes);
        TxnRequest { success, ..TxnRequest::default() }
    }

    /// The transaction in flight was acknowledged at `revision`.
    pub fn acknowledge(&mut self, revision: i64) {
        let changes = self.in_flight.take().expect("only a transaction in flight is acknowledged");
        self.acknowledged += 1;
        self.state = after(&self.state, &changes, revision);
    }

    /// Checks the keys that were found after a crash.
    pub fn check(&mut self, found: &[KeyValue]) -> Outcome {
        let found: State =
            found.iter().map(|found| (found.key.clone(), (found.value.clone(), found.mod_revision))).collect();
        let Some(changes) = self.in_flight.take() else {
            assert_same(self.name, &found, &self.state);
            return Outcome::NoneInFlight;
        };
        // The revision was not acknowledged; all keys of the transaction must have the same one.
        let written = changes.iter().filter(|(_, value)| value.is_some());
        let revision = written.filter_map(|(key, _)| found.get(key)).map(|(_, revision)| *revision).max().unwrap_or(0);
        let done = after(&self.state, &changes, revision);
        let outcome = if found == done && found != self.state { Outcome::Done } else { Outcome::NotDone };
        if outcome == Outcome::NotDone {
            assert_same(self.name, &found, &self.state);
        }
        self.state = found;
        outcome
    }

    fn key(&self, nth: usize) -> Bytes {
        Bytes::from(format!("w{:04}/{nth}", self.name))
    }

    /// A unique value that cannot be compressed.
    fn value(&mut self) -> Bytes {
        let long = self.rng.random_ratio(LONG_VALUES_PERCENT, 100);
        let len = if long { self.rng.random_range(0..LONG_VALUE_BYTES) } else { self.rng.random_range(0..256) };
        let mut value = format!("{}/{} ", self.name, self.serial).into_bytes();
        let start = value.len();
        value.resize(start + len, 0);
        self.rng.fill_bytes(&mut value[start..]);
        value.into()
    }
}

fn op(key: &Bytes, value: Option<&Bytes>) -> RequestOp {
    let key = key.clone();
    let request = match value {
        Some(value) => Request::RequestPut(PutRequest { key, value: value.clone(), ..PutRequest::default() }),
        None => Request::RequestDeleteRange(DeleteRangeRequest { key, ..DeleteRangeRequest::default() }),
    };
    RequestOp { request: Some(request) }
}

fn after(state: &State, changes: &[(Bytes, Option<Bytes>)], revision: i64) -> State {
    let mut state = state.clone();
    for (key, value) in changes {
        match value {
            Some(value) => state.insert(key.clone(), (value.clone(), revision)),
            None => state.remove(key),
        };
    }
    state
}

fn assert_same(name: usize, found: &State, expected: &State) {
    let brief = |state: &State| {
        let brief = |(key, (value, revision)): (&Bytes, &(Bytes, i64))| {
            let serial = value.split(|byte| *byte == b' ').next().unwrap_or_default();
            format!("{} = {} @{revision}", String::from_utf8_lossy(key), String::from_utf8_lossy(serial))
        };
        state.iter().map(brief).collect::<Vec<_>>().join(", ")
    };
    assert!(found == expected, "writer {name} found\n{}\nbut expected\n{}", brief(found), brief(expected));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(writer: &Writer) -> Vec<KeyValue> {
        let key_value = |(key, (value, revision)): (&Bytes, &(Bytes, i64))| KeyValue {
            key: key.clone(),
            value: value.clone(),
            mod_revision: *revision,
            ..KeyValue::default()
        };
        writer.state.iter().map(key_value).collect()
    }

    /// A writer with a transaction of two puts in flight.
    fn writer_with_two_puts_in_flight() -> Writer {
        let mut writer = Writer::new(0, 1);
        loop {
            let txn = writer.next();
            if writer.serial > 20 && txn.success.len() == 2 && writer.in_flight.as_ref().unwrap()[0].1.is_some() {
                return writer;
            }
            writer.acknowledge(i64::try_from(writer.serial).unwrap());
        }
    }

    #[test]
    fn all_or_nothing_of_a_transaction_is_valid() {
        let mut writer = writer_with_two_puts_in_flight();
        let neither = found(&writer);
        assert_eq!(writer.check(&neither), Outcome::NotDone);
        let mut writer = writer_with_two_puts_in_flight();
        writer.state = after(&writer.state, writer.in_flight.as_ref().unwrap(), 99);
        let both = found(&writer);
        assert_eq!(writer_with_two_puts_in_flight().check(&both), Outcome::Done);
    }

    /// FAULT-9.
    #[test]
    #[should_panic(expected = "but expected")]
    fn half_a_transaction_is_an_error() {
        let mut writer = writer_with_two_puts_in_flight();
        let half = after(&writer.state, &writer.in_flight.as_ref().unwrap()[..1], 99);
        let whole = std::mem::replace(&mut writer.state, half);
        let half = found(&writer);
        writer.state = whole;
        writer.check(&half);
    }
}
